"""The strength of the attack over the epochs, against tables typed from the authors' scripts, and every refusal."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from ikl_plugins.adversarial import PGD, BudgetRow, Strength
from ikl_plugins.adversarial.schedule import (
    largest_distance,
    pixel_number,
    ramp,
)

EPS = 8 / 255


def in_255(strength: Strength) -> tuple[float, int, float]:
    """A strength as people write it, in units of pixels of 0..255."""
    return strength.eps * 255, strength.steps, strength.step_size * 255


# --- the published schedules -----------------------------------------------------------------------------------------

# epoch of 200 -> eps, steps, step size, all in units of 1/255: eps = 8 * epoch / 200, step size a fraction of that eps.
HIGH = {
    1: (0.04, 2, 0.04),
    2: (0.08, 2, 0.08),
    50: (2.0, 2, 2.0),  # exactly a quarter: still the first row
    51: (2.04, 3, 1.36),
    100: (4.0, 3, 8 / 3),
    101: (4.04, 4, 2.02),
    150: (6.0, 4, 3.0),
    151: (6.04, 5, 3.02),
    199: (7.96, 5, 3.98),
    200: (8.0, 5, 4.0),
}
LOW = {1: (0.04, 2, 0.04), 50: (2.0, 2, 2.0), 125: (5.0, 2, 5.0), 200: (8.0, 2, 8.0)}
HIGH_AS_EXECUTED = {1: (0.04, 5, 0.02), 50: (2.0, 5, 1.0), 51: (2.04, 5, 1.02), 125: (5.0, 5, 2.5), 200: (8.0, 5, 4.0)}


@pytest.mark.parametrize(
    ("budget", "table"),
    [("low", LOW), ("high", HIGH), ("high_as_executed", HIGH_AS_EXECUTED)],
    ids=["low", "high", "high_as_executed"],
)
def test_presets_with_the_ramp_over_200_epochs(budget: str, table: dict[int, tuple[float, int, float]]) -> None:
    attack = PGD(eps="8/255", budget=budget, eps_ramp=1.0)
    assert attack.changes
    for epoch, expected in table.items():
        assert in_255(attack.strength(epoch, 200)) == pytest.approx(expected, rel=1e-12), epoch


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 7, 100, 200, 333, 400])
def test_high_changes_at_the_quarters_of_any_training(epochs: int) -> None:
    """The rows in whole numbers, so that no rounding decides at exactly 25, 50 and 75 per cent."""
    attack = PGD(eps=EPS, budget="high")
    for epoch in range(1, epochs + 1):
        steps, share = 5, 0.5
        if 4 * epoch <= 3 * epochs:
            steps, share = 4, 0.5
        if 4 * epoch <= 2 * epochs:
            steps, share = 3, 2 / 3
        if 4 * epoch <= epochs:
            steps, share = 2, 1.0
        strength = attack.strength(epoch, epochs)
        assert strength.eps == EPS
        assert strength.steps == steps, epoch
        assert strength.step_size == pytest.approx(EPS * share, rel=1e-12), epoch


# --- the ramp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "factors"),
    [
        (0.0, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0.5, [0.2, 0.4, 0.6, 0.8, 1.0, 1, 1, 1, 1, 1]),
        (0.25, [0.4, 0.8, 1, 1, 1, 1, 1, 1, 1, 1]),
        (0.01, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),  # shorter than an epoch
    ],
)
def test_eps_rises_over_a_share_of_the_training(share: float, factors: list[float]) -> None:
    attack = PGD(eps=0.5, steps=3, step_size=0.2, eps_ramp=share)
    for epoch, factor in enumerate(factors, start=1):
        strength = attack.strength(epoch, 10)
        assert strength.eps == pytest.approx(0.5 * factor, rel=1e-12)
        assert strength.steps == 3
        assert strength.step_size == pytest.approx(0.2 * factor, rel=1e-12), "the step size shrinks with eps"
        assert ramp(epoch, 10, share) == pytest.approx(factor, rel=1e-12)


def test_the_last_epoch_has_eps_itself() -> None:
    """To the last bit: an evaluation with the same eps is the same ball."""
    for epochs in (1, 3, 7, 10, 150, 200):
        assert PGD(eps="8/255", budget="high", eps_ramp=1.0).strength(epochs, epochs).eps == 8 / 255
        assert PGD(eps="8/255", budget="low", eps_ramp=0.5).strength(epochs, epochs).eps == 8 / 255


def test_a_strength_that_does_not_change_needs_no_epoch() -> None:
    attack = PGD(eps="8/255", steps=10, step_size="2/255")
    assert not attack.changes
    assert attack.strength() == attack.strength(3, 7)
    assert in_255(attack.strength()) == pytest.approx((8.0, 10, 2.0), rel=1e-12)
    assert attack.strength()._fields == ("eps", "steps", "step_size")
    assert not PGD(eps=EPS, budget="low").changes
    assert not PGD(eps=EPS, budget="high_as_executed").changes
    assert PGD(eps=EPS, budget="high").changes
    assert PGD(eps=EPS, budget="low", eps_ramp=0.1).changes


# --- budgets of one's own --------------------------------------------------------------------------------------------


def test_custom_rows_hold_up_to_and_including_their_share() -> None:
    """Lists, as a config file has them; tenths are no binary fractions, and still their own epoch belongs to them."""
    attack = PGD(eps=0.5, budget=[[0.1, 1, 1.0], [0.3, 2, 0.75], [0.7, 3, 0.5], [1, 4, 0.25]])
    assert attack.budget == ((0.1, 1, 1.0), (0.3, 2, 0.75), (0.7, 3, 0.5), (1.0, 4, 0.25))
    assert all(type(row) is BudgetRow for row in attack.budget)
    expected = [(0.5, 1, 0.5), *[(0.5, 2, 0.375)] * 2, *[(0.5, 3, 0.25)] * 4, *[(0.5, 4, 0.125)] * 3]
    for epoch, strength in enumerate(expected, start=1):
        assert attack.strength(epoch, 10) == pytest.approx(strength)


# --- numbers of pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [("8/255", EPS), (" 8/255 ", EPS), ("0.5", 0.5), ("1", 1.0), ("1e-3", 0.001), (1, 1.0), (Fraction(8, 255), EPS)],
)
def test_pixel_numbers(value: Any, expected: float) -> None:
    number = pixel_number("someone", "eps", value)
    assert number == expected
    assert type(number) is float
    assert PGD(eps=value, steps=1, step_size=value).eps == expected


def test_the_largest_distance_between_two_images() -> None:
    assert largest_distance("linf", 3072) == 1.0
    assert largest_distance("l2", 3072) == pytest.approx(55.4256, abs=1e-4)
