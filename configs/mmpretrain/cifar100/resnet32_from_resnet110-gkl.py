# CIFAR-100, resnet110 -> resnet32: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/resnet32_from_resnet110-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="resnet32"),
    teacher=dict(name="resnet110"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet110_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=4.0, gamma=0.1, global_info=False),
)

work_dir = "runs/mmpretrain/cifar100/resnet32_from_resnet110-gkl"
