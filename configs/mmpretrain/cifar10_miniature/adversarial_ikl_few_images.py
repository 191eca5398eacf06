# The loss of adversarial_ikl.py on 900 images for 120 epochs, to see how robust accuracy on other images stays behind.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_miniature/adversarial_ikl_few_images.py
_base_ = "../_base_/cifar10_miniature_few_images.py"

model = dict(robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True))

work_dir = "runs/mmpretrain/cifar10_miniature/adversarial_ikl_few_images"
