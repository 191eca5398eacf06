# The teacher of the adversarial distillations: ResNet-34, trained with TRADES.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/robust_teacher.py
_base_ = "./adversarial_trades.py"

model = dict(backbone=dict(depth=34))

work_dir = "runs/mmpretrain/cifar10_folder/robust_teacher"  # the distillations take its epoch_200.pth
