# CIFAR-10, WideResNet-28-10 with SiLU, a million generated images: IKL in place of the KL divergence.
#
# ikl train mmpretrain/cifar10_generated/wrn_28_10_1m-ikl.py
_base_ = "./wrn_28_10_1m-kl.py"

# NOT VERIFIED: no coefficients are published for a million images. These are those of the 20 million.
model = dict(
    robust_loss=dict(_delete_=True, type="IKLLoss", alpha=3.0, beta=10.0, weight_temperature=4.0, global_info=True)
)

work_dir = "runs/mmpretrain/cifar10_generated/wrn_28_10_1m-ikl"
