"""Two evaluations on the same images, image for image."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._files import written_aside
from .evaluation.log import Evaluation
from .evaluation.verdict import attacks_in_words
from .figures import drawn, new_figure, require_matplotlib, save_figure
from .report import binomial_interval
from .tables import aligned

__all__ = ["Comparison", "Paired", "compare", "mcnemar", "paired_interval"]

# Without these in common, robust accuracies are of different things; keys of the log.
_SETTINGS = (
    "threat_model",
    "eps",
    "version",
    "attacks",
    "parameters",
    "surrogate",
    "precision",
    "n_target_classes",
    "autoattack",
)
_SHOWN = 10  # indices of images
_CLASSES = 20  # bars


@dataclass(frozen=True)
class Paired:
    """The same question about each image, answered for two models.

    Attributes:
        both, neither: how many images both models, or neither, get right.
        only_a, only_b: indices of the images that one alone gets right.
    """

    both: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    neither: int

    @classmethod
    def of(cls, a: Sequence[int], b: Sequence[int]) -> Paired:
        """From a flag per image, 1 for right."""
        pairs = list(zip(a, b, strict=True))
        only_a, only_b = (tuple(i for i, pair in enumerate(pairs) if pair == one) for one in ((1, 0), (0, 1)))
        return cls(pairs.count((1, 1)), only_a, only_b, pairs.count((0, 0)))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """How many both, a alone, b alone and neither get right."""
        return self.both, len(self.only_a), len(self.only_b), self.neither

    @property
    def accuracies(self) -> tuple[float, float]:
        """Of a and of b, in percent."""
        both, a, b, neither = self.counts
        total = both + a + b + neither
        return 100 * (both + a) / total, 100 * (both + b) / total

    @property
    def difference(self) -> float:
        """The accuracy of b less that of a, in percent of the images."""
        both, a, b, neither = self.counts
        return 100 * (b - a) / (both + a + b + neither)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the difference, with 95 % confidence; see :func:`paired_interval`."""
        return paired_interval(*self.counts)

    @property
    def p_value(self) -> float:
        """See :func:`mcnemar`."""
        return mcnemar(len(self.only_a), len(self.only_b))

    def as_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("accuracies", "difference", "interval", "p_value")}
        return {**facts, **asdict(self)}


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        a, b: the logs.
        natural: on the natural images; None where neither log has them.
        robust: after all attacks; None where natural images alone were asked for.
        differences: in the settings of the two evaluations.
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    natural: Paired
    robust: Paired | None
    differences: tuple[str, ...] = ()

    @property
    def asked(self) -> Paired:
        """What was asked for: robust, or natural alone."""
        return self.natural if self.robust is None else self.robust

    def lost_to(self, log: Mapping[str, Any], indices: Sequence[int]) -> dict[str, int]:
        """How many of these images the model of a log loses to each attack, or as 'natural' images."""
        if self.robust is None:
            return {}
        return dict(Counter(log["fell_to"][index] or "natural" for index in indices))

    def __str__(self) -> str:
        data = (self.a["data"] or {}).get("name") or "data without a name"
        lines = [f"{self.a['n_examples']:,} images of {data}"]
        lines += [f"{name}: {_what(log, self.robust is not None)}" for name, log in (("a", self.a), ("b", self.b))]
        lines += [f"Not the same: {text}" for text in self.differences]
        rows = [["accuracy (%)", "a", "b", "b - a", "95 % interval", "p"]]
        kinds = (("natural", self.natural), ("robust", self.robust))
        for kind, paired in ((kind, paired) for kind, paired in kinds if paired is not None):
            low, high = paired.interval
            numbers = [*(f"{value:.2f}" for value in paired.accuracies), f"{paired.difference:+.2f}"]
            rows.append([kind, *numbers, f"{low:+.2f} to {high:+.2f}", f"{paired.p_value:.3g}"])
        lines += ["", aligned(rows), ""]
        both, _, _, neither = self.asked.counts
        what = "classify right" if self.robust is None else "withstand"
        lines.append(f"Images that both {what}: {both:,}; neither: {neither:,}.")
        for name, other, log, indices in (("a", "b", self.b, self.asked.only_a), ("b", "a", self.a, self.asked.only_b)):
            lost = ", ".join(f"{cause} {count}" for cause, count in self.lost_to(log, indices).items())
            shown = ", ".join(map(str, indices[:_SHOWN])) + (", ..." if len(indices) > _SHOWN else "")
            lines.append(f"{name} alone: {len(indices):,}" + (f": {shown}" if indices else ""))
            lines += [f"  {other} loses them to: {lost}"] if lost else []
        lines.append("Interval: Newcombe's for paired proportions. p: McNemar's exact test, two-sided.")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes everything as .json, or as .csv the images that one model alone gets right.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix not in (".csv", ".json"):
            raise ValueError(f"Comparison.save: `path` must end with .csv or .json, got {path}.")
        with written_aside(path) as aside:
            if path.suffix == ".json":
                aside.write_text(json.dumps(self._as_json(), indent=1, allow_nan=False) + "\n")
            else:
                with aside.open("w", newline="") as file:
                    csv.writer(file).writerows(self._rows())

    def _as_json(self) -> dict[str, Any]:
        keys = ("model", "checkpoint", "weights_sha256", *_SETTINGS)
        found = {name: {key: log.get(key) for key in keys} for name, log in (("a", self.a), ("b", self.b))}
        results = {"natural": self.natural.as_json(), "robust": self.robust and self.robust.as_json()}
        return {**found, "data": self.a["data"], "differences": self.differences, **results}

    def _rows(self) -> list[list[object]]:
        rows: list[list[object]] = []
        for name, other, indices in (("a", self.b, self.asked.only_a), ("b", self.a, self.asked.only_b)):
            for index in indices:
                lost = "natural" if self.robust is None else other["fell_to"][index] or "natural"
                rows.append([index, other["labels"][index], name, lost])
        return [["index", "label", "right", "the other loses it to"], *sorted(rows, key=lambda row: int(str(row[0])))]

    def draw(self, path: str | Path) -> None:
        """Writes a picture: how many images both, one and neither get right, and the difference per class.

        Args:
            path: its ending gives the format. Of more than 20 classes, those with the largest differences are shown.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        require_matplotlib("Comparison.draw")
        figure, grid = new_figure(11, 4, rows=1, columns=2)
        left, right = grid[0]
        both, only_a, only_b, neither = self.asked.counts
        table = [[both, only_a], [only_b, neither]]
        left.imshow(table, cmap="Blues", vmin=0, vmax=2 * max(map(max, table)))  # so that black text can be read
        for row, counts in enumerate(table):
            for column, count in enumerate(counts):
                left.text(column, row, f"{count:,}", ha="center", va="center")
        left.set(xticks=(0, 1), yticks=(0, 1), xticklabels=("b right", "b wrong"), yticklabels=("a right", "a wrong"))
        kind = "natural" if self.robust is None else "robust"
        left.set_title(f"Images, {kind}")
        labels = Counter(self.a["labels"])
        gained, lost = (Counter(self.a["labels"][i] for i in of) for of in (self.asked.only_b, self.asked.only_a))
        points = {label: 100 * (gained[label] - lost[label]) / count for label, count in labels.items()}
        shown = sorted(sorted(points, key=lambda label: -abs(points[label]))[:_CLASSES])
        names = self.a["classes"] or [str(label) for label in range(max(labels) + 1)]
        right.bar(range(len(shown)), [points[label] for label in shown])
        right.axhline(0, color="black", linewidth=0.8)
        right.set_xticks(range(len(shown)), [drawn(names[label]) for label in shown], rotation=60)
        right.set(title=f"{kind} accuracy per class, b - a", ylabel="percent of the images")
        save_figure(figure, path)


def compare(
    a: Evaluation | str | Path,
    b: Evaluation | str | Path,
    *,
    natural: bool = False,
    allow_differences: bool = False,
) -> Comparison:
    """Compares two models on the same images.

    Args:
        a, b: evaluations, or the files of their logs.
        natural: compare what they say of the natural images alone; the attacks may then be any.
        allow_differences: warn where the attacks have other settings instead of refusing.

    Returns:
        The comparison. Differences are b less a.

    Raises:
        ValueError: the images or their labels are not the same (by their checksum); other settings of the attacks; an
            evaluation is unfinished or, unless ``natural``, under corruptions; there are no predictions on natural
            images.

    Warns:
        UserWarning: other settings, with ``allow_differences``.
    """
    caller = "compare"
    logs = [(one if isinstance(one, Evaluation) else Evaluation.load(one)).log for one in (a, b)]
    for name, log in zip("ab", logs, strict=True):
        if not natural and (log["fell_to"] is None or not log["finished"]):
            what = "under corruptions" if log["fell_to"] is None else "unfinished"
            raise ValueError(
                f"{caller}: `{name}` must be a finished evaluation by attacks, but is {what}. Set natural=True "
                "(--natural)."
            )
        if log["natural_correct"] is None:
            raise ValueError(f"{caller}: `{name}` must have predictions on natural images, but has none.")
    first, second = logs
    if first["data"]["sha256"] != second["data"]["sha256"]:
        names = " and ".join(f"{log['n_examples']:,} of {log['data']['name'] or 'unnamed data'}" for log in logs)
        raise ValueError(f"{caller}: `a` and `b` must be of the same images, but are of others: {names}.")
    keys = [] if natural else [key for key in _SETTINGS if first.get(key) != second.get(key)]
    differences = tuple(f"{key}, {json.dumps(first.get(key))} and {json.dumps(second.get(key))}" for key in keys)
    if differences and not allow_differences:
        raise ValueError(
            f"{caller}: `a` and `b` must have the same settings, but differ in {'; '.join(differences)}. "
            "Set allow_differences=True (--allow-differences)."
        )
    for text in differences:
        warnings.warn(f"{caller}: the evaluations are not comparable in {text}.", stacklevel=2)
    flags = {key: Paired.of(first[key], second[key]) for key in ("natural_correct", *(() if natural else ("robust",)))}
    return Comparison(first, second, flags["natural_correct"], flags.get("robust"), differences)


def mcnemar(only_a: int, only_b: int) -> float:
    """The p-value of McNemar's exact test, two-sided.

    If both models were right equally often, of the images that one alone gets right each would be a's with probability
    1/2: this is how likely a split at least as uneven as the one found then is.

    Args:
        only_a, only_b: how many images one model alone gets right.

    Returns:
        A number from 0 to 1; 1 where the models agree on every image.

    References:
        McNemar, Psychometrika 12 (1947); exact: twice the smaller tail of the binomial distribution.

    Example:
        >>> round(mcnemar(1, 7), 4)
        0.0703
    """
    count, few = only_a + only_b, min(only_a, only_b)
    tail, term = 0, 1  # binomial coefficients, exact
    for k in range(few + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, float(2 * tail / 2**count))


def paired_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two paired proportions, b less a.

    Wilson's intervals of the two accuracies, joined with the correlation of the flags, which is corrected for
    continuity.

    Args:
        both, only_a, only_b, neither: counts of images, at least one in all.

    Returns:
        Lower and upper end, in percent of the images.

    References:
        Newcombe, Statistics in Medicine 17 (1998), pp. 2635-2650, method 10.

    Example:
        >>> [round(end, 2) for end in paired_interval(59, 6, 16, 80)]
        [0.46, 11.86]
    """
    total = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    share_a, share_b = 100 * right_a / total, 100 * right_b / total
    (low_a, high_a), (low_b, high_b) = (binomial_interval(right, total) for right in (right_a, right_b))
    product = both * neither - only_a * only_b
    agreement = max(product - total / 2, 0.0) if product > 0 else product
    margins = right_a * right_b * (total - right_a) * (total - right_b)
    correlation = agreement / math.sqrt(margins) if margins else 0.0

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    middle = share_b - share_a
    return middle - joined(share_b - low_b, high_a - share_a), middle + joined(high_b - share_b, share_a - low_a)


def _what(log: Mapping[str, Any], attacked: bool) -> str:
    source = (log["checkpoint"] or {}).get("name")
    text = log["model"] if source is None else f"{log['model']}, {source}"
    if not attacked:
        return str(text)
    return f"{text}; {log['threat_model']}, eps {log['eps']}, {attacks_in_words(log)}"
