"""The CIFAR networks of the distillation literature, under the state-dict names of their published checkpoints.

Each name in ``__all__`` is a function that builds one network: ``resnet20(num_classes=100)``.
"""

from .resnet import resnet8, resnet8x4, resnet14, resnet20, resnet32, resnet32x4, resnet44, resnet56, resnet110
from .wide_resnet import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

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
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
