# The recipe of Wang et al., ICML 2023 (DM-Improves-AT), for a million generated images, but for the classes and the
# robust loss: WideResNet-28-10 with SiLU, 400 epochs, 512 images a step of which 70 % are generated.
_base_ = "./runtime.py"

model = dict(
    type="AdversarialClassifier",
    data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False),  # pixels in [0, 1]; the network normalises
    backbone=dict(type="RobustBenchNetwork", architecture="DMWideResNet-28-10-SiLU"),
    head=dict(type="LogitsClsHead", loss=dict(type="CrossEntropyLoss", loss_weight=1.0), topk=(1,)),
    attack=dict(
        eps="8/255",
        steps=10,
        step_size="2/255",
        random_start="uniform",
        objective="soft_cross_entropy",
        model_mode="train",  # statistics of the batch; the running ones stay as they are
    ),
    natural_first=True,
    label_smoothing=0.1,
    val_attack=dict(eps="8/255", steps=40, step_size="2/255", random_start="uniform", objective="margin"),
    channels_last=True,
)

held_out = 1024  # the first training images, to choose the checkpoint by, as published
basic_view = [
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
]
test_pipeline = [dict(type="PackInputs")]
loader = dict(num_workers=4, persistent_workers=True)

train_dataloader = dict(
    batch_size=512 // int("{{$WORLD_SIZE:1}}"),  # 512 in all. torchrun sets WORLD_SIZE
    # The real images, then the generated ones: cifar10_wrn_28_10.py and cifar100_wrn_28_10.py name both.
    dataset=dict(type="ConcatDataset", ignore_keys="classes"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="GeneratedBatchSampler", fraction=0.7, epoch_size=50_000),
    collate_fn=dict(type="default_collate"),
    **loader,
)
val_dataloader = dict(
    batch_size=256,
    dataset=dict(split="train", indices=held_out, pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)
test_dataloader = dict(
    batch_size=256,
    dataset=dict(split="test", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)

optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="ResumableOneCycleLR", eta_max=0.2, pct_start=0.025),
    dict(type="OneCycleMomentum", pct_start=0.025),  # 0.95, 0.85 at the peak, 0.95: in place of the 0.9 above
]
train_cfg = dict(by_epoch=True, max_epochs=400, val_interval=1)
val_cfg = dict()
test_cfg = dict()

val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="RobustAccuracy", topk=(1,))]
test_evaluator = val_evaluator

custom_hooks = [
    dict(type="IKLHook"),
    dict(type="SyncBuffersHook"),
    dict(type="BatchNormMomentumHook", momentum=0.01),
    dict(type="EMAHook", ema_type="WarmupEMA", momentum=0.005, begin_epoch=11),  # after 2.5 % of the epochs
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(save_best="robust/top1"))
randomness = dict(seed=1)  # theirs
