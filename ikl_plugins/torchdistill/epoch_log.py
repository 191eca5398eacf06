"""What the log of torchdistill's scripts is told at the end of an epoch: the terms of a loss and its class prior."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..class_prior import ClassPrior
from ..functional import LossTerms

__all__ = ["EpochLog"]

_logger = logging.getLogger(__name__)
_FOLD = 256  # batches whose terms are kept apart
_SHADES = " .:-=+*#%@"
_SIDE = 16  # of a picture in characters


class EpochLog:
    """Adds up the terms of a loss without a wait for the device, and writes a line an epoch, on rank 0.

    In the epochs 1, 2, 4, 8 and so on the class prior is drawn as well, a row a label.
    """

    def __init__(self) -> None:
        self._terms: list[Tensor] = []
        self._batches = 0

    def add(self, terms: LossTerms | None) -> None:
        """Takes the terms of a batch."""
        if terms is None or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
            return
        self._batches += 1
        self._terms += [term if term.ndim == 0 else term.mean() for term in terms]
        if len(self._terms) >= _FOLD * len(terms):
            self._terms = list(self._sums())

    def write(self, name: str, epoch: int, prior: ClassPrior | None) -> None:
        """Writes what has been added since the last time, if anything has, and begins anew."""
        if self._batches == 0:
            return
        means = (self._sums() / self._batches).tolist()
        told = [f"{field} {value:.4g}" for field, value in zip(LossTerms._fields, means, strict=True)]
        if prior is not None:
            told.append(f"prior_entropy {float(prior.entropy()):.4g} of {math.log(prior.num_classes):.4g}")
        _logger.info("%s, epoch %d: %s", name, epoch, ", ".join(told))
        if prior is not None and epoch & (epoch - 1) == 0:
            _logger.info("%s, class prior behind epoch %d, a row a label:\n%s", name, epoch, _drawn(prior))
        self._terms, self._batches = [], 0

    def _sums(self) -> Tensor:
        return torch.stack(self._terms).reshape(-1, len(LossTerms._fields)).sum(0)


def _drawn(prior: ClassPrior) -> str:
    picture = prior.picture(least=1, most=_SIDE).tolist()
    return "\n".join("  " + " ".join(_SHADES[shade * (len(_SHADES) - 1) // 255] for shade in row) for row in picture)
