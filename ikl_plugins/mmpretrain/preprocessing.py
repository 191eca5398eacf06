"""Two views of an image in one batch, for a robust loss on both, and the augmentations of the authors' second view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from mmcv.transforms import BaseTransform
from mmpretrain.models import ClsDataPreprocessor
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from .. import _validation as check
from .generated import CHANNEL_ORDERS

__all__ = ["CIFAR10AutoAugment", "ClippedCutout", "TwoViewDataPreprocessor"]

_GREY = (128, 128, 128)


class TwoViewDataPreprocessor(ClsDataPreprocessor):  # type: ignore[misc]
    """MMPretrain's ``ClsDataPreprocessor`` for the two views that ``MultiView`` makes of every training image.

    Both views go through the same colour conversion, normalisation and padding; the model gets them as a list, the
    basic view first. A batch of single images, as in validation, passes as it does through the parent.

    Args:
        **kwargs: those of ``ClsDataPreprocessor``; batch augmentations, which mix images, are refused.

    Raises:
        ValueError: batch augmentations, or another number of views than two.

    Example:
        In a config::

            train_pipeline = [
                dict(type='LoadImageFromFile'),
                dict(type='MultiView', num_views=[1, 1], transforms=[basic_view, augmented_view]),
                dict(type='PackInputs'),
            ]
            data_preprocessor = dict(type='TwoViewDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.batch_augments is not None:
            raise ValueError(
                "TwoViewDataPreprocessor: `batch_augments` must be None. Remove `train_cfg: augments` from the model."
            )

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """A collated batch of one or two views: 'inputs' become a tensor (N, C, H, W), or a list of two."""
        inputs = data["inputs"]
        if not _has_views(inputs):
            return super().forward(data, training)  # type: ignore[no-any-return]
        if len(inputs) != 2:
            raise ValueError(
                f"TwoViewDataPreprocessor: `inputs` must hold two views of each image, got {len(inputs)}. "
                f"Set num_views=[1, 1]."
            )
        # Padding depends on all images of a batch, so both views are prepared as one.
        merged = torch.cat(list(inputs)) if isinstance(inputs[0], Tensor) else [*inputs[0], *inputs[1]]
        prepared = super().forward({**data, "inputs": merged}, training)
        return {**prepared, "inputs": list(prepared["inputs"].chunk(2))}


def _has_views(inputs: Any) -> bool:
    """Whether collated inputs are views, each a batch of its own. Single images are one tensor, or a list of them."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        return False
    return not isinstance(inputs[0], Tensor) or inputs[0].dim() == 4


class CIFAR10AutoAugment(BaseTransform):  # type: ignore[misc]
    """AutoAugment's policy for CIFAR-10 as the authors' second view has it, to the byte.

    One of 25 pairs of operations is drawn, and each of the two runs with its probability. At level L, from 0 to 9:
    shear 0.3 L / 9, bicubic; translation 150 / 331 L / 9 of the side; rotation 30 L / 9 degrees, always
    counterclockwise; brightness, colour, contrast and sharpness times 1 +- 0.1 L; Solarize from the value
    256 - 256 L / 9 up; Posterize to 8 - 4 L / 9 bits. Shears and translations go either way. What comes in from outside
    is grey, 128 in each channel.

    Args:
        channel_order: that of the images: ``'rgb'`` from MMPretrain's ``CIFAR10`` and ``CIFAR100``, ``'bgr'`` from
            ``LoadImageFromFile``.

    Raises:
        ValueError: another channel order.

    Note:
        MMPretrain's own operations filter shears and sharpness otherwise than Pillow, count angles clockwise, and fill
        one channel alone unless ``pad_val`` is a list; torchvision's policy rotates both ways.

    References:
        Cubuk et al., AutoAugment: Learning Augmentation Strategies from Data, CVPR 2019.
    """

    def __init__(self, channel_order: str = "rgb") -> None:
        if channel_order not in CHANNEL_ORDERS:
            caller = type(self).__name__
            raise ValueError(check.unknown_name_message(caller, "`channel_order`", str(channel_order), CHANNEL_ORDERS))
        self.step = 1 if channel_order == "rgb" else -1
        self.policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Augments ``img``, uint8 of shape (H, W, 3)."""
        image = Image.fromarray(numpy.ascontiguousarray(results["img"][..., :: self.step]))
        for name, probability, level in self.policies[numpy.random.randint(len(self.policies))]:
            if numpy.random.rand() < probability:
                image = _OPERATIONS[name](image, level or 0, int(numpy.random.choice((-1, 1))))
        results["img"] = numpy.ascontiguousarray(numpy.array(image)[..., :: self.step])  # a copy of our own
        return results


def _enhance(kind: Any) -> Any:
    return lambda image, level, sign: kind(image).enhance(1 + sign * 0.1 * level)


def _affine(position: int, top: float, resample: Image.Resampling, size: int | None = None) -> Any:
    """Output (x, y) is input (a x + b y + c, d x + e y + f); the coefficient at ``position`` grows to ``top``."""

    def operation(image: Image.Image, level: int, sign: int) -> Image.Image:
        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        matrix[position] = sign * top / 9 * level * (1 if size is None else image.size[size])
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_GREY)

    return operation


_OPERATIONS = {
    "ShearY": _affine(3, 0.3, Image.Resampling.BICUBIC),
    "TranslateX": _affine(2, 150 / 331, Image.Resampling.NEAREST, 0),
    "TranslateY": _affine(5, 150 / 331, Image.Resampling.NEAREST, 1),
    "Rotate": lambda image, level, sign: image.rotate(30 / 9 * level, fillcolor=_GREY),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "Solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - 256 / 9 * level),
    "Posterize": lambda image, level, sign: ImageOps.posterize(image, round(8 - 4 / 9 * level)),
    "AutoContrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, sign: ImageOps.equalize(image),
    "Invert": lambda image, level, sign: ImageOps.invert(image),
}


class ClippedCutout(BaseTransform):  # type: ignore[misc]
    """A black square around a random pixel, clipped at the edges of the image, as the authors' Cutout is.

    MMPretrain's ``Cutout`` moves it inside at the upper and the left edge: of 32x32 images it hides 228 pixels on
    average, this one 196.

    Args:
        size: side of the square, an even number of pixels.

    Raises:
        TypeError: ``size`` is no integer.
        ValueError: ``size`` is below 1.

    References:
        DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
    """

    def __init__(self, size: int = 16) -> None:
        check.check_integer(type(self).__name__, "size", size, "Use 16, as published.")
        self.reach = size // 2

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Blackens a part of ``img``, shape (H, W, C)."""
        image = results["img"].copy()
        centre = [numpy.random.randint(side) for side in image.shape[:2]]
        rows, columns = (slice(max(0, at - self.reach), at + self.reach) for at in centre)
        image[rows, columns] = 0
        results["img"] = image
        return results
