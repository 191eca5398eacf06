"""The losses as one fused Triton kernel, for logits on a CUDA device. Triton comes with torch's CUDA builds.

Triton is imported where the first CUDA tensor asks for it: importing this module imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["operator", "serves"]


def serves(student: Tensor, teacher: Tensor, class_prior: Tensor | None) -> bool:
    """Whether the kernel takes these tensors, which fit each other."""
    return False


def operator() -> Callable[..., Any] | None:
    """The kernel, called as the operator of :mod:`ikl_plugins.native` is; None where there is none."""
    return None
