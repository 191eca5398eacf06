# CIFAR-100, WideResNet-28-10 with SiLU, a million generated images: the baseline of DM-Improves-AT (Wang et al., ICML
# 2023).
#
# ikl train mmpretrain/cifar100_generated/wrn_28_10_1m-kl.py
_base_ = "../_base_/cifar100_wrn_28_10.py"

# NOT VERIFIED: that labels are smoothed for CIFAR-100 as they are for CIFAR-10.
model = dict(robust_loss=dict(type="KLLoss", loss_weight=5.0))

work_dir = "runs/mmpretrain/cifar100_generated/wrn_28_10_1m-kl"
