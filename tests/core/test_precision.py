"""Half precision, autocast, mixed dtypes and extreme logits."""

from __future__ import annotations

import itertools
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import ikl_plugins._fused
from ikl_plugins import GKLLoss, IKLLoss, dkl_loss, gkl_loss, ikl_loss

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
DTYPES = tuple(oracles.TOLERANCES)
HALVES = (torch.float16, torch.bfloat16)
USES = [
    ("dkl", {"temperature": 3.0}, False),
    ("ikl", {}, False),
    ("ikl", {"temperature": 3.0, "weight_temperature": 7.0}, False),
    ("ikl", {}, True),
    ("gkl", {"gamma": 0.3}, False),
    ("gkl", {"gamma": 0.05}, True),
    ("gkl", {"gamma": 0.0}, False),
]
every_use = pytest.mark.parametrize(
    ("kind", "settings", "with_prior"), USES, ids=[f"{use[0]}-{index}" for index, use in enumerate(USES)]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_half = pytest.mark.parametrize("half", HALVES, ids=str)


def _logits(*shape: int, dtype: torch.dtype) -> Tensor:
    return (3.0 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def _prior(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.softmax(torch.randn(*shape, dtype=torch.float64), 1).to(dtype)


@every_use
@every_dtype
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_every_dtype_matches_the_pair_tables(
    kind: str, settings: dict[str, Any], with_prior: bool, dtype: torch.dtype, reduction: str
) -> None:
    for shape in ((6, 50), (2, 7, 5)):
        used = {**settings, **({"class_prior": _prior(*shape[:2], dtype=dtype)} if with_prior else {})}
        student, teacher = _logits(*shape, dtype=dtype), _logits(*shape, dtype=dtype)
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, reduction=reduction, **used)


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), list(itertools.permutations(DTYPES, 2)), ids=str)
def test_mixed_dtypes_compute_in_the_wider(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for kind, settings, prior_dtype in (
        ("dkl", {}, None),
        ("ikl", {}, torch.float16),
        ("gkl", {"gamma": 0.3}, torch.float64),
    ):
        used: dict[str, Any] = dict(settings)
        if prior_dtype is not None:
            used["class_prior"] = _prior(5, 9, dtype=prior_dtype)
        if prior_dtype is torch.float64 and torch.float64 not in (student_dtype, teacher_dtype):
            used["class_prior"] = used["class_prior"].float().double()  # what a float32 computation can see of it
        student, teacher = _logits(5, 9, dtype=student_dtype), _logits(5, 9, dtype=teacher_dtype)
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, **used)


@every_use
@every_half
def test_half_precision_is_the_float32_computation(
    kind: str, settings: dict[str, Any], with_prior: bool, half: torch.dtype
) -> None:
    """To the bit: the same block walk on the same numbers, and one rounding of the gradient at the end."""
    prior = _prior(6, 50, dtype=half) if with_prior else None
    student, teacher = _logits(6, 50, dtype=half), _logits(6, 50, dtype=half)
    results = []
    for dtype in (half, torch.float32):
        s, t = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
        more = {} if prior is None else {"class_prior": prior.to(dtype)}
        loss = LOSSES[kind](s, t, **settings, **more)
        results.append((loss, *torch.autograd.grad(loss, (s, t))))
    assert results[0][0].dtype == torch.float32
    assert torch.equal(results[0][0], results[1][0])
    for low, high in zip(results[0][1:], results[1][1:], strict=True):
        assert low.dtype == half
        assert torch.equal(low, high.to(half))


@every_use
@every_half
def test_autocast_changes_nothing(
    kind: str, settings: dict[str, Any], with_prior: bool, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 100)
    prior = {"class_prior": _prior(6, 50, dtype=torch.float32)} if with_prior else {}
    for dtype in (torch.float32, half):
        student, teacher = (_logits(6, 50, dtype=dtype).requires_grad_() for _ in range(2))
        plain = LOSSES[kind](student, teacher, **settings, **prior)
        with torch.autocast("cpu", dtype=half):
            cast = LOSSES[kind](student, teacher, **settings, **prior)
        assert torch.equal(cast, plain)
        gradients = [torch.autograd.grad(loss, (student, teacher), retain_graph=True) for loss in (cast, plain)]
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)
        with torch.autocast("cpu", dtype=half):  # somebody's backward inside the context, also for a second derivative
            again = torch.autograd.grad(cast, (student, teacher), retain_graph=True)
            attached = torch.autograd.grad(cast, (student, teacher), create_graph=True)
        for one, other, third in zip(again, gradients[1], attached, strict=True):
            assert torch.equal(one, other)
            oracles.assert_close(third, other.double(), dtype)


def test_a_layer_under_autocast_trains() -> None:
    layer = torch.nn.Linear(8, 5)
    batch, teacher = torch.randn(4, 8), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(batch)
        assert logits.dtype == torch.bfloat16
        loss = ikl_loss(logits, teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    expected = oracles.decoupled("ikl", logits, teacher).gradients("batchmean")[0].T @ batch.double()
    error = (layer.weight.grad.double() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_small_gradients_survive_a_loss_scale(kind: str) -> None:
    """Gradients of about 1e-8, below what float16 can hold, times 2**16: rounded after the scale, not before."""
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    shape = (64, 100)
    student, teacher = _logits(*shape, dtype=torch.float16), _logits(*shape, dtype=torch.float16)
    expected = oracles.decoupled(kind, student, teacher, alpha=1e-6, beta=1e-6, **settings).gradients("batchmean")
    for scale, survives in ((1.0, False), (2.0**16, True)):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = LOSSES[kind](s, t, alpha=1e-6, beta=1e-6, **settings)
        (loss * scale).backward()
        for gradient, wanted in zip((s.grad, t.grad), expected, strict=True):
            error = (gradient.double() / scale - wanted).norm() / wanted.norm()
            assert bool(error < 2e-3) is survives, f"relative error {float(error)} at scale {scale}"


# --- extreme logits --------------------------------------------------------------------------------------------------


def _extreme(dtype: torch.dtype, classes: int) -> tuple[Tensor, Tensor]:
    """Every combination of very large, very small and ordinary logits on both sides."""
    row = torch.tensor([1e4, -1e4, 0.0, 1.0, 1e4, -1e4, 3.0, -2.0])[:classes]
    students = torch.stack([row.roll(shift) for shift in range(classes)] + [torch.zeros(classes)])
    teachers = torch.stack([row] * classes + [row])
    return students.to(dtype), teachers.to(dtype)


@every_use
@every_dtype
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_logits_of_ten_thousand_stay_finite(
    kind: str, settings: dict[str, Any], with_prior: bool, dtype: torch.dtype, classes: int
) -> None:
    student, teacher = (x.requires_grad_() for x in _extreme(dtype, classes))
    used: dict[str, Any] = dict(settings)
    if with_prior:
        used["class_prior"] = torch.eye(classes).repeat(2, 1)[: len(student)]
    for temperature in (0.5, 1.0, 4.0):
        used["temperature"] = temperature
        loss = LOSSES[kind](student, teacher, reduction="none", **used)
        assert bool(torch.isfinite(loss).all())
        # A sample's gradient is at most as large as the differences of its logits, which fit float16.
        gradients = torch.autograd.grad(loss, (student, teacher), torch.ones_like(loss), retain_graph=True)
        attached = torch.autograd.grad(loss, (student, teacher), torch.ones_like(loss), create_graph=True)
        for gradient in (*gradients, *attached):
            assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("gamma", [0.0, 1e-168, 0.05, 1.0])  # of which the second is 0 in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_entries_and_zero_rows_of_a_prior(gamma: float, dtype: torch.dtype) -> None:
    prior = torch.zeros(3, 20, dtype=dtype)  # whole vectors, which torch computes in another way than single numbers
    prior[0, :2], prior[2, 1] = 0.5, 1.0
    student, teacher = (3.0 * torch.randn(3, 20, dtype=dtype) for _ in range(2))
    oracles.assert_matches(gkl_loss, "gkl", student, teacher, gamma=gamma, class_prior=prior, reduction="none")
    oracles.assert_matches(ikl_loss, "ikl", student, teacher, class_prior=prior, reduction="none")


@pytest.mark.parametrize("kind", ["ikl", "gkl"])
def test_a_prior_of_zeros_leaves_the_cross_entropy(kind: str) -> None:
    student, teacher = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    loss = LOSSES[kind](student, teacher, class_prior=torch.zeros(3, 4, dtype=torch.float64), **settings)
    oracles.assert_close(loss, ikl_loss(student, teacher, beta=0.0).detach(), torch.float64)
    for attached in (False, True):
        gradients = torch.autograd.grad(loss, (student, teacher), retain_graph=True, create_graph=attached)
        assert torch.count_nonzero(gradients[1]) == 0
        expected, _ = oracles.decoupled("ikl", student, teacher, beta=0.0).gradients("batchmean")
        oracles.assert_close(gradients[0], expected, torch.float64)


@every_use
def test_a_nan_goes_through_to_its_own_sample(kind: str, settings: dict[str, Any], with_prior: bool) -> None:
    prior = {"class_prior": _prior(4, 5, dtype=torch.float64)} if with_prior else {}
    for broken in (0, 1):
        pair = [_logits(4, 5, dtype=torch.float64) for _ in range(2)]
        pair[broken][2, 3] = float("nan")
        values = LOSSES[kind](*pair, reduction="none", **settings, **prior)
        assert bool(values[2].isnan())
        assert bool(LOSSES[kind](*pair, **settings, **prior).isnan())
        # GKL's normaliser is one number for the batch: a teacher's NaN in it reaches everybody.
        if kind != "gkl" or broken == 0:
            assert bool(values[[0, 1, 3]].isfinite().all())


# --- what the modules collect ----------------------------------------------------------------------------------------


@every_half
@pytest.mark.parametrize("loss_class", [IKLLoss, GKLLoss])
def test_the_prior_collects_float32_predictions_of_half_precision_logits(loss_class: Any, half: torch.dtype) -> None:
    """The division by the temperature too is done in float32: bfloat16 would round it a second time."""
    criterion = loss_class(global_info=True, num_classes=5, weight_temperature=3.0)
    logits = (8.0 * torch.randn(5, 5)).to(half)
    with torch.autocast("cpu", dtype=half):
        criterion(logits, logits, torch.arange(5))
    criterion.end_epoch()
    expected = torch.stack([oracles.softmax(row, 3.0) for row in logits])
    torch.testing.assert_close(criterion.class_prior.matrix.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("classes", "gamma", "weights"), oracles.LARGE_GAMMAS)
def test_a_large_gamma(classes: int, gamma: float, weights: str) -> None:
    oracles.assert_gkl_of_a_large_gamma(gkl_loss, classes, gamma, weights)
    oracles.assert_gkl_of_a_large_gamma(gkl_loss, classes, gamma, weights, create_graph=True)


@pytest.mark.parametrize("weights", ["random", "softmax"])
def test_compiled_with_a_large_gamma(weights: str) -> None:
    compiled = torch.compile(gkl_loss, backend="eager")
    oracles.assert_gkl_of_a_large_gamma(compiled, 1000, 50.0, weights)
