# WideResNet-34-10 on CIFAR-100, as MMPretrain reads it, which downloads what is not there; but for the robust loss.
_base_ = "./wrn_34_10.py"

model = dict(
    data_preprocessor=dict(num_classes=100),
    backbone=dict(num_classes=100),
    head=dict(num_classes=100),
    attack=dict(objective="ikl"),  # the CIFAR-100 scripts go up the soft cross entropy + the weighted MSE
)

dataset = dict(type="CIFAR100", data_root="{{$IKL_PLUGINS_DATA:data}}/cifar100")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
