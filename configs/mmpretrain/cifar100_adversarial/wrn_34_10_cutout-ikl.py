# CIFAR-100, WideResNet-34-10: IKL, Cutout.
#
# ikl train mmpretrain/cifar100_adversarial/wrn_34_10_cutout-ikl.py
_base_ = ["../_base_/cifar100_wrn_34_10.py", "../_base_/cutout_view.py"]

# NOT VERIFIED: the authors' code offers Cutout, but no script of theirs uses it. Other values: the AutoAugment script.
model = dict(
    data_preprocessor=dict(type="TwoViewDataPreprocessor"),
    augmented_weight=0.3,  # NOT VERIFIED: that of AutoAugment
    robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.two_views))

work_dir = "runs/mmpretrain/cifar100_adversarial/wrn_34_10_cutout-ikl"
