"""Tables of plain text, as a result prints itself."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


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
