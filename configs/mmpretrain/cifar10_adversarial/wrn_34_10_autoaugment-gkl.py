# CIFAR-10, WideResNet-34-10: GKL, AutoAugment, script of the authors' GKL code (Cui et al., TPAMI 2026).
#
# ikl train mmpretrain/cifar10_adversarial/wrn_34_10_autoaugment-gkl.py
_base_ = ["../_base_/cifar10_wrn_34_10.py", "../_base_/autoaugment_view.py"]

# With gamma 1 GKL is IKL, so this stands for the paper's IKL with AutoAugment too: the IKL code has no such script.
model = dict(
    data_preprocessor=dict(type="TwoViewDataPreprocessor"),
    augmented_weight=0.5,
    robust_loss=dict(type="GKLLoss", alpha=4.0, beta=20.0, gamma=1.0, weight_temperature=4.0, global_info=True),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.two_views))

work_dir = "runs/mmpretrain/cifar10_adversarial/wrn_34_10_autoaugment-gkl"
