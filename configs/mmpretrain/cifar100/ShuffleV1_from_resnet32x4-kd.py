# CIFAR-100, resnet32x4 -> ShuffleV1: KD, the baseline, as mdistiller has it.
#
# ikl train mmpretrain/cifar100/ShuffleV1_from_resnet32x4-kd.py
_base_ = "../_base_/cifar100_kd.py"

model = dict(
    backbone=dict(name="ShuffleV1"),
    teacher=dict(name="resnet32x4"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth",
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/ShuffleV1_from_resnet32x4-kd"
