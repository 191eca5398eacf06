"""The strength of the attack over the epochs, against tables typed from the authors' scripts, and every refusal."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import pytest

from ikl_plugins.adversarial import BUDGETS, PGD, BudgetRow, Strength
from ikl_plugins.adversarial.schedule import (
    check_budget,
    check_epoch,
    check_steps,
    largest_distance,
    pixel_number,
    ramp,
)

EPS = 8 / 255


def refused(error: type[Exception], call: Any, message: str) -> None:
    """``call`` raises exactly ``error``, and its message is ``message`` from the first to the last character."""
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert caught.type is error


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


def test_presets_are_the_tables_and_nobody_can_change_them() -> None:
    assert dict(BUDGETS) == {
        "low": ((1.0, 2, 1.0),),
        "high": ((0.25, 2, 1.0), (0.5, 3, 2 / 3), (0.75, 4, 0.5), (1.0, 5, 0.5)),
        "high_as_executed": ((1.0, 5, 0.5),),
    }
    with pytest.raises(TypeError, match="does not support item assignment"):
        BUDGETS["low"] = ()  # type: ignore[index]


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


@pytest.mark.parametrize("epochs", [(None, None), (None, 4), (1, None), (0, 4), (-1, 4), (2.0, 4), (True, 4), (1, "4")])
def test_epochs_that_are_missing_or_no_epochs(epochs: tuple[Any, Any]) -> None:
    epoch, total = epochs
    valid_epoch = isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 1
    name, value = ("epochs", total) if valid_epoch else ("epoch", epoch)
    message = (
        f"PGD.strength: `{name}` must be an integer of at least 1, as the strength changes over the epochs, got "
        f"{value!r}. Call the attack with strength=attack.strength(epoch, epochs); epochs are counted from 1."
    )
    for attack in (PGD(eps=EPS, budget="high"), PGD(eps=EPS, steps=1, step_size=EPS, eps_ramp=1.0)):
        refused(ValueError, lambda a=attack: a.strength(epoch, total), message)


def test_an_epoch_behind_the_last() -> None:
    attack = PGD(eps=EPS, budget="high")
    with pytest.raises(
        ValueError, match=r"^PGD\.strength: `epoch` must be at most the 4 epochs of the training, got 5"
    ):
        attack.strength(5, 4)
    assert check_epoch("someone", 4, 4) == (4, 4)


# --- budgets of one's own --------------------------------------------------------------------------------------------


def test_custom_rows_hold_up_to_and_including_their_share() -> None:
    """Lists, as a config file has them; tenths are no binary fractions, and still their own epoch belongs to them."""
    attack = PGD(eps=0.5, budget=[[0.1, 1, 1.0], [0.3, 2, 0.75], [0.7, 3, 0.5], [1, 4, 0.25]])
    assert attack.budget == (
        BudgetRow(0.1, 1, 1.0),
        BudgetRow(0.3, 2, 0.75),
        BudgetRow(0.7, 3, 0.5),
        BudgetRow(1.0, 4, 0.25),
    )
    assert all(type(row) is BudgetRow for row in attack.budget)
    strengths = [attack.strength(epoch, 10) for epoch in range(1, 11)]
    assert [strength.steps for strength in strengths] == [1, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    sizes = [0.5, 0.375, 0.375, 0.25, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125]
    assert [strength.step_size for strength in strengths] == pytest.approx(sizes)
    assert [strength.eps for strength in strengths] == [0.5] * 10


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([], []),
        ([(0.5, 2, 1.0)], [0.5]),
        ([(0.5, 2, 1.0), (0.5, 3, 1.0), (1.0, 3, 1.0)], [0.5, 0.5, 1.0]),
        ([(0.75, 2, 1.0), (0.5, 3, 1.0), (1.0, 3, 1.0)], [0.75, 0.5, 1.0]),
        ([(1.0, 2, 1.0), (0.5, 3, 1.0)], [1.0, 0.5]),
        ([(100, 2, 1.0), (200, 3, 1.0)], [100.0, 200.0]),  # epochs instead of shares
    ],
    ids=["none", "not to the end", "twice", "falling", "the end first", "epochs"],
)
def test_rows_that_do_not_rise_to_1(rows: Any, ends: list[float]) -> None:
    refused(
        ValueError,
        lambda: PGD(eps=EPS, budget=rows),
        "PGD: `budget` must be rows of (until, steps, step size / eps), such as [(0.5, 2, 1.0), (1.0, 5, 0.5)] whose "
        f"first entries rise and end with 1, got {ends}. Sort the rows and let the last one reach 1.0.",
    )


@pytest.mark.parametrize("budget", [3, [1.0, 2, 1.0], [(1.0, 2)], [(1.0, 2, 1.0, 1.0)], {"low": 1}, {(1.0, 2, 1.0)}])
def test_budgets_that_are_no_rows(budget: Any) -> None:
    refused(
        TypeError,
        lambda: PGD(eps=EPS, budget=budget),
        "PGD: `budget` must be a name or rows of (until, steps, step size / eps), such as [(0.5, 2, 1.0), "
        f"(1.0, 5, 0.5)], got {budget!r}. Known names: high, high_as_executed, low.",
    )


@pytest.mark.parametrize(
    ("row", "error", "start"),
    [
        ((0.0, 2, 1.0), ValueError, "PGD: `budget: until` must be a finite number above 0, got 0.0."),
        (("1", 2, 1.0), TypeError, "PGD: `budget: until` must be a finite number above 0, got '1' of type str."),
        ((1.0, 0, 1.0), ValueError, "PGD: `budget: steps` must be an integer of at least 1, got 0."),
        ((1.0, 2.0, 1.0), TypeError, "PGD: `budget: steps` must be an integer of at least 1, got 2.0 of type float."),
        ((1.0, 2, 0.0), ValueError, "PGD: `budget: step size / eps` must be a finite number above 0, got 0.0."),
        ((1.0, 2, math.nan), ValueError, "PGD: `budget: step size / eps` must be a finite number above 0, got nan."),
    ],
)
def test_rows_with_an_entry_out_of_range(row: Any, error: type[Exception], start: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(start)}"):
        check_budget("PGD", [row])


@pytest.mark.parametrize("name", ["hihg", "High", "high-as-executed"])
def test_unknown_budgets_name_the_nearest(name: str) -> None:
    nearest = "high_as_executed" if "exec" in name else "high"
    refused(
        ValueError,
        lambda: PGD(eps=EPS, budget=name),
        f"PGD: unknown `budget` `{name}`. Did you mean `{nearest}`? Known: high, high_as_executed, low.",
    )
    refused(
        ValueError,
        lambda: PGD(eps=EPS, budget="qqq"),
        "PGD: unknown `budget` `qqq`. Known: high, high_as_executed, low.",
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"steps": 2},
        {"step_size": 0.1},
        {"budget": "low", "steps": 2},
        {"budget": "low", "step_size": 0.1},
        {"budget": "low", "steps": 2, "step_size": 0.1},
    ],
    ids=str,
)
def test_steps_and_budget_exclude_each_other(given: dict[str, Any]) -> None:
    shown = ", ".join(f"{name}={given.get(name)!r}" for name in ("steps", "step_size", "budget"))
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(f'PGD: `steps` and `step_size` must both be given, or a `budget` instead, got {shown}.')}",
    ):
        PGD(eps=EPS, **given)


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps: int) -> None:
    refused(
        ValueError,
        lambda: PGD(eps=EPS, steps=steps, step_size=EPS),
        f"PGD: `steps` must be an integer of at least 1, got {steps}. An attack without steps moves nothing.",
    )


@pytest.mark.parametrize(("steps", "kind"), [(2.0, "float"), ("2", "str"), (True, "bool"), ([2], "list")])
def test_steps_that_are_no_integer(steps: Any, kind: str) -> None:
    refused(
        TypeError,
        lambda: PGD(eps=EPS, steps=steps, step_size=EPS),
        f"PGD: `steps` must be an integer of at least 1, got {steps!r} of type {kind}. Pass a whole number of steps.",
    )
    assert check_steps("someone", "steps", 1) == 1


# --- numbers of pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8/255", 8 / 255),
        (" 8/255 ", 8 / 255),
        ("0.5", 0.5),
        ("1", 1.0),
        ("1e-3", 0.001),
        (0.25, 0.25),
        (1, 1.0),
        (Fraction(8, 255), 8 / 255),
    ],
)
def test_pixel_numbers(value: Any, expected: float) -> None:
    number = pixel_number("someone", "eps", value)
    assert number == expected
    assert type(number) is float
    assert PGD(eps=value, steps=1, step_size=value).eps == expected


@pytest.mark.parametrize("text", ["", "eight", "8/0", "8 of 255", "8/255/2", "nan", "inf", "1e400", "8//255"])
@pytest.mark.parametrize("name", ["eps", "step_size"])
def test_text_that_is_no_fraction(text: str, name: str) -> None:
    settings = {"eps": EPS, "steps": 1, "step_size": EPS, name: text}
    refused(
        ValueError,
        lambda: PGD(**settings),
        f"PGD: `{name}` must be a number or a fraction, got {text!r}. Write it as '8/255' or 0.03137.",
    )


@pytest.mark.parametrize("name", ["eps", "step_size"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.0, "0.0"), ("0/255", "0.0"), (-0.1, "-0.1"), ("-1/4", "-0.25"), (math.nan, "nan")]
)
def test_pixel_numbers_out_of_range(name: str, norm: str, value: Any, shown: str) -> None:
    settings = {"eps": EPS, "steps": 1, "step_size": EPS, "norm": norm, name: value}
    refused(
        ValueError,
        lambda: PGD(**settings),
        f"PGD: `{name}` must be a finite number above 0, got {shown}. Choose a value in that range.",
    )


@pytest.mark.parametrize("value", [None, True, [8, 255], 1j])
def test_pixel_numbers_of_another_type(value: Any) -> None:
    refused(
        TypeError,
        lambda: PGD(eps=value, budget="low"),
        f"PGD: `eps` must be a finite number above 0, got {value!r} of type {type(value).__name__}. "
        f"Pass a plain Python float.",
    )


@pytest.mark.parametrize(("value", "fraction"), [(8, "8/255"), (8.0, "8/255"), ("8", "8/255"), (16, "16/255")])
@pytest.mark.parametrize("name", ["eps", "step_size"])
def test_numbers_meant_for_pixels_of_0_to_255(name: str, value: Any, fraction: str) -> None:
    settings = {"eps": EPS, "steps": 1, "step_size": EPS, name: value}
    refused(
        ValueError,
        lambda: PGD(**settings),
        f"PGD: `{name}` must be at most 1, as pixels lie in [0, 1], got {value!r}. A value meant for pixels of 0..255 "
        f"is written as a fraction, '{fraction}'.",
    )
    assert pixel_number("PGD", name, fraction) < 0.1, "the way out is one"


def test_the_fraction_proposed_for_a_decimal_is_accepted() -> None:
    with pytest.raises(ValueError, match="is written as a fraction") as caught:
        PGD(eps=7.5, budget="low")
    proposed = re.findall(r"'([^']+)'\.$", str(caught.value))
    assert PGD(eps=proposed[0], budget="low").eps == pytest.approx(7.5 / 255)


@pytest.mark.parametrize("ramp", [1.5, 20, 100.0])
def test_ramps_longer_than_the_training(ramp: float) -> None:
    refused(
        ValueError,
        lambda: PGD(eps=EPS, budget="low", eps_ramp=ramp),
        f"PGD: `eps_ramp` must be a fraction of the training, from 0 to 1, got {ramp}. For a ramp over all epochs pass "
        f"1.0.",
    )


def test_ramps_that_are_no_fraction() -> None:
    refused(
        ValueError,
        lambda: PGD(eps=EPS, budget="low", eps_ramp=-0.5),
        "PGD: `eps_ramp` must be a finite number of at least 0, got -0.5. Choose a value in that range.",
    )
    with pytest.raises(TypeError, match="PGD: `eps_ramp` must be a finite number of at least 0, got True of type bool"):
        PGD(eps=EPS, budget="low", eps_ramp=True)


def test_the_largest_distance_between_two_images() -> None:
    assert largest_distance("linf", 3072) == 1.0
    assert largest_distance("l2", 3072) == pytest.approx(55.4256, abs=1e-4)
