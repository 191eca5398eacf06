"""The losses and the attack once more, in float64 and straight from the published formulas, to judge the package by.

Nothing here calls the package and nothing differentiates. For one sample with student logits ``s``, teacher logits
``t`` and class weights ``w`` (Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, equations 5, 7 and
10; of GKL the normaliser over the batch)::

    E = 1/4 sum_jk w_j w_k (g_jk)^2         g_jk = (t_j - t_k) - (s_j - s_k)
    dE/ds_i = -sum_k w_i w_k g_ik           dE/dt_i = sum_k w_i w_k g_ik
    H = -sum_j p_j log q_j                  dH/ds_i = (q_i - p_i) / T

All samples' tables of pairs are formed at once, so the number of classes must be small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Expected", "ascend", "pairwise", "rows_of", "softmax"]

_TINY = 1e-12  # keeps a gradient of 0 from being divided by 0, as in the attack's formula


class Expected(NamedTuple):
    """What a loss must give for each row, before reduction: float64."""

    weighted_mse: Tensor  # (R,)
    cross_entropy: Tensor  # (R,)
    student_gradient: Tensor  # (R, C)
    teacher_gradient: Tensor  # (R, C)


def rows_of(tensor: Tensor) -> Tensor:
    """(N, C, d1, ...) as rows (N * d1 * ..., C), float64."""
    return tensor.detach().double().movedim(1, -1).reshape(-1, tensor.shape[1])


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) of each row."""
    return _log_softmax(logits, temperature).exp()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits / temperature
    scaled = scaled - scaled.amax(1, keepdim=True)
    return scaled - scaled.exp().sum(1, keepdim=True).log()


def pairwise(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    class_prior: Tensor | None = None,
) -> Expected:
    """DKL, IKL or GKL of rows (R, C), by pairs of classes.

    Args:
        kind: 'dkl', 'ikl' or 'gkl'.
        student: rows, float64.
        teacher: rows, float64.
        alpha: weight of the cross entropy.
        beta: weight of the weighted MSE.
        temperature: of the cross entropy; in DKL of everything.
        weight_temperature: of the softmax that makes the weights, but for DKL.
        gamma: power of the weights, GKL alone.
        class_prior: rows of weights in place of that softmax.

    Returns:
        Per row. A term of weight 0 is left out, whatever its value.
    """
    size = temperature if kind == "dkl" else 1.0
    mse = torch.zeros(len(student), dtype=torch.float64)
    pull = torch.zeros_like(student)
    if beta > 0:
        of_weights = temperature if kind == "dkl" else weight_temperature
        w = softmax(teacher, of_weights) if class_prior is None else class_prior
        if kind == "gkl":
            w = w**gamma
        pairs = w[:, :, None] * w[:, None, :]
        gaps = (teacher[:, :, None] - teacher[:, None, :]) - (student[:, :, None] - student[:, None, :])
        gaps = gaps / size
        mse = 0.25 * (pairs * gaps**2).sum((1, 2))
        pull = (pairs * gaps).sum(2) / size
        if kind == "gkl" and len(student):
            mass = pairs.sum()
            factor = len(student) / mass if mass != 0 else torch.zeros((), dtype=torch.float64)
            mse, pull = mse * factor, pull * factor
        mse, pull = beta * mse, beta * pull
    entropy, student_gradient = torch.zeros_like(mse), torch.zeros_like(student)
    if alpha > 0:
        labels, logs = softmax(teacher, temperature), _log_softmax(student, temperature)
        entropy = -alpha * torch.where(labels == 0, 0.0, labels * logs).sum(1)
        student_gradient = alpha * (logs.exp() - labels) / temperature
    if kind != "dkl":
        student_gradient = student_gradient - pull
    return Expected(mse, entropy, student_gradient, pull)


def ascend(
    weight: Tensor,
    bias: Tensor,
    images: Tensor,
    start: Tensor,
    *,
    norm: str,
    eps: float,
    steps: int,
    step_size: float,
    objective: str,
    labels: Tensor | None = None,
    natural_logits: Tensor | None = None,
    class_prior: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent on a linear classifier, whose gradient is a product of matrices.

    Args:
        weight: (classes, pixels), float64.
        bias: (classes,).
        images: natural images (N, pixels).
        start: where the first step begins, (N, pixels).
        norm: 'linf' or 'l2'.
        eps: radius.
        steps: their number.
        step_size: their length.
        objective: 'cross_entropy', 'margin', 'soft_cross_entropy' or 'ikl'.
        labels: (N,), of the first two objectives.
        natural_logits: (N, classes), of the others.
        class_prior: (N, classes), weights of 'ikl'.

    Returns:
        Adversarial images (N, pixels).
    """
    found = start
    for _ in range(steps):
        logits = found @ weight.T + bias
        if labels is not None and objective == "cross_entropy":
            slope = softmax(logits)
            slope[torch.arange(len(labels)), labels] -= 1.0
        elif labels is not None:
            others = logits.clone()
            others[torch.arange(len(labels)), labels] = -torch.inf
            slope = torch.zeros_like(logits)
            slope[torch.arange(len(labels)), others.argmax(1)] += 1.0
            slope[torch.arange(len(labels)), labels] -= 1.0
        else:
            assert natural_logits is not None  # noqa: S101  # of this tool's own calls
            beta = 1.0 if objective == "ikl" else 0.0
            slope = pairwise("ikl", logits, natural_logits, beta=beta, class_prior=class_prior).student_gradient
        gradient = slope @ weight
        if norm == "linf":
            moved = found + step_size * torch.sign(gradient)
            moved = torch.minimum(torch.maximum(moved, images - eps), images + eps)
        else:
            length = gradient.square().sum(1, keepdim=True).sqrt().clamp(min=_TINY)
            offset = found - images + step_size * gradient / length
            far = offset.square().sum(1, keepdim=True).sqrt().clamp(min=_TINY)
            moved = images + offset * (eps / far).clamp(max=1.0)
        found = moved.clamp(0.0, 1.0)
    return found
