# ImageNet, resnet34 -> resnet18: KD, the baseline, as mdistiller has it.
#
# torchrun --nproc_per_node 8 -m ikl_plugins train \
#     configs/mmpretrain/imagenet/resnet18_from_resnet34-kd.py --launcher pytorch
_base_ = "./resnet18.py"

model = dict(
    type="DistillationClassifier",
    teacher=dict(type="torchvision.models.resnet34"),
    teacher_ckpt="https://download.pytorch.org/models/resnet34-b627a593.pth",  # IMAGENET1K_V1
    teacher_val_batches=16,  # logs its accuracy on the first 1,024 validation images of each process
    head=dict(loss=dict(loss_weight=0.5)),
    distill_loss=dict(type="KLLoss", temperature=1.0),
    distill_weight=0.5,
)

work_dir = "runs/mmpretrain/imagenet/resnet18_from_resnet34-kd"
