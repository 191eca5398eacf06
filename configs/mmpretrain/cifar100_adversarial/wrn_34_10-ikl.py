# CIFAR-100, WideResNet-34-10: IKL, basic, second script of the authors' IKL code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100_adversarial/wrn_34_10-ikl.py
_base_ = "../_base_/cifar100_wrn_34_10.py"

# The values of the paper's tables, where alpha / 4 is the 5 of beta = 20, and beta is alpha.
model = dict(robust_loss=dict(type="IKLLoss", alpha=5.0, beta=20.0, weight_temperature=4.0, global_info=True))

work_dir = "runs/mmpretrain/cifar100_adversarial/wrn_34_10-ikl"
