"""The CIFAR networks of the distillation literature, under the state-dict names of their published checkpoints.

Each name in ``__all__`` is a function that builds one network: ``resnet20(num_classes=100)``.
"""

from .resnet import resnet8, resnet8x4, resnet14, resnet20, resnet32, resnet32x4, resnet44, resnet56, resnet110

__all__ = [
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
]
