# CIFAR-100, resnet32x4 -> ShuffleV1: IKL, values of the authors' code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100/ShuffleV1_from_resnet32x4-ikl.py
_base_ = "../_base_/cifar100_ikl.py"

model = dict(
    backbone=dict(name="ShuffleV1"),
    teacher=dict(name="resnet32x4"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=8.0),  # of the soft cross entropy; of the weighted MSE, its 1/4 inside
)

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/ShuffleV1_from_resnet32x4-ikl"
