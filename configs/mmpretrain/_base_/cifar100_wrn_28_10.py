# WideResNet-28-10 on CIFAR-100 and a million generated images, but for the robust loss. CIFAR-100 is downloaded if it
# is not there; the generated images are 1m.npz of Wang et al. beside it.
_base_ = "./wrn_28_10_generated.py"

model = dict(
    data_preprocessor=dict(num_classes=100),
    backbone=dict(num_classes=100, dataset="cifar100"),  # whose mean and std the network normalises with
    head=dict(num_classes=100),
)

# The CIFAR-100 loader of DM-Improves-AT also turns each image by up to 15 degrees: of RandomRotation(15), to the
# nearest pixel and filled with black.
rotation = dict(
    type="Rotate", magnitude_range=(0, 15), magnitude_std="inf", prob=1.0, random_negative_prob=0.5, pad_val=0
)

data_root = "{{$IKL_PLUGINS_DATA:data}}/cifar100"
train_pipeline = [*_base_.basic_view, rotation, dict(type="PackInputs")]
real = dict(
    type="CIFAR100",
    data_root=data_root,
    split="train",
    indices=_base_.held_out - 50_000,
    pipeline=train_pipeline,
)
generated = dict(
    type="GeneratedImages", data_root=data_root, data_file="1m.npz", channel_order="rgb", pipeline=train_pipeline
)
train_dataloader = dict(dataset=dict(datasets=[real, generated]))
val_dataloader = dict(dataset=dict(type="CIFAR100", data_root=data_root))
test_dataloader = dict(dataset=dict(type="CIFAR100", data_root=data_root))
