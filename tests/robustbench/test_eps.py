"""The radius: kept as the fraction that was written, never rounded."""

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
        ("0.03", "0.03", Fraction(3, 100)),  # far from grey levels
        ("0.0002", "0.0002", Fraction(1, 5000)),  # near none but black
        (0.5, "0.5", Fraction(1, 2)),
        (8 / 255, "8/255", Fraction(8, 255)),
        (Fraction(4, 255), "4/255", Fraction(4, 255)),
        (1, "1", Fraction(1)),
        (Eps("8/255", Fraction(8, 255)), "8/255", Fraction(8, 255)),
    ],
)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_keeps_what_was_written(value, text, exact, norm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eps = parse_eps("evaluate", value, norm=norm)
    assert (str(eps), eps.exact, float(eps)) == (text, exact, exact.numerator / exact.denominator)


@pytest.mark.parametrize(
    ("value", "levels"),
    [("0.031", "7.905"), (0.031, "7.905"), ("0.0314", "8.007"), (0.01569, "4.001"), ("0.0039", "0.9945")],
)
def test_warns_of_a_decimal_close_to_grey_levels_and_does_not_round(value, levels):
    with pytest.warns(
        UserWarning, match=rf"^evaluate: `eps` = {value} is {levels}/255 and not {round(float(levels))}/255"
    ) as seen:
        eps = parse_eps("evaluate", value)
    assert float(eps) == float(value)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # radii of L2 count no grey levels
        assert float(parse_eps("evaluate", value, norm="L2")) == float(value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        *((text, ValueError, "a fraction or a number") for text in ("8/", "8/255/2", "eight", "", "1/0", "inf", "nan")),
        *((text, ValueError, "a fraction or a number") for text in ("1e999999999", "1E-1_00", "9" * 61)),
        *((value, ValueError, "from 1e-30 to 1e30") for value in ("1e31", 1e308, "1e-31", 5e-324)),
        *((value, ValueError, "above 0, got") for value in ("0", "-8/255", 0, 0.0)),
        *((value, ValueError, f"at most 1 .*, got {value}.* {value}/255") for value in ("8", 8, "1.5", "256/255")),
        *((value, ValueError, "a finite number") for value in (math.inf, math.nan, -1.0)),
        *((value, TypeError, "a finite number") for value in (None, True, [8, 255])),
    ],
)
def test_refuses_what_is_no_radius(value, error, message):
    with pytest.raises(error, match=rf"^evaluate: `eps` must be {message}"):
        parse_eps("evaluate", value)


def test_an_l2_radius_may_be_above_1():
    assert float(parse_eps("evaluate", "8", norm="L2")) == 8
