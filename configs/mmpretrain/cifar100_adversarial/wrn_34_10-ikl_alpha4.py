# CIFAR-100, WideResNet-34-10: IKL, basic, first script of the authors' IKL code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar100_adversarial/wrn_34_10-ikl_alpha4.py
_base_ = "../_base_/cifar100_wrn_34_10.py"

model = dict(robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True))

work_dir = "runs/mmpretrain/cifar100_adversarial/wrn_34_10-ikl_alpha4"
