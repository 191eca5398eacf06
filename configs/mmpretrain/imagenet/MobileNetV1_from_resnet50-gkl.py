# ImageNet, resnet50 -> MobileNetV1: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# torchrun --nproc_per_node 8 -m ikl_plugins train \
#     configs/mmpretrain/imagenet/MobileNetV1_from_resnet50-gkl.py --launcher pytorch
_base_ = "./MobileNetV1.py"

model = dict(
    type="DistillationClassifier",
    teacher=dict(type="torchvision.models.resnet50"),
    teacher_ckpt="https://download.pytorch.org/models/resnet50-0676ba61.pth",  # IMAGENET1K_V1
    teacher_val_batches=16,  # logs its accuracy on the first 1,024 validation images of each process
    distill_loss=dict(
        type="GKLLoss",
        alpha=4.0,
        beta=1.0,
        gamma=0.5,
        temperature=1.0,
        weight_temperature=1.0,
        global_info=True,
    ),
    warmup_epochs=5,  # the GKL code's default, which its ImageNet files leave alone
)

work_dir = "runs/mmpretrain/imagenet/MobileNetV1_from_resnet50-gkl"
