"""Whether the weighted MSE of a distillation has any part in the loss: looked at once, after the first batches."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ._composed import Settings
from ._value_checks import check_values, is_recorded

__all__ = ["MseShare"]

BATCHES = 100
LEAST = 1e-3  # of the soft cross entropy


class MseShare:
    """The two terms of a loss over its first training batches.

    Confident teachers give weights of one class alone, and then no difference of two classes counts: the loss trains as
    if ``beta`` were 0. What has been gathered stays on the device, and the verdict is read with the other checks.
    """

    def __init__(self) -> None:
        self.terms: list[tuple[Tensor, Tensor]] = []
        self.done = False

    def observe(
        self, name: str, student: Tensor, teacher: Tensor, terms: tuple[Tensor, Tensor], settings: Settings
    ) -> None:
        """One training batch.

        Args:
            name: of the loss, for the message.
            student: logits (N, C, ...).
            teacher: the same of the teacher.
            terms: weighted MSE and soft cross entropy, as the loss has them.
            settings: of the loss.
        """
        if self.done or is_recorded(student) or not (settings.alpha and settings.beta and student.numel()):
            return
        if self.terms and self.terms[0][0].device != student.device:
            return  # a replica of DataParallel shares this object
        self.terms.append(terms if terms[0].dim() == 0 else (terms[0].mean(), terms[1].mean()))
        if len(self.terms) < BATCHES:
            return
        self.done = True
        mse, cross_entropy = (torch.stack(column).sum() for column in zip(*self.terms, strict=True))
        # Networks that agree, as a running average and its student do, have a small MSE under any weights.
        differences = (teacher - student).detach().to(mse.dtype)
        even = 0.5 * settings.beta * differences.var(1, unbiased=False).mean()
        own = self.terms[-1][1] / (student.numel() // student.shape[1] if settings.reduction == "sum" else 1)
        self.terms = []

        def judge(mse: float, cross_entropy: float, even: float, own: float) -> None:
            if mse < LEAST * cross_entropy and even >= LEAST * own:
                warnings.warn(
                    f"{name}: the weighted MSE was {mse / cross_entropy:.0e} of the cross entropy, {BATCHES} batches. "
                    f"Raise `weight_temperature` ({settings.weight_temperature:g}) or `beta` ({settings.beta:g}).",
                    stacklevel=2,
                )

        check_values(name, "weighted MSE", (mse, cross_entropy, even, own), judge)
