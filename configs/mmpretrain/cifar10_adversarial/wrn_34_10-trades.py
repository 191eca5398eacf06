# CIFAR-10, WideResNet-34-10: the baseline, cross entropy + 6 KL.
#
# ikl train mmpretrain/cifar10_adversarial/wrn_34_10-trades.py
_base_ = "../_base_/cifar10_wrn_34_10.py"

# NOT VERIFIED: TRADES' own weight. The authors' command is for CIFAR-100 alone.
model = dict(robust_loss=dict(type="KLLoss", loss_weight=6.0))

# The authors' TRADES script differs from theirs of IKL: 0.1 * (1 + cos(pi * (epoch - 1) / 200)), epochs from 1, and
# no last batch that is not full.
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=True, T_max=200)]
train_dataloader = dict(drop_last=True)
average = dict(type="EMAHook", momentum=0.1, interval=382, begin_iter=382, update_buffers=True)
custom_hooks = [*_base_.custom_hooks[:2], average]

work_dir = "runs/mmpretrain/cifar10_adversarial/wrn_34_10-trades"
