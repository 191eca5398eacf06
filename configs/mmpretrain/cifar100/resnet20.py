# CIFAR-100, resnet20 alone, trained on the labels; also tests what the distillations into it have trained.
#
# ikl train mmpretrain/cifar100/resnet20.py
_base_ = "../_base_/cifar100_student.py"

model = dict(backbone=dict(name="resnet20"))

work_dir = "runs/mmpretrain/cifar100/resnet20"
