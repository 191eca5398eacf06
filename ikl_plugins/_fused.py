"""The losses' values with their analytic gradients, over blocks of rows that fit the cache.

The gradient is left behind while its block is hot. Of ``d = t - s``, weights ``w`` of mass ``W`` and the weighted mean
``m`` of ``d``, the weighted MSE has the derivative ``W w (d - m)``; that of the cross entropy is ``q - p``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ._composed import LEAST_GAMMA, Settings, compute_dtype, pair_factors, wide, without_autocast

__all__ = ["Result", "class_weights", "fused_loss"]

_NOTHING = nullcontext()

Gradients = tuple[Tensor | None, Tensor | None]
# The loss, its two terms and the gradients for student and teacher.
Result = tuple[Tensor, tuple[Tensor, Tensor] | None, Gradients]

# Elements of one block of rows. On a CPU the handful of float32 blocks in flight should fit the last-level cache; an
# accelerator wants few, large launches and only needs the blocks to bound its memory.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS_ACCELERATOR = 2**24


class Block(NamedTuple):
    """A run of rows: of the flattened order (sample, place), and where it lies in the (N, C, L) tensors."""

    rows: slice
    samples: slice
    places: slice
    size: int

    def take(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows (k, C) of a (N, C) or (N, C, L) tensor; a view where layout and dtype allow."""
        if tensor.dim() == 2:
            part = tensor[self.samples]
        else:
            part = tensor[self.samples, :, self.places].transpose(1, 2).reshape(-1, tensor.shape[1])
        return part if part.dtype == dtype else part.to(dtype)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Writes rows (k, C) to their places in a (N, C, L) tensor."""
        part = tensor[self.samples, :, self.places].transpose(1, 2)
        part.copy_(rows.view(part.shape))


class Operands(NamedTuple):
    """One block's operands and the scratch tensors (k, C) that its evaluation may overwrite."""

    student: Tensor
    teacher: Tensor
    class_prior: Tensor | None
    weights: Tensor
    work: Tensor
    spare: Tensor


def fused_loss(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    with_terms: bool,
) -> Result:
    """The reduced loss, on request its two terms, and the gradients that ``needs`` asks for.

    Terms have their weights ``beta`` and ``alpha``. All tensors are of the compute dtype.
    """
    shape = student.shape
    rows = shape.numel() // shape[1]
    scale = 1.0 / rows if settings.reduction == "batchmean" and rows else 1.0
    # The first question costs a twentieth of the second.
    with without_autocast(student.device) if torch._C._is_any_autocast_enabled() else _NOTHING:
        evaluate = _one_block if student.dim() == 2 and rows * shape[1] <= _block_elements(student) else _walk
        mse, cross_entropy, gradients = evaluate(student, teacher, class_prior, settings, needs, scale)
        if settings.reduction == "none":
            places = (shape[0], *shape[2:])
            mse, cross_entropy = mse.view(places), cross_entropy.view(places)
            mse_weight, ce_weight = 0.5 * settings.beta, 0.0 - settings.alpha
        else:
            mse_weight, ce_weight = 0.5 * settings.beta * scale, 0.0 - settings.alpha * scale
        mse.mul_(mse_weight)
        loss = torch.add(mse, cross_entropy, alpha=ce_weight)
        return loss, (mse, cross_entropy.mul_(ce_weight)) if with_terms else None, gradients


def _block_elements(logits: Tensor) -> int:
    return _BLOCK_ELEMENTS_CPU if logits.is_cpu else _BLOCK_ELEMENTS_ACCELERATOR


def _one_block(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    scale: float,
) -> tuple[Tensor, Tensor, Gradients]:
    """(N, C) logits that fit a block: nothing is cut and nothing put together.

    Returns:
        Both parts' sums as :func:`_evaluate_block` has them, and the gradients.
    """
    dtype = compute_dtype(student, teacher)
    student = student if student.dtype == dtype else student.to(dtype)
    teacher = teacher if teacher.dtype == dtype else teacher.to(dtype)
    if class_prior is not None:
        class_prior = class_prior.to(dtype)
    # (The second costs twice as much as the first.)
    work = torch.empty_like(student) if student.is_contiguous() else student.new_empty(student.shape)
    part = Operands(student, teacher, class_prior, torch.empty_like(work), work, torch.empty_like(work))
    gradients = (torch.empty_like(work) if needs[0] else None, torch.empty_like(work) if needs[1] else None)
    mse, cross_entropy = _evaluate_block(part, settings, scale, *gradients)
    return mse, cross_entropy, gradients


def _walk(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    scale: float,
) -> tuple[Tensor, Tensor, Gradients]:
    """The same block by block, for (N, C) and (N, C, d1, ...) logits."""
    shape = student.shape
    dtype = compute_dtype(student, teacher)
    dense = student.dim() > 2
    places = shape[2:].numel()
    if dense:
        if class_prior is not None:
            whole = class_prior.dim() > 2
            class_prior = class_prior.flatten(2) if whole else class_prior[:, :, None].expand(*shape[:2], places)
        student, teacher = student.flatten(2), teacher.flatten(2)
    rows_per_block = max(1, min(shape[0] * places, _block_elements(student) // shape[1]))
    blocks = _blocks(shape[0], places, rows_per_block)
    scratch = student.new_empty((3, rows_per_block, shape[1]), dtype=dtype).unbind(0)
    gradients = [student.new_empty(student.shape, dtype=dtype) if need else None for need in needs]

    def operands(block: Block) -> Operands:
        prior_rows = None if class_prior is None else block.take(class_prior, dtype)
        buffers = scratch if block.size == rows_per_block else tuple(buffer[: block.size] for buffer in scratch)
        return Operands(block.take(student, dtype), block.take(teacher, dtype), prior_rows, *buffers)

    # GKL's normaliser is the whole batch's and must be known before the first gradient: a pass of its own. It leaves
    # the weights where the student's gradient will be written, if rows lie there as they do in a block.
    weights_buffer = None if dense else gradients[0]
    factors: list[Tensor] | None = None
    if settings.divide_by_pairs and settings.beta > 0 and blocks:
        masses = []
        for block in blocks:
            part = operands(block)
            out = part.weights if weights_buffer is None else weights_buffer[block.rows]
            mass = class_weights(part, settings, out=out)
            if mass is not None:
                masses.append(mass)
        factors = _pair_factors(masses, dtype)

    found: list[tuple[Tensor, Tensor]] = []
    for index, block in enumerate(blocks):
        part = operands(block)
        outs = [
            None if gradient is None else torch.empty_like(part.work) if dense else block.take(gradient, dtype)
            for gradient in gradients
        ]
        found.append(
            _evaluate_block(
                part,
                settings,
                scale,
                *outs,
                factor=None if factors is None else factors[index],
                weights_ready=factors is not None and weights_buffer is not None,
            )
        )
        if dense:
            for gradient, made in zip(gradients, outs, strict=True):
                if gradient is not None and made is not None:
                    block.put(gradient, made)

    if len(found) == 1:
        mse, cross_entropy = found[0]
    elif settings.reduction == "none":
        nothing = student.new_empty(0, dtype=dtype)
        mse, cross_entropy = (torch.cat([nothing, *(pair[side] for pair in found)]) for side in (0, 1))
    else:
        nothing = student.new_zeros((), dtype=dtype)
        mse, cross_entropy = (torch.stack([nothing, *(pair[side] for pair in found)]).sum() for side in (0, 1))
    student_gradient, teacher_gradient = (flat if flat is None else flat.view(shape) for flat in gradients)
    return mse, cross_entropy, (student_gradient, teacher_gradient)


def _blocks(samples: int, places: int, rows_per_block: int) -> list[Block]:
    """All rows in order: whole samples at a time where their places fit a block, else the places of one sample."""
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
        blocks.append(Block(rows, slice(first, last), slice(start, stop), size))
    return blocks


def _evaluate_block(
    part: Operands,
    settings: Settings,
    scale: float,
    student_out: Tensor | None,
    teacher_out: Tensor | None,
    *,
    factor: Tensor | None = None,
    weights_ready: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sums of both parts of the loss, and the gradients of ``scale`` times the loss.

    Args:
        part: operands and scratch.
        settings: the call's settings.
        scale: what the reduction multiplies each row by.
        student_out: where the student's gradient (k, C) goes.
        teacher_out: where the teacher's goes.
        factor: GKL's factor (k, 1) on the weighted MSE of each row, where the batch has other blocks.
        weights_ready: ``student_out``, if there is one, holds the class weights already.

    Returns:
        Of ``w (d - m)^2`` and of ``p log q`` the sum over the block, or that of each row (k,) for reduction 'none'.
    """
    student, teacher, class_prior, weights, work, spare = part
    s = settings
    weights_ready = weights_ready and student_out is not None

    # p - q, minus the derivative of the cross entropy with respect to s / T.
    cross_entropy = ce_gradient = None
    labels_are_weights = class_prior is None and s.gamma == 1.0 and s.weight_temperature == s.temperature
    if s.alpha > 0:
        labels = weights
        _softmax(teacher, s.temperature, out=labels, work=work)
        tempered = student if s.temperature == 1.0 else torch.mul(student, 1.0 / s.temperature, out=spare)
        torch.log_softmax(tempered, 1, out=work)
        cross_entropy = _summed(torch.mul(labels, work, out=spare), s)
        if student_out is not None:
            # log_softmax's own backward: labels - softmax * (sum of labels), in one pass.
            ce_gradient = spare if weights_ready else student_out
            torch._log_softmax_backward_data(labels, work, 1, work.dtype, out=ce_gradient)

    # w * (d - m), the derivative of the weighted MSE with respect to d. (Row by row, sums of products and no matrix
    # products: those may be set to fewer digits than float32 has.)
    mse = mse_gradient = None
    if s.beta > 0:
        product = spare
        if weights_ready and student_out is not None:
            weights, product = student_out, weights
        elif s.alpha == 0 or not labels_are_weights:
            mass = class_weights(part, s, out=weights)
            if factor is None and mass is not None:
                (factor,) = _pair_factors([mass], work.dtype) if s.divide_by_pairs else (mass.square_(),)
        torch.sub(teacher, student, out=work)
        if s.mse_temperature != 1.0:
            work.mul_(1.0 / s.mse_temperature)
        work.sub_(torch.mul(weights, work, out=product).sum(1, keepdim=True))
        mse_gradient = weights.mul_(work)
        if factor is not None:
            mse_gradient.mul_(factor)
        mse = _summed(work.mul_(mse_gradient), s)

    mse_scale = s.beta * scale / s.mse_temperature
    if teacher_out is not None:
        torch.mul(mse_gradient, mse_scale, out=teacher_out) if mse_gradient is not None else teacher_out.zero_()
    if student_out is not None:
        ce_scale = s.alpha * scale / s.temperature
        _combine(ce_gradient, ce_scale, mse_gradient if s.student_in_mse else None, mse_scale, out=student_out)
    if mse is None:
        mse = work.new_zeros(work.shape[0] if s.reduction == "none" else ())
    return mse, torch.zeros_like(mse) if cross_entropy is None else cross_entropy


def _summed(products: Tensor, settings: Settings) -> Tensor:
    return products.sum(1) if settings.reduction == "none" else products.sum()


def _pair_factors(log_masses: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """GKL's factors (k, 1) of all blocks, from the logarithms of their masses."""
    if len(log_masses) == 1:
        return [pair_factors(log_masses[0]).to(dtype)]
    return list(torch.split(pair_factors(torch.cat(log_masses)).to(dtype), list(map(len, log_masses))))


def _not_zero(masses: Tensor) -> Tensor:
    """1 in place of 0: what is divided by it is 0 as well."""
    return masses + (masses == 0)


def _combine(
    ce_gradient: Tensor | None, ce_scale: float, mse_gradient: Tensor | None, mse_scale: float, *, out: Tensor
) -> None:
    """``out = -ce_scale * ce_gradient - mse_scale * mse_gradient``; an operand may be ``out`` itself, or None for 0."""
    if ce_gradient is None:
        torch.mul(mse_gradient, -mse_scale, out=out) if mse_gradient is not None else out.zero_()
    elif mse_gradient is None:
        torch.mul(ce_gradient, -ce_scale, out=out)
    elif ce_scale == mse_scale:
        torch.add(ce_gradient, mse_gradient, out=out).mul_(-mse_scale)
    else:
        ce_gradient.mul_(-ce_scale)
        torch.sub(ce_gradient, mse_gradient, alpha=mse_scale, out=out)


def _softmax(logits: Tensor, temperature: float, *, out: Tensor, work: Tensor) -> None:
    """softmax(logits / temperature) of each row into ``out``; ``work`` is overwritten."""
    if temperature == 1.0:
        torch.softmax(logits, 1, out=out)
        return
    torch.mul(logits, 1.0 / temperature, out=work)
    torch.softmax(work, 1, out=out)


def class_weights(part: Operands, settings: Settings, *, out: Tensor) -> Tensor | None:
    """Class weights of a block into ``out``, rows divided by their mass; the mass (k, 1), or None where it is 1.

    The mass of a row is the sum of its weights to the power gamma; where the batch is divided by its pairs, the
    logarithm of the mass is returned. To a large gamma all weights of a row may lie below what a float tells from 0,
    and so they are divided by the largest one first.
    """
    gamma = settings.gamma
    if gamma == 1.0:
        if part.class_prior is None:
            _softmax(part.teacher, settings.weight_temperature, out=out, work=part.work)
            return None
        mass = part.class_prior.sum(1, keepdim=True)
        torch.div(part.class_prior, _not_zero(mass), out=out)
        return mass.to(wide(out)).log_() if settings.divide_by_pairs else mass
    if gamma == 0.0:
        out.fill_(1.0)  # for a weight of 0 as well
        log_top = out.new_zeros((len(out), 1), dtype=wide(out))
    elif part.class_prior is not None:
        top = part.class_prior.amax(1, keepdim=True)
        torch.div(part.class_prior, _not_zero(top), out=out).pow_(max(gamma, LEAST_GAMMA))
        log_top = top.to(wide(out)).log_()
    else:
        below = torch.mul(part.teacher, 1.0 / settings.weight_temperature, out=part.work)
        below.sub_(below.amax(1, keepdim=True))
        log_top = torch.exp(below, out=out).sum(1, keepdim=True, dtype=wide(out)).log_().neg_()
        torch.exp(below.mul_(gamma), out=out)
    mass = out.sum(1, keepdim=True)
    out.div_(mass.clamp(min=1.0))  # the largest weight is 1, but for a row of zeros
    log_mass = mass.to(wide(out)).log_().add_(log_top, alpha=gamma)
    return log_mass if settings.divide_by_pairs else log_mass.exp_().to(mass.dtype)
