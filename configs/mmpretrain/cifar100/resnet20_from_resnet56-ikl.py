# CIFAR-100, resnet56 -> resnet20: IKL, values of the authors' code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100/resnet20_from_resnet56-ikl.py
_base_ = "../_base_/cifar100_ikl.py"

model = dict(
    backbone=dict(name="resnet20"),
    teacher=dict(name="resnet56"),
    teacher_ckpt="download_ckpts/cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth",
    distill_loss=dict(alpha=1.0, beta=4.0),  # of the soft cross entropy; of the weighted MSE, its 1/4 inside
)

work_dir = "runs/mmpretrain/cifar100/resnet20_from_resnet56-ikl"
