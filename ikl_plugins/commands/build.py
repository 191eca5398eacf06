"""Builds the C++ operator of the losses for CPUs, and checks its gradients.

    ikl build
    IKL_PLUGINS_NATIVE=1 ikl train CONFIG      # uses it

It needs a C++ compiler; the environment variable CXX names another one.
"""

from __future__ import annotations

import argparse

from ikl_plugins import native

__all__ = ["configure", "run"]

# Two sums of float32 in different orders; a wrong operator is further off.
_TOLERANCE = 1e-5


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--verbose", action="store_true", help="show the compiler's command")


def run(arguments: argparse.Namespace) -> None:
    """Builds the operator unless it is there, and compares its gradients with those of the losses' own way."""
    path = native.build(verbose=arguments.verbose)
    difference = native.largest_difference()
    if not difference < _TOLERANCE:
        path.unlink()
        raise RuntimeError(
            f"ikl build: the operator's gradients must be those of the losses' own way, but differ by "
            f"{difference:.1e} of the largest. It has been deleted: try another compiler (environment variable CXX)."
        )
    print(f"Built: {path}")
    print(f"Gradients agree to {difference:.0e}. Switch it on with {native.VARIABLE}=1 in the environment.")
