"""The learning rates of the authors' long-tailed and adversarial scripts, which torch's own schedulers do not give."""

from __future__ import annotations

import math

from .. import _validation as check

__all__ = ["WarmupCosine"]


class WarmupCosine:
    """A linear warm-up and then half a cosine, as the ``lr_lambda`` of torch's ``LambdaLR``; it steps once an epoch.

    With E epochs of which the first W warm up, the factor of the learning rate in epoch e, 0 for the first, is
    (e + 1) / W in the warm-up and 0.5 (1 + cos(pi (e - W + 1) / (E - W + 1))) after it. Without a warm-up the cosine
    is one epoch ahead of ``CosineAnnealingLR(T_max=E + 1)``. In both cases the last epoch ends just above 0.

    Args:
        epochs: number of epochs of the training, E; at least 1.
        warmup_epochs: W, fewer than E.

    Raises:
        TypeError: one of them is no integer.
        ValueError: one of them is out of range.

    Example:
        In a YAML file::

            scheduler:
              key: 'LambdaLR'
              kwargs:
                lr_lambda: !import_call
                  key: 'ikl_plugins.torchdistill.WarmupCosine'
                  init:
                    kwargs:
                      epochs: 90
                      warmup_epochs: 10

        >>> factor = WarmupCosine(epochs=90, warmup_epochs=10)
        >>> [round(factor(epoch), 4) for epoch in (0, 9, 10, 89)]
        [0.1, 1.0, 0.9996, 0.0004]
    """

    def __init__(self, epochs: int, warmup_epochs: int = 0) -> None:
        self.epochs = check.check_integer("WarmupCosine", "epochs", epochs)
        self.warmup_epochs = check.check_integer("WarmupCosine", "warmup_epochs", warmup_epochs, least=0)
        if warmup_epochs >= epochs:
            raise ValueError(
                f"WarmupCosine: `warmup_epochs` must be below the {epochs} epochs of the training, got {warmup_epochs}."
            )

    def __call__(self, epoch: int) -> float:
        """The factor in ``epoch``, 0 for the first."""
        past_peak = epoch - self.warmup_epochs + 1
        if past_peak < 0:
            return (epoch + 1) / self.warmup_epochs
        return 0.5 * (1 + math.cos(math.pi * past_peak / (self.epochs - self.warmup_epochs + 1)))
