# CIFAR-100, wrn_40_2 -> wrn_40_1: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/wrn_40_1_from_wrn_40_2-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="wrn_40_1"),
    teacher=dict(name="wrn_40_2"),
    teacher_ckpt="download_ckpts/cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=12.0, gamma=0.3, global_info=False),
)

work_dir = "runs/mmpretrain/cifar100/wrn_40_1_from_wrn_40_2-gkl"
