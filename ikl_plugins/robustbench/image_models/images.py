"""The images of a model as its library makes them, with labels in its order of classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ... import _validation as check
from ..._robustbench_import import import_robustbench
from ..data import DATASETS, Images, content_sha256, load_images
from ..loading import DATASET_CLASSES
from .model import ImageModel

__all__ = ["images_for"]

_CALLER = "images_for"
_LIST = Path("helper_files", "imagenet_class_to_id_map.json")  # of RobustBench


def images_for(
    model: ImageModel,
    source: str | Path,
    *,
    data_dir: str | Path = "data",
    n_examples: int | None = None,
    offline: bool = False,
    preprocessing: str | None = None,
) -> Images:
    """The images of a source for a model, made as its library makes them.

    Args:
        model: of :func:`from_timm`, :func:`from_torchvision` or :func:`from_huggingface`.
        source: this, ``data_dir``, ``n_examples`` and ``offline`` as of :func:`~ikl_plugins.robustbench.load_images`.
        data_dir: see ``source``.
        n_examples: see ``source``.
        offline: see ``source``.
        preprocessing: one of RobustBench's by name, in place of the model's ``geometry``.

    Returns:
        Class folders and ImageNet after the model's ``geometry``; CIFAR and .npz files as they are. Folders named by
        WordNet (n01440764) have the labels of ImageNet's 1,000 classes, all or some of them; those named as the model's
        ``classes`` have these; others are counted as the library counts folders (timm: class2 before class10).

    Raises:
        ValueError: as of ``load_images``; images of another size than the model's, or of another number of classes.
    """
    stored = str(source) in ("cifar10", "cifar100") or Path(source).suffix == ".npz"
    images = load_images(
        source,
        data_dir=data_dir,
        n_examples=n_examples,
        offline=offline,
        preprocessing=preprocessing or (None if stored else model.geometry),
    )
    size = tuple(images.images.shape[2:])
    if size != model.geometry.size:
        ours, theirs = ("x".join(map(str, each)) for each in (model.geometry.size, size))
        way_out = "Cut or scale them to it."
        if model.architecture.library == "timm" and size[0] == size[1]:
            way_out = f"If it was trained on such, give image_size={size[0]} (--image-size)."
        raise ValueError(
            f"{_CALLER}: {model.architecture.name} is for images of {ours}, but those of {images.name} are {theirs}. "
            f"{way_out}"
        )
    if str(source) in DATASETS:
        _check_count(model, DATASET_CLASSES[str(source)], images.name)
        return images
    return images if images.classes is None else _in_order(images, images.classes, model)


def _check_count(model: ImageModel, count: int, name: str) -> None:
    if count != model.num_classes:
        raise ValueError(
            f"{_CALLER}: {name} has {count:,} classes, but {model.architecture.name} has {model.num_classes:,}. Name "
            "the data that it was trained for."
        )


def _in_order(images: Images, names: tuple[str, ...], model: ImageModel) -> Images:
    """Images of class folders with the labels that the model's library has for the folders' names."""
    order: Sequence[str] = names
    if model.classes is not None and {*names} & {*model.classes}:
        order = model.classes
    elif all(_is_id(name) for name in names) and model.num_classes == DATASET_CLASSES["imagenet"]:
        places = json.loads((Path(str(import_robustbench().__file__)).parent / _LIST).read_text())
        order = sorted(places, key=lambda name: int(places[name]))
    else:
        _check_count(model, len(names), images.name)
        if model.architecture.library == "timm":
            from timm.utils.misc import natural_key

            order = sorted(names, key=natural_key)
    missing = [name for name in names if name not in order]
    if missing:
        raise ValueError(
            f"{_CALLER}: folders of {images.name} must be named as the classes of {model.architecture.name}, but not: "
            f"{check.first_names(missing)}. Rename them."
        )
    if tuple(order) == names:
        return images
    labels = torch.tensor([order.index(name) for name in names])[images.labels]
    sha256 = content_sha256(images.images, labels)
    return dataclasses.replace(images, labels=labels, classes=tuple(order), sha256=sha256)


def _is_id(name: str) -> bool:
    """Whether a class is named by WordNet, as the folders of ImageNet."""
    return name[:1] == "n" and len(name) == 9 and name[1:].isdecimal()
