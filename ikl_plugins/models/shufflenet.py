"""The ShuffleNets of the distillation literature, for CIFAR: ``ShuffleV1`` with three groups, ``ShuffleV2`` at width 1.

Both have a 1x1 convolution to 24 channels for a stem, without the pooling of ImageNet's networks, and three stages of
stride 2.

Modules carry the names of the mdistiller zoo: the weights under the key 'model' of its checkpoints load strictly.

Where the zoo's ShuffleV1 departs from the paper, it does so here: a ReLU follows the depthwise convolution too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._network import Block, StagedNetwork, shuffle_channels

__all__ = ["ShuffleV1", "ShuffleV2"]

_STEM = 24
_V1_GROUPS = 3


class GroupedUnit(Block):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input, or with stride 2 put beside its average.

    With stride 2 the convolutions make the channels that the input lacks. The inner ones have a quarter of those. After
    the stem the first convolution is not grouped, and nothing is shuffled.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = out_channels - in_channels if stride == 2 else out_channels
        inner = branch // 4
        self.groups = 1 if in_channels == _STEM else _V1_GROUPS
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, branch, 1, groups=_V1_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def preactivation(self, x: Tensor) -> Tensor:
        inner = shuffle_channels(F.relu(self.bn1(self.conv1(x))), self.groups)
        inner = F.relu(self.bn2(self.conv2(inner)))
        branch: Tensor = self.bn3(self.conv3(inner))
        if self.stride == 1:
            return branch + x
        return torch.cat([branch, F.avg_pool2d(x, 3, 2, padding=1)], 1)


class ShuffleV1(StagedNetwork):
    """ShuffleNet with three groups and stages of 240, 480 and 960 channels; 949,258 parameters for 100 classes.

    Names: ``conv1``, ``bn1``, ``layer{1,2,3}.i.{conv1,bn1,conv2,bn2,conv3,bn3}``, ``linear``.

    Args:
        num_classes: number of logits, an integer of at least 1.

    Note:
        All layers start from torch's defaults, as in the zoo.

    References:
        Zhang et al., ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018,
        table 1; Tian et al., Contrastive Representation Distillation, ICLR 2020.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import ShuffleV1
        >>> model = ShuffleV1(num_classes=10)
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4)]
    """

    head_name = "linear"

    def __init__(self, num_classes: int = 100) -> None:
        stem = nn.Conv2d(3, _STEM, 1, bias=False)
        super().__init__(
            num_classes, stem, [_grouped_stage(_STEM, 240, 4), _grouped_stage(240, 480, 8), _grouped_stage(480, 960, 4)]
        )
        self.linear = nn.Linear(960, num_classes)


class SplitUnit(Block):
    """Keeps one half of the channels, runs the other through 1x1, depthwise 3x3 and 1x1, and shuffles the two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def preactivation(self, x: Tensor) -> Tensor:
        """The kept half and the other one before its last ReLU, not yet shuffled."""
        kept, x = x.chunk(2, 1)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return torch.cat([kept, self.bn3(self.conv3(x))], 1)

    def activate(self, preactivation: Tensor) -> Tensor:
        kept, branch = preactivation.chunk(2, 1)
        return shuffle_channels(torch.cat([kept, F.relu(branch)], 1), 2)


class DownUnit(nn.Module):
    """Two paths of stride 2, each to half of the channels, shuffled."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        long = F.relu(self.bn5(self.conv5(long)))
        return shuffle_channels(torch.cat([short, long], 1), 2)


class ShuffleV2(StagedNetwork):
    """ShuffleNetV2 with stages of 116, 232 and 464 channels; 1,355,528 parameters for 100 classes.

    Names: ``conv1``, ``bn1``, ``layer{1,2,3}.0.{conv,bn}{1,2,3,4,5}``, ``layer{1,2,3}.i.{conv,bn}{1,2,3}``, ``conv2``,
    ``bn2``, ``linear``.

    Args:
        num_classes: number of logits, an integer of at least 1.

    Note:
        All layers start from torch's defaults, as in the zoo. 'preact_feats' are taken before the shuffle that ends a
        stage, so that their channels stand in another order than in 'feats'.

    References:
        Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018, table 5; Tian
        et al., Contrastive Representation Distillation, ICLR 2020.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import ShuffleV2
        >>> model = ShuffleV2(num_classes=10)
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4)]
    """

    head_name = "linear"

    def __init__(self, num_classes: int = 100) -> None:
        stem = nn.Conv2d(3, _STEM, 1, bias=False)
        super().__init__(
            num_classes, stem, [_split_stage(_STEM, 116, 3), _split_stage(116, 232, 7), _split_stage(232, 464, 3)]
        )
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def after_stages(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))


def _grouped_stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    first = GroupedUnit(in_channels, out_channels, stride=2)
    return nn.Sequential(first, *(GroupedUnit(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))


def _split_stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, out_channels), *(SplitUnit(out_channels) for _ in range(blocks)))
