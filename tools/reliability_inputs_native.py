"""The generated inputs of tools/reliability_inputs.py once more, with the losses' C++ operator switched on.

The same cases, the same oracle, the same tolerances. What the operator does not serve goes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reliability_inputs
from reliability_record import Record

from ikl_plugins import native

__all__ = ["run", "switched_on"]


@contextmanager
def switched_on() -> Iterator[list[int]]:
    """Losses with the operator, which is built if need be; yields a list whose only entry counts its calls."""
    native.build()
    native.enable()
    operator = native.operator()
    calls = [0]

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return operator(*arguments)  # type: ignore[misc]

    native._operator = counted
    try:
        yield calls
    finally:
        native.disable()


def run(record: Record, work: Path, *, seed: int, quick: bool) -> None:
    """Draws and judges all cases, see :func:`reliability_inputs.run`.

    Args:
        record: of the part.
        work: not used.
        seed: of the cases.
        quick: few cases.

    Raises:
        ValueError: the operator cannot be built or loaded, or has not been called.
    """
    try:
        with switched_on() as calls:
            reliability_inputs.run(record, work, seed=seed, quick=quick)
    except RuntimeError as error:
        raise ValueError(f"reliability: the part inputs_native must have the operator, but {error}") from error
    if not calls[0]:
        raise ValueError("reliability: the part inputs_native must call the operator, but has not. Adapt this tool.")
    record.fact("calls of the operator", calls[0])
    record.save()
