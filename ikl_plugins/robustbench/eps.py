"""The radius of a threat model as the exact fraction that was written."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from fractions import Fraction

from .. import _validation as check

__all__ = ["Eps", "as_fraction", "parse_eps"]

_GREY_LEVELS = 255
_LENGTH = 60  # characters of a radius
_MOST = 10**30
_NEAR = 0.13  # of a grey level: rounding 8/255 to three decimals moves it by 0.095


@dataclass(frozen=True)
class Eps:
    """A radius in pixel units: pixels lie in [0, 1].

    Attributes:
        text: as it was written, such as '8/255' or '0.5'.
        exact: the same as a fraction.
    """

    text: str
    exact: Fraction

    def __float__(self) -> float:
        return float(self.exact)

    def __str__(self) -> str:
        return self.text


def as_fraction(text: str) -> Fraction:
    """The fraction that '8/255', '7.5/255' or '0.5' stands for; ValueError, TypeError or an ArithmeticError if none."""
    if len(text) > _LENGTH or re.search(r"e[+-]?\d[\d_]{2}", text, re.IGNORECASE):
        raise ValueError("too long a number")  # the fraction of 1e999999999 would fill the memory
    return Fraction(*map(Fraction, text.split("/")))


def parse_eps(caller: str, value: object, *, norm: str = "Linf") -> Eps:
    """Reads a radius and keeps it exactly.

    Args:
        caller: whom a refusal names.
        value: text such as '8/255', '0.5' or '7.5/255', a number, or an :class:`Eps`, which is handed back.
        norm: 'Linf', 'L2' or 'L1'. L-infinity radii count grey levels, so that a decimal close to one gets a warning.

    Returns:
        The radius, above 0. A float counts as k/255 only if it is the same float as k / 255.

    Raises:
        TypeError: neither text nor a number.
        ValueError: text that is no fraction, or a radius that is not above 0 and finite, or above 1 for L-infinity.

    Warns:
        UserWarning: an L-infinity radius that is nearly, but not exactly, a number of grey levels, as 0.031 is for
            8/255. It is used as it was given.
    """
    if isinstance(value, Eps):
        return value
    if isinstance(value, Fraction):
        value = str(value)
    if isinstance(value, str):
        try:
            exact = as_fraction(value)
        except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(
                f"{caller}: `eps` must be a fraction or a number, got {value!r}. Write 8/255 or 0.5."
            ) from error
        eps = Eps("".join(value.split()), exact)
    else:
        number = check.check_number(caller, "eps", value)
        levels = round(min(number, _MOST) * _GREY_LEVELS)
        if number.is_integer():
            eps = Eps(str(int(number)), Fraction(int(number)))
        elif number == levels / _GREY_LEVELS:  # 8 / 255, computed
            eps = Eps(f"{levels}/{_GREY_LEVELS}", Fraction(levels, _GREY_LEVELS))
        else:
            eps = Eps(repr(number), Fraction(repr(number)))
    if eps.exact <= 0:
        raise ValueError(f"{caller}: `eps` must be above 0, got {value!r}. Write it as 8/255 or 0.5.")
    if not 1 / Fraction(_MOST) <= eps.exact <= _MOST:
        raise ValueError(f"{caller}: `eps` must be from 1e-30 to 1e30, got {value!r}. Write it as 8/255 or 0.5.")
    if norm == "Linf" and eps.exact > 1:
        raise ValueError(
            f"{caller}: `eps` must be at most 1 for L-infinity, got {eps.text}. Write "
            f"{eps.text}/{_GREY_LEVELS} for grey levels."
        )
    if norm == "Linf":
        in_levels = float(eps.exact * _GREY_LEVELS)
        nearest = round(in_levels)
        if nearest > 0 and 0 < abs(in_levels - nearest) < _NEAR:
            warnings.warn(
                f"{caller}: `eps` = {eps.text} is {in_levels:.4g}/255 and not {nearest}/255. It is used as it is; for "
                f"{nearest}/255 write {nearest}/255.",
                UserWarning,
                stacklevel=3,
            )
    return eps
