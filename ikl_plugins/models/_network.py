"""What the networks of the zoo share: the shell around their layers, their features, their checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypedDict, cast

import torch.nn.functional as F
from torch import Tensor, nn


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
    """

    name: str
    """What error messages call the network."""

    head_name = "fc"
    """The published name of the last layer."""

    smallest = 1
    """Height and width in pixels that an image needs at least."""

    @property
    def head(self) -> nn.Module:
        """The last layer: ``head(forward_features(images)["pooled_feat"])`` are the logits."""
        head: nn.Module = getattr(self, self.head_name)
        return head

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
        """The intermediate features of a batch."""

    def check(self, images: Tensor) -> None:
        """Refuses what is not a batch of RGB images of sufficient size."""
        check_images(self.name, images, self.smallest)


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


def stage_features(stem: Tensor, stages: Iterable[nn.Sequential]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of the stem and of each stage, and the same before the last activation of a stage.

    Args:
        stem: the first stage's input. It is the first entry of both lists.
        stages: sequences whose last module is a :class:`Block`.
    """
    x = stem
    feats, preact_feats = [x], [x]
    for stage in stages:
        *blocks, last = stage
        for block in blocks:
            x = block(x)
        final = cast(Block, last)
        preactivation = final.preactivation(x)
        preact_feats.append(preactivation)
        x = final.activate(preactivation)
        feats.append(x)
    return feats, preact_feats


def check_images(name: str, images: Tensor, smallest: int = 1) -> None:
    """Refuses what is not a batch of RGB images of ``smallest`` pixels a side or more, in the name of the network."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{name}: `images` must have shape (N, 3, H, W), got {tuple(images.shape)}. "
            f"Pass a batch of RGB images; a single one gets its batch dimension with `.unsqueeze(0)`."
        )
    if min(images.shape[2:]) < smallest:
        height, width = images.shape[2:]
        raise ValueError(
            f"{name}: `images` must be at least {smallest} pixels high and wide, got {height} x {width}. "
            f"Resize them first."
        )


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
