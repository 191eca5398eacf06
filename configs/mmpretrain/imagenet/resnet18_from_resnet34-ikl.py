# ImageNet, resnet34 -> resnet18: IKL, values of the authors' code (Cui et al., NeurIPS 2024). It has no ramp.
#
# torchrun --nproc_per_node 8 -m ikl_plugins train \
#     configs/mmpretrain/imagenet/resnet18_from_resnet34-ikl.py --launcher pytorch
_base_ = "./resnet18.py"

model = dict(
    type="DistillationClassifier",
    teacher=dict(type="torchvision.models.resnet34"),
    teacher_ckpt="https://download.pytorch.org/models/resnet34-b627a593.pth",  # IMAGENET1K_V1
    teacher_val_batches=16,  # logs its accuracy on the first 1,024 validation images of each process
    distill_loss=dict(type="IKLLoss", alpha=1.0, beta=0.5, temperature=1.0, weight_temperature=1.0, global_info=True),
)

work_dir = "runs/mmpretrain/imagenet/resnet18_from_resnet34-ikl"
