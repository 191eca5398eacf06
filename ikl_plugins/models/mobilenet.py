"""The MobileNets of the distillation literature: ``MobileNetV2`` at half width for CIFAR, ``MobileNetV1`` for ImageNet.

Modules carry the names of the mdistiller zoo: the weights under the key 'model' of its checkpoints load strictly.

Where the zoo's MobileNetV2 departs from the paper, it does so here: ReLU in place of ReLU6, stride 1 in the second
stage, and a 1x1 convolution in front of the first block's depthwise one although it expands nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._network import Features, Network, PlainFeatures, global_average, initialise_he

__all__ = ["MobileNetV1", "MobileNetV2"]

# of MobileNetV2's stages: expansion, channels at full width, blocks, stride of the first
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_V2_FEATURES = (1, 2, 4, 6)  # the stages behind which the zoo takes features

# of MobileNetV1's depthwise separable convolutions: channels, stride
_V1_LAYERS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
_V1_FEATURES = (3, 5, 11, 13)  # the last layers of a resolution, counted with the first convolution


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 convolution, added to the input where the shapes allow it."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_convolution(in_channels, inner, 1),
            *_convolution(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(Network):
    """MobileNetV2 with half of the paper's channels, for CIFAR; 812,836 parameters for 100 classes.

    The last convolution keeps its 1280 channels. A stride of 2 in the first one leaves 16x16 maps of a 32x32 image.
    Names: ``conv1.{0,1}``, ``blocks.s.i.conv.{0,1,3,4,6,7}``, ``conv2.{0,1}``, ``classifier.0``. The CRD zoo calls the
    network ``mobile_half``.

    Args:
        num_classes: number of logits, an integer of at least 1.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity, the linear
        layer from a normal distribution of deviation 0.01 and bias 0.

    References:
        Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, table 2; Tian et al.,
        Contrastive Representation Distillation, ICLR 2020.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import MobileNetV2
        >>> model = MobileNetV2(num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)]
    """

    head_name = "classifier"

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(num_classes)
        self.conv1 = nn.Sequential(*_convolution(3, 16, 3, stride=2))
        self.blocks = nn.Sequential()
        before = 16
        for expansion, full_channels, blocks, stride in _V2_STAGES:
            channels = full_channels // 2
            first = InvertedResidual(before, channels, expansion, stride)
            others = (InvertedResidual(channels, channels, expansion, 1) for _ in range(blocks - 1))
            self.blocks.append(nn.Sequential(first, *others))
            before = channels
        self.conv2 = nn.Sequential(*_convolution(before, 1280, 1))
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        initialise_he(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def last_maps(self, images: Tensor) -> Tensor:
        x: Tensor = self.conv2(self.blocks(self.conv1(images)))
        return x

    def forward_features(self, images: Tensor) -> PlainFeatures:
        """The outputs of the stem and of stages 1, 2, 4 and 6, counted from 0; see :meth:`Network.forward_features`.

        No activation ends a stage: as in the zoo there is no 'preact_feats'.
        """
        self.check(images)
        x = self.conv1(images)
        feats = [x]
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in _V2_FEATURES:
                feats.append(x)
        return PlainFeatures(feats=feats, pooled_feat=global_average(self.conv2(x)))


class MobileNetV1(Network):
    """MobileNetV1 at full width, for ImageNet; 4,231,976 parameters for 1000 classes.

    Names: ``model.0.{0,1}``, ``model.i.{0,1,3,4}`` for i = 1 to 13, ``fc``. The zoo's network has 1000 classes and is
    for 224x224 images alone; both are free here.

    Args:
        num_classes: number of logits, an integer of at least 1.

    Note:
        All layers start from torch's defaults, as in the zoo.

    References:
        Howard et al., MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications,
        arXiv:1704.04861, table 1, with stride 1 in the last layer: the table's 2 does not fit its own sizes.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import MobileNetV1
        >>> model = MobileNetV1(num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 64, 64))["feats"]]
        [(128, 16, 16), (256, 8, 8), (512, 4, 4), (1024, 2, 2)]
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.model = nn.Sequential(nn.Sequential(*_convolution(3, 32, 3, stride=2)))
        before = 32
        for channels, stride in _V1_LAYERS:
            depthwise = _convolution(before, before, 3, stride, groups=before)
            self.model.append(nn.Sequential(*depthwise, *_convolution(before, channels, 1)))
            before = channels
        self.fc = nn.Linear(before, num_classes)

    def last_maps(self, images: Tensor) -> Tensor:
        x: Tensor = self.model(images)
        return x

    def forward_features(self, images: Tensor) -> Features:
        """The outputs of layers 3, 5, 11 and 13, the last at 1/4, 1/8, 1/16 and 1/32 of the image's size.

        See :meth:`Network.forward_features`; the stem has no entry.
        """
        self.check(images)
        x = images
        feats, preact_feats = [], []
        for index, layer in enumerate(self.model):
            if index not in _V1_FEATURES:
                x = layer(x)
                continue
            for module in list(layer.children())[:-1]:
                x = module(x)
            preact_feats.append(x)
            x = F.relu(x)
            feats.append(x)
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(x))


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """A convolution that keeps the size up to its stride, its batch normalisation and its ReLU."""
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
