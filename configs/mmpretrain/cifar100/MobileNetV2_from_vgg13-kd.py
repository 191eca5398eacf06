# CIFAR-100, vgg13 -> MobileNetV2: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/MobileNetV2_from_vgg13-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="MobileNetV2"),
    teacher=dict(name="vgg13"),
    teacher_ckpt="download_ckpts/cifar_teachers/vgg13_vanilla/ckpt_epoch_240.pth",
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/MobileNetV2_from_vgg13-kd"
