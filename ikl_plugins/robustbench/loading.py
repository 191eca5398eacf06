"""From a checkpoint to a classifier of images in [0, 1], whichever library has trained it.

- :func:`load_checkpoint` for the architectures of RobustBench's zoo and of :mod:`ikl_plugins.models`, by name;
- :func:`from_mmpretrain` and :func:`from_torchdistill` for everything else: the network and its normalisation come from
  the host's config, and outputs equal those of the host's own test.

All of them load strictly and give modules in eval mode. Files are read without running what they hold.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation as check
from .. import models
from ..checkpoints import load_content, weights_in
from ..models.robustbench_zoo import (
    LAST_LAYERS,
    Statistics,
    check_statistics,
    class_count,
    given_statistics,
    nearest_architecture,
    parse_architecture,
)
from ..models.weights import Misfit, bare, load_strictly, parts, same_statistics, without_normaliser
from .mmpretrain_data import host_pixels, host_scope, read_mmpretrain_config
from .stored_config import check_stored_config
from .torchdistill_data import TorchdistillData, block, student

__all__ = ["DATASET_CLASSES", "HostClassifier", "Normalised", "from_mmpretrain", "from_torchdistill", "load_checkpoint"]

DATASET_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
# What the networks of the distillation literature were trained with on CIFAR-100.
_DISTILLATION_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_PRIOR = re.compile(r"(?:distill_loss|robust_loss)\.class_prior\.(?:matrix|sums|counts)")


class Normalised(nn.Module):
    """``network((images - mean) / std)``: images in [0, 1] for a network that was trained on normalised ones.

    Args:
        network: gives logits.
        mean: of the channels of images in [0, 1], one number a channel or one for all; a buffer of shape (C, 1, 1) in
            the state dict.
        std: likewise, above 0.

    Raises:
        ValueError: ``mean`` or ``std`` are not such numbers; images have another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = check_statistics("Normalised", mean, std)
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images in [0, 1], shape (N, C, H, W)."""
        if len(self.mean) not in (1, images.shape[1]):  # broadcasting would make channels of one
            raise ValueError(
                f"Normalised: images must have {len(self.mean)} channels, as `mean` has, got {tuple(images.shape)}."
            )
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


class HostClassifier(nn.Module):
    """A classifier of MMPretrain behind images in [0, 1]: its own data preprocessor makes its inputs of them.

    Args:
        classifier: with ``data_preprocessor`` and ``forward(inputs, mode='tensor')``.
        pixel_range: the value of white in what the data preprocessor gets.
        flip: whether it gets BGR, where there are three channels.
        classes: names of the classes that the checkpoint was trained on, None where it does not say them.
    """

    def __init__(
        self, classifier: nn.Module, pixel_range: float, flip: bool, classes: tuple[str, ...] | None = None
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.pixel_range = pixel_range
        self.flip = flip
        self.classes = classes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostClassifier:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        parameter = next(self.parameters(), None)
        if parameter is not None:  # it sends images to a device that it must be told
            preprocessor: Any = self.classifier.data_preprocessor
            preprocessor.to(parameter.device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images in [0, 1], shape (N, C, H, W); what was k / 255 is the byte k again."""
        pixels = images * self.pixel_range
        flip = self.flip and pixels.shape[1] == 3
        preprocessor: Any = self.classifier.data_preprocessor
        inputs = preprocessor({"inputs": pixels.flip(1) if flip else pixels}, False)["inputs"]
        logits = self.classifier(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"from_mmpretrain: the classifier must give logits of shape (N, C), got {what}. Use another head."
            )
        return logits


def load_checkpoint(
    path: Path | str,
    architecture: str = "WideResNet-34-10",
    dataset: str = "cifar10",
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    averaged: bool = True,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A network by name, with the weights of a checkpoint.

    Args:
        path: a checkpoint of MMPretrain (with or without an EMAHook), torchdistill, the official code of the DKL and
            GKL losses or of DM-Improves-AT, mdistiller, RobustBench, timm or Lightning; or a plain state dict. What
            wrappers put into names is taken off, and what else all names begin with, if exactly the network's are left;
            the class statistics of this package's MMPretrain classifiers and the unused ``sub_block1`` of the official
            WideResNet are left out. Nothing else.
        architecture: a name of :func:`ikl_plugins.models.robustbench_zoo.parse_architecture`, 'WideResNet-34-10' for
            one, or of :mod:`ikl_plugins.models`, 'resnet20' for one.
        dataset: 'cifar10', 'cifar100' or 'imagenet': how many classes there are, and which mean and std where the
            network normalises its inputs.
        num_classes: of other data; None for as many as ``dataset`` has.
        mean: of the three channels in [0, 1], or one number for all, where the network was trained with others than
            those. For the networks of :mod:`ikl_plugins.models` those of the distillation literature are known for
            'cifar100', no others. Where the file has a layer that normalises images, its mean and std are taken;
            where it has MMPretrain's config, they must be that one's.
        std: likewise.
        averaged: of a checkpoint that also has the average of its weights (EMA, SWA), take the average.
        device: where the network goes.

    Returns:
        A module in eval mode: images in [0, 1] in, logits out. For a name of RobustBench's zoo it is an instance of
        RobustBench's class, whose ``state_dict()`` RobustBench loads; with ``mean`` and ``std`` for a class that has
        none, and for :mod:`ikl_plugins.models`, it is that network inside :class:`Normalised`.

    Raises:
        ImportError: RobustBench is not installed.
        TypeError: an argument of the wrong type.
        ValueError: an unknown name; a file that is missing, damaged or would run code; weights that do not fit (the
            message names the first that are missing and unexpected, and the nearest architecture); another number of
            classes; images that the checkpoint's own config, or a layer in it, normalises in another way.
    """
    caller = "load_checkpoint"
    if dataset not in DATASET_CLASSES:
        raise ValueError(
            check.unknown_name_message(caller, "data set", str(dataset), DATASET_CLASSES)
            + " For other data give num_classes, mean and std."
        )
    if num_classes is None:
        num_classes = DATASET_CLASSES[dataset]
    check.check_num_classes(caller, num_classes)
    given = given_statistics(caller, mean, std, channels=3)
    if architecture not in models.__all__:
        _named(caller, architecture, dataset, num_classes, given)  # an unknown name is told before the file is read
    content = load_content(path)
    weights, normaliser = without_normaliser(caller, weights_in(content, path, averaged=averaged), path)
    if normaliser is not None and given is not None and not same_statistics(normaliser, given):
        raise ValueError(
            f"{caller}: `mean` and `std` must be those in {path}, mean {normaliser[0]} and std {normaliser[1]}, got "
            f"mean {given[0]} and std {given[1]}. Leave them out."
        )
    given = normaliser or given
    build, outer = _named(caller, architecture, dataset, num_classes, given)
    if normaliser is None:
        check_stored_config(caller, content, path, architecture, outer)
    network = build()
    way_out = functools.partial(_way_out, weights, architecture, num_classes)
    load_strictly(caller, network, weights, path, architecture, way_out)
    found = network if outer is None else Normalised(network, *outer)
    found.classes = _class_names(content)  # type: ignore[assignment]
    return found.to(device).eval()


def from_mmpretrain(
    config: Any,
    checkpoint: Path | str,
    *,
    averaged: bool = True,
    channel_order: str | None = None,
    device: torch.device | str = "cpu",
) -> HostClassifier:
    """The classifier of an MMPretrain config, behind images in [0, 1].

    Args:
        config: path of a config file, or MMEngine's ``Config``. It is trusted: what it imports is run.
        checkpoint: a file of that config's training. Of the classifiers of this package the plain ``ImageClassifier``
            inside is built, and the class statistics of the training are left out.
        averaged: of a checkpoint with an EMAHook take the averaged weights, as MMPretrain's test does.
        channel_order: 'rgb' or 'bgr', in which the test pipeline hands images on; None to read it from the pipeline
            (``LoadImageFromFile`` gives BGR, the data sets CIFAR10 and CIFAR100 give RGB, ``NumpyToPIL`` may turn it).
            With one channel there is no order.
        device: where the classifier goes.

    Returns:
        A module in eval mode: images in [0, 1] in, with as many channels as the pipeline gives, RGB of three; logits
        out. Mean, std, channel order and padding are those of the config's ``data_preprocessor``, which is called
        itself. Of the test pipeline nothing is repeated: :func:`images_of_mmpretrain` gives what comes out of it.

    Raises:
        ImportError: MMPretrain, or a module that the config imports, is not installed.
        TypeError: ``config`` is neither a path nor a config.
        ValueError: a file is missing or damaged; weights do not fit; a step of the test pipeline may change pixel
            values or draws random numbers (it is named), or its order of channels cannot be told.
    """
    caller = "from_mmpretrain"
    where = str(config) if isinstance(config, (str, Path)) else "the config"
    config = read_mmpretrain_config(caller, config)
    from mmpretrain.registry import MODELS

    if not isinstance(config.get("model"), Mapping):
        raise ValueError(f"{caller}: {where} must have a `model`, but has none. Name the training's config.")
    pixels = host_pixels(caller, config, channel_order)
    model = copy.deepcopy(dict(config.model))
    model.setdefault("data_preprocessor", copy.deepcopy(config.get("data_preprocessor")))
    with host_scope(config):
        kind = model.get("type")
        # A classifier that trains another one says of which class its checkpoints are.
        plain_config = getattr(MODELS.get(kind) if isinstance(kind, str) else kind, "plain_config", None)
        if plain_config is not None:
            model = plain_config(model)
        classifier = MODELS.build(model)
    content = load_content(checkpoint)
    weights = _kept(weights_in(content, checkpoint, averaged=averaged))
    load_strictly(caller, classifier, weights, checkpoint, f"`model` of {where}")
    found = HostClassifier(classifier, pixels.white, pixels.bgr, _class_names(content))
    return found.to(device).eval()


def from_torchdistill(
    config: Path | str | Mapping[str, Any] | TorchdistillData,
    checkpoint: Path | str,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model of a torchdistill YAML file, behind images in [0, 1].

    Args:
        config: the file, or what torchdistill's ``load_yaml_file`` has made of it. It is trusted: its
            ``!import_call`` entries are run, and so the data sets must be there.
        checkpoint: what the training has written to ``dst_ckpt``.
        device: where the model goes.

    Returns:
        A module in eval mode: images in [0, 1] in, what the model gives for them out. Where the transform of the test
        data set ends with ``Normalize``, or leaves values up to 255, the model is inside :class:`Normalised`; else it
        is the model itself. Of the transform nothing else is repeated: :func:`images_of_torchdistill` gives what comes
        out of it.

    Raises:
        ImportError: torchdistill, or one of the file's ``dependencies``, is not installed.
        ValueError: a file is missing or damaged, or lacks a block; weights do not fit; a step of the transform before
            one ``Normalize`` at its end may change pixel values or draws random numbers (it is named).
    """
    caller = "from_torchdistill"
    data = config if isinstance(config, TorchdistillData) else TorchdistillData(caller, config)
    from torchdistill.models.official import get_image_classification_model
    from torchdistill.models.registry import get_model

    named = student(data.content)
    network = get_image_classification_model(named)
    if network is None:
        network = get_model(named["key"], named.get("repo_or_dir"), **(named.get("kwargs") or {}))
    weights = weights_in(load_content(checkpoint), checkpoint)
    load_strictly(caller, network, weights, checkpoint, f"the model '{named['key']}' of {data.where}")
    return (network if data.statistics is None else Normalised(network, *data.statistics)).to(device).eval()


# --- names -----------------------------------------------------------------------------------------------------------


def _named(
    caller: str, name: str, dataset: str, num_classes: int, given: Statistics | None
) -> tuple[Callable[[], nn.Module], Statistics | None]:
    """What builds a network by its name, and the normalisation around it if there is one."""
    if name in models.__all__:
        if given is None and dataset != "cifar100":
            raise ValueError(
                f"{caller}: `mean` and `std` must be given for {name} on {dataset}, got none. Give its training's."
            )
        return functools.partial(getattr(models, name), num_classes=num_classes), given or _DISTILLATION_STATISTICS
    try:
        architecture = parse_architecture(name, caller=caller)
    except ValueError as error:
        if "unknown architecture" not in str(error):
            raise
        raise ValueError(f"{error} Also those of ikl_plugins.models: {', '.join(models.__all__)}.") from None
    if not architecture.normalises:
        return functools.partial(architecture.build, num_classes), given
    mean, std = given or (None, None)
    return functools.partial(architecture.build, num_classes, dataset=dataset, mean=mean, std=std), None


# --- weights ---------------------------------------------------------------------------------------------------------


def _kept(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the class statistics of a training."""
    return {name: tensor for name, tensor in weights.items() if _PRIOR.fullmatch(name) is None}


def _class_names(content: Any) -> tuple[str, ...] | None:
    """Of the training data, as a checkpoint of MMEngine has them."""
    names = block(content, "meta", "dataset_meta", "classes")
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else None


def _way_out(weights: dict[str, Tensor], architecture: str, num_classes: int, misfit: Misfit) -> str:
    """What may help where weights do not fit a network that was named."""
    weights = bare(weights)
    theirs = class_count(weights)
    last = all(name.rpartition(".")[0] in LAST_LAYERS for name in misfit.shapes)
    if theirs not in (None, num_classes) and last and not misfit.missing and not misfit.unexpected:
        return f"It has {theirs} classes and not {num_classes}: give its `dataset`, or num_classes={theirs}."
    nearest = nearest_architecture(weights)
    if nearest is None:
        for prefix, part in parts(weights).items():
            if inner := nearest_architecture(bare(part)):
                return f"Under {prefix} it looks like architecture='{inner}': save that alone."
        first = dict.fromkeys(name.partition(".")[0] for name in weights)
        return (
            f"No network known by name has {check.first_names(list(first))}; use from_mmpretrain or from_torchdistill."
        )
    if nearest == architecture:
        return "The file is not whole, or its network was changed."
    return f"It looks like architecture='{nearest}'."
