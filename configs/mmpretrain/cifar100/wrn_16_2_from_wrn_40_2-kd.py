# CIFAR-100, wrn_40_2 -> wrn_16_2: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/wrn_16_2_from_wrn_40_2-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="wrn_16_2"),
    teacher=dict(name="wrn_40_2"),
    teacher_ckpt="download_ckpts/cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth",
)

work_dir = "runs/mmpretrain/cifar100/wrn_16_2_from_wrn_40_2-kd"
