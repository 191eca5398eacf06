# The loss of adversarial_trades.py on 900 images for 120 epochs: how robust accuracy on other images stays behind.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_trades_few_images.py
_base_ = "../_base_/cifar10_miniature_few_images.py"

model = dict(robust_loss=dict(type="KLLoss", loss_weight=6.0))

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_trades_few_images"
