"""The how-to page on other uses: each of its scripts runs and computes what its formula says; rows may be masked.

The expected values come from the sums over pairs of classes in :mod:`oracles`, or are written out here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ikl_plugins import GKLLoss, IKLLoss, dkl_loss, gkl_loss, ikl_loss

PAGE = Path(__file__).parents[2] / "docs" / "uses.md"
LOSSES: dict[str, Any] = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
NAN, INFINITY = float("nan"), float("inf")
KEEP = torch.tensor([True, False, True, True, False, True])


def _script(heading: str) -> str:
    """The Python block of a section."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return str(block)


def _run(heading: str) -> dict[str, Any]:
    """The names that a script leaves behind."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(_script(heading), f"{PAGE.name}: {heading}", "exec"), names)  # noqa: S102 - our own page
    return names


def _logits(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_multiplied_rows_are_dropped_rows(kind: str) -> None:
    """Where a row's value is its own affair (gamma 1), one may do the one or the other."""
    settings = {"alpha": 1.5, "beta": 3.0}
    student, teacher = _logits(6, 5).requires_grad_(), _logits(6, 5)
    multiplied = (LOSSES[kind](student, teacher, reduction="none", **settings) * KEEP).sum() / KEEP.sum()
    dropped = LOSSES[kind](student[KEEP], teacher[KEEP], **settings)
    expected = oracles.decoupled(kind, student.detach()[KEEP], teacher[KEEP], **settings)
    for loss in (multiplied, dropped):
        torch.testing.assert_close(loss, expected.loss("batchmean"), rtol=1e-10, atol=0.0)
        gradient = _gradient(loss, student)
        torch.testing.assert_close(gradient[KEEP], expected.gradients("batchmean")[0], rtol=1e-9, atol=1e-14)
        assert torch.count_nonzero(gradient[~KEEP]) == 0


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("junk", [NAN, INFINITY, -INFINITY, 3e38])
def test_dropped_rows_have_no_gradient_whatever_they_hold(kind: str, junk: float) -> None:
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    student, teacher = (x.float() for x in (_logits(6, 5), _logits(6, 5)))
    expected = LOSSES[kind](student[KEEP], teacher[KEEP], **settings)
    for logits in (student, teacher):
        logits[~KEEP, :3] = junk
    student.requires_grad_()
    loss = LOSSES[kind](student[KEEP], teacher[KEEP], **settings)
    torch.testing.assert_close(loss, expected)
    gradient = _gradient(loss, student)
    assert torch.count_nonzero(gradient[~KEEP]) == 0
    assert torch.isfinite(gradient).all()
    assert LOSSES[kind](student[:0], teacher[:0], **settings) == 0.0


# --- FixMatch --------------------------------------------------------------------------------------------------------


def _authors_values(strong: Tensor, weak: Tensor) -> Tensor:
    """The semi-supervised variant, per sample: raw logits throughout, alpha 1, beta 0.1."""
    weights = weak.softmax(1)
    pairs = weights[:, :, None] * weights[:, None, :]
    gaps = (weak[:, :, None] - weak[:, None, :]) - (strong[:, :, None] - strong[:, None, :])
    return 0.1 * 0.25 * (pairs * gaps**2).sum((1, 2)) - (weights * strong.log_softmax(1)).sum(1)


@pytest.mark.parametrize("over_all", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("junk", [None, NAN, 3e38])
def test_fixmatch_is_the_masked_mean_of_the_formula(over_all: bool, weighted: bool, junk: float | None) -> None:
    strong, weak = _logits(8, 5), _logits(8, 5, scale=0.5)
    confident = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    weak[confident, 2] += 9.0
    values = _authors_values(strong.requires_grad_(), weak) * confident
    weights = torch.rand(8, dtype=torch.float64) if weighted else None
    values = values if weights is None else values * weights
    expected = values.mean() if over_all else values.sum() / 4
    seen = strong.detach().clone()
    if junk is not None:
        seen[~confident] = junk
    seen.requires_grad_()
    loss = _run("FixMatch")["fixmatch_loss"](seen, weak.requires_grad_(), weights=weights, over_all=over_all)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(_gradient(loss, seen), _gradient(expected, strong), rtol=1e-9, atol=1e-14)
    loss.backward()
    assert weak.grad is None


def test_fixmatch_threshold_is_confidence() -> None:
    fixmatch_loss = _run("FixMatch")["fixmatch_loss"]
    strong = _logits(2, 2)
    # softmax of (x, 0) is 0.95 at x = log 19
    weak = torch.tensor([[19.0, 1.0], [18.9, 1.0]], dtype=torch.float64).log()
    expected = _authors_values(strong, weak)
    sure = fixmatch_loss(strong, weak + torch.tensor([1e-9, 0.0]), over_all=False)
    torch.testing.assert_close(sure, expected[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(fixmatch_loss(strong, weak, threshold=0.9), expected.mean(), rtol=1e-10, atol=0.0)
    assert fixmatch_loss(strong, weak, threshold=0.99, over_all=False) == 0.0


# --- mean teacher ----------------------------------------------------------------------------------------------------


def test_mean_teacher_step_by_hand() -> None:
    names = _run("Mean teacher")
    criterion = names["criterion"]
    assert (criterion.alpha, criterion.beta, criterion.temperature, criterion.weight_temperature) == (0.02, 0.03, 1, 1)
    student = nn.Linear(4, 3, dtype=torch.float64)
    decay = 0.9
    average = names["AveragedModel"](student, multi_avg_fn=names["get_ema_multi_avg_fn"](decay)).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    expected = {name: value.detach().clone() for name, value in student.named_parameters()}
    for step in range(3):
        inputs, labels, weak_view, strong_view = _logits(5, 4), torch.randint(3, (5,)), _logits(7, 4), _logits(7, 4)
        with torch.no_grad():
            targets = weak_view @ expected["weight"].T + expected["bias"]
            exact = oracles.decoupled("ikl", student(strong_view), targets, alpha=0.02, beta=0.03).loss("batchmean")
            exact = exact + F.cross_entropy(student(inputs), labels)
        batch = inputs, labels, weak_view, strong_view
        loss = names["train_step"](student, average, optimizer, IKLLoss(alpha=0.02, beta=0.03), batch)
        torch.testing.assert_close(loss, exact, rtol=1e-10, atol=0.0)
        for name, value in student.named_parameters():
            keep = 0.0 if step == 0 else decay
            expected[name] = keep * expected[name] + (1.0 - keep) * value.detach()
        for name, value in average.module.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=0.0)


# --- segmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [IKLLoss, GKLLoss])
def test_maps_are_their_flattened_pixels_without_the_ignored_ones(module: Any) -> None:
    student, teacher, labels = _logits(2, 5, 3, 4).requires_grad_(), _logits(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    settings: dict[str, Any] = {"gamma": 0.3} if module is GKLLoss else {}
    criteria = [module(global_info=True, num_classes=5, **settings) for _ in range(3)]
    segmentation_loss = _run("Segmentation")["segmentation_loss"]
    ignored, junk, other = labels.clone(), student.detach().clone(), teacher.clone()
    ignored[:, 0], junk[:, :, 0], other[:, :, 0] = 255, NAN, INFINITY
    junk.requires_grad_()
    for _ in range(2):  # the second epoch has a prior that is not uniform
        dense = criteria[0](student, teacher, labels)
        flattened = segmentation_loss(criteria[1], student, teacher, labels)
        torch.testing.assert_close(dense, flattened, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(_gradient(dense, student), _gradient(flattened, student), rtol=1e-9, atol=1e-14)
        kept = segmentation_loss(criteria[2], junk, other, ignored)
        assert torch.isfinite(kept)
        assert torch.count_nonzero(_gradient(kept, junk)[:, :, 0]) == 0
        assert criteria[2].class_prior.counts.sum() == 2 * 2 * 4
        for criterion in criteria:
            criterion.end_epoch()
    assert torch.equal(criteria[0].class_prior.matrix, criteria[1].class_prior.matrix)
    assert torch.isfinite(criteria[2].class_prior.matrix).all()


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_vocabulary_script() -> None:
    names = _run("A vocabulary of 128k")
    logits, teacher, is_token = names["student"], names["teacher"], names["is_token"]
    student = logits.detach()
    assert student.shape == (2, 4, 128256)
    s, t = student[is_token].double(), teacher[is_token].double()
    p, q, d = t.softmax(1), s.softmax(1), t - s
    mean = (p * d).sum(1, keepdim=True)
    values = 0.5 * ((p * d**2).sum(1) - mean.squeeze(1) ** 2) - (p * s.log_softmax(1)).sum(1)
    torch.testing.assert_close(names["loss"].double(), values.mean(), rtol=2e-5, atol=0.0)
    gradient = logits.grad
    assert torch.count_nonzero(gradient[~is_token]) == 0
    expected = (q - p - p * (d - mean)) / is_token.sum()
    torch.testing.assert_close(gradient[is_token].double(), expected, rtol=4e-3, atol=1e-9)
    assert names["token_loss"](student, teacher, torch.zeros(2, 4, dtype=torch.bool)) == 0.0
