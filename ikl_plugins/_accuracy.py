"""What a teacher's answers to a few images say: how far from chance they are, and from those of better inputs."""

from __future__ import annotations

import math

__all__ = ["LEAST_IMAGES", "at_chance", "worse"]

LEAST_IMAGES = 32  # to ask a teacher about; of one or two even a good one may know none


def at_chance(right: int, total: int, classes: int) -> bool:
    """Whether so many right answers are within a standard deviation of those of a guess, or fewer; of few nobody knows.

    Args:
        right: number of right answers.
        total: number of images.
        classes: number of classes.

    Example:
        >>> at_chance(4, 32, 10), at_chance(6, 32, 10), at_chance(0, 2, 10)
        (True, False, False)
    """
    if total < LEAST_IMAGES // 2:
        return False
    chance = 1 / max(1, classes)
    return right <= total * chance + math.sqrt(total * chance * (1 - chance))


def worse(only_here: int, only_there: int) -> bool:
    """Whether one set of answers is worse than another on the same images, by two standard deviations (McNemar).

    Args:
        only_here: number of images that the one set alone has right.
        only_there: number of images that the other set alone has right.

    Example:
        >>> worse(0, 4), worse(0, 5), worse(3, 10)
        (False, True, False)
    """
    return only_there - only_here > 2 * math.sqrt(only_there + only_here)
