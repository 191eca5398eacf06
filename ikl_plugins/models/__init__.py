"""The networks of the distillation literature, under the state-dict names of their published checkpoints.

Each name in ``__all__`` builds one network: ``resnet20(num_classes=100)``. All are for CIFAR but ``MobileNetV1``, which
is for ImageNet. ``forward`` gives logits, ``forward_features`` the intermediate features.
"""

from .mobilenet import MobileNetV1, MobileNetV2
from .resnet import (
    ResNet18,
    ResNet50,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from .shufflenet import ShuffleV1, ShuffleV2
from .vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from .wide_resnet import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "MobileNetV1",
    "MobileNetV2",
    "ResNet18",
    "ResNet50",
    "ShuffleV1",
    "ShuffleV2",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
