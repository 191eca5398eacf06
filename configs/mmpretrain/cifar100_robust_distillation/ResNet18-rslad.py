# CIFAR-100, adversarial distillation of ResNet18: RSLAD.
#
# ikl train mmpretrain/cifar100_robust_distillation/ResNet18-rslad.py
_base_ = "../_base_/cifar100_robust_distillation.py"

model = dict(
    backbone=dict(type="RobustBenchNetwork", architecture="ResNet-18", num_classes=100),
    preset="rslad",
)

work_dir = "runs/mmpretrain/cifar100_robust_distillation/ResNet18-rslad"
