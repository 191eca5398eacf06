"""The check that the outputs are logits, and no probabilities in disguise."""

from __future__ import annotations

import torch
from torch import Tensor

from .subject import Finding, Subject

__all__ = ["logits"]

_PRECISION = 1e-3  # of their sum: how equal the sums of probabilities are
_STEP = {torch.float64: 2.0**-20, torch.float32: 2.0**-8}
_FLOOR = 0.01  # of what a class has on average: below, a value is at the end of its range
_AT_THE_ENDS = 0.5  # share of the values
# Slope, correlation and spread (a standard deviation of logarithms) above which speed goes with the distance to an end.
# Of trained networks, probabilities have 0.7, 0.69 and 1.2 or more, logits 0.4, 0.2 and 0.6 or less; of a network that
# sees nothing but the brightness of flat images, logits have 0.9, 0.6 and 0.8.
_LAW = (0.55, 0.65, 1.0)
_ENOUGH = 20  # values for a fit


def logits(subject: Subject) -> Finding:
    """Logits, which have no bounds; not what a softmax, a sigmoid or a tanh has made of them.

    By their values: outputs in [0, 1], and outputs that are not negative and have the same sum in each row.

    By how they move, whatever factor and shift they have, each row or class its own: what a softmax gives moves in
    proportion to p (1 - p), as its derivative is p_j (du_j - sum_k p_k du_k), and what a sigmoid or tanh gives in
    proportion to the distance from both ends of its range. Logits move as fast near their extremes as elsewhere,
    whether they are centred, cosines or logarithms of probabilities. So the speeds of the outputs along a random
    direction are laid beside the distances: p = (z - mean(z)) / a + 1 / C for a softmax, with the least a that makes
    none negative, and (z - min(z)) / (max(z) - min(z)), of all classes or of each, for the others. Outputs are
    probabilities if speeds go down with the distance to an end, or if half of them are at an end. Where no prediction
    is sure a softmax is as good as linear: its gradients do not vanish, and nothing is found.

    The cost: two forwards of one batch in float64.
    """
    rows = subject.logits.double()
    if rows.shape[1] < 2:
        return None, "One class has no probabilities."
    low, high = float(rows.min()), float(rows.max())
    if low >= 0 and high <= 1:
        return False, (
            "The outputs lie in [0, 1]: they are probabilities, whose gradients vanish. Return what goes into the "
            "softmax or sigmoid."
        )
    sums = rows.sum(dim=1)
    if low >= 0 and float(sums.max() - sums.min()) <= _PRECISION * float(sums.max()):
        return False, (
            f"The outputs are not negative and each row sums to {float(sums.mean()):.4g}: they are probabilities but "
            f"for a constant, and their gradients vanish. Return what goes into the softmax."
        )
    if bool((rows.logsumexp(dim=1).abs() < 1e-3).all()):
        return True, "The outputs are log-probabilities, which are logits too."
    if subject.deterministic:
        values, speeds = _moving(subject)
        softmax = _is_softmax(values, speeds) or _is_softmax(-values, -speeds)
        name = "softmax" if softmax else "sigmoid or tanh" if _is_bounded(values, speeds) else ""
        if name:
            return False, (
                f"The outputs stand still towards the ends of their range, from {low:.3g} to {high:.3g}, as those of a "
                f"{name} do but for a factor and a shift: gradients vanish. Return what goes into it."
            )
    return True, f"Logits from {low:.3g} to {high:.3g}."


def _moving(subject: Subject) -> tuple[Tensor, Tensor]:
    """Outputs on a batch, and their derivatives in a random direction for each image."""
    exact = subject.in_float64
    forward, dtype = (subject.model, torch.float32) if exact is None else (exact, torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = subject.batch.to(dtype)
    near, direction = (
        (torch.rand(images.shape, generator=generator) * 2 - 1).to(images.device, dtype) for _ in range(2)
    )
    # Off the levels of grey, where flat images have ties.
    values = forward(images + near / 512).double()
    ahead = forward(images + near / 512 + _STEP[dtype] * direction).double()
    return values, (ahead - values) / _STEP[dtype]


def _is_softmax(values: Tensor, speeds: Tensor) -> bool:
    classes = values.shape[1]
    centred = values - values.mean(dim=1, keepdim=True)
    factor = classes * -float(centred.min())
    if factor <= 0:
        return False
    share = centred / factor + 1 / classes
    distance = share * (1 - share)
    return _stands_still(distance * classes, speeds - speeds.mean(dim=1, keepdim=True))


def _is_bounded(values: Tensor, speeds: Tensor) -> bool:
    ranges = [(values.min(), values.max())]
    if len(values) >= _ENOUGH:  # each class its own
        ranges.append((values.amin(dim=0), values.amax(dim=0)))
    return any(_between(values, speeds, low, high) for low, high in ranges)


def _between(values: Tensor, speeds: Tensor, low: Tensor, high: Tensor) -> bool:
    if bool((low == high).any()):
        return False
    place = (values - low) / (high - low)
    # Log-probabilities have one end, and where classes are sure others are not.
    return all(
        _stands_still(2 * distance[near], speeds[near])
        for distance, near in ((place, place < 0.5), (1 - place, place >= 0.5))
    )


def _stands_still(distance: Tensor, speeds: Tensor) -> bool:
    """Whether what is near its end moves so much less."""
    if float((distance <= _FLOOR).double().mean()) > _AT_THE_ENDS:
        return True
    off = (distance > _FLOOR) & (speeds != 0)
    if int(off.sum()) < _ENOUGH:
        return False
    x, y = distance[off].log(), speeds[off].abs().log()
    x, y = x - x.mean(), y - y.mean()
    covariance = (x * y).mean()
    spread, other = x.square().mean().sqrt(), y.square().mean().sqrt()
    fit = covariance / spread.square(), covariance / (spread * other), spread
    return all(float(value) > limit for value, limit in zip(fit, _LAW, strict=True))
