"""The tables of docs/choosing.md, from what tools/choosing.py has recorded, and the choice of the presets `start`."""

from __future__ import annotations

import re
import statistics
from typing import Any

from evidence.cache import TOOLS
from evidence.report import listed, narrow_table, settle
from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import PRESETS

LEAST_RATIO = 0.01  # of the weighted MSE to the cross entropy in every condition: below it is IKL in name alone
PAGE = TOOLS.parent / "docs" / "choosing.md"
RECORD = TOOLS.parent / "docs" / "results" / "choosing.json"
Setting = dict[str, Any]


def chosen(search: dict[str, list[dict[str, Any]]]) -> dict[str, Setting]:
    """The setting of each loss with the highest mean gain, of those whose weighted MSE has a part in every condition.

    In DKL with a frozen teacher it never has one.
    """
    found = {}
    for loss, rows in search.items():
        allowed = [row for row in rows if loss == "DKLLoss" or (row["ratio"] or 0) >= LEAST_RATIO]
        found[loss] = max(allowed, key=lambda row: row["mean"])["setting"]
    return found


def start_setting(name: str) -> Setting:
    """That of the preset."""
    return {"loss": f"{name}Loss", **PRESETS[f"start-{name.lower()}"].keywords}


def tables(content: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by the names of their places."""
    found = {"test": _test_table(content), "versions": f"Measured with {listed(content['versions'])}.\n"}
    if content["search"]:
        found["search"] = _search_table(content["search"])
    return found


def _search_table(search: dict[str, list[dict[str, Any]]]) -> str:
    cells = []
    starts = chosen(search)
    for loss, rows in search.items():
        for row in sorted(rows, key=lambda row: -row["mean"])[:4]:
            setting = {**row["setting"]}
            named = ", ".join(
                f"{key} {value:g}" for key, value in setting.items() if not isinstance(value, (str, bool))
            )
            prior = ", class prior" if setting.get("global_info") else ""
            mark = " (start)" if row["setting"] == starts[loss] else ""
            numbers = [f"{row['mean']:+.1f}", f"{row['worst']:+.1f}", f"{row['ratio'] or 0:.0e}"]
            cells.append([f"{loss.removesuffix('Loss')}, {named}{prior}{mark}", *numbers])
    return narrow_table(["setting", "mean gain", "worst", "least MSE / CE"], cells) + "\n"


def _test_table(content: dict[str, Any]) -> str:
    tested = content["tested"]
    groups: list[tuple[str, str]] = [("task", name) for name in content["teachers"]]
    groups += [(key, name) for key in ("confidence", "optimizer") for name in dict.fromkeys(one[key] for one in tested)]
    cells = []
    for name in tested[0]["results"]:
        values = [one["results"][name]["accuracy"] for one in tested]
        base = [one["results"]["labels alone"]["accuracy"] for one in tested]
        row = []
        for key, group in groups:
            inside = [index for index, one in enumerate(tested) if one[key] == group]
            ours, theirs = (statistics.fmean(some[index] for index in inside) for some in (values, base))
            row.append(f"{ours:.1f}" if name == "labels alone" else f"{ours - theirs:+.1f}")
        worst = min(ours - theirs for ours, theirs in zip(values, base, strict=True))
        ratios = [one["results"][name]["ratio"] for one in tested if "ratio" in one["results"][name]]
        least = "diverges" if None in ratios else f"{min(ratios, default=0):.0e}"
        last = ["", ""] if name == "labels alone" else [f"{worst:+.1f}", least]
        cells.append([name, *row, *last])
    return narrow_table(["", *(group for _, group in groups), "worst", "least MSE / CE"], cells) + "\n"


def page(text: str, content: dict[str, Any]) -> str:
    """The page with its tables."""
    for name, table in tables(content).items():
        place = re.compile(rf"(<!-- choosing: {name} -->\n).*?(<!-- /choosing -->\n)", re.DOTALL)
        text, count = place.subn(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"choosing: {PAGE.name} must have one place for the table '{name}', got {count}.")
    return text


def check(content: dict[str, Any]) -> None:
    """Compares page and presets with the recorded results.

    Raises:
        ValueError: one of them is not as measured.
    """
    settle({PAGE: page(PAGE.read_text(encoding="utf-8"), content)}, check=True)
    for loss, setting in chosen(content["search"]).items():
        built = (
            LOSSES[loss](**{key: value for key, value in one.items() if key != "loss"})
            for one in (setting, start_setting(loss[:3]))
        )
        if len({one.settings() for one in built}) != 1:
            raise ValueError(f"choosing: the preset start of {loss} must be the setting chosen, {setting}.")
