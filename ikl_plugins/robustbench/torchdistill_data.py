"""The test data of a torchdistill YAML file as its network gets them, before the normalisation."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _validation as check
from .._files import check_config_text
from .._limits import check_image
from ..models.robustbench_zoo import Statistics
from .host_steps import PROBE_SIZE, check_steps, flat, library_name, probe

__all__ = ["TorchdistillData", "block", "read_torchdistill_config"]

_NORMALIZE = "torchvision.Normalize"
_INNER = ("dataset", "datasets", "org_dataset")  # of wrappers of data sets, torchdistill's own among them


def read_torchdistill_config(caller: str, config: Any) -> Mapping[str, Any]:
    """The content of a YAML file, its data sets built and its dependencies imported; content that is read already.

    Raises:
        ImportError: torchdistill, or one of the file's ``dependencies``, is not installed.
        TypeError: neither a path nor a mapping.
        ValueError: a file that is missing or no YAML, or whose data are not there.
    """
    try:
        import yaml
        from torchdistill.common.main_util import import_dependencies
        from torchdistill.common.yaml_util import load_yaml_file
        from torchdistill.models.registry import get_model  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller} needs torchdistill, but `{error.name}` is missing. Run: pip install 'ikl_plugins[torchdistill]'",
            name=error.name,
        ) from error
    content = config
    if not isinstance(config, Mapping):
        if not isinstance(config, (str, Path)):
            raise TypeError(
                f"{caller}: `config` must be a path or what torchdistill's load_yaml_file gives, got "
                f"{type(config).__name__}."
            )
        if not Path(config).expanduser().is_file():
            raise ValueError(f"{caller}: `config` must be a file, but there is none at {config}.")
        try:
            check_config_text(caller, config)
            content = load_yaml_file(os.fspath(Path(config).expanduser()))
        except yaml.YAMLError as error:
            raise ValueError(f"{caller}: {config} must be YAML, but reading it gave: {error}. Correct it.") from error
        except (OSError, RuntimeError) as error:  # of a data set that is built while the file is read
            raise ValueError(
                f"{caller}: {config} must name data that is there, but loading it gave: {error}."
            ) from error
    where = _where(config)
    import_dependencies(content.get("dependencies") if isinstance(content, Mapping) else None)
    missing = [
        what
        for what, found in {
            "`models: student_model:` or `models: model:`": student(content),
            "the data set of its `test:`": block(content, "datasets", _identity(content)),
        }.items()
        if found is None
    ]
    if missing:
        raise ValueError(f"{caller}: {where} must have {missing[0]}, but has none. Name the training's file.")
    found: Mapping[str, Any] = content
    return found


def _where(config: Any) -> str:
    return "the file" if isinstance(config, Mapping) else str(config)


def block(content: Any, *keys: Any) -> Any:
    """What a config has under nested keys; None where it ends before."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def student(content: Any) -> Any:
    """The block of the network that is trained."""
    return block(content, "models", "student_model") or block(content, "models", "model")


def _identity(content: Any) -> Any:
    return block(content, "test", "test_data_loader", "dataset_id")


class _Leaf(NamedTuple):
    """A data set that has a transform, the whole of it and its part before ``normalize``, and what they do."""

    dataset: Any
    whole: Callable[..., Any]
    before: Callable[..., Any]
    steps: Sequence[Any]
    normalize: Any
    white: float
    statistics: Statistics | None


class TorchdistillData:
    """The test data of a YAML file: see :mod:`.host_data` for what its methods are for.

    Args:
        caller: whom errors name.
        config: a path, or the content that was read from it.

    Attributes:
        content: of the file.
        where: what messages call the file.
        white: the value of white in what the transform makes before ``Normalize``.
        statistics: mean and std of ``Normalize`` for images in [0, 1], None where nothing is left to do.

    Raises:
        ValueError: a step that may change pixel values, or something after ``Normalize``; images that are not floats.
    """

    host = "torchdistill"
    reads_files = True

    def __init__(self, caller: str, config: Any) -> None:
        self.content = read_torchdistill_config(caller, config)
        self._caller = caller
        self.where = _where(config)
        self.name = str(_identity(self.content))
        self._dataset = self.content["datasets"][_identity(self.content)]
        self._leaves: list[_Leaf] = []
        self._before_normalize = self._cut(self._dataset)
        found = {(leaf.white, leaf.statistics) for leaf in self._leaves}
        if len(found) != 1:
            raise ValueError(
                f"{caller}: the data sets in '{self.name}' must be normalised alike, got {sorted(map(str, found))}."
            )
        self.white, self.statistics = found.pop()

    # --- the transform -----------------------------------------------------------------------------------------------

    def _cut(self, dataset: Any, inside: bool = False) -> Any:
        """A copy of a data set, and of those inside it, whose images are not normalised."""
        made = copy.copy(dataset)
        transform, joint = getattr(dataset, "transform", None), getattr(dataset, "transforms", None)
        standard = library_name(joint) == "torchvision.StandardTransform"  # the transform again
        if joint is not None and not standard:
            transform = joint
        inner = {
            name: getattr(dataset, name) for name in _INNER if hasattr(getattr(dataset, name, None), "__getitem__")
        }
        if transform is not None or not (inner or inside):
            if inside:
                raise ValueError(f"{self._caller}: '{self.name}' must have one transform, got one inside another.")
            leaf = self._leaf(dataset, transform)
            self._leaves.append(leaf)
            try:
                if standard:
                    made.transforms = copy.copy(joint)
                    made.transforms.transform = leaf.before
                elif joint is not None:
                    made.transforms = leaf.before
                if getattr(dataset, "transform", None) is not None:
                    made.transform = leaf.before
            except AttributeError as error:  # a property that cannot be set
                raise ValueError(
                    f"{self._caller}: the transform of '{self.name}' must be an attribute that can be set, but {error}."
                ) from error
        for name, one in inner.items():
            deeper = inside or transform is not None
            several = isinstance(one, (list, tuple))
            setattr(made, name, [self._cut(each, deeper) for each in one] if several else self._cut(one, deeper))
        return made

    def _leaf(self, dataset: Any, transform: Any) -> _Leaf:
        from PIL import Image
        from torchvision.transforms import v2

        key = f"the transform of '{self.name}'"
        if transform is None:
            raise ValueError(
                f"{self._caller}: '{self.name}' must make tensors by its `transform`, but "
                f"{type(dataset).__name__} has none. Put the steps there."
            )
        steps = list(flat(transform))
        whole = v2.Compose([*steps] or [nn.Identity()])  # of image and label, too
        while steps and library_name(steps[-1]) in ("torchvision.ToPureTensor", "torchvision.Identity"):
            steps.pop()  # torchvision's own recipes end so
        normalize = steps.pop() if steps and library_name(steps[-1]) == _NORMALIZE else None
        check_steps(self._caller, key, steps, "Normalize once, at the end.")
        before: Callable[..., Any] = v2.Compose(steps or [nn.Identity()])

        def show(colour: tuple[int, int, int]) -> Tensor:
            shown = before(_first(steps, Image.new("RGB", (PROBE_SIZE, PROBE_SIZE), colour)))
            if not isinstance(shown, Tensor) or not shown.is_floating_point():
                names = ", ".join(type(step).__name__ for step in steps) or "none"
                raise ValueError(
                    f"{self._caller}: {key} must make floating tensors, got {check.kind_of(shown)} from {names}. "
                    "Add ToTensor."
                )
            return shown

        white = probe(self._caller, key, show).white
        statistics = None
        if normalize is not None or white != 1:
            mean, std = ([0.0], [1.0]) if normalize is None else (normalize.mean, normalize.std)
            statistics = tuple(float(one) / white for one in mean), tuple(float(one) / white for one in std)
        return _Leaf(dataset, whole, before, steps, normalize, white, statistics)

    # --- what the data set has ---------------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        return len(self.read(self.positions()[0])[0])

    @property
    def classes(self) -> tuple[str, ...] | None:
        found = {_class_names(leaf.dataset) for leaf in self._leaves}
        return found.pop() if len(found) == 1 else None

    def folders(self) -> tuple[str, ...] | None:
        return None

    def labels(self) -> list[int] | None:
        return _labels(self._dataset)

    def positions(self) -> Sequence[int]:
        settings = block(self.content, "test", "test_data_loader")
        for key in ("dataset_wrapper", "collate_fn", "batch_sampler"):
            if settings.get(key):
                raise ValueError(
                    f"{self._caller}: `test: test_data_loader:` must have no {key}, got {settings[key]!r}. Name the "
                    "data."
                )
        sampler = settings.get("sampler") or {}
        if "class_or_func" not in sampler:
            return range(len(self._dataset))
        return sorted(set(sampler["class_or_func"](self._dataset, **(sampler.get("kwargs") or {}))))

    def own(self, position: int) -> Any:
        return self._dataset[position][0]

    def read(self, position: int) -> tuple[Tensor, int]:
        path = _path(self._dataset, position)
        if path is not None and Path(path).exists():
            check_image(self._caller, path)
        image, label, *_ = self._before_normalize[position]
        if not isinstance(label, int) and not (hasattr(label, "item") and getattr(label, "size", 1) in (1, ())):
            raise ValueError(f"{self._caller}: '{self.name}' must have one label an image, got {check.kind_of(label)}.")
        return self._in_0_1(image), int(label)

    def file(self, position: int) -> str | None:
        return None

    def of_file(self, path: Path) -> tuple[Tensor, Any]:
        from torchvision.datasets.folder import default_loader

        leaf = self._outside()
        image = getattr(leaf.dataset, "loader", default_loader)(str(path))
        return self._in_0_1(leaf.before(image)), leaf.whole(image)

    def sized(self, pixels: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        leaf = self._outside()
        return self._in_0_1(leaf.before(_first(leaf.steps, to_pil_image(pixels)))) if len(pixels) in (1, 3) else pixels

    def _outside(self) -> _Leaf:
        """How the data set makes its images, where that can be done with others."""
        from torchvision.datasets import DatasetFolder

        leaf = self._leaves[0]
        kind = type(leaf.dataset)
        known = getattr(kind, "__getitem__", None) is DatasetFolder.__getitem__
        if not known and not library_name(leaf.dataset).startswith("torchvision."):
            raise ValueError(
                f"{self._caller}: '{self.name}' must read images as torchvision does, but {kind.__name__} has a way of "
                "its own. Leave out --data."
            )
        return leaf

    def of_pixels(self, pixels: Tensor) -> Any:
        normalize = self._leaves[0].normalize
        inputs = self.white * pixels
        return inputs if normalize is None else normalize(inputs.clone())

    def predict(self, model: nn.Module, samples: Sequence[Any]) -> Tensor:
        from .loading import Normalised

        network = getattr(model, "_orig_mod", model)  # of a compiled one
        if self.statistics is not None:
            if not isinstance(network, Normalised):
                raise TypeError(
                    f"{self._caller}: `model` must be from_torchdistill's, got {type(network).__name__}. Leave out "
                    "`config`."
                )
            network = network.network
        place = next(iter(network.parameters()), torch.empty(0)).device
        logits: Tensor = network(torch.stack(list(samples)).to(place))
        return logits.argmax(1).cpu()

    def _in_0_1(self, image: Tensor) -> Tensor:
        return image.float().as_subclass(torch.Tensor) / self.white


def _first(steps: Sequence[Any], image: Any) -> Any:
    """The image as the first step takes it: ``ToPILImage`` is for data sets of arrays."""
    import numpy as np

    return np.asarray(image) if steps and library_name(steps[0]) == "torchvision.ToPILImage" else image


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names of the classes by label; None where there are none, or labels are changed in another way."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str):
        return None
    change = getattr(dataset, "target_transform", None) or int
    numbers = getattr(dataset, "class_to_idx", None)
    if not isinstance(numbers, Mapping) or not all(isinstance(name, str) and name in numbers for name in names):
        numbers = dict(zip(names, range(len(names)), strict=True))
    places = {int(change(numbers[name])): str(name) for name in names}
    return tuple(places[place] for place in range(len(names))) if set(places) == set(range(len(names))) else None


def _path(dataset: Any, position: int) -> str | None:
    """The file of an image, as torchvision's folders and their wrappers know it; None where they do not."""
    for part in getattr(dataset, "datasets", None) or ():
        if position < len(part):
            return _path(part, position)
        position -= len(part)
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return _path(dataset.dataset, dataset.indices[position])
    if hasattr(dataset, "org_dataset"):
        return _path(dataset.org_dataset, position)
    samples = getattr(dataset, "samples", None)
    sample = samples[position] if isinstance(samples, list) and position < len(samples) else None
    return sample[0] if isinstance(sample, tuple) and sample and isinstance(sample[0], str) else None


def _labels(dataset: Any) -> list[int] | None:
    """The class indices of a data set in memory, None where they would have to be read."""
    if isinstance(getattr(dataset, "datasets", None), Sequence):
        parts = [_labels(one) for one in dataset.datasets]
        return None if None in parts else [label for part in parts for label in part or ()]
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = _labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    targets = getattr(dataset, "targets", None)
    if targets is None:
        return None
    change = getattr(dataset, "target_transform", None) or int
    return [int(change(target)) for target in targets]
