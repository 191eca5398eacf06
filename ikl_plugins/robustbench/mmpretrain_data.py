"""The test data of an MMPretrain config as its classifier gets them, before the data preprocessor."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import _validation as check
from .._files import check_config_text
from .host_steps import PROBE_SIZE, check_steps, flat, library_name, probe

__all__ = ["HostPixels", "MMPretrainData", "host_pixels", "host_scope", "read_mmpretrain_config"]

_KEY = "`test_dataloader.dataset`"
_PIPELINE = "`test_dataloader.dataset.pipeline`"
_LOADERS = ("test_dataloader", "val_dataloader")
_LOADER = "mmcv.LoadImageFromFile"
# Data sets that hold images themselves, and the order of their channels.
_HELD = {"CIFAR10": "rgb", "CIFAR100": "rgb", "MNIST": "grey", "FashionMNIST": "grey"}
_SUFFIXES = {"turbojpeg": ".jpg", "tifffile": ".tif"}  # of backends that read nothing else

Array = np.ndarray[Any, Any]


class HostPixels(NamedTuple):
    """What the data preprocessor gets.

    Attributes:
        white: the value of white.
        bgr: whether channels come as BGR.
        channels: how many, None where no pipeline says it.
    """

    white: float
    bgr: bool
    channels: int | None


def read_mmpretrain_config(caller: str, config: Any) -> Any:
    """MMEngine's ``Config`` of a path or of itself, after its imports.

    Raises:
        ImportError: MMPretrain, or a module that the config imports, is not installed.
        TypeError: neither a path nor a config.
        ValueError: there is no such file.
    """
    try:
        import mmpretrain.registry  # noqa: F401
        from mmengine.config import Config
        from mmengine.utils import import_modules_from_strings
    except ImportError as error:
        raise ImportError(
            f"{caller} needs MMPretrain, but `{error.name}` is missing. Run: pip install 'ikl_plugins[mmpretrain]'",
            name=error.name,
        ) from error
    if isinstance(config, (str, Path)):
        if not Path(config).expanduser().is_file():
            raise ValueError(f"{caller}: `config` must be a file, but there is none at {config}.")
        check_config_text(caller, config)
        return Config.fromfile(str(Path(config).expanduser()))
    if not isinstance(config, Config):
        raise TypeError(
            f"{caller}: `config` must be a path or MMEngine's Config, got {type(config).__name__}. "
            f"Use Config.fromfile(...)."
        )
    if config.get("custom_imports"):
        import_modules_from_strings(**config.custom_imports)
    return config


def host_scope(config: Any) -> AbstractContextManager[Any]:
    """In which the names of a config are looked up."""
    from mmengine.registry import DefaultScope

    scope: AbstractContextManager[Any] = DefaultScope.overwrite_default_scope(
        config.get("default_scope") or "mmpretrain"
    )
    return scope


def host_pixels(caller: str, config: Any, channel_order: str | None) -> HostPixels:
    """What the test pipeline hands to the data preprocessor; no image is read.

    Raises:
        ValueError: a step that may change pixel values; an order of channels that cannot be told; a ``pixel_range`` of
            the model that is not the pipeline's white.
    """
    if channel_order not in (None, "rgb", "bgr"):
        raise ValueError(f"{caller}: `channel_order` must be 'rgb', 'bgr' or None, got {channel_order!r}. Use 'bgr'.")
    told = (config.get("model") or {}).get("pixel_range")
    if told is not None:
        check.check_number(caller, "pixel_range", told, positive=True)
    with host_scope(config):
        found = {_leaf_pixels(caller, leaf, channel_order) for leaf in _leaves(_dataset_config(config))}
    if len(found) > 1:
        raise ValueError(f"{caller}: {_KEY} must have pipelines with one range and order, got {sorted(found)}.")
    if not found:
        if channel_order is None:
            raise _hidden(caller)
        return HostPixels(told or 255.0, channel_order == "bgr", None)
    pixels = found.pop()
    if told not in (None, pixels.white):
        raise ValueError(
            f"{caller}: `model.pixel_range` must be white after the test pipeline, {pixels.white:g}, got {told:g}."
        )
    return pixels


def _dataset_config(config: Any) -> Any:
    loader = next((config[name] for name in _LOADERS if config.get(name)), None)
    return loader.get("dataset") if isinstance(loader, Mapping) else None


def _leaves(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The configs of the data sets inside wrappers such as ConcatDataset and KFoldDataset."""
    if not isinstance(dataset, Mapping):
        return
    inner = dataset.get("datasets") or ([dataset["dataset"]] if dataset.get("dataset") else None)
    if inner is None:
        yield dataset
    for one in inner or ():
        yield from _leaves(one)


def _built_steps(leaf: Mapping[str, Any]) -> list[Any]:
    from mmpretrain.registry import TRANSFORMS

    built = [
        TRANSFORMS.build(copy.deepcopy(step)) if isinstance(step, Mapping) else step
        for step in leaf.get("pipeline") or ()
    ]
    return [step for outer in built for step in flat(outer)]


def _held_order(leaf: Mapping[str, Any]) -> str | None:
    kind = leaf["type"]
    name = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return str(leaf.get("channel_order", "bgr")) if name == "GeneratedImages" else _HELD.get(name)


def _hidden(caller: str) -> ValueError:
    return ValueError(
        f"{caller}: `channel_order` must be given, as the test pipeline hides it. Use 'bgr' for MMCV, or 'rgb'."
    )


def _leaf_pixels(caller: str, leaf: Mapping[str, Any], channel_order: str | None) -> HostPixels:
    steps = _built_steps(leaf)
    check_steps(caller, _PIPELINE, steps, "Let `data_preprocessor` normalise.")
    order = "file" if any(library_name(step) == _LOADER for step in steps) else _held_order(leaf) or channel_order
    if order is None:
        raise _hidden(caller)

    def show(colour: tuple[int, int, int]) -> Tensor:
        pixels = np.broadcast_to(np.array(colour, np.uint8), (PROBE_SIZE, PROBE_SIZE, 3))
        inputs = _run(steps, pixels, order).get("inputs")
        if not isinstance(inputs, Tensor) or inputs.dim() != 3:
            raise ValueError(f"{caller}: {_PIPELINE} must end with one image, got {check.kind_of(inputs)}.")
        return inputs

    shown = probe(caller, _PIPELINE, show)
    if channel_order is not None:
        shown = shown._replace(bgr=channel_order == "bgr" and shown.channels == 3)
    return HostPixels(shown.white, shown.bgr, shown.channels)


def _run(steps: Sequence[Any], pixels: Array, order: str) -> dict[str, Any]:
    """What a pipeline makes of an image of RGB bytes (H, W, 3), as a file or in the order of its data set."""
    results: dict[str, Any] = {"gt_label": 0, "sample_idx": 0}
    with tempfile.TemporaryDirectory() as folder:
        if order == "file":
            from PIL import Image

            loader = next(step for step in steps if library_name(step) == _LOADER)
            path = Path(folder) / f"image{_SUFFIXES.get(loader.imdecode_backend, '.png')}"
            Image.fromarray(pixels).save(path)
            results["img_path"] = str(path)
        else:
            image = {"grey": pixels[..., 0], "bgr": pixels[..., ::-1]}.get(order, pixels)
            results.update(img=np.ascontiguousarray(image), img_shape=image.shape[:2], ori_shape=image.shape[:2])
        for step in steps:
            if library_name(step) == _LOADER:  # the image is on this disk, wherever those of the data set are
                step = copy.copy(step)
                step.file_client_args = step.backend_args = None
            results = step(results)
    return results


class MMPretrainData:
    """The test data of a config: see :mod:`.host_data` for what its methods are for.

    Args:
        caller: whom errors name.
        config: a path or MMEngine's ``Config``.
        channel_order: see :func:`~ikl_plugins.robustbench.from_mmpretrain`.
    """

    host = "MMPretrain"

    def __init__(self, caller: str, config: Any, channel_order: str | None = None) -> None:
        self.config = read_mmpretrain_config(caller, config)
        self._caller = caller
        self._pixels = host_pixels(caller, self.config, channel_order)
        self._built: Any = None
        leaf = next(_leaves(_dataset_config(self.config)), None)
        self._steps = []
        self._order: str | None = None
        if leaf is not None:
            with host_scope(self.config):
                self._steps = _built_steps(leaf)
            self._order = _held_order(leaf) or channel_order
            if any(library_name(step) == _LOADER for step in self._steps):
                self._order = "file"
        kind = "test data" if leaf is None else leaf["type"]
        file = self.config.filename
        self.name = f"{kind if isinstance(kind, str) else kind.__name__}{f' of {Path(file).name}' if file else ''}"
        self.channels = self._pixels.channels
        self.reads_files = self._order == "file"

    @property
    def dataset(self) -> Any:
        """The data set of the test, built when it is first asked for."""
        from mmpretrain.registry import DATASETS

        if self._built is None:
            loader = self.config.get("test_dataloader")
            if not isinstance(loader, Mapping) or not isinstance(loader.get("dataset"), Mapping):
                raise ValueError(f"{self._caller}: the config must have {_KEY}, but has none. Name the data.")
            with host_scope(self.config):
                try:
                    self._built = DATASETS.build(copy.deepcopy(loader["dataset"]))
                    self._built.full_init()
                except (AssertionError, OSError, RuntimeError) as error:
                    reason = " ".join(str(error).split())
                    raise ValueError(f"{self._caller}: {_KEY} must be there, but reading it gave: {reason}") from error
        return self._built

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes; the data set is read only where its config does not say them."""
        from mmpretrain.registry import DATASETS

        for leaf in _leaves(_dataset_config(self.config)):
            names = None
            with host_scope(self.config), contextlib.suppress(TypeError):  # of a class that knows no lazy_init
                names = DATASETS.build({**copy.deepcopy(leaf), "lazy_init": True}).metainfo.get("classes")
            if names is None:
                with contextlib.suppress(ValueError):  # the data may be elsewhere; the checkpoint may know the names
                    names = self.dataset.metainfo.get("classes")
            return None if names is None else tuple(map(str, names))
        return None

    def folders(self) -> tuple[str, ...] | None:
        found: dict[int, set[str]] = {}
        if not self.reads_files:  # others may be downloaded when they are built
            return None
        with contextlib.suppress(ValueError):  # the data may be elsewhere
            for index in range(len(self.dataset)):
                info = self.dataset.get_data_info(index)
                if isinstance(info.get("img_path"), str) and isinstance(info.get("gt_label"), (int, np.integer)):
                    found.setdefault(int(info["gt_label"]), set()).add(Path(info["img_path"]).parent.name)
        names = tuple(name for label in sorted(found) for name in found[label])
        one_each = len(set(names)) == len(names) == len(found) and sorted(found) == list(range(len(found)))
        return names if names and one_each else None

    def labels(self) -> list[int] | None:
        return [int(self.dataset.get_data_info(index)["gt_label"]) for index in range(len(self.dataset))]

    def positions(self) -> Sequence[int]:
        return range(len(self.dataset))

    def own(self, position: int) -> Any:
        return self.dataset[position]

    def read(self, position: int) -> tuple[Tensor, int]:
        sample = self.own(position)
        label = getattr(sample["data_samples"], "gt_label", None)
        if not isinstance(label, Tensor) or label.numel() != 1:
            raise ValueError(f"{self._caller}: {_KEY} must have one label an image, got {check.kind_of(label)}.")
        return self._in_0_1(sample["inputs"]), int(label)

    def file(self, position: int) -> str | None:
        path = self.dataset.get_data_info(position).get("img_path")
        return None if path is None else str(path)

    def of_file(self, path: Path) -> tuple[Tensor, Any]:
        results: dict[str, Any] = {"img_path": str(path), "gt_label": 0, "sample_idx": 0}
        for step in self._steps:
            results = step(results)
        return self._in_0_1(results["inputs"]), results

    def sized(self, pixels: Tensor) -> Tensor:
        if self._order is None or len(pixels) not in (1, 3):
            return pixels
        array = (255 * pixels).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
        return self._in_0_1(_run(self._steps, np.ascontiguousarray(array), self._order)["inputs"])

    def of_pixels(self, pixels: Tensor) -> Any:
        from mmpretrain.structures import DataSample

        return {"inputs": self._turned(self._pixels.white * pixels), "data_samples": DataSample()}

    def predict(self, model: nn.Module, samples: Sequence[Any]) -> Tensor:
        from mmengine.dataset import pseudo_collate

        classifier: Any = getattr(model, "classifier", None)
        if not hasattr(classifier, "test_step"):
            raise TypeError(
                f"{self._caller}: `model` must be from_mmpretrain's, got {type(model).__name__}. Leave out `config`."
            )
        outputs = classifier.test_step(pseudo_collate(list(samples)))
        labels = [sample.pred_label for sample in outputs]
        if any(label.numel() != 1 for label in labels):
            raise ValueError(
                f"{self._caller}: the classifier must predict one label an image, got {labels[0].tolist()}. Use "
                "another head."
            )
        return torch.cat([label.reshape(1) for label in labels]).cpu()

    def _in_0_1(self, inputs: Tensor) -> Tensor:
        return self._turned(inputs.float() / self._pixels.white)

    def _turned(self, image: Tensor) -> Tensor:
        return image.flip(0) if self._pixels.bgr and len(image) == 3 else image
