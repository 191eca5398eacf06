"""The thin CIFAR ResNets of the distillation literature: three stages of basic blocks behind a 3x3 stem.

``resnetD`` has 6n + 2 = D layers and 16, 16, 32, 64 channels in stem and stages; the ``x4`` networks have
32, 64, 128, 256. Shortcuts that change the shape are a 1x1 convolution with batch normalisation, so the ``x4`` networks
have one in the first stage too.

Modules carry the names of the mdistiller zoo (``conv1``, ``bn1``, ``layer{1,2,3}.i.{conv1,bn1,conv2,bn2}``,
``layer{1,2,3}.0.downsample.{0,1}``, ``fc``): the weights under the key 'model' of its checkpoints load strictly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check
from ._network import Block, Features, Network, global_average, initialise_he, stage_features

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


class BasicBlock(Block):
    """Two 3x3 convolutions with batch normalisation, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def preactivation(self, x: Tensor) -> Tensor:
        """The sum of both paths before the last ReLU."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return x + shortcut


class ResNet(Network):
    """A CIFAR ResNet; the functions of this module build the named ones.

    Args:
        depth: number of layers, 6n + 2 with n >= 1.
        channels: of the stem and the three stages.
        num_classes: number of logits.
        name: what error messages call the network.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``depth`` is not 6n + 2, or ``num_classes`` is below 1.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; Tian et al., Contrastive
        Representation Distillation, ICLR 2020, for the family as the distillation literature uses it.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import resnet20
        >>> model = resnet20(num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    """

    def __init__(
        self, depth: int, channels: tuple[int, int, int, int], num_classes: int, *, name: str = "ResNet"
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"{name}: `depth` must be 6n + 2 with n >= 1, got {depth}. Use 8, 14, 20, 26, 32, ...")
        check.check_num_classes(name, num_classes)
        self.name = name
        blocks = (depth - 2) // 6
        stem, first, second, third = channels
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.fc = nn.Linear(third, num_classes)
        initialise_he(self)

    def last_maps(self, images: Tensor) -> Tensor:
        x: Tensor = self.layer3(self.layer2(self.layer1(self._stem(images))))
        return x

    def forward_features(self, images: Tensor) -> Features:
        """The intermediate features of a batch; ``fc(features["pooled_feat"])`` are the logits of :meth:`forward`.

        Args:
            images: as in :meth:`forward`.

        Returns:
            'feats': the outputs of the stem and of each stage; 'preact_feats': the same before the last ReLU of a stage
            (the stem's is after it, as in the zoo); 'pooled_feat': (N, channels), what ``fc`` sees.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self.check(images)
        feats, preact_feats = stage_features(self._stem(images), (self.layer1, self.layer2, self.layer3))
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(feats[-1]))

    def _stem(self, images: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(images)))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


_THIN = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)


def resnet8(num_classes: int = 100) -> ResNet:
    """8 layers; 83,892 parameters for 100 classes."""
    return ResNet(8, _THIN, num_classes, name="resnet8")


def resnet14(num_classes: int = 100) -> ResNet:
    """14 layers; 181,108 parameters for 100 classes."""
    return ResNet(14, _THIN, num_classes, name="resnet14")


def resnet20(num_classes: int = 100) -> ResNet:
    """20 layers; 278,324 parameters for 100 classes."""
    return ResNet(20, _THIN, num_classes, name="resnet20")


def resnet32(num_classes: int = 100) -> ResNet:
    """32 layers; 472,756 parameters for 100 classes."""
    return ResNet(32, _THIN, num_classes, name="resnet32")


def resnet44(num_classes: int = 100) -> ResNet:
    """44 layers; 667,188 parameters for 100 classes."""
    return ResNet(44, _THIN, num_classes, name="resnet44")


def resnet56(num_classes: int = 100) -> ResNet:
    """56 layers; 861,620 parameters for 100 classes."""
    return ResNet(56, _THIN, num_classes, name="resnet56")


def resnet110(num_classes: int = 100) -> ResNet:
    """110 layers; 1,736,564 parameters for 100 classes."""
    return ResNet(110, _THIN, num_classes, name="resnet110")


def resnet8x4(num_classes: int = 100) -> ResNet:
    """8 layers of four times the stages' width; 1,233,540 parameters for 100 classes."""
    return ResNet(8, _WIDE, num_classes, name="resnet8x4")


def resnet32x4(num_classes: int = 100) -> ResNet:
    """32 layers of four times the stages' width; 7,433,860 parameters for 100 classes."""
    return ResNet(32, _WIDE, num_classes, name="resnet32x4")
