# CIFAR-10, WideResNet-28-10 with SiLU, 20 million generated images: the baseline of DM-Improves-AT (Wang et al., ICML
# 2023).
#
# ikl train mmpretrain/cifar10_generated/wrn_28_10_20m-kl.py
_base_ = "./wrn_28_10_1m-kl.py"

# NOT VERIFIED: batch, epochs and fraction of the larger sets are known at second hand alone, and whether the learning
# rate stays 0.2 is not known at all.
generated = dict(_base_.generated, data_file="20m.npz")
train_dataloader = dict(
    batch_size=2048 // int("{{$WORLD_SIZE:1}}"),
    batch_sampler=dict(fraction=0.8),
    dataset=dict(datasets=[_base_.real, generated]),
)
train_cfg = dict(max_epochs=2400)
custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type="EMAHook", ema_type="WarmupEMA", momentum=0.005, begin_epoch=61),  # after 2.5 % of the epochs
]

work_dir = "runs/mmpretrain/cifar10_generated/wrn_28_10_20m-kl"
