# CIFAR-100, wrn_40_1 alone, trained on the labels; also tests what the distillations into it have trained.
#
# ikl train mmpretrain/cifar100/wrn_40_1.py
_base_ = "../_base_/cifar100_student.py"

model = dict(backbone=dict(name="wrn_40_1"))

work_dir = "runs/mmpretrain/cifar100/wrn_40_1"
