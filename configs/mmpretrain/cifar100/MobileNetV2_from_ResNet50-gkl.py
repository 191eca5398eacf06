# CIFAR-100, ResNet50 -> MobileNetV2: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/MobileNetV2_from_ResNet50-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="MobileNetV2"),
    teacher=dict(name="ResNet50"),
    teacher_ckpt="download_ckpts/cifar_teachers/ResNet50_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=8.0, gamma=0.05, global_info=True),
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/MobileNetV2_from_ResNet50-gkl"
