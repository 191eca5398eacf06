"""Between what a data preprocessor hands to the network and pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .. import _validation as check

__all__ = ["PixelSpace"]

_CALLER = "PixelSpace"
_ROUNDING = 1e-4  # what normalising and undoing it in float32 may move a pixel, with room to spare
_COLOURS = 3  # preprocessors turn BGR into RGB for images with so many channels


class PixelSpace:
    """Undoes and redoes the normalisation of a data preprocessor.

    ``to_pixels(inputs) = (inputs * std + mean) / pixel_range`` and ``to_inputs`` is its inverse. Channels keep the
    order in which the network sees them.

    Args:
        data_preprocessor: MMPretrain's ``ClsDataPreprocessor``, MMEngine's ``ImgDataPreprocessor``, or any module with
            their attributes ``_enable_normalize`` and, if that is True, ``mean`` and ``std``. They are read now.
        pixel_range: the value of white in the images of the data set, above 0.

    Raises:
        TypeError: ``pixel_range`` is not a number.
        ValueError: a preprocessor without these attributes, or a setting out of range.

    Example:
        >>> import torch
        >>> from mmpretrain.models import ClsDataPreprocessor
        >>> from ikl_plugins.mmpretrain import PixelSpace
        >>> space = PixelSpace(ClsDataPreprocessor(mean=[51.0], std=[51.0]))
        >>> space.to_pixels(torch.tensor([[[[-1.0, 4.0]]]]))  # black and white
        tensor([[[[0., 1.]]]])
    """

    def __init__(self, data_preprocessor: nn.Module, pixel_range: float = 255.0) -> None:
        check.check_number(_CALLER, "pixel_range", pixel_range, positive=True)
        self.pixel_range = pixel_range
        self.mean, self.std, self.flips_channels = _settings(data_preprocessor)
        self._to_pixels = _Affine(self.std / pixel_range, self.mean / pixel_range)
        self._to_inputs = _Affine(pixel_range / self.std, -self.mean / self.std)

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Pixels of a batch.

        Args:
            inputs: what the data preprocessor hands on, shape (N, C, H, W), floating.

        Returns:
            Same shape, in [0, 1]; values outside by no more than rounding are clamped.

        Raises:
            TypeError: ``inputs`` is not a floating tensor.
            ValueError: these are no images with values in [0, ``pixel_range``] (the message says what may be wrong).
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(
                f"{_CALLER}: `inputs` must be a floating tensor, got {kind}. Pass what the data preprocessor hands on."
            )
        pixels = self._to_pixels(inputs)
        if pixels.numel() == 0:
            return pixels
        tolerance = max(_ROUNDING, 2 * torch.finfo(inputs.dtype).eps)
        low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()
        if not (low >= -tolerance and high <= 1 + tolerance):
            raise ValueError(
                f"{_CALLER}: images must lie in [0, {self.pixel_range:g}] before `data_preprocessor` normalises them, "
                f"but undoing its mean and std gives values from {low * self.pixel_range:.4g} to "
                f"{high * self.pixel_range:.4g}. Either they are normalised twice: drop `Normalize` from the pipeline "
                f"and let mean and std of `data_preprocessor` do it; or `pixel_range` is not the value of white, or "
                f"its `pad_value` no pixel."
            )
        # A data set with images in [0, 1] would make a perturbation of 8/255 vanish; a batch of black ones is fine.
        if self.pixel_range == 255.0 and tolerance < high <= (1 + tolerance) / self.pixel_range:
            raise ValueError(
                f"{_CALLER}: images must reach up to `pixel_range` = {self.pixel_range:g}, but the largest value of "
                f"this batch is {high * self.pixel_range:.4g}: it seems to hold images in [0, 1]. Set pixel_range=1.0."
            )
        return pixels.clamp(0, 1)

    def to_inputs(self, pixels: Tensor) -> Tensor:
        """What the network expects, from pixels in [0, 1]: one multiply-add, unchecked, differentiable.

        Args:
            pixels: shape (N, C, H, W), floating.

        Returns:
            Same shape.
        """
        return self._to_inputs(pixels)

    def conversion_to(self, other: PixelSpace) -> Callable[[Tensor], Tensor] | None:
        """From inputs of this preprocessor to those that another one would have made of the same images.

        Args:
            other: the other preprocessor's space.

        Returns:
            A function of one tensor, one multiply-add and a channel flip where one preprocessor alone flips; None if
            both make the same inputs.
        """
        flip = self.flips_channels != other.flips_channels
        same = bool((self.mean == other.mean).all()) and bool((self.std == other.std).all())
        if same and not flip:
            return None
        return _Conversion(self, other, flip)


class _Affine:
    """``x * scale + shift`` per channel, with a copy of both for every device and dtype."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self._exact = scale, shift
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = x.device, x.dtype
        if key not in self._copies:
            # A tensor made in inference mode could not take part in training afterwards.
            with torch.inference_mode(False):
                scale, shift = (part.to(x.device, x.dtype) for part in self._exact)
            self._copies[key] = scale, shift
        scale, shift = self._copies[key]
        return torch.addcmul(shift, x, scale)


class _Conversion:
    """From the inputs of one preprocessor to those of another."""

    def __init__(self, source: PixelSpace, target: PixelSpace, flip: bool) -> None:
        self._flip = flip
        self._plain = _Affine(source.std / target.std, (source.mean - target.mean) / target.std)
        mean, std = (part.flip(0) for part in (source.mean, source.std))
        self._flipped = _Affine(std / target.std, (mean - target.mean) / target.std)

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._flip and inputs.shape[1] == _COLOURS:
            return self._flipped(inputs.flip(1))
        return self._plain(inputs)


def _settings(preprocessor: nn.Module) -> tuple[Tensor, Tensor, bool]:
    """Mean and std, of shape (C, 1, 1) or (1, 1, 1) in float64, and whether the channels are flipped."""
    normalises = getattr(preprocessor, "_enable_normalize", None)
    if not isinstance(normalises, bool) or (
        normalises and not all(isinstance(getattr(preprocessor, part, None), Tensor) for part in ("mean", "std"))
    ):
        raise ValueError(
            f"{_CALLER}: `data_preprocessor` must have `_enable_normalize` and, if that is True, the buffers `mean` "
            f"and `std`, got {type(preprocessor).__name__} without. Use ClsDataPreprocessor or a subclass."
        )
    flips = bool(getattr(preprocessor, "to_rgb", False) or getattr(preprocessor, "_channel_conversion", False))
    if not normalises:
        return torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64), flips
    mean, std = (
        cast(Tensor, getattr(preprocessor, part)).detach().to("cpu", torch.float64).reshape(-1, 1, 1)
        for part in ("mean", "std")
    )
    if not (bool((std > 0).all()) and bool(torch.isfinite(torch.cat([mean, std])).all())):
        raise ValueError(
            f"{_CALLER}: `data_preprocessor` must have finite means and stds above 0, got mean="
            f"{mean.flatten().tolist()} and std={std.flatten().tolist()}. Correct its settings."
        )
    return mean, std, flips
