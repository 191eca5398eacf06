"""The one conversion between what a network takes and pixels in [0, 1]; adapters read their host's settings into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import _validation as check
from .._value_checks import check_values

__all__ = ["PixelSpace"]

_COLOURS = 3  # hosts reverse the channels of images with so many


class PixelSpace:
    """Undoes and redoes a normalisation: ``to_pixels(inputs) = (inputs * std + mean) / white``, and its inverse.

    Args:
        mean: what the normalisation subtracts, one number for each channel or one for all; None, together with ``std``,
            for none.
        std: what it divides by, above 0.
        white: the value of a white pixel before the normalisation, 1 or 255 as a rule; ``mean`` and ``std`` are in its
            units.
        flips_channels: whether it also reverses the data set's order of channels (BGR to RGB or back). Pixels keep the
            order in which the network sees them; only :meth:`conversion_to` needs to know.
        tolerance: by how much pixels may leave [0, 1] from rounding; at least that of the inputs' dtype is granted.
        caller: how errors call the adapter.
        way_out: the last sentence of an error about values: which settings of the host to correct.

    Raises:
        TypeError: numbers that are none.
        ValueError: one of ``mean`` and ``std`` alone, of two lengths, or out of range.

    Example:
        >>> import torch
        >>> from ikl_plugins.adversarial import PixelSpace
        >>> space = PixelSpace([51.0], [51.0], white=255.0)
        >>> space.to_pixels(torch.tensor([[[[-1.0, 4.0]]]]))  # black and white
        tensor([[[[0., 1.]]]])
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        white: float = 1.0,
        flips_channels: bool = False,
        tolerance: float = 1e-4,
        caller: str = "PixelSpace",
        way_out: str = "Give the mean and std that the images were normalised with.",
    ) -> None:
        self.white = check.check_number(caller, "white", white, positive=True)
        if (mean is None) != (std is None):
            raise ValueError(f"{caller}: `mean` and `std` must be given both or not at all, got {mean} and {std}.")
        self.normalises = mean is not None
        self.mean, self.std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if mean is not None:
            self.mean, self.std = (
                _per_channel(caller, name, values, self.white) for name, values in (("mean", mean), ("std", std))
            )
        if self.mean.shape != self.std.shape:
            raise ValueError(
                f"{caller}: `mean` and `std` must have one length, got {len(self.mean)} and {len(self.std)}. "
                f"Give one number per channel."
            )
        self.flips_channels = flips_channels
        self.tolerance = tolerance
        self._caller, self._way_out = caller, way_out
        self._to_pixels = _Affine(self.std / self.white, self.mean / self.white)
        self._to_inputs = _Affine(self.white / self.std, -self.mean / self.std)

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Pixels of a batch, checked: an attack need not read them again (``check_values=False``).

        Args:
            inputs: normalised images, shape (N, C, H, W) or (N, C, ...), floating.

        Returns:
            Same shape, in [0, 1]; values outside by no more than rounding are clamped.

        Raises:
            TypeError: ``inputs`` is not a floating tensor.
            ValueError: another number of channels, or values that are no pixels.
        """
        check.check_floating(self._caller, "inputs", inputs, "Pass normalised images.")
        if inputs.dim() < 2 or len(self.mean) not in (1, inputs.shape[1]):
            raise ValueError(
                f"{self._caller}: `mean` and `std` must have one number per channel, got {len(self.mean)} for images "
                f"of shape {tuple(inputs.shape)}. {self._way_out}"
            )
        pixels = self._to_pixels(inputs.detach())
        if pixels.numel() == 0:
            return pixels
        if not torch.compiler.is_compiling():
            tolerance = max(self.tolerance, 2 * torch.finfo(inputs.dtype).eps)
            check_values(self._caller, "inputs", torch.aminmax(pixels), partial(self._judge, tolerance))
        return pixels.clamp_(0, 1)

    def _judge(self, tolerance: float, low: float, high: float) -> str | None:
        """What is wrong with a batch of these values."""
        if not (low >= -tolerance and high <= 1 + tolerance):
            undone = " once mean and std are undone" if self.normalises else ""
            return (
                f"{self._caller}: images must lie in [0, {self.white:g}]{undone}, got values from "
                f"{low * self.white:.4g} to {high * self.white:.4g}. {self._way_out}"
            )
        # Images in [0, 1] taken for bytes would make a perturbation of 8/255 vanish; a batch of black ones is fine.
        if self.white == 255.0 and tolerance < high <= (1 + tolerance) / self.white:
            return (
                f"{self._caller}: images must reach up to {self.white:g}, but these end at {high * self.white:.4g}. "
                f"{self._way_out}"
            )
        return None

    def to_inputs(self, pixels: Tensor) -> Tensor:
        """What the network takes, of pixels (N, C, ...) in [0, 1]: one multiply-add, unchecked, differentiable."""
        return self._to_inputs(pixels)

    def conversion_to(self, other: PixelSpace) -> Callable[[Tensor], Tensor] | None:
        """From inputs of this space to those that the other one makes of the same images.

        Args:
            other: the other space, of any ``white``.

        Returns:
            A function of one tensor, one multiply-add and a channel flip where one of the two alone flips; None if both
            make the same inputs.
        """
        flip = self.flips_channels != other.flips_channels
        mean, std = (part * (other.white / self.white) for part in (self.mean, self.std))
        if not flip and bool((mean == other.mean).all()) and bool((std == other.std).all()):
            return None
        return _Conversion(_to(mean, std, other), _to(mean.flip(0), std.flip(0), other), flip=flip)

    def __repr__(self) -> str:
        mean, std = self.mean.tolist(), self.std.tolist()
        return f"PixelSpace({mean}, {std}, white={self.white:g}, flips_channels={self.flips_channels})"


class _Affine:
    """``x * scale + shift`` per channel, with a copy of both for every device and dtype."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self._exact = scale, shift
        self._copies: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = x.device, x.dtype, x.dim()
        if key not in self._copies:
            # A tensor made in inference mode could not take part in training afterwards.
            with torch.inference_mode(False):
                shape = -1, *[1] * (x.dim() - 2)
                scale, shift = (part.to(x.device, x.dtype).reshape(shape) for part in self._exact)
            self._copies[key] = scale, shift
        scale, shift = self._copies[key]
        return torch.addcmul(shift, x, scale)


class _Conversion:
    """From the inputs of one space to those of another."""

    def __init__(self, straight: _Affine, flipped: _Affine, *, flip: bool) -> None:
        self._straight, self._flipped, self._flip = straight, flipped, flip

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._flip and inputs.shape[1] == _COLOURS:
            return self._flipped(inputs.flip(1))
        return self._straight(inputs)


def _to(mean: Tensor, std: Tensor, target: PixelSpace) -> _Affine:
    return _Affine(std / target.std, (mean - target.mean) / target.std)


def _per_channel(caller: str, name: str, values: object, white: float) -> Tensor:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{caller}: `{name}` must be a list of numbers, one per channel, got {values!r}.")
    numbers = [check.check_number(caller, name, value, positive=name == "std") for value in values]
    if max(numbers) > white:
        raise ValueError(
            f"{caller}: `{name}` must hold numbers of at most {white:g}, the value of white, got {list(values)}. "
            f"Scale them to the images' range."
        )
    return torch.tensor(numbers, dtype=torch.float64)
