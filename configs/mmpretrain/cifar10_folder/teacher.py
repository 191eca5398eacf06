# The teacher of the distillation configs: ResNet-34, trained on the labels.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/teacher.py
_base_ = "./plain.py"

model = dict(backbone=dict(depth=34))

work_dir = "runs/mmpretrain/cifar10_folder/teacher"  # the distillation configs take its epoch_240.pth
