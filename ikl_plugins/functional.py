"""The decoupled Kullback-Leibler losses as pure tensor functions, linear in the number of classes.

Notation: for one sample with student logits ``s`` and teacher logits ``t`` let ``d = t - s`` and let ``w`` be the
class weights. The weighted MSE of the paper runs over all pairs of classes. With ``W = sum_j w_j`` and
``m = sum_j w_j d_j / W``

    1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2 = 1/2 W sum_j w_j (d_j - m)^2

so nothing of size C x C is ever formed.

Four ways compute the same numbers: :mod:`ikl_plugins._fused`, value and analytic gradient at once;
:mod:`ikl_plugins._composed`, plain differentiable tensor code; where somebody has built it, the C++ operator of
:mod:`ikl_plugins.native`; and on CUDA the kernels of :mod:`ikl_plugins.kernels`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _validation as check
from . import _value_checks, kernels, native
from ._composed import Settings, composed_loss
from ._fused import Gradients, fused_loss
from ._way import VARIABLE, named_way

__all__ = ["LossTerms", "dkl_loss", "gkl_loss", "ikl_loss"]


Needs = tuple[bool, bool]  # whether the student's gradient is wanted, and the teacher's


class LossTerms(NamedTuple):
    """The two parts of a loss value, detached, weights and reduction included: their sum is the loss."""

    weighted_mse: Tensor
    soft_cross_entropy: Tensor


def dkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    check_finite: bool = False,
) -> Tensor:
    r"""Decoupled KL: for ``alpha = beta = 1`` it has the gradients of KL divergence, for both inputs.

    With ``a = teacher_logits / temperature``, ``b = student_logits / temperature`` and ``p = softmax(a)``, per sample::

        beta/4 sum_jk sg(p_j p_k) ((a_j - a_k) - sg(b_j - b_k))^2  -  alpha sum_j sg(p_j) log softmax(b)_j

    where ``sg`` stops the gradient. The gradients are those of ``KL(p || softmax(b))``; the value is not, it differs
    from KL by more than a constant.

    Args:
        student_logits: raw scores of the network that follows, shape (N, C) or (N, C, d1, ...), any floating dtype. In
            adversarial training these are the logits of the adversarial view.
        teacher_logits: raw scores of the reference, same shape and device. In adversarial training: the natural view.
        alpha: weight of the soft-label cross entropy, at least 0. The name is the official code's; the paper's is beta.
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside. The paper's alpha.
        temperature: divides both logits in both terms, above 0. No factor ``temperature**2`` is applied.
        reduction: ``'batchmean'`` divides the sum by the number of samples N * d1 * ...; ``'sum'``; ``'none'``.
        check_finite: raise if the logits hold NaN or infinity. Off by default, as it reads the logits once more (and
            waits for the device). When off, a NaN goes through to the loss; it is never averaged away.

    Returns:
        A 0-dim tensor for ``'batchmean'`` and ``'sum'``, (N, d1, ...) for ``'none'``. Its dtype is float32 for
        half-precision inputs, else the wider dtype of the two. An empty batch gives 0.

    Raises:
        TypeError: logits that are not floating tensors, or weights and temperatures that are not numbers.
        ValueError: shapes, devices, ranges or a reduction that do not fit; non-finite logits under ``check_finite``.

    Note:
        The weighted MSE drives the teacher only and the cross entropy the student only. With a frozen teacher the first
        has no effect on training. Half-precision logits are computed in float32, also under autocast, and receive
        gradients in their own dtype. Logits up to +-1e4 are safe.

    References:
        Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, equation 5 (theorem 1).

    Example:
        >>> import torch
        >>> from ikl_plugins import dkl_loss
        >>> student = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 1.0]])
        >>> dkl_loss(student, teacher).backward()
        >>> torch.allclose(student.grad, student.softmax(1) - teacher.softmax(1))
        True
    """
    settings = dkl_settings(alpha=alpha, beta=beta, temperature=temperature, reduction=reduction)
    return _checked_loss("dkl_loss", student_logits, teacher_logits, None, settings, check_finite=check_finite)


def ikl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | None = None,
    reduction: str = "batchmean",
    check_finite: bool = False,
) -> Tensor:
    r"""Improved KL: the weighted MSE drives both sides, its weights may come from class-wise mean predictions.

    With ``w = class_prior``, or ``w = softmax(teacher_logits / weight_temperature)`` without one, per sample::

        beta/4 sum_jk sg(w_j w_k) ((t_j - t_k) - (s_j - s_k))^2
          - alpha sum_j sg(softmax(t / temperature)_j) log softmax(s / temperature)_j

    Logits, ``reduction``, ``check_finite``, the dtype of the result and half precision are as in :func:`dkl_loss`.

    Args:
        student_logits: shape (N, C) or (N, C, d1, ...).
        teacher_logits: same shape and device.
        alpha: weight of the soft-label cross entropy, at least 0.
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside. The paper's "alpha/4 = 5" is beta 20.
        temperature: of the cross entropy alone, both sides, above 0; no factor ``temperature**2``. The MSE sees raw
            logits.
        weight_temperature: of the softmax that makes the weights (the recipes' T2), above 0; unused with a class prior.
        class_prior: shape (N, C), for each sample the class-wise mean prediction of its label (see
            :class:`ClassPrior`), or the logits' own shape. Entries at least 0, zeros allowed; rows should sum to 1.
        reduction: ``'batchmean'``, ``'sum'`` or ``'none'``.
        check_finite: raise if the logits hold NaN or infinity.

    Returns:
        A 0-dim tensor, or (N, d1, ...) for ``reduction='none'``.

    Raises:
        TypeError: logits or prior that are not floating tensors, or weights and temperatures that are not numbers.
        ValueError: shapes, devices, ranges or a reduction that do not fit; negative or non-finite prior entries;
            non-finite logits under ``check_finite``.

    Note:
        Both logits receive the gradient of the weighted MSE, the student that of the cross entropy as well. Weights and
        soft labels carry none. Detach the teacher, or run it under ``torch.no_grad()``, to train the student alone.

    References:
        Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, equations 7 and 10.

    Example:
        >>> import torch
        >>> from ikl_plugins import ikl_loss
        >>> student = torch.tensor([[1.0, 2.0, 0.0]])
        >>> prior = torch.tensor([[0.5, 0.5, 0.0]])
        >>> loss = ikl_loss(student, student + 3.0, alpha=0.0, class_prior=prior)  # a shift changes no difference
        >>> loss.item()
        0.0
    """
    settings = ikl_settings(
        alpha=alpha, beta=beta, temperature=temperature, weight_temperature=weight_temperature, reduction=reduction
    )
    return _checked_loss("ikl_loss", student_logits, teacher_logits, class_prior, settings, check_finite=check_finite)


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    class_prior: Tensor | None = None,
    reduction: str = "batchmean",
    check_finite: bool = False,
) -> Tensor:
    r"""Generalised KL: IKL with weights smoothed by a power and normalised over the batch.

    With ``v = w**gamma`` for the weights ``w`` of :func:`ikl_loss` and b running over the samples of the batch::

        beta/4 sum_b sum_jk v_bj v_bk ((t_bj - t_bk) - (s_bj - s_bk))^2 / sum_b sum_jk v_bj v_bk  +  alpha CE

    where CE is the mean soft-label cross entropy of :func:`ikl_loss`. What is not said here is as there.

    Args:
        student_logits: shape (N, C) or (N, C, d1, ...).
        teacher_logits: same shape and device.
        alpha: weight of the soft-label cross entropy, at least 0.
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside.
        temperature: of the cross entropy alone, above 0.
        weight_temperature: of the softmax that makes the weights, above 0; unused with a class prior.
        gamma: power of the weights, at least 0. 1 gives IKL, 0 uniform weights; the published recipes lie between.
        class_prior: as in :func:`ikl_loss`.
        reduction: the formula above is ``'batchmean'``; ``'sum'`` is that times the number of samples; ``'none'`` gives
            values whose mean and sum the other two are. The normaliser is the whole batch's in each case (under data
            parallelism: the batch of the rank).
        check_finite: raise if the logits hold NaN or infinity.

    Returns:
        As :func:`ikl_loss`. If every weight of the batch is 0 the weighted MSE is 0.

    Raises:
        TypeError: as :func:`ikl_loss`.
        ValueError: as :func:`ikl_loss`, and a negative ``gamma``.

    Note:
        Gradient flow as in :func:`ikl_loss`; the normaliser carries none. ``0**0`` counts as 1, so with ``gamma = 0`` a
        zero of the prior weighs as much as any other entry.

    References:
        Cui et al., Generalized Kullback-Leibler Divergence Loss, TPAMI 2026; the formula is that of the authors' code
        (repository jiequancui/DKL, folder DKLv2).

    Example:
        >>> import torch
        >>> from ikl_plugins import gkl_loss
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> gkl_loss(student, teacher, alpha=0.0, gamma=0.0).item()  # half the variance of the differences
        0.625
    """
    settings = gkl_settings(
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        weight_temperature=weight_temperature,
        gamma=gamma,
        reduction=reduction,
    )
    return _checked_loss("gkl_loss", student_logits, teacher_logits, class_prior, settings, check_finite=check_finite)


# --- what the functions and the modules of losses.py share ------------------------------------------------------------


def dkl_settings(*, alpha: float, beta: float, temperature: float, reduction: str) -> Settings:
    """DKL: the weights and both terms see the tempered logits, the MSE drives the teacher alone."""
    return Settings(
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        weight_temperature=temperature,
        mse_temperature=temperature,
        student_in_mse=False,
        reduction=reduction,
    )


def ikl_settings(
    *, alpha: float, beta: float, temperature: float, weight_temperature: float, reduction: str
) -> Settings:
    """IKL: the MSE sees raw logits and drives both sides."""
    return Settings(
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        weight_temperature=weight_temperature,
        reduction=reduction,
    )


def gkl_settings(
    *, alpha: float, beta: float, temperature: float, weight_temperature: float, gamma: float, reduction: str
) -> Settings:
    """GKL: IKL with a power on the weights and the batch's pair weights for a divisor."""
    return Settings(
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        weight_temperature=weight_temperature,
        gamma=gamma,
        divide_by_pairs=True,
        reduction=reduction,
    )


def check_settings(caller: str, settings: Settings) -> Settings:
    """Refuses weights, temperatures or a reduction out of range; returns the settings with plain floats for numbers."""
    check.check_reduction(caller, settings.reduction)
    alpha, beta, temperature, weight_temperature, _, gamma, *_ = settings
    if (
        type(alpha) is type(beta) is type(temperature) is type(weight_temperature) is type(gamma) is float
        and 0.0 < alpha < math.inf
        and 0.0 < beta < math.inf
        and 0.0 < temperature < math.inf
        and 0.0 < weight_temperature < math.inf
        and 0.0 < gamma < math.inf
    ):
        return settings  # the common case, on the path of every call
    return settings._replace(
        alpha=check.check_number(caller, "alpha", settings.alpha),
        beta=check.check_number(caller, "beta", settings.beta),
        temperature=check.check_number(caller, "temperature", settings.temperature, positive=True),
        weight_temperature=check.check_number(caller, "weight_temperature", settings.weight_temperature, positive=True),
        gamma=check.check_number(caller, "gamma", settings.gamma),
        mse_temperature=float(settings.mse_temperature),
    )


def _checked_loss(
    caller: str,
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    *,
    check_finite: bool,
) -> Tensor:
    check.check_logits(caller, student, teacher, finite=check_finite)
    settings = check_settings(caller, settings)
    if class_prior is not None:
        check.check_class_prior(caller, class_prior, student)
    return evaluate(student, teacher, class_prior, settings)[0]


def evaluate(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    *,
    with_terms: bool = False,
) -> tuple[Tensor, LossTerms | None]:
    """The loss of operands that have been checked, and on request its two terms, on the path that fits."""
    if class_prior is not None:
        class_prior = class_prior.detach()
    elif settings.divide_by_pairs and settings.gamma == 1.0:
        # The softmax sums to 1, so the pair weights of the batch sum to its size: GKL is IKL.
        settings = settings._replace(divide_by_pairs=False)
    if torch.compiler.is_compiling():
        loss, mse, cross_entropy = composed_loss(student, teacher, class_prior, settings)
        return loss, LossTerms(mse.detach(), cross_entropy.detach())
    recorded = torch.is_grad_enabled()
    needs = recorded and student.requires_grad, recorded and teacher.requires_grad
    if not with_terms:
        return _AnalyticLoss.apply(student, teacher, class_prior, (settings, needs, False)), None
    loss, mse, cross_entropy = _AnalyticLoss.apply(student, teacher, class_prior, (settings, needs, True))
    return loss, LossTerms(mse, cross_entropy)


class _AnalyticLoss(torch.autograd.Function):
    """Value and analytic gradient at once; see :func:`_value_and_gradients`."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, class_prior: Tensor | None, call: tuple[Settings, Needs, bool]
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        loss, terms, ctx.gradients = _value_and_gradients(student, teacher, class_prior, *call)
        ctx.call = call
        if teacher.is_inference() or (class_prior is not None and class_prior.is_inference()):
            # Autograd refuses to save what torch.inference_mode() made; such tensors cannot change under our hands.
            ctx.fixed = teacher, class_prior
            ctx.save_for_backward(student)
        else:
            ctx.save_for_backward(student, teacher, class_prior)
        if terms is None:
            return loss
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, *others = ctx.saved_tensors
        teacher, class_prior = others or ctx.fixed
        settings, needs, _ = ctx.call
        if torch.is_grad_enabled():
            # Somebody wants the derivative of this gradient: hand out one that has a graph of its own.
            return *_composed_gradients(student, teacher, class_prior, settings, needs, grad_loss), None, None
        gradients = ctx.gradients
        if gradients is None:
            # A second call on a retained graph: the first one scaled its tensors in place and gave them away.
            gradients = _value_and_gradients(student, teacher, class_prior, settings, needs, False)[2]
        if isinstance(gradients, kernels.Later):
            return *gradients(student, teacher, class_prior, grad_loss), None, None
        ctx.gradients = None
        return _finish(gradients[0], grad_loss, student), _finish(gradients[1], grad_loss, teacher), None, None


def _value_and_gradients(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: Needs,
    with_terms: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Gradients | kernels.Later]:
    """The reduced loss, on request its two terms, and the gradients that are needed, in the compute dtype.

    They are rounded to the inputs' dtype only after the chain rule's last factor, so that a loss scale keeps small ones
    from vanishing.
    """
    operands = student, teacher, class_prior
    named = named_way()
    if named in (None, "triton") and kernels.serves(*operands):
        kernel = kernels.operator()
        if kernel is not None:
            loss, mse, cross_entropy, later = kernel(*operands, settings, needs)
            return loss, (mse, cross_entropy) if with_terms else None, later or (None, None)
    operator = native.operator() if student.is_cpu else None
    if operator is not None and named != "triton" and native.serves(*operands):
        return operator(*operands, settings, needs, with_terms)
    if named == "triton" or (named == "native" and (operator is not None or not student.is_cpu)):
        _say_once(named, student)  # of an operator that cannot be had native tells
    return fused_loss(*operands, settings, needs, with_terms)


_said: set[str] = set()


def _say_once(named: str, student: Tensor) -> None:
    if named not in _said:
        _said.add(named)
        what = f"{student.dim()}-dimensional logits on {student.device.type}"
        warnings.warn(f"{VARIABLE}={named} cannot serve {what}: the walk does.", RuntimeWarning, stacklevel=2)


def _finish(gradient: Tensor | None, grad_loss: Tensor, like: Tensor) -> Tensor | None:
    """The chain rule's last factor, in place: a second tensor of the logits' size would double the peak memory."""
    if gradient is None:
        return None
    if grad_loss.dim() > 0:
        gradient.mul_(grad_loss.unsqueeze(1))
    elif not _value_checks.on_host(grad_loss) or grad_loss.item() != 1.0:
        gradient.mul_(grad_loss)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def _composed_gradients(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    grad_loss: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    # Aliases: where one side's logits are computed from the other's, only the direct dependence is this function's.
    student, teacher = student.view_as(student), teacher.view_as(teacher)
    loss, _, _ = composed_loss(student, teacher, class_prior, settings)
    wanted = tuple(tensor for tensor, need in zip((student, teacher), needs, strict=True) if need)
    found = torch.autograd.grad(loss, wanted, grad_loss, create_graph=True)
    return found[0] if needs[0] else None, found[-1] if needs[1] else None
