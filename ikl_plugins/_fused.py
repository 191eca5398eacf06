"""The losses' values with their analytic gradients, over blocks of rows that fit the cache.

The gradient is left behind while its block is hot. Of ``d = t - s``, weights ``w`` of mass ``W`` and the weighted mean
``m`` of ``d``, the weighted MSE has the derivative ``W w (d - m)``; that of the cross entropy is ``q - p``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._composed import Settings, compute_dtype, without_autocast

__all__ = ["class_weights", "fused_rows"]

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


class Operands(NamedTuple):
    """One block's operands and the scratch tensors (k, C) that its evaluation may overwrite."""

    student: Tensor
    teacher: Tensor
    class_prior: Tensor | None
    weights: Tensor
    work: Tensor
    spare: Tensor


def fused_rows(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Per-row values of both parts, and the gradients of the reduced loss that ``needs`` asks for.

    Returns:
        beta * weighted MSE and alpha * soft cross entropy, each (N * L,), and the gradients for student and teacher in
        the compute dtype.
    """
    shape = student.shape
    dtype = compute_dtype(student, teacher)
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

    with without_autocast(student.device):
        blocks = _blocks(shape[0], places, rows_per_block)
        scratch = student.new_empty((3, rows_per_block, shape[1]), dtype=dtype).unbind(0)
        gradients = [student.new_empty(student.shape, dtype=dtype) if need else None for need in needs]

        def operands(block: Block) -> Operands:
            prior_rows = None if class_prior is None else block.take(class_prior, dtype)
            buffers = scratch if block.size == rows_per_block else tuple(buffer[: block.size] for buffer in scratch)
            return Operands(block.take(student, dtype), block.take(teacher, dtype), prior_rows, *buffers)

        # GKL's normaliser is the whole batch's and must be known before the first gradient: a pass of its own. It
        # leaves the weights where the student's gradient will be written, if rows lie there as they do in a block.
        weights_buffer = None if dense else gradients[0]
        factors: list[Tensor] | None = None
        if settings.divide_by_pairs and settings.beta > 0 and blocks:
            squares = []
            for block in blocks:
                part = operands(block)
                mass = class_weights(
                    part, settings, out=part.weights if weights_buffer is None else weights_buffer[block.rows]
                )
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
            student_out, teacher_out = (
                None if gradient is None else torch.empty_like(part.work) if dense else block.take(gradient, dtype)
                for gradient in gradients
            )
            block_mse, block_cross_entropy = _evaluate_block(
                part,
                settings,
                scale=scale,
                factor=None if factors is None else factors[index],
                student_out=student_out,
                teacher_out=teacher_out,
                weights_ready=factors is not None and weights_buffer is not None,
            )
            mse.append(block_mse)
            cross_entropy.append(block_cross_entropy)
            if dense:
                for gradient, out in zip(gradients, (student_out, teacher_out), strict=True):
                    if gradient is not None and out is not None:
                        block.put(gradient, out)

        if len(blocks) != 1:
            nothing = torch.empty(0, dtype=dtype, device=student.device)
            mse, cross_entropy = [torch.cat([nothing, *mse])], [torch.cat([nothing, *cross_entropy])]
        student_gradient, teacher_gradient = (
            flat.view(shape) if dense and flat is not None else flat for flat in gradients
        )
        return mse[0], cross_entropy[0], (student_gradient, teacher_gradient)


def _blocks(samples: int, places: int, rows_per_block: int) -> list[Block]:
    """All rows in order: whole samples at a time where their places fit a block, else the places of one sample."""
    if 0 < samples * places <= rows_per_block:
        return [Block(slice(0, samples * places), slice(0, samples), slice(0, places), samples * places, whole=True)]
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
        blocks.append(Block(rows, slice(first, last), slice(start, stop), size, whole=False))
    return blocks


def _evaluate_block(
    part: Operands,
    settings: Settings,
    *,
    scale: float,
    factor: Tensor | None,
    student_out: Tensor | None,
    teacher_out: Tensor | None,
    weights_ready: bool,
) -> tuple[Tensor, Tensor]:
    """Both parts of the loss for each row (k,), and the gradients of ``scale`` times their sum.

    Args:
        part: operands and scratch.
        settings: the call's settings.
        scale: what the reduction multiplies each row by.
        factor: GKL's factor (k, 1) on the weighted MSE of each row; None for 1.
        student_out: where the student's gradient (k, C) goes.
        teacher_out: where the teacher's goes.
        weights_ready: ``student_out``, if there is one, holds the class weights already.
    """
    student, teacher, class_prior, weights, work, spare = part
    s = settings
    mse = cross_entropy = None
    weights_ready = weights_ready and student_out is not None

    # p - q, minus the derivative of the cross entropy with respect to s / T.
    ce_gradient = None
    labels_are_weights = class_prior is None and s.gamma == 1.0 and s.weight_temperature == s.temperature
    if s.alpha > 0:
        labels = weights
        _softmax(teacher, s.temperature, out=labels, work=work)
        tempered = student if s.temperature == 1.0 else torch.mul(student, 1.0 / s.temperature, out=spare)
        torch.log_softmax(tempered, 1, out=work)
        cross_entropy = torch.mul(labels, work, out=spare).sum(1).mul_(-s.alpha)
        if student_out is not None:
            # log_softmax's own backward: labels - softmax * (sum of labels), in one pass.
            ce_gradient = spare if weights_ready else student_out
            torch._log_softmax_backward_data(labels, work, 1, work.dtype, out=ce_gradient)

    # w * (d - m), the derivative of the weighted MSE with respect to d. (Row by row, sums of products and no matrix
    # products: those may be set to fewer digits than float32 has.)
    mse_gradient = None
    if s.beta > 0:
        product = spare
        if weights_ready and student_out is not None:
            weights, product = student_out, weights
        elif s.alpha == 0 or not labels_are_weights:
            mass = class_weights(part, s, out=weights)
            if factor is None and mass is not None:
                factor = mass.square_()
        torch.sub(teacher, student, out=work)
        if s.mse_temperature != 1.0:
            work.mul_(1.0 / s.mse_temperature)
        work.sub_(torch.mul(weights, work, out=product).sum(1, keepdim=True))
        mse_gradient = weights.mul_(work)
        if factor is not None:
            mse_gradient.mul_(factor)
        mse = work.mul_(mse_gradient).sum(1).mul_(0.5 * s.beta)

    mse_scale = s.beta * scale / s.mse_temperature
    if teacher_out is not None:
        torch.mul(mse_gradient, mse_scale, out=teacher_out) if mse_gradient is not None else teacher_out.zero_()
    if student_out is not None:
        ce_scale = s.alpha * scale / s.temperature
        _combine(ce_gradient, ce_scale, mse_gradient if s.student_in_mse else None, mse_scale, out=student_out)
    zeros = work.new_zeros(work.shape[0]) if mse is None or cross_entropy is None else work
    return zeros if mse is None else mse, zeros if cross_entropy is None else cross_entropy


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
