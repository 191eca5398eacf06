"""An .npz file of any number of images that takes up no more room than the few of them that are not black."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy

_STORED, _NEEDS_ZIP64, _LONG = 0, 45, 0xFFFFFFFF
_IMAGE = 32 * 32 * 3


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    file = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def write_sparse_archive(path: Path, count: int, images: dict[int, numpy.ndarray], labels: dict[int, int]) -> None:
    """Writes the zip file with 64-bit sizes and offsets by hand; checksums are left at 0.

    The fields are those of PKWARE's APPNOTE: local header (4.3.7), directory (4.3.12), its end (4.3.14 to 4.3.16) and
    the extra field with 64-bit numbers (4.5.3).
    """
    members = {
        "image.npy": (_npy_header((count, 32, 32, 3), "|u1"), _IMAGE, {k: v.tobytes() for k, v in images.items()}),
        "label.npy": (_npy_header((count,), "<i8"), 8, {k: struct.pack("<q", v) for k, v in labels.items()}),
    }
    directory = b""
    with path.open("wb") as file:
        for name, (header, width, rows) in members.items():
            start, size = file.tell(), len(header) + count * width
            fields = (0, _STORED, 0, 0, 0, _LONG, _LONG, len(name))  # flags, method, time, date, checksum, sizes
            extra = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", _NEEDS_ZIP64, *fields, len(extra)))
            file.write(name.encode() + extra)
            first = file.tell() + len(header)
            file.write(header)
            for index, row in rows.items():
                file.seek(first + index * width)
                file.write(row)
            file.truncate(first + count * width)
            file.seek(0, io.SEEK_END)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, start)
            entry = (*fields, len(extra), 0, 0, 0, 0, _LONG)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", _NEEDS_ZIP64, _NEEDS_ZIP64, *entry)
            directory += name.encode() + extra
        start = file.tell()
        entries, length = len(members), len(directory)
        versions = _NEEDS_ZIP64, _NEEDS_ZIP64
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, *versions, 0, 0, entries, entries, length, start)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + length, 1)
        last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries, entries, length, _LONG, 0)
        file.write(directory + end + locator + last)
