"""Images in class folders as a torchdistill data set: what the shipped YAML files put under ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

__all__ = ["image_folder"]

_PREPARE = {
    "digits": "python tools/prepare_data.py digits",
    "cifar10": "python tools/prepare_data.py cifar10-folder --from ZIP...",
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
        ValueError: the folder is missing, or holds no images in class folders.

    Example:
        In a YAML file::

            train_set: !import_call
              key: 'ikl_plugins.torchdistill.image_folder'
              init:
                kwargs:
                  split_dir: 'digits/train'
    """
    folder = Path(os.environ.get("IKL_PLUGINS_DATA") or "data") / split_dir
    try:
        return ImageFolder(folder, transform=transform, loader=_DecodedOnce() if in_memory else default_loader)
    except FileNotFoundError as error:
        what = f"no images in class folders ({error})" if folder.is_dir() else "no such folder"
        command = _PREPARE.get(Path(split_dir).parts[0] if split_dir else "")
        way_out = f"Run: {command}" if command else "Put one folder per class there"
        raise ValueError(
            f"image_folder: `split_dir` must lead to images in class folders, got '{split_dir}', which is {folder}: "
            f"{what}. {way_out}, or set IKL_PLUGINS_DATA to the folder that holds '{split_dir}'."
        ) from error


class _DecodedOnce:
    """A loader that keeps what it has read. Transforms make new images, so one object can be handed out again."""

    def __init__(self) -> None:
        self._images: dict[str, Any] = {}

    def __call__(self, path: str) -> Any:
        if path not in self._images:
            self._images[path] = default_loader(path)
        return self._images[path]
