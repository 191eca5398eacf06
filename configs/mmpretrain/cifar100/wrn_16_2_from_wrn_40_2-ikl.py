# CIFAR-100, wrn_40_2 -> wrn_16_2: IKL, values of the authors' code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100/wrn_16_2_from_wrn_40_2-ikl.py
_base_ = "../_base_/cifar100_ikl.py"

model = dict(
    backbone=dict(name="wrn_16_2"),
    teacher=dict(name="wrn_40_2"),
    teacher_ckpt="download_ckpts/cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=3.0, beta=12.0),  # of the soft cross entropy; of the weighted MSE, its 1/4 inside
)

work_dir = "runs/mmpretrain/cifar100/wrn_16_2_from_wrn_40_2-ikl"
