# CIFAR-100, vgg13 -> vgg8: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/vgg8_from_vgg13-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="vgg8"),
    teacher=dict(name="vgg13"),
    teacher_ckpt="download_ckpts/cifar_teachers/vgg13_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=8.0, gamma=0.2, global_info=True),
)

work_dir = "runs/mmpretrain/cifar100/vgg8_from_vgg13-gkl"
