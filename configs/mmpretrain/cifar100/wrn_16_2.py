# CIFAR-100, wrn_16_2 alone, trained on the labels; also tests what the distillations into it have trained.
#
# ikl train mmpretrain/cifar100/wrn_16_2.py
_base_ = "../_base_/cifar100_student.py"

model = dict(backbone=dict(name="wrn_16_2"))

work_dir = "runs/mmpretrain/cifar100/wrn_16_2"
