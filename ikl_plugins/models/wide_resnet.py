"""The CIFAR wide residual networks of the distillation literature: three stages of pre-activation blocks.

``wrn_D_W`` has 6n + 4 = D layers, 16 channels in the stem and 16 W, 32 W, 64 W in the stages. A block whose widths
differ has a 1x1 convolution for a shortcut, which sees what the block's first convolution sees; with W = 1 the first
stage has none.

Modules carry the names of the mdistiller zoo (``conv1``, ``block{1,2,3}.layer.i.{bn1,conv1,bn2,conv2,convShortcut}``,
``bn1``, ``fc``): the weights under the key 'model' of its checkpoints load strictly.

One thing differs from that zoo on purpose: its forward applies three batch normalisations a second time for the sake of
the features, so in training their running statistics move twice a step. Here each moves once, in ``forward`` and in
``forward_features`` alike. The outputs for the same weights and statistics are the zoo's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ._network import Features, Network, global_average, initialise_he

__all__ = ["wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"]


class BasicBlock(nn.Module):
    """Normalisation, ReLU and 3x3 convolution, twice, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_normalisation(x, self.bn1(x))

    def after_normalisation(self, x: Tensor, normalised: Tensor) -> Tensor:
        """The output for ``x`` when ``normalised``, which is ``bn1(x)``, is known."""
        activation = F.relu(normalised)
        shortcut = x if self.convShortcut is None else self.convShortcut(activation)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activation))))
        return out + shortcut


class Stage(nn.Module):
    """The blocks of one width, under the zoo's name ``layer``."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = BasicBlock(in_channels, out_channels, stride)
        self.layer = nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(Network):
    """A CIFAR wide residual network; the functions of this module build the named ones.

    Args:
        depth: number of layers, 6n + 4 with n >= 1.
        width: factor on the channels of the stages, at least 1.
        num_classes: number of logits.
        name: what error messages call the network.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``depth`` is not 6n + 4, or ``width`` or ``num_classes`` is below 1.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity, the last
        layer's bias from 0. In training each batch normalisation updates its running statistics once a forward pass,
        where the zoo's network updates three of them twice (see the module).

    References:
        Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016; Tian et al., Contrastive Representation
        Distillation, ICLR 2020.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import wrn_16_2
        >>> model = wrn_16_2(num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    """

    def __init__(self, depth: int, width: int, num_classes: int, *, name: str = "WideResNet") -> None:
        super().__init__(num_classes, name)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"{name}: `depth` must be 6n + 4 with n >= 1, got {depth}. Use 10, 16, ...")
        if width < 1:
            raise ValueError(f"{name}: `width` must be at least 1, got {width}. It multiplies 16 channels.")
        blocks = (depth - 4) // 6
        stem, first, second, third = 16, 16 * width, 32 * width, 64 * width
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = Stage(stem, first, blocks, stride=1)
        self.block2 = Stage(first, second, blocks, stride=2)
        self.block3 = Stage(second, third, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, num_classes)
        initialise_he(self)
        nn.init.zeros_(self.fc.bias)

    def last_maps(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return F.relu(self.bn1(x))

    def forward_features(self, images: Tensor) -> Features:
        """The outputs of the stem and of each stage; see :meth:`Network.forward_features`.

        'preact_feats' are the stem's again, then the stages' after the batch normalisation that follows (the next
        stage's first, or the last one), before its ReLU.
        """
        self.check(images)
        x = self.conv1(images)
        feats, preact_feats = [x], [x]
        for stage in (self.block1, self.block2, self.block3):
            first, *others = cast(Iterable[BasicBlock], stage.layer)
            normalised = first.bn1(x)
            if stage is not self.block1:
                preact_feats.append(normalised)
            x = first.after_normalisation(x, normalised)
            for block in others:
                x = block(x)
            feats.append(x)
        normalised = self.bn1(x)
        preact_feats.append(normalised)
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(F.relu(normalised)))


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    """16 layers; 180,916 parameters for 100 classes."""
    return WideResNet(16, 1, num_classes, name="wrn_16_1")


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """16 layers of twice the width; 703,284 parameters for 100 classes."""
    return WideResNet(16, 2, num_classes, name="wrn_16_2")


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """40 layers; 569,780 parameters for 100 classes."""
    return WideResNet(40, 1, num_classes, name="wrn_40_1")


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """40 layers of twice the width; 2,255,156 parameters for 100 classes."""
    return WideResNet(40, 2, num_classes, name="wrn_40_2")
