# ImageNet-LT, resnet50 -> resnet50: IKL, values of the authors' code (Cui et al., NeurIPS 2024), which has no class
# prior here, and weights at temperature 100, nearly uniform.
#
# torchrun --nproc_per_node 4 -m ikl_plugins train \
#     configs/mmpretrain/imagenet_lt/resnet50_from_resnet50-ikl.py --launcher pytorch
_base_ = "./resnet50.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/resnet50.py",
    teacher_ckpt="runs/mmpretrain/imagenet_lt/resnet50/best_accuracy_top1_epoch_*.pth",
    teacher_val_batches=16,  # logs its accuracy on the first 1,024 test images of each process
    distill_loss=dict(
        type="IKLLoss", alpha=1.0, beta=1.0, temperature=1.0, weight_temperature=100.0, global_info=False
    ),
)

work_dir = "runs/mmpretrain/imagenet_lt/resnet50_from_resnet50-ikl"
