# CIFAR-100, resnet32x4 -> resnet8x4: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/resnet8x4_from_resnet32x4-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="resnet8x4"),
    teacher=dict(name="resnet32x4"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=16.0, gamma=0.05, global_info=True),
)

work_dir = "runs/mmpretrain/cifar100/resnet8x4_from_resnet32x4-gkl"
