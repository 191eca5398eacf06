"""Classifiers of torchvision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import _validation as check
from ...checkpoints import load_content
from ...models.robustbench_zoo import given_statistics
from ..data import file_sha256
from .model import Geometry, ImageArchitecture, ImageModel
from .shared import fetched, library, of_training, trained, understood, unknown

__all__ = ["from_torchvision"]

_NORMALISE_TWICE = ("googlenet", "inception_v3")  # inside, where they are built with torchvision's weights
_DIGEST = 8  # hexadecimal digits of the checksum in the name of a file of torchvision


def from_torchvision(
    name: str,
    checkpoint: Path | str | None = None,
    *,
    weights_name: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    averaged: bool = True,
    offline: bool = False,
    device: torch.device | str = "cpu",
) -> ImageModel:
    """A classifier of torchvision behind images in [0, 1].

    Args:
        name: as ``torchvision.models.get_model`` takes it, such as 'resnet50'.
        checkpoint: a file of torchvision's references, one of its own weights, or any that
            :func:`~ikl_plugins.robustbench.load_checkpoint` reads. It tells the number of classes. None for the weights
            named ``weights_name``, which torchvision fetches.
        weights_name: of the network's weights, such as 'IMAGENET1K_V2' or 'DEFAULT' (None), whose ``transforms()`` make
            the images. Beside a ``checkpoint`` it is needed only where they differ and neither the file's checksum nor
            the ``args`` of the references in it tell which.
        mean: of the three channels in [0, 1], where the network was trained with others than the transforms'.
        std: likewise.
        averaged: of a checkpoint that also has the average of its weights, take the average.
        offline: refuse what would be fetched.
        device: where the model goes.

    Returns:
        A module in eval mode. Its ``geometry`` is the transforms without their normalisation, which the module does.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: an unknown name; a file that is missing, damaged, does not fit or is of another network; no telling
            how its images are made; weights that cannot be fetched.
    """
    caller = "from_torchvision"
    given = given_statistics(caller, mean, std, channels=3)
    pt_models = library(caller, "torchvision").models
    known = pt_models.list_models(module=pt_models)
    if name not in known:
        raise unknown(caller, name, known, "torchvision.models.list_models(torchvision.models)")
    entries = dict(pt_models.get_model_weights(name).__members__)  # DEFAULT is another name of one
    if weights_name is not None and weights_name not in entries:
        raise ValueError(check.unknown_name_message(caller, f"weights of {name}", weights_name, entries))
    architecture = ImageArchitecture("torchvision", name)
    if checkpoint is None:
        entry = entries[weights_name or "DEFAULT"]
        what = f"{name} of torchvision"
        network = fetched(caller, what, offline, lambda: pt_models.get_model(name, weights=entry))
        transforms = entry.transforms
    elif name in _NORMALISE_TWICE:
        raise ValueError(
            f"{caller}: no checkpoint of {name} tells whether it normalises images once more. Leave it out."
        )
    else:
        content = load_content(checkpoint)
        with understood(caller, checkpoint):
            transforms = _transforms(caller, name, entries, weights_name, checkpoint, content)
        network = architecture.build(None)
        network, given = trained(caller, architecture, network, content, checkpoint, averaged, given)
    with understood(caller, checkpoint):
        whole = transforms()
        size, crop = whole.resize_size[0], whole.crop_size[0]
        geometry = Geometry(
            transforms(mean=(0.0,) * 3, std=(1.0,) * 3),
            f"torchvision resize {size}, crop {crop}, {whole.interpolation.value}",
        )
    classes = [len(tensor) for tensor in network.state_dict().values() if tensor.dim() > 1][-1]
    statistics = given or (tuple(whole.mean), tuple(whole.std))
    return ImageModel(network, statistics, architecture, geometry, classes).to(device).eval()


def _transforms(
    caller: str, name: str, entries: Mapping[str, Any], named: str | None, path: Path | str, content: Any
) -> Callable[..., Any]:
    """Those that are named, of the weights that the file is, or of the arguments of torchvision's references in it."""
    digest = file_sha256(Path(path).expanduser())
    tails = {key: Path(entry.url).stem.rpartition("-")[2] for key, entry in entries.items()}
    own = next((key for key, tail in tails.items() if len(tail) >= _DIGEST and digest.startswith(tail)), None)
    args = of_training(caller, content, "val_crop_size", name, path)
    chosen = named or own
    first: Callable[..., Any] = entries[chosen or "DEFAULT"].transforms
    if chosen is None and args:
        from torchvision.transforms import InterpolationMode

        return functools.partial(
            first,
            crop_size=args["val_crop_size"],
            resize_size=args["val_resize_size"],
            interpolation=InterpolationMode(args["interpolation"]),
        )
    entries = {key: entry for key, entry in entries.items() if key != "DEFAULT"}
    if chosen is None and len({str(entry.transforms()) for entry in entries.values()}) > 1:
        raise ValueError(
            f"{caller}: {path} does not tell which of {', '.join(entries)} makes its images. Add weights_name."
        )
    return first
