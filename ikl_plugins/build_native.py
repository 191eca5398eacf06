"""The check of a C++ operator that has just been built."""

from __future__ import annotations

import math

import torch

from . import native
from .functional import dkl_loss, gkl_loss, ikl_loss

__all__ = ["largest_difference"]


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
