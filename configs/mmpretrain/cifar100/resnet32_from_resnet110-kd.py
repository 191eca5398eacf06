# CIFAR-100, resnet110 -> resnet32: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/resnet32_from_resnet110-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="resnet32"),
    teacher=dict(name="resnet110"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet110_vanilla/ckpt_epoch_240.pth",
)

work_dir = "runs/mmpretrain/cifar100/resnet32_from_resnet110-kd"
