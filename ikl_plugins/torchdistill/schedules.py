"""The learning rates of the authors' long-tailed and adversarial scripts, which torch's own schedulers do not give."""

from __future__ import annotations

import math

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
        for name, value, least, rule in (
            ("epochs", epochs, 1, "an integer of at least 1"),
            ("warmup_epochs", warmup_epochs, 0, "an integer of at least 0"),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"WarmupCosine: `{name}` must be {rule}, got {value!r} of type {type(value).__name__}. "
                    f"Pass a whole number of epochs."
                )
            if value < least:
                raise ValueError(f"WarmupCosine: `{name}` must be {rule}, got {value}. Choose a value in that range.")
        if warmup_epochs >= epochs:
            raise ValueError(
                f"WarmupCosine: `warmup_epochs` must be below the {epochs} epochs of the training, got "
                f"{warmup_epochs}. Shorten the warm-up."
            )
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs

    def __call__(self, epoch: int) -> float:
        """The factor in ``epoch``, 0 for the first."""
        past_peak = epoch - self.warmup_epochs + 1
        if past_peak < 0:
            return (epoch + 1) / self.warmup_epochs
        return 0.5 * (1 + math.cos(math.pi * past_peak / (self.epochs - self.warmup_epochs + 1)))
