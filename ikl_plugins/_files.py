"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["written_aside"]


@contextlib.contextmanager
def written_aside(path: Path | str) -> Iterator[Path]:
    """A place to write a file, which takes the name of ``path`` once everything is written.

    Args:
        path: where the file shall be; missing folders are made.

    Yields:
        The path of a file beside it, with the same ending. If the block raises, or the process ends in it, the file at
        ``path`` stays as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "log.json")
        >>> with written_aside(path) as aside:
        ...     _ = aside.write_text("{}")
        >>> path.read_text()
        '{}'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One per process: two that write the same file leave one whole file of either.
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield aside
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
