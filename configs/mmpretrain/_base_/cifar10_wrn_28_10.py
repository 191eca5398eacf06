# WideResNet-28-10 on CIFAR-10 and a million generated images, but for the robust loss. CIFAR-10 is downloaded if it is
# not there; the generated images are 1m.npz of Wang et al. beside it.
_base_ = "./wrn_28_10_generated.py"

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(num_classes=10, dataset="cifar10"),  # whose mean and std the network normalises with
    head=dict(num_classes=10),
)

data_root = "{{$IKL_PLUGINS_DATA:data}}/cifar10"
train_pipeline = [*_base_.basic_view, dict(type="PackInputs")]
real = dict(
    type="CIFAR10",
    data_root=data_root,
    split="train",
    indices=_base_.held_out - 50_000,
    pipeline=train_pipeline,
)
generated = dict(
    type="GeneratedImages", data_root=data_root, data_file="1m.npz", channel_order="rgb", pipeline=train_pipeline
)
train_dataloader = dict(dataset=dict(datasets=[real, generated]))
val_dataloader = dict(dataset=dict(type="CIFAR10", data_root=data_root))
test_dataloader = dict(dataset=dict(type="CIFAR10", data_root=data_root))
