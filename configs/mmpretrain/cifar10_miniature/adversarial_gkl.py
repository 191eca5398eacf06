# GKL in place of the KL divergence of adversarial_trades.py; alpha, beta, gamma and T are those of the authors' second
# CIFAR-10 script (see ../cifar10_adversarial/wrn_34_10-gkl.py).
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_gkl.py
_base_ = "../_base_/cifar10_miniature.py"

model = dict(
    robust_loss=dict(type="GKLLoss", alpha=4.0, beta=20.0, gamma=0.2, weight_temperature=4.0, global_info=True)
)

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_gkl"
