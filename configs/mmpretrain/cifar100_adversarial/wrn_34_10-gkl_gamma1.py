# CIFAR-100, WideResNet-34-10: GKL, basic, first script of the authors' GKL code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100_adversarial/wrn_34_10-gkl_gamma1.py
_base_ = "../_base_/cifar100_wrn_34_10.py"

# With gamma 1 GKL is IKL: wrn_34_10-ikl_alpha4.py trains the same.
model = dict(
    robust_loss=dict(type="GKLLoss", alpha=4.0, beta=20.0, gamma=1.0, weight_temperature=4.0, global_info=True)
)

work_dir = "runs/mmpretrain/cifar100_adversarial/wrn_34_10-gkl_gamma1"
