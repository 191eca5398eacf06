# DKL in place of the KL divergence of adversarial_trades.py: another value with the same gradients.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_dkl.py
_base_ = "../_base_/cifar10_miniature.py"

model = dict(robust_loss=dict(type="DKLLoss", alpha=1.0, beta=1.0, loss_weight=6.0))

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_dkl"
