# CIFAR-10, WideResNet-34-10: GKL, basic, second script of the authors' GKL code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar10_adversarial/wrn_34_10-gkl.py
_base_ = "../_base_/cifar10_wrn_34_10.py"

# weight_temperature: the script asks for 1, but a missing line continuation drops it, and the default is 4.
model = dict(
    robust_loss=dict(type="GKLLoss", alpha=4.0, beta=20.0, gamma=0.2, weight_temperature=4.0, global_info=True)
)

work_dir = "runs/mmpretrain/cifar10_adversarial/wrn_34_10-gkl"
