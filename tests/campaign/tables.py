"""The record of the campaign as Markdown tables, which docs/reliability.md shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "inputs": "Generated inputs",
    "inputs_native": "Generated inputs, with the C++ operator",
    "checkpoints": "Hostile and damaged files",
    "disk": "Full and read-only disks",
    "configs": "Mutated configs",
    "kills": "Kill -9 and resumption",
}


def render(record: Mapping[str, Any]) -> str:
    """All tables, each under a heading."""
    return "\n\n".join(f"### {NAMES[part]}\n\n{text}" for part, text in tables(record).items()) + "\n"


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """By part: a line on its seed and failures, and on what it ran where that is new; its counts; its facts."""
    found, before = {}, ""
    for part, content in record["parts"].items():
        settings, origin = content["settings"], _origin(content["origin"])
        line = f"Seed {settings['seed']}{', quick' if settings['quick'] else ''}; failures: {len(content['failures'])}"
        line += f"; {content['seconds']} seconds." if "seconds" in content else "."  # older records have none
        line += "" if content["finished"] else " Not finished."
        line += "" if origin == before else f" {origin}."
        facts = "\n".join(f"- {name}: {_fact_text(value)}" for name, value in content["facts"].items())
        table = _table(content["counts"], added_up=part != "kills")
        found[part] = "\n\n".join([line, table, *([facts] if facts else [])])
        before = origin
    return found


def _origin(origin: Mapping[str, Any]) -> str:
    # Records were once made without a checksum of the sources.
    sources = f" (sources {origin['sources'][:8]})" if "sources" in origin else ""
    versions = {**origin["versions"], "ikl_plugins": f"{origin['versions']['ikl_plugins']}{sources}"}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    return f"{origin['processor']}, {origin['threads']} thread{'' if origin['threads'] == 1 else 's'}, {shown}"


def _fact_text(value: Any) -> str:
    return ", ".join(f"{name} {of}" for name, of in value.items()) if isinstance(value, dict) else str(value)


def _table(counts: Mapping[str, Mapping[str, int]], *, added_up: bool) -> str:
    """A row for each group of cases, a column for each outcome; ``added_up``: a case has one outcome."""
    outcomes = sorted({outcome for group in counts.values() for outcome in group})
    total = {outcome: sum(found.get(outcome, 0) for found in counts.values()) for outcome in outcomes}
    lines = [["", *(["cases"] if added_up else []), *outcomes]]
    lines.append(["---"] * len(lines[0]))
    for group, found in {**counts, "all": total}.items():
        cases = [sum(found.values())] if added_up else []
        lines.append(list(map(str, [group, *cases, *(found.get(outcome, 0) for outcome in outcomes)])))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
