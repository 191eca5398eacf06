"""Several processes that share one evaluation: which batches are whose, and how they wait for each other.

They meet in the folder of the batch files and need no process group. An attack begins when the earlier one has ended
everywhere, as its batches are made of the images that still stand.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ... import _validation as check
from ..._files import locked

__all__ = ["Shard", "Unfinished", "check_shard", "launched"]

_FIRST, _AGAIN = 5.0, 60.0  # seconds until it is said whom a process waits for
_LONGEST = 2.0  # seconds between two looks


class Unfinished(RuntimeError):  # noqa: N818
    """A shard has done its part, and did not wait longer for those of the others."""


class Shard:
    """One of the processes that share an evaluation.

    Args:
        caller: whom a message names.
        number: from 1. The first one writes the log.
        count: of all.
        wait: seconds to wait for the others at the end of an attack; None for ever.
        say: takes a line on whom it waits for.
    """

    def __init__(self, caller: str, number: int, count: int, wait: float | None, say: Callable[[str], None]) -> None:
        self.number, self.count = number, count
        self._caller, self._wait, self._say = caller, wait, say
        self.waits()

    def owns(self, batch: int) -> bool:
        """Whether a batch, counted from 0, is its own."""
        return batch % self.count == self.number - 1

    def alone(self, log: Path | None) -> contextlib.AbstractContextManager[None]:
        """Refuses a second process that writes the same log, or is the same shard."""
        if log is None:
            return contextlib.nullcontext()
        if self.number > 1:
            log = log.with_name(f"{log.name}.shard-{self.number}-of-{self.count}")
        return locked(self._caller, log, "Wait for it, or share the work with --shard.")

    def waits(self) -> None:
        """A new wait begins."""
        self._since = time.monotonic()
        self._said = self._since + _FIRST - _AGAIN
        self._pause = 0.01

    def look_again(self, attack: str, missing: Sequence[int], check_log: Callable[[], None]) -> None:
        """Waits a little for batches of others.

        Args:
            attack: that the batches are of.
            missing: their numbers, from 0.
            check_log: called now and then, to refuse the log of another evaluation.

        Raises:
            Unfinished: it has waited long enough.
        """
        now = time.monotonic()
        whom = sorted({batch % self.count + 1 for batch in missing})
        count = f"{len(missing)} batches of {attack} from {check.first_names([f'shard {number}' for number in whom])}"
        if self._wait is not None and now - self._since >= self._wait:
            check_log()
            raise Unfinished(
                f"{self._caller}: shard {self.number} of {self.count} has done its part, but {count} are not there. "
                "Run it again when they are; from folders that are not shared, bring them together with --merge."
            )
        if now - self._said >= _AGAIN:
            self._said = now
            check_log()
            self._say(f"shard {self.number} of {self.count} waits for {count}")
        time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, _LONGEST)


def check_shard(caller: str, shard: object, wait: object, log: object, progress: object) -> Shard:
    """The shard that arguments name, the whole for None."""
    if wait is not None:
        wait = check.check_number(caller, "wait", wait)
    if shard is None:
        shard = (1, 1)
    elif log is None:
        raise ValueError(f"{caller}: `shard` needs a `log`, beside which shards meet, got None. Name a file.")
    pair = tuple(shard) if isinstance(shard, (tuple, list)) else ()
    if len(pair) != 2 or not all(type(number) is int for number in pair) or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"{caller}: `shard` must be two numbers such as (3, 8), the third of eight, got {shard!r}.")

    def say(line: str) -> None:
        if progress is True:
            print(line, file=sys.stderr, flush=True)

    return Shard(caller, *pair, wait, say)


def launched(caller: str, environment: Mapping[str, str]) -> tuple[int, int] | None:
    """The shard of this process where torchrun, or what sets its variables, has started several; else None.

    Raises:
        ValueError: the variables are there and no ranks.
    """
    names = ("RANK", "WORLD_SIZE")
    if not all(name in environment for name in names):
        return None
    try:
        rank, count = (int(environment[name]) for name in names)
    except ValueError:
        rank, count = -1, 0
    if not 0 <= rank < count:
        said = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ValueError(
            f"{caller}: RANK must lie below WORLD_SIZE, got {said}. Start it with torchrun, or unset them."
        )
    return None if count == 1 else (rank + 1, count)
