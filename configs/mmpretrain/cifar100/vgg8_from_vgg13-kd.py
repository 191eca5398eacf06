# CIFAR-100, vgg13 -> vgg8: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/vgg8_from_vgg13-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="vgg8"),
    teacher=dict(name="vgg13"),
    teacher_ckpt="download_ckpts/cifar_teachers/vgg13_vanilla/ckpt_epoch_240.pth",
)

work_dir = "runs/mmpretrain/cifar100/vgg8_from_vgg13-kd"
