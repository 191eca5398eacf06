# The student of the distillation configs, ResNet-18, trained on the labels; also tests what the others have trained.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/plain.py
_base_ = [
    "../_base_/cifar10_network.py",
    "../_base_/cifar10_data.py",
    "../_base_/cifar10_schedule.py",
    "../_base_/runtime.py",
]

default_hooks = dict(logger=dict(interval=100))
work_dir = "runs/mmpretrain/cifar10_folder/plain"
