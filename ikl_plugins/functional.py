"""The decoupled Kullback-Leibler losses as pure tensor functions, linear in the number of classes.

Notation: for one sample with student logits ``s`` and teacher logits ``t`` let ``d = t - s`` and let ``w`` be the class
weights. The weighted MSE of the paper runs over all pairs of classes; with ``W = sum_j w_j`` and ``m = sum_j w_j d_j / W``

    1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2 = 1/2 W sum_j w_j (d_j - m)^2

so nothing of size C x C is ever formed. Its derivative with respect to ``d_i`` is ``W w_i (d_i - m)``.

Two ways compute the same numbers. The fused one walks over blocks of rows that fit the cache and leaves the analytic
gradient behind while the block is hot. The composed one is plain differentiable tensor code; it serves
``torch.compile`` and second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _validation as check

__all__ = ["LossTerms", "dkl_loss", "gkl_loss", "ikl_loss"]

# Elements of one block of rows. On a CPU the handful of float32 blocks in flight should fit the last-level cache; an
# accelerator wants few, large launches and only needs the blocks to bound its memory.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS_ACCELERATOR = 2**24


class LossTerms(NamedTuple):
    """The two parts of a loss value, detached, weights and reduction included: their sum is the loss."""

    weighted_mse: Tensor
    soft_cross_entropy: Tensor


class _Settings(NamedTuple):
    """What distinguishes one call from another, beside its tensors."""

    alpha: float
    beta: float
    temperature: float  # of the soft cross entropy
    weight_temperature: float  # of the softmax that makes the weights, without a class prior
    gamma: float  # power of the weights
    mse_temperature: float  # divides the logits inside the weighted MSE
    student_in_mse: bool  # False: the student side of the weighted MSE is detached (DKL)
    divide_by_pairs: bool  # True: divide by the pair weights of the batch instead of its size (GKL)
    reduction: str


def dkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    check_finite: bool = False,
    return_terms: bool = False,
) -> Any:
    r"""Decoupled KL: for ``alpha = beta = 1`` it has the gradients of KL divergence, for both inputs.

    With ``a = teacher_logits / temperature``, ``b = student_logits / temperature`` and ``p = softmax(a)``, per sample::

        beta/4 sum_jk sg(p_j p_k) ((a_j - a_k) - sg(b_j - b_k))^2  -  alpha sum_j sg(p_j) log softmax(b)_j

    where ``sg`` stops the gradient. The gradients are those of ``KL(p || softmax(b))``; the value is not: it differs from
    KL by more than a constant.

    Args:
        student_logits: raw scores of the network that follows, shape (N, C) or (N, C, d1, ...), any floating dtype. In
            adversarial training these are the logits of the adversarial view.
        teacher_logits: raw scores of the reference, same shape and device. In adversarial training: the natural view.
        alpha: weight of the soft-label cross entropy, at least 0. The paper calls it beta; this is the official code's name.
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside. The paper's alpha.
        temperature: divides both logits in both terms, above 0. No factor ``temperature**2`` is applied.
        reduction: ``'batchmean'`` divides the sum by the number of samples N * d1 * ...; ``'sum'``; ``'none'``.
        check_finite: raise if the logits hold NaN or infinity. Off by default, as it reads the logits once more (and
            waits for the device). When off, a NaN goes through to the loss; it is never averaged away.
        return_terms: return ``(loss, LossTerms)``, the second one detached.

    Returns:
        A 0-dim tensor for ``'batchmean'`` and ``'sum'``, (N, d1, ...) for ``'none'``: float32 for half-precision inputs,
        else the wider dtype of the two. An empty batch gives 0.

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
    settings = _Settings(
        alpha=alpha, beta=beta, temperature=temperature, weight_temperature=temperature, gamma=1.0,
        mse_temperature=temperature, student_in_mse=False, divide_by_pairs=False, reduction=reduction,
    )  # fmt: skip
    return _loss("dkl_loss", student_logits, teacher_logits, None, settings, check_finite, return_terms)


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
    return_terms: bool = False,
) -> Any:
    r"""Improved KL: the weighted MSE drives both sides, its weights may come from class-wise mean predictions.

    With ``w = class_prior``, or ``w = softmax(teacher_logits / weight_temperature)`` without one, per sample::

        beta/4 sum_jk sg(w_j w_k) ((t_j - t_k) - (s_j - s_k))^2
          - alpha sum_j sg(softmax(t / temperature)_j) log softmax(s / temperature)_j

    Args:
        student_logits: raw scores of the network that follows, shape (N, C) or (N, C, d1, ...), any floating dtype.
        teacher_logits: raw scores of the reference, same shape and device.
        alpha: weight of the soft-label cross entropy, at least 0. The paper calls it beta; this is the official code's name.
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside. The paper's alpha, so "alpha/4 = 5" is beta 20.
        temperature: of the cross entropy alone, both sides, above 0; the MSE sees raw logits. No ``temperature**2`` factor.
        weight_temperature: of the softmax that makes the weights (the recipes' T2), above 0; unused with a class prior.
        class_prior: shape (N, C), for each sample the class-wise mean prediction of its label (see :class:`ClassPrior`),
            or the logits' own shape. Entries at least 0, rows meant to sum to 1; zeros are allowed.
        reduction: ``'batchmean'`` divides the sum by the number of samples N * d1 * ...; ``'sum'``; ``'none'``.
        check_finite: raise if the logits hold NaN or infinity (see :func:`dkl_loss`).
        return_terms: return ``(loss, LossTerms)``, the second one detached.

    Returns:
        A 0-dim tensor for ``'batchmean'`` and ``'sum'``, (N, d1, ...) for ``'none'``: float32 for half-precision inputs,
        else the wider dtype of the two. An empty batch gives 0.

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
    settings = _Settings(
        alpha=alpha, beta=beta, temperature=temperature, weight_temperature=weight_temperature, gamma=1.0,
        mse_temperature=1.0, student_in_mse=True, divide_by_pairs=False, reduction=reduction,
    )  # fmt: skip
    return _loss("ikl_loss", student_logits, teacher_logits, class_prior, settings, check_finite, return_terms)


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
    return_terms: bool = False,
) -> Any:
    r"""Generalised KL: IKL with weights smoothed by a power and normalised over the batch.

    With ``v = w**gamma`` for the weights ``w`` of :func:`ikl_loss` and b running over the samples of the batch::

        beta/4 sum_b sum_jk v_bj v_bk ((t_bj - t_bk) - (s_bj - s_bk))^2 / sum_b sum_jk v_bj v_bk  +  alpha CE

    where CE is the mean soft-label cross entropy of :func:`ikl_loss`.

    Args:
        student_logits: raw scores of the network that follows, shape (N, C) or (N, C, d1, ...), any floating dtype.
        teacher_logits: raw scores of the reference, same shape and device.
        alpha: weight of the soft-label cross entropy, at least 0 (see :func:`ikl_loss` on the paper's naming).
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside.
        temperature: of the cross entropy alone, above 0.
        weight_temperature: of the softmax that makes the weights, above 0; unused with a class prior.
        gamma: power of the weights, at least 0. 1 gives IKL, 0 uniform weights; the published recipes lie between.
        class_prior: as in :func:`ikl_loss`.
        reduction: the formula above is ``'batchmean'``; ``'sum'`` is that times the number of samples; ``'none'`` gives
            values whose mean and sum the other two are. The normaliser is the whole batch's in each case (under data
            parallelism: the batch of the rank).
        check_finite: raise if the logits hold NaN or infinity (see :func:`dkl_loss`).
        return_terms: return ``(loss, LossTerms)``, the second one detached.

    Returns:
        As :func:`ikl_loss`. If every weight of the batch is 0 the weighted MSE is 0.

    Raises:
        TypeError: logits or prior that are not floating tensors, or weights and temperatures that are not numbers.
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
    settings = _Settings(
        alpha=alpha, beta=beta, temperature=temperature, weight_temperature=weight_temperature, gamma=gamma,
        mse_temperature=1.0, student_in_mse=True, divide_by_pairs=True, reduction=reduction,
    )  # fmt: skip
    return _loss("gkl_loss", student_logits, teacher_logits, class_prior, settings, check_finite, return_terms)


def _loss(
    caller: str,
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: _Settings,
    check_finite: bool,
    return_terms: bool,
) -> Tensor | tuple[Tensor, LossTerms]:
    check.check_logits(caller, student, teacher)
    for name in ("alpha", "beta", "gamma"):
        check.check_number(caller, name, getattr(settings, name))
    for name in ("temperature", "weight_temperature"):
        check.check_number(caller, name, getattr(settings, name), positive=True)
    check.check_reduction(caller, settings.reduction)
    if class_prior is not None:
        check.check_class_prior(caller, class_prior, student)
        class_prior = class_prior.detach()
    elif settings.gamma == 1.0:
        # The softmax sums to 1, so the pair weights of the batch sum to its size: GKL is IKL.
        settings = settings._replace(divide_by_pairs=False)

    if torch.compiler.is_compiling():
        loss, mse, cross_entropy = _composed(student, teacher, class_prior, settings)
    else:
        if check_finite:
            check.check_finite_logits(caller, student_logits=student, teacher_logits=teacher)
        loss, mse, cross_entropy = _FusedLoss.apply(student, teacher, class_prior, settings, torch.is_grad_enabled())
    return (loss, LossTerms(mse.detach(), cross_entropy.detach())) if return_terms else loss


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _reduce(rows: Tensor, settings: _Settings, shape: torch.Size) -> Tensor:
    """Per-sample values (N * d1 * ...,) to the declared reduction for logits of ``shape``."""
    if settings.reduction == "none":
        return rows.reshape(shape[0], *shape[2:])
    total = rows.sum()
    return total if settings.reduction == "sum" or rows.numel() == 0 else total / rows.numel()


def _row_scale(settings: _Settings, rows: int) -> float:
    """What one row's value is multiplied by in the reduced loss."""
    return 1.0 / rows if settings.reduction == "batchmean" and rows else 1.0


# --- the composed path -----------------------------------------------------------------------------------------------


def _composed(
    student: Tensor, teacher: Tensor, class_prior: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weighted-MSE part and cross-entropy part as ordinary differentiable tensor code."""
    dtype = _compute_dtype(student, teacher)
    shape = student.shape
    with _without_autocast(student.device):
        s = student.movedim(1, -1).reshape(-1, shape[1]).to(dtype)
        t = teacher.movedim(1, -1).reshape(-1, shape[1]).to(dtype)
        if class_prior is None:
            weights = torch.exp(settings.gamma * torch.log_softmax(t.detach() / settings.weight_temperature, 1))
        else:
            if class_prior.dim() < student.dim():
                class_prior = class_prior.reshape(*class_prior.shape, *[1] * (student.dim() - 2)).expand(shape)
            weights = class_prior.movedim(1, -1).reshape(-1, shape[1]).to(dtype) ** settings.gamma
        mass = weights.sum(1)

        difference = (t - (s if settings.student_in_mse else s.detach())) / settings.mse_temperature
        mean = (weights * difference).sum(1) / torch.where(mass > 0, mass, 1.0)
        mse = 0.5 * mass * (weights * (difference - mean.unsqueeze(1)) ** 2).sum(1)
        if settings.divide_by_pairs:
            pairs = (mass**2).sum()
            mse = mse * (mass.numel() / torch.where(pairs > 0, pairs, 1.0))

        soft_labels = torch.softmax(t.detach() / settings.temperature, 1)
        cross_entropy = -(soft_labels * torch.log_softmax(s / settings.temperature, 1)).sum(1)

        mse = settings.beta * mse
        cross_entropy = settings.alpha * cross_entropy
        return (
            _reduce(mse + cross_entropy, settings, shape),
            _reduce(mse, settings, shape),
            _reduce(cross_entropy, settings, shape),
        )


# --- the fused path --------------------------------------------------------------------------------------------------


class _FusedLoss(torch.autograd.Function):
    """Value and analytic gradient in one walk over the rows; see :func:`_walk`."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        class_prior: Tensor | None,
        settings: _Settings,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.needs = tuple(grad_enabled and tensor.requires_grad for tensor in (student, teacher))
        mse, cross_entropy, gradients = _walk(student, teacher, class_prior, settings, *ctx.needs)
        ctx.save_for_backward(student, teacher, class_prior)
        ctx.settings = settings
        ctx.gradients = gradients
        parts = _reduce(mse, settings, student.shape), _reduce(cross_entropy, settings, student.shape)
        ctx.mark_non_differentiable(*parts)
        return parts[0] + parts[1], *parts

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, class_prior = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody wants the derivative of this gradient: hand out one that has a graph of its own.
            return (
                *_composed_gradients(student, teacher, class_prior, ctx.settings, ctx.needs, grad_loss),
                None,
                None,
                None,
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second call on a retained graph: the first one scaled its tensors in place and gave them away.
            *_, gradients = _walk(student, teacher, class_prior, ctx.settings, *ctx.needs)
        return *(
            None if gradient is None else _scale_(gradient, grad_loss).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (student, teacher), strict=True)
        ), None, None, None  # fmt: skip


def _scale_(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """The chain rule's last factor, in place: a second tensor of the logits' size would double the peak memory."""
    if grad_loss.dim() > 0:
        return gradient.mul_(grad_loss.unsqueeze(1))
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return gradient
    return gradient.mul_(grad_loss)


def _composed_gradients(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: _Settings,
    needs: tuple[bool, bool],
    grad_loss: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    loss, _, _ = _composed(student, teacher, class_prior, settings)
    wanted = [tensor for tensor, need in zip((student, teacher), needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(loss, wanted, grad_loss, create_graph=True, allow_unused=True, materialize_grads=True)
    )
    return next(found) if needs[0] else None, next(found) if needs[1] else None


class _Block(NamedTuple):
    """A run of rows: of the flattened (N, L, C) order, and where it lies in the (N, C, L) tensors."""

    rows: slice
    samples: slice
    places: slice

    def take(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows (k, C) of a (N, C) or (N, C, L) tensor; a view where layout and dtype allow."""
        if tensor.dim() == 2:
            return tensor[self.samples].to(dtype)
        part = tensor[self.samples, :, self.places]
        return part.transpose(1, 2).reshape(-1, tensor.shape[1]).to(dtype)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """The inverse of :meth:`take` for a (N, C, L) tensor."""
        part = tensor[self.samples, :, self.places]
        part.copy_(rows.view(part.shape[0], part.shape[2], part.shape[1]).transpose(1, 2))


def _blocks(samples: int, places: int, rows_per_block: int) -> Iterator[_Block]:
    if places <= rows_per_block:
        step = max(1, rows_per_block // max(1, places))
        for start in range(0, samples, step):
            stop = min(samples, start + step)
            yield _Block(slice(start * places, stop * places), slice(start, stop), slice(0, places))
        return
    for sample in range(samples):
        for start in range(0, places, rows_per_block):
            stop = min(places, start + rows_per_block)
            rows = slice(sample * places + start, sample * places + stop)
            yield _Block(rows, slice(sample, sample + 1), slice(start, stop))


def _row_dot(x: Tensor, y: Tensor) -> Tensor:
    """sum_j x_j y_j for each row, in full precision."""
    if x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest":
        return torch.linalg.vecdot(x, y)  # a matrix product inside, so not where those may be rounded to fewer bits
    return (x * y).sum(1)


def _walk(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: _Settings,
    student_needs: bool,
    teacher_needs: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Per-row values of both parts and the gradients of the reduced loss, block by block.

    Returns:
        beta * weighted MSE and alpha * soft cross entropy, each (N * L,), and the gradients for student and teacher in
        the compute dtype (they are rounded to the inputs' dtype only after the chain rule's last factor, so that a loss
        scale keeps small ones from vanishing).
    """
    shape = student.shape
    dtype = _compute_dtype(student, teacher)
    with torch.no_grad(), _without_autocast(student.device):
        dense = student.dim() > 2
        s_all, t_all = (tensor.detach().flatten(2) if dense else tensor.detach() for tensor in (student, teacher))
        prior_all = class_prior
        if class_prior is not None and dense:
            prior_all = class_prior.flatten(2) if class_prior.dim() > 2 else class_prior[:, :, None].expand(s_all.shape)
        classes = shape[1]
        places = s_all.shape[2] if dense else 1
        rows = shape[0] * places

        limit = _BLOCK_ELEMENTS_CPU if student.device.type == "cpu" else _BLOCK_ELEMENTS_ACCELERATOR
        rows_per_block = max(1, min(rows, limit // classes))
        scratch = [s_all.new_empty((rows_per_block, classes), dtype=dtype) for _ in range(4 if dense else 3)]

        teacher_moves = teacher_needs and settings.beta > 0
        student_gradient = s_all.new_empty(s_all.shape, dtype=dtype) if student_needs else None
        teacher_gradient = s_all.new_zeros(s_all.shape, dtype=dtype) if teacher_needs else None
        mse = s_all.new_zeros(rows, dtype=dtype)
        cross_entropy = s_all.new_zeros(rows, dtype=dtype)

        # GKL's normaliser is the whole batch's and must be known before the first gradient: a pass of its own. It leaves
        # the weights where the student's gradient will be written, if that is a tensor of the same layout.
        pairs_needed = settings.divide_by_pairs and settings.beta > 0
        stash = student_gradient if pairs_needed and not dense else None
        mass = s_all.new_empty((rows, 1), dtype=dtype) if pairs_needed else None
        if mass is not None:
            for block in _blocks(shape[0], places, rows_per_block):
                count = block.rows.stop - block.rows.start
                weights = scratch[0][:count] if stash is None else stash[block.rows]
                mass[block.rows] = _weigh(
                    block, t_all, prior_all, settings, weights, scratch[1][:count], with_mass=True
                )
            pairs = (mass * mass).sum()
            share = rows / torch.where(pairs > 0, pairs, 1.0)

        scale = _row_scale(settings, rows)
        mse_scale = settings.beta / settings.mse_temperature * scale
        entropy_scale = settings.alpha / settings.temperature * scale
        # The soft labels serve as weights too when their temperatures agree.
        labels_are_weights = (
            class_prior is None and settings.gamma == 1.0 and settings.weight_temperature == settings.temperature
        )
        for block in _blocks(shape[0], places, rows_per_block):
            count = block.rows.stop - block.rows.start
            labels, work, force = (buffer[:count] for buffer in scratch[:3])
            if student_gradient is None or dense:
                out = scratch[3][:count] if dense else None
            else:
                out = student_gradient[block.rows]
            s = block.take(s_all, dtype)
            t = block.take(t_all, dtype)

            if settings.alpha > 0 or labels_are_weights:
                _softmax(t, settings.temperature, out=labels, work=work)

            if settings.beta > 0:
                # force = w * (d - m), the derivative of the weighted MSE with respect to d but for a factor per row.
                if labels_are_weights:
                    weights = labels
                elif stash is not None:
                    weights = stash[block.rows]
                else:
                    weights = force
                    _weigh(block, t_all, prior_all, settings, weights, work, with_mass=False)
                torch.sub(t, s, out=work)
                if settings.mse_temperature != 1.0:
                    work.mul_(1.0 / settings.mse_temperature)
                mean = _row_dot(weights, work).unsqueeze(1)
                factor = None
                if class_prior is not None:
                    row_mass = weights.sum(1, keepdim=True)
                    mean /= torch.where(row_mass > 0, row_mass, 1.0)
                    factor = row_mass
                work.sub_(mean)
                torch.mul(weights, work, out=force)
                if mass is not None:
                    # A softmax of sum 1 stands for weights of sum `mass`; those of a prior carry their mass themselves.
                    factor = mass[block.rows] * share if class_prior is not None else mass[block.rows].square() * share
                if factor is not None:
                    force.mul_(factor)
                mse[block.rows] = (0.5 * settings.beta) * _row_dot(force, work)
                if teacher_gradient is not None and teacher_moves:
                    if dense:
                        block.put(teacher_gradient, torch.mul(force, mse_scale, out=work))
                    else:
                        torch.mul(force, mse_scale, out=teacher_gradient[block.rows])

            student_moves = out is not None and settings.beta > 0 and settings.student_in_mse
            if settings.alpha > 0:
                # With x = (s - max s) / T the log-softmax is x - log sum exp x, and that sum is 1 / max softmax(x).
                torch.sub(s, s.amax(1, keepdim=True), out=work)
                if settings.temperature != 1.0:
                    work.mul_(1.0 / settings.temperature)
                likelihood = out if out is not None else torch.empty_like(work)
                torch.softmax(work, 1, out=likelihood)
                cross_entropy[block.rows] = (_row_dot(labels, work) + likelihood.amax(1).log_()).mul_(-settings.alpha)
                if out is not None:
                    out.sub_(labels)
                    if student_moves and mse_scale == entropy_scale:
                        out.sub_(force).mul_(mse_scale)
                    else:
                        out.mul_(entropy_scale)
                        if student_moves:
                            out.sub_(force, alpha=mse_scale)
            elif student_moves:
                torch.mul(force, -mse_scale, out=out)
            elif out is not None:
                out.zero_()
            if student_gradient is not None and dense and out is not None:
                block.put(student_gradient, out)

        gradients = (
            None if student_gradient is None else student_gradient.view(shape),
            None if teacher_gradient is None else teacher_gradient.view(shape),
        )
        return mse, cross_entropy, gradients


def _softmax(logits: Tensor, temperature: float, *, out: Tensor, work: Tensor) -> None:
    """softmax(logits / temperature) of each row into ``out``; ``work`` is overwritten."""
    if temperature == 1.0:
        torch.softmax(logits, 1, out=out)
        return
    torch.mul(logits, 1.0 / temperature, out=work)
    torch.softmax(work, 1, out=out)


def _weigh(
    block: _Block,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: _Settings,
    out: Tensor,
    work: Tensor,
    *,
    with_mass: bool,
) -> Tensor | None:
    """Class weights of the block into ``out``; with ``with_mass`` their row sums (k, 1).

    A prior's entries are raised to gamma as they are. Without a prior ``out`` is normalised, softmax(gamma t / T2), and
    the sum that the power of softmax(t / T2) would have is the mass: with x = t - max t, sum exp(gamma x / T2) over
    (sum exp(x / T2))**gamma, where each sum is 1 over the largest entry of its softmax.
    """
    if class_prior is not None:
        rows = block.take(class_prior, out.dtype)
        if settings.gamma == 1.0:
            out.copy_(rows)
        else:
            torch.pow(rows, settings.gamma, out=out)
        return out.sum(1, keepdim=True) if with_mass else None
    logits = block.take(teacher, out.dtype)
    mass = None
    if with_mass:
        _softmax(logits, settings.weight_temperature, out=out, work=work)
        mass = out.amax(1, keepdim=True).pow_(settings.gamma)
    if settings.gamma == 0.0:
        out.fill_(1.0 / out.shape[1])
    else:
        _softmax(logits, settings.weight_temperature / settings.gamma, out=out, work=work)
    if mass is not None:
        mass /= out.amax(1, keepdim=True)
    return mass
