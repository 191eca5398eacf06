# Cross entropy + GKL as the authors' CIFAR-100 files have it: a ramp of 20 epochs, the soft cross entropy at
# temperature 4 without 4**2, and weights at temperature 4, with the class prior in seven of the eleven pairs.
_base_ = "./cifar100_distillation.py"

model = dict(
    distill_loss=dict(type="GKLLoss", temperature=4.0, weight_temperature=4.0),
    warmup_epochs=20,
)
