"""One timer for everything that is compared: the methods take turns, so that all of them meet the same machine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

WARM_UP = 2  # rounds: they warm caches and threads, and do not count

T = TypeVar("T")


def in_turn(
    methods: Mapping[str, Callable[[], T]], seconds: float, *, least: int, most: int | None = None
) -> dict[str, list[T]]:
    """What the methods return, round after round, in an order shuffled anew for each.

    Args:
        methods: called without arguments; most return the seconds that they took.
        seconds: least time spent on all.
        least: rounds that count, at least.
        most: likewise, at most.
    """
    found: dict[str, list[T]] = {name: [] for name in methods}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least + WARM_UP or (time.perf_counter() < end and (most is None or rounds < most + WARM_UP)):
        # What a method leaves in caches and heap must not always meet the same next one.
        for name in order.sample(list(methods), len(methods)):
            one = methods[name]()
            if rounds >= WARM_UP:
                found[name].append(one)
        rounds += 1
    return found


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A method that does ``work`` and returns its seconds."""

    def measure() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return measure


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: what else the machine does meets both sides of one."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
