"""The how-to page on other uses: its scripts run, and what it says of masks, means and the normaliser is so.

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ikl_plugins import GKLLoss, IKLLoss, dkl_loss, gkl_loss, ikl_loss

PAGE = Path(__file__).parents[2] / "docs" / "uses.md"
EXAMPLES = ("FixMatch", "Mean teacher", "Segmentation", "A vocabulary of 128k")
LOSSES: dict[str, Any] = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
NAN, INFINITY = float("nan"), float("inf")
KEEP = torch.tensor([True, False, True, True, False, True])


def _scripts() -> dict[str, str]:
    """Heading of each section -> its Python block."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        blocks = re.findall(r"^```python\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
        assert len(blocks) <= 1, f"{heading}: one script per section"
        if blocks:
            found[heading] = blocks[0]
    return found


def _run(heading: str) -> dict[str, Any]:
    """The names that a script leaves behind."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(_scripts()[heading], f"{PAGE.name}: {heading}", "exec"), names)  # noqa: S102 - our own page
    return names


def _logits(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def _weights(kind: str) -> dict[str, float]:
    return {"alpha": 1.5, "beta": 3.0, **({"gamma": 0.3} if kind == "gkl" else {})}


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_these_scripts_of_at_most_forty_lines() -> None:
    scripts = _scripts()
    assert tuple(scripts) == EXAMPLES
    for heading, script in scripts.items():
        assert 10 < len(script.splitlines()) <= 40, heading
        assert max(map(len, script.splitlines())) <= 120, heading


# --- masks and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dkl", "ikl", "gkl at 1"])
def test_multiplied_rows_are_dropped_rows(kind: str) -> None:
    """Where a row's value is its own affair, one may do the one or the other."""
    kind, settings = kind[:3], {"alpha": 1.5, "beta": 3.0}
    student, teacher = _logits(6, 5).requires_grad_(), _logits(6, 5)
    multiplied = (LOSSES[kind](student, teacher, reduction="none", **settings) * KEEP).sum() / KEEP.sum()
    dropped = LOSSES[kind](student[KEEP], teacher[KEEP], **settings)
    expected = oracles.decoupled(kind, student.detach()[KEEP], teacher[KEEP], **settings)
    for loss in (multiplied, dropped):
        torch.testing.assert_close(loss, expected.loss("batchmean"), rtol=1e-10, atol=0.0)
        gradient = _gradient(loss, student)
        torch.testing.assert_close(gradient[KEEP], expected.gradients("batchmean")[0], rtol=1e-9, atol=1e-14)
        assert torch.count_nonzero(gradient[~KEEP]) == 0


@pytest.mark.parametrize("with_prior", [False, True])
def test_gkl_multiplied_has_the_pair_weights_of_hidden_rows_in_its_divisor(with_prior: bool) -> None:
    gamma, beta = 0.3, 3.0
    student, teacher = _logits(6, 5), _logits(6, 5)
    teacher[~KEEP] *= 0.1  # unconfident rows
    prior = _logits(6, 5).softmax(1) if with_prior else None
    weights = (teacher.softmax(1) if prior is None else prior) ** gamma
    pairs = weights[:, :, None] * weights[:, None, :]
    gaps = (teacher[:, :, None] - teacher[:, None, :]) - (student[:, :, None] - student[:, None, :])
    entropy = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    energy = 0.25 * (pairs * gaps**2).sum((1, 2))

    values = gkl_loss(student, teacher, beta=beta, gamma=gamma, class_prior=prior, reduction="none")
    torch.testing.assert_close(values, beta * 6 / pairs.sum() * energy + entropy, rtol=1e-10, atol=0.0)

    kept_prior = None if prior is None else prior[KEEP]
    dropped = gkl_loss(student[KEEP], teacher[KEEP], beta=beta, gamma=gamma, class_prior=kept_prior)
    expected = beta * energy[KEEP].sum() / pairs[KEEP].sum() + entropy[KEEP].mean()
    torch.testing.assert_close(dropped, expected, rtol=1e-10, atol=0.0)
    assert abs((values * KEEP).sum() / KEEP.sum() - expected) > 0.02 * expected
    over_all = gkl_loss(student[KEEP], teacher[KEEP], beta=beta, gamma=gamma, class_prior=kept_prior, reduction="sum")
    torch.testing.assert_close(over_all / 6, expected * 4 / 6, rtol=1e-10, atol=0.0)


def test_a_confidence_mask_leaves_multiplied_gkl_too_small() -> None:
    """Flat rows have the larger pair weights for gamma below 1."""
    student, teacher = _logits(6, 5), _logits(6, 5, scale=4.0)
    teacher[~KEEP] *= 0.01
    values = gkl_loss(student, teacher, alpha=0.0, gamma=0.3, reduction="none")
    assert (values * KEEP).sum() / KEEP.sum() < gkl_loss(student[KEEP], teacher[KEEP], alpha=0.0, gamma=0.3)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("junk", [NAN, INFINITY, -INFINITY, 3e38, 1e20])
def test_dropped_rows_have_no_gradient_whatever_they_hold(kind: str, junk: float) -> None:
    student, teacher = _logits(6, 5).float(), _logits(6, 5).float()
    student[~KEEP, 1::2] = junk
    teacher[~KEEP, ::2] = junk
    student.requires_grad_()
    teacher.requires_grad_()
    loss = LOSSES[kind](student[KEEP], teacher[KEEP], reduction="sum", **_weights(kind)) / 6
    expected = oracles.decoupled(
        kind, student.detach()[KEEP].double(), teacher.detach()[KEEP].double(), **_weights(kind)
    )
    torch.testing.assert_close(loss.double(), expected.loss("sum") / 6, rtol=1e-5, atol=0.0)
    for logits, exact in zip((student, teacher), expected.gradients("sum", 1 / 6), strict=True):
        gradient = _gradient(loss, logits)
        assert torch.equal(gradient[~KEEP], torch.zeros(2, 5))
        torch.testing.assert_close(gradient[KEEP].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multiplied_rows_have_no_gradient_up_to_ten_thousand(kind: str, dtype: torch.dtype) -> None:
    student, teacher = _logits(6, 5).to(dtype), _logits(6, 5).to(dtype)
    student[~KEEP] = torch.tensor([1e4, -1e4, 0.0, 1e4, 0.0], dtype=dtype)
    teacher[~KEEP] = torch.tensor([-1e4, 1e4, 1e4, 0.0, 0.0], dtype=dtype)
    student.requires_grad_()
    loss = (LOSSES[kind](student, teacher, reduction="none", **_weights(kind)) * KEEP).sum()
    assert torch.isfinite(loss)
    gradient = _gradient(loss, student)
    assert torch.equal(gradient[~KEEP], torch.zeros(2, 5, dtype=dtype))
    assert torch.isfinite(gradient).all()
    assert torch.count_nonzero(gradient[KEEP]) > 0


@pytest.mark.parametrize("kind", LOSSES)
def test_a_hidden_nan_is_not_multiplied_away(kind: str) -> None:
    """Why the page says to drop such rows: neither a product nor `torch.where` saves the gradient."""
    student, teacher = _logits(6, 5), _logits(6, 5)
    student[~KEEP] = NAN
    student.requires_grad_()
    values = LOSSES[kind](student, teacher, reduction="none", **_weights(kind))
    assert torch.isnan((values * KEEP).sum())
    mended = torch.where(KEEP, values, 0.0).sum()
    assert torch.isfinite(mended)
    gradient = _gradient(mended, student)
    assert torch.isnan(gradient[~KEEP]).any()
    assert torch.isfinite(gradient[KEEP]).all()


def test_a_hidden_nan_of_the_teacher_spoils_gkl_for_every_row() -> None:
    student, teacher = _logits(6, 5), _logits(6, 5)
    clean = gkl_loss(student, teacher, gamma=0.3, reduction="none")
    teacher[~KEEP] = NAN
    values = gkl_loss(student, teacher, gamma=0.3, reduction="none")
    assert not torch.isclose(values, clean).any()
    kept = gkl_loss(student[KEEP], teacher[KEEP], gamma=0.3, reduction="none")
    assert not torch.isclose(values[KEEP], kept).any()
    # IKL's rows know nothing of each other.
    values = ikl_loss(student, teacher, reduction="none")
    assert torch.equal(values[KEEP], ikl_loss(student[KEEP], teacher[KEEP], reduction="none"))


@pytest.mark.parametrize("kind", LOSSES)
def test_no_row_left_gives_zero(kind: str) -> None:
    student, teacher = _logits(6, 5).requires_grad_(), _logits(6, 5)
    none = torch.zeros(6, dtype=torch.bool)
    for reduction in ("batchmean", "sum"):
        loss = LOSSES[kind](student[none], teacher[none], reduction=reduction, **_weights(kind))
        assert loss.item() == 0.0
        assert torch.equal(_gradient(loss, student), torch.zeros(6, 5, dtype=torch.float64))


@pytest.mark.parametrize("module", [IKLLoss, GKLLoss])
def test_the_class_prior_sees_what_the_module_is_given(module: Any) -> None:
    student, teacher, targets = _logits(6, 3), _logits(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    predictions = teacher.softmax(1).float()
    criterion = module(global_info=True, num_classes=3, reduction="none")
    (criterion(student, teacher, targets) * KEEP).sum()
    criterion.end_epoch()
    everything = torch.stack([predictions[targets == label].mean(0) for label in range(3)])
    torch.testing.assert_close(criterion.class_prior.matrix, everything)

    criterion = module(global_info=True, num_classes=3)
    criterion(student[KEEP], teacher[KEEP], targets[KEEP])
    criterion.end_epoch()
    kept = torch.stack([predictions[0], predictions[[2, 3]].mean(0), predictions[5]])
    torch.testing.assert_close(criterion.class_prior.matrix, kept)

    for ignored in (255, -100):
        with pytest.raises(ValueError, match=str(ignored)):
            criterion(student, teacher, torch.where(KEEP, targets, ignored))


# --- FixMatch --------------------------------------------------------------------------------------------------------


def _views() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both views and which of the eight samples are confident."""
    strong, weak = _logits(8, 5).requires_grad_(), _logits(8, 5, scale=0.5)
    confident = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    weak[confident, 2] += 9.0
    return strong, weak.requires_grad_(), confident


def _authors_values(strong: Tensor, weak: Tensor, sharpen: float, alpha: float, beta: float) -> Tensor:
    """The semi-supervised variant, per sample: labels at a temperature of their own, the rest raw."""
    weights = weak.softmax(1)
    pairs = weights[:, :, None] * weights[:, None, :]
    gaps = (weak[:, :, None] - weak[:, None, :]) - (strong[:, :, None] - strong[:, None, :])
    labels = (weak / sharpen).softmax(1)
    return beta * 0.25 * (pairs.detach() * gaps**2).sum((1, 2)) - alpha * (labels * strong.log_softmax(1)).sum(1)


@pytest.mark.parametrize("over_all", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_fixmatch_is_the_masked_mean_of_the_formula(over_all: bool, weighted: bool) -> None:
    strong, weak, confident = _views()
    weights = torch.rand(8, dtype=torch.float64) if weighted else None
    loss = _run("FixMatch")["fixmatch_loss"](strong, weak, weights=weights, over_all=over_all)
    values = _authors_values(strong, weak.detach(), sharpen=0.5, alpha=1.0, beta=0.1)
    values = values * confident * (1.0 if weights is None else weights)
    expected = values.mean() if over_all else values.sum() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    gradient = _gradient(loss, strong)
    torch.testing.assert_close(gradient, _gradient(expected, strong), rtol=1e-9, atol=1e-14)
    assert torch.equal(gradient[~confident], torch.zeros(4, 5, dtype=torch.float64))
    loss.backward()
    assert weak.grad is None


def test_fixmatch_threshold_is_confidence() -> None:
    fixmatch_loss = _run("FixMatch")["fixmatch_loss"]
    strong = _logits(2, 2)
    # softmax of (x, 0) is 0.95 at x = log 19
    weak = torch.tensor([[19.0, 1.0], [18.9, 1.0]], dtype=torch.float64).log()
    expected = _authors_values(strong, weak, 0.5, 1.0, 0.1)
    sure = fixmatch_loss(strong, weak + torch.tensor([1e-9, 0.0]), over_all=False)
    torch.testing.assert_close(sure, expected[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(fixmatch_loss(strong, weak, threshold=0.9), expected.mean(), rtol=1e-10, atol=0.0)
    assert fixmatch_loss(strong, weak, threshold=0.99) == 0.0
    assert fixmatch_loss(strong, weak, threshold=0.99, over_all=False) == 0.0


def test_fixmatch_without_sharpening_is_one_call() -> None:
    strong, weak, confident = _views()
    loss = _run("FixMatch")["fixmatch_loss"](strong, weak, sharpen=1.0)
    values = ikl_loss(strong, weak.detach(), alpha=1.0, beta=0.1, reduction="none")
    torch.testing.assert_close(loss, (values * confident).mean(), rtol=1e-10, atol=0.0)
    both_sides = ikl_loss(strong[confident], weak[confident], alpha=1.0, beta=0.0, temperature=0.5)
    teacher_alone = _authors_values(strong, weak, 0.5, 1.0, 0.0)[confident].mean()
    assert abs(both_sides - teacher_alone) > 0.1


@pytest.mark.parametrize("junk", [NAN, INFINITY, 3e38])
def test_fixmatch_is_deaf_to_unconfident_samples(junk: float) -> None:
    strong, weak, confident = _views()
    strong = strong.detach().float()
    strong[~confident, :3] = junk
    strong.requires_grad_()
    loss = _run("FixMatch")["fixmatch_loss"](strong, weak.detach().float())
    assert torch.isfinite(loss)
    gradient = _gradient(loss, strong)
    assert torch.equal(gradient[~confident], torch.zeros(4, 5))
    assert torch.isfinite(gradient).all()


def test_weak_view_with_its_graph_is_trained_by_the_difference_alone() -> None:
    strong, weak, _ = _views()
    expected = _authors_values(strong, weak, 1.0, 0.0, 0.1).sum()  # weights stopped
    loss = ikl_loss(strong, weak, alpha=1.0, beta=0.1, reduction="sum")
    torch.testing.assert_close(_gradient(loss, weak), _gradient(expected, weak), rtol=1e-9, atol=1e-14)


def test_fixmatch_script_trains() -> None:
    names = _run("FixMatch")
    with torch.no_grad():
        weak = names["model"](names["weak_view"])
        used = names["fixmatch_loss"](names["model"](names["strong_view"]), weak)
    assert (weak.softmax(1).amax(1) >= 0.95).any(), "the script's batch has no confident sample"
    assert used > 0.0
    assert torch.isfinite(names["loss"])
    assert all(torch.count_nonzero(x.grad) > 0 for x in names["model"].parameters())


# --- mean teacher ----------------------------------------------------------------------------------------------------


def test_mean_teacher_step_by_hand() -> None:
    names = _run("Mean teacher")
    student = nn.Linear(4, 3, dtype=torch.float64)
    decay = 0.9
    average = names["AveragedModel"](student, multi_avg_fn=names["get_ema_multi_avg_fn"](decay)).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    expected = {name: value.detach().clone() for name, value in student.named_parameters()}
    for step in range(3):
        inputs, labels, weak_view, strong_view = batch = (
            _logits(5, 4), torch.randint(3, (5,)), _logits(7, 4), _logits(7, 4),
        )  # fmt: skip
        with torch.no_grad():
            targets = weak_view @ expected["weight"].T + expected["bias"]
            exact = oracles.decoupled("ikl", student(strong_view), targets, alpha=0.02, beta=0.03).loss("batchmean")
            exact = exact + F.cross_entropy(student(inputs), labels)
        loss = names["train_step"](student, average, optimizer, IKLLoss(alpha=0.02, beta=0.03), batch)
        torch.testing.assert_close(loss, exact, rtol=1e-10, atol=0.0)
        for name, value in student.named_parameters():
            keep = 0.0 if step == 0 else decay
            expected[name] = keep * expected[name] + (1.0 - keep) * value.detach()
        for name, value in average.module.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-10, atol=0.0)
            assert value.grad is None


def test_mean_teacher_script_has_the_published_values() -> None:
    names = _run("Mean teacher")
    student, teacher, criterion = names["student"], names["teacher"], names["criterion"]
    assert (criterion.alpha, criterion.beta, criterion.temperature, criterion.weight_temperature) == (0.02, 0.03, 1, 1)
    assert not teacher.training
    assert teacher.n_averaged == 3
    gap = max((a - b).abs().max().item() for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert 0.0 < gap < 2e-3  # two steps of 5e-4 behind
    assert torch.equal(student[1].running_mean, teacher.module[1].running_mean)


# --- segmentation ----------------------------------------------------------------------------------------------------


def test_segmentation_script() -> None:
    names = _run("Segmentation")
    student, teacher, labels, classes = (names[key] for key in ("student", "teacher", "labels", "classes"))
    keep = labels != 255
    assert keep.sum() == 2 * 12 * 24
    rows, references = (x.detach().double().permute(0, 2, 3, 1).reshape(-1, classes) for x in (student, teacher))
    flat = keep.flatten()

    # The second epoch had the prior of the first: the script again, with one epoch, leaves it behind.
    first: dict[str, Any] = {}
    exec(_scripts()["Segmentation"].replace("range(2)", "range(1)"), first)  # noqa: S102 - our own page
    prior = first["criterion"].class_prior.matrix
    before, seen = first["teacher"].movedim(1, -1)[first["labels"] != 255], first["labels"][first["labels"] != 255]
    by_hand = torch.stack([before[seen == label].softmax(1).mean(0) for label in range(classes)])
    torch.testing.assert_close(prior, by_hand)

    expected = oracles.decoupled(
        "gkl", rows[flat], references[flat], alpha=1.0, beta=4.0, gamma=0.5,
        class_prior=prior.double()[labels.flatten()[flat]],
    )  # fmt: skip
    torch.testing.assert_close(names["loss"].double(), expected.loss("batchmean"), rtol=1e-5, atol=0.0)
    gradient = student.grad.permute(0, 2, 3, 1).reshape(-1, classes)
    assert torch.count_nonzero(gradient[~flat]) == 0
    torch.testing.assert_close(
        gradient[flat].double(), expected.gradients("batchmean")[0], rtol=1e-4, atol=1e-8
    )  # fmt: skip

    every_pixel = oracles.decoupled("gkl", rows, references, gamma=0.5).loss("batchmean")
    torch.testing.assert_close(names["dense"].double(), every_pixel, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("module", [IKLLoss, GKLLoss])
def test_maps_are_their_flattened_pixels(module: Any) -> None:
    student, teacher, labels = _logits(2, 5, 3, 4).requires_grad_(), _logits(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    settings: dict[str, Any] = {"gamma": 0.3} if module is GKLLoss else {}
    criteria = [module(global_info=True, num_classes=5, **settings) for _ in range(2)]
    segmentation_loss = _run("Segmentation")["segmentation_loss"]
    for _ in range(2):  # the second epoch has a prior that is not uniform
        dense, flattened = (
            criteria[0](student, teacher, labels),
            segmentation_loss(criteria[1], student, teacher, labels),
        )
        torch.testing.assert_close(dense, flattened, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(_gradient(dense, student), _gradient(flattened, student), rtol=1e-9, atol=1e-14)
        for criterion in criteria:
            criterion.end_epoch()
    assert torch.equal(criteria[0].class_prior.matrix, criteria[1].class_prior.matrix)


def test_segmentation_ignores_what_ignored_pixels_hold() -> None:
    student, teacher, labels = _logits(2, 5, 3, 4), _logits(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    labels[:, 0] = 255
    student[:, :, 0], teacher[:, :, 0] = NAN, INFINITY
    student.requires_grad_()
    criterion = GKLLoss(gamma=0.3, global_info=True, num_classes=5)
    loss = _run("Segmentation")["segmentation_loss"](criterion, student, teacher, labels)
    assert torch.isfinite(loss)
    gradient = _gradient(loss, student)
    assert torch.equal(gradient[:, :, 0], torch.zeros(2, 5, 4, dtype=torch.float64))
    assert torch.isfinite(gradient).all()
    assert criterion.class_prior is not None
    assert torch.isfinite(criterion.class_prior.sums).all()
    assert criterion.class_prior.counts.sum() == 2 * 2 * 4


# --- vocabulary ------------------------------------------------------------------------------------------------------


def _ikl_of_long_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample value and gradient with alpha = beta = 1, float64: the square over pairs multiplied out."""
    s, t = student.double(), teacher.double()
    p, q, d = t.softmax(1), s.softmax(1), t - s
    mean = (p * d).sum(1, keepdim=True)
    values = 0.5 * ((p * d**2).sum(1) - mean.squeeze(1) ** 2) - (p * s.log_softmax(1)).sum(1)
    return values, q - p - p * (d - mean)


def test_vocabulary_script() -> None:
    names = _run("A vocabulary of 128k")
    student, teacher, is_token = names["student"].detach(), names["teacher"], names["is_token"]
    assert is_token.tolist() == [[True] * 4, [True, True, False, False]]
    assert student.shape == (2, 4, 128256)
    assert student.dtype == names["student"].grad.dtype == torch.bfloat16
    assert names["loss"].dtype == torch.float32
    values, gradients = _ikl_of_long_rows(student[is_token], teacher[is_token])
    torch.testing.assert_close(names["loss"].double(), values.mean(), rtol=2e-5, atol=0.0)
    gradient = names["student"].grad
    assert torch.count_nonzero(gradient[~is_token]) == 0
    torch.testing.assert_close(gradient[is_token].double(), gradients / 6, rtol=4e-3, atol=1e-9)


def test_vocabulary_dropped_is_the_same_mean_and_bears_nan() -> None:
    token_loss = _run("A vocabulary of 128k")["token_loss"]
    student, teacher = _logits(2, 4, 50), _logits(2, 4, 50)
    is_token = torch.tensor([[True] * 4, [True, True, False, False]])
    masked = token_loss(student, teacher, is_token)
    torch.testing.assert_close(
        masked, _ikl_of_long_rows(student[is_token], teacher[is_token])[0].mean(), rtol=1e-9, atol=0.0
    )  # fmt: skip
    student[~is_token] = NAN
    student.requires_grad_()
    dropped = ikl_loss(student[is_token], teacher[is_token])
    torch.testing.assert_close(dropped, masked, rtol=1e-10, atol=0.0)
    assert torch.equal(_gradient(dropped, student)[~is_token], torch.zeros(2, 50, dtype=torch.float64))
    assert token_loss(student.detach().nan_to_num(), teacher, torch.zeros(2, 4, dtype=torch.bool)) == 0.0


class _Made(TorchDispatchMode):
    """Sizes in bytes of the tensors that operations make; views and results in place do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.sizes += [x.untyped_storage().nbytes() for x in made if x.untyped_storage().data_ptr() not in known]
        return result


def test_vocabulary_memory_is_one_gradient() -> None:
    """Of the tensors as large as the logits: the float32 gradient and its bfloat16 form, no copy and no table."""
    token_loss = _run("A vocabulary of 128k")["token_loss"]
    vocabulary = 128256
    for tokens in (16, 32):
        student = torch.randn(2, tokens // 2, vocabulary, dtype=torch.bfloat16).requires_grad_()
        teacher = torch.randn(2, tokens // 2, vocabulary, dtype=torch.bfloat16)
        is_token = torch.ones(2, tokens // 2, dtype=torch.bool)
        is_token[1, 2:] = False
        with _Made() as made:
            loss = token_loss(student, teacher, is_token)
            torch.autograd.grad(loss, student)
        elements = tokens * vocabulary
        assert sorted(size for size in made.sizes if size >= 2 * elements) == [2 * elements, 4 * elements]
        # The rest is scratch, whose blocks do not grow with the number of tokens.
        assert max(size for size in made.sizes if size < 2 * elements) <= 3 * 4 * 2**18
