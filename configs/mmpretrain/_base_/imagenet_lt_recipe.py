# The published recipe for ImageNet-LT: 90 epochs of SGD with 128 images a step. The lists are those of Liu et al., CVPR
# 2019; their paths start from the folder of ImageNet.
_base_ = ["./imagenet_network.py", "./imagenet_data.py", "./runtime.py"]

data_root = "{{$IKL_PLUGINS_DATA:data}}"
train_list = "imagenet_lt/ImageNet_LT_train.txt"

train_dataloader = dict(
    batch_size=128 // int("{{$WORLD_SIZE:1}}"),  # 128 in all; on the authors' 4 GPUs 32 each. torchrun sets WORLD_SIZE
    drop_last=True,
    dataset=dict(
        _delete_=True,
        type="ImageNet",
        data_root=data_root,
        data_prefix="imagenet",
        ann_file=train_list,
        pipeline=_base_.train_pipeline,
    ),
)
# The test list chooses the best epoch, as published; epoch_90.pth is the last one.
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ImageNet",
        data_root=data_root,
        data_prefix="imagenet",
        ann_file="imagenet_lt/ImageNet_LT_test.txt",
        pipeline=_base_.test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type="Accuracy", topk=(1, 5)),
    dict(type="ManyMediumFew", train_counts=f"{data_root}/{train_list}"),
]
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = [
    # Epochs e from 0: lr * (e + 1) / 10 in the first ten, then lr * (1 + cos(pi * (e - 9) / 81)) / 2.
    dict(type="LinearLR", by_epoch=True, start_factor=0.1, begin=0, end=10),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=9, T_max=81),
]
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(logger=dict(interval=100))
