"""Classifiers of timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import _validation as check
from ...checkpoints import load_content
from ...models.robustbench_zoo import given_statistics
from .model import Geometry, ImageArchitecture, ImageModel
from .shared import fetched, library, of_training, trained, understood, unknown

__all__ = ["from_timm"]

# Of timm's train.py: what its own evaluation makes the images by, and what else the network is built with.
_DATA = ("input_size", "img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_NETWORK = {"gp": "global_pool", "bn_eps": "bn_eps"}

_READ = ("checkpoint_path", "cache_dir")  # of what create_model would read


def from_timm(
    name: str,
    checkpoint: Path | str | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    averaged: bool = True,
    offline: bool = False,
    device: torch.device | str = "cpu",
) -> ImageModel:
    """A classifier of timm behind images in [0, 1].

    Args:
        name: as ``timm.create_model`` takes it, such as 'resnet18' or 'vit_base_patch16_224.augreg_in1k'.
        checkpoint: a file of timm's train.py, or any that :func:`~ikl_plugins.robustbench.load_checkpoint` reads. It
            tells the number of classes, and the ``args`` in it how its own evaluation made the images. None for the
            pretrained weights, which timm fetches.
        mean: of the three channels in [0, 1], where the network was trained with others than its configuration has.
        std: likewise.
        image_size: height and width of images, where they are not the configuration's.
        averaged: of a checkpoint that also has the average of its weights, take the average.
        offline: refuse what would be fetched.
        device: where the model goes.

    Returns:
        A module in eval mode. Its ``geometry`` is timm's own transform for evaluation, by ``resolve_data_config`` (the
        size of training where the configuration has another one for tests), without ``Normalize``, which the module
        does.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown name; a file that is missing, damaged, does not fit or is of another network; weights
            that cannot be fetched; a normalisation in the file that is not the given one.
    """
    caller = "from_timm"
    given = given_statistics(caller, mean, std, channels=3)
    if image_size is not None:
        check.check_integer(caller, "image_size", image_size)
    timm = library(caller, "timm")
    hub = name.startswith(("hf-hub:", "hf_hub:"))
    if not hub and not timm.is_model(name.partition(".")[0]):
        raise unknown(caller, name, timm.list_models(), "timm.list_models()")
    content = None if checkpoint is None else load_content(checkpoint)
    args = of_training(caller, content, "crop_pct", name, checkpoint)
    with understood(caller, checkpoint):
        options = {ours: args[theirs] for theirs, ours in _NETWORK.items() if args.get(theirs) is not None}
        options.update(_of_the_network(args.get("model_kwargs") or {}))
        data = {key: args[key] for key in _DATA if args.get(key) is not None}
        if image_size is not None:
            data["input_size"] = (3, image_size, image_size)
            if not hub and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):  # others take any size
                options["img_size"] = image_size
        elif "img_size" in options and not {"input_size", "img_size"} & data.keys():
            side = options["img_size"]
            data["input_size"] = (3, *((side, side) if isinstance(side, int) else side))
    architecture = ImageArchitecture("timm", name, tuple(options.items()))
    if content is None or hub:
        what = f"{name} of timm"
        network: Any = fetched(
            caller, what, offline, lambda: timm.create_model(name, pretrained=content is None, **options)
        )
    else:
        network = _built(caller, architecture)
    if content is not None:
        network, given = trained(caller, architecture, network, content, checkpoint, averaged, given)
    if not network.num_classes:
        raise ValueError(f"{caller}: {name} must be a classifier, but has no classes. Name a file that has.")
    if given is not None:
        data.update(mean=given[0], std=given[1])
    with understood(caller, checkpoint):
        config = timm.data.resolve_data_config(data, model=network)
        if config["input_size"][0] != 3:
            raise ValueError(f"{caller}: {name} must take RGB, but takes {config['input_size'][0]} channels.")
        *steps, _ = timm.data.create_transform(**config, is_training=False).transforms  # the last one normalises
    compose = library(caller, "torchvision").transforms.Compose
    height, width = config["input_size"][1:]
    words = f"timm {height}x{width}, crop_pct {config['crop_pct']}, {config['interpolation']}, {config['crop_mode']}"
    statistics = tuple(config["mean"]), tuple(config["std"])
    geometry = Geometry(compose(steps), words)
    return ImageModel(network, statistics, architecture, geometry, network.num_classes).to(device).eval()


def _of_the_network(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a file may ask timm to build; nothing that would have it read another file or address."""
    others = [name for name in arguments if name.startswith("pretrained") or name in _READ]
    if others:
        raise KeyError(f"model_kwargs has {others[0]}")
    return dict(arguments)


def _built(caller: str, architecture: ImageArchitecture) -> nn.Module:
    """The network as timm builds it; one that has no classes of its own with some, which the file then tells."""
    try:
        network: Any = architecture.build(None)
        return architecture.build(1000) if network.num_classes == 0 else network
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        options = "".join(f", {name}={value!r}" for name, value in architecture.options)
        raise ValueError(f"{caller}: timm cannot build {architecture.name}{options}: {reason}.") from error
