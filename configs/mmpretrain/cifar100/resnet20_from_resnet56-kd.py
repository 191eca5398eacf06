# CIFAR-100, resnet56 -> resnet20: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/resnet20_from_resnet56-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="resnet20"),
    teacher=dict(name="resnet56"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth",
)

work_dir = "runs/mmpretrain/cifar100/resnet20_from_resnet56-kd"
