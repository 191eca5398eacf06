# ImageNet, ResNet-18 alone, trained on the labels; also tests what the distillations into it have trained.
#
# torchrun --nproc_per_node 8 -m ikl_plugins train \
#     configs/mmpretrain/imagenet/resnet18.py --launcher pytorch
_base_ = "../_base_/imagenet_recipe.py"

work_dir = "runs/mmpretrain/imagenet/resnet18"
