# The baseline as mdistiller has it: 0.1 cross entropy + 0.9 * 4**2 KL at temperature 4, without a ramp.
_base_ = "./cifar100_distillation.py"

model = dict(
    head=dict(loss=dict(loss_weight=0.1)),
    distill_loss=dict(type="KLLoss", temperature=4.0, scale_by_temperature_squared=True),
    distill_weight=0.9,
)
