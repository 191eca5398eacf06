# CIFAR-100, wrn_40_2 -> ShuffleV1: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/ShuffleV1_from_wrn_40_2-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="ShuffleV1"),
    teacher=dict(name="wrn_40_2"),
    teacher_ckpt="download_ckpts/cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=8.0, gamma=0.0, global_info=False),
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/ShuffleV1_from_wrn_40_2-gkl"
