"""Compares two evaluations on the same images, image for image.

    ikl compare runs/baseline/evaluation.json runs/mine/evaluation.json --plot compared.png
    ikl compare a.json b.json --output images.csv
    ikl compare a.json b.json --natural

Shows both accuracies, their difference with its 95 % interval, McNemar's exact test, and which images one model alone
withstands. Evaluations with other images are refused, and those with other attacks unless --allow-differences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .._limits import printable

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add = parser.add_argument
    add("a", type=Path, metavar="A.json", help="evaluation.json of ikl evaluate")
    add("b", type=Path, metavar="B.json", help="another; differences are b less a")
    add("--natural", action="store_true", help="compare what they say of the natural images alone")
    add("--allow-differences", action="store_true", help="compare evaluations with other attacks, and say so")
    add("--plot", type=Path, metavar="FILE", help="counts of images and the difference per class, as .png")
    add("--output", type=Path, metavar="FILE", help="everything as .json, or all images that differ as .csv")


def run(arguments: argparse.Namespace) -> None:
    """Prints the comparison and writes what was asked for."""
    from ..robustbench import compare
    from ..robustbench.figures import require_matplotlib

    if arguments.plot is not None:
        require_matplotlib("ikl compare --plot")
    found = compare(arguments.a, arguments.b, natural=arguments.natural, allow_differences=arguments.allow_differences)
    print(found)
    for name, write in (("output", found.save), ("plot", found.draw)):
        path = getattr(arguments, name)
        if path is not None:
            write(path)
            print(f"{name}: {printable(path, None)}")
