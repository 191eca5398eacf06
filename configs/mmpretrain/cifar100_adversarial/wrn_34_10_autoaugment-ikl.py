# CIFAR-100, WideResNet-34-10: IKL, AutoAugment, script of the authors' IKL code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100_adversarial/wrn_34_10_autoaugment-ikl.py
_base_ = ["../_base_/cifar100_wrn_34_10.py", "../_base_/autoaugment_view.py"]

model = dict(
    data_preprocessor=dict(type="TwoViewDataPreprocessor"),
    augmented_weight=0.3,
    robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.two_views))

work_dir = "runs/mmpretrain/cifar100_adversarial/wrn_34_10_autoaugment-ikl"
