"""Runs a module as ``python -m`` does and tells through a pipe which files it opens for writing and renames.

    python tests/campaign/record_writes.py FD -m MODULE ARGUMENT ...

The module is told nothing and nothing of it is changed: Python itself reports the events (sys.addaudithook), this file
passes them on, one line each.
"""

from __future__ import annotations

import os
import runpy
import sys


def record_writes(descriptor: int) -> None:
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


if __name__ == "__main__":
    record_writes(int(sys.argv[1]))
    module = sys.argv[3]
    sys.argv = sys.argv[3:]
    del sys.path[0]  # of this file
    runpy.run_module(module, run_name="__main__", alter_sys=True)
