# The first of IKL's two changes alone, the broken asymmetry: the weights are the natural predictions of each image, not
# the class prior of adversarial_ikl.py.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_ikl_no_prior.py
_base_ = "../_base_/cifar10_miniature.py"

model = dict(robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, global_info=False))

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_ikl_no_prior"
