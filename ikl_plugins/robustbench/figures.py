"""Pictures by Matplotlib, which the extra `robustbench` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._files import written_aside

__all__ = ["drawn", "new_figure", "require_matplotlib", "save_figure"]


def require_matplotlib(caller: str) -> None:
    """Refuses to go on without Matplotlib, by an ImportError that names the way to it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller}: pictures need Matplotlib. Run: pip install matplotlib", name=error.name
        ) from error


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure that draws into a file, whatever backend the process uses, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=rows == 1 and columns == 1)


def drawn(text: object) -> str:
    """Text that Matplotlib takes for no formula."""
    return str(text).replace("$", r"\$")


def save_figure(figure: Any, path: Path | str) -> None:
    """Writes the figure whole or not at all; the ending of ``path`` gives the format."""
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150)
