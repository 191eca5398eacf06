# ImageNet-LT, resnext101_32x4d -> resnet50: KL, the baseline of the authors' code.
#
# torchrun --nproc_per_node 4 -m ikl_plugins train \
#     configs/mmpretrain/imagenet_lt/resnet50_from_resnext101_32x4d-kl.py --launcher pytorch
_base_ = "./resnet50.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/resnext101_32x4d.py",
    teacher_ckpt="runs/mmpretrain/imagenet_lt/resnext101_32x4d/best_accuracy_top1_epoch_*.pth",
    teacher_val_batches=16,  # logs its accuracy on the first 1,024 test images of each process
    distill_loss=dict(type="KLLoss", temperature=1.0),
    distill_weight=3.0,
)

work_dir = "runs/mmpretrain/imagenet_lt/resnet50_from_resnext101_32x4d-kl"
