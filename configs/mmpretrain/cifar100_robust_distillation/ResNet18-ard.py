# CIFAR-100, adversarial distillation of ResNet18: ARD.
#
# ikl train mmpretrain/cifar100_robust_distillation/ResNet18-ard.py
_base_ = "../_base_/cifar100_robust_distillation.py"

model = dict(
    backbone=dict(type="RobustBenchNetwork", architecture="ResNet-18", num_classes=100),
    preset="ard",
)

train_dataloader = dict(batch_size=256 // int("{{$WORLD_SIZE:1}}"))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[100, 150], gamma=0.1)]
train_cfg = dict(max_epochs=200)

work_dir = "runs/mmpretrain/cifar100_robust_distillation/ResNet18-ard"
