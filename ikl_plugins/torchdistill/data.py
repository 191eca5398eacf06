"""What the shipped YAML files need for their data: images in class folders or in a list, and shares of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from .. import _validation as check
from .._limits import check_regular_file, read_text

__all__ = ["ImageList", "image_folder", "share_of_batch"]

_PREPARE = {
    "digits": "ikl data digits",
    "cifar10": "ikl data cifar10-folder --from ZIP...",
}


def image_folder(
    split_dir: str, transform: Callable[[Any], Any] | None = None, *, in_memory: bool = False
) -> ImageFolder:
    """The images of one split as torchvision's ``ImageFolder``, for ``!import_call`` in a YAML file.

    Args:
        split_dir: folder that holds one folder per class, such as ``digits/train``. Relative to the folder named by the
            environment variable IKL_PLUGINS_DATA, or to ``data`` in the working directory without it.
        transform: applied to each image, every time it is read.
        in_memory: decode each file once and keep the image; worth it for small images read many times.

    Returns:
        The data set of (image, class index); classes are numbered in the order of their names.

    Raises:
        TypeError: ``split_dir`` is no path.
        ValueError: the folder is missing, or holds no images in class folders.

    Example:
        In a YAML file::

            train_set: !import_call
              key: 'ikl_plugins.torchdistill.image_folder'
              init:
                kwargs:
                  split_dir: 'digits/train'
    """
    if not isinstance(split_dir, str | os.PathLike):
        raise TypeError(f"image_folder: `split_dir` must be the path of a folder, got {split_dir!r}.")
    folder = _data_folder() / split_dir
    try:
        return ImageFolder(folder, transform=transform, loader=_DecodedOnce() if in_memory else _loaded)
    except FileNotFoundError as error:
        what = f"no images in class folders ({error})" if folder.is_dir() else "no such folder"
        command = _PREPARE.get(Path(split_dir).parts[0] if split_dir else "")
        way_out = f"Run: {command}" if command else "Put one folder per class there"
        raise ValueError(
            f"image_folder: `split_dir` must lead to images in class folders, got {folder}: {what}. {way_out}, "
            f"or set IKL_PLUGINS_DATA."
        ) from error


class ImageList(Dataset[tuple[Any, int]]):
    """The images that a text file lists, with their labels: the form in which ImageNet-LT is published.

    A line holds the path of an image and its class index, such as ``train/n01440764/n01440764_190.JPEG 0``. Empty lines
    are passed over.

    Args:
        list_file: the text file, such as ``imagenet_lt/ImageNet_LT_train.txt``. Relative to the folder named by the
            environment variable IKL_PLUGINS_DATA, or to ``data`` in the working directory without it.
        image_dir: folder that the listed paths start from, such as ``imagenet``; relative to the same folder.
        transform: applied to each image, every time it is read.

    Raises:
        ValueError: the list is missing, empty or malformed, or its first image is not there.

    Attributes:
        samples: the path and the class index of each image.
        targets: the class indices.

    Example:
        In a YAML file::

            train_set: !import_call
              key: 'ikl_plugins.torchdistill.ImageList'
              init:
                kwargs:
                  list_file: 'imagenet_lt/ImageNet_LT_train.txt'
                  image_dir: 'imagenet'
    """

    def __init__(self, list_file: str, image_dir: str, transform: Callable[[Any], Any] | None = None) -> None:
        path, folder = _data_folder() / list_file, _data_folder() / image_dir
        if not path.is_file():
            raise ValueError(
                f"ImageList: `list_file` must be a text file, got {path}: no such file. "
                f"Put it there, or set IKL_PLUGINS_DATA."
            )
        self.samples = [
            (str(folder / name), label)
            for number, line in enumerate(read_text("ImageList", path).splitlines(), start=1)
            if line.strip()
            for name, label in [_listed(line, f"{path}, line {number}")]
        ]
        if not self.samples:
            raise ValueError(f"ImageList: `list_file` must list images, but {path} is empty.")
        if not Path(self.samples[0][0]).is_file():
            raise ValueError(
                f"ImageList: `image_dir` must be where the paths of '{list_file}' start, got '{image_dir}': there "
                f"is no "
                f"{self.samples[0][0]}."
            )
        self.transform = transform

    @property
    def targets(self) -> list[int]:
        return [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = _loaded(path)
        return (image if self.transform is None else self.transform(image)), label


def share_of_batch(total: int) -> int:
    """The batch size of one process, for ``!import_call`` in a YAML file: ``total`` divided by the number of processes.

    torchdistill's ``batch_size`` is that of each process. With this a recipe keeps its batch, and so its learning rate,
    on one GPU and under ``torchrun --nproc_per_node 8`` alike.

    Args:
        total: images in a step, over all processes; at least 1.

    Returns:
        ``total`` divided by the environment variable WORLD_SIZE, which torchrun sets.

    Raises:
        TypeError: ``total`` is no integer.
        ValueError: ``total`` is below 1, or the processes do not divide it.

    Example:
        In a YAML file::

            kwargs:
              batch_size: !import_call
                key: 'ikl_plugins.torchdistill.share_of_batch'
                init:
                  kwargs:
                    total: 512
    """
    check.check_integer("share_of_batch", "total", total, "Pass the number of images in a step.")
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if total % processes:
        raise ValueError(
            f"share_of_batch: `total` must be a multiple of the number of processes, {processes}, got {total}. "
            f"Change one of them."
        )
    return total // processes


def _data_folder() -> Path:
    return Path(os.environ.get("IKL_PLUGINS_DATA") or "data")


def _listed(line: str, where: str) -> tuple[str, int]:
    """Path and class index of a line; the path may hold blanks."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) < 2 or not parts[1].isdecimal():
        raise ValueError(f"ImageList: {where}, must be a path, a blank and a class index, got {line!r}.")
    return parts[0].strip(), int(parts[1])


def _loaded(path: str) -> Any:
    check_regular_file("image_folder", path)  # a FIFO would never end
    return default_loader(path)


class _DecodedOnce:
    """A loader that keeps what it has read. Transforms make new images, so one object can be handed out again."""

    def __init__(self) -> None:
        self._images: dict[str, Any] = {}

    def __call__(self, path: str) -> Any:
        if path not in self._images:
            self._images[path] = _loaded(path)
        return self._images[path]
