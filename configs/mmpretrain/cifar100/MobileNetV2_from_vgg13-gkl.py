# CIFAR-100, vgg13 -> MobileNetV2: GKL, values of the authors' code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar100/MobileNetV2_from_vgg13-gkl.py
_base_ = "../_base_/cifar100_gkl.py"

model = dict(
    backbone=dict(name="MobileNetV2"),
    teacher=dict(name="vgg13"),
    teacher_ckpt="download_ckpts/cifar_teachers/vgg13_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=4.0, beta=12.0, gamma=0.1, global_info=True),
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/MobileNetV2_from_vgg13-gkl"
