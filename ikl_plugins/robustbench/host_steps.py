"""Which steps of a host's test pipeline leave pixels what they are, and what becomes of white and red in them.

The list says what is allowed, by library and class: a step that is not on it may change values, or draw random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PROBE_SIZE", "Shown", "check_steps", "flat", "library_name", "probe"]

PROBE_SIZE = 64
_ALLOWED = {
    *("mmcv.LoadImageFromFile", "mmcv.Resize", "mmcv.CenterCrop", "mmcv.Pad", "mmcv.ImageToTensor"),
    *("mmpretrain.ResizeEdge", "mmpretrain.EfficientNetCenterCrop"),
    *("mmpretrain.NumpyToPIL", "mmpretrain.PILToNumpy", "mmpretrain.PackInputs"),
    *("torchvision.Resize", "torchvision.CenterCrop", "torchvision.Pad", "torchvision.Identity", "torchvision.RGB"),
    *("torchvision.ToTensor", "torchvision.PILToTensor", "torchvision.ToImage", "torchvision.ToPureTensor"),
    *(
        "timm.MaybeToTensor",
        "timm.MaybePILToTensor",
        "torchvision.ToPILImage",
        "torchvision.ConvertImageDtype",
        "torchvision.ToDtype",
    ),
}
_COMPOSED = {"mmcv.Compose", "mmengine.Compose", "torchvision.Compose", "torch.Sequential"}
_WRAPPED = "mmpretrain.TorchVisonTransformWrapper"  # of 'torchvision/Resize' and its like


class Shown(NamedTuple):
    """What a pipeline makes of images of one colour.

    Attributes:
        white: the value of white.
        channels: how many there are.
        bgr: whether red comes last of three channels.
    """

    white: float
    channels: int
    bgr: bool


def library_name(step: object) -> str:
    """The library and the class of a step, as 'torchvision.Resize', whatever module it is in."""
    return f"{type(step).__module__.partition('.')[0]}.{type(step).__name__}"


def flat(transform: Any) -> Iterator[Any]:
    """The steps of a transform, those of nested ``Compose`` one by one."""
    if library_name(transform) in _COMPOSED:
        for step in getattr(transform, "transforms", transform):
            yield from flat(step)
    elif library_name(transform) == "torchvision.ImageClassification":  # of a network's `weights.transforms()`
        from torchvision import transforms

        size, how = transform.resize_size, {"interpolation": transform.interpolation, "antialias": transform.antialias}
        if size is not None:
            yield transforms.Resize(size, **how)
        yield transforms.CenterCrop(transform.crop_size)
        yield from (transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float))
        yield transforms.Normalize(transform.mean, transform.std)
    elif transform is not None:
        yield transform


def check_steps(caller: str, key: str, steps: Sequence[Any], normalise: str) -> None:
    """Refuses the first step that is not known to leave pixels what they are.

    ``key`` is where they stand, ``normalise`` how to normalise instead of by a step.
    """
    for step in steps:
        for part in flat(step.t if library_name(step) == _WRAPPED else step):
            name = library_name(part)
            # One grey channel is the network's own image; three equal ones would be attacked apart from each other.
            if name in _ALLOWED or (name == "torchvision.Grayscale" and part.num_output_channels == 1):
                continue
            kind = getattr(part, "__name__", type(part).__name__)  # of a function its own
            way_out = normalise if kind == "Normalize" else "Take it out, or into the model."
            raise ValueError(f"{caller}: {key} must only load, size and pack images, got {kind}. {way_out}")


def probe(caller: str, key: str, show: Callable[[tuple[int, int, int]], Tensor]) -> Shown:
    """What a pipeline makes of a black, a white and a red image; ``show`` runs it, from RGB bytes to (C, H, W)."""
    images = [show(colour).double().flatten(1) for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 0))]
    change = (images[1] - images[0]).abs().sum(0)
    inside = change >= change.max() / 2  # not what pads the image
    black, white, red = (image[:, inside].median(1).values for image in images)  # resized floats round
    level = white.max().item()
    if black.abs().max().item() != 0 or white.min().item() != level or level <= 0:
        raise ValueError(
            f"{caller}: {key} must keep black at 0 and white one value above, got {black.tolist()} and "
            f"{white.tolist()}. Let the model normalise."
        )
    return Shown(level, len(white), len(red) == 3 and int(red.argmax()) == 2)
