"""What a checkpoint unpacks to, as its headers declare it before it is read, and as it is once it has been read."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ._limits import check_limit
from ._pickle_scan import DEEPEST, Scan

__all__ = ["check_content", "check_file"]

_ZIP = b"PK\x03\x04"  # how torch.save begins a file, and how torch.load tells its two formats apart
_PICKLES = 5  # of the old format: a number, a version, the system, the content and the keys of its storages
_PLAIN = {int, float, str, bool, bytes, type(None)}
_LISTS = (list, tuple, set, frozenset)
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # what torch unpacks


def check_file(caller: str, path: Path, where: str) -> None:
    """Refuses a file of ``torch.save`` by what it declares, and one whose checksums are wrong.

    Args:
        caller: whom a refusal names.
        path: the file.
        where: what a refusal calls it.

    Raises:
        LimitError: it would unpack to more than a cap.
        UnpicklingError, BadZipFile, OSError: what is wrong with it otherwise.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            _check_zip(caller, file, where)
            return
        size = file.seek(0, 2)
        _check_growth(caller, where, size, size)
        file.seek(0)
        scan = Scan(None)
        for _ in range(_PICKLES):
            if not scan.pickled(file):
                break
        declared = sum(scan.storages.values())
        if declared > size:
            raise pickle.UnpicklingError(f"tensors of {declared:,} bytes, for which the file has {size:,}")
        _check_growth(caller, where, size, size + scan.excess)


def _check_zip(caller: str, file: BinaryIO, where: str) -> None:
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        _check_growth(caller, where, size, total)
        names = [entry.orig_filename.lower() for entry in entries]  # torch looks names up so
        if len(set(names)) < len(names) or archive.comment:
            raise zipfile.BadZipFile("an archive with a comment, or with one name twice")
        for entry in entries:
            if entry.flag_bits & 1:
                raise zipfile.BadZipFile("an encrypted archive")
            if entry.compress_type not in _METHODS:
                raise zipfile.BadZipFile(f"an archive compressed by method {entry.compress_type}, which torch has not")
        damaged = archive.testzip()  # torch does not compare the checksums of tensors
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        folder = names[0].partition("/")[0] if names else ""
        start = f"{folder}/data/"
        named = dict(zip(names, entries, strict=True))
        scan = Scan({name[len(start) :]: named[name].file_size for name in names if name.startswith(start)})
        if (pickled := named.get(f"{folder}/data.pkl")) is not None:
            with archive.open(pickled) as opened:
                scan.pickled(opened)
        _check_growth(caller, where, size, total + scan.excess)


def _check_growth(caller: str, where: str, size: int, unpacked: int) -> None:
    check_limit(caller, where, "CHECKPOINT_BYTES", unpacked)
    check_limit(caller, where, "CHECKPOINT_GROWTH", unpacked - size)


def check_content(caller: str, content: Any, size: int, where: str, buffers: tuple[type[Any], ...]) -> None:
    """Refuses what a file has made if walking through it, or copying its tensors, would take far more than the file.

    Args:
        caller: whom a refusal names.
        content: what has been read.
        size: of the file in bytes.
        where: what a refusal calls it.
        buffers: classes of objects whose attributes are looked into, besides ``argparse.Namespace``.

    Raises:
        LimitError: it is more than a cap.
        UnpicklingError: containers are nested too deep or in themselves, or there is a nested tensor.
    """
    counts: dict[int, tuple[int, int]] = {}  # depth and values of each container that has been walked through
    views: dict[int, set[tuple[Any, ...]]] = {}
    sizes: dict[int, tuple[int, int]] = {}  # of each storage: its own bytes, those of its tensors
    root = [content]
    waiting: list[tuple[Any, list[Any], Iterator[Any]]] = [(root, root, iter(root))]
    open_ones = {id(root)}
    while waiting:
        value, inner, rest = waiting[-1]
        for entry in rest:
            if type(entry) in _PLAIN:
                continue
            if isinstance(entry, Tensor):
                _count_bytes(entry, views, sizes)
            elif id(entry) in open_ones:
                raise pickle.UnpicklingError("a value that holds itself")
            elif id(entry) not in counts and (entries := _inner(entry, buffers)):
                open_ones.add(id(entry))
                waiting.append((entry, entries, iter(entries)))
                break
        else:
            waiting.pop()
            open_ones.remove(id(value))
            known = [counts[id(entry)] for entry in inner if type(entry) not in _PLAIN and id(entry) in counts]
            depth = 1 + max((depth for depth, _ in known), default=0)
            if depth > DEEPEST:
                raise pickle.UnpicklingError(f"values nested more than {DEEPEST} deep")
            counts[id(value)] = depth, len(inner) + sum(count for _, count in known)
            check_limit(caller, where, "CHECKPOINT_VALUES", counts[id(value)][1])
    _check_growth(caller, where, size, sum(max(own_and_used) for own_and_used in sizes.values()))


def _inner(value: Any, buffers: tuple[type[Any], ...]) -> list[Any]:
    """What a container holds."""
    found = list(value.values() if isinstance(value, dict) else value if isinstance(value, _LISTS) else ())
    if isinstance(value, (argparse.Namespace, dict, *buffers)) and hasattr(value, "__dict__"):
        found += vars(value).values()
    return found


def _count_bytes(tensor: Tensor, views: dict[int, set[tuple[Any, ...]]], sizes: dict[int, tuple[int, int]]) -> None:
    if tensor.is_nested:
        raise pickle.UnpicklingError("a nested tensor")  # nobody compares its parts with its storage
    if tensor.is_meta or tensor.layout is not torch.strided:
        return
    storage = tensor.untyped_storage()
    place = storage.data_ptr()
    own, used = sizes.get(place, (0, 0))
    view = tensor.storage_offset(), *tensor.shape, None, *tensor.stride()
    seen = views.setdefault(place, set())
    if view not in seen:  # one that is there twice, as tied weights are, is one
        used += tensor.numel() * tensor.element_size()
        seen.add(view)
    sizes[place] = max(own, storage.nbytes()), used
