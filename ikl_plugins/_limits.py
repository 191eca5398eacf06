"""What a file from elsewhere may ask for: how much it unpacks to, what kind of file it is, and how its text is shown.

Each cap is one environment variable, ``IKL_PLUGINS_MAX_`` and the name. It is held against what a file declares before
anything is unpacked, and against what is unpacked where a file can declare less than it holds.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "LimitError",
    "check_image",
    "check_limit",
    "check_regular_file",
    "limit",
    "one_line",
    "printable",
    "read_text",
]


class LimitError(ValueError):
    """A file asks for more than a cap, or is of a kind that may never end."""


class _Limit(NamedTuple):
    default: int
    rule: str  # what a file must do, before the number
    unit: str


_GIB = 2**30
_LIMITS = {
    "CHECKPOINT_BYTES": _Limit(16 * _GIB, "unpack to at most", "bytes"),
    # torch stores its checkpoints: one that unpacks to much more than its file has been made to.
    "CHECKPOINT_GROWTH": _Limit(_GIB // 8, "unpack to at most", "bytes beyond its own size"),
    "CHECKPOINT_VALUES": _Limit(20_000_000, "hold at most", "values, repeated ones counted each time"),
    "ARCHIVE_BYTES": _Limit(256 * _GIB, "unpack to at most", "bytes"),  # an npz or zip, all members together
    "ARRAY_BYTES": _Limit(16 * _GIB, "unpack to at most", "bytes of arrays"),  # of an npz, in memory
    "IMAGE_PIXELS": _Limit(100_000_000, "have at most", "pixels"),
    "TEXT_BYTES": _Limit(_GIB // 16, "have at most", "bytes"),  # a YAML, JSON or table
    "YAML_NODES": _Limit(100_000, "have at most", "values, aliases counted each time"),
}
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # of Unicode's categories
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def limit(name: str) -> int:
    """The cap of this name: the environment's ``IKL_PLUGINS_MAX_<name>``, else the default.

    Raises:
        ValueError: the variable is no whole number of at least 0.
    """
    given = os.environ.get(f"IKL_PLUGINS_MAX_{name}")
    if given is None:
        return _LIMITS[name].default
    if not (given.isascii() and given.isdigit()):
        raise ValueError(f"IKL_PLUGINS_MAX_{name} must be a whole number, got {given!r}. Set it to one, or unset it.")
    return int(given)


def check_limit(caller: str, path: Path | str, name: str, amount: int) -> None:
    """Refuses a file that asks for more than a cap.

    Args:
        caller: whom the refusal names.
        path: the file, or the member of one.
        name: the cap.
        amount: what the file declares, or has been unpacked to so far.

    Raises:
        LimitError: it is more than the cap.
    """
    most = limit(name)
    if amount > most:
        rule = f"{_LIMITS[name].rule} {most:,} {_LIMITS[name].unit}"
        raise LimitError(f"{caller}: {path} must {rule}, got {amount:,}. Set IKL_PLUGINS_MAX_{name} if you trust it.")


def check_regular_file(caller: str, path: Path | str) -> None:
    """Refuses a FIFO, a socket or a device, whose reading may never end.

    A link to a file is one; what is missing, or a folder, is left to the caller.

    Raises:
        LimitError: the path is of such a kind.
    """
    kind = None
    with contextlib.suppress(OSError, ValueError):
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    if kind is not None:
        raise LimitError(f"{caller}: {path} must be a regular file, but is {kind}. Name a file.")


def check_image(caller: str, path: Path | str) -> None:
    """Refuses an image that states more pixels than the cap; a file that Pillow cannot read is left to its reader.

    Raises:
        LimitError: it does, or is no regular file.
    """
    from PIL import Image

    check_regular_file(caller, path)
    size = (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                size = image.size
        except Image.DecompressionBombError as error:  # which nothing but Pillow's own setting lifts
            check_limit(caller, path, "IMAGE_PIXELS", int("".join(re.findall(r"\d+", str(error))[:1]) or 0))
            raise LimitError(f"{caller}: {path} must be an image that Pillow reads, but: {error}") from error
        except Exception:
            return
    check_limit(caller, path, "IMAGE_PIXELS", size[0] * size[1])


def read_text(caller: str, path: Path | str) -> str:
    """The text of a file in UTF-8, no more of it than the cap of texts.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, no regular file, or not in UTF-8.
    """
    check_regular_file(caller, path)
    with open(path, "rb") as file:
        content = file.read(limit("TEXT_BYTES") + 1)  # whatever size it states
        check_limit(caller, path, "TEXT_BYTES", max(len(content), os.fstat(file.fileno()).st_size))
    return content.decode("utf-8")


def printable(text: object, most: int | None = 80) -> str:
    """Text from a file or a file's name, as messages, logs and reports have it: one line that can always be written.

    Args:
        text: what is shown.
        most: the length beyond which its end is left out; None for all of it.

    Returns:
        The text; control and direction characters, line ends, invisible characters and bytes that are no UTF-8 stand as
        Python's escapes, so that two texts that differ still do.

    Example:
        >>> printable("caf\\udce9\\n")
        'caf\\\\udce9\\\\n'
    """
    shown = str(text)[: None if most is None else most + 1]
    plain = "".join(
        one.encode("unicode_escape").decode("ascii") if unicodedata.category(one) in _HIDDEN else one for one in shown
    )
    return plain if most is None or len(plain) <= most else f"{plain[: most - 3]}..."


def one_line(text: object) -> str:
    """As :func:`printable`, for sentences: all of them, blanks in place of line ends."""
    return printable(" ".join(str(text).split()), None)
