"""Images and labels in the files in which generated data is published, read where they lie."""

from __future__ import annotations

import mmap
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from .. import _validation as check
from .._archives import opened_zip, read_header
from .._files import written_aside
from .._limits import LimitError, printable

__all__ = ["MappedArray", "map_images", "unpack_npz"]

_CALLER = "GeneratedImages"
_KEYS = ("image", "label")
_LOCAL_HEADER = 30  # bytes of a member's header in a zip file, before its name
_NAME_LENGTH = slice(26, 28)
_EXTRA_LENGTH = slice(28, 30)
# A read maps up to 16 pages around the one it needs, 64 KiB. So many reads stay below 128 MiB.
_READS_KEPT = 2048
_CHUNK = 16 * 2**20


class MappedArray:
    """A NumPy array that begins ``offset`` bytes into a file, of which no more than the rows asked for is read.

    The file is mapped at the first read. Every 2,048 reads the pages that they have touched are given back (where the
    operating system has ``madvise``), as otherwise a process that reads at random keeps ever more of the file in its
    resident memory. A pickle or a copy holds the place of the array and maps the file anew.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> None:
        self.path = path
        self.offset = offset
        self.shape = shape
        self.dtype = dtype
        self._file: mmap.mmap | None = None
        self._reads = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> numpy.ndarray[Any, Any]:
        """A copy of one row."""
        row: numpy.ndarray[Any, Any] = numpy.array(self._view()[index])
        self._reads += 1
        if self._reads % _READS_KEPT == 0:
            self._release()
        return row

    def read(self) -> numpy.ndarray[Any, Any]:
        """The whole array, from the file into memory."""
        count = int(numpy.prod(self.shape))
        return numpy.fromfile(self.path, self.dtype, count, offset=self.offset).reshape(self.shape)

    def _view(self) -> numpy.ndarray[Any, Any]:
        if self._file is None:
            with self.path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(self._file, "madvise"):
                self._file.madvise(mmap.MADV_RANDOM)  # no reading ahead: 3 KiB are wanted, not 128
        view: numpy.ndarray[Any, Any] = numpy.ndarray(self.shape, self.dtype, buffer=self._file, offset=self.offset)
        return view

    def _release(self) -> None:
        if self._file is not None and hasattr(self._file, "madvise"):
            self._file.madvise(mmap.MADV_DONTNEED)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_reads": 0}


def map_images(data_file: Path, label_file: Path | None = None) -> tuple[MappedArray, MappedArray]:
    """The images (N, H, W, 3) of type uint8 and N integer labels of an .npz file, or of two .npy files."""
    if (data_file.suffix == ".npy") != (label_file is not None):
        raise ValueError(
            f"{_CALLER}: `label_file` goes with `data_file` of type .npy, got {data_file.name} and "
            f"{None if label_file is None else label_file.name}. Give one .npz or two .npy files."
        )
    for file in (data_file, label_file):
        if file is not None and not file.is_file():
            raise ValueError(
                f"{_CALLER}: `data_file` must be a file, but there is none at {file} (seen from {Path.cwd()}). "
                f"Correct the path."
            )
    if label_file is None:
        images, labels = _members(data_file)
    else:
        images, labels = _array(data_file), _array(label_file)
    if images.dtype != numpy.uint8 or len(images.shape) != 4 or images.shape[3] != 3:
        raise ValueError(
            f"{_CALLER}: the images of {data_file} must be uint8 of shape (N, H, W, 3), got {images.dtype} "
            f"and {images.shape}. Convert them."
        )
    if not numpy.issubdtype(labels.dtype, numpy.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{_CALLER}: the labels of {label_file or data_file} must be {len(images)} integers, got {labels.dtype} "
            f"of shape {labels.shape}. Save class indices."
        )
    return images, labels


def unpack_npz(source: Path | str, target: Path | str) -> Path:
    """Writes the arrays of a compressed .npz file to another one uncompressed, so that they can be mapped.

    Args:
        source: the file.
        target: where the other one shall be.

    Returns:
        ``target``.

    Raises:
        ValueError: ``source`` is no .npz file, or damaged; or the target is the source.

    Note:
        Memory stays below 100 MB whatever the size of the file. The target is there once it is complete.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> numpy.savez_compressed(folder / "small.npz", image=numpy.zeros((2, 32, 32, 3), "uint8"), label=[1, 0])
        >>> path = unpack_npz(folder / "small.npz", folder / "mapped.npz")
        >>> sorted(numpy.load(path))
        ['image', 'label']
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"unpack_npz: `target` must be another file than `source`, got {target}. Name a new one.")
    try:
        with (
            opened_zip("unpack_npz", source) as packed,
            written_aside(target) as aside,
            zipfile.ZipFile(aside, "w") as unpacked,
        ):
            for member in packed.infolist():
                place = zipfile.ZipInfo(member.filename, member.date_time)
                with packed.open(member) as data, unpacked.open(place, "w", force_zip64=True) as copy:
                    shutil.copyfileobj(data, copy, _CHUNK)
    except Exception as error:  # a damaged file makes the readers raise nearly anything; a disk names what is wrong
        if isinstance(error, LimitError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise ValueError(
            f"unpack_npz: `source` must be a whole .npz file, got {source}: {error}. Fetch it anew."
        ) from error
    return target


def _members(path: Path) -> list[MappedArray]:
    """The arrays 'image' and 'label' of an .npz file, in place."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except Exception as error:  # as above
        raise ValueError(
            f"{_CALLER}: `data_file` must be a whole .npz file or a .npy file, got {path}: {error}. Fetch it anew."
        ) from error
    return [_array(path, _member(path, members, key)) for key in _KEYS]


def _member(path: Path, members: Mapping[str, zipfile.ZipInfo], key: str) -> zipfile.ZipInfo:
    member = members.get(f"{key}.npy")
    if member is None:
        names = check.first_names([printable(name.removesuffix(".npy")) for name in sorted(members)])
        raise ValueError(
            f"{_CALLER}: `data_file` must hold the arrays {' and '.join(map(repr, _KEYS))}, but {path} has {names}. "
            f"Save it with numpy.savez(path, image=..., label=...)."
        )
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"{_CALLER}: `data_file` must not be compressed, but '{key}' in {path} is. Write it anew: python -c \""
            f"from ikl_plugins.mmpretrain import unpack_npz; "
            f"unpack_npz('{path}', '{path.with_suffix('.unpacked.npz')}')\""
        )
    return member


def _array(path: Path, member: zipfile.ZipInfo | None = None) -> MappedArray:
    """The array of an .npy file, or of a member of an .npz file."""
    name = str(path) if member is None else f"{member.filename} in {path}"
    with path.open("rb") as file:
        size = path.stat().st_size
        try:
            if member is not None:
                file.seek(_data_offset(file, member))
                size = file.tell() + member.file_size
            shape, fortran_order, dtype = read_header(file)
        except Exception as error:  # as above
            raise ValueError(
                f"{_CALLER}: {name} must be an array that NumPy has saved: {error}. Fetch it anew."
            ) from error
        offset = file.tell()
    if fortran_order or dtype.hasobject or not shape:
        what = "one in Fortran order" if fortran_order else "objects" if dtype.hasobject else "a single value"
        raise ValueError(
            f"{_CALLER}: {name} must hold an array row by row, got {what}. "
            f"Save it with numpy.save(path, numpy.ascontiguousarray(array))."
        )
    end = offset + int(numpy.prod(shape, dtype=object)) * dtype.itemsize
    if end > min(size, path.stat().st_size):
        raise ValueError(
            f"{_CALLER}: {name} must hold {shape} values of type {dtype}, but the file ends before the last. "
            f"Fetch it anew."
        )
    return MappedArray(path, offset, shape, dtype)


def _data_offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the data of a member begins: its own header may be longer than its entry in the directory says."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    lengths = (int.from_bytes(header[part], "little") for part in (_NAME_LENGTH, _EXTRA_LENGTH))
    return member.header_offset + _LOCAL_HEADER + sum(lengths)
