# CIFAR-100, ResNet50 -> MobileNetV2: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/MobileNetV2_from_ResNet50-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="MobileNetV2"),
    teacher=dict(name="ResNet50"),
    teacher_ckpt="download_ckpts/cifar_teachers/ResNet50_vanilla/ckpt_epoch_240.pth",
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/MobileNetV2_from_ResNet50-kd"
