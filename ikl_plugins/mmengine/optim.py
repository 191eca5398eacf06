"""Training in bfloat16 where MMEngine's own wrapper for mixed precision asks for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import nn

__all__ = ["AutocastOptimWrapper"]


class AutocastOptimWrapper(OptimWrapper):  # type: ignore[misc]
    """MMEngine's OptimWrapper, with the forward pass under ``torch.autocast`` on the device of the model.

    Parameters, gradients and optimizer states keep their dtype, and the losses of this package compute in float32
    whatever the logits are.

    Args:
        *args: of ``mmengine.optim.OptimWrapper``.
        dtype: ``'bfloat16'``, which needs no loss scaling.
        **kwargs: of ``mmengine.optim.OptimWrapper``.

    Raises:
        ValueError: another ``dtype``.

    Example:
        In a config file::

            optim_wrapper = dict(type='AutocastOptimWrapper', dtype='bfloat16', optimizer=dict(type='SGD', lr=0.1))
    """

    def __init__(self, *args: Any, dtype: str | torch.dtype = "bfloat16", **kwargs: Any) -> None:
        if dtype not in ("bfloat16", torch.bfloat16):
            hint = (
                "float16 needs a loss scaler and a GPU: use type='AmpOptimWrapper'"
                if dtype in ("float16", torch.float16)
                else "For training without autocast use type='OptimWrapper'"
            )
            raise ValueError(f"AutocastOptimWrapper: `dtype` must be 'bfloat16', got {dtype!r}. {hint}.")
        super().__init__(*args, **kwargs)
        self.dtype = torch.bfloat16

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of the forward pass: autocast, beside what the base class does for accumulated gradients."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=self.dtype):
            yield
