# CIFAR-100, vgg13 -> vgg8: IKL, values of the authors' code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100/vgg8_from_vgg13-ikl.py
_base_ = "../_base_/cifar100_ikl.py"

model = dict(
    backbone=dict(name="vgg8"),
    teacher=dict(name="vgg13"),
    teacher_ckpt="download_ckpts/cifar_teachers/vgg13_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=12.0),  # of the soft cross entropy; of the weighted MSE, its 1/4 inside
)

work_dir = "runs/mmpretrain/cifar100/vgg8_from_vgg13-ikl"
