"""The benchmark's test sets: how many images each has, and which images have a right to its name.

No copy of a test set is needed. CIFAR is known by the MD5 of its file of test images, which its authors' archive and
torchvision state: images have the name if they are those of a file with this sum, in its order. ImageNet is known by
RobustBench's list of 5,000 files and their classes; what lies in the files has no published sum and is taken as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["KNOWN", "KnownSet", "cifar_source", "imagenet_source", "recorded_name"]


class KnownSet(NamedTuple):
    """A test set of the benchmark.

    Attributes:
        n_examples: images of the benchmark.
        source: what it is known by, as a log has it in ``data``: file and MD5, or list and SHA-256.
    """

    n_examples: int
    source: dict[str, str]


KNOWN = {
    "cifar10": KnownSet(10000, {"file": "cifar-10-batches-py/test_batch", "md5": "40351d587109b95175f43aff81a1287e"}),
    "cifar100": KnownSet(10000, {"file": "cifar-100-python/test", "md5": "f0ef6b0ae62326f3e7ffdfab6717acfc"}),
    # The SHA-256 of lines "<file> <label>".
    "imagenet": KnownSet(
        5000,
        {
            "list": "imagenet_test_image_ids.txt",
            "sha256": "ff138fe6b744b60e1ed94ae7b3a3ac719f6bdd2a0312362a591c8e07deb96ab2",
        },
    ),
}


def recorded_name(name: str | None, source: dict[str, str] | None) -> str | None:
    """The name as a log has it: that of a test set is not taken without a source."""
    return f"images named {name}" if name in KNOWN and source is None else name


def cifar_source(name: str, data_dir: Path, images: Tensor, labels: Tensor) -> dict[str, str] | None:
    """What makes images, (N, 3, 32, 32) in [0, 1], the first ones of the test set; None if they are not.

    Args:
        name: 'cifar10' or 'cifar100'.
        data_dir: where the data set lies.
        images: pixels, in the order in question.
        labels: class indices.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    source = KNOWN[name].source
    try:
        content = (data_dir / source["file"]).read_bytes()
        found = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](str(data_dir), train=False)
    except (OSError, RuntimeError):  # RuntimeError of torchvision where files are missing or changed
        return None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != source["md5"]:
        return None
    pixels = torch.from_numpy(found.data[: len(images)]).permute(0, 3, 1, 2)
    same = torch.equal(pixels.float().div(255), images) and labels.tolist() == found.targets[: len(images)]
    return dict(source) if same else None


def imagenet_source(
    samples: Sequence[tuple[str, int]], root: Path, read: Callable[[str], Any], images: Tensor, labels: Tensor
) -> dict[str, str] | None:
    """What makes images the first ones of RobustBench's list; None if they are not.

    Args:
        samples: file and label of the whole list, as RobustBench finds them.
        root: the folder of the class folders.
        read: an image of a file, to compare the first and the last one with.
        images: pixels, in the order in question.
        labels: class indices.
    """
    source = KNOWN["imagenet"].source
    lines = "\n".join(f"{Path(file).relative_to(root).as_posix()} {label}" for file, label in samples)
    if hashlib.sha256(lines.encode()).hexdigest() != source["sha256"]:
        return None
    same = labels.tolist() == [label for _, label in samples[: len(images)]]
    ends = (0, len(images) - 1)
    same = same and all(torch.equal(read(samples[index][0]), images[index]) for index in ends)
    return dict(source) if same else None
