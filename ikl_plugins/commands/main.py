"""The parser of ``ikl``, and what all of its commands have in common: one line for an error, one for a warning."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from ikl_plugins._limits import one_line

from .ending import tidy

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "adopt": "put DKL, IKL or GKL into a config of yours",
    "build": "build the losses' C++ operator for CPUs",
    "compare": "compare two evaluations, image for image",
    "config": "list, show and copy the shipped configs",
    "data": "write real images as class folders",
    "doctor": "say what works here, and the cure for what does not",
    "evaluate": "attack a checkpoint with AutoAttack, as RobustBench does",
    "rank": "place a result on RobustBench's leaderboard",
    "robustbench": "run a program that uses RobustBench or AutoAttack, RobustBench's own among them",
    "submit": "write what RobustBench asks for when a model is submitted",
    "train": "train a torchdistill YAML or an MMPretrain config",
}


def main(words: Sequence[str] | None = None) -> None:
    """Runs one command line.

    Args:
        words: the arguments behind ``ikl``; by default those of the process.

    Raises:
        SystemExit: always on an error, with one line that says what to mend; on --help, as argparse does; with 130
            after Ctrl-C, and with 141 when nobody reads the output any more.
    """
    line = list(sys.argv[1:] if words is None else words)
    asked = _asked(line)
    own_process = words is None and asked != "robustbench"  # its program may fork what it likes
    if getattr(sys.stdout, "errors", None) == "strict" and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no name that it cannot write ends a command at its end
    name = f"ikl_plugins.commands.{asked}"
    with tidy(lambda: getattr(sys.modules.get(name), "INTERRUPTED", "run it again"), own_process=own_process):
        _main(asked, line)


def _main(asked: str | None, words: list[str]) -> None:
    module = None if asked is None else importlib.import_module(f"ikl_plugins.commands.{asked}")
    parser = _parser(asked, module)
    _complete(parser)
    arguments = parser.parse_args(words)
    if module is None:
        parser.print_help()
        return
    if asked == "robustbench":  # the program's own process, its errors too
        module.run(arguments)
        return
    if asked == "train":  # the host's own process: its warnings and tracebacks stay as they are
        _run(module, arguments)
        return
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {one_line(message)}", file=sys.stderr)
        _run(module, arguments)


def _run(module: ModuleType, arguments: argparse.Namespace) -> None:
    try:
        module.run(arguments)
    except OSError as error:
        sys.exit(f"error: {one_line(error if error.filename or not error.strerror else error.strerror)}")
    except RuntimeError as error:
        sys.exit(f"error: {one_line(str(error).strip().splitlines()[0])}")
    except (ImportError, TypeError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")


def _asked(words: Sequence[str]) -> str | None:
    """The command that a line names; a shell that completes one passes it in the environment."""
    line = os.environ.get("COMP_LINE")
    candidates = words if line is None else line.split()[1:]
    first = next((word for word in candidates if not word.startswith("-")), None)
    return first if first in COMMANDS else None


def _parser(asked: str | None, module: ModuleType | None) -> argparse.ArgumentParser:
    from ikl_plugins import __version__

    parser = argparse.ArgumentParser(prog="ikl", description="DKL, IKL and GKL losses in pipelines that already run.")
    parser.add_argument("--version", action="version", version=f"ikl_plugins {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=None if module is None else module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == asked and module is not None:
            module.configure(command)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell that asks for completions, where argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
