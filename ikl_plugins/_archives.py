"""Zip and .npz files from elsewhere: what they declare is judged before anything is unpacked."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ._limits import LimitError, check_limit, check_regular_file

if TYPE_CHECKING:
    import numpy

__all__ = ["check_npy", "opened_npz", "opened_zip", "read_header"]

_DEFLATE = 1032  # bytes that one byte of a deflated member can become


@contextlib.contextmanager
def opened_zip(caller: str, path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file, open to be read.

    Raises:
        LimitError: its members declare more bytes than the cap of archives; it is a FIFO, a socket or a device.
        Exception: nearly any, of a damaged file or of a version to come.
    """
    check_regular_file(caller, path)
    with zipfile.ZipFile(path) as archive:
        check_limit(caller, path, "ARCHIVE_BYTES", sum(member.file_size for member in archive.infolist()))
        yield archive


@contextlib.contextmanager
def opened_npz(caller: str, path: Path) -> Iterator[Mapping[str, numpy.ndarray[Any, Any]]]:
    """The arrays of an .npz file by name, each read when it is asked for.

    Raises:
        LimitError: as of :func:`opened_zip`; what is asked for is more than the cap of arrays.
        Exception: nearly any, of a damaged file; of an array that is smaller than it says, or of Python objects.
    """
    with opened_zip(caller, path) as archive:
        yield _Arrays(caller, path, archive)


class _Arrays(Mapping[str, Any]):
    def __init__(self, caller: str, path: Path, archive: zipfile.ZipFile) -> None:
        self._caller, self._path, self._archive = caller, path, archive
        self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        self._bytes = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> Any:
        import numpy

        member = self._members[name]
        self._bytes += member.file_size
        check_limit(self._caller, self._path, "ARRAY_BYTES", self._bytes)
        growth = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE}.get(member.compress_type)
        if growth is None:
            raise ValueError(f"'{name}' is compressed in a way that NumPy has not")
        with self._archive.open(member) as file:
            shape, _, dtype = read_header(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize  # Python's integers do not overflow
        if size > member.file_size or member.file_size > growth * (member.compress_size + 1):
            raise ValueError(f"'{name}' is smaller than its shape {shape} says")
        with self._archive.open(member) as file:
            return numpy.lib.format.read_array(file, allow_pickle=False)


def check_npy(caller: str, path: Path) -> None:
    """Refuses an .npy file, which a host will read into memory, by its header.

    Raises:
        LimitError: it is damaged, smaller than its shape says or larger than the cap of arrays, or no regular file.
    """
    check_regular_file(caller, path)
    try:
        with path.open("rb") as file:
            shape, _, dtype = read_header(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise LimitError(f"{caller}: {path} must be an array that NumPy has saved, but: {error}.") from error
    check_limit(caller, path, "ARRAY_BYTES", size)
    if size > path.stat().st_size:
        raise LimitError(f"{caller}: {path} must be whole, but is smaller than its shape {shape} says. Fetch it anew.")


def read_header(file: BinaryIO | Any) -> tuple[tuple[int, ...], bool, numpy.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an array that NumPy has saved.

    Raises:
        ValueError: a version of its format that plain arrays do not have.
        Exception: nearly any, of a damaged file.
    """
    import numpy

    version = numpy.lib.format.read_magic(file)
    known = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}
    if version not in known:
        raise ValueError(f"version {version}, which plain arrays do not have")
    shape, fortran_order, dtype = known[version](file)
    if any(length < 0 for length in shape):
        raise ValueError(f"the shape {shape}")
    return shape, fortran_order, dtype
