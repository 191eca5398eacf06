"""How strong an attack is, and how that changes over the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from .. import _validation as check

__all__ = ["BUDGETS", "BudgetRow", "Strength", "check_budget", "pixel_number"]


class Strength(NamedTuple):
    """The strength of an attack in one epoch, in pixel units: pixels lie in [0, 1]."""

    eps: float  # radius of the ball around the natural image
    steps: int
    step_size: float


class BudgetRow(NamedTuple):
    """A row of a step budget: what holds in the epochs up to a fraction of the training."""

    until: float  # epoch / epochs, the last row's is 1
    steps: int
    relative_step: float  # step size / eps


# The budgets of the authors' adversarial scripts. In their code the conditions of 'high' exclude nothing, so that the
# last one always wins: their published runs took 'high_as_executed'.
BUDGETS: Mapping[str, tuple[BudgetRow, ...]] = MappingProxyType(
    {
        "low": (BudgetRow(1.0, 2, 1.0),),
        "high": (
            BudgetRow(0.25, 2, 1.0),
            BudgetRow(0.5, 3, 2 / 3),
            BudgetRow(0.75, 4, 0.5),
            BudgetRow(1.0, 5, 0.5),
        ),
        "high_as_executed": (BudgetRow(1.0, 5, 0.5),),
    }
)


def pixel_number(caller: str, name: str, value: object) -> float:
    """A positive number of pixel units from a number or from text such as '8/255'.

    Raises:
        TypeError: neither a number nor text.
        ValueError: text that is no fraction, or a number that is not finite and above 0.
    """
    if isinstance(value, str):
        try:
            value = float(Fraction(*map(Fraction, value.split("/"))))  # "7.5/255" as well
        except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(
                f"{caller}: `{name}` must be a number or a fraction, got {value!r}. Write it as '8/255' or 0.03137."
            ) from error
    return check.check_number(caller, name, value, positive=True)


def check_budget(caller: str, budget: object) -> tuple[BudgetRow, ...]:
    """The rows of a budget given by name or as rows (until, steps, step size / eps).

    Raises:
        TypeError: neither a name nor rows.
        ValueError: an unknown name, or rows that do not rise to 1.
    """
    if isinstance(budget, str):
        if budget not in BUDGETS:
            raise ValueError(check.unknown_name_message(caller, "`budget`", budget, BUDGETS))
        return BUDGETS[budget]
    if not isinstance(budget, Sequence) or not all(isinstance(row, Sequence) and len(row) == 3 for row in budget):
        raise TypeError(
            f"{caller}: `budget` must be a name ({', '.join(sorted(BUDGETS))}) or rows, got {budget!r}. "
            f"Write rows as [(0.5, 2, 1.0), (1.0, 5, 0.5)]."
        )
    rows = [
        BudgetRow(
            until=check.check_number(caller, "budget: until", until, positive=True),
            steps=check.check_integer(caller, "budget: steps", steps),
            relative_step=check.check_number(caller, "budget: step size / eps", relative_step, positive=True),
        )
        for until, steps, relative_step in budget
    ]
    ends = [row.until for row in rows]
    if not rows or ends[-1] != 1.0 or any(one >= next_one for one, next_one in pairwise(ends)):
        raise ValueError(
            f"{caller}: `budget` must have first entries that rise to 1, got {ends}. "
            f"They are fractions of the training."
        )
    return tuple(rows)


def row_of(budget: tuple[BudgetRow, ...], epoch: int, epochs: int) -> BudgetRow:
    """The row that holds in ``epoch`` (1 for the first) of ``epochs``."""
    share = epoch / epochs
    return next((row for row in budget if share <= row.until), budget[-1])


def ramp(epoch: int, epochs: int, share: float) -> float:
    """The factor of eps in ``epoch``: rises linearly to 1 over the first ``share`` of the training."""
    return min(1.0, epoch / (share * epochs)) if share > 0 else 1.0


def check_epoch(caller: str, epoch: object, epochs: object) -> tuple[int, int]:
    """``epoch`` and ``epochs``, refused unless they are whole numbers with 1 <= epoch <= epochs."""
    for name, value in (("epoch", epoch), ("epochs", epochs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{caller}: `{name}` must be at least 1 where the strength changes, got {value!r}. "
                f"Pass strength=attack.strength(epoch, epochs)."
            )
    if epoch > epochs:  # type: ignore[operator]
        raise ValueError(f"{caller}: `epoch` must be at most {epochs}, the training's, got {epoch}. Count from 1.")
    return epoch, epochs  # type: ignore[return-value]


def largest_distance(norm: str, pixels: int) -> float:
    """The largest distance between two images of ``pixels`` values in [0, 1]."""
    return 1.0 if norm == "linf" else math.sqrt(pixels)


def check_strength(strength: Strength) -> Strength:
    """The strength, refused unless its numbers are in range."""
    eps, steps, step_size = strength
    return Strength(
        check.check_number("PGD", "strength: eps", eps, positive=True),
        check.check_integer("PGD", "strength: steps", steps),
        check.check_number("PGD", "strength: step_size", step_size, positive=True),
    )


def check_radius(name: str, number: float, given: object, largest: float) -> None:
    """Refuses a radius above the largest."""
    if number > largest:
        raise ValueError(
            f"PGD: `{name}` must be at most {largest:.4g}, got {given!r}. Pixels lie in [0, 1]: '{number:g}/255'?"
        )
