"""Where a result stands among the entries of RobustBench's leaderboards, from a table that lies beside this file."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _validation as check
from .._limits import printable
from .eps import Eps, as_fraction, parse_eps
from .figures import drawn, new_figure, require_matplotlib, save_figure
from .tables import aligned, markdown_text

__all__ = ["Entry", "Place", "Ranking", "board_eps", "draw", "entries", "rank", "table_origin"]

_TABLE = "leaderboard.json"
_NEIGHBOURS = 3
_LABELLED = 5  # of the best entries, in the plot
_LABEL_DISTANCE = 1.0  # points of robust accuracy from one label to the next
# The field that ranks, by threat model; the first that an entry has (robustbench.utils.ACC_FIELDS).
_FIELDS = {
    "Linf": ("external", "autoattack_acc"),
    "L2": ("external", "autoattack_acc"),
    "L1": (),  # AutoAttack has it, RobustBench no leaderboard
    "corruptions": ("corruptions_acc",),
    "corruptions_3d": ("corruptions_acc_3d",),
}


@dataclass(frozen=True)
class Entry:
    """An entry of a leaderboard. Accuracies are in percent.

    Attributes:
        id: its name, such as 'Cui2023Decoupled_WRN-28-10'.
        architecture: as the entry words it.
        venue: where the paper appeared.
        link: the paper.
        eps: radius as the entry has it; None for corruptions.
        natural_accuracy: on images as they are.
        robust_accuracy: the one that ranks.
        autoattack_accuracy: by AutoAttack; None for corruptions.
        external: an adaptive attack of others gave the ``robust_accuracy``, which AutoAttack had overestimated.
        additional_data: trained on more images than the data set's own; generated ones do not count.
        unreliable: RobustBench marks its AutoAttack evaluation as possibly unreliable.
        number_forward_passes: of networks per prediction.
    """

    id: str
    architecture: str
    venue: str
    link: str
    eps: str | None
    natural_accuracy: float
    robust_accuracy: float
    autoattack_accuracy: float | None
    external: bool
    additional_data: bool
    unreliable: bool
    number_forward_passes: int


@dataclass(frozen=True)
class Place:
    """A place among other entries.

    Attributes:
        place: 1 more than the number of entries that are better.
        entries: how many others there are.
        ties: names of those with the same accuracy. A list that counts through, as RobustBench's does, gives a result
            with ties one of the places from ``place`` to ``place + len(ties)``.
    """

    place: int
    entries: int
    ties: tuple[str, ...]

    def __str__(self) -> str:
        last = self.place + len(self.ties)
        places = f"{self.place}" if last == self.place else f"{self.place} to {last}"
        return f"{places} of {self.entries + 1}"


@dataclass(frozen=True)
class Ranking:
    """A result among the entries of its leaderboard.

    Attributes:
        dataset, threat_model: as for :func:`rank`.
        eps: radius of the leaderboard; None for corruptions.
        robust_accuracy: of the result, in percent, to the two decimals of the leaderboard.
        natural_accuracy: the same; None if it was not given.
        additional_data: whether the result used any; None if it was not said.
        name: of the result.
        overall, with_data, without_data: place among all entries, those with additional data, and those without.
        above, below: the nearest entries that are better, and that are not, best first.
        better_in_both: names of the entries with higher natural and higher robust accuracy; empty without a
            ``natural_accuracy``.
        others: all entries that were compared, best first.
        date, source: of the table; the date as YYYY-MM-DD.
    """

    dataset: str
    threat_model: str
    eps: str | None
    robust_accuracy: float
    natural_accuracy: float | None
    additional_data: bool | None
    name: str
    overall: Place
    with_data: Place
    without_data: Place
    above: tuple[Entry, ...]
    below: tuple[Entry, ...]
    better_in_both: tuple[str, ...]
    others: tuple[Entry, ...]
    date: str
    source: str

    @property
    def title(self) -> str:
        """The leaderboard in words."""
        radius = f", eps = {self.eps}" if self.eps else ""
        return f"{self.dataset}, {self.threat_model}{radius}"

    @property
    def origin(self) -> str:
        """What the table is and when it was made, as a sentence."""
        return (
            f"Compared offline with the table of {self.date} ({self.source}); later entries are not in it. "
            f"Current: https://robustbench.github.io"
        )

    def __str__(self) -> str:
        """The places, and the nearest entries."""
        groups = {"all entries": self.overall, "with additional data": self.with_data}
        groups["without additional data"] = self.without_data
        places = [[f"among {words}", str(place)] for words, place in groups.items()]
        rows = [["entry", "place", "natural (%)", "robust (%)"]]
        rows += [self._cells(f"  {one.id}", one.natural_accuracy, one.robust_accuracy) for one in self.above]
        rows.append(self._cells(f"> {self.name}", self.natural_accuracy, self.robust_accuracy))
        rows += [self._cells(f"  {one.id}", one.natural_accuracy, one.robust_accuracy) for one in self.below]
        table = aligned(rows)
        return f"{self.name} on RobustBench ({self.title}), table of {self.date}\n{aligned(places)}\n\n{table}"

    def markdown(self) -> str:
        """The places and the neighbours, as Markdown."""
        natural = "" if self.natural_accuracy is None else f", natural accuracy {self.natural_accuracy:.2f} %"
        lines = [
            f"# {markdown_text(self.name)} on RobustBench: {self.title}",
            "",
            f"Robust accuracy {self.robust_accuracy:.2f} %{natural}.",
            "",
            "| among | place | same accuracy |",
            "| --- | --- | --- |",
        ]
        for words, group, place in (
            ("all", None, self.overall),
            ("with additional data", True, self.with_data),
            ("without additional data", False, self.without_data),
        ):
            mine = " (as this result)" if group is not None and group is self.additional_data else ""
            lines.append(f"| {words}{mine} | {place} | {', '.join(place.ties) or '-'} |")
        lines += [
            "",
            "| place | entry | natural (%) | robust (%) | additional data | architecture | venue |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [self._row(entry) for entry in self.above]
        natural = "-" if self.natural_accuracy is None else f"**{self.natural_accuracy:.2f}**"
        data = {None: "-", True: "yes", False: "no"}[self.additional_data]
        name, robust = markdown_text(self.name), f"{self.robust_accuracy:.2f}"
        lines.append(f"| **{self.overall.place}** | **{name}** | {natural} | **{robust}** | {data} | | |")
        lines += [self._row(entry) for entry in self.below]
        if any(entry.external for entry in (*self.above, *self.below)):
            lines += ["", "(e): by an attack of others, which RobustBench ranks by; AutoAttack gave more."]
        if self.natural_accuracy is not None:
            better = self.better_in_both
            lines += ["", f"Better in both accuracies: {len(better)} of {len(self.others)} entries."]
        lines += ["", self.origin, ""]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it: names in place of entries, and not all the others."""

        def place(of: Place) -> dict[str, Any]:
            return {"place": of.place, "entries": of.entries, "ties": list(of.ties)}

        names = ("name", "dataset", "threat_model", "eps", "robust_accuracy", "natural_accuracy", "additional_data")
        return {
            **{name: getattr(self, name) for name in names},
            "overall": place(self.overall),
            "with_data": place(self.with_data),
            "without_data": place(self.without_data),
            "above": [entry.id for entry in self.above],
            "below": [entry.id for entry in self.below],
            "better_in_both": list(self.better_in_both),
            "date": self.date,
            "source": self.source,
        }

    def _cells(self, name: str, natural: float | None, robust: float) -> list[str]:
        return [name, str(self._place_of(robust)), "-" if natural is None else f"{natural:.2f}", f"{robust:.2f}"]

    def _place_of(self, robust: float) -> int:
        """The place of an accuracy; the result pushes down what it beats."""
        better = sum(other.robust_accuracy > robust for other in self.others)
        return 1 + better + (self.robust_accuracy > robust)

    def _row(self, entry: Entry) -> str:
        external = " (e)" if entry.external else ""
        return (
            f"| {self._place_of(entry.robust_accuracy)} | [{entry.id}]({entry.link}) | {entry.natural_accuracy:.2f} | "
            f"{entry.robust_accuracy:.2f}{external} | {'yes' if entry.additional_data else 'no'} | "
            f"{entry.architecture.replace('|', '/')} | {entry.venue} |"
        )


def table_origin() -> dict[str, str]:
    """Where the table is from: 'source', 'repository', 'commit', 'date' (YYYY-MM-DD) and 'licence'."""
    return {key: value for key, value in _table().items() if key != "entries"}


def entries(dataset: str, threat_model: str) -> tuple[Entry, ...]:
    """A leaderboard, best first, as RobustBench sorts it.

    Args:
        dataset: 'cifar10', 'cifar100' or 'imagenet'.
        threat_model: 'Linf', 'L2', 'corruptions', or 'corruptions_3d' for ImageNet-3DCC.

    Returns:
        Its entries by falling robust accuracy, those with the same one by name. The robust accuracy is that of an
        external evaluation where there is one, else AutoAttack's (``robustbench.utils.ACC_FIELDS``).

    Raises:
        ValueError: there is no such leaderboard.
    """
    return _entries("entries", dataset, threat_model)


def board_eps(dataset: str, threat_model: str) -> str | None:
    """The radius of one of the :func:`entries`' leaderboards, such as '8/255'; None for corruptions."""
    return _radius(_entries("board_eps", dataset, threat_model))


def rank(
    dataset: str,
    threat_model: str,
    robust_accuracy: float,
    *,
    natural_accuracy: float | None = None,
    additional_data: bool | None = None,
    eps: object = None,
    name: str = "this result",
    include_unreliable: bool = True,
) -> Ranking:
    """Compares a result with the entries of its leaderboard.

    Args:
        dataset: 'cifar10', 'cifar100' or 'imagenet'.
        threat_model: 'Linf', 'L2', 'corruptions' or 'corruptions_3d'.
        robust_accuracy: by standard AutoAttack on the images of the benchmark (for corruptions the mean accuracy), in
            percent; rounded to the two decimals of the leaderboard.
        natural_accuracy: on the same images without attack, in percent.
        additional_data: whether more images than the data set's own were trained on.
        eps: radius of the result, such as '8/255'; must be the leaderboard's. None to leave that unsaid.
        name: of the result. An entry of this name is the result itself, and is not compared with it.
        include_unreliable: count the entries that RobustBench marks as unreliable, as its own list does, with the
            accuracy of their external evaluation.

    Returns:
        The ranking.

    Raises:
        TypeError: an accuracy is no number.
        ValueError: there is no such leaderboard; an accuracy is not in 0 to 100; the radius is another one.
    """
    caller = "rank"
    board = _entries(caller, dataset, threat_model)
    robust = _percent(caller, "robust_accuracy", robust_accuracy)
    natural = None if natural_accuracy is None else _percent(caller, "natural_accuracy", natural_accuracy)
    radius = _radius(board)
    if eps is not None:
        _check_radius(caller, dataset, threat_model, parse_eps(caller, eps, norm=threat_model), radius)
    others = tuple(entry for entry in board if entry.id != name and (include_unreliable or not entry.unreliable))
    above = tuple(entry for entry in others if entry.robust_accuracy > robust)
    below = tuple(entry for entry in others if entry.robust_accuracy <= robust)
    better = () if natural is None else tuple(entry.id for entry in above if entry.natural_accuracy > natural)
    origin = table_origin()
    return Ranking(
        dataset=dataset,
        threat_model=threat_model,
        eps=radius,
        robust_accuracy=robust,
        natural_accuracy=natural,
        additional_data=additional_data,
        name=printable(name, None),
        overall=_place(robust, others),
        with_data=_place(robust, [entry for entry in others if entry.additional_data]),
        without_data=_place(robust, [entry for entry in others if not entry.additional_data]),
        above=above[-_NEIGHBOURS:],
        below=below[:_NEIGHBOURS],
        better_in_both=better,
        others=others,
        date=origin["date"],
        source=f"{origin['source']}, commit {origin['commit']}",
    )


def draw(ranking: Ranking, path: Path | str) -> None:
    """Draws natural against robust accuracy of all entries, with the result marked.

    Args:
        ranking: of the result. Without a natural accuracy the result is a line at its robust accuracy.
        path: of the image; its ending gives the format, such as .png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib("draw")
    figure, axes = new_figure(7, 5)
    for with_data, colour, marker, words in (
        (False, "tab:blue", "o", "without additional data"),
        (True, "tab:orange", "^", "with additional data"),
    ):
        group = [entry for entry in ranking.others if entry.additional_data is with_data]
        natural = [entry.natural_accuracy for entry in group]
        robust = [entry.robust_accuracy for entry in group]
        label = f"{words} ({len(group)})"
        axes.scatter(natural, robust, s=22, c=colour, marker=marker, alpha=0.7, label=label)
    labelled: list[float] = []
    for entry in ranking.others[:_LABELLED]:
        if all(abs(entry.robust_accuracy - height) > _LABEL_DISTANCE for height in labelled):
            labelled.append(entry.robust_accuracy)
            where = (entry.natural_accuracy, entry.robust_accuracy)
            axes.annotate(entry.id, where, xytext=(-5, 3), textcoords="offset points", ha="right", fontsize=6)
    words = f"{drawn(ranking.name)}: place {ranking.overall}"
    if ranking.natural_accuracy is None:
        axes.axhline(ranking.robust_accuracy, color="tab:red", linewidth=1, label=words)
    else:
        star = {"s": 160, "c": "tab:red", "marker": "*", "edgecolors": "black", "linewidths": 0.5, "zorder": 3}
        axes.scatter([ranking.natural_accuracy], [ranking.robust_accuracy], label=words, **star)
    axes.set_xlabel("natural accuracy (%)")
    axes.set_ylabel("robust accuracy (%)")
    axes.set_title(f"RobustBench, {ranking.title}, entries of {ranking.date}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    axes.grid(alpha=0.2)
    save_figure(figure, path)


@functools.cache
def _table() -> dict[str, Any]:
    text = importlib.resources.files(__package__).joinpath(_TABLE).read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _entries(caller: str, dataset: str, threat_model: str) -> tuple[Entry, ...]:
    table = _table()["entries"]
    fields = _FIELDS.get(threat_model)
    if fields is None:
        raise ValueError(check.unknown_name_message(caller, "threat model", threat_model, _FIELDS))
    datasets = {row["dataset"] for row in table}
    if dataset not in datasets:
        raise ValueError(check.unknown_name_message(caller, "data set", dataset, datasets))
    folder = threat_model.removesuffix("_3d")
    rows = [
        row
        for row in table
        if (row["dataset"], row["threat_model"]) == (dataset, folder) and any(field in row for field in fields)
    ]
    if not rows:
        known = sorted({f"{row['dataset']} {row['threat_model']}" for row in table})
        raise ValueError(
            f"{caller}: `threat_model` must have a leaderboard for {dataset}, got {threat_model!r}. "
            f"Known: {', '.join(known)}."
        )
    found = [_entry(row, fields) for row in rows]
    return tuple(sorted(found, key=lambda entry: (-entry.robust_accuracy, entry.id)))


def _entry(row: dict[str, Any], fields: Sequence[str]) -> Entry:
    field = next(field for field in fields if field in row)
    return Entry(
        id=row["id"],
        architecture=row["architecture"],
        venue=row["venue"],
        link=row["link"],
        eps=row.get("eps"),
        natural_accuracy=float(row["clean_acc"]),
        robust_accuracy=float(row[field]),
        autoattack_accuracy=float(row["autoattack_acc"]) if "autoattack_acc" in row else None,
        external=field == "external",
        additional_data=row["additional_data"],
        unreliable=row.get("unreliable", False),
        number_forward_passes=row["number_forward_passes"],
    )


def _radius(board: Sequence[Entry]) -> str | None:
    """The radius of most entries; a few early ones state 0.031 for 8/255 and stand in the same list."""
    stated = [entry.eps for entry in board if entry.eps is not None]
    if len(stated) * 2 <= len(board):
        return None  # corruptions: what some entries state is the radius of their training
    return max(set(stated), key=stated.count)


def _check_radius(caller: str, dataset: str, threat_model: str, eps: Eps, radius: str | None) -> None:
    if radius is None:
        raise ValueError(f"{caller}: `eps` must be None for {threat_model}, which have no radius, got {eps}.")
    if eps.exact != as_fraction(radius):
        raise ValueError(
            f"{caller}: `eps` must be {radius}, as on the leaderboard for {dataset} and {threat_model}, got {eps}."
        )


def _percent(caller: str, name: str, value: object) -> float:
    number = check.check_number(caller, name, value)
    if number > 100:
        raise ValueError(f"{caller}: `{name}` must be in percent, 0 to 100, got {number}. Pass 57.09.")
    return round(number, 2)


def _place(robust: float, others: Sequence[Entry]) -> Place:
    return Place(
        place=1 + sum(entry.robust_accuracy > robust for entry in others),
        entries=len(others),
        ties=tuple(entry.id for entry in others if entry.robust_accuracy == robust),
    )
