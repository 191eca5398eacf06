"""Slow references for the losses, written from the published formulas as explicit sums over pairs of classes.

Nothing here calls the package, and nothing differentiates: the gradients are the hand-derived ones of the paper (Cui et
al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024: equations 3 to 5 and 10; the authors' code for GKL).

For one sample with student logits ``s`` and teacher logits ``t``, and pair weights ``w[j, k] = w_j w_k``::

    weighted MSE   E = 1/4 sum_jk w[j, k] (Dt[j, k] - Ds[j, k])^2     Dt[j, k] = t_j - t_k,  Ds[j, k] = s_j - s_k
                   dE/ds_i = sum_j w[i, j] (Ds[i, j] - Dt[i, j]),  dE/dt_i = -dE/ds_i
    cross entropy  H = -sum_j p_j log q_j                             p = softmax(t / T),  q = softmax(s / T)
                   dH/ds_i = (q_i - p_i) / T,  dH/dt_i = 0

Two spellings of the same sums: :func:`decoupled_loops` in plain Python floats for small inputs, and :func:`decoupled`
with one C x C table per sample, for up to about a thousand classes. A test holds the one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import torch
from torch import Tensor

KINDS = ("dkl", "ikl", "gkl")

# dtype of the inputs -> (relative tolerance, absolute tolerance). The relative one is measured against the largest
# entry of the same sample. The absolute one, a few units of the last place of what is computed with, is multiplied by
# the size of the terms: it is what rounding leaves where the exact result is 0 or nearly so. Half precision computes in
# float32, so its relative tolerance is that of rounding the gradient to the dtype.
TOLERANCES = {
    torch.float64: (1e-10, 1e-15),
    torch.float32: (2e-5, 5e-7),
    torch.bfloat16: (4e-3, 5e-7),
    torch.float16: (1e-3, 5e-7),
}


class Expected(NamedTuple):
    """What a loss must give, per sample and before reduction; float64."""

    weighted_mse: Tensor  # (N,), beta and GKL's normaliser included
    cross_entropy: Tensor  # (N,), alpha included
    student_gradient: Tensor  # (N, C): derivative of sample n's value with respect to its student logits
    teacher_gradient: Tensor  # (N, C)

    @property
    def values(self) -> Tensor:
        return self.weighted_mse + self.cross_entropy

    def loss(self, reduction: str) -> Tensor:
        """The reduced value; an empty batch gives 0."""
        if reduction == "none":
            return self.values
        total = self.values.sum()
        return total / max(1, len(self.values)) if reduction == "batchmean" else total

    def gradients(self, reduction: str, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Gradients of ``(upstream * loss).sum()``, student then teacher; ``upstream`` has the loss's shape."""
        per_sample = torch.as_tensor(upstream, dtype=torch.float64).reshape(-1, 1)
        if reduction == "batchmean":
            per_sample = per_sample / max(1, len(self.values))
        return self.student_gradient * per_sample, self.teacher_gradient * per_sample


def decoupled_loops(
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
    """DKL, IKL or GKL of (N, C) logits, one pair of classes at a time."""
    samples, classes = student.shape
    mse_temperature = temperature if kind == "dkl" else 1.0
    mse, entropy, mse_pull, entropy_pull = [], [], [], []
    pair_mass = 0.0
    for n in range(samples):
        s = [float(x) for x in student[n]]
        t = [float(x) for x in teacher[n]]
        w = _weights_of_sample(kind, t, temperature, weight_temperature, gamma, class_prior, n)
        energy = 0.0
        pull = [0.0] * classes
        for j in range(classes):
            for k in range(classes):
                gap = ((t[j] - t[k]) - (s[j] - s[k])) / mse_temperature
                energy += 0.25 * w[j] * w[k] * gap**2
                pull[j] -= w[j] * w[k] * gap / mse_temperature
                pair_mass += w[j] * w[k]
        mse.append(energy)
        mse_pull.append(pull)

        p, q, log_q = _softmax_of(t, temperature), _softmax_of(s, temperature), _log_softmax_of(s, temperature)
        entropy.append(-sum(p[j] * log_q[j] for j in range(classes)))
        entropy_pull.append([(q[i] - p[i]) / temperature for i in range(classes)])
    factor = _gkl_factor(samples, pair_mass) if kind == "gkl" else 1.0
    table = [torch.tensor(x, dtype=torch.float64) for x in (mse, entropy, mse_pull, entropy_pull)]
    return _expected(kind, alpha, beta, factor, *table)


def decoupled(
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
    """DKL, IKL or GKL of (N, C) logits, with one C x C table of pairs per sample."""
    student, teacher = student.detach().double(), teacher.detach().double()
    mse_temperature = temperature if kind == "dkl" else 1.0
    mse, entropy = torch.zeros(len(student), dtype=torch.float64), torch.zeros(len(student), dtype=torch.float64)
    mse_pull, entropy_pull = torch.zeros_like(student), torch.zeros_like(student)
    if class_prior is not None:
        weights = class_prior.detach().double()
    else:
        rows = [softmax(t, temperature if kind == "dkl" else weight_temperature) for t in teacher]
        weights = torch.stack(rows) if rows else teacher
    if kind == "gkl" and weights.numel() and float(weights.max()) > 0:
        weights = weights / weights.max()  # the normaliser cancels a common factor, and powers of the rest stay numbers
    pair_mass = 0.0
    for n in range(len(student)):
        s, t, w = student[n], teacher[n], weights[n] ** gamma
        pairs = torch.outer(w, w)
        gaps = ((t[:, None] - t[None, :]) - (s[:, None] - s[None, :])) / mse_temperature
        mse[n] = 0.25 * (pairs * gaps**2).sum()
        mse_pull[n] = -(pairs * gaps).sum(1) / mse_temperature
        pair_mass += float(pairs.sum())

        p, q = softmax(t, temperature), softmax(s, temperature)
        entropy[n] = -torch.where(p == 0, 0.0, p * _log_softmax(s, temperature)).sum()
        entropy_pull[n] = (q - p) / temperature
    factor = _gkl_factor(len(student), pair_mass) if kind == "gkl" else 1.0
    return _expected(kind, alpha, beta, factor, mse, entropy, mse_pull, entropy_pull)


def second_derivatives(
    kind: str, student: Tensor, *, alpha: float, beta: float, temperature: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of one sample's gradients, weights and soft labels held fixed, each (C, C).

    Of the weighted MSE, with W = sum_j w_j and d = t - s: d2E / dd_i dd_k = W w_i [i = k] - w_i w_k. Of the cross
    entropy: d2H / ds_i ds_k = (q_i [i = k] - q_i q_k) / T^2.

    Args:
        kind: 'dkl' or 'ikl'.
        student: (C,) logits. The teacher's play no part: what they enter is quadratic at most.
        alpha: weight of the cross entropy.
        beta: weight of the weighted MSE.
        temperature: of the cross entropy, and of the weighted MSE in DKL.
        weights: (C,) class weights.

    Returns:
        Derivatives of the student's gradient in the student, of the teacher's in the student, of the teacher's in the
        teacher. The derivative of the student's in the teacher is the transpose of the second, or 0 in DKL.
    """
    classes = len(student)
    mse_temperature = temperature if kind == "dkl" else 1.0
    q = softmax(student, temperature)
    mse = torch.zeros(classes, classes, dtype=torch.float64)
    entropy = torch.zeros_like(mse)
    for i in range(classes):
        for k in range(classes):
            same = 1.0 if i == k else 0.0
            mse[i, k] = beta * (weights.sum() * weights[i] * same - weights[i] * weights[k]) / mse_temperature**2
            entropy[i, k] = alpha * (q[i] * same - q[i] * q[k]) / temperature**2
    # DKL's student side is stopped, so its teacher gradient does not see the student move.
    return (entropy, torch.zeros_like(mse), mse) if kind == "dkl" else (entropy + mse, -mse, mse)


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
    labels: Tensor,
    class_prior: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent on a linear classifier, whose gradient is a product of matrices.

    Args:
        weight: (classes, pixels), float64.
        bias: (classes,).
        images: natural images (N, pixels), whose logits are the teacher's.
        start: where the first step begins, (N, pixels).
        norm: 'linf' or 'l2'.
        eps: radius.
        steps: their number.
        step_size: their length.
        objective: 'cross_entropy', 'margin', 'soft_cross_entropy' or 'ikl'.
        labels: (N,), of the first two objectives.
        class_prior: (N, classes), weights of 'ikl'.

    Returns:
        Adversarial images (N, pixels).
    """
    every = torch.arange(len(images))
    found = start
    for _ in range(steps):
        logits = found @ weight.T + bias
        if objective == "cross_entropy":
            slope = torch.stack([softmax(row, 1.0) for row in logits])
            slope[every, labels] -= 1.0
        elif objective == "margin":
            others = logits.clone()
            others[every, labels] = -torch.inf
            slope = torch.zeros_like(logits)
            slope[every, others.argmax(1)] += 1.0
            slope[every, labels] -= 1.0
        else:
            beta = 1.0 if objective == "ikl" else 0.0
            natural = images @ weight.T + bias
            slope = decoupled("ikl", logits, natural, beta=beta, class_prior=class_prior).student_gradient
        gradient = slope @ weight
        if norm == "linf":
            moved = found + step_size * torch.sign(gradient)
            moved = torch.minimum(torch.maximum(moved, images - eps), images + eps)
        else:
            length = gradient.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
            offset = found - images + step_size * gradient / length
            far = offset.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
            moved = images + offset * (eps / far).clamp(max=1.0)
        found = moved.clamp(0.0, 1.0)
    return found


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, size: float = 10.0) -> None:
    """Compares within ``TOLERANCES[dtype]``, each sample against its own largest entry.

    Args:
        actual: what the package gave: a 0-dim tensor, (N,), or (N, C).
        expected: what it must be, float64, same shape.
        dtype: the dtype of the inputs, which sets the tolerance.
        size: of the terms that may cancel; the absolute tolerance is multiplied by it.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    relative, absolute = TOLERANCES[dtype]
    error = (actual.detach().double() - expected).abs()
    largest = expected.abs()
    if expected.dim() == 2:
        error, largest = error.amax(1), largest.amax(1)
    bound = relative * largest + absolute * size
    # Written so that NaN fails.
    assert bool((error <= bound).all()), (
        f"error {float(error.max()):.3g} where {float(bound[error.argmax()] if bound.dim() else bound):.3g} is allowed "
        f"for {dtype}"
    )


def assert_matches(
    function: Callable[..., Tensor],
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str = "batchmean",
    reference: Callable[..., Expected] = decoupled,
    **settings: Any,
) -> None:
    """Holds value, dtypes, shapes and both gradients of ``function`` against the reference.

    Args:
        function: the loss under test, called with logits of any layout.
        kind: which loss it is.
        student: (N, C) or (N, C, d1, ...) logits; their strides are kept.
        teacher: same shape.
        reduction: passed on.
        reference: :func:`decoupled` or :func:`decoupled_loops`.
        settings: passed on to both; a ``class_prior`` may be (N, C) or of the logits' shape.
    """
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = function(s, t, reduction=reduction, **settings)

    flat_settings = dict(settings)
    prior = settings.get("class_prior")
    if prior is not None:
        if prior.dim() < student.dim():
            prior = prior.reshape(*prior.shape, *[1] * (student.dim() - 2)).expand(student.shape)
        flat_settings["class_prior"] = flatten_places(prior)
    expected = reference(kind, flatten_places(student.detach()), flatten_places(teacher.detach()), **flat_settings)

    compute = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    size = max([1.0] + [float(x.detach().abs().max()) for x in (student, teacher) if x.numel()])
    size *= max(1.0, settings.get("alpha", 1.0), settings.get("beta", 1.0))
    if kind == "dkl":  # whose terms are logits / temperature; the gradient has that factor once more
        size /= min(1.0, settings.get("temperature", 1.0)) ** 2
    assert loss.dtype == compute
    assert loss.shape == ((len(student), *student.shape[2:]) if reduction == "none" else ())
    assert_close(loss.reshape(-1) if reduction == "none" else loss, expected.loss(reduction), compute, size)

    # An upstream gradient other than 1, exact in every dtype.
    rows = len(expected.values)
    upstream = 0.5 + 0.25 * (torch.arange(rows) % 5) if reduction == "none" else torch.tensor(1.75)
    gradients = torch.autograd.grad(loss, (s, t), upstream.reshape(loss.shape).to(loss.dtype))
    for gradient, logits, wanted in zip(gradients, (s, t), expected.gradients(reduction, upstream), strict=True):
        assert gradient.dtype == logits.dtype
        assert gradient.shape == logits.shape
        assert_close(flatten_places(gradient), wanted, logits.dtype, size)


# From where float32 could not tell the squared mass of a uniform prior's powers from 0, and a larger one.
LARGE_GAMMAS = [
    (classes, gamma, kind)
    for classes, least in ((100, 11.0), (1000, 8.0), (21841, 6.0), (128256, 5.0))
    for gamma in (least, 50.0)
    for kind in ("uniform", "random", "of other certainty in each row", "softmax")
]


def assert_gkl_of_a_large_gamma(
    loss: Callable[..., Tensor], classes: int, gamma: float, kind: str, **call: Any
) -> None:
    """GKL of float32 logits against float64 logarithms (SciPy's logsumexp), where powers of the weights underflow.

    With ``l_b = log sum_j w_bj^gamma`` the factor of row b is ``N exp(2 l_b - logsumexp_b' 2 l_b')``.
    """
    rows = 16 if classes < 10_000 else 4
    student, teacher = 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)
    certainty = torch.logspace(-2, 1, rows)[:, None] if kind.endswith("row") else float(kind == "random")
    prior = None if kind == "softmax" else torch.softmax(certainty * torch.randn(rows, classes), 1)
    s, t = student.double().numpy(), teacher.double().numpy()
    logarithms = gamma * (scipy.special.log_softmax(t, 1) if prior is None else np.log(prior.double().numpy()))
    masses = scipy.special.logsumexp(logarithms, 1)
    weights = np.exp(logarithms - masses[:, None])
    factors = rows * np.exp(2 * masses - scipy.special.logsumexp(2 * masses))
    centred = (t - s) - (weights * (t - s)).sum(1, keepdims=True)
    expected = (0.5 * factors * (weights * centred**2).sum(1)).mean()
    gradient = factors[:, None] * weights * centred / rows

    leaf = teacher.requires_grad_()
    value = loss(student, leaf, alpha=0.0, gamma=gamma, class_prior=prior)
    (found,) = torch.autograd.grad(value, leaf, **call)
    # Of weights that are 1 and nearly 0 the difference to their mean is what float32 leaves of two equal numbers.
    size = np.abs(t - s).max()
    assert abs(value.item() - expected) <= 1e-5 * expected + 1e-12 * size**2
    assert (
        np.abs(found.detach().numpy() - gradient).max()
        <= 1e-5 * np.abs(gradient).max() + 5e-7 * size * factors.max() / rows
    )


def flatten_places(tensor: Tensor) -> Tensor:
    """(N, C, d1, ...) -> (N * d1 * ..., C) by explicit indexing, sample first, then place in row-major order."""
    places = [tensor[(n, slice(None), *place)] for n in range(len(tensor)) for place in _indices(tensor.shape[2:])]
    return torch.stack(places) if places else tensor.new_zeros(0, tensor.shape[1])


def _indices(shape: torch.Size | tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in shape:
        found = [(*index, i) for index in found for i in range(size)]
    return found


def _expected(
    kind: str,
    alpha: float,
    beta: float,
    factor: float,
    mse: Tensor,
    entropy: Tensor,
    mse_pull: Tensor,
    entropy_pull: Tensor,
) -> Expected:
    """Puts the parts together; a pull is the derivative of a part with respect to the student's logits.

    A term of weight 0 is left out, whatever its value.
    """
    mse, mse_pull = factor * mse, factor * mse_pull
    if alpha == 0:
        entropy, entropy_pull = torch.zeros_like(entropy), torch.zeros_like(entropy_pull)
    if beta == 0:
        mse, mse_pull = torch.zeros_like(mse), torch.zeros_like(mse_pull)
    student_gradient = alpha * entropy_pull
    if kind != "dkl":  # DKL stops the gradient of the student inside the weighted MSE
        student_gradient = student_gradient + beta * mse_pull
    return Expected(beta * mse, alpha * entropy, student_gradient, -beta * mse_pull)


def _gkl_factor(samples: int, pair_mass: float) -> float:
    """GKL divides by the pair weights of the batch where IKL divides by its size: per sample, a factor."""
    return samples / pair_mass if pair_mass != 0 else 0.0


def _weights_of_sample(
    kind: str,
    teacher: list[float],
    temperature: float,
    weight_temperature: float,
    gamma: float,
    class_prior: Tensor | None,
    n: int,
) -> list[float]:
    if class_prior is not None:
        weights = [float(x) for x in class_prior[n]]
    else:
        weights = _softmax_of(teacher, temperature if kind == "dkl" else weight_temperature)
    return [x**gamma for x in weights]


def _softmax_of(logits: list[float], temperature: float) -> list[float]:
    return [math.exp(x) for x in _log_softmax_of(logits, temperature)]


def _log_softmax_of(logits: list[float], temperature: float) -> list[float]:
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) of one sample (C,), float64."""
    return torch.exp(_log_softmax(logits, temperature))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits.double() / temperature
    top = scaled.max()
    return scaled - (top + torch.log(torch.exp(scaled - top).sum()))
