# CIFAR-10, adversarial distillation of ResNet18: RSLAD with IKL in place of the KL divergence.
#
# ikl train mmpretrain/cifar10_robust_distillation/ResNet18-rslad_ikl.py
_base_ = "../_base_/cifar10_robust_distillation.py"

model = dict(
    backbone=dict(type="RobustBenchNetwork", architecture="ResNet-18", num_classes=10),
    preset="rslad-ikl",
)

work_dir = "runs/mmpretrain/cifar10_robust_distillation/ResNet18-rslad_ikl"
