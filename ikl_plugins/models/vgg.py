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

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check
from ._network import Features, Network, check_images, global_average, initialise_he

__all__ = ["vgg8", "vgg11", "vgg13", "vgg16", "vgg19"]

_CHANNELS = (64, 128, 256, 512, 512)


class VGG(Network):
    """A CIFAR VGG network; the functions of this module build the named ones.

    Args:
        convolutions: their number in each of the five blocks.
        num_classes: number of logits.
        name: what error messages call the network.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``num_classes`` is below 1.

    Note:
        Convolutions start from He's normal initialisation (fan out), batch normalisation from the identity, the linear
        layer from a normal distribution of deviation 0.01; all biases from 0.

        A block ends with a batch normalisation: its ReLU is applied outside, so that a hook on ``block1`` sees the
        features before the activation.

    References:
        Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, table 1;
        Tian et al., Contrastive Representation Distillation, ICLR 2020, for the family as the distillation literature
        uses it.

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
        super().__init__()
        check.check_num_classes(name, num_classes)
        self.name = name
        before = (3, *_CHANNELS)
        self.block0 = _block(before[0], _CHANNELS[0], convolutions[0])
        self.block1 = _block(before[1], _CHANNELS[1], convolutions[1])
        self.block2 = _block(before[2], _CHANNELS[2], convolutions[2])
        self.block3 = _block(before[3], _CHANNELS[3], convolutions[3])
        self.block4 = _block(before[4], _CHANNELS[4], convolutions[4])
        self.classifier = nn.Linear(_CHANNELS[4], num_classes)
        initialise_he(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def last_maps(self, images: Tensor) -> Tensor:
        x = images
        for block, halved in self._blocks(images):
            x = F.relu(block(F.max_pool2d(x, 2) if halved else x))
        return x

    def forward_features(self, images: Tensor) -> Features:
        """The intermediate features of a batch; ``classifier(features["pooled_feat"])`` are :meth:`forward`'s logits.

        Args:
            images: as in :meth:`forward`.

        Returns:
            'feats': the outputs of the five blocks after their ReLU; 'preact_feats': the same before it (the first
            block's is after it, as in the zoo); 'pooled_feat': (N, 512), what ``classifier`` sees.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self.check(images)
        x = images
        feats: list[Tensor] = []
        preact_feats: list[Tensor] = []
        for block, halved in self._blocks(images):
            preactivation = block(F.max_pool2d(x, 2) if halved else x)
            x = F.relu(preactivation)
            preact_feats.append(preactivation if feats else x)
            feats.append(x)
        return Features(feats=feats, preact_feats=preact_feats, pooled_feat=global_average(x))

    def check(self, images: Tensor) -> None:
        super().check(images)
        check_images(self.name, images, smallest=2 ** sum(halved for _, halved in self._blocks(images)))

    def _blocks(self, images: Tensor) -> list[tuple[nn.Sequential, bool]]:
        """Each block, and whether max-pooling halves its input."""
        return [
            (self.block0, False),
            (self.block1, True),
            (self.block2, True),
            (self.block3, True),
            (self.block4, images.shape[2] == 64),
        ]


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
