"""The CIFAR VGG networks of the distillation literature: five blocks of 3x3 convolutions, all with batch normalisation.

The blocks have 64, 128, 256, 512 and 512 channels; ``vgg8`` has one convolution in each, ``vgg13`` two. Convolutions
keep their biases, although a normalisation follows. One linear layer on the means of the last maps stands for the three
of ImageNet's networks.

Max-pooling halves the maps after the first three blocks alone, so that 32x32 images reach the last two at 4x4. Images
of height 64 are halved after the fourth block as well, images of any other height are not: the zoo decides by the
height, and so does this module.

Modules carry the names of the mdistiller zoo (``block{0,1,2,3,4}.j`` with j = 0, 3, ... for a convolution and j + 1 for
its normalisation, ``classifier``): the weights under the key 'model' of its checkpoints load strictly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ._network import Features, Network, global_average, initialise_he

__all__ = ["vgg8", "vgg11", "vgg13", "vgg16", "vgg19"]

_CHANNELS = (64, 128, 256, 512, 512)


class VGG(Network):
    """A CIFAR VGG network; the functions of this module build the named ones.

    Args:
        convolutions: their number in each of the five blocks.
        num_classes: number of logits, an integer of at least 1.
        name: what error messages call the network.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity, the linear
        layer from a normal distribution of deviation 0.01; all biases from 0.

        A block ends with a batch normalisation: its ReLU is applied outside, so that a hook on ``block1`` sees the
        features before the activation.

    References:
        Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, table 1;
        Tian et al., Contrastive Representation Distillation, ICLR 2020.

    Example:
        >>> import torch
        >>> from ikl_plugins.models import vgg8
        >>> model = vgg8(num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> [tuple(map.shape[1:]) for map in model.forward_features(torch.zeros(2, 3, 32, 32))["feats"]]
        [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]
    """

    head_name = "classifier"

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int, *, name: str = "VGG") -> None:
        super().__init__(num_classes, name)
        before = 3
        for index, (channels, number) in enumerate(zip(_CHANNELS, convolutions, strict=True)):
            self.add_module(f"block{index}", _block(before, channels, number))
            before = channels
        self.classifier = nn.Linear(before, num_classes)
        initialise_he(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def last_maps(self, images: Tensor) -> Tensor:
        x = images
        for _, output in self._outputs(images):
            x = output
        return x

    def forward_features(self, images: Tensor) -> Features:
        """The outputs of the five blocks after their ReLU; see :meth:`Network.forward_features`.

        'preact_feats' are the same before it, but for the first block's, as in the zoo.
        """
        self.check(images)
        preact_feats, feats = map(list, zip(*self._outputs(images), strict=True))
        preact_feats[0] = feats[0]
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(feats[-1]))

    def smallest(self, images: Tensor) -> int:
        return 16 if images.shape[2] == 64 else 8

    def _outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The output of each block before and after its ReLU."""
        x = images
        for index, halved in enumerate((False, True, True, True, images.shape[2] == 64)):
            preactivation = self.get_submodule(f"block{index}")(F.max_pool2d(x, 2) if halved else x)
            x = F.relu(preactivation)
            yield preactivation, x


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers[:-1])  # the last ReLU is applied outside


def vgg8(num_classes: int = 100) -> VGG:
    """One convolution a block; 3,965,028 parameters for 100 classes."""
    return VGG((1, 1, 1, 1, 1), num_classes, name="vgg8")


def vgg11(num_classes: int = 100) -> VGG:
    """1, 1, 2, 2, 2 convolutions; 9,277,284 parameters for 100 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes, name="vgg11")


def vgg13(num_classes: int = 100) -> VGG:
    """Two convolutions a block; 9,462,180 parameters for 100 classes."""
    return VGG((2, 2, 2, 2, 2), num_classes, name="vgg13")


def vgg16(num_classes: int = 100) -> VGG:
    """2, 2, 3, 3, 3 convolutions; 14,774,436 parameters for 100 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes, name="vgg16")


def vgg19(num_classes: int = 100) -> VGG:
    """2, 2, 4, 4, 4 convolutions; 20,086,692 parameters for 100 classes."""
    return VGG((2, 2, 4, 4, 4), num_classes, name="vgg19")
