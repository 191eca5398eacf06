"""Runs a module as ``python -m`` does and tells through a pipe which files it opens for writing and renames.

    python tests/campaign/record_writes.py FD PATTERN NUMBER -m MODULE ARGUMENT ...

The module is told nothing and nothing of it is changed: Python itself reports the events (sys.addaudithook), this file
passes them on, one line each. At the rename of that number, 0 for the first, of a path in which the pattern is found
the process kills itself; at none if the number is -1.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys


def record_writes(descriptor: int, pattern: str, number: int) -> None:
    """Writes a line to ``descriptor`` for each file that is opened for writing, and for each that is renamed."""
    left = number

    def told(event: str, arguments: tuple[object, ...]) -> None:
        line = None
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
            line = f"open {arguments[0]}\n"
        elif event == "os.rename":
            nonlocal left
            line = f"rename {arguments[1]}\n"
            if re.search(pattern, str(arguments[1])):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
        if line is not None:
            os.write(descriptor, line.encode())

    sys.addaudithook(told)


if __name__ == "__main__":
    channel, where, kill_at = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    record_writes(channel, where, kill_at)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in the background
    sys.argv = sys.argv[5:]
    del sys.path[0]  # of this file
    os.write(channel, b"begin\n")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
