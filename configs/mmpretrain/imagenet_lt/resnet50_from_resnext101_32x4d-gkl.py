# ImageNet-LT, resnext101_32x4d -> resnet50: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# torchrun --nproc_per_node 4 -m ikl_plugins train \
#     configs/mmpretrain/imagenet_lt/resnet50_from_resnext101_32x4d-gkl.py --launcher pytorch
_base_ = "./resnet50.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/resnext101_32x4d.py",
    teacher_ckpt="runs/mmpretrain/imagenet_lt/resnext101_32x4d/best_accuracy_top1_epoch_*.pth",
    teacher_val_batches=16,  # logs its accuracy on the first 1,024 test images of each process
    distill_loss=dict(
        type="GKLLoss",
        alpha=3.0,
        beta=4.0,
        gamma=0.3,
        temperature=1.0,
        weight_temperature=1.0,
        global_info=True,
    ),
)

work_dir = "runs/mmpretrain/imagenet_lt/resnet50_from_resnext101_32x4d-gkl"
