"""The generated inputs of tools/reliability_inputs.py once more, with the losses' C++ operator switched on.

The same cases, the same oracle, the same tolerances. What the operator does not serve goes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaign import inputs as reliability_inputs
from campaign.record import Record

from ikl_plugins import native

__all__ = ["run", "switched_on"]

CALLS = "calls of the operator"


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
    """Draws and judges all cases, see :func:`reliability_inputs.judge_all`, and finishes the part.

    Args:
        record: of the part.
        work: not used.
        seed: of the cases.
        quick: few cases.

    Raises:
        ValueError: the operator cannot be built or loaded, or a chunk of cases has not called it.
    """
    try:
        with switched_on() as calls:

            def judged() -> None:
                # Of each chunk, as a later process may be without what an earlier one had.
                if not calls[0]:
                    raise ValueError(
                        "reliability: the part inputs_native must call the operator, but has not. Adapt this tool."
                    )
                record.fact(CALLS, record.content["facts"].get(CALLS, 0) + calls[0])
                calls[0] = 0

            reliability_inputs.judge_all(record, seed=seed, quick=quick, judged=judged)
    except RuntimeError as error:
        raise ValueError(f"reliability: the part inputs_native must have the operator, but {error}") from error
    record.finish()
