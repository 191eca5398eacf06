# CIFAR-10, WideResNet-34-10: IKL, Cutout.
#
# ikl train mmpretrain/cifar10_adversarial/wrn_34_10_cutout-ikl.py
_base_ = ["../_base_/cifar10_wrn_34_10.py", "../_base_/cutout_view.py"]

# NOT VERIFIED: the authors' code offers Cutout, but no script of theirs uses it. Other values: wrn_34_10-ikl.py.
model = dict(
    data_preprocessor=dict(type="TwoViewDataPreprocessor"),
    augmented_weight=0.5,  # NOT VERIFIED: that of AutoAugment
    robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.two_views))

work_dir = "runs/mmpretrain/cifar10_adversarial/wrn_34_10_cutout-ikl"
