# CIFAR-10, adversarial distillation of MobileNetV2: ARD.
#
# ikl train mmpretrain/cifar10_robust_distillation/MobileNetV2-ard.py
_base_ = "../_base_/cifar10_robust_distillation.py"

model = dict(
    backbone=dict(type="DistillationNetwork", name="MobileNetV2", num_classes=10),
    preset="ard",
)

param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[100, 150], gamma=0.1)]
train_cfg = dict(max_epochs=200)

work_dir = "runs/mmpretrain/cifar10_robust_distillation/MobileNetV2-ard"
