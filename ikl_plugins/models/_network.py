"""What the networks of the zoo share: the shell around their layers, their features, their checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypedDict, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check


class PlainFeatures(TypedDict):
    """Features of a network whose stages have no pre-activation form, by the names that feature distillers use."""

    feats: list[Tensor]
    pooled_feat: Tensor


class Features(PlainFeatures):
    """What ``forward_features`` gives, by the names that feature distillers use."""

    preact_feats: list[Tensor]


class Network(nn.Module, ABC):
    """Images to maps, to the means of the maps, to logits.

    A subclass builds the layers and says in :meth:`last_maps` how images become the maps that are averaged.

    Args:
        num_classes: number of logits.
        name: what error messages call the network; None for its class.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``num_classes`` is below 1.
    """

    head_name = "fc"
    """The published name of the last layer."""

    def __init__(self, num_classes: int, name: str | None = None) -> None:
        super().__init__()
        self.name = name or type(self).__name__
        check.check_num_classes(self.name, num_classes)

    @property
    def head(self) -> nn.Module:
        """The last layer: ``head(forward_features(images)["pooled_feat"])`` are the logits."""
        return self.get_submodule(self.head_name)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of a batch.

        Args:
            images: shape (N, 3, H, W). The CIFAR networks are made for 32x32 and MobileNetV1 for 224x224; other sizes
                pass through the same layers and a global average pooling.

        Returns:
            Logits, shape (N, num_classes).

        Raises:
            ValueError: ``images`` is not a batch of three-channel images, or they are too small for the network.
        """
        self.check(images)
        logits: Tensor = self.head(global_average(self.last_maps(images)))
        return logits

    @abstractmethod
    def last_maps(self, images: Tensor) -> Tensor:
        """The activated maps that are averaged, shape (N, channels, h, w)."""

    @abstractmethod
    def forward_features(self, images: Tensor) -> PlainFeatures:
        """The intermediate features of the batches that :meth:`forward` takes.

        Returns:
            'feats': the outputs of the stem and of each stage, where a subclass names no others; 'preact_feats': the
            same before the last ReLU of a stage (the stem's is after it, as in the zoo); 'pooled_feat': (N, channels),
            what :attr:`head` sees.
        """

    def smallest(self, images: Tensor) -> int:
        """Height and width in pixels that such images need at least."""
        return 1

    def check(self, images: Tensor) -> None:
        """Refuses what is not a batch of RGB images of sufficient size."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name}: `images` must have shape (N, 3, H, W), got {tuple(images.shape)}. A single one "
                "needs `.unsqueeze(0)`."
            )
        height, width = images.shape[2:]
        smallest = self.smallest(images)
        if min(height, width) < smallest:
            raise ValueError(
                f"{self.name}: `images` must have at least {smallest} pixels a side, got {height} x {width}."
            )


class StagedNetwork(Network):
    """A stem of ``conv1`` and ``bn1``, stages ``layer1``, ``layer2``, ..., and what a subclass puts before the mean.

    Args:
        num_classes: see :class:`Network`.
        stem: the first convolution.
        stages: of blocks, the last one of each a :class:`Block`.
        name: see :class:`Network`.
    """

    def __init__(
        self, num_classes: int, stem: nn.Conv2d, stages: Iterable[nn.Sequential], name: str | None = None
    ) -> None:
        super().__init__(num_classes, name)
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.stage_names = []
        for number, stage in enumerate(stages, start=1):
            self.stage_names.append(f"layer{number}")
            self.add_module(f"layer{number}", stage)

    def stem(self, images: Tensor) -> Tensor:
        """The input of the first stage."""
        return F.relu(self.bn1(self.conv1(images)))

    def after_stages(self, x: Tensor) -> Tensor:
        """The maps that are averaged, of the last stage's output."""
        return x

    def last_maps(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return self.after_stages(x)

    def forward_features(self, images: Tensor) -> Features:
        self.check(images)
        x = self.stem(images)
        feats, preact_feats = [x], [x]
        for name in self.stage_names:
            *blocks, last = cast(Iterable[Block], self.get_submodule(name))
            for block in blocks:
                x = block(x)
            preactivation = last.preactivation(x)
            preact_feats.append(preactivation)
            x = last.activate(preactivation)
            feats.append(x)
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(self.after_stages(x)))


class Block(nn.Module, ABC):
    """A block whose last step is an activation, so that a stage's pre-activation features can be had."""

    @abstractmethod
    def preactivation(self, x: Tensor) -> Tensor:
        """The output before the last activation."""

    def activate(self, preactivation: Tensor) -> Tensor:
        """The output for a known :meth:`preactivation`."""
        return F.relu(preactivation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.preactivation(x))


def global_average(x: Tensor) -> Tensor:
    """(N, C, H, W) to the means of the maps, (N, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleaves ``groups`` equal groups of channels: first channel of each group, second of each, and so on."""
    samples, channels, height, width = x.shape
    return x.reshape(samples, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


def initialise_he(network: nn.Module) -> None:
    """He's normal initialisation (fan out) for every convolution, 0 for its bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
