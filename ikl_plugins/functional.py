"""The decoupled Kullback-Leibler losses as pure tensor functions, linear in the number of classes.

Notation: for one sample with student logits ``s`` and teacher logits ``t`` let ``d = t - s`` and let ``w`` be the
class weights. The weighted MSE of the paper runs over all pairs of classes. With ``W = sum_j w_j`` and
``m = sum_j w_j d_j / W``

    1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2 = 1/2 W sum_j w_j (d_j - m)^2

so nothing of size C x C is ever formed. Its derivative with respect to ``d_i`` is ``W w_i (d_i - m)``.

Two ways compute the same numbers. The fused one walks over blocks of rows that fit the cache and leaves the analytic
gradient behind while the block is hot. The composed one is plain differentiable tensor code; it serves
``torch.compile`` and second derivatives. Whoever has built it may replace the walk by an operator in C++, see
:mod:`ikl_plugins.native`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _validation as check
from . import native

__all__ = ["LossTerms", "dkl_loss", "gkl_loss", "ikl_loss"]

# Elements of one block of rows. On a CPU the handful of float32 blocks in flight should fit the last-level cache; an
# accelerator wants few, large launches and only needs the blocks to bound its memory.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS_ACCELERATOR = 2**24


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
    loss, _ = evaluate("dkl_loss", student_logits, teacher_logits, None, settings, check_finite=check_finite)
    return loss


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

    Args:
        student_logits: raw scores of the network that follows, shape (N, C) or (N, C, d1, ...), any floating dtype.
        teacher_logits: raw scores of the reference, same shape and device.
        alpha: weight of the soft-label cross entropy, at least 0. The name is the official code's; the paper's is beta.
        beta: weight of the weighted MSE, at least 0; its 1/4 is inside. The paper's alpha; "alpha/4 = 5" is beta 20.
        temperature: of the cross entropy alone, both sides, above 0; no factor ``temperature**2``. The MSE sees raw
            logits.
        weight_temperature: of the softmax that makes the weights (the recipes' T2), above 0; unused with a class prior.
        class_prior: shape (N, C), for each sample the class-wise mean prediction of its label (see
            :class:`ClassPrior`), or the logits' own shape. Entries at least 0, zeros allowed; rows should sum to 1.
        reduction: ``'batchmean'`` divides the sum by the number of samples N * d1 * ...; ``'sum'``; ``'none'``.
        check_finite: raise if the logits hold NaN or infinity (see :func:`dkl_loss`).

    Returns:
        A 0-dim tensor for ``'batchmean'`` and ``'sum'``, (N, d1, ...) for ``'none'``. Its dtype is float32 for
        half-precision inputs, else the wider dtype of the two. An empty batch gives 0.

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
    loss, _ = evaluate("ikl_loss", student_logits, teacher_logits, class_prior, settings, check_finite=check_finite)
    return loss


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
    settings = gkl_settings(
        alpha=alpha, beta=beta, temperature=temperature, weight_temperature=weight_temperature, gamma=gamma,
        reduction=reduction,
    )  # fmt: skip
    loss, _ = evaluate("gkl_loss", student_logits, teacher_logits, class_prior, settings, check_finite=check_finite)
    return loss


# --- what the functions and the modules of losses.py share ------------------------------------------------------------


class Settings(NamedTuple):
    """What distinguishes one loss from another, beside its tensors."""

    alpha: float
    beta: float
    temperature: float  # of the soft cross entropy
    weight_temperature: float  # of the softmax that makes the weights, without a class prior
    gamma: float  # power of the weights
    mse_temperature: float  # divides the logits inside the weighted MSE
    student_in_mse: bool  # False: the student side of the weighted MSE is detached (DKL)
    divide_by_pairs: bool  # True: divide by the pair weights of the batch instead of its size (GKL)
    reduction: str


def dkl_settings(*, alpha: float, beta: float, temperature: float, reduction: str) -> Settings:
    """DKL: the weights and both terms see the tempered logits, the MSE drives the teacher alone."""
    return Settings(alpha, beta, temperature, temperature, 1.0, temperature, False, False, reduction)


def ikl_settings(
    *, alpha: float, beta: float, temperature: float, weight_temperature: float, reduction: str
) -> Settings:
    """IKL: the MSE sees raw logits and drives both sides."""
    return Settings(alpha, beta, temperature, weight_temperature, 1.0, 1.0, True, False, reduction)


def gkl_settings(
    *, alpha: float, beta: float, temperature: float, weight_temperature: float, gamma: float, reduction: str
) -> Settings:
    """GKL: IKL with a power on the weights and the batch's pair weights for a divisor."""
    return Settings(alpha, beta, temperature, weight_temperature, gamma, 1.0, True, True, reduction)


def check_settings(caller: str, settings: Settings) -> Settings:
    """Refuses weights, temperatures or a reduction out of range; returns the settings with plain floats for numbers."""
    check.check_reduction(caller, settings.reduction)
    if all(type(number) is float and 0.0 < number < math.inf for number in settings[:6]):
        return settings  # the common case, on the path of every call
    return settings._replace(
        alpha=check.check_number(caller, "alpha", settings.alpha),
        beta=check.check_number(caller, "beta", settings.beta),
        temperature=check.check_number(caller, "temperature", settings.temperature, positive=True),
        weight_temperature=check.check_number(caller, "weight_temperature", settings.weight_temperature, positive=True),
        gamma=check.check_number(caller, "gamma", settings.gamma),
        mse_temperature=float(settings.mse_temperature),
    )


def evaluate(
    caller: str,
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    *,
    check_finite: bool,
    with_terms: bool = False,
) -> tuple[Tensor, LossTerms | None]:
    """Checks everything, then the loss, and on request its two terms, on the path that fits."""
    check.check_logits(caller, student, teacher)
    settings = check_settings(caller, settings)
    if class_prior is not None:
        check.check_class_prior(caller, class_prior, student)
        class_prior = class_prior.detach()
    elif settings.divide_by_pairs and settings.gamma == 1.0:
        # The softmax sums to 1, so the pair weights of the batch sum to its size: GKL is IKL.
        settings = settings._replace(divide_by_pairs=False)

    if torch.compiler.is_compiling():
        loss, mse, cross_entropy = _composed(student, teacher, class_prior, settings)
        return loss, LossTerms(mse.detach(), cross_entropy.detach())
    if check_finite:
        check.check_finite_logits(caller, student_logits=student, teacher_logits=teacher)
    watched = torch.is_grad_enabled()
    needs = watched and student.requires_grad, watched and teacher.requires_grad
    if not with_terms:
        return _FusedLoss.apply(student, teacher, class_prior, settings, needs, False), None
    loss, mse, cross_entropy = _FusedLoss.apply(student, teacher, class_prior, settings, needs, True)
    return loss, LossTerms(mse, cross_entropy)


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _reduce(rows: Tensor, settings: Settings, shape: torch.Size) -> Tensor:
    """Per-sample values (N * d1 * ...,) to the declared reduction for logits of ``shape``."""
    if settings.reduction == "none":
        return rows.reshape(shape[0], *shape[2:])
    return rows.sum() if settings.reduction == "sum" or rows.numel() == 0 else rows.mean()


# --- the composed path -----------------------------------------------------------------------------------------------


def _composed(
    student: Tensor, teacher: Tensor, class_prior: Tensor | None, settings: Settings
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
            mse = mse * (mass.numel() / torch.where(pairs == 0, 1.0, pairs))

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
    """Value and analytic gradient at once; see :func:`_evaluate`."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        class_prior: Tensor | None,
        settings: Settings,
        needs: tuple[bool, bool],
        with_terms: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        loss, terms, ctx.gradients = _evaluate(student, teacher, class_prior, settings, needs, with_terms)
        ctx.fixed = None
        if teacher.is_inference() or (class_prior is not None and class_prior.is_inference()):
            # Autograd refuses to save what torch.inference_mode() made; such tensors cannot change under our hands.
            ctx.fixed = teacher, class_prior
            ctx.save_for_backward(student, None, None)
        else:
            ctx.save_for_backward(student, teacher, class_prior)
        ctx.settings = settings
        ctx.needs = needs
        if terms is None:
            return loss
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, class_prior = ctx.saved_tensors
        if ctx.fixed is not None:
            teacher, class_prior = ctx.fixed
        if torch.is_grad_enabled():
            # Somebody wants the derivative of this gradient: hand out one that has a graph of its own.
            attached = _composed_gradients(student, teacher, class_prior, ctx.settings, ctx.needs, grad_loss)
            return *attached, None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second call on a retained graph: the first one scaled its tensors in place and gave them away.
            gradients = _evaluate(student, teacher, class_prior, ctx.settings, ctx.needs, False)[2]
        finished = _finish(gradients[0], grad_loss, student), _finish(gradients[1], grad_loss, teacher)
        return *finished, None, None, None, None


def _evaluate(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    with_terms: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor | None, Tensor | None]]:
    """The reduced loss, on request its two terms, and the gradients that are needed, in the compute dtype.

    They are rounded to the inputs' dtype only after the chain rule's last factor, so that a loss scale keeps small ones
    from vanishing.
    """
    operator = native.operator()
    if operator is not None and native.serves(student, teacher, class_prior):
        loss, mse, cross_entropy, *gradients = operator(student, teacher, class_prior, *settings, *needs)
        return loss, (mse, cross_entropy) if with_terms else None, (gradients[0], gradients[1])
    mse, cross_entropy, found = _walk(student, teacher, class_prior, settings, needs)
    loss = _reduce(mse + cross_entropy, settings, student.shape)
    terms = None
    if with_terms:
        terms = _reduce(mse, settings, student.shape), _reduce(cross_entropy, settings, student.shape)
    return loss, terms, found


def _finish(gradient: Tensor | None, grad_loss: Tensor, like: Tensor) -> Tensor | None:
    """The chain rule's last factor, in place: a second tensor of the logits' size would double the peak memory."""
    if gradient is None:
        return None
    if grad_loss.dim() > 0:
        gradient.mul_(grad_loss.unsqueeze(1))
    elif grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
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
    loss, _, _ = _composed(student, teacher, class_prior, settings)
    wanted = tuple(tensor for tensor, need in zip((student, teacher), needs, strict=True) if need)
    found = torch.autograd.grad(loss, wanted, grad_loss, create_graph=True)
    return found[0] if needs[0] else None, found[-1] if needs[1] else None


class _Block(NamedTuple):
    """A run of rows: of the flattened order (sample, place), and where it lies in the (N, C, L) tensors."""

    rows: slice
    samples: slice
    places: slice
    size: int
    whole: bool  # there is no other block

    def take(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows (k, C) of a (N, C) or (N, C, L) tensor; a view where layout and dtype allow."""
        if tensor.dim() == 2:
            part = tensor if self.whole else tensor[self.samples]
        else:
            part = tensor[self.samples, :, self.places].transpose(1, 2).reshape(-1, tensor.shape[1])
        return part if part.dtype == dtype else part.to(dtype)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Writes rows (k, C) to their places in a (N, C, L) tensor."""
        part = tensor[self.samples, :, self.places].transpose(1, 2)
        part.copy_(rows.view(part.shape))


def _blocks(samples: int, places: int, rows_per_block: int) -> list[_Block]:
    """All rows in order: whole samples at a time where their places fit a block, else the places of one sample."""
    if 0 < samples * places <= rows_per_block:
        return [_Block(slice(0, samples * places), slice(0, samples), slice(0, places), samples * places, True)]
    if places > rows_per_block:
        corners = [
            (n, n + 1, start, min(places, start + rows_per_block))
            for n in range(samples)
            for start in range(0, places, rows_per_block)
        ]
    else:
        step = rows_per_block // max(1, places)
        corners = [(n, min(samples, n + step), 0, places) for n in range(0, samples, step)]
    blocks = []
    for first, last, start, stop in corners:
        size = (last - first) * (stop - start)
        rows = slice(first * places + start, first * places + start + size)
        blocks.append(_Block(rows, slice(first, last), slice(start, stop), size, False))
    return blocks


class _Rows(NamedTuple):
    """One block's operands and the scratch tensors (k, C) that its evaluation may overwrite."""

    student: Tensor
    teacher: Tensor
    class_prior: Tensor | None
    weights: Tensor
    work: Tensor
    spare: Tensor


def _walk(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Per-row values of both parts and the gradients of the reduced loss, block by block.

    Returns:
        beta * weighted MSE and alpha * soft cross entropy, each (N * L,), and the gradients for student and teacher in
        the compute dtype.
    """
    shape = student.shape
    dtype = _compute_dtype(student, teacher)
    dense = student.dim() > 2
    places = shape[2:].numel()
    if dense:
        if class_prior is not None:
            whole = class_prior.dim() > 2
            class_prior = class_prior.flatten(2) if whole else class_prior[:, :, None].expand(*shape[:2], places)
        student, teacher = student.flatten(2), teacher.flatten(2)
    rows = shape[0] * places
    limit = _BLOCK_ELEMENTS_CPU if student.device.type == "cpu" else _BLOCK_ELEMENTS_ACCELERATOR
    rows_per_block = max(1, min(rows, limit // shape[1]))

    with _without_autocast(student.device):
        blocks = _blocks(shape[0], places, rows_per_block)
        scratch = student.new_empty((3, rows_per_block, shape[1]), dtype=dtype).unbind(0)
        gradients = [student.new_empty(student.shape, dtype=dtype) if need else None for need in needs]

        def operands(block: _Block) -> _Rows:
            prior_rows = None if class_prior is None else block.take(class_prior, dtype)
            buffers = scratch if block.size == rows_per_block else tuple(buffer[: block.size] for buffer in scratch)
            return _Rows(block.take(student, dtype), block.take(teacher, dtype), prior_rows, *buffers)

        # GKL's normaliser is the whole batch's and must be known before the first gradient: a pass of its own. It
        # leaves the weights where the student's gradient will be written, if rows lie there as they do in a block.
        stash = None if dense else gradients[0]
        factors: list[Tensor] | None = None
        if settings.divide_by_pairs and settings.beta > 0 and blocks:
            squares = []
            for block in blocks:
                part = operands(block)
                mass = _weigh(part, settings, out=part.weights if stash is None else stash[block.rows])
                if mass is not None:
                    squares.append(mass.square_())
            pairs = torch.stack([square.sum() for square in squares]).sum()
            share = rows / torch.where(pairs == 0, 1.0, pairs)
            factors = [square * share for square in squares]

        scale = 1.0 / rows if settings.reduction == "batchmean" and rows else 1.0
        mse: list[Tensor] = []
        cross_entropy: list[Tensor] = []
        for index, block in enumerate(blocks):
            part = operands(block)
            outs = tuple(
                None if gradient is None else torch.empty_like(part.work) if dense else block.take(gradient, dtype)
                for gradient in gradients
            )
            factor = None if factors is None else factors[index]
            values = _evaluate_block(
                part, settings, scale, factor, outs, stashed=factor is not None and stash is not None
            )
            mse.append(values[0])
            cross_entropy.append(values[1])
            if dense:
                for gradient, out in zip(gradients, outs, strict=True):
                    if gradient is not None and out is not None:
                        block.put(gradient, out)

        if len(blocks) != 1:
            nothing = torch.empty(0, dtype=dtype, device=student.device)
            mse, cross_entropy = [torch.cat([nothing, *mse])], [torch.cat([nothing, *cross_entropy])]
        student_gradient, teacher_gradient = (
            flat.view(shape) if dense and flat is not None else flat for flat in gradients
        )
        return mse[0], cross_entropy[0], (student_gradient, teacher_gradient)


def _evaluate_block(
    part: _Rows,
    settings: Settings,
    scale: float,
    factor: Tensor | None,
    outs: tuple[Tensor | None, ...],
    *,
    stashed: bool,
) -> tuple[Tensor, Tensor]:
    """Both parts of the loss for each row (k,), and the gradients of ``scale`` times their sum.

    Args:
        part: operands and scratch.
        settings: the call's settings.
        scale: what the reduction multiplies each row by.
        factor: GKL's factor (k, 1) on the weighted MSE of each row; None for 1.
        outs: where the gradients (k, C) of student and teacher go.
        stashed: the student's place in ``outs`` holds the class weights already.
    """
    student, teacher, class_prior, weights, work, spare = part
    student_out, teacher_out = outs
    s = settings
    mse = cross_entropy = None

    # p - q, minus the derivative of the cross entropy with respect to s / T.
    pull = None
    labels_weigh = class_prior is None and s.gamma == 1.0 and s.weight_temperature == s.temperature
    if s.alpha > 0:
        labels = weights
        _softmax(teacher, s.temperature, out=labels, work=work)
        tempered = student if s.temperature == 1.0 else torch.mul(student, 1.0 / s.temperature, out=spare)
        torch.log_softmax(tempered, 1, out=work)
        cross_entropy = torch.mul(labels, work, out=spare).sum(1).mul_(-s.alpha)
        if student_out is not None:
            # log_softmax's own backward: labels - softmax * (sum of labels), in one pass.
            pull = spare if stashed else student_out
            torch._log_softmax_backward_data(labels, work, 1, work.dtype, out=pull)

    # w * (d - m), the derivative of the weighted MSE with respect to d. (Row by row, sums of products and no matrix
    # products: those may be set to fewer digits than float32 has.)
    force = None
    if s.beta > 0:
        product = spare
        if stashed and student_out is not None:
            weights, product = student_out, weights
        elif s.alpha == 0 or not labels_weigh:
            mass = _weigh(part, s, out=weights)
            if factor is None and mass is not None:
                factor = mass.square_()
        torch.sub(teacher, student, out=work)
        if s.mse_temperature != 1.0:
            work.mul_(1.0 / s.mse_temperature)
        work.sub_(torch.mul(weights, work, out=product).sum(1, keepdim=True))
        force = weights.mul_(work)
        if factor is not None:
            force.mul_(factor)
        mse = work.mul_(force).sum(1).mul_(0.5 * s.beta)

    force_scale = s.beta * scale / s.mse_temperature
    if teacher_out is not None:
        torch.mul(force, force_scale, out=teacher_out) if force is not None else teacher_out.zero_()
    if student_out is not None:
        _combine(
            pull, s.alpha * scale / s.temperature, force if s.student_in_mse else None, force_scale, out=student_out
        )
    zeros = work.new_zeros(work.shape[0]) if mse is None or cross_entropy is None else work
    return zeros if mse is None else mse, zeros if cross_entropy is None else cross_entropy


def _combine(pull: Tensor | None, pull_scale: float, force: Tensor | None, force_scale: float, *, out: Tensor) -> None:
    """``out = -pull_scale * pull - force_scale * force``; either operand may be ``out`` itself, or None for 0."""
    if pull is None:
        torch.mul(force, -force_scale, out=out) if force is not None else out.zero_()
    elif force is None:
        torch.mul(pull, -pull_scale, out=out)
    elif pull_scale == force_scale:
        torch.add(pull, force, out=out).mul_(-force_scale)
    else:
        pull.mul_(-pull_scale)
        torch.sub(pull, force, alpha=force_scale, out=out)


def _softmax(logits: Tensor, temperature: float, *, out: Tensor, work: Tensor) -> None:
    """softmax(logits / temperature) of each row into ``out``; ``work`` is overwritten."""
    if temperature == 1.0:
        torch.softmax(logits, 1, out=out)
        return
    torch.mul(logits, 1.0 / temperature, out=work)
    torch.softmax(work, 1, out=out)


def _weigh(part: _Rows, settings: Settings, *, out: Tensor) -> Tensor | None:
    """Class weights of a block into ``out``, rows divided by their mass; the mass (k, 1), or None where it is 1.

    The mass of a row is the sum of its weights to the power gamma. Of a softmax these are exp(gamma * log softmax), and
    one of them at least is C**-gamma: they do not vanish together.
    """
    if part.class_prior is not None:
        torch.pow(part.class_prior, settings.gamma, out=out)
    elif settings.gamma == 1.0:
        _softmax(part.teacher, settings.weight_temperature, out=out, work=part.work)
        return None
    elif settings.gamma == 0.0:
        out.fill_(1.0)  # for a probability of 0 as well
    else:
        tempered = part.teacher
        if settings.weight_temperature != 1.0:
            tempered = torch.mul(part.teacher, 1.0 / settings.weight_temperature, out=part.work)
        torch.log_softmax(tempered, 1, out=out)
        out.mul_(settings.gamma).exp_()
    mass = out.sum(1, keepdim=True)
    out.div_(torch.where(mass > 0, mass, 1.0))
    return mass
