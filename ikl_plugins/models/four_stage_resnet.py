"""The four-stage ResNets with CIFAR's stem: the networks of ImageNet with a 3x3 first convolution and no max-pooling.

``ResNet18`` is built of basic blocks, ``ResNet50`` of bottlenecks; the stem has 64 channels, the stages have 64, 128,
256 and 512 (times 4 behind bottlenecks) and strides 1, 2, 2, 2. Shortcuts that change the shape are a 1x1 convolution
with batch normalisation; in a bottleneck the 3x3 convolution carries the stride.

Modules carry the names of the mdistiller zoo (``conv1``, ``bn1``, ``layer{1,2,3,4}.i.{conv1,bn1,conv2,bn2}``, in
bottlenecks ``{conv3,bn3}`` too, ``layer{1,2,3,4}.0.shortcut.{0,1}``, ``linear``): the weights under the key 'model' of
its checkpoints load strictly. torchvision's networks of the same depth have other names and another stem.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check
from ._network import Block, Features, Network, global_average, initialise_he, stage_features

__all__ = ["ResNet18", "ResNet50"]


class BasicBlock(Block):
    """Two 3x3 convolutions with batch normalisation, added to a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def preactivation(self, x: Tensor) -> Tensor:
        """The sum of both paths before the last ReLU."""
        inner = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(inner)) + self.shortcut(x)
        return out


class Bottleneck(Block):
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
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def preactivation(self, x: Tensor) -> Tensor:
        """The sum of both paths before the last ReLU."""
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        out: Tensor = self.bn3(self.conv3(inner)) + self.shortcut(x)
        return out


class FourStageResNet(Network):
    """A four-stage ResNet with CIFAR's stem; the functions of this module build the named ones.

    Args:
        block: the class of the blocks.
        blocks: their number in each stage.
        num_classes: number of logits.
        name: what error messages call the network.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``num_classes`` is below 1.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1; Tian et al., Contrastive
        Representation Distillation, ICLR 2020, for the family as the distillation literature uses it.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import ResNet18
        >>> model = ResNet18(num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
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
        super().__init__()
        check.check_num_classes(name, num_classes)
        self.name = name
        first, second, third, fourth = blocks
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, 64, 64, first, stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, second, stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, third, stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, fourth, stride=2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        initialise_he(self)

    def last_maps(self, images: Tensor) -> Tensor:
        x: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(self._stem(images)))))
        return x

    def forward_features(self, images: Tensor) -> Features:
        """The intermediate features of a batch; ``linear(features["pooled_feat"])`` are the logits of :meth:`forward`.

        Args:
            images: as in :meth:`forward`.

        Returns:
            'feats': the outputs of the stem and of each stage; 'preact_feats': the same before the last ReLU of a stage
            (the stem's is after it, as in the zoo); 'pooled_feat': (N, channels), what ``linear`` sees.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self.check(images)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        feats, preact_feats = stage_features(self._stem(images), stages)
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(feats[-1]))

    def _stem(self, images: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(images)))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()  # the identity
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)))


def ResNet18(num_classes: int = 100) -> FourStageResNet:  # noqa: N802 - the published name
    """18 layers of basic blocks; 11,220,132 parameters for 100 classes."""
    return FourStageResNet(BasicBlock, (2, 2, 2, 2), num_classes, name="ResNet18")


def ResNet50(num_classes: int = 100) -> FourStageResNet:  # noqa: N802 - the published name
    """50 layers of bottlenecks; 23,705,252 parameters for 100 classes."""
    return FourStageResNet(Bottleneck, (3, 4, 6, 3), num_classes, name="ResNet50")
