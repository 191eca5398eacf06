"""Image classifiers of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation as check
from ...models.robustbench_zoo import Statistics
from .model import Geometry, ImageArchitecture, ImageModel, probe_images
from .shared import fetched, library

__all__ = ["from_huggingface"]

_EQUAL = 1e-5  # between the processor's pixels and ours, which it rounds in another order
_GEOMETRY = ("size", "crop_size", "crop_pct", "resample")


def from_huggingface(folder: Path | str, *, offline: bool = False, device: torch.device | str = "cpu") -> ImageModel:
    """An image classifier of Hugging Face's transformers behind images in [0, 1].

    Args:
        folder: that ``save_pretrained`` of model and image processor has written, or a name on the hub. Code in it is
            not run.
        offline: read what is of the hub from its cache alone.
        device: where the model goes.

    Returns:
        A module in eval mode that gives the model's ``logits``. Its ``geometry`` is the image processor without
        rescaling and normalisation, which the module does, by a factor other than 1/255 too.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no such folder or name; weights that leave a part of the network untrained; an image processor that
            does something else than size, crop, rescale and normalise.
    """
    caller = "from_huggingface"
    transformers = library(caller, "transformers")
    local = Path(folder).expanduser()
    where, options = (str(local), {}) if local.is_dir() else (str(folder), {"local_files_only": offline})

    def read(kind: Any, **more: Any) -> Any:
        return fetched(caller, where, False, lambda: kind.from_pretrained(where, **options, **more))

    network, info = read(transformers.AutoModelForImageClassification, output_loading_info=True)
    untrained = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if untrained:
        raise ValueError(
            f"{caller}: {where} must have all weights of a classifier, but lacks {check.first_names(untrained)}. Name "
            "one that was trained to classify."
        )
    processor = read(transformers.AutoImageProcessor)
    words = f"transformers {type(processor).__name__}"
    said = {name: getattr(processor, name, None) for name in _GEOMETRY}
    words += "".join(f", {name} {_plain(value)}" for name, value in said.items() if value is not None)
    labels: Mapping[int, str] = network.config.id2label
    classes = tuple(str(labels[index]) for index in sorted(labels))
    model = ImageModel(
        _Logits(network),
        _statistics(processor),
        ImageArchitecture("transformers", where),
        Geometry(_Sized(processor), words),
        len(classes),
        None if classes[0] == "LABEL_0" else classes,  # the name of one that nobody has named
    )
    for probe in probe_images():
        theirs = processor(images=probe, return_tensors="pt")["pixel_values"][0]
        ours = model.get_submodule("normalize")(model.geometry(probe)[None])[0]
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=_EQUAL, atol=_EQUAL):
            raise ValueError(
                f"{caller}: the image processor of {where} must only size, crop, rescale and normalise, but "
                f"{type(processor).__name__} does more. Build the model in Python."
            )
    return model.to(device).eval()


class _Logits(nn.Module):
    """A model of transformers that gives its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixel_values).logits
        return logits


class _Sized:
    """An image processor before it rescales: grey levels, divided by 255."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Any) -> Tensor:
        found = self._processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels: Tensor = found["pixel_values"][0]
        return pixels.float().div(255)


def _statistics(processor: Any) -> Statistics:
    """The mean and std for pixels in [0, 1] that rescaling and normalising come to."""
    white = 255 * float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 255.0
    mean, std = [0.0], [1.0]
    if getattr(processor, "do_normalize", False):
        mean, std = list(processor.image_mean), list(processor.image_std)
    return tuple(value / white for value in mean), tuple(value / white for value in std)


def _plain(value: Any) -> str:
    """'height 32 width 32' for a size."""
    items = dict(value).items() if isinstance(value, Mapping) or hasattr(value, "keys") else ((value, ""),)
    return " ".join(f"{name} {number}".strip() for name, number in items if number is not None)
