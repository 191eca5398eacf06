# ImageNet-LT, ResNet-18, trained on the labels: a teacher, and what tests the students of its network.
#
# torchrun --nproc_per_node 4 -m ikl_plugins train \
#     configs/mmpretrain/imagenet_lt/resnet18.py --launcher pytorch
_base_ = "../_base_/imagenet_lt_recipe.py"

work_dir = "runs/mmpretrain/imagenet_lt/resnet18"
