# IKL in place of the KL divergence of adversarial_trades.py; alpha, beta and T are those of the published CIFAR-10 run.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_ikl.py
_base_ = "../_base_/cifar10_miniature.py"

model = dict(robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True))

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_ikl"
