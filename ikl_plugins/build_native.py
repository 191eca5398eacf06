"""``python -m ikl_plugins.build_native``: builds the C++ operator of :mod:`ikl_plugins.native` and checks it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from . import native
from .functional import dkl_loss, gkl_loss, ikl_loss

__all__ = ["main"]

# Two sums of float32 in different orders; a wrong operator is further off.
_TOLERANCE = 1e-5


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the operator unless it is there, and compares its gradients with those of the losses' own way.

    Args:
        arguments: of the command line; None for those of the process.

    Raises:
        SystemExit: it cannot be built or loaded, or the gradients differ.
    """
    parser = argparse.ArgumentParser(prog="python -m ikl_plugins.build_native", description="Builds the C++ operator.")
    parser.add_argument("--verbose", action="store_true", help="show the compiler's command")
    try:
        path = native.build(verbose=parser.parse_args(arguments).verbose)
        difference = largest_difference()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    if not difference < _TOLERANCE:
        path.unlink()
        raise SystemExit(
            f"ikl_plugins.build_native: the operator's gradients must be those of the losses' own way, but differ by "
            f"{difference:.1e} of the largest, and the operator has been deleted. Try another compiler (environment "
            f"variable CXX)."
        )
    print(f"Built: {path}")
    print(f"Gradients agree to {difference:.0e}. Switch it on with {native.VARIABLE}=1 in the environment.")


def largest_difference() -> float:
    """The largest difference of a gradient of the operator from the other way's, relative to its largest entry.

    Raises:
        RuntimeError: the operator has not been built, or cannot be loaded.
    """
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


if __name__ == "__main__":
    main()
