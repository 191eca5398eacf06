# 900 images for cifar10_miniature, and so many epochs that accuracy on them leaves that on other images behind: full
# eps from the first epoch, no weight perturbation.
_base_ = "./cifar10_miniature.py"

epochs = 120

model = dict(attack=dict(eps_ramp=0.0), awp=None)
train_dataloader = dict(dataset=dict(indices=range(0, 45_000, 50)))
param_scheduler = [
    dict(type="LinearLR", by_epoch=True, start_factor=0.1, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=1, T_max=epochs - 1, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
