# What the configs of cifar10_miniature share, but for the robust loss: adversarial training that a CPU does in minutes.
# Differences to the published recipe: README.md of that folder.
_base_ = ["./digits_wide_network.py", "./cifar10_data.py", "./runtime.py"]

epochs = 6

model = dict(
    type="AdversarialClassifier",
    attack=dict(
        eps="8/255",
        budget="low",  # 2 steps of eps
        eps_ramp=1.0,
        random_start="normal",
        objective="soft_cross_entropy",
        model_mode="eval",
    ),
    awp=dict(gamma=5e-3, warmup_epochs=2),
    val_attack=dict(eps="8/255", steps=20, step_size="2/255", random_start="uniform", objective="cross_entropy"),
    channels_last=True,
)

# Files are sorted by class, so every n-th of them is as many of each. Nothing is read by other processes: their random
# numbers would make a resumed training another one.
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=64, dataset=dict(indices=range(0, 45_000, 5)), **loader)
val_dataloader = dict(dataset=dict(indices=range(0, 5_000, 10)), **loader)
test_dataloader = dict(dataset=dict(indices=range(0, 5_000, 10)), **loader)

optim_wrapper = dict(
    type="AutocastOptimWrapper",  # bfloat16, in training alone
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = [
    dict(type="LinearLR", by_epoch=True, start_factor=0.1, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=1, T_max=epochs - 1, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [
    dict(type="IKLHook"),
    dict(type="SyncBuffersHook"),
    dict(type="EMAHook", momentum=0.01, update_buffers=True),
]
val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="RobustAccuracy", topk=(1,))]
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(save_best="robust/top1"))
