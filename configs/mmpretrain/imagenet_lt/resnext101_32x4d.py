# ImageNet-LT, ResNeXt-101-32x4d, the large teacher, trained on the labels.
#
# torchrun --nproc_per_node 4 -m ikl_plugins train \
#     configs/mmpretrain/imagenet_lt/resnext101_32x4d.py --launcher pytorch
_base_ = "../_base_/imagenet_lt_recipe.py"

model = dict(
    backbone=dict(type="ResNeXt", depth=101, groups=32, width_per_group=4),
    head=dict(in_channels=2048),
)

work_dir = "runs/mmpretrain/imagenet_lt/resnext101_32x4d"
