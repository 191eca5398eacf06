"""The CIFAR ResNets of the distillation literature: thin ones of three stages, and ImageNet's of four.

- ``resnetD`` has 6n + 2 = D layers of basic blocks behind a 3x3 stem, and 16, 16, 32, 64 channels in stem and stages;
  the ``x4`` networks have 32, 64, 128, 256.
- ``ResNet18`` is built of basic blocks, ``ResNet50`` of bottlenecks, whose 3x3 convolution carries the stride. They are
  ImageNet's networks with a 3x3 first convolution and no max-pooling: 64 channels in the stem, 64, 128, 256 and 512
  (times 4 behind bottlenecks) in the stages, and strides 1, 2, 2, 2.

A shortcut that changes the shape is a 1x1 convolution with batch normalisation.

Modules carry the names of the mdistiller zoo: ``conv1``, ``bn1``, ``layer{1,2,3}.i.{conv1,bn1,conv2,bn2}``,
``layer{1,2,3}.0.downsample.{0,1}``, ``fc`` of the thin ones; of the others ``layer4`` too, in bottlenecks
``{conv3,bn3}``, ``shortcut`` for ``downsample``, and ``linear`` for ``fc``. The weights under the key 'model' of its
checkpoints load strictly. torchvision's networks of the same depth have other names and another stem.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._network import Block, StagedNetwork, initialise_he

__all__ = [
    "ResNet18",
    "ResNet50",
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


class ResidualBlock(Block):
    """A block whose result is added to a shortcut."""

    expansion = 1
    shortcut_name = "shortcut"

    def add_shortcut(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Registers the shortcut, which the published networks have as their last module."""
        shortcut = nn.Sequential()  # the identity
        if stride != 1 or in_channels != out_channels:
            shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            shortcut.append(nn.BatchNorm2d(out_channels))
        self.add_module(self.shortcut_name, shortcut)

    def add(self, inner: Tensor, x: Tensor) -> Tensor:
        """The sum of both paths before the last ReLU."""
        out: Tensor = inner + self.get_submodule(self.shortcut_name)(x)
        return out


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions with batch normalisation, added to a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add_shortcut(in_channels, channels, stride)

    def preactivation(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return self.add(self.bn2(self.conv2(inner)), x)


class ThinBlock(BasicBlock):
    """The basic block under the names of the thin networks."""

    shortcut_name = "downsample"


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions with batch normalisation, added to a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.add_shortcut(in_channels, out_channels, stride)

    def preactivation(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return self.add(self.bn3(self.conv3(inner)), x)


def _stages(
    block: type[BasicBlock] | type[Bottleneck], stem: int, channels: tuple[int, ...], blocks: tuple[int, ...]
) -> list[nn.Sequential]:
    """Stages of ``blocks`` blocks; all but the first halve the maps."""
    stages: list[nn.Sequential] = []
    before = stem
    for width, number in zip(channels, blocks, strict=True):
        stage = nn.Sequential()
        for index in range(number):
            stage.append(block(before, width, stride=2 if stages and index == 0 else 1))
            before = width * block.expansion
        stages.append(stage)
    return stages


class ResNet(StagedNetwork):
    """A thin CIFAR ResNet; the functions of this module build the named ones.

    Args:
        depth: number of layers, 6n + 2 with n >= 1.
        channels: of the stem and the three stages.
        num_classes: number of logits, an integer of at least 1.
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
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"{name}: `depth` must be 6n + 2 with n >= 1, got {depth}. Use 8, 14, 20, ...")
        blocks = (depth - 2) // 6
        stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        super().__init__(num_classes, stem, _stages(ThinBlock, channels[0], channels[1:], (blocks,) * 3), name)
        self.fc = nn.Linear(channels[-1], num_classes)
        initialise_he(self)


class FourStageResNet(StagedNetwork):
    """A four-stage ResNet with CIFAR's stem; the functions of this module build the named ones.

    Args:
        block: the class of the blocks.
        blocks: their number in each stage.
        num_classes: number of logits, an integer of at least 1.
        name: what error messages call the network.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity.

    References:
        He et al., CVPR 2016, table 1; Tian et al., ICLR 2020, as above.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import ResNet18
        >>> model = ResNet18(num_classes=10)
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    """

    head_name = "linear"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
        *,
        name: str = "FourStageResNet",
    ) -> None:
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        super().__init__(num_classes, stem, _stages(block, 64, (64, 128, 256, 512), blocks), name)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        initialise_he(self)


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


def ResNet18(num_classes: int = 100) -> FourStageResNet:  # noqa: N802 - the published name
    """18 layers of basic blocks; 11,220,132 parameters for 100 classes."""
    return FourStageResNet(BasicBlock, (2, 2, 2, 2), num_classes, name="ResNet18")


def ResNet50(num_classes: int = 100) -> FourStageResNet:  # noqa: N802 - the published name
    """50 layers of bottlenecks; 23,705,252 parameters for 100 classes."""
    return FourStageResNet(Bottleneck, (3, 4, 6, 3), num_classes, name="ResNet50")
