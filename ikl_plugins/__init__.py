"""Decoupled Kullback-Leibler losses (DKL, IKL, GKL) for existing PyTorch pipelines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._value_checks import read_value_checks
    from .class_prior import ClassPrior
    from .functional import LossTerms, dkl_loss, gkl_loss, ikl_loss
    from .losses import DKLLoss, GKLLoss, IKLLoss

__version__ = "0.1.0"

__all__ = [
    "ClassPrior",
    "DKLLoss",
    "GKLLoss",
    "IKLLoss",
    "LossTerms",
    "dkl_loss",
    "gkl_loss",
    "ikl_loss",
    "read_value_checks",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: the console command answers --help without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in ("class_prior", "functional", "losses", "_value_checks"):
        value = getattr(importlib.import_module(f".{home}", __name__), name, None)
        if value is not None:
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
