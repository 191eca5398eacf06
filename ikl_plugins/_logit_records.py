"""Logits of images on disk, and images whose augmentations recur: what both hosts' caches of a teacher share.

A record is the logits of one image and a checksum of both image and logits: one of another image, or that a kill has
cut off, does not count. So processes may write one file at once, and no order of writes matters.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from . import _validation as check
from ._files import naming, written_aside
from ._random_states import kept_random_states

__all__ = ["LogitRecords", "check_settings", "digest", "image_mark", "seeded"]

_DTYPES: dict[Any, numpy.dtype[Any]] = {"float32": numpy.dtype("<f4"), "float16": numpy.dtype("<f2")}
_CHECKSUM = 4  # bytes at the end of a record


class LogitRecords:
    """One file of records, in a folder named after all that the logits depend on.

    Args:
        caller: whom messages name.
        folder: where such folders are.
        fields: what the logits depend on, by name; written beside the file.
        rows: number of records.
        classes: logits in each.
        dtype: of the logits on disk, ``'float32'`` or ``'float16'``.
        warn: is told once of images that have changed.

    Raises:
        OSError: the file cannot be made.
        ValueError: a file of another size is there.
    """

    def __init__(
        self,
        caller: str,
        folder: Path,
        fields: Mapping[str, str],
        rows: int,
        classes: int,
        dtype: str,
        warn: Callable[[str], None],
    ) -> None:
        self.caller = caller
        self.dtype = _DTYPES[dtype]
        self.warn: Callable[[str], None] | None = warn
        text = json.dumps({**fields, "classes": str(classes), "dtype": dtype}, indent=1)
        self.path = folder / hashlib.sha256(text.encode()).hexdigest()[:16] / "logits.bin"
        self.width = classes * self.dtype.itemsize + _CHECKSUM
        size = rows * self.width
        if not self.path.is_file():
            with written_aside(self.path.with_name("fields.json")) as aside:
                aside.write_text(text)
            with written_aside(self.path, first=True) as aside, aside.open("wb") as file:
                file.truncate(size)  # with holes: the disk gives room for what is written
        if self.path.stat().st_size != size:
            raise ValueError(f"{caller}: {self.path} must have {size} bytes, got another number. Remove it.")
        self.rows = numpy.memmap(self.path, "u1", "r", shape=(rows, self.width))

    def read(self, numbers: Sequence[int], marks: Sequence[int]) -> Tensor | None:
        """The logits of images in float32, if they are kept of all of them.

        Args:
            numbers: of their records.
            marks: :func:`image_mark` of each image.
        """
        found = numpy.array(self.rows[numpy.array(numbers)])
        kept = found[:, -_CHECKSUM:].copy().view("<u4")[:, 0]
        values = numpy.ascontiguousarray(found[:, :-_CHECKSUM])
        expected = [zlib.crc32(row.data, mark) for row, mark in zip(values, marks, strict=True)]
        wrong = kept != numpy.array(expected, dtype="u4")
        if not wrong.any():
            return torch.from_numpy(values.view(self.dtype).astype("f4"))
        if self.warn is not None and found[wrong].any():
            self.warn(
                f"{self.caller}: images are not those whose logits {self.path} keeps, so the teacher runs again: the "
                f"data has changed, or a transform draws from a generator of its own."
            )
            self.warn = None
        return None

    def write(self, numbers: Sequence[int], marks: Sequence[int], logits: Tensor) -> Tensor:
        """Keeps logits (N, classes), and returns them as they will be read.

        Raises:
            OSError: they cannot be written.
            ValueError: float16 cannot hold them.
        """
        given = logits.float().cpu()
        with numpy.errstate(over="ignore"):
            values = given.numpy().astype(self.dtype)
        if not numpy.isfinite(values).all() and bool(torch.isfinite(given).all()):
            raise ValueError(
                f"{self.caller}: dtype='float16' must hold the teacher's logits, got larger ones. Use float32."
            )
        with naming(self.path), self.path.open("r+b", buffering=0) as file:
            for number, mark, row in zip(numbers, marks, values, strict=True):
                content = row.tobytes()
                file.seek(number * self.width)
                file.write(content + zlib.crc32(content, mark).to_bytes(_CHECKSUM, "little"))
        return torch.from_numpy(values.astype("f4"))


def check_settings(caller: str, views: object, seed: object, dtype: object) -> None:
    """Refuses other numbers of augmentations than integers of at least 1, negative seeds, and unknown dtypes."""
    check.check_integer(caller, "views", views)
    check.check_integer(caller, "seed", seed, least=0)
    if dtype not in _DTYPES:
        raise ValueError(check.unknown_name_message(caller, "`dtype`", str(dtype), _DTYPES))


@contextmanager
def seeded(seed: int, view: int, index: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch that follow from the three; the generators are given back."""
    python, array, tensor = numpy.random.SeedSequence((seed, view, index)).generate_state(3).tolist()
    with kept_random_states():
        random.seed(python)
        numpy.random.seed(array)
        torch.default_generator.manual_seed(tensor)
        yield


def image_mark(caller: str, image: object) -> int:
    """A checksum of an image, its shape and its dtype.

    Raises:
        ValueError: it is no tensor.
    """
    if not isinstance(image, Tensor):
        raise ValueError(
            f"{caller}: each image must be one tensor, got {check.kind_of(image)}. End the pipeline with one."
        )
    kind = repr((tuple(image.shape), image.dtype)).encode()
    content = image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return zlib.crc32(content, zlib.crc32(kind))


def digest(parts: Iterable[Any]) -> str:
    """The hash of bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
