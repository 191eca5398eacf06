# Cross entropy + IKL as the authors' CIFAR-100 files have it: a ramp of 20 epochs, the soft cross entropy at
# temperature 4 without 4**2, and no class prior, but weights at temperature 100 and so nearly uniform, which the paper
# does not say.
_base_ = "./cifar100_distillation.py"

model = dict(
    distill_loss=dict(type="IKLLoss", temperature=4.0, weight_temperature=100.0, global_info=False),
    warmup_epochs=20,
)
