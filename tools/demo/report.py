"""What the parts of tools/demo.py share: tables as text, the margin of an accuracy, files written aside, plots."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ikl_plugins._files import written_aside

__all__ = ["binomial_margin", "pyplot", "save_figure", "sha256", "text_table", "write_text"]


def text_table(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def binomial_margin(accuracies: Iterable[float], images: int) -> float:
    """Half the 95 % interval of one accuracy, in points: that of a binomial share, never quite 0.

    Args:
        accuracies: in percent; the share is their mean.
        images: how many images each was measured on.
    """
    share = min(max(statistics.fmean(accuracies) / 100, 0.5 / images), 1 - 0.5 / images)
    return 100 * 1.96 * math.sqrt(share * (1 - share) / images)


def sha256(content: Any) -> str:
    """The checksum of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text)


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG file that appears whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", bbox_inches="tight")
