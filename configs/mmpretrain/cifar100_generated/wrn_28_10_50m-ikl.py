# CIFAR-100, WideResNet-28-10 with SiLU, 50 million generated images: IKL in place of the KL
# divergence (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100_generated/wrn_28_10_50m-ikl.py
_base_ = "./wrn_28_10_50m-kl.py"

# Coefficients from the name of the authors' AutoAttack log; they publish no code for this training.
model = dict(
    robust_loss=dict(_delete_=True, type="IKLLoss", alpha=5.0, beta=12.0, weight_temperature=4.0, global_info=True)
)

work_dir = "runs/mmpretrain/cifar100_generated/wrn_28_10_50m-ikl"
