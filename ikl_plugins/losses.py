"""DKL, IKL and GKL as modules: the functions of :mod:`ikl_plugins.functional`, their settings and the class prior."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _validation as check
from ._composed import Settings
from ._mse_share import MseShare
from .class_prior import ClassPrior, in_backward
from .functional import LossTerms, check_settings, dkl_settings, evaluate, gkl_settings, ikl_settings
from .presets import find_preset

__all__ = ["LOSSES", "DKLLoss", "DecoupledLoss", "GKLLoss", "IKLLoss", "warmup_factor"]

Loss = TypeVar("Loss", bound="DecoupledLoss")


def warmup_factor(epoch: int, warmup_epochs: int) -> float:
    """Linear ramp of a distillation loss: min(epoch / warmup_epochs, 1), epochs counted from 1.

    Args:
        epoch: number of the running epoch, 1 for the first.
        warmup_epochs: length of the ramp in epochs, at least 0; 0 and 1 mean no ramp.

    Returns:
        The factor in (0, 1] for the distillation loss; the cross entropy to the labels is not scaled.

    Raises:
        TypeError: ``warmup_epochs`` is not a number.
        ValueError: ``warmup_epochs`` is negative, or ``epoch`` is below 1.

    References:
        The trainer of the official CIFAR-100 recipes (setting WARMUP).

    Example:
        >>> [warmup_factor(epoch, 4) for epoch in (1, 2, 4, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    check.check_number("warmup_factor", "warmup_epochs", warmup_epochs)
    if epoch < 1:
        raise ValueError(f"warmup_factor: `epoch` must be at least 1, got {epoch}. Epochs are counted from 1.")
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0


class DecoupledLoss(nn.Module):
    """What the losses of :data:`LOSSES` share: the class prior and its epochs, checks, the last terms.

    A subclass keeps its numbers as attributes, which may change between calls, and gives them in :meth:`settings`.

    Args:
        global_info: weights from the class-wise mean teacher prediction of the previous epoch, uniform in the first.
            Needs ``num_classes``, ``targets`` in every call and :meth:`end_epoch` after every epoch.
        num_classes: number of classes; if given, the logits must have it.
        check_finite: raise on NaN or infinite logits.
        **settings: become attributes.

    Raises:
        TypeError: a weight or temperature is not a number.
        ValueError: a setting is out of range, or ``global_info`` comes without ``num_classes``.

    Attributes:
        class_prior: the :class:`ClassPrior`, None without ``global_info``; part of ``state_dict``.
        last_terms: :class:`LossTerms` of the last call, detached; None before it.

    Warns:
        UserWarning: once, where the weights leave the weighted MSE below 1e-3 of the soft cross entropy over the first
            100 training batches with a frozen teacher: raise ``weight_temperature`` or ``beta``. On a device it comes
            when the other checks are read (:func:`ikl_plugins.read_value_checks`); torch.compile leaves it out.
    """

    alpha: float
    beta: float
    temperature: float
    reduction: str
    last_terms: LossTerms | None
    _mse_share: MseShare | None = None

    def __init__(
        self, *, check_finite: bool, global_info: bool, num_classes: int | None, **settings: float | str
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key, value in settings.items():
            setattr(self, key, value)
        check_settings(name, self.settings())
        self.check_finite = check_finite
        self.global_info = global_info
        self.num_classes = num_classes
        self.last_terms = None
        if num_classes is not None:
            check.check_num_classes(name, num_classes)
        elif global_info:
            raise ValueError(
                f"{name}: `num_classes` must be given with global_info=True, got None. "
                f"Pass the number of classes of the logits."
            )
        self.class_prior = ClassPrior(num_classes) if global_info and num_classes is not None else None
        self._mse_share = MseShare()

    @classmethod
    def preset(cls: type[Loss], name: str, num_classes: int | None = None, **overrides: Any) -> Loss:
        """A loss with the settings of a name; the cross entropy to the labels belongs beside it, with weight 1.

        Args:
            name: ``'start'`` for data without published settings, a family such as ``'cifar100_distillation'``, or
                another name of :data:`ikl_plugins.presets.PRESETS`, with or without its last part ('-ikl').
            num_classes: of the data; by default that of the published experiment.
            **overrides: keywords of the class that replace those of the preset.

        Raises:
            ValueError: an unknown name, or one of another loss.

        Example:
            >>> from ikl_plugins import IKLLoss
            >>> criterion = IKLLoss.preset("cifar100_distillation", num_classes=10, alpha=2.0)
            >>> criterion.alpha, criterion.beta, criterion.weight_temperature
            (2.0, 4.0, 100.0)
        """
        keywords = dict(find_preset(name, cls.__name__).keywords)
        if num_classes is not None:
            keywords["num_classes"] = num_classes
        return cls(**{**keywords, **overrides})

    def settings(self) -> Settings:
        """What the loss computes with, as the attributes say now."""
        raise NotImplementedError

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None = None,
        *,
        observe: bool | None = None,
    ) -> Tensor:
        """The loss of one batch; with ``global_info`` the batch may then enter the prior's sums.

        Args:
            student_logits: shape (N, C) or (N, C, d1, ...).
            teacher_logits: same shape.
            targets: class indices (N,) or (N, d1, ...); needed with ``global_info``, else not used.
            observe: whether the class prior collects the teacher's predictions of this batch, after it has been used;
                None for yes in training mode and no in eval mode. Say False in every further pass over the same batch;
                those that checkpointing repeats in the backward pass are left out already.

        Returns:
            A 0-dim tensor, or (N, d1, ...) for ``reduction='none'``.

        Raises:
            TypeError: dtypes that do not fit.
            ValueError: shapes, a class count or labels that do not fit; missing ``targets``.
        """
        name = type(self).__name__
        settings = check_settings(name, self.settings())
        check.check_logits(name, student_logits, teacher_logits, finite=self.check_finite)
        if self.num_classes is not None and student_logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{name}: `num_classes` must be the number of classes of the logits, got {self.num_classes} for "
                f"logits of shape {tuple(student_logits.shape)}. Correct `num_classes`."
            )
        prior, rows, labels = self.class_prior, None, None
        if prior is not None:
            targets = check.check_targets(name, targets, prior.num_classes, student_logits)
            if self.training if observe is None else observe:
                check.check_device(name, "targets", targets, prior.sums, "the class prior's")
            prior.check_matrix(name)
            labels = check.safe_index(targets, prior.num_classes)
            rows = prior.rows(labels)
            check.check_class_prior(name, rows, student_logits, values=False)
        loss, self.last_terms = evaluate(student_logits, teacher_logits, rows, settings, with_terms=True)
        collects = self.training if observe is None else observe
        # In adversarial training both views carry gradient, and they begin nearly equal.
        trains_student = settings.student_in_mse and student_logits.requires_grad and not teacher_logits.requires_grad
        if collects and trains_student and self._mse_share is not None and self.last_terms is not None:
            self._mse_share.observe(name, student_logits, teacher_logits, self.last_terms, settings)
        if prior is not None and labels is not None and collects and not in_backward():
            teacher = teacher_logits.detach()
            teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
            if settings.weight_temperature != 1.0:
                teacher = teacher / settings.weight_temperature
            prior.add(torch.softmax(teacher, 1), labels)
        return loss

    def reset_parameters(self) -> None:
        """As built, also after ``to_empty``: a uniform class prior without sums; settings stay."""
        if self.class_prior is not None:
            self.class_prior.reset_parameters()
        self.last_terms, self._mse_share = None, MseShare()

    def end_epoch(self) -> None:
        """Rolls the class prior (:meth:`ClassPrior.end_epoch`); nothing to do without ``global_info``."""
        if self.class_prior is not None:
            self.class_prior.end_epoch()

    def extra_repr(self) -> str:
        parts = {
            name: getattr(self, name)
            for name in ("alpha", "beta", "temperature", "weight_temperature", "gamma", "reduction", "global_info")
            if hasattr(self, name)
        }
        return ", ".join(f"{name}={value!r}" for name, value in parts.items())


class DKLLoss(DecoupledLoss):
    """Module form of :func:`ikl_plugins.dkl_loss`; see there for the formula, the settings and the gradient flow.

    Args:
        alpha: weight of the soft-label cross entropy.
        beta: weight of the weighted MSE.
        temperature: divides both logits in both terms.
        reduction: ``'batchmean'``, ``'sum'`` or ``'none'``.
        global_info: DKL takes no class prior; only False is accepted. Here so that a config may exchange the losses.
        num_classes: see :class:`DecoupledLoss`.
        check_finite: see :class:`DecoupledLoss`.

    Raises:
        TypeError: a weight or temperature is not a number.
        ValueError: a setting is out of range, or ``global_info`` is True.

    Example:
        >>> import torch
        >>> from ikl_plugins import DKLLoss
        >>> criterion = DKLLoss(temperature=4.0)
        >>> loss = criterion(torch.zeros(2, 3), torch.zeros(2, 3))  # no differences, uniform soft labels: log 3
        >>> round(loss.item(), 4)
        1.0986
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        global_info: bool = False,
        num_classes: int | None = None,
        check_finite: bool = False,
    ) -> None:
        if global_info:
            raise ValueError(
                "DKLLoss: `global_info` must be False, got True. Use IKLLoss or GKLLoss for weights of a class prior."
            )
        super().__init__(
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            reduction=reduction,
            global_info=False,
            num_classes=num_classes,
            check_finite=check_finite,
        )

    def settings(self) -> Settings:
        return dkl_settings(alpha=self.alpha, beta=self.beta, temperature=self.temperature, reduction=self.reduction)


class IKLLoss(DecoupledLoss):
    """Module form of :func:`ikl_plugins.ikl_loss`; with ``global_info`` it keeps the class prior itself.

    Args:
        alpha: weight of the soft-label cross entropy.
        beta: weight of the weighted MSE.
        temperature: of the cross entropy alone.
        weight_temperature: of the softmax that makes the instance weights, and of the predictions that the class prior
            collects (the recipes' T2 in distillation, tau in adversarial training).
        reduction: ``'batchmean'``, ``'sum'`` or ``'none'``.
        global_info: see :class:`DecoupledLoss`, as for errors and attributes.
        num_classes: see :class:`DecoupledLoss`.
        check_finite: see :class:`DecoupledLoss`.

    References:
        Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, equations 7 and 10.

    Example:
        >>> import torch
        >>> from ikl_plugins import IKLLoss
        >>> criterion = IKLLoss(global_info=True, num_classes=3)
        >>> loss = criterion(torch.zeros(2, 3), torch.eye(3)[:2], targets=torch.tensor([0, 1]))
        >>> criterion.end_epoch()
        >>> criterion.class_prior.matrix[2]  # class 2 did not occur
        tensor([0.3333, 0.3333, 0.3333])
    """

    weight_temperature: float

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        reduction: str = "batchmean",
        global_info: bool = False,
        num_classes: int | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            weight_temperature=weight_temperature,
            reduction=reduction,
            global_info=global_info,
            num_classes=num_classes,
            check_finite=check_finite,
        )

    def settings(self) -> Settings:
        return ikl_settings(
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
            reduction=self.reduction,
        )


class GKLLoss(DecoupledLoss):
    """Module form of :func:`ikl_plugins.gkl_loss`; everything else as :class:`IKLLoss`.

    Args:
        alpha: weight of the soft-label cross entropy.
        beta: weight of the weighted MSE.
        temperature: of the cross entropy alone.
        weight_temperature: of the softmax that makes the weights and of the predictions that the class prior collects.
        gamma: power of the weights, at least 0; 1 gives IKL.
        reduction: ``'batchmean'``, ``'sum'`` or ``'none'``.
        global_info: see :class:`DecoupledLoss`.
        num_classes: see :class:`DecoupledLoss`.
        check_finite: see :class:`DecoupledLoss`.

    References:
        Cui et al., Generalized Kullback-Leibler Divergence Loss, TPAMI 2026; the authors' code (see ``gkl_loss``).

    Example:
        >>> import torch
        >>> from ikl_plugins import GKLLoss
        >>> GKLLoss(gamma=0.0, alpha=0.0)(torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])).item()
        0.625
    """

    weight_temperature: float
    gamma: float

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        gamma: float = 1.0,
        reduction: str = "batchmean",
        global_info: bool = False,
        num_classes: int | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            weight_temperature=weight_temperature,
            gamma=gamma,
            reduction=reduction,
            global_info=global_info,
            num_classes=num_classes,
            check_finite=check_finite,
        )

    def settings(self) -> Settings:
        return gkl_settings(
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
            gamma=self.gamma,
            reduction=self.reduction,
        )


# The adapters loop over this table and name no loss themselves.
LOSSES: dict[str, type[DecoupledLoss]] = {"DKLLoss": DKLLoss, "IKLLoss": IKLLoss, "GKLLoss": GKLLoss}
