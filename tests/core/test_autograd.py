"""The losses inside autograd: who gets a gradient, retained graphs, second derivatives, in-place edits, compilation."""

from __future__ import annotations

import shutil
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

import ikl_plugins._fused
from ikl_plugins import dkl_loss, gkl_loss, ikl_loss

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
REDUCTIONS = ("batchmean", "sum", "none")
# One call of each kind of path: settings, and whether a class prior comes with them.
USES = [
    ("dkl", {"temperature": 3.0}, False),
    ("ikl", {"weight_temperature": 4.0}, False),
    ("ikl", {"temperature": 2.0}, True),
    ("gkl", {"gamma": 0.3}, False),
    ("gkl", {"gamma": 0.3, "temperature": 2.0}, True),
]
every_use = pytest.mark.parametrize(
    ("kind", "settings", "with_prior"),
    USES,
    ids=[f"{kind}{'-prior' * with_prior}" for kind, _, with_prior in USES],
)


def _logits(*shape: int) -> Tensor:
    return 2.0 * torch.randn(*shape, dtype=torch.float64)


def _pair(*shape: int) -> tuple[Tensor, Tensor]:
    return _logits(*shape).requires_grad_(), _logits(*shape).requires_grad_()


def _prior(*shape: int) -> Tensor:
    return torch.softmax(_logits(*shape), 1)


def _bound(kind: str, settings: dict[str, Any], with_prior: bool, samples: int = 4, classes: int = 5) -> Any:
    """The loss with its settings filled in."""
    prior = {"class_prior": _prior(samples, classes)} if with_prior else {}

    def loss(student: Tensor, teacher: Tensor, **more: Any) -> Tensor:
        return LOSSES[kind](student, teacher, **{"alpha": 1.5, "beta": 3.0, **settings, **prior, **more})

    return loss


# --- who gets a gradient ---------------------------------------------------------------------------------------------


@every_use
def test_each_side_gets_the_same_gradient_alone_as_together(
    kind: str, settings: dict[str, Any], with_prior: bool
) -> None:
    loss = _bound(kind, settings, with_prior)
    student, teacher = _pair(4, 5)
    together = torch.autograd.grad(loss(student, teacher), (student, teacher))
    for asked in (0, 1):
        alone = [student.detach(), teacher.detach()]
        alone[asked].requires_grad_()
        value = loss(*alone)
        value.backward()
        assert alone[1 - asked].grad is None
        torch.testing.assert_close(alone[asked].grad, together[asked], rtol=1e-12, atol=1e-15)
    neither = loss(student.detach(), teacher.detach())
    assert not neither.requires_grad
    torch.testing.assert_close(neither, loss(student, teacher).detach(), rtol=1e-12, atol=0)


@every_use
def test_no_grad_builds_no_graph(kind: str, settings: dict[str, Any], with_prior: bool) -> None:
    loss = _bound(kind, settings, with_prior)
    student, teacher = _pair(4, 5)
    with torch.no_grad():
        value = loss(student, teacher)
    assert value.grad_fn is None
    torch.testing.assert_close(value, loss(student, teacher).detach(), rtol=1e-12, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(loss(student, teacher), value, rtol=1e-12, atol=0)


def test_a_class_prior_gets_no_gradient() -> None:
    student, teacher = _pair(4, 5)
    prior = _prior(4, 5).requires_grad_()
    gkl_loss(student, teacher, gamma=0.3, class_prior=prior).backward()
    assert prior.grad is None
    (gradient,) = torch.autograd.grad(ikl_loss(student, teacher, class_prior=prior), student, create_graph=True)
    gradient.sum().backward()
    assert prior.grad is None


def test_a_tensor_behind_both_sides_gets_both_gradients() -> None:
    logits = _logits(4, 5).requires_grad_()
    half = 0.5 * logits
    loss = gkl_loss(half, logits, gamma=0.3, alpha=2.0, beta=3.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = oracles.decoupled("gkl", half, logits, gamma=0.3, alpha=2.0, beta=3.0).gradients("batchmean")
    oracles.assert_close(gradient, 0.5 * expected[0] + expected[1], torch.float64)


@every_use
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_a_teacher_from_inference_mode_is_as_good_as_a_detached_one(
    kind: str, settings: dict[str, Any], with_prior: bool, shape: tuple[int, ...]
) -> None:
    student, teacher = _logits(*shape).requires_grad_(), _logits(*shape)
    prior = _prior(*shape[:2]) if with_prior else None

    def gradients(teacher: Tensor, prior: Tensor | None) -> list[Tensor]:
        loss = LOSSES[kind](student, teacher, **settings, **({} if prior is None else {"class_prior": prior}))
        return [
            torch.autograd.grad(loss, student, retain_graph=True, create_graph=create_graph)[0]
            for create_graph in (False, False, True)
        ]

    with torch.inference_mode():
        inference_teacher = teacher * 1.0
        inference_prior = None if prior is None else prior * 1.0
    torch.testing.assert_close(gradients(inference_teacher, inference_prior), gradients(teacher, prior))


# --- graphs that are used more than once -----------------------------------------------------------------------------


@every_use
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_a_retained_graph_gives_the_same_gradients_again(
    monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any], with_prior: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 15)
    student, teacher = _pair(*shape)
    loss = _bound(kind, settings, with_prior)(student, teacher)
    first, second, third = (
        torch.autograd.grad(loss, (student, teacher), torch.tensor(factor, dtype=torch.float64), retain_graph=True)
        for factor in (1.0, -2.0, 1.0)
    )
    torch.testing.assert_close(second, tuple(-2.0 * gradient for gradient in first), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(third, first, rtol=1e-12, atol=1e-15)


@every_use
def test_gradients_handed_out_are_not_changed_by_a_later_backward(
    kind: str, settings: dict[str, Any], with_prior: bool
) -> None:
    student, teacher = _pair(4, 5)
    loss = _bound(kind, settings, with_prior)(student, teacher)
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    loss.backward(torch.tensor(5.0, dtype=torch.float64))
    torch.testing.assert_close(list(first), copies, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["student", "teacher", "class_prior"])
def test_an_edit_in_place_before_backward_is_noticed(changed: str) -> None:
    tensors = {"student": _logits(4, 5).requires_grad_() * 1.0, "teacher": _logits(4, 5), "class_prior": _prior(4, 5)}
    loss = ikl_loss(tensors["student"], tensors["teacher"], class_prior=tensors["class_prior"])
    tensors[changed].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpointing_gives_the_same_gradient() -> None:
    student, teacher = _pair(4, 5)
    plain = torch.autograd.grad(gkl_loss(student, teacher, gamma=0.3), (student, teacher))
    recomputed = checkpoint(lambda s, t: gkl_loss(s, t, gamma=0.3), student, teacher, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed, (student, teacher)), plain)


# --- gradcheck -------------------------------------------------------------------------------------------------------
# Finite differences move everything, stop-gradients included. The checks below therefore hold fixed what the loss
# stops: the teacher (weights and soft labels), or the weights by a class prior and the soft labels by alpha = 0.


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_use
def test_gradcheck_of_the_student(
    kind: str, settings: dict[str, Any], with_prior: bool, reduction: str, shape: tuple[int, ...]
) -> None:
    if kind == "dkl":  # the student side of its weighted MSE is stopped: only the cross entropy is left
        settings = {**settings, "beta": 0.0}
    prior = {"class_prior": _prior(*shape[:2])} if with_prior else {}
    teacher = _logits(*shape)

    def loss(student: Tensor) -> Tensor:
        return LOSSES[kind](student, teacher, **{"alpha": 1.5, "beta": 3.0, **settings, **prior}, reduction=reduction)

    student = _logits(*shape).requires_grad_()
    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["ikl", "gkl"])
def test_gradcheck_of_both_sides_of_the_weighted_mse(kind: str, reduction: str, shape: tuple[int, ...]) -> None:
    settings: dict[str, Any] = {"gamma": 0.3} if kind == "gkl" else {}
    prior = _prior(*shape[:2])

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return LOSSES[kind](student, teacher, alpha=0.0, beta=3.0, class_prior=prior, reduction=reduction, **settings)

    assert torch.autograd.gradcheck(loss, _pair(*shape))
    assert torch.autograd.gradgradcheck(loss, _pair(*shape))


def test_gradcheck_can_fail() -> None:
    """The same check on a side that is stopped: its finite differences are not its gradient."""
    student = _logits(3, 4)
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda teacher: ikl_loss(student, teacher), _logits(3, 4).requires_grad_())


# --- the way that second derivatives take ----------------------------------------------------------------------------


@every_use
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_create_graph_gives_the_same_gradient(
    kind: str, settings: dict[str, Any], with_prior: bool, reduction: str, shape: tuple[int, ...]
) -> None:
    loss = _bound(kind, settings, with_prior)
    student, teacher = _pair(*shape)
    value = loss(student, teacher, reduction=reduction)
    upstream = torch.rand_like(value)
    plain = torch.autograd.grad(value, (student, teacher), upstream, retain_graph=True)
    attached = torch.autograd.grad(value, (student, teacher), upstream, create_graph=True)
    torch.testing.assert_close(attached, plain, rtol=1e-10, atol=1e-14)
    assert all(gradient.requires_grad for gradient in attached if gradient.count_nonzero())
    # And the plain way again, on the same graph.
    torch.testing.assert_close(torch.autograd.grad(value, (student, teacher), upstream), plain, rtol=1e-10, atol=1e-14)


@every_use
def test_create_graph_with_one_side(kind: str, settings: dict[str, Any], with_prior: bool) -> None:
    loss = _bound(kind, settings, with_prior)
    student, teacher = _pair(4, 5)
    for pair, asked in ((student, teacher.detach()), student), ((student.detach(), teacher), teacher):
        value = loss(*pair)
        (plain,) = torch.autograd.grad(value, asked, retain_graph=True)
        (attached,) = torch.autograd.grad(value, asked, create_graph=True)
        torch.testing.assert_close(attached, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shared", ["student from teacher", "teacher from student", "one source"])
@every_use
def test_create_graph_gives_the_same_gradient_when_the_logits_depend_on_each_other(
    kind: str, settings: dict[str, Any], with_prior: bool, shared: str
) -> None:
    """As they do when one network makes both: a residual head, a self-distillation, two views of one batch."""
    loss = _bound(kind, settings, with_prior)
    source = _logits(4, 5).requires_grad_()
    if shared == "student from teacher":
        teacher = 2.0 * source
        student = teacher.sin()
    elif shared == "teacher from student":
        student = 2.0 * source
        teacher = student.sin()
    else:
        student, teacher = source.sin(), 2.0 * source
    value = loss(student, teacher)
    (plain,) = torch.autograd.grad(value, source, retain_graph=True)
    (attached,) = torch.autograd.grad(value, source, create_graph=True)
    torch.testing.assert_close(attached, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_second_derivatives_have_their_closed_form(kind: str, with_prior: bool) -> None:
    """All four blocks, for one sample; with one sample GKL is IKL with weights that sum to 1."""
    if kind == "dkl" and with_prior:
        return
    student, teacher = _pair(1, 5)
    T, gamma = 2.0, 0.3
    prior = _prior(1, 5)
    weights = prior[0] if with_prior else torch.softmax(teacher.detach()[0] / (T if kind == "dkl" else 1.0), 0)
    settings: dict[str, Any] = {"class_prior": prior} if with_prior else {}
    if kind == "gkl":
        settings["gamma"] = gamma
        weights = weights**gamma / (weights**gamma).sum()
    loss = LOSSES[kind](student, teacher, alpha=1.5, beta=3.0, temperature=T, **settings)
    gradients = torch.autograd.grad(loss, (student, teacher), create_graph=True)

    def jacobian(gradient: Tensor, logits: Tensor) -> Tensor:
        rows = [
            torch.autograd.grad(entry, logits, retain_graph=True, allow_unused=True, materialize_grads=True)[0][0]
            for entry in gradient[0]
        ]
        return torch.stack(rows)

    in_student, teacher_in_student, in_teacher = oracles.second_derivatives(
        "dkl" if kind == "dkl" else "ikl", student.detach()[0], alpha=1.5, beta=3.0, temperature=T, weights=weights
    )
    oracles.assert_close(jacobian(gradients[0], student), in_student, torch.float64)
    oracles.assert_close(jacobian(gradients[1], student), teacher_in_student, torch.float64)
    oracles.assert_close(jacobian(gradients[0], teacher), teacher_in_student.T, torch.float64)
    oracles.assert_close(jacobian(gradients[1], teacher), in_teacher, torch.float64)


def test_the_upstream_gradient_is_differentiable() -> None:
    student, teacher = _pair(4, 5)
    upstream = torch.rand(4, dtype=torch.float64, requires_grad=True)
    loss = ikl_loss(student, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
    (back,) = torch.autograd.grad(gradient.sum(), upstream)
    torch.testing.assert_close(back, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)  # rows sum to 0
    (gradient,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
    (back,) = torch.autograd.grad(gradient[:, 0].sum(), upstream)
    oracles.assert_close(back, oracles.decoupled("ikl", student, teacher).student_gradient[:, 0], torch.float64)


# --- compilation -----------------------------------------------------------------------------------------------------

# torch's own compiler code still uses a part of torch that is deprecated.
compiler_warnings = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::DeprecationWarning")


def _compiled_like_eager(kind: str, backend: str, settings: dict[str, Any], *shape: int, with_prior: bool) -> None:
    def loss(student: Tensor, teacher: Tensor, prior: Tensor | None) -> Tensor:
        more = {} if prior is None else {"class_prior": prior}
        return LOSSES[kind](student, teacher, **settings, **more, reduction="none")

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    student, teacher = _pair(*shape)
    prior = _prior(*shape[:2]) if with_prior else None
    values = [run(student, teacher, prior) for run in (compiled, loss)]
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-13)
    upstream = torch.rand_like(values[0])
    gradients = [torch.autograd.grad(value, (student, teacher), upstream) for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
    torch.set_flush_denormal(False)  # what older releases of torch compile turns it on for the whole process


@compiler_warnings
@every_use
def test_compiled_without_a_break_gives_the_same_numbers(kind: str, settings: dict[str, Any], with_prior: bool) -> None:
    _compiled_like_eager(kind, "aot_eager", settings, 2, 3, 4, with_prior=with_prior)


@every_use
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 1), (0, 5)], ids=str)
def test_what_is_compiled_gives_the_same_numbers_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any],
    with_prior: bool,
    reduction: str,
    shape: tuple[int, ...],
) -> None:
    """The way that compilation takes, run as plain code: cheap enough for every case."""
    loss = _bound(kind, settings, with_prior, *shape[:2])
    student, teacher = _pair(*shape)
    fused = loss(student, teacher, reduction=reduction)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    composed = loss(student, teacher, reduction=reduction)
    assert type(composed.grad_fn) is not type(fused.grad_fn)
    torch.testing.assert_close(composed, fused, rtol=1e-10, atol=1e-14)
    gradients = [torch.autograd.grad(value.sum(), (student, teacher)) for value in (composed, fused)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@compiler_warnings
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_numbers() -> None:
    _compiled_like_eager("gkl", "inductor", {"gamma": 0.3}, 4, 5, with_prior=True)


# --- settings of torch -----------------------------------------------------------------------------------------------


def test_a_lower_matmul_precision_does_not_hurt() -> None:
    """The sums over classes are no matrix products."""
    student, teacher = 3 * torch.randn(8, 300), 3 * torch.randn(8, 300)
    high = ikl_loss(student.double(), teacher.double(), reduction="none")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        low = ikl_loss(student, teacher, reduction="none")
    finally:
        torch.set_float32_matmul_precision(before)
    assert float(((low - high).abs() / high).max()) < 1e-5


def test_a_prior_of_the_logits_own_shape_has_the_second_derivatives_of_its_rows() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind(0)
    student.requires_grad_()
    rows = torch.softmax(torch.randn(2, 3, dtype=torch.float64), 1)
    found = []
    for prior in (rows, rows[:, :, None].expand(2, 3, 4)):
        (first,) = torch.autograd.grad(ikl_loss(student, teacher, class_prior=prior), student, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), student)
    torch.testing.assert_close(*found)
