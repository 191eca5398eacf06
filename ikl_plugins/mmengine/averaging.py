"""An average of the weights that follows them quickly at first."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseAveragedModel
from torch import Tensor, nn

__all__ = ["WarmupEMA"]


class WarmupEMA(BaseAveragedModel):  # type: ignore[misc]
    r"""An exponential moving average whose decay rises: ``dict(type='EMAHook', ema_type='WarmupEMA', ...)``.

    In the d-th averaged step, counted from 0::

        average = decay * average + (1 - decay) * weights,   decay = min(1 - momentum, (1 + d) / (10 + d))

    EMAHook's ``begin_epoch`` or ``begin_iter`` says when averaging begins; before that the average is a copy. Buffers,
    such as the statistics of batch normalisation, are those of the model that is trained, unless ``update_buffers``.

    Args:
        model: the network.
        momentum: 1 - the final decay, between 0 and 1; 0.005 for a decay of 0.995.
        interval: steps from one update to the next; d counts steps.
        device: where the average is kept; by default that of the model.
        update_buffers: average the buffers, too.

    Raises:
        ValueError: a momentum out of range.

    Note:
        The published warm-up is 2.5 % of the steps: ``begin_epoch=11`` of 400 epochs, as epochs are counted from 1.

    References:
        Gowal et al., Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples, 2020,
        section 4.3.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.005,
        interval: int = 1,
        device: torch.device | None = None,
        update_buffers: bool = False,
    ) -> None:
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 < momentum < 1:
            raise ValueError(
                f"WarmupEMA: `momentum` must be a number between 0 and 1, got {momentum!r}. "
                f"Write 0.005 for a decay of 0.995."
            )
        super().__init__(model, interval, device, update_buffers)
        self.momentum = momentum
        # The base class makes a copy in its step 0. Here averaging begins with the first step.
        self.steps: Tensor = self.steps.fill_(1)

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        """Updates one tensor of the average in place; ``steps`` is 1 in the first."""
        averaged_param.lerp_(source_param, 1 - self.decay(int(steps) - 1))

    def decay(self, step: int) -> float:
        """The decay in an averaged step, 0 for the first."""
        return min(1 - self.momentum, (1 + step) / (10 + step))
