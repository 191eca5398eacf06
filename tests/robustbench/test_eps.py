"""The radius: kept as the fraction that was written, never rounded."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest

from ikl_plugins.robustbench.eps import Eps, parse_eps


@pytest.mark.parametrize(
    ("value", "text", "exact"),
    [
        ("8/255", "8/255", Fraction(8, 255)),
        (" 8 / 255 ", "8/255", Fraction(8, 255)),
        ("7.5/255", "7.5/255", Fraction(15, 510)),
        ("0.5", "0.5", Fraction(1, 2)),
        (0.5, "0.5", Fraction(1, 2)),
        (8 / 255, "8/255", Fraction(8, 255)),
        (Fraction(4, 255), "4/255", Fraction(4, 255)),
        (1, "1", Fraction(1)),
    ],
)
def test_keeps_what_was_written(value: object, text: str, exact: Fraction) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eps = parse_eps("evaluate", value, norm="L2")
    assert (str(eps), eps.exact) == (text, exact)
    assert float(eps) == exact.numerator / exact.denominator


def test_hands_an_eps_back() -> None:
    eps = Eps("8/255", Fraction(8, 255))
    assert parse_eps("evaluate", eps) is eps


@pytest.mark.parametrize(
    ("value", "levels"), [("0.031", "7.905"), (0.031, "7.905"), ("0.0314", "8.007"), (0.01569, "4.001")]
)
def test_warns_of_a_decimal_close_to_grey_levels_and_does_not_round(value: str | float, levels: str) -> None:
    nearest = round(float(levels))
    with pytest.warns(
        UserWarning,
        match=rf"^evaluate: `eps` = {value} is {levels}/255 and not {nearest}/255. It is used as it is; for "
        rf"{nearest}/255 write {nearest}/255.$",
    ):
        eps = parse_eps("evaluate", value)
    assert float(eps) == float(value)


@pytest.mark.parametrize("value", ["8/255", 8 / 255, "0.03", "7.5/255", "0.5", 0.5])
def test_says_nothing_of_grey_levels_and_of_what_is_far_from_them(value: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_eps("evaluate", value)


def test_says_nothing_of_an_l2_radius() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(parse_eps("evaluate", "0.031", norm="L2")) == 0.031


@pytest.mark.parametrize("value", ["8/", "8/255/2", "eight", "", "1/0", "inf", "nan"])
def test_refuses_text_that_is_no_fraction(value: str) -> None:
    with pytest.raises(
        ValueError, match=r"^evaluate: `eps` must be a fraction or a number, got '.*'. Write it as 8/255 or 0.5.$"
    ):
        parse_eps("evaluate", value)


@pytest.mark.parametrize("value", ["0", "-8/255", 0, 0.0])
def test_refuses_a_radius_that_is_not_above_0(value: object) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: `eps` must be above 0, got .*. Write it as 8/255 or 0.5.$"):
        parse_eps("evaluate", value)


@pytest.mark.parametrize("value", ["8", 8, "1.5", "256/255"])
def test_refuses_an_l_infinity_radius_beyond_all_pixels(value: object) -> None:
    with pytest.raises(ValueError, match=rf"^evaluate: `eps` must be at most 1 .*, got {value}. Write grey levels as"):
        parse_eps("evaluate", value)
    assert float(parse_eps("evaluate", "8", norm="L2")) == 8


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_refuses_numbers_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: `eps` must be a finite number"):
        parse_eps("evaluate", value)


@pytest.mark.parametrize("value", [None, True, [8, 255]])
def test_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError, match=r"^evaluate: `eps` must be a finite number"):
        parse_eps("evaluate", value)
