# Adversarial distillation on CIFAR-10 from Zhang2019Theoretically of RobustBench, which downloads it into models/.
_base_ = "./robust_distillation.py"

model = dict(
    data_preprocessor=dict(num_classes=10),
    head=dict(num_classes=10),
    # TRADES' WideResNet-34-10, RSLAD's own teacher.
    teacher=dict(type="RobustBenchModel", name="Zhang2019Theoretically", dataset="cifar10"),
)

dataset = dict(type="CIFAR10", data_root="{{$IKL_PLUGINS_DATA:data}}/cifar10")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
