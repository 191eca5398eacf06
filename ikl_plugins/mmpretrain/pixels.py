"""The settings of a data preprocessor, read into the core's pixel space."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _validation as check
from ..adversarial import PixelSpace

__all__ = ["pixel_space"]

_WAY_OUT = (
    "Drop `Normalize` from the pipeline if it normalises twice; set pixel_range=1.0 if it divides by 255; `pad_value` "
    "must be a pixel."
)


def pixel_space(data_preprocessor: Any, pixel_range: float = 255.0, *, caller: str = "pixel_space") -> PixelSpace:
    """Between what a data preprocessor hands to the network and pixels in [0, 1].

    Args:
        data_preprocessor: MMPretrain's ``ClsDataPreprocessor``, MMEngine's ``ImgDataPreprocessor``, or any module with
            their attributes ``_enable_normalize`` and, if that is True, ``mean`` and ``std``. They are read now.
        pixel_range: the value of white in the images of the data set, above 0.
        caller: how errors call the one who asks.

    Raises:
        TypeError: ``pixel_range`` is not a number.
        ValueError: a preprocessor without these attributes, or a setting out of range.

    Example:
        >>> import torch
        >>> from mmpretrain.models import ClsDataPreprocessor
        >>> from ikl_plugins.mmpretrain import pixel_space
        >>> space = pixel_space(ClsDataPreprocessor(mean=[51.0], std=[51.0]))
        >>> space.to_pixels(torch.tensor([[[[-1.0, 4.0]]]]))  # black and white
        tensor([[[[0., 1.]]]])
    """
    check.check_number(caller, "pixel_range", pixel_range, positive=True)
    normalises = getattr(data_preprocessor, "_enable_normalize", None)
    mean, std = (getattr(data_preprocessor, name, None) if normalises else None for name in ("mean", "std"))
    if normalises is not False and not (isinstance(mean, Tensor) and isinstance(std, Tensor)):
        raise ValueError(
            f"{caller}: `data_preprocessor` must have `_enable_normalize`, `mean` and `std`, got "
            f"{type(data_preprocessor).__name__} without. Use ClsDataPreprocessor or a subclass."
        )
    return PixelSpace(
        None if mean is None else mean.flatten().tolist(),
        None if std is None else std.flatten().tolist(),
        white=pixel_range,
        flips_channels=_flips_channels(data_preprocessor),
        caller=caller,
        way_out=_WAY_OUT,
    )


def _flips_channels(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, "to_rgb", False) or getattr(preprocessor, "_channel_conversion", False))
