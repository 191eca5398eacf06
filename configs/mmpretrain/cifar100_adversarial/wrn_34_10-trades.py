# CIFAR-100, WideResNet-34-10: the baseline, cross entropy + 9 KL, values of the authors' command.
#
# ikl train mmpretrain/cifar100_adversarial/wrn_34_10-trades.py
_base_ = "../_base_/cifar100_wrn_34_10.py"

model = dict(
    attack=dict(objective="soft_cross_entropy"),  # that of KL
    robust_loss=dict(type="KLLoss", loss_weight=9.0),
)

# The authors' TRADES script differs from theirs of IKL: 0.1 * (1 + cos(pi * (epoch - 1) / 200)), epochs from 1, and
# no last batch that is not full.
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=True, T_max=200)]
train_dataloader = dict(drop_last=True)
average = dict(type="EMAHook", momentum=0.1, interval=382, begin_iter=382, update_buffers=True)
custom_hooks = [*_base_.custom_hooks[:2], average]

work_dir = "runs/mmpretrain/cifar100_adversarial/wrn_34_10-trades"
