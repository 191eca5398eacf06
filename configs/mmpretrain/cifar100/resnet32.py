# CIFAR-100, resnet32 alone, trained on the labels; also tests what the distillations into it have trained.
#
# ikl train mmpretrain/cifar100/resnet32.py
_base_ = "../_base_/cifar100_student.py"

model = dict(backbone=dict(name="resnet32"))

work_dir = "runs/mmpretrain/cifar100/resnet32"
