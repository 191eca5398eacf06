# What the adversarial configs of the digits add to natural.py, but for the robust loss.
_base_ = "../digits/natural.py"

model = dict(
    type="AdversarialClassifier",
    attack=dict(
        eps="16/255",
        budget="high_as_executed",  # 5 steps of eps / 2 in all epochs
        eps_ramp=1.0,
        random_start="normal",
        objective="soft_cross_entropy",
    ),
    awp=dict(gamma=5e-3, warmup_epochs=4),
    val_attack=dict(eps="16/255", steps=10, step_size="4/255", random_start="uniform", objective="cross_entropy"),
    channels_last=True,
)

val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="RobustAccuracy", topk=(1,))]
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="robust/top1"))
