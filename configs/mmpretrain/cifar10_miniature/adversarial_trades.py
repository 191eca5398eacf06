# TRADES: cross entropy on natural images, and 6 times the KL divergence between natural and adversarial predictions.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_trades.py
_base_ = "../_base_/cifar10_miniature.py"

model = dict(robust_loss=dict(type="KLLoss", loss_weight=6.0))  # TRADES' own weight for CIFAR-10

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_trades"
