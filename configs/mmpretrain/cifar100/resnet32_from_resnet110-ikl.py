# CIFAR-100, resnet110 -> resnet32: IKL, values of the authors' code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100/resnet32_from_resnet110-ikl.py
_base_ = "../_base_/cifar100_ikl.py"

model = dict(
    backbone=dict(name="resnet32"),
    teacher=dict(name="resnet110"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet110_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=12.0),  # of the soft cross entropy; of the weighted MSE, its 1/4 inside
)

work_dir = "runs/mmpretrain/cifar100/resnet32_from_resnet110-ikl"
