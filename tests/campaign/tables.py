"""The record of the reliability campaign as Markdown tables, which docs/reliability.md shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_NAMES = {
    "inputs": "Generated inputs",
    "inputs_native": "Generated inputs, with the C++ operator",
    "checkpoints": "Hostile and damaged files",
    "disk": "Full and read-only disks",
    "configs": "Mutated configs",
    "kills": "Kill -9 and resumption",
}


def render(merged: Mapping[str, Any]) -> str:
    """All tables of a record as Markdown, each under a heading, behind a line on where they come from."""
    return "\n\n".join(f"### {_NAMES[part]}\n\n{text}" for part, text in tables(merged).items()) + "\n"


def tables(merged: Mapping[str, Any]) -> dict[str, str]:
    """By part: a line on its seed and failures, and what it ran on where that is new; its table."""
    found = {}
    before = ""
    for part, content in merged["parts"].items():
        origin = _origin(content)
        quick = ", quick" if content["settings"]["quick"] else ""
        quick += "" if content["finished"] else ", not finished"
        line = f"Seed {content['settings']['seed']}{quick}; failures: {len(content['failures'])}."
        found[part] = f"{line}{'' if origin == before else f' {origin}.'}\n\n{_TABLES[part](content)}"
        before = origin
    return found


def _origin(content: Mapping[str, Any]) -> str:
    origin = content["origin"]
    # Records were once made without a checksum of the sources.
    sources = f" (sources {origin['sources'][:8]})" if "sources" in origin else ""
    versions = ", ".join(
        f"{name} {version}{sources if name == 'ikl_plugins' else ''}"
        for name, version in origin["versions"].items()
        if version != "absent"
    )
    threads = "1 thread" if origin["threads"] == 1 else f"{origin['threads']} threads"
    return f"{origin['processor']}, {threads}, {versions}"


def _by_group(content: Mapping[str, Any], head: str) -> str:
    """A row for each group, a column for each outcome."""
    counts = content["counts"]
    outcomes = sorted({outcome for group in counts.values() for outcome in group})
    rows = [
        [group, sum(found.values()), *(found.get(outcome, 0) for outcome in outcomes)]
        for group, found in counts.items()
    ]
    total = ["all", *(sum(row[column] for row in rows) for column in range(1, len(outcomes) + 2))]
    return table([head, "cases", *outcomes], [*rows, total] if len(rows) > 1 else rows)


def _by_outcome(content: Mapping[str, Any], head: str) -> str:
    """A row for each outcome, a column for each group."""
    counts = content["counts"]
    outcomes = sorted({outcome for group in counts.values() for outcome in group})
    rows = [[outcome, *(found.get(outcome, 0) for found in counts.values())] for outcome in outcomes]
    return table([head, *counts], [*rows, ["all", *(sum(found.values()) for found in counts.values())]])


def _checkpoints(content: Mapping[str, Any]) -> str:
    rows = []
    for reader, found in content["counts"].items():
        for changed in ("code", "cut", "flipped", "other file"):
            of_it = {name.split(": ", 1)[1]: count for name, count in found.items() if name.startswith(f"{changed}: ")}
            said = "; ".join(f"{outcome} {count}" for outcome, count in sorted(of_it.items()))
            rows.append([reader, changed, sum(of_it.values()), said])
    cost = content["facts"].get("seconds to read 100 MB")
    if cost is None:
        return table(["reader", "file", "cases", "outcomes"], rows)
    note = (
        f"A file of {cost['megabytes']} MB is read in {cost['load_content']} s with its checksums, in "
        f"{cost['torch.load']} s by torch.load; the checksums alone take {cost['its checksums alone']} s."
    )
    return f"{table(['reader', 'file', 'cases', 'outcomes'], rows)}\n\n{note}"


def _kills(content: Mapping[str, Any]) -> str:
    places = ("start-up", "before the first checkpoint", "inside an epoch", "inside a write")
    ends = ("runs that end as the uninterrupted one", "other result", "did not go on")
    rows = []
    for host, found in content["counts"].items():
        of_places, of_ends = [found.get(place, 0) for place in places], [found.get(end, 0) for end in ends]
        seconds = content["facts"].get(f"{host}: seconds of the uninterrupted run", "")
        rows.append([host, sum(of_places), *of_places, sum(of_ends), *of_ends, seconds])
    total = ["all", *(sum(row[column] for row in rows) for column in range(1, 10)), ""]
    shown = ["equal to the bit", *ends[1:], "seconds of a run"]
    return table(["host", "points", *places, "runs", *shown], [*rows, total])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "inputs": lambda content: _by_group(content, "called"),
    "inputs_native": lambda content: _by_group(content, "called"),
    "checkpoints": _checkpoints,
    "disk": lambda content: _by_outcome(content, "step and outcome"),
    "configs": lambda content: _by_outcome(content, "outcome"),
    "kills": _kills,
}
