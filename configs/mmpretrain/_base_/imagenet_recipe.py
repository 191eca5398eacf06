# The published distillation recipe for ImageNet: 100 epochs of SGD with 512 images a step.
_base_ = ["./imagenet_network.py", "./imagenet_data.py", "./runtime.py"]

train_dataloader = dict(
    batch_size=512 // int("{{$WORLD_SIZE:1}}")  # 512 in all; on the paper's 8 GPUs 64 each. torchrun sets WORLD_SIZE
)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 90], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(interval=100),
    # Published: the best of all epochs on the validation images. Here the last one counts, which they have not chosen.
    checkpoint=dict(save_best=None),
)
