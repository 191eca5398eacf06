# ImageNet-LT, ResNet-50, trained on the labels: a teacher, and what tests the students of its network.
#
# torchrun --nproc_per_node 4 -m ikl_plugins train \
#     configs/mmpretrain/imagenet_lt/resnet50.py --launcher pytorch
_base_ = "../_base_/imagenet_lt_recipe.py"

model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))

work_dir = "runs/mmpretrain/imagenet_lt/resnet50"
