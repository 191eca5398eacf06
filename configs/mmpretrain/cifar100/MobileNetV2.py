# CIFAR-100, MobileNetV2 alone, trained on the labels; also tests what the distillations into it have trained.
#
# ikl train mmpretrain/cifar100/MobileNetV2.py
_base_ = "../_base_/cifar100_student.py"

model = dict(backbone=dict(name="MobileNetV2"))

optim_wrapper = dict(optimizer=dict(lr=0.01))  # as published for ShuffleNet and MobileNet students; others 0.05

work_dir = "runs/mmpretrain/cifar100/MobileNetV2"
