# Adversarial distillation on CIFAR-100 from Gowal2020Uncovering of RobustBench, which downloads it into models/.
_base_ = "./robust_distillation.py"

model = dict(
    data_preprocessor=dict(num_classes=100),
    head=dict(num_classes=100),
    # DeepMind's WideResNet-70-16, RSLAD's own teacher, which runs it in half precision.
    teacher=dict(type="RobustBenchModel", name="Gowal2020Uncovering", dataset="cifar100"),
    teacher_precision="bf16",
)

dataset = dict(type="CIFAR100", data_root="{{$IKL_PLUGINS_DATA:data}}/cifar100")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
