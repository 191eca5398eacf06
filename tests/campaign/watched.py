"""Runs a script of a host and tells through a pipe which files it opens for writing and renames.

    python tools/reliability_watched.py FD SCRIPT ARGUMENT ...

The script runs in this process as if it had been called by its own path. It is told nothing and nothing of it is
changed: Python itself reports the events (sys.addaudithook), this file passes them on, one line each.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def watch(descriptor: int) -> None:
    """Writes a line to ``descriptor`` for each file that is opened for writing, and for each that is renamed."""

    def told(event: str, arguments: tuple[object, ...]) -> None:
        line = None
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
            line = f"open {arguments[0]}\n"
        elif event == "os.rename":
            line = f"rename {arguments[1]}\n"
        if line is not None:
            os.write(descriptor, line.encode())

    sys.addaudithook(told)


def main() -> None:
    """Runs the command line."""
    watch(int(sys.argv[1]))
    script = Path(sys.argv[2])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
