"""The losses as ordinary differentiable tensor code, and the settings that tell them apart.

This is the text to read first. It also serves ``torch.compile`` and second derivatives; training goes by the analytic
gradient of :mod:`ikl_plugins._fused`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LEAST_GAMMA",
    "Settings",
    "composed_loss",
    "compute_dtype",
    "pair_factors",
    "reduce_rows",
    "wide",
    "without_autocast",
]

LEAST_GAMMA = 1e-37  # a power that float32 tells from 0, which has a way of its own


class Settings(NamedTuple):
    """What distinguishes one loss from another, beside its tensors. Build it by keyword."""

    alpha: float
    beta: float
    temperature: float  # of the soft cross entropy
    weight_temperature: float  # of the softmax that makes the weights, without a class prior
    reduction: str
    gamma: float = 1.0  # power of the weights
    mse_temperature: float = 1.0  # divides the logits inside the weighted MSE
    student_in_mse: bool = True  # False: the student side of the weighted MSE is detached (DKL)
    divide_by_pairs: bool = False  # True: divide by the pair weights of the batch instead of its size (GKL)


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The wider dtype of the two, at least float32."""
    if student.dtype is teacher.dtype is torch.float32:
        return torch.float32  # the common case, on the path of every call
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast on the device."""
    # Older releases of torch cannot compile the first question; whoever compiles has a device that knows autocast.
    if not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)):
        return nullcontext()
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def reduce_rows(rows: Tensor, settings: Settings, shape: torch.Size) -> Tensor:
    """Per-sample values (N * d1 * ...,) to the declared reduction for logits of ``shape``."""
    if settings.reduction == "none":
        return rows.reshape(shape[0], *shape[2:])
    return rows.sum() if settings.reduction == "sum" or rows.numel() == 0 else rows.mean()


def composed_loss(
    student: Tensor, teacher: Tensor, class_prior: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weighted-MSE part and cross-entropy part, each with a graph."""
    dtype = compute_dtype(student, teacher)
    shape = student.shape
    with without_autocast(student.device):
        s = student.movedim(1, -1).reshape(-1, shape[1]).to(dtype)
        t = teacher.movedim(1, -1).reshape(-1, shape[1]).to(dtype)
        if class_prior is not None and class_prior.dim() < student.dim():
            class_prior = class_prior.reshape(*class_prior.shape, *[1] * (student.dim() - 2)).expand(shape)
        if settings.gamma == 0:
            weights, log_top = torch.ones_like(t), t.new_zeros(len(t))  # for a weight of 0 as well
        elif class_prior is not None:
            prior = class_prior.movedim(1, -1).reshape(-1, shape[1]).to(dtype)
            top = prior.amax(1)
            # A power of the weights themselves may lie below what a float tells from 0, for all of them.
            weights = (prior / torch.where(top == 0, 1.0, top).unsqueeze(1)) ** max(settings.gamma, LEAST_GAMMA)
            log_top = torch.log(top.to(wide(top)))
        else:
            logits = t.detach() / settings.weight_temperature
            below = logits - logits.amax(1, keepdim=True)
            weights = torch.exp(settings.gamma * below)
            log_top = -torch.log(torch.exp(below).sum(1, dtype=wide(below)))
        mass = weights.sum(1)
        weights = weights / torch.where(mass == 0, 1.0, mass).unsqueeze(1)
        log_mass = torch.log(mass.to(log_top.dtype)) + settings.gamma * log_top

        difference = (t - (s if settings.student_in_mse else s.detach())) / settings.mse_temperature
        mean = (weights * difference).sum(1)
        mse = 0.5 * (weights * (difference - mean.unsqueeze(1)) ** 2).sum(1)
        mse = mse * (pair_factors(log_mass) if settings.divide_by_pairs else torch.exp(2 * log_mass)).to(dtype)

        soft_labels = torch.softmax(t.detach() / settings.temperature, 1)
        cross_entropy = -(soft_labels * torch.log_softmax(s / settings.temperature, 1)).sum(1)

        mse = settings.beta * mse
        cross_entropy = settings.alpha * cross_entropy
        return (
            reduce_rows(mse + cross_entropy, settings, shape),
            reduce_rows(mse, settings, shape),
            reduce_rows(cross_entropy, settings, shape),
        )


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of logarithms of masses, which a large gamma makes large: float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def pair_factors(log_mass: Tensor) -> Tensor:
    """GKL's factors from the logarithms of all rows' masses, which are the first dimension.

    They are the squares of the masses over the sum of the squares, times the number of rows.
    """
    log_pairs = 2 * log_mass
    least = torch.finfo(log_mass.dtype).min  # and not -inf, the logarithm of no weights at all
    return len(log_mass) * torch.exp(log_pairs - torch.logsumexp(log_pairs, 0).clamp(min=least))
