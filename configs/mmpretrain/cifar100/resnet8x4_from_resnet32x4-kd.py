# CIFAR-100, resnet32x4 -> resnet8x4: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/resnet8x4_from_resnet32x4-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="resnet8x4"),
    teacher=dict(name="resnet32x4"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth",
)

work_dir = "runs/mmpretrain/cifar100/resnet8x4_from_resnet32x4-kd"
