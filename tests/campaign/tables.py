"""The record of the reliability campaign as Markdown tables, which docs/reliability.md shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from campaign.record import table

__all__ = ["render", "tables"]

_NAMES = {
    "inputs": "Generated inputs",
    "inputs_native": "Generated inputs, with the C++ operator",
    "checkpoints": "Hostile and damaged files",
    "disk": "Full and read-only disks",
    "configs": "Mutated configs",
    "kills": "Kill -9 and resumption",
}


def render(merged: Mapping[str, Any]) -> str:
    """All tables, each under a heading, behind a line on where they come from.

    Args:
        merged: of ``reliability_record.merge``.

    Returns:
        Markdown.
    """
    return "\n\n".join(f"### {_NAMES[part]}\n\n{text}" for part, text in tables(merged).items()) + "\n"


def tables(merged: Mapping[str, Any]) -> dict[str, str]:
    """By part: a line on its seed and failures, and what it ran on where that is new; its table."""
    found = {}
    before = ""
    for part, content in merged["parts"].items():
        origin = _origin(content)
        quick = ", quick" if content["settings"]["quick"] else ""
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
    cost = content["facts"]["seconds to read 100 MB"]
    note = (
        f"A file of {cost['megabytes']} MB is read in {cost['load_content']} s with its checksums, in "
        f"{cost['torch.load']} s by torch.load; the checksums alone take {cost['its checksums alone']} s."
    )
    return f"{table(['reader', 'file', 'cases', 'outcomes'], rows)}\n\n{note}"


def _kills(content: Mapping[str, Any]) -> str:
    places = ("start-up", "before the first checkpoint", "inside an epoch", "inside a write")
    ends = ("runs that end as the uninterrupted one", "other result", "did not go on")
    facts = content["facts"]
    rows = [
        [
            host, facts[f"{host}: kills"], *(found.get(place, 0) for place in places),
            facts[f"{host}: runs"], *(found.get(end, 0) for end in ends),
            facts[f"{host}: seconds of the uninterrupted run"],
        ]
        for host, found in content["counts"].items()
    ]  # fmt: skip
    total = ["all", *(sum(row[column] for row in rows) for column in range(1, 10)), ""]
    header = [
        "host",
        "points",
        *places,
        "runs",
        "equal to the bit",
        "other result",
        "did not go on",
        "seconds of a run",
    ]
    return table(header, [*rows, total])


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "inputs": lambda content: _by_group(content, "called"),
    "inputs_native": lambda content: _by_group(content, "called"),
    "checkpoints": _checkpoints,
    "disk": lambda content: _by_outcome(content, "step and outcome"),
    "configs": lambda content: _by_outcome(content, "outcome"),
    "kills": _kills,
}
