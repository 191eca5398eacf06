"""Runs a program that uses RobustBench or AutoAttack, with what a plain installation of them lacks.

    ikl robustbench -m robustbench.eval --model_name Standard --device cpu --n_ex 100     # RobustBench's own
    ikl robustbench evaluate_mine.py --epsilon 8
    torchrun --nproc_per_node 2 -m ikl_plugins robustbench evaluate_mine.py

The program is run as `python PROGRAM` or `python -m MODULE` would. `import robustbench` and `import autoattack` work in
it and in its child processes, spawned workers among them, and lead to what is installed. Nothing outside learns of it.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from .._robustbench_import import STAND_INS

__all__ = ["configure", "run"]

CALLER = "ikl robustbench"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is the name of a module")
    parser.add_argument("program", metavar="PROGRAM", help="a Python file")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="handed to the program")


def run(arguments: argparse.Namespace) -> None:
    """Runs the program in this process, as its main module."""
    program = Path(arguments.program)
    if not arguments.module and not program.is_file():
        sys.exit(f"error: {CALLER}: the program must be a file, but there is none at {program}. Add -m for a module.")
    folder = Path.cwd() if arguments.module else program.resolve().parent
    _set_path(folder)
    sys.argv = [arguments.program, *arguments.options]
    if arguments.module:
        runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments.program, run_name="__main__")


def _set_path(folder: Path) -> None:
    """Puts the folder of the program and the stand-ins in front, here and for child processes."""
    package = STAND_INS.parents[1]
    # A checkout that is not installed is found by its own path; site-packages in front would hide Python's library.
    added = [STAND_INS] if package.name in ("site-packages", "dist-packages") else [STAND_INS, package]
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*map(str, added), *before]))
    front, rest = [str(STAND_INS)], [entry for entry in sys.path if entry != str(STAND_INS)]
    if not getattr(sys.flags, "safe_path", False):  # else Python puts no folder in front
        rest[0] = str(folder)  # it was that of `ikl`
        if not (folder / "robustbench").is_dir():  # a checkout of RobustBench needs the stand-ins before it
            front.insert(0, rest.pop(0))
    sys.path[:] = [*front, *rest, *map(str, added[1:])]
