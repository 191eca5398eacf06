# CIFAR-100, resnet56 -> resnet20: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/resnet20_from_resnet56-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="resnet20"),
    teacher=dict(name="resnet56"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=4.0, gamma=0.2, global_info=True),
)

work_dir = "runs/mmpretrain/cifar100/resnet20_from_resnet56-gkl"
