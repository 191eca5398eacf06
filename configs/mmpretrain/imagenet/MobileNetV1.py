# ImageNet, MobileNetV1 alone, trained on the labels; also tests what the distillations into it have trained.
#
# torchrun --nproc_per_node 8 -m ikl_plugins train \
#     configs/mmpretrain/imagenet/MobileNetV1.py --launcher pytorch
_base_ = "../_base_/imagenet_recipe.py"

model = dict(
    backbone=dict(_delete_=True, type="DistillationNetwork", name="MobileNetV1", num_classes=1000),
    neck=None,
    head=dict(
        _delete_=True,
        type="LogitsClsHead",
        num_classes=1000,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
)

work_dir = "runs/mmpretrain/imagenet/MobileNetV1"
