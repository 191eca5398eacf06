"""The checks of what is claimed."""

from __future__ import annotations

from fractions import Fraction

from .subject import GREY_LEVELS, Finding, Subject

__all__ = ["claim", "radius"]

_ROUNDING = 0.005  # points: accuracies are stated with two decimals


def radius(subject: Subject) -> Finding:
    eps = subject.radius
    if eps is None:
        return None, "No radius was given."
    if subject.norm != "Linf":
        return True, f"{eps} is exact."
    levels = eps.exact * GREY_LEVELS
    if eps.exact > 1:
        return False, f"{eps} is above 1, the range of a pixel in [0, 1]. Write grey levels as k/{GREY_LEVELS}."
    if "/" in eps.text:
        return True, f"{eps} is exact{'' if levels.denominator == 1 else ', but no whole number of grey levels'}."
    if levels.denominator == 1:
        return True, f"{eps} is exactly {levels}/{GREY_LEVELS}."
    nearest = Fraction(max(1, round(levels)))
    return False, (
        f"{eps} is {float(levels):.4g}/{GREY_LEVELS}, no number of grey levels. Evaluate at a fraction such as "
        f"{nearest}/{GREY_LEVELS}."
    )


def claim(subject: Subject) -> Finding:
    claimed, measured = subject.claimed, subject.measured
    if claimed is None or measured is None:
        missing = [name for name, value in (("claimed", claimed), ("measured", measured)) if value is None]
        return None, f"No accuracy was given as {' and '.join(missing)}."
    if claimed > measured + _ROUNDING:
        return False, f"The claim of {claimed:.2f} % is above the measured {measured:.2f} %. Claim the measured one."
    return True, f"The claim of {claimed:.2f} % is not above the measured {measured:.2f} %."
