"""The published networks written out: the names and shapes of their checkpoints, and their forward passes as functions.

Nothing here calls the package. A network is a dictionary of tensors under the published names; :class:`Pass` runs it
with torch's functions alone. Widths, repeats and strides are typed from the papers' tables and from the description of
the mdistiller zoo: He et al. 2016 (ResNet), Zagoruyko and Komodakis 2016 (wide ResNet), Simonyan and Zisserman 2015
(VGG), Howard et al. 2017 and Sandler et al. 2018 (MobileNet), Zhang et al. 2018 and Ma et al. 2018 (ShuffleNet).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class Result(NamedTuple):
    logits: Tensor
    feats: list[Tensor]
    preact_feats: list[Tensor] | None
    pooled_feat: Tensor


class Pass:
    """One forward pass over named weights; without any it notes in ``entries`` what it needs for some classes.

    In training batch statistics normalise, and ``moved`` holds what the running ones become; a second use of the same
    normalisation is an error of the description.
    """

    def __init__(self, weights: dict[str, Tensor] | None, training: bool = False, classes: int = 0) -> None:
        self.weights = weights
        self.training = training
        self.classes = classes
        self.moved: dict[str, Tensor] = {}
        self.entries: Shapes = {}

    def _weight(self, entry: str, *shape: int) -> Tensor:
        self.entries[entry] = shape
        return torch.empty(shape, device="meta") if self.weights is None else self.weights[entry]

    def conv(
        self, x: Tensor, name: str, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Tensor:
        weight = self._weight(f"{name}.weight", outputs, x.shape[1] // groups, size, size)
        added = self._weight(f"{name}.bias", outputs) if bias else None
        return F.conv2d(x, weight, added, stride, padding=size // 2, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        entries = ("weight", "bias", "running_mean", "running_var")
        scale, shift, mean, variance = (self._weight(f"{name}.{entry}", x.shape[1]) for entry in entries)
        self._weight(f"{name}.num_batches_tracked")
        if self.training:
            if f"{name}.running_mean" in self.moved:
                raise ValueError(f"{name} is used twice")
            count = x.numel() // x.shape[1]
            old_mean, old_variance = mean, variance
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
            self.moved[f"{name}.running_mean"] = 0.9 * old_mean + 0.1 * mean
            self.moved[f"{name}.running_var"] = 0.9 * old_variance + 0.1 * variance * count / (count - 1)
        mean, deviation = mean[:, None, None], (variance + 1e-5).sqrt()[:, None, None]
        return (x - mean) / deviation * scale[:, None, None] + shift[:, None, None]

    def unit(
        self, x: Tensor, conv: str, norm: str, outputs: int, size: int, stride: int = 1, groups: int = 1
    ) -> Tensor:
        return self.norm(self.conv(x, conv, outputs, size, stride, groups), norm)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self._weight(f"{name}.weight", self.classes, x.shape[1])
        return x @ weight.T + self._weight(f"{name}.bias", self.classes)


class Published(NamedTuple):
    """One network: its forward pass, from which the entries of its checkpoint follow."""

    forward: Callable[[Pass, Tensor], Result]

    def entries(self, num_classes: int) -> Shapes:
        """Names and shapes, in their order."""
        described = Pass(None, classes=num_classes)
        self.forward(described, torch.empty(1, 3, 32, 32, device="meta"))
        return described.entries

    def weights(self, num_classes: int, seed: int = 0) -> dict[str, Tensor]:
        """Random weights and statistics, none of them that of a fresh network."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for entry, shape in self.entries(num_classes).items():
            if entry.endswith("num_batches_tracked"):
                tensors[entry] = torch.tensor(7)
            elif len(shape) > 1:  # convolution or linear layer: keeps the size of its input
                scale = torch.Size(shape[1:]).numel() ** -0.5 * 2**0.5
                tensors[entry] = scale * torch.randn(shape, generator=generator)
            else:  # variances and scales around 1, means and biases around 0
                centre = 0.0 if entry.endswith(("bias", "mean")) else 1.0
                tensors[entry] = centre - 0.5 + torch.rand(shape, generator=generator)
        return tensors


def pooled(x: Tensor) -> Tensor:
    """Average pooling over the whole map: 8x8, 4x4, 2x2 or 7x7 at the size the network is made for."""
    return F.avg_pool2d(x, x.shape[2:])[:, :, 0, 0]


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channel j of group i goes to place j * groups + i."""
    size = x.shape[1] // groups
    return x[:, [i * size + j for j in range(size) for i in range(groups)]]


# --- ResNets of basic blocks or bottlenecks, thin ones of three stages and those of four ------------------------------


class Residual(NamedTuple):
    """Channels of the stem and the stages, blocks of each stage, and the names of shortcut and last layer."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    bottleneck: bool
    shortcut: str
    head: str


def residual(kind: Residual, net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1", "bn1", kind.channels[0], 3).relu()
    feats, preact_feats = [x], [x]
    sizes = (1, 3, 1) if kind.bottleneck else (3, 3)
    strided = 2 if kind.bottleneck else 1  # the 3x3 convolution of a bottleneck, the first one of a basic block
    for stage, (width, number) in enumerate(zip(kind.channels[1:], kind.blocks, strict=True), start=1):
        outputs = 4 * width if kind.bottleneck else width
        for block in range(number):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 and stage > 1 else 1
            inner = x
            for i, size in enumerate(sizes, start=1):
                to = outputs if i == len(sizes) else width
                inner = inner.relu()  # of an activation for i = 1: nothing
                inner = net.unit(inner, f"{name}.conv{i}", f"{name}.bn{i}", to, size, stride if i == strided else 1)
            if block == 0 and (stage > 1 or x.shape[1] != outputs):
                x = net.unit(x, f"{name}.{kind.shortcut}.0", f"{name}.{kind.shortcut}.1", outputs, 1, stride)
            before = inner + x
            x = before.relu()
        feats.append(x)
        preact_feats.append(before)
    mean = pooled(x)
    return Result(net.linear(mean, kind.head), feats, preact_feats, mean)


# --- wide ResNets: three stages of pre-activation blocks -------------------------------------------------------------


def wrn(blocks: int, width: int, net: Pass, images: Tensor) -> Result:
    x = net.conv(images, "conv1", 16, 3)
    feats, preact_feats = [x], [x]
    for stage, outputs in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range(blocks):
            name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            before = net.norm(x, f"{name}.bn1")
            if stage > 1 and block == 0:
                preact_feats.append(before)
            activation = before.relu()
            inner = net.unit(activation, f"{name}.conv1", f"{name}.bn2", outputs, 3, stride).relu()
            inner = net.conv(inner, f"{name}.conv2", outputs, 3)
            if x.shape[1] != outputs:
                x = net.conv(activation, f"{name}.convShortcut", outputs, 1, stride)
            x = inner + x
        feats.append(x)
    preact_feats.append(net.norm(x, "bn1"))
    mean = pooled(preact_feats[-1].relu())
    return Result(net.linear(mean, "fc"), feats, preact_feats, mean)


# --- VGG: five blocks, pooled in between; the fourth for images of height 64 alone -----------------------------------


def vgg(convolutions: tuple[int, ...], net: Pass, images: Tensor) -> Result:
    x = images
    feats: list[Tensor] = []
    preact_feats: list[Tensor] = []
    for block, (width, number) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        if block in (1, 2, 3) or (block == 4 and images.shape[2] == 64):
            x = F.max_pool2d(x, kernel_size=2, stride=2)
        for i in range(number):  # places 2, 5, ... are those of the ReLUs
            before = net.norm(net.conv(x, f"block{block}.{3 * i}", width, 3, bias=True), f"block{block}.{3 * i + 1}")
            x = before.relu()
        feats.append(x)
        preact_feats.append(before if block else x)
    mean = pooled(x)
    return Result(net.linear(mean, "classifier"), feats, preact_feats, mean)


# --- MobileNetV2: inverted residuals, half of the paper's channels ---------------------------------------------------

# stage: (expansion, channels, repeats, stride)
MOBILENET_V2 = {
    0: (1, 8, 1, 1),
    1: (6, 12, 2, 1),
    2: (6, 16, 3, 2),
    3: (6, 32, 4, 2),
    4: (6, 48, 3, 1),
    5: (6, 80, 3, 2),
    6: (6, 160, 1, 1),
}


def mobilenet_v2(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1.0", "conv1.1", 16, 3, 2).relu()
    feats = [x]
    for stage, (expansion, width, repeats, stage_stride) in MOBILENET_V2.items():
        for block in range(repeats):
            name, stride = f"blocks.{stage}.{block}.conv", stage_stride if block == 0 else 1
            wide = expansion * x.shape[1]
            inner = net.unit(x, f"{name}.0", f"{name}.1", wide, 1).relu()
            inner = net.unit(inner, f"{name}.3", f"{name}.4", wide, 3, stride, groups=wide).relu()
            inner = net.unit(inner, f"{name}.6", f"{name}.7", width, 1)
            x = inner + x if stride == 1 and inner.shape[1] == x.shape[1] else inner
        if stage in (1, 2, 4, 6):
            feats.append(x)
    mean = pooled(net.unit(x, "conv2.0", "conv2.1", 1280, 1).relu())
    return Result(net.linear(mean, "classifier.0"), feats, None, mean)


# --- MobileNetV1: depthwise separable convolutions -------------------------------------------------------------------

# (channels, stride), the paper's table 1 with stride 1 in the last layer
MOBILENET_V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def mobilenet_v1(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "model.0.0", "model.0.1", 32, 3, 2).relu()
    feats: list[Tensor] = []
    preact_feats: list[Tensor] = []
    for layer, (width, stride) in enumerate(MOBILENET_V1, start=1):
        name = f"model.{layer}"
        x = net.unit(x, f"{name}.0", f"{name}.1", x.shape[1], 3, stride, groups=x.shape[1]).relu()
        before = net.unit(x, f"{name}.3", f"{name}.4", width, 1)
        x = before.relu()
        if layer in (3, 5, 11, 13):
            feats.append(x)
            preact_feats.append(before)
    mean = pooled(x)
    return Result(net.linear(mean, "fc"), feats, preact_feats, mean)


# --- ShuffleNetV1, three groups --------------------------------------------------------------------------------------

SHUFFLE_V1 = {1: (240, 4), 2: (480, 8), 3: (960, 4)}  # stage: (channels, units)


def shuffle_v1(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1", "bn1", 24, 1).relu()
    feats, preact_feats = [x], [x]
    for stage, (width, units) in SHUFFLE_V1.items():
        for unit in range(units):
            name = f"layer{stage}.{unit}"
            outputs = width - x.shape[1] if unit == 0 else width  # the first puts the pooled input beside
            narrow, groups = outputs // 4, 1 if name == "layer1.0" else 3
            inner = net.unit(x, f"{name}.conv1", f"{name}.bn1", narrow, 1, groups=groups).relu()
            inner = shuffled(inner, groups)
            stride = 2 if unit == 0 else 1
            inner = net.unit(inner, f"{name}.conv2", f"{name}.bn2", narrow, 3, stride, groups=narrow).relu()
            inner = net.unit(inner, f"{name}.conv3", f"{name}.bn3", outputs, 1, groups=3)
            if unit == 0:  # zeros around the map count in the average
                around = F.pad(x, (1, 1, 1, 1))
                before = torch.cat([inner, F.avg_pool2d(around, kernel_size=3, stride=2)], 1)
            else:
                before = inner + x
            x = before.relu()
        feats.append(x)
        preact_feats.append(before)
    mean = pooled(x)
    return Result(net.linear(mean, "linear"), feats, preact_feats, mean)


# --- ShuffleNetV2, width 1 -------------------------------------------------------------------------------------------

SHUFFLE_V2 = {1: (116, 3), 2: (232, 7), 3: (464, 3)}  # stage: (channels, units after the first)


def shuffle_v2(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1", "bn1", 24, 1).relu()
    feats, preact_feats = [x], [x]
    for stage, (width, units) in SHUFFLE_V2.items():
        name, half, inputs = f"layer{stage}.0", width // 2, x.shape[1]
        left = net.unit(x, f"{name}.conv1", f"{name}.bn1", inputs, 3, 2, groups=inputs)
        left = net.unit(left, f"{name}.conv2", f"{name}.bn2", half, 1).relu()
        right = net.unit(x, f"{name}.conv3", f"{name}.bn3", half, 1).relu()
        right = net.unit(right, f"{name}.conv4", f"{name}.bn4", half, 3, 2, groups=half)
        right = net.unit(right, f"{name}.conv5", f"{name}.bn5", half, 1).relu()
        x = shuffled(torch.cat([left, right], 1), 2)
        for unit in range(1, units + 1):
            name = f"layer{stage}.{unit}"
            left, right = x[:, :half], x[:, half:]
            right = net.unit(right, f"{name}.conv1", f"{name}.bn1", half, 1).relu()
            right = net.unit(right, f"{name}.conv2", f"{name}.bn2", half, 3, groups=half)
            right = net.unit(right, f"{name}.conv3", f"{name}.bn3", half, 1)
            before = torch.cat([left, right], 1)
            x = shuffled(torch.cat([left, right.relu()], 1), 2)
        feats.append(x)
        preact_feats.append(before)
    mean = pooled(net.unit(x, "conv2", "bn2", 1024, 1).relu())
    return Result(net.linear(mean, "linear"), feats, preact_feats, mean)


# --- all of them -----------------------------------------------------------------------------------------------------


def _resnet(blocks: int, *channels: int) -> Published:
    kind = Residual(channels, (blocks,) * 3, bottleneck=False, shortcut="downsample", head="fc")
    return Published(partial(residual, kind))


def _four_stage(*blocks: int, bottleneck: bool) -> Published:
    kind = Residual((64, 64, 128, 256, 512), blocks, bottleneck, shortcut="shortcut", head="linear")
    return Published(partial(residual, kind))


def _wrn(blocks: int, width: int) -> Published:
    return Published(partial(wrn, blocks, width))


def _vgg(*convolutions: int) -> Published:
    return Published(partial(vgg, convolutions))


NETWORKS = {
    "resnet8": _resnet(1, 16, 16, 32, 64),
    "resnet14": _resnet(2, 16, 16, 32, 64),
    "resnet20": _resnet(3, 16, 16, 32, 64),
    "resnet32": _resnet(5, 16, 16, 32, 64),
    "resnet44": _resnet(7, 16, 16, 32, 64),
    "resnet56": _resnet(9, 16, 16, 32, 64),
    "resnet110": _resnet(18, 16, 16, 32, 64),
    "resnet8x4": _resnet(1, 32, 64, 128, 256),
    "resnet32x4": _resnet(5, 32, 64, 128, 256),
    "ResNet18": _four_stage(2, 2, 2, 2, bottleneck=False),
    "ResNet50": _four_stage(3, 4, 6, 3, bottleneck=True),
    "wrn_16_1": _wrn(2, 1),
    "wrn_16_2": _wrn(2, 2),
    "wrn_40_1": _wrn(6, 1),
    "wrn_40_2": _wrn(6, 2),
    "vgg8": _vgg(1, 1, 1, 1, 1),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "MobileNetV1": Published(mobilenet_v1),
    "MobileNetV2": Published(mobilenet_v2),
    "ShuffleV1": Published(shuffle_v1),
    "ShuffleV2": Published(shuffle_v2),
}
