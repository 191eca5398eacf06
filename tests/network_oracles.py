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


class Published(NamedTuple):
    """One network: its entries for a number of classes, and its forward pass."""

    entries: Callable[[int], Shapes]
    forward: Callable[[Pass, Tensor], Result]

    def weights(self, num_classes: int, seed: int = 0) -> dict[str, Tensor]:
        """Random weights and statistics, none of them that of a fresh network."""
        generator = torch.Generator().manual_seed(seed)
        entries = self.entries(num_classes)
        tensors = {}
        for entry, shape in entries.items():
            if entry.endswith("num_batches_tracked"):
                tensors[entry] = torch.tensor(7)
            elif len(shape) > 1:  # convolution or linear layer: keeps the size of its input
                scale = torch.Size(shape[1:]).numel() ** -0.5 * 2**0.5
                tensors[entry] = scale * torch.randn(shape, generator=generator)
            else:  # variances and scales around 1, means and biases around 0
                centre = 0.0 if entry.endswith(("bias", "mean")) else 1.0
                tensors[entry] = centre - 0.5 + torch.rand(shape, generator=generator)
        return tensors


class Pass:
    """One forward pass over named weights.

    In training batch statistics normalise, and ``moved`` holds what the running ones become; a second use of the same
    normalisation is an error of the description.
    """

    def __init__(self, weights: dict[str, Tensor], training: bool = False) -> None:
        self.weights = weights
        self.training = training
        self.moved: dict[str, Tensor] = {}

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        bias = self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        entries = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (self.weights[f"{name}.{entry}"] for entry in entries)
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

    def unit(self, x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        return self.norm(self.conv(x, conv, stride), norm)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


def conv(name: str, outputs: int, inputs: int, size: int, groups: int = 1) -> Shapes:
    return {f"{name}.weight": (outputs, inputs // groups, size, size)}


def norm(name: str, width: int) -> Shapes:
    shapes = {f"{name}.{entry}": (width,) for entry in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


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


def residual_entries(net: Residual, num_classes: int) -> Shapes:
    before = net.channels[0]
    entries = conv("conv1", before, 3, 3) | norm("bn1", before)
    for stage, (width, number) in enumerate(zip(net.channels[1:], net.blocks, strict=True), start=1):
        outputs = 4 * width if net.bottleneck else width
        for block in range(number):
            name = f"layer{stage}.{block}"
            sizes = (1, 3, 1) if net.bottleneck else (3, 3)
            widths = (before, width, width, outputs) if net.bottleneck else (before, width, width)
            for i, size in enumerate(sizes):
                entries |= conv(f"{name}.conv{i + 1}", widths[i + 1], widths[i], size)
                entries |= norm(f"{name}.bn{i + 1}", widths[i + 1])
            if block == 0 and (stage > 1 or before != outputs):
                entries |= conv(f"{name}.{net.shortcut}.0", outputs, before, 1)
                entries |= norm(f"{name}.{net.shortcut}.1", outputs)
            before = outputs
    return entries | linear(net.head, num_classes, before)


def residual_forward(net: Residual, weights: Pass, images: Tensor) -> Result:
    x = weights.unit(images, "conv1", "bn1").relu()
    feats, preact_feats = [x], [x]
    strided = 2 if net.bottleneck else 1  # the 3x3 convolution of a bottleneck, the first one of a basic block
    for stage, number in enumerate(net.blocks, start=1):
        for block in range(number):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 and stage > 1 else 1
            inner = x
            for i in (1, 2, 3) if net.bottleneck else (1, 2):
                inner = inner.relu()  # of an activation for i = 1: nothing
                inner = weights.unit(inner, f"{name}.conv{i}", f"{name}.bn{i}", stride if i == strided else 1)
            if f"{name}.{net.shortcut}.0.weight" in weights.weights:
                x = weights.unit(x, f"{name}.{net.shortcut}.0", f"{name}.{net.shortcut}.1", stride)
            before = inner + x
            x = before.relu()
        feats.append(x)
        preact_feats.append(before)
    mean = pooled(x)
    return Result(weights.linear(mean, net.head), feats, preact_feats, mean)


# --- wide ResNets: three stages of pre-activation blocks -------------------------------------------------------------


def wrn_entries(blocks: int, width: int, num_classes: int) -> Shapes:
    entries = conv("conv1", 16, 3, 3)
    before = 16
    for stage, outputs in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range(blocks):
            name = f"block{stage}.layer.{block}"
            entries |= norm(f"{name}.bn1", before) | conv(f"{name}.conv1", outputs, before, 3)
            entries |= norm(f"{name}.bn2", outputs) | conv(f"{name}.conv2", outputs, outputs, 3)
            if before != outputs:
                entries |= conv(f"{name}.convShortcut", outputs, before, 1)
            before = outputs
    return entries | norm("bn1", before) | linear("fc", num_classes, before)


def wrn_forward(blocks: int, net: Pass, images: Tensor) -> Result:
    x = net.conv(images, "conv1")
    feats, preact_feats = [x], [x]
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            before = net.norm(x, f"{name}.bn1")
            if stage > 1 and block == 0:
                preact_feats.append(before)
            activation = before.relu()
            inner = net.conv(net.unit(activation, f"{name}.conv1", f"{name}.bn2", stride).relu(), f"{name}.conv2")
            shortcut = f"{name}.convShortcut"
            x = inner + (net.conv(activation, shortcut, stride) if f"{shortcut}.weight" in net.weights else x)
        feats.append(x)
    preact_feats.append(net.norm(x, "bn1"))
    mean = pooled(preact_feats[-1].relu())
    return Result(net.linear(mean, "fc"), feats, preact_feats, mean)


# --- VGG: five blocks, pooled in between; the fourth for images of height 64 alone -----------------------------------


def vgg_entries(convolutions: tuple[int, ...], num_classes: int) -> Shapes:
    entries: Shapes = {}
    before = 3
    for block, (width, number) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        for i in range(number):  # places 2, 5, ... are those of the ReLUs
            name = f"block{block}.{3 * i}"
            entries |= conv(name, width, before, 3) | {f"{name}.bias": (width,)}
            entries |= norm(f"block{block}.{3 * i + 1}", width)
            before = width
    return entries | linear("classifier", num_classes, 512)


def vgg_forward(convolutions: tuple[int, ...], net: Pass, images: Tensor) -> Result:
    x = images
    feats: list[Tensor] = []
    preact_feats: list[Tensor] = []
    for block, number in enumerate(convolutions):
        if block in (1, 2, 3) or (block == 4 and images.shape[2] == 64):
            x = F.max_pool2d(x, kernel_size=2, stride=2)
        for i in range(number):
            before = net.unit(x, f"block{block}.{3 * i}", f"block{block}.{3 * i + 1}")
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


def mobilenet_v2_entries(num_classes: int) -> Shapes:
    entries = conv("conv1.0", 16, 3, 3) | norm("conv1.1", 16)
    before = 16
    for stage, (expansion, width, repeats, _) in MOBILENET_V2.items():
        for block in range(repeats):
            name, inner = f"blocks.{stage}.{block}.conv", expansion * before
            entries |= conv(f"{name}.0", inner, before, 1) | norm(f"{name}.1", inner)
            entries |= conv(f"{name}.3", inner, inner, 3, groups=inner) | norm(f"{name}.4", inner)
            entries |= conv(f"{name}.6", width, inner, 1) | norm(f"{name}.7", width)
            before = width
    entries |= conv("conv2.0", 1280, 160, 1) | norm("conv2.1", 1280)
    return entries | linear("classifier.0", num_classes, 1280)


def mobilenet_v2_forward(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1.0", "conv1.1", 2).relu()
    feats = [x]
    for stage, (_, _, repeats, stage_stride) in MOBILENET_V2.items():
        for block in range(repeats):
            name, stride = f"blocks.{stage}.{block}.conv", stage_stride if block == 0 else 1
            inner = net.unit(x, f"{name}.0", f"{name}.1").relu()
            inner = net.unit(inner, f"{name}.3", f"{name}.4", stride).relu()
            inner = net.unit(inner, f"{name}.6", f"{name}.7")
            x = inner + x if stride == 1 and inner.shape[1] == x.shape[1] else inner
        if stage in (1, 2, 4, 6):
            feats.append(x)
    mean = pooled(net.unit(x, "conv2.0", "conv2.1").relu())
    return Result(net.linear(mean, "classifier.0"), feats, None, mean)


# --- MobileNetV1: depthwise separable convolutions -------------------------------------------------------------------

# layer: (channels, stride), the paper's table 1 with stride 1 in the last layer
MOBILENET_V1 = dict(
    enumerate(
        [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)], start=1
    )
)


def mobilenet_v1_entries(num_classes: int) -> Shapes:
    entries = conv("model.0.0", 32, 3, 3) | norm("model.0.1", 32)
    before = 32
    for layer, (width, _) in MOBILENET_V1.items():
        name = f"model.{layer}"
        entries |= conv(f"{name}.0", before, before, 3, groups=before) | norm(f"{name}.1", before)
        entries |= conv(f"{name}.3", width, before, 1) | norm(f"{name}.4", width)
        before = width
    return entries | linear("fc", num_classes, 1024)


def mobilenet_v1_forward(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "model.0.0", "model.0.1", 2).relu()
    feats: list[Tensor] = []
    preact_feats: list[Tensor] = []
    for layer, (_, stride) in MOBILENET_V1.items():
        name = f"model.{layer}"
        x = net.unit(x, f"{name}.0", f"{name}.1", stride).relu()
        before = net.unit(x, f"{name}.3", f"{name}.4")
        x = before.relu()
        if layer in (3, 5, 11, 13):
            feats.append(x)
            preact_feats.append(before)
    mean = pooled(x)
    return Result(net.linear(mean, "fc"), feats, preact_feats, mean)


# --- ShuffleNetV1, three groups --------------------------------------------------------------------------------------

SHUFFLE_V1 = {1: (240, 4), 2: (480, 8), 3: (960, 4)}  # stage: (channels, units)


def shuffle_v1_entries(num_classes: int) -> Shapes:
    entries = conv("conv1", 24, 3, 1) | norm("bn1", 24)
    before = 24
    for stage, (width, units) in SHUFFLE_V1.items():
        for unit in range(units):
            name = f"layer{stage}.{unit}"
            outputs = width - before if unit == 0 else width  # the first puts the pooled input beside
            inner = outputs // 4
            entries |= conv(f"{name}.conv1", inner, before, 1, groups=1 if before == 24 else 3)
            entries |= norm(f"{name}.bn1", inner)
            entries |= conv(f"{name}.conv2", inner, inner, 3, groups=inner) | norm(f"{name}.bn2", inner)
            entries |= conv(f"{name}.conv3", outputs, inner, 1, groups=3) | norm(f"{name}.bn3", outputs)
            before = width
    return entries | linear("linear", num_classes, 960)


def shuffle_v1_forward(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1", "bn1").relu()
    feats, preact_feats = [x], [x]
    for stage, (_, units) in SHUFFLE_V1.items():
        for unit in range(units):
            name = f"layer{stage}.{unit}"
            inner = net.unit(x, f"{name}.conv1", f"{name}.bn1").relu()
            if name != "layer1.0":  # its first convolution has one group
                inner = shuffled(inner, 3)
            inner = net.unit(inner, f"{name}.conv2", f"{name}.bn2", 2 if unit == 0 else 1).relu()
            inner = net.unit(inner, f"{name}.conv3", f"{name}.bn3")
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


def shuffle_v2_entries(num_classes: int) -> Shapes:
    entries = conv("conv1", 24, 3, 1) | norm("bn1", 24)
    before = 24
    for stage, (width, units) in SHUFFLE_V2.items():
        name, half = f"layer{stage}.0", width // 2
        entries |= conv(f"{name}.conv1", before, before, 3, groups=before) | norm(f"{name}.bn1", before)
        entries |= conv(f"{name}.conv2", half, before, 1) | norm(f"{name}.bn2", half)
        entries |= conv(f"{name}.conv3", half, before, 1) | norm(f"{name}.bn3", half)
        entries |= conv(f"{name}.conv4", half, half, 3, groups=half) | norm(f"{name}.bn4", half)
        entries |= conv(f"{name}.conv5", half, half, 1) | norm(f"{name}.bn5", half)
        for unit in range(1, units + 1):
            name = f"layer{stage}.{unit}"
            entries |= conv(f"{name}.conv1", half, half, 1) | norm(f"{name}.bn1", half)
            entries |= conv(f"{name}.conv2", half, half, 3, groups=half) | norm(f"{name}.bn2", half)
            entries |= conv(f"{name}.conv3", half, half, 1) | norm(f"{name}.bn3", half)
        before = width
    entries |= conv("conv2", 1024, 464, 1) | norm("bn2", 1024)
    return entries | linear("linear", num_classes, 1024)


def shuffle_v2_forward(net: Pass, images: Tensor) -> Result:
    x = net.unit(images, "conv1", "bn1").relu()
    feats, preact_feats = [x], [x]
    for stage, (width, units) in SHUFFLE_V2.items():
        name, half = f"layer{stage}.0", width // 2
        left = net.unit(x, f"{name}.conv1", f"{name}.bn1", 2)
        left = net.unit(left, f"{name}.conv2", f"{name}.bn2").relu()
        right = net.unit(x, f"{name}.conv3", f"{name}.bn3").relu()
        right = net.unit(right, f"{name}.conv4", f"{name}.bn4", 2)
        right = net.unit(right, f"{name}.conv5", f"{name}.bn5").relu()
        x = shuffled(torch.cat([left, right], 1), 2)
        for unit in range(1, units + 1):
            name = f"layer{stage}.{unit}"
            left, right = x[:, :half], x[:, half:]
            right = net.unit(right, f"{name}.conv1", f"{name}.bn1").relu()
            right = net.unit(right, f"{name}.conv2", f"{name}.bn2")
            right = net.unit(right, f"{name}.conv3", f"{name}.bn3")
            before = torch.cat([left, right], 1)
            x = shuffled(torch.cat([left, right.relu()], 1), 2)
        feats.append(x)
        preact_feats.append(before)
    mean = pooled(net.unit(x, "conv2", "bn2").relu())
    return Result(net.linear(mean, "linear"), feats, preact_feats, mean)


# --- all of them -----------------------------------------------------------------------------------------------------


def _residual(net: Residual) -> Published:
    return Published(partial(residual_entries, net), partial(residual_forward, net))


def _resnet(blocks: int, *channels: int) -> Published:
    return _residual(Residual(channels, (blocks,) * 3, bottleneck=False, shortcut="downsample", head="fc"))


def _four_stage(*blocks: int, bottleneck: bool) -> Published:
    return _residual(Residual((64, 64, 128, 256, 512), blocks, bottleneck, shortcut="shortcut", head="linear"))


def _wrn(blocks: int, width: int) -> Published:
    return Published(partial(wrn_entries, blocks, width), partial(wrn_forward, blocks))


def _vgg(*convolutions: int) -> Published:
    return Published(partial(vgg_entries, convolutions), partial(vgg_forward, convolutions))


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
    "MobileNetV1": Published(mobilenet_v1_entries, mobilenet_v1_forward),
    "MobileNetV2": Published(mobilenet_v2_entries, mobilenet_v2_forward),
    "ShuffleV1": Published(shuffle_v1_entries, shuffle_v1_forward),
    "ShuffleV2": Published(shuffle_v2_entries, shuffle_v2_forward),
}
