"""How far a long task is: a bar on a terminal, lines elsewhere, both on standard error."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ._limits import printable

__all__ = ["Shown", "steps", "teller"]

_SECONDS = 30.0  # between two lines of one task

T = TypeVar("T")
Made = TypeVar("Made")


class Shown:
    """Shows one task after another.

    Where standard error is a terminal and tqdm is installed, each has a bar. Elsewhere it has a line when it is done,
    and one every half a minute before.

    Args:
        unit: what is counted, in the plural, such as 'batches'.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._task: str | None = None
        self._said = 0.0
        self._bar: Any = None

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Says that ``done`` of ``total`` steps of a task are done, and what has come of them."""
        if task != self._task:
            self._close()
            self._task, self._said = task, time.monotonic()
            self._bar = self._new_bar(task, done, total)
        last, task = done >= total, printable(task, None)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=last)
            self._bar.update(done - self._bar.n)
        elif last or time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            count = f"{done:,} of {total:,} {self._unit}"
            print(f"{task}: {note} ({count})" if note else f"{task}: {count}", file=sys.stderr, flush=True)
        if last:
            self._close()

    def _new_bar(self, task: str, done: int, total: int) -> Any:
        if not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        # 80 by 24 where the terminal says 0 by 0, with which tqdm would show nothing.
        columns, lines = shutil.get_terminal_size()
        return tqdm(desc=task, total=total, initial=done - 1, unit=f" {self._unit}", ncols=columns, nrows=lines)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._task, self._bar = None, None


def teller(
    caller: str, progress: bool | Callable[[Made], None] | None, show: Callable[[Made], None]
) -> Callable[[Made], None]:
    """What a function calls after each step: ``show`` for True, nothing for False or None, else ``progress`` itself.

    Raises:
        TypeError: ``progress`` is something else.
    """
    if progress is True:
        return show
    if progress is False or progress is None:
        return lambda made: None
    if not callable(progress):
        raise TypeError(f"{caller}: `progress` must be True, False or a function, got {progress!r}. Use True.")
    return progress


def steps(
    caller: str,
    rows: Iterable[T],
    total: int,
    task: str,
    unit: str,
    progress: bool | Callable[[tuple[int, int]], None] | None,
) -> Iterator[T]:
    """The rows; after each one how many are done, and of how many, is shown or given to ``progress``."""
    shown = Shown(unit)
    tell = teller(caller, progress, lambda made: shown(task, *made))
    for done, row in enumerate(rows, start=1):
        yield row
        tell((done, total))
