# CIFAR-10, WideResNet-34-10: IKL, basic, script of the authors' IKL code (Cui et al., NeurIPS 2024).
#
# ikl train mmpretrain/cifar10_adversarial/wrn_34_10-ikl.py
_base_ = "../_base_/cifar10_wrn_34_10.py"

# alpha as in the script. The log of the published checkpoint names 3.
model = dict(robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True))

work_dir = "runs/mmpretrain/cifar10_adversarial/wrn_34_10-ikl"
