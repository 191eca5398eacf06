"""Which way computes the losses: what the environment says."""

from __future__ import annotations

import os

__all__ = ["BUILD_ADVICE", "VARIABLE", "WAYS", "named_way"]

VARIABLE = "IKL_PLUGINS_KERNEL"
# Torch's own operations one after the other, the C++ operator for CPUs, the Triton kernel for CUDA.
WAYS = ("walk", "native", "triton")

# Of the C++ operator against the walk, as docs/results/bench_losses.csv has it; a test compares the two.
SPEED_UP = (2, 3)
BUILD_ADVICE = f"`ikl build` makes the losses {SPEED_UP[0]} to {SPEED_UP[1]} times as fast on a CPU"

_FORMER = "IKL_PLUGINS_NATIVE"  # of the C++ operator alone
_FORMER_VALUES = {"0": "walk", "1": "native", "build": "native"}

_named: str | None = None
_is_read = False


def named_way() -> str | None:
    """The way that the environment names, one of ``WAYS``; None to take the fastest that serves. Read once.

    Raises:
        ValueError: the variable names none of them.
    """
    global _named, _is_read
    if not _is_read:
        value = os.environ.get(VARIABLE, "") or _FORMER_VALUES.get(os.environ.get(_FORMER, ""), "")
        if value and value not in WAYS:
            raise ValueError(f"ikl_plugins: {VARIABLE} must be one of {', '.join(map(repr, WAYS))}, got {value!r}.")
        _named, _is_read = value or None, True
    return _named
