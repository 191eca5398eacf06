"""What docs/results/adversarial.json holds, by the rows of the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from evidence import reproduce_adversarial_plan as plan
from evidence.report import binomial_margin
from evidence.reproduce_adversarial_jobs import from_hex
from evidence.reproduce_adversarial_plan import EPS, Budget, Cell


def budget(content: dict[str, Any]) -> Budget:
    return Budget(**content["budget"])


def result(content: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = content["jobs"][name]["result"]
    return found


def seeds(content: dict[str, Any], method: str, awp: bool) -> list[int]:
    cells = [Cell(*cell) for cell in plan.cells(budget(content))]
    return [cell.seed for cell in cells if (cell.method, cell.awp) == (method, awp)]


def right(content: dict[str, Any], measure: str, label: str) -> list[bool]:
    """Which test images the network of a training gets right."""
    found = result(content, f"{'autoattack' if measure == 'autoattack' else 'pgd'}-{label}")
    text = found["natural"] if measure == "natural" else found["robust"]
    return from_hex(text[EPS] if isinstance(text, dict) else text, found["images"])


def accuracies(content: dict[str, Any], measure: str, method: str, awp: bool) -> list[float]:
    """Of each seed, in percent."""
    labels = [Cell(method, awp, seed).label for seed in seeds(content, method, awp)]
    return [accuracy(content, measure, label) for label in labels]


def accuracy(content: dict[str, Any], measure: str, label: str) -> float:
    return 100 * statistics.fmean(right(content, measure, label))


def images(content: dict[str, Any], kind: str) -> int:
    return next(int(job["result"]["images"]) for name, job in content["jobs"].items() if name.startswith(f"{kind}-"))


def margin(content: dict[str, Any], measure: str) -> float:
    """The widest margin of a number of the main table."""
    count = images(content, "autoattack" if measure == "autoattack" else "pgd")
    found = [
        binomial_margin([one], count)
        for method in budget(content).methods
        for awp in (True, False)
        for one in accuracies(content, measure, method, awp)
    ]
    return max(found)


def difference(
    content: dict[str, Any], measure: str, ours: Sequence[str], theirs: Sequence[str]
) -> tuple[float, float]:
    """By how much some trainings are ahead of others on the test images, image by image.

    An image counts by the share of the trainings, of one seed each, that gets it right. Returns the mean difference in
    points, and half its 95 % interval over the images.
    """
    sides = []
    for labels in (ours, theirs):
        rights = [right(content, measure, label) for label in labels]
        sides.append([statistics.fmean(image) for image in zip(*rights, strict=True)])
    found = [100 * (one - other) for one, other in zip(*sides, strict=True)]
    return statistics.fmean(found), 1.96 * statistics.stdev(found) / math.sqrt(len(found))


def pair(content: dict[str, Any], ours: tuple[str, bool], theirs: tuple[str, bool]) -> tuple[list[str], list[str]]:
    """The labels of two rows of the main table, for the seeds that both have."""
    both = [seed for seed in seeds(content, *ours) if seed in seeds(content, *theirs)]
    one, other = ([Cell(*side, seed).label for seed in both] for side in (ours, theirs))
    return one, other
