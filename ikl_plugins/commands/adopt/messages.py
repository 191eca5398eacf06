"""What all parts of ``ikl adopt`` say alike."""

from __future__ import annotations

__all__ = ["CALLER", "first_line"]

CALLER = "ikl adopt"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip().split("\n")[0] or "no reason is given"
    return f"{type(error).__name__}: {text}"
