# CIFAR-100, ResNet50 -> MobileNetV2: IKL, values of the authors' code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100/MobileNetV2_from_ResNet50-ikl.py
_base_ = "../_base_/cifar100_ikl.py"

model = dict(
    backbone=dict(name="MobileNetV2"),
    teacher=dict(name="ResNet50"),
    teacher_ckpt="download_ckpts/cifar_teachers/ResNet50_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=12.0),  # of the soft cross entropy; of the weighted MSE, its 1/4 inside
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/MobileNetV2_from_ResNet50-ikl"
