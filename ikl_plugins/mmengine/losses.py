"""The losses of :data:`ikl_plugins.losses.LOSSES`, and KL as their baseline, with the keywords of OpenMMLab's losses.

They are registered in MMEngine's root registry, so the scopes mmpretrain, mmdet, mmseg and mmrazor resolve them all.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check
from .. import losses as core
from ..functional import LossTerms
from ..presets import Preset, find_preset

__all__ = ["LOSSES", "KLLoss", "WithLossWeight"]

_CORE_REDUCTION = {"mean": "batchmean", "batchmean": "batchmean", "sum": "sum", "none": "none"}


class WithLossWeight(core.DecoupledLoss):
    """A loss of the core in OpenMMLab's convention; the class of the same name in :mod:`ikl_plugins` has the formula.

    Args:
        preset: name of settings, see :meth:`ikl_plugins.DecoupledLoss.preset`; other keywords go before them.
        loss_weight: factor of the loss, at least 0.
        reduction: ``'mean'``, ``'sum'`` or ``'none'``. ``'mean'`` is the mean over samples (over all places, where the
            logits have some): the core's ``'batchmean'``, which is also accepted under that name. It is not the
            ``'mean'`` of ``F.kl_div``, which divides by the number of classes as well.
        **core_keywords: those of the core's class.

    Raises:
        TypeError: an unknown keyword (the message names the nearest known one), or one of the wrong type.
        ValueError: a value out of range, or an unknown preset.

    Attributes:
        warmup_epochs: of the preset, 0 without one; a classifier that is told none takes it.
        last_terms: :class:`ikl_plugins.LossTerms` of the last call, ``loss_weight`` included, so that they sum to its
            value.

    Example:
        >>> import torch
        >>> from mmengine.registry import MODELS
        >>> import ikl_plugins.mmengine
        >>> loss = MODELS.build(dict(type="IKLLoss", loss_weight=2.0))
        >>> round(loss(torch.zeros(2, 3), torch.zeros(2, 3)).item(), 4)  # twice log 3
        2.1972
    """

    def __init__(
        self,
        *,
        preset: str | None = None,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        **core_keywords: Any,
    ) -> None:
        name = type(self).__name__
        known = {"preset", "loss_weight", *inspect.signature(super().__init__).parameters}
        for keyword in core_keywords:
            if keyword not in known:
                raise TypeError(check.unknown_name_message(name, "keyword", keyword, known))
        check.check_number(name, "loss_weight", loss_weight)
        found = Preset(name, {}) if preset is None else find_preset(preset, name)
        super().__init__(reduction=_core_reduction(name, reduction), **{**found.keywords, **core_keywords})
        self.loss_weight = loss_weight
        self.warmup_epochs = found.warmup_epochs

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None = None,
        *,
        observe: bool | None = None,
    ) -> Tensor:
        """The core's forward, times ``loss_weight``; ``last_terms`` carries it as well."""
        loss = super().forward(student_logits, teacher_logits, targets, observe=observe)
        if self.loss_weight == 1.0:
            return loss
        if self.last_terms is not None:
            self.last_terms = LossTerms(*(self.loss_weight * term for term in self.last_terms))
        return self.loss_weight * loss

    def extra_repr(self) -> str:
        return f"loss_weight={self.loss_weight}, {super().extra_repr()}"


# The same names as in the core, with OpenMMLab's keywords.
LOSSES: dict[str, type[WithLossWeight]] = {
    name: type(name, (WithLossWeight, loss), {"__module__": __name__, "__doc__": WithLossWeight.__doc__})
    for name, loss in core.LOSSES.items()
}


def __getattr__(name: str) -> Any:
    if name in LOSSES:
        return LOSSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class KLLoss(nn.Module):
    """KL(softmax(teacher / T) || softmax(student / T)) of ``F.kl_div``: the baseline that the others replace.

    With ``temperature=4`` and ``scale_by_temperature_squared=True`` it is the classic distillation loss, with the
    defaults the robust term of TRADES. The gradient reaches both sides.

    Args:
        loss_weight: factor of the loss, at least 0.
        temperature: T, above 0; divides both logits.
        scale_by_temperature_squared: multiply by T**2, so that the size of the gradient hardly depends on T.
        reduction: ``'mean'`` (also called ``'batchmean'``), ``'sum'`` or ``'none'``. ``'mean'`` is the mean over
            samples of the sum over classes, not ``F.kl_div``'s ``'mean'``.

    Raises:
        TypeError: a number of the wrong type.
        ValueError: a value out of range.

    Note:
        Half precision computes in float32, also under autocast.

    Example:
        >>> import torch
        >>> from ikl_plugins.mmengine import KLLoss
        >>> KLLoss()(torch.ones(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    # The interface of the other losses: without a class prior, and with a value of one term.
    class_prior = None
    global_info = False
    num_classes = None
    last_terms = None

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check.check_number("KLLoss", "loss_weight", loss_weight)
        check.check_number("KLLoss", "temperature", temperature, positive=True)
        self.loss_weight = loss_weight
        self.temperature = temperature
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.reduction = _core_reduction("KLLoss", reduction)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None = None,
        *,
        observe: bool | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            student_logits: shape (N, C) or (N, C, d1, ...).
            teacher_logits: same shape.
            targets: not used; here so that a config may exchange the losses.
            observe: likewise.

        Returns:
            A 0-dim tensor, or (N, d1, ...) for ``reduction='none'``.

        Raises:
            TypeError: logits that are not floating tensors.
            ValueError: shapes that do not fit.
        """
        check.check_logits("KLLoss", student_logits, teacher_logits)
        dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
        student = F.log_softmax(student_logits.to(dtype) / self.temperature, 1)
        teacher = F.log_softmax(teacher_logits.to(dtype) / self.temperature, 1)
        # With log probabilities the gradient stays finite where a probability is 0. Autocast keeps all this in float32.
        rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        factor = self.loss_weight * (self.temperature**2 if self.scale_by_temperature_squared else 1.0)
        if self.reduction == "none":
            return factor * rows
        return factor * (rows.sum() if self.reduction == "sum" or rows.numel() == 0 else rows.mean())

    def end_epoch(self) -> None:
        """Nothing to do: there is no class prior."""

    def extra_repr(self) -> str:
        return (
            f"loss_weight={self.loss_weight}, temperature={self.temperature}, scale_by_temperature_squared="
            f"{self.scale_by_temperature_squared}, reduction={self.reduction!r}"
        )


def _core_reduction(caller: str, reduction: str) -> str:
    if reduction not in _CORE_REDUCTION:
        raise ValueError(f"{caller}: `reduction` must be one of 'mean', 'sum', 'none', got {reduction!r}. Use 'mean'.")
    return _CORE_REDUCTION[reduction]
