"""From a checkpoint to a classifier of images in [0, 1], whichever library has trained it.

- :func:`load_checkpoint` for the architectures of RobustBench's zoo and of :mod:`ikl_plugins.models`, by name;
- :func:`from_mmpretrain` and :func:`from_torchdistill` for everything else: the network and its normalisation come from
  the host's config, and outputs equal those of the host's own test.

All of them load strictly and give modules in eval mode. Files are read without running what they hold.
"""

from __future__ import annotations

import ast
import copy
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation as check
from .. import models
from ..checkpoints import load_content, weights_in
from ..models.robustbench_zoo import (
    LAST_LAYERS,
    check_statistics,
    class_count,
    nearest_architecture,
    parse_architecture,
)
from ..models.weights import Misfit, load_strictly, strip_prefixes

__all__ = ["DATASET_CLASSES", "HostClassifier", "Normalised", "from_mmpretrain", "from_torchdistill", "load_checkpoint"]

DATASET_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
# What the networks of the distillation literature were trained with on CIFAR-100.
_DISTILLATION_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_PRIOR = re.compile(r"(?:distill_loss|robust_loss)\.class_prior\.(?:matrix|sums|counts)")
# Of the official WideResNet, whose forward never uses it; RobustBench and the official evaluation leave it out.
_UNUSED = "sub_block1."


class Normalised(nn.Module):
    """``network((images - mean) / std)``: images in [0, 1] for a network that was trained on normalised ones.

    Args:
        network: gives logits.
        mean: of the three channels of images in [0, 1].
        std: likewise, above 0.

    Attributes:
        network: the network.
        mean: shape (3, 1, 1), a buffer of the state dict.
        std: likewise.

    Raises:
        ValueError: ``mean`` or ``std`` are not three numbers in range.
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
        """Logits.

        Args:
            images: shape (N, 3, H, W), in [0, 1], RGB.

        Returns:
            Shape (N, classes).
        """
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


class HostClassifier(nn.Module):
    """A classifier of MMPretrain behind images in [0, 1]: its own data preprocessor makes its inputs of them.

    Args:
        classifier: with ``data_preprocessor`` and ``forward(inputs, mode='tensor')``.
        pixel_range: the value of white in what the data preprocessor gets.
        flip: whether it gets BGR.

    Attributes:
        classifier: the classifier.
    """

    def __init__(self, classifier: nn.Module, pixel_range: float, flip: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.pixel_range = pixel_range
        self.flip = flip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostClassifier:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        parameter = next(self.parameters(), None)
        if parameter is not None:  # it sends images to a device that it must be told
            preprocessor: Any = self.classifier.data_preprocessor
            preprocessor.to(parameter.device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: shape (N, 3, H, W), in [0, 1], RGB. Those that were bytes k / 255 are the bytes again.

        Returns:
            Shape (N, classes).

        Raises:
            ValueError: the classifier gives something else.
        """
        pixels = images * self.pixel_range
        preprocessor: Any = self.classifier.data_preprocessor
        inputs = preprocessor({"inputs": pixels.flip(1) if self.flip else pixels}, False)["inputs"]
        logits = self.classifier(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"from_mmpretrain: the config must be of a classifier that gives logits of shape (N, C), got {what}. "
                f"Use a head with one set of logits."
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
            GKL losses or of DM-Improves-AT, mdistiller, or RobustBench; or a plain state dict. 'module.', 'model.',
            'backbone.' and '0.' are taken off where all names begin so; the class statistics of this package's
            MMPretrain classifiers and the unused ``sub_block1`` of the official WideResNet are left out. Nothing else.
        architecture: a name of :func:`ikl_plugins.models.robustbench_zoo.parse_architecture`, 'WideResNet-34-10' for
            one, or of :mod:`ikl_plugins.models`, 'resnet20' for one.
        dataset: 'cifar10', 'cifar100' or 'imagenet': how many classes there are, and which mean and std where the
            network normalises its inputs.
        num_classes: of other data; None for as many as ``dataset`` has.
        mean: of the three channels in [0, 1], where the network was trained with others than those. For the networks of
            :mod:`ikl_plugins.models` those of the distillation literature are known for 'cifar100', no others.
        std: likewise.
        averaged: of a checkpoint that also has the average of its weights (EMA), take the average.
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
            classes; images that the checkpoint's own config normalises in another way.
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
    if (mean is None) != (std is None):
        raise ValueError(
            f"{caller}: `mean` and `std` must be given both or not at all, got mean={mean} and std={std}. Give both."
        )
    if mean is not None and std is not None:
        mean, std = check_statistics(caller, mean, std)
    build, outer = _named(caller, architecture, dataset, num_classes, mean, std)
    content = load_content(path)
    if mean is None:
        _check_stored_config(caller, content, path, architecture, outer)
    weights = strip_prefixes(_kept(weights_in(content, path, averaged=averaged)))
    if architecture.startswith("WideResNet-"):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}
    network = build()
    way_out = functools.partial(_way_out, weights, architecture, num_classes)
    load_strictly(caller, network, weights, path, architecture, way_out)
    return (network if outer is None else Normalised(network, *outer)).to(device).eval()


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
            (``LoadImageFromFile`` gives BGR, the data sets CIFAR10 and CIFAR100 give RGB).
        device: where the classifier goes.

    Returns:
        A module in eval mode: RGB images in [0, 1] in, logits out. Mean, std, channel order and padding are those of
        the config's ``data_preprocessor``, which is called itself. Of the test pipeline nothing is repeated: pass
        images as they are after its resizing and cropping.

    Raises:
        ImportError: MMPretrain, or a module that the config imports, is not installed.
        TypeError: ``config`` is neither a path nor a config.
        ValueError: a file is missing or damaged; weights do not fit; the test pipeline itself changes pixel values, or
            does not say in which order it hands on channels.
    """
    caller = "from_mmpretrain"
    try:
        from mmengine.config import Config
        from mmengine.registry import DefaultScope
        from mmengine.utils import import_modules_from_strings
        from mmpretrain.registry import MODELS
    except ImportError as error:
        raise ImportError(
            f"{caller} needs MMPretrain and MMEngine, but `{error.name}` is missing. "
            f"Run: pip install 'ikl_plugins[mmpretrain]'",
            name=error.name,
        ) from error
    where = "the config"
    if isinstance(config, (str, Path)):
        where = str(config)
        if not Path(config).expanduser().is_file():
            raise ValueError(
                f"{caller}: `config` must be a config file, but there is none at {config}. Check the path."
            )
        config = Config.fromfile(str(Path(config).expanduser()))
    elif not isinstance(config, Config):
        raise TypeError(
            f"{caller}: `config` must be the path of a config or MMEngine's Config, got {type(config).__name__}. "
            f"Use Config.fromfile(...)."
        )
    elif config.get("custom_imports"):
        import_modules_from_strings(**config.custom_imports)
    if not isinstance(config.get("model"), Mapping):
        raise ValueError(f"{caller}: {where} must have a `model`, but it has none. Name the config of the training.")
    pixel_range, flip = _host_pixels(caller, config, channel_order)
    model = copy.deepcopy(dict(config.model))
    model.setdefault("data_preprocessor", copy.deepcopy(config.get("data_preprocessor")))
    with DefaultScope.overwrite_default_scope(config.get("default_scope") or "mmpretrain"):
        kind = model.get("type")
        # A classifier that trains another one says of which class its checkpoints are.
        plain_config = getattr(MODELS.get(kind) if isinstance(kind, str) else kind, "plain_config", None)
        if plain_config is not None:
            model = plain_config(model)
        classifier = MODELS.build(model)
    content = load_content(checkpoint)
    weights = _kept(weights_in(content, checkpoint, averaged=averaged))
    load_strictly(caller, classifier, weights, checkpoint, f"`model` of {where}")
    return HostClassifier(classifier, pixel_range, flip).to(device).eval()


def from_torchdistill(config: Path | str, checkpoint: Path | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a torchdistill YAML file, behind images in [0, 1].

    Args:
        config: the file. It is trusted: its ``!import_call`` entries are run, and so the data sets must be there.
        checkpoint: what the training has written to ``dst_ckpt``.
        device: where the model goes.

    Returns:
        A module in eval mode: images in [0, 1] in, what the model gives for them out. Where the transform of the test
        data set ends with ``Normalize``, the model is inside :class:`Normalised`; else it is the model itself. Of the
        transform nothing else is repeated: pass images as they are after its resizing and cropping.

    Raises:
        ImportError: torchdistill, or one of the file's ``dependencies``, is not installed.
        ValueError: a file is missing or damaged, or lacks a block; weights do not fit; the test data set does not turn
            images into tensors in [0, 1], or changes their values by more than ``Normalize``.
    """
    caller = "from_torchdistill"
    try:
        import yaml
        from torchdistill.common.main_util import import_dependencies
        from torchdistill.common.yaml_util import load_yaml_file
        from torchdistill.models.official import get_image_classification_model
        from torchdistill.models.registry import get_model
    except ImportError as error:
        raise ImportError(
            f"{caller} needs torchdistill, but `{error.name}` is missing. Run: pip install 'ikl_plugins[torchdistill]'",
            name=error.name,
        ) from error
    if not Path(config).expanduser().is_file():
        raise ValueError(f"{caller}: `config` must be a YAML file, but there is none at {config}. Check the path.")
    try:
        content = load_yaml_file(os.fspath(Path(config).expanduser()))
    except yaml.YAMLError as error:
        raise ValueError(f"{caller}: {config} must be a YAML file, but it is not: {error}. Correct it.") from error
    except (OSError, RuntimeError) as error:  # of a data set that is built while the file is read
        raise ValueError(
            f"{caller}: {config} must name data that is there, but reading it gave: {error}. Prepare the data first."
        ) from error
    import_dependencies(content.get("dependencies") if isinstance(content, Mapping) else None)
    named = _block(content, "models", "student_model") or _block(content, "models", "model")
    identity = _block(content, "test", "test_data_loader", "dataset_id")
    dataset = _block(content, "datasets", identity)
    if named is None or dataset is None:
        missing = "`models: student_model:` or `models: model:`" if named is None else "the data set of its `test:`"
        raise ValueError(f"{caller}: {config} must have {missing}, but it has none. Name the file of the training.")
    statistics = _transform_statistics(caller, dataset, identity)
    network = get_image_classification_model(named)
    if network is None:
        network = get_model(named["key"], named.get("repo_or_dir"), **(named.get("kwargs") or {}))
    weights = weights_in(load_content(checkpoint), checkpoint)
    load_strictly(caller, network, weights, checkpoint, f"the model '{named['key']}' of {config}")
    return (network if statistics is None else Normalised(network, *statistics)).to(device).eval()


# --- names -----------------------------------------------------------------------------------------------------------

Statistics = tuple[Sequence[float], Sequence[float]]


def _named(
    caller: str, name: str, dataset: str, num_classes: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Callable[[], nn.Module], Statistics | None]:
    """What builds a network by its name, and the normalisation around it if there is one."""
    given = None if mean is None or std is None else (mean, std)
    if name in models.__all__:
        if given is None and dataset != "cifar100":
            raise ValueError(
                f"{caller}: `mean` and `std` must be given for {name} on {dataset}, as the network does not say with "
                f"which it was trained, got none. Give those of the training, for pixels in [0, 1]."
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
    return functools.partial(architecture.build, num_classes, dataset=dataset, mean=mean, std=std), None


# --- weights ---------------------------------------------------------------------------------------------------------


def _kept(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the class statistics of a training."""
    return {name: tensor for name, tensor in weights.items() if _PRIOR.fullmatch(name) is None}


def _way_out(weights: dict[str, Tensor], architecture: str, num_classes: int, misfit: Misfit) -> str:
    """What may help where weights do not fit a network that was named."""
    theirs = class_count(weights)
    last = all(name.rpartition(".")[0] in LAST_LAYERS for name in misfit.shapes)
    if theirs not in (None, num_classes) and last and not misfit.missing and not misfit.unexpected:
        return f"It has {theirs} classes and not {num_classes}: give its `dataset`, or num_classes={theirs}."
    nearest = nearest_architecture(weights)
    if nearest is None:
        return "It looks like no network known by name; use from_mmpretrain or from_torchdistill with its config."
    if nearest == architecture:
        return "The file is not whole, or its network was changed."
    return f"It looks like architecture='{nearest}'."


# --- MMPretrain ------------------------------------------------------------------------------------------------------

_LOADERS = ("test_dataloader", "val_dataloader", "train_dataloader")
_READS_BGR = ("LoadImageFromFile",)
_HOLDS_RGB = ("CIFAR10", "CIFAR100")
_SCALES = ("ToTensor", "ConvertImageDtype", "ToDtype")  # of torchvision: from bytes to [0, 1]
_ORDERS = ("rgb", "bgr")
_ROUNDING = 1e-4  # what writing a mean of 255 grey levels with two digits moves it in [0, 1]


def _host_pixels(caller: str, config: Mapping[str, Any], channel_order: str | None) -> tuple[float, bool]:
    """The value of white before the data preprocessor, and whether it gets BGR."""
    if channel_order not in (None, *_ORDERS):
        raise ValueError(f"{caller}: `channel_order` must be 'rgb', 'bgr' or None, got {channel_order!r}. Use 'bgr'.")
    pixel_range = check.check_number(caller, "pixel_range", config["model"].get("pixel_range", 255.0), positive=True)
    steps = list(_typed(next((config[name] for name in _LOADERS if config.get(name)), None)))
    names = [_type_name(step) for step in steps]
    changing = ("Normalize",) if pixel_range == 1.0 else ("Normalize", *_SCALES)
    for name in names:
        if name in changing:
            raise ValueError(
                f"{caller}: the test pipeline must leave pixels as bytes for `data_preprocessor`, got {name}. Drop it "
                f"there and give `data_preprocessor` the mean and std that have its effect."
            )
    if channel_order is not None:
        return pixel_range, channel_order == "bgr"
    turns = any(step.get("to_rgb") or step.get("to_bgr") for step in steps)
    bgr, rgb = (any(name in known for name in names) for known in (_READS_BGR, _HOLDS_RGB))
    if turns or not (bgr or rgb):
        raise ValueError(
            f"{caller}: `channel_order` must be given, because the test pipeline does not say whether it hands on RGB "
            f"or BGR, got None. Use 'bgr' for images that MMCV reads, 'rgb' where the data preprocessor gets RGB."
        )
    return pixel_range, bgr


def _typed(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping with a type inside a config, such as data sets and the steps of pipelines."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from _typed(entry)


def _type_name(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    return re.split(r"[./]", kind if isinstance(kind, str) else getattr(kind, "__name__", ""))[-1]


def _check_stored_config(caller: str, content: Any, path: Path | str, name: str, outer: Statistics | None) -> None:
    """Refuses a checkpoint of MMPretrain whose own config prepares images otherwise than ``outer`` does."""
    config = _stored_config(content)
    model = config.get("model")
    if not isinstance(model, Mapping):
        return
    preprocessor = model.get("data_preprocessor") or config.get("data_preprocessor") or {}
    white = model.get("pixel_range") or 255.0
    bgr = not preprocessor.get("to_rgb") and any(
        _type_name(step) in _READS_BGR for step in _typed(config.get("test_dataloader"))
    )
    mean, std = (preprocessor.get(key) or [default] * 3 for key, default in (("mean", 0.0), ("std", 1.0)))
    if not all(isinstance(value, (int, float)) for value in (*mean, *std, white)):
        return  # what is no number here says nothing
    mean, std = [value / white for value in mean], [value / white for value in std]
    expected = ([0.0] * 3, [1.0] * 3) if outer is None else outer
    pairs = zip([*mean, *std], [*expected[0], *expected[1]], strict=False)
    if len(mean) == len(std) == 3 and not bgr and all(abs(theirs - ours) <= _ROUNDING for theirs, ours in pairs):
        return
    shown = [f"({', '.join(f'{value:.4g}' for value in values)})" for values in (mean, std)]
    ours = "as they are" if outer is None else f"with mean {tuple(outer[0])} and std {tuple(outer[1])}"
    inside = name.startswith("DM")  # mean and std would be those inside the network, which the config's precede
    way_out = "" if bgr or inside else f", or give mean={shown[0]}, std={shown[1]}"
    raise ValueError(
        f"{caller}: the checkpoint {path} must have been trained on RGB images in [0, 1] {ours} to be a {name}, but by "
        f"its own config on {'BGR' if bgr else 'RGB'} images with mean {shown[0]} and std {shown[1]}. Use "
        f"from_mmpretrain(config, checkpoint){way_out}."
    )


def _stored_config(content: Any) -> dict[str, Any]:
    """The plain values of the config that a checkpoint of MMEngine has as text; nothing of it is run."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(text, str):
        return {}
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return {}
    return {
        statement.targets[0].id: _plain(statement.value)
        for statement in body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def _plain(node: ast.expr) -> Any:
    """``dict(...)``, literals and what is made of them; None for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _plain(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if isinstance(node, ast.Dict):
        return {
            key.value: _plain(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(entry) for entry in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


# --- torchdistill ----------------------------------------------------------------------------------------------------

_TO_TENSOR = ("ToTensor", "ConvertImageDtype", "ToDtype")  # the last step gives floating values in [0, 1]
_TO_BYTES = ("PILToTensor", "ToImage")
_GEOMETRY = ("Resize", "CenterCrop")


def _block(content: Any, *keys: Any) -> Any:
    """What a config has under nested keys; None where it ends before."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _transform_statistics(caller: str, dataset: Any, identity: Any) -> Statistics | None:
    """Mean and std of the ``Normalize`` at the end of a data set's transform, None if there is none."""
    inner = dataset
    while getattr(inner, "transform", None) is None and hasattr(inner, "dataset"):
        inner = inner.dataset
    steps = list(_flat(getattr(inner, "transform", None)))
    names = [type(step).__name__ for step in steps]
    start = next((place for place, name in enumerate(names) if name in (*_TO_TENSOR, *_TO_BYTES)), len(names))
    rest = [name for name in names[start:] if name not in _TO_BYTES]
    tensors = [name for name in rest if name not in _GEOMETRY]
    scaled = bool(tensors) and tensors[0] in _TO_TENSOR
    if not scaled or tensors[1:] not in ([], ["Normalize"]) or (rest[-1] in _GEOMETRY and "Normalize" in tensors):
        raise ValueError(
            f"{caller}: the transform of the test data set '{identity}' must make tensors in [0, 1] of images, and "
            f"then at most resize, crop and normalise them once, got {', '.join(names) or 'none'}. End it with "
            f"ToTensor and, if the model wants it, Normalize."
        )
    if "Normalize" not in names:
        return None
    normalise = steps[names.index("Normalize")]
    return check_statistics(caller, _numbers(normalise.mean), _numbers(normalise.std))


def _flat(transform: Any) -> Iterator[Any]:
    """The steps of a transform, those of nested ``Compose`` one by one."""
    if transform is None:
        return
    if type(transform).__name__ == "Compose":
        for step in transform.transforms:
            yield from _flat(step)
        return
    yield transform


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values]
