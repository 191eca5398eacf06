# WideResNet-34-10 on CIFAR-10, as MMPretrain reads it, which downloads what is not there; but for the robust loss.
_base_ = "./wrn_34_10.py"

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(num_classes=10),
    head=dict(num_classes=10),
)

dataset = dict(type="CIFAR10", data_root="{{$IKL_PLUGINS_DATA:data}}/cifar10")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
