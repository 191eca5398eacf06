# The teacher of the distillation configs: ResNet-34, trained on the labels.
#
# python tools/prepare_data.py cifar10-folder --from ZIP...
# python tools/train_mmpretrain.py configs/mmpretrain/cifar10_folder/teacher.py
_base_ = "./plain.py"

model = dict(backbone=dict(depth=34))

work_dir = "runs/mmpretrain/cifar10_folder/teacher"  # the distillation configs take its epoch_240.pth
