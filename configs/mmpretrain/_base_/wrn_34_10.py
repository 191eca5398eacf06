# The published adversarial training without generated data, but for the classes and the robust loss: WideResNet-34-10,
# 200 epochs of SGD with batches of 128, eps growing to 8/255, weight perturbation, averaged weights.
_base_ = "./runtime.py"

model = dict(
    type="AdversarialClassifier",
    data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False),  # pixels in [0, 1], not normalised; RGB
    backbone=dict(type="RobustBenchNetwork", architecture="WideResNet-34-10"),  # RobustBench loads what is trained
    head=dict(type="LogitsClsHead", loss=dict(type="CrossEntropyLoss", loss_weight=1.0), topk=(1,)),
    attack=dict(
        eps="8/255",
        eps_ramp=1.0,  # 8/255 * epoch / 200
        budget="high_as_executed",  # 5 steps of eps / 2; the 2 to 5 steps that the scripts mean to take never run
        random_start="normal",
        objective="soft_cross_entropy",
        model_mode="eval",
    ),
    awp=dict(gamma=5e-3, warmup_epochs=10, undo="after_step"),  # as published: weight decay acts on perturbed weights
    awp_averages_views=True,  # likewise, where there are two views: whatever the loss's weight of the second
    val_attack=dict(eps="8/255", steps=20, step_size="2/255", random_start="uniform", objective="cross_entropy"),
    channels_last=True,
)

held_out = 1024  # of the training images, to choose the checkpoint by. Published: no choice, all 50,000 trained on
basic_view = [
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
]
test_pipeline = [dict(type="PackInputs")]
loader = dict(num_workers=2, persistent_workers=True)

train_dataloader = dict(
    batch_size=128 // int("{{$WORLD_SIZE:1}}"),  # 128 in all; on the paper's 4 GPUs 32 each. torchrun sets WORLD_SIZE
    dataset=dict(split="train", indices=held_out - 50_000, pipeline=[*basic_view, dict(type="PackInputs")]),
    sampler=dict(type="DefaultSampler", shuffle=True),
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

optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.2, momentum=0.9, weight_decay=5e-4))
param_scheduler = [
    # 0.1 * (1 + cos(pi * epoch / 201)), epochs from 1: half a cosine that is one step ahead. The first entry changes
    # nothing, but notes the learning rate from which the second one can begin with its step 1.
    dict(type="ConstantLR", by_epoch=True, factor=1.0),
    dict(type="CosineAnnealingLR", by_epoch=True, T_max=201, last_step=0),
]
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=1)
val_cfg = dict()
test_cfg = dict()

val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="RobustAccuracy", topk=(1,))]
test_evaluator = val_evaluator

custom_hooks = [
    dict(type="IKLHook"),
    dict(type="SyncBuffersHook"),
    # Published: the weights after epoch 1, and after each other epoch 0.9 * average + 0.1 * weights, buffers too. Of
    # 48,976 images, 128 a step, an epoch has 383 steps: with other numbers put yours in both places.
    dict(type="EMAHook", momentum=0.1, interval=383, begin_iter=383, update_buffers=True),
]
default_hooks = dict(logger=dict(interval=100), checkpoint=dict(save_best="robust/top1"))
