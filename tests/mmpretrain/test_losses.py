"""The losses with OpenMMLab's keywords, against the paper's sums and by their refusals."""

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

import ikl_plugins.mmpretrain  # noqa: F401  # registers
from ikl_plugins.losses import LOSSES

KINDS = {"DKLLoss": "dkl", "IKLLoss": "ikl", "GKLLoss": "gkl"}
CORE_NAME = {"mean": "batchmean", "batchmean": "batchmean", "sum": "sum", "none": "none"}


def make(kind, **keywords):
    return MODELS.build({"type": kind, **keywords})


def logits(rows=5, classes=4, dtype=torch.float64):
    student = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    teacher = (2 * torch.randn(rows, classes, dtype=dtype)).requires_grad_()
    return student, teacher


# --- DKL, IKL, GKL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", CORE_NAME)
@pytest.mark.parametrize("name", KINDS)
def test_the_value_is_the_formula_times_the_weight(name, reduction):
    keywords = {"alpha": 2.0, "beta": 3.0, "temperature": 4.0}
    loss = make(name, reduction=reduction, loss_weight=0.5, **keywords)
    student, teacher = logits()
    value = loss(student, teacher)
    expected = oracles.decoupled(KINDS[name], student, teacher, **keywords)
    torch.testing.assert_close(value.detach(), 0.5 * expected.loss(CORE_NAME[reduction]))
    torch.testing.assert_close(sum(loss.last_terms), value.detach())  # the weight is in the terms as well
    value.sum().backward()
    total = "sum" if reduction == "none" else CORE_NAME[reduction]
    for got, gradient in zip((student.grad, teacher.grad), expected.gradients(total), strict=True):
        torch.testing.assert_close(got, 0.5 * gradient)


@pytest.mark.parametrize("name", KINDS)
def test_a_preset_is_that_of_the_core_and_keywords_go_before_it(name):
    for preset in ("start", "cifar10_adversarial"):
        loss, core = make(name, preset=preset, beta=7.0), LOSSES[name].preset(preset, beta=7.0)
        assert loss.settings() == core.settings()
        assert (loss.global_info, loss.num_classes) == (core.global_info, core.num_classes)
    with pytest.raises(ValueError, match="unknown preset `nothing`"):
        make(name, preset="nothing")


def test_the_class_prior_weighs_the_pairs_of_the_next_epoch():
    loss = make("IKLLoss", global_info=True, num_classes=4, loss_weight=2.0, weight_temperature=2.0)
    assert "loss_weight=2.0" in repr(loss)
    student, teacher = logits()
    targets = torch.tensor([0, 0, 3, 3, 3])
    loss(student, teacher, targets)
    loss.end_epoch()
    rows = torch.softmax(teacher.detach() / 2.0, 1)
    prior = torch.full((4, 4), 0.25, dtype=torch.float64)
    prior[0], prior[3] = rows[:2].mean(0), rows[2:].mean(0)
    expected = oracles.decoupled("ikl", student, teacher, class_prior=prior[targets]).loss("batchmean")
    torch.testing.assert_close(loss(student, teacher, targets).detach(), 2.0 * expected, rtol=1e-6, atol=0)
    assert loss.end_epoch() is None


# --- KL --------------------------------------------------------------------------------------------------------------


def kl_rows(student, teacher, temperature):
    """KL(teacher || student) of every row, summed class by class."""
    rows = []
    for s, t in zip((student / temperature).tolist(), (teacher / temperature).tolist(), strict=True):
        log_s = math.log(sum(math.exp(value) for value in s))
        log_t = math.log(sum(math.exp(value) for value in t))
        rows.append(sum(math.exp(b - log_t) * ((b - log_t) - (a - log_s)) for a, b in zip(s, t, strict=True)))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("reduction", "reduce"), [("mean", torch.mean), ("sum", torch.sum), ("none", torch.clone)])
def test_kl_is_its_formula(reduction, reduce, squared):
    student, teacher = logits()
    loss = make("KLLoss", temperature=4.0, scale_by_temperature_squared=squared, loss_weight=0.5, reduction=reduction)
    expected = reduce(kl_rows(student.detach(), teacher.detach(), 4.0)) * 0.5 * (16.0 if squared else 1.0)
    torch.testing.assert_close(loss(student, teacher).detach(), expected)


def test_kls_mean_is_torchs_batchmean_and_not_torchs_mean():
    student, teacher = logits()
    inputs = student.log_softmax(1), teacher.softmax(1)
    torch.testing.assert_close(make("KLLoss")(student, teacher), F.kl_div(*inputs, reduction="batchmean"))
    with pytest.raises(ValueError, match="`student_logits` and `teacher_logits` must"):
        make("KLLoss")(student, teacher[:, 1:])


def test_kls_gradient_reaches_both_sides_and_is_finite_where_probabilities_vanish():
    assert torch.autograd.gradcheck(make("KLLoss", temperature=2.0), logits(rows=3))
    student, teacher = (torch.tensor([[x, -x, 0.0]], requires_grad=True) for x in (1e4, -1e4))
    for gradient in torch.autograd.grad(make("KLLoss")(student, teacher), (student, teacher)):
        assert torch.isfinite(gradient).all()


def test_kl_over_places_is_the_mean_over_samples_and_places():
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    flat = [oracles.flatten_places(tensor) for tensor in (student, teacher)]
    torch.testing.assert_close(make("KLLoss")(student, teacher), kl_rows(*flat, 1.0).mean())
    assert make("KLLoss", reduction="none")(student, teacher).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*KINDS, "KLLoss"])
def test_half_precision_computes_in_float32(name, dtype):
    student, teacher = (tensor.detach().to(dtype) for tensor in logits())
    loss = make(name, loss_weight=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()))


def test_kl_has_the_interface_of_the_others():
    loss = make("KLLoss")
    student, teacher = logits()
    with_targets = loss(student, teacher, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(with_targets, loss(student, teacher))
    assert (loss.class_prior, loss.last_terms, loss.global_info, loss.end_epoch()) == (None, None, False, None)
    assert loss(student[:0], teacher[:0]).item() == 0.0
    assert "temperature=1.0" in repr(loss)


REFUSED = {
    **{
        f"{name} {what}": (name, keywords, error, message)
        for name in KINDS
        for what, keywords, error, message in (
            ("keyword", {"temprature": 4.0}, TypeError, r"`temprature`\. Did you mean `temperature`\? Known: alpha"),
            ("foreign keyword", {"avg_factor": 4.0}, TypeError, r"`avg_factor`.* Known: alpha, .*loss_weight"),
            ("reduction", {"reduction": "avg"}, ValueError, r"'mean', 'sum', 'none', got 'avg'"),
            ("weight", {"loss_weight": -1.0}, ValueError, r"`loss_weight` must be a finite number of at least 0"),
        )
    },
    "KL temperature": ("KLLoss", {"temperature": 0}, ValueError, r"`temperature` must be a finite number above 0"),
    "KL weight": ("KLLoss", {"loss_weight": float("nan")}, ValueError, r"`loss_weight` must be a finite number"),
    "KL reduction": ("KLLoss", {"reduction": "max"}, ValueError, r"'mean', 'sum', 'none', got 'max'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    name, keywords, error, message = REFUSED[case]
    with pytest.raises(error, match=rf"^{name}: .*{message}"):
        make(name, **keywords)


@pytest.mark.parametrize("observe", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
def test_whether_a_batch_is_observed_is_an_argument(observe, training):
    loss = make("IKLLoss", global_info=True, num_classes=4).train(training)
    loss(*logits(), torch.tensor([0, 0, 3, 3, 3]), observe=observe)
    assert (loss.class_prior.counts.sum() == 5) == (training if observe is None else observe)
