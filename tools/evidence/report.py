"""What benchmarks, reproduction and demo tell in common: tables as text, margins, plots, generated files."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.cache import write_text
from ikl_plugins._files import written_aside


def text_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def narrow_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table without padding, for cells of very different widths."""
    rows = [f"| {' | '.join(line)} |" for line in (header, *cells)]
    return "\n".join([rows[0], "|---" * len(header) + "|", *rows[1:]])


def spread(values: Sequence[float]) -> str:
    """Mean, and sample standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def with_margin(mean: float, half: float) -> str:
    """A difference with half its interval."""
    return f"{mean:+.2f} ± {half:.2f}"


def binomial_margin(accuracies: Iterable[float], images: int) -> float:
    """Half the 95 % interval of one accuracy, in points: that of a binomial share, never quite 0.

    Args:
        accuracies: in percent; the share is their mean.
        images: how many images each was measured on.
    """
    share = min(max(statistics.fmean(accuracies) / 100, 0.5 / images), 1 - 0.5 / images)
    return 100 * 1.96 * math.sqrt(share * (1 - share) / images)


def listed(facts: Mapping[str, str]) -> str:
    """Names and versions in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


# --- plots -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def drawn(path: Path, *grid: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Figure and axes of matplotlib, as ``subplots`` gives them; the PNG file appears whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    figure, axes = pyplot.subplots(*grid, **options)
    try:
        yield figure, axes
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", bbox_inches="tight")
    finally:
        pyplot.close(figure)


def draw_with_margin(axes: Any, x: Sequence[float], values: Sequence[float], images: int, **style: Any) -> None:
    """A curve of accuracies, and a band for what the number of images leaves open."""
    (line,) = axes.plot(x, values, **style)
    margins = [binomial_margin([value], images) for value in values]
    low = [max(value - half, 0) for value, half in zip(values, margins, strict=True)]
    high = [min(value + half, 100) for value, half in zip(values, margins, strict=True)]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)


def draw_with_range(axes: Any, curves: Sequence[Sequence[float]], **style: Any) -> None:
    """The mean of some curves over the epochs, from 1, and a band from the least to the largest."""
    columns = list(zip(*curves, strict=True))
    epochs = range(1, len(columns) + 1)
    (line,) = axes.plot(epochs, [statistics.fmean(column) for column in columns], marker=".", **style)
    low, high = ([extreme(column) for column in columns] for extreme in (min, max))
    axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, lw=0)


# --- generated files -------------------------------------------------------------------------------------------------


def settle(files: Mapping[Path, str], *, check: bool = False) -> list[Path]:
    """Writes generated files where they differ, or refuses files that do.

    Args:
        files: the texts by their paths.
        check: write nothing.

    Returns:
        The files that were written.

    Raises:
        ValueError: with ``check``, a file is not what it should be; each such is named.
    """
    differing = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if check and differing:
        raise ValueError(f"{', '.join(map(str, differing))}: missing or not as generated. Run it without --check.")
    for path in differing:
        write_text(path, files[path])
    return differing
