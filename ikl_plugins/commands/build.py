"""Builds the C++ operator of the losses for CPUs, and checks its gradients.

    ikl build

It needs a C++ compiler; the environment variable CXX names another one. Once it is built the losses use it wherever it
serves; IKL_PLUGINS_KERNEL=walk in the environment of a training leaves it out.
"""

from __future__ import annotations

import argparse
import math

__all__ = ["configure", "largest_difference", "run"]

# Two sums of float32 in different orders; a wrong operator is further off.
_TOLERANCE = 1e-5


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--verbose", action="store_true", help="show the compiler's command")


def run(arguments: argparse.Namespace) -> None:
    """Builds the operator unless it is there, and compares its gradients with those of the losses' own way."""
    from ikl_plugins import native
    from ikl_plugins._limits import printable
    from ikl_plugins._way import VARIABLE

    path = native.build(verbose=arguments.verbose)
    difference = largest_difference()
    if not difference < _TOLERANCE:
        path.unlink()
        raise RuntimeError(
            f"ikl build: the operator's gradients are off by {difference:.1e}; it has been deleted. "
            f"Name another compiler in CXX."
        )
    print(f"Built: {printable(path, None)}")
    print(f"Gradients agree to {difference:.0e}. The losses use it on CPUs; {VARIABLE}=walk leaves it out.")


def largest_difference() -> float:
    """The largest difference of a gradient of the operator from the other way's, relative to its largest entry.

    Raises:
        RuntimeError: the operator has not been built, or cannot be loaded.
    """
    import torch

    from ikl_plugins import dkl_loss, gkl_loss, ikl_loss, native

    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(37, 1001, generator=generator) for _ in range(2))
    prior = torch.softmax(torch.randn(37, 1001, generator=generator), 1)
    worst = 0.0
    for loss, settings in (
        (dkl_loss, {"temperature": 4.0}),
        (ikl_loss, {"weight_temperature": 4.0}),
        (gkl_loss, {"gamma": 0.3, "class_prior": prior}),
    ):
        found = []
        for switch in (native.disable, native.enable):
            switch()
            leaves = [x.clone().requires_grad_() for x in (student, teacher)]
            found.append(torch.autograd.grad(loss(*leaves, **settings), leaves))
        for expected, gradient in zip(*found, strict=True):
            distance = float((gradient - expected).abs().max() / expected.abs().max())
            worst = max(worst, math.inf if math.isnan(distance) else distance)
    return worst
