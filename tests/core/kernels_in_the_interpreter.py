"""The Triton kernels on CPU tensors, in Triton's interpreter, against the pairwise references.

``test_kernels.py`` runs this file in a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from ikl_plugins import IKLLoss, dkl_loss, gkl_loss, ikl_loss, kernels
from ikl_plugins._fused import fused_loss
from ikl_plugins.functional import gkl_settings
from ikl_plugins.kernels import _launch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_kernels.py runs this file"),
    # NumPy about infinities, with which the interpreter computes as a device does.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
USES: list[tuple[str, dict[str, float], bool]] = [
    *(("dkl", {"temperature": T}, False) for T in (1.0, 4.0)),
    *(("ikl", {"temperature": T, "weight_temperature": T2}, False) for T, T2 in ((1.0, 1.0), (3.0, 1.0), (1.0, 100.0))),
    ("ikl", {}, True),
    *(("gkl", {"gamma": g, "weight_temperature": T2}, False) for g in (0.0, 0.05, 1.0, 2.5) for T2 in (1.0, 4.0)),
    *(("gkl", {"gamma": g}, True) for g in (0.0, 0.3, 1.0, 2.5)),
]
# Shape, dtypes of student and teacher, reduction.
CALLS = [
    (shape, dtypes, reduction)
    for shape in ((4, 7), (3, 33), (2, 5, 3, 2))
    for dtypes in ((SINGLE, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (SINGLE, HALF))
    for reduction in ("batchmean", "sum", "none")
]


@pytest.fixture(autouse=True)
def served(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """CPU tensors served, and the sizes of the tensors that the kernels make; tiles of many classes or of few."""
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_DEVICE_TYPES", ("cpu",))
        # The interpreter cuts a bfloat16 off instead of rounding it.
        patch.setitem(oracles.TOLERANCES, torch.bfloat16, (8e-3, 5e-7))
        if getattr(request, "param", "") == "blocks of a row":
            patch.setattr(_launch, "_CLASSES_OF_A_TILE", 4)
            patch.setattr(_launch, "_CLASSES_OF_A_TILE_SIDE_BY_SIDE", 8)
        for name in ("empty", "empty_strided"):
            patch.setattr(_launch.torch, name, _noting(getattr(torch, name), made))
        yield made
    assert kernels.why_not(torch.device("cpu")) == ""


whole_and_in_blocks = pytest.mark.parametrize("served", ["whole rows", "blocks of a row"], indirect=True)


def _noting(function: Any, made: list[int]) -> Any:
    def noted(shape: tuple[int, ...], *arguments: Any, **settings: Any) -> Tensor:
        made.append(math.prod(shape))
        found: Tensor = function(shape, *arguments, **settings)
        return found

    return noted


def _logits(*shape: int, dtype: torch.dtype = SINGLE, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def _prior(*shape: int) -> Tensor:
    return torch.softmax(2.0 * torch.randn(*shape), 1)


def _compare(use: tuple[str, dict[str, float], bool], call: tuple[tuple[int, ...], Any, str]) -> None:
    (kind, settings, with_prior), (shape, dtypes, reduction) = use, call
    used: dict[str, Any] = {"class_prior": _prior(*shape[:2])} if with_prior else {}
    student, teacher = (_logits(*shape, dtype=dtype) for dtype in dtypes)
    oracles.assert_matches(
        LOSSES[kind], kind, student, teacher, reduction=reduction, alpha=1.5, beta=4.0, **settings, **used
    )


@whole_and_in_blocks
@pytest.mark.parametrize("number", range(len(USES)))
def test_a_part_of_the_grid(served: list[int], number: int) -> None:
    _compare(USES[number], CALLS[(7 * number) % len(CALLS)])
    assert served


@pytest.mark.slow
@whole_and_in_blocks
@pytest.mark.parametrize("number", range(len(USES)))
def test_the_whole_grid(served: list[int], number: int) -> None:
    for call in CALLS:
        _compare(USES[number], call)


@whole_and_in_blocks
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1), (1, 2), (7, 2), (2, 37), (65, 3), (1, 3, 1, 1), (3, 1, 4), (2, 19, 3)]
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    for use in (USES[3], USES[-3]):
        _compare(use, (shape, (SINGLE, SINGLE), "batchmean"))


@whole_and_in_blocks
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_extreme_logits(kind: str) -> None:
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    for scale, shape in ((1e3, (4, 9)), (1e4, (2, 9, 3))):
        student, teacher = _logits(*shape, scale=scale), _logits(*shape, scale=scale)
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, reduction="none", **settings)
        near = teacher + _logits(*shape, scale=1e-2)  # where exp(x - logsumexp) has no digits left
        oracles.assert_matches(LOSSES[kind], kind, near, teacher, reduction="none", **settings)


@whole_and_in_blocks
def test_zeros_of_the_prior() -> None:
    prior = _prior(4, 6)
    prior[0, 2:], prior[1], prior[2, :5] = 0.0, 0.0, 0.0
    student, teacher = _logits(4, 6), _logits(4, 6)
    for rows in (prior, torch.zeros(4, 6)):
        oracles.assert_matches(ikl_loss, "ikl", student, teacher, class_prior=rows)
        for gamma in (0.0, 1e-50, 0.5, 1.0):  # of which the second is 0 in float32
            oracles.assert_matches(gkl_loss, "gkl", student, teacher, class_prior=rows, gamma=gamma)
    oracles.assert_matches(gkl_loss, "gkl", student, teacher, gamma=1e-50)


@whole_and_in_blocks
@pytest.mark.parametrize(("classes", "gamma", "weights"), oracles.LARGE_GAMMAS[4:8])
def test_a_large_gamma(classes: int, gamma: float, weights: str) -> None:
    oracles.assert_gkl_of_a_large_gamma(gkl_loss, classes, gamma, weights)


@pytest.mark.parametrize("kind", oracles.KINDS)
@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"beta": 0.0}, {"alpha": 0.0, "beta": 0.0}], ids=str)
def test_a_weight_of_zero_removes_its_term(kind: str, weights: dict[str, float]) -> None:
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    oracles.assert_matches(LOSSES[kind], kind, _logits(4, 9), _logits(4, 9), **weights, **settings)


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_equal_logits_have_gradients_of_exactly_zero(kind: str) -> None:
    student = _logits(3, 50).requires_grad_()
    teacher = student.detach().clone().requires_grad_()
    LOSSES[kind](student, teacher, temperature=3.0).backward()
    assert student.grad is not None
    assert not student.grad.any()
    assert teacher.grad is not None
    assert not teacher.grad.any()


@whole_and_in_blocks
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("weights", [{}, {"alpha": 0.0}, {"beta": 0.0}], ids=str)
def test_infinities_and_nans_come_out_where_the_walk_has_them(weights: dict[str, float], gamma: float) -> None:
    plain = [1.0, 2.0, -1.0, 0.5, 1.5, 2.5]
    strange = [[1.0, 2.0, value, 0.5, 1.5, 2.5] for value in (-math.inf, math.inf, math.nan)]
    strange += [[-math.inf] * 6, [-math.inf] * 5 + [1.0]]
    pairs = list(itertools.product((plain, *strange), repeat=2))
    student, teacher = (torch.tensor(logits) for logits in zip(*pairs, strict=True))
    settings = gkl_settings(
        **{"alpha": 1.0, "beta": 1.0, **weights}, temperature=1.0, weight_temperature=2.0, gamma=gamma, reduction="none"
    )._replace(divide_by_pairs=False)  # by which one strange row would make all rows strange
    operator = kernels.operator()
    assert operator is not None
    loss, _, _, later = operator(student, teacher, None, settings, (True, True))
    expected, _, gradients = fused_loss(student, teacher, None, settings, (True, True), False)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for found, wanted in zip(later(student, teacher, None, torch.ones(())), gradients, strict=True):
        finite = wanted.isfinite()
        assert torch.equal(found.isfinite(), finite)
        torch.testing.assert_close(found[finite], wanted[finite])


# --- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda: _logits(7, 4).t(),
    "every second class": lambda: _logits(4, 14)[:, ::2],
    "every second sample": lambda: _logits(8, 7)[::2],
    "one row for all": lambda: _logits(1, 7).expand(4, 7),
    "channels last": lambda: _logits(2, 7, 3, 2).to(memory_format=torch.channels_last),
    "channels last, a part": lambda: _logits(4, 9, 3, 2).to(memory_format=torch.channels_last)[1:3, 1:8],
    "places swapped": lambda: _logits(2, 7, 2, 3).transpose(2, 3),
    "a window of the places": lambda: _logits(2, 7, 5, 2)[:, :, 1:4],
    "a window of the columns": lambda: _logits(2, 7, 3, 4)[..., 1:3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("served", "other"), [("whole rows", "same"), ("blocks of a row", "contiguous")], indirect=["served"]
)
def test_layouts(layout: str, other: str) -> None:
    student, teacher = LAYOUTS[layout](), LAYOUTS[layout]()
    if other == "contiguous":
        teacher = teacher.contiguous()
    priors = (_prior(*student.shape[:2]).t().contiguous().t(), _prior(*student.shape))
    for prior, one, two in ((None, student, teacher), (priors[0], teacher, student), (priors[1], student, teacher)):
        settings: dict[str, Any] = {} if prior is None else {"class_prior": prior}
        oracles.assert_matches(gkl_loss, "gkl", one, two, gamma=0.5, reduction="none", **settings)


def test_gradients_lie_in_memory_as_the_logits_do() -> None:
    for layout in ("channels last", "transposed"):
        student = LAYOUTS[layout]().requires_grad_()
        (gradient,) = torch.autograd.grad(ikl_loss(student, _logits(*student.shape)), student)
        assert gradient.stride() == student.stride()


# --- gradients ------------------------------------------------------------------------------------------------------


@whole_and_in_blocks
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_needs_a_gradient_gets_one(served: list[int], needs: tuple[bool, bool]) -> None:
    student, teacher = _logits(4, 50).requires_grad_(needs[0]), _logits(4, 50).requires_grad_(needs[1])
    expected = oracles.decoupled("ikl", student, teacher)
    loss = ikl_loss(student, teacher)
    oracles.assert_close(loss, expected.loss("batchmean"), SINGLE)
    assert max(served) < student.numel()
    if any(needs):
        loss.backward()
    for tensor, wanted in zip((student, teacher), expected.gradients("batchmean"), strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            oracles.assert_close(tensor.grad, wanted, SINGLE)
    assert sum(size >= student.numel() for size in served) == sum(needs)


def test_a_retained_graph_gives_the_same_again() -> None:
    student, teacher = _logits(4, 7).requires_grad_(), _logits(4, 7)
    loss = gkl_loss(student, teacher, gamma=0.5)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (attached,) = torch.autograd.grad(loss, student, create_graph=True)
    torch.testing.assert_close(attached.detach(), first)
    assert attached.requires_grad


def test_logits_that_change_before_the_backward_pass_are_noticed() -> None:
    student, teacher = _logits(4, 7).requires_grad_(), _logits(4, 7)
    loss = ikl_loss(student, teacher)
    teacher.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loss_scale_keeps_small_half_precision_gradients() -> None:
    student = torch.zeros(64, 64, dtype=HALF, requires_grad=True)
    teacher = 1e-3 * _logits(64, 64, dtype=HALF)
    (2.0**14 * ikl_loss(student, teacher)).backward()
    expected = oracles.decoupled("ikl", student.detach(), teacher).gradients("batchmean", 2.0**14)[0]
    assert expected.abs().max() / 2**14 < torch.finfo(HALF).tiny
    assert student.grad is not None
    oracles.assert_close(student.grad, expected, HALF)


def test_a_module_gives_its_terms_and_a_loss_that_may_be_changed() -> None:
    student, teacher = _logits(4, 7).requires_grad_(), _logits(4, 7)
    expected = oracles.decoupled("ikl", student, teacher)
    module = IKLLoss()
    loss = module(student, teacher)
    assert module.last_terms is not None
    oracles.assert_close(module.last_terms.weighted_mse, expected.weighted_mse.mean(), SINGLE)
    oracles.assert_close(module.last_terms.soft_cross_entropy, expected.cross_entropy.mean(), SINGLE)
    loss *= 2.0
    loss.backward()
    assert student.grad is not None
    oracles.assert_close(student.grad, expected.gradients("batchmean", 2.0)[0], SINGLE)
