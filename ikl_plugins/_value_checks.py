"""Checks of values: at once on a CPU, later on a device.

To look at a value the host must wait for the device, so that a check in every step would cost more than the loss. There
the checks leave their findings on the device. They are read together: when enough have gathered, at the end of an epoch
(:meth:`ikl_plugins.ClassPrior.end_epoch` and the adapters), with MMEngine's log of each iteration, and at exit.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["check_values", "largest", "read_value_checks", "take_findings"]

_logger = logging.getLogger(__name__)

VARIABLE = "IKL_PLUGINS_CHECKS"
MODES = ("deferred", "immediate")
_READ_EVERY = 256  # findings; a training step makes one to four

Judge = Callable[..., str | None]


class Finding(NamedTuple):
    """What one check has found on a device: a few numbers, and what they mean."""

    caller: str
    call: int  # how often this check had run, this time included
    numbers: tuple[Tensor, ...]
    judge: Judge

    def refusal(self, numbers: list[float]) -> str | None:
        message = self.judge(*numbers)
        if message is None:
            return None
        where = self.numbers[0].device
        return f"{message} (Batch {self.call} of this check on {where}; {VARIABLE}=immediate stops at once.)"


_lock = threading.Lock()
_findings: list[Finding] = []
_calls: Counter[tuple[str, str]] = Counter()


def immediate() -> bool:
    """Whether checks wait for the device: the environment variable ``IKL_PLUGINS_CHECKS`` says 'immediate'.

    Raises:
        ValueError: the variable has another value than 'deferred' and 'immediate'.
    """
    mode = os.environ.get(VARIABLE, "deferred")
    if mode not in MODES:
        raise ValueError(f"ikl_plugins: {VARIABLE} must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    return mode == "immediate"


def check_values(caller: str, name: str, numbers: tuple[Tensor, ...], judge: Judge) -> None:
    """Refuses what ``judge`` refuses.

    Args:
        caller: who checks.
        name: the argument that is checked.
        numbers: 0-dim tensors of one dtype and device, such as the least and the largest value.
        judge: takes these as Python numbers; gives the message, or None if all is well.

    Raises:
        ValueError: at once on a CPU. On a device it is raised by the call that reads the findings.
    """
    first = numbers[0]
    if first.is_meta or isinstance(first, FakeTensor):
        return  # there are no values
    if on_host(first):
        message = judge(*(number.item() for number in numbers))
        if message is not None:
            raise ValueError(message)
        return
    if is_recorded(first):
        return  # there are no values yet, and a graph's memory is not ours afterwards
    if not _calls:
        atexit.register(_read_at_exit)
    with _lock:  # DataParallel has a thread for each device
        _calls[caller, name] += 1
        _findings.append(Finding(caller, _calls[caller, name], numbers, judge))
    if len(_findings) >= _READ_EVERY or immediate():
        read_value_checks()


def is_recorded(values: Tensor) -> bool:
    """Whether torch.compile or a CUDA graph records what is done with these values: nothing is checked there."""
    if torch.compiler.is_compiling():
        return True
    return values.is_cuda and not isinstance(values, FakeTensor) and torch.cuda.is_current_stream_capturing()


def on_host(number: Tensor) -> bool:
    """Whether the host may look at it without waiting."""
    return number.device.type == "cpu"


def largest(values: Tensor) -> Tensor:
    """The largest absolute value; NaN or infinite where one of them is. A single launch, unlike ``isfinite``."""
    bound: Tensor = torch.linalg.vector_norm(values, torch.inf)
    return bound


def take_findings() -> list[Finding]:
    """The findings that nobody has read, for a caller who copies them to the host with numbers of its own."""
    with _lock:
        taken = _findings.copy()
        _findings.clear()
    return taken


def read_value_checks() -> None:
    """Reads what checks on devices have found so far; this waits for the devices, unless nothing is pending.

    Raises:
        ValueError: the first check that failed, in the order of the calls; the message says how many others did.
    """
    findings = take_findings()
    if findings:
        judge_findings(findings, host_numbers([finding.numbers for finding in findings]))


def host_numbers(groups: list[tuple[Tensor, ...]]) -> list[list[float]]:
    """The values of 0-dim tensors; one copy to the host for each CUDA device, elsewhere one for each dtype."""
    places: dict[torch.device, dict[torch.dtype, list[tuple[int, int]]]] = {}
    for row, group in enumerate(groups):
        for column, number in enumerate(group):
            places.setdefault(number.device, {}).setdefault(number.dtype, []).append((row, column))
    values: list[list[float]] = [[0.0] * len(group) for group in groups]
    for device, dtypes in places.items():
        stacks = [torch.stack([groups[r][c].detach() for r, c in spots]) for spots in dtypes.values()]
        if device.type == "cuda":  # a single copy; elsewhere float64 may be missing
            stacks = [torch.cat([stack.double() for stack in stacks])]
        spots = [spot for spots in dtypes.values() for spot in spots]
        for (row, column), value in zip(spots, chain.from_iterable(stack.tolist() for stack in stacks), strict=True):
            values[row][column] = value
    return values


def judge_findings(findings: list[Finding], values: list[list[float]]) -> None:
    """Raises for the first finding that its judge refuses."""
    refusals = [
        message
        for finding, numbers in zip(findings, values, strict=True)
        if (message := finding.refusal(numbers)) is not None
    ]
    if refusals:
        others = f" {len(refusals) - 1} later checks failed as well." if len(refusals) > 1 else ""
        raise ValueError(refusals[0] + others)


def _read_at_exit() -> None:
    try:
        read_value_checks()
    except ValueError as error:
        _logger.error("%s", error)
    except RuntimeError:
        pass  # the device has gone, and with it whoever wanted its results
