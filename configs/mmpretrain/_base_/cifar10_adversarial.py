# What the adversarial configs of CIFAR-10 add to plain.py, but for the robust loss: the published recipe without
# generated data. Differences: ResNet-18 for WideResNet-34-10, which wants several GPUs, and 5,000 training images held
# out for validation.
_base_ = "../cifar10_folder/plain.py"

model = dict(
    type="AdversarialClassifier",
    data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3),  # pixels in [0, 1], not normalised
    attack=dict(
        eps="8/255",
        budget="high_as_executed",  # 5 steps of eps / 2 in all epochs
        eps_ramp=1.0,
        random_start="normal",
        objective="soft_cross_entropy",
        model_mode="eval",
    ),
    awp=dict(gamma=5e-3, warmup_epochs=10, undo="after_step"),
    val_attack=dict(eps="8/255", steps=20, step_size="2/255", random_start="uniform", objective="cross_entropy"),
    channels_last=True,
)

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=0.2))
# The published formula is half a cosine as well; its last epoch ends just above 0, as this one's does.
param_scheduler = dict(_delete_=True, type="CosineAnnealingLR", by_epoch=True, T_max=200)
train_cfg = dict(max_epochs=200)

custom_hooks = [
    dict(type="IKLHook"),
    dict(type="SyncBuffersHook"),
    # Published: after each epoch, here of 352 steps, 0.9 * average + 0.1 * weights, buffers too.
    dict(type="EMAHook", momentum=0.1, interval=352, begin_iter=352, update_buffers=True),
]
val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="RobustAccuracy", topk=(1,))]
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="robust/top1"))
