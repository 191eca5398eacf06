"""Tables of plain text, as a result prints itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .._limits import one_line

__all__ = ["aligned", "markdown_text"]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells below each other, the first column to the left and the others to the right.

    Example:
        >>> print(aligned([["", "standing"], ["apgd-ce", "7"]]))
                 standing
        apgd-ce         7
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_text(text: object) -> str:
    """Text as a page of Markdown shows it: one line, of which nothing is a cell, code, a link, HTML or emphasis.

    Example:
        >>> markdown_text("a|b <i>")
        'a\\\\|b \\\\<i>'
    """
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", one_line(text))
