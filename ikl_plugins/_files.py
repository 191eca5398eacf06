"""Files that are there whole or not at all, and where the shipped configs are."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["configs_folder", "naming", "written_aside"]


@contextlib.contextmanager
def written_aside(path: Path | str) -> Iterator[Path]:
    """A place to write a file, which takes the name of ``path`` once everything is written.

    Args:
        path: where the file shall be; missing folders are made.

    Yields:
        The path of a file beside it, with the same ending. If the block raises, or the process ends in it, the file at
        ``path`` stays as it was.

    Raises:
        OSError: it cannot be written; see :func:`naming`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "log.json")
        >>> with written_aside(path) as aside:
        ...     _ = aside.write_text("{}")
        >>> path.read_text()
        '{}'
    """
    path = Path(path)
    # One per process: two that write the same file leave one whole file of either.
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            with aside.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):  # on a read-only disk; what is told is why it was not written
                aside.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Names ``path`` in an error that says that a write has failed and not of what, such as that of a full disk.

    Args:
        path: the file or folder that the block writes.

    Raises:
        OSError: in place of one without a file's name, and of the RuntimeError with which ``torch.save`` ends.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        # torch.save met the error of the disk, and then one of its own, as its archive is not whole.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:  # where it writes the file by itself
            first = str(error).strip().splitlines()[0]
            raise OSError(errno.EIO, f"a write failed, the disk may be full ({first})", str(path)) from error
        raise OSError(cause.errno, cause.strerror or str(cause), cause.filename or str(path)) from error


def configs_folder() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
