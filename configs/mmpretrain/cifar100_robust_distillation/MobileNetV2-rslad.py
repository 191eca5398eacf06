# CIFAR-100, adversarial distillation of MobileNetV2: RSLAD.
#
# ikl train mmpretrain/cifar100_robust_distillation/MobileNetV2-rslad.py
_base_ = "../_base_/cifar100_robust_distillation.py"

model = dict(
    backbone=dict(type="DistillationNetwork", name="MobileNetV2", num_classes=100),
    preset="rslad",
)

work_dir = "runs/mmpretrain/cifar100_robust_distillation/MobileNetV2-rslad"
