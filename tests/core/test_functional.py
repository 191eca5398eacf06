"""The loss functions against the pairwise references: values, gradients, layouts, closed cases, blocks of rows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ikl_plugins._fused
from ikl_plugins import dkl_loss, gkl_loss, ikl_loss

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
REDUCTIONS = ("batchmean", "sum", "none")
GAMMAS = (0.0, 0.05, 0.3, 1.0)
WEIGHT_TEMPERATURES = (1.0, 4.0, 100.0)

# What distinguishes one use of a loss from another, apart from shape and reduction: kind, settings, with a class prior.
USES = [
    *(("dkl", {"temperature": T}, False) for T in (1.0, 4.0)),
    *(("ikl", {"weight_temperature": T2}, False) for T2 in WEIGHT_TEMPERATURES),
    ("ikl", {}, True),
    *(
        ("gkl", {"gamma": gamma, "weight_temperature": T2}, False)
        for gamma, T2 in itertools.product(GAMMAS, WEIGHT_TEMPERATURES)
    ),
    *(("gkl", {"gamma": gamma}, True) for gamma in GAMMAS),
]


def _name(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{key}={entry:g}" for key, entry in value.items()) or "defaults"
    return None


every_use = pytest.mark.parametrize(("kind", "settings", "with_prior"), USES, ids=_name)


def _logits(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def _prior(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.softmax(2.0 * torch.randn(*shape, dtype=torch.float64), 1).to(dtype)


# --- the references themselves ---------------------------------------------------------------------------------------


@every_use
def test_the_two_references_agree(kind: str, settings: dict[str, float], with_prior: bool) -> None:
    student, teacher = _logits(4, 6), _logits(4, 6)
    prior = _prior(4, 6) if with_prior else None
    both = [
        reference(kind, student, teacher, alpha=1.5, beta=0.5, class_prior=prior, **settings)
        for reference in (oracles.decoupled, oracles.decoupled_loops)
    ]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_comparison_notices_an_error_of_two_tolerances() -> None:
    expected = torch.tensor([[1.0, 0.5], [1e-3, 2e-3]], dtype=torch.float64)
    for dtype, (relative, absolute) in oracles.TOLERANCES.items():
        oracles.assert_close(expected * (1 + 0.5 * relative), expected, dtype, size=1.0)
        with pytest.raises(AssertionError, match="is allowed for"):
            oracles.assert_close(expected * (1 + 2 * relative) + 2 * absolute, expected, dtype, size=1.0)
        with pytest.raises(AssertionError, match="is allowed for"):
            oracles.assert_close(expected * float("nan"), expected, dtype)


# --- values and gradients --------------------------------------------------------------------------------------------


@every_use
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_shapes_match_the_loops(kind: str, settings: dict[str, float], with_prior: bool, reduction: str) -> None:
    for shape, alpha, beta in (((1, 1), 1.0, 1.0), ((5, 2), 3.0, 12.0), ((4, 7), 1.0, 0.5)):
        prior = _prior(*shape) if with_prior else None
        used: dict[str, Any] = {**settings, **({"class_prior": prior} if with_prior else {})}
        for temperature in (1.0, 4.0) if kind != "dkl" else (settings["temperature"],):
            oracles.assert_matches(
                LOSSES[kind],
                kind,
                _logits(*shape),
                _logits(*shape),
                reference=oracles.decoupled_loops,
                reduction=reduction,
                **{**used, "alpha": alpha, "beta": beta, "temperature": temperature},
            )


@every_use
def test_a_thousand_classes_match_the_pair_tables(kind: str, settings: dict[str, float], with_prior: bool) -> None:
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(2, 1000)} if with_prior else {})}
    oracles.assert_matches(LOSSES[kind], kind, _logits(2, 1000), _logits(2, 1000), beta=4.0, **used)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_match_the_pair_tables(seed: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples, classes = (int(torch.randint(1, top, (), generator=generator)) for top in (9, 400))
    for kind, settings, with_prior in USES[seed::6]:
        used: dict[str, Any] = {**settings, **({"class_prior": _prior(samples, classes)} if with_prior else {})}
        student, teacher = _logits(samples, classes), _logits(samples, classes)
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, reduction=reduction, **used)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_dkl_has_the_gradients_of_kl(temperature: float) -> None:
    """Theorem 1, against autograd of torch's own KL divergence."""
    student, teacher = _logits(6, 11).requires_grad_(), _logits(6, 11).requires_grad_()
    kl = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    ours = torch.autograd.grad(dkl_loss(student, teacher, temperature=temperature), (student, teacher))
    for gradient, expected in zip(ours, torch.autograd.grad(kl, (student, teacher)), strict=True):
        oracles.assert_close(gradient, expected, torch.float64)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gkl_with_gamma_one_is_ikl(reduction: str, with_prior: bool) -> None:
    student, teacher = _logits(5, 9).requires_grad_(), _logits(5, 9).requires_grad_()
    settings: dict[str, Any] = {"alpha": 2.0, "beta": 8.0, "weight_temperature": 4.0, "reduction": reduction}
    settings["class_prior"] = _prior(5, 9) if with_prior else None
    losses = gkl_loss(student, teacher, gamma=1.0, **settings), ikl_loss(student, teacher, **settings)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss.sum(), (student, teacher)) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_gkl_normalises_a_prior_that_does_not_sum_to_one() -> None:
    """With gamma = 1 and rows of another mass, GKL still divides by the pair weights; IKL does not."""
    student, teacher = _logits(3, 4), _logits(3, 4)
    prior = torch.rand(3, 4, dtype=torch.float64)
    oracles.assert_matches(gkl_loss, "gkl", student, teacher, class_prior=prior)
    oracles.assert_matches(ikl_loss, "ikl", student, teacher, class_prior=prior)
    scaled = gkl_loss(student, teacher, class_prior=7.0 * prior)
    torch.testing.assert_close(scaled, gkl_loss(student, teacher, class_prior=prior))


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_reductions_are_the_mean_and_the_sum_of_the_values(kind: str) -> None:
    student, teacher = _logits(3, 5, 4), _logits(3, 5, 4)
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    values, total, mean = (
        LOSSES[kind](student, teacher, reduction=reduction, **settings) for reduction in ("none", "sum", "batchmean")
    )
    assert values.shape == (3, 4)
    torch.testing.assert_close(values.sum(), total)
    torch.testing.assert_close(values.mean(), mean)


@pytest.mark.parametrize("kind", oracles.KINDS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
def test_a_weight_of_zero_removes_its_term(kind: str, alpha: float, beta: float) -> None:
    settings = {"gamma": 0.3} if kind == "gkl" else {}
    student, teacher = _logits(4, 5), _logits(4, 5)
    oracles.assert_matches(LOSSES[kind], kind, student, teacher, alpha=alpha, beta=beta, **settings)


# --- closed cases ----------------------------------------------------------------------------------------------------


def test_gamma_zero_gives_half_the_population_variance() -> None:
    student, teacher = _logits(6, 31), _logits(6, 31)
    difference = teacher - student
    loss = gkl_loss(student, teacher, alpha=0.0, gamma=0.0, reduction="none")
    torch.testing.assert_close(loss, 0.5 * difference.var(1, correction=0), rtol=1e-12, atol=0)
    # Neither the prior nor its temperature matters then.
    with_prior = gkl_loss(student, teacher, alpha=0.0, gamma=0.0, reduction="none", class_prior=_prior(6, 31))
    torch.testing.assert_close(with_prior, loss, rtol=1e-12, atol=0)
    at_other_temperature = gkl_loss(student, teacher, alpha=0.0, gamma=0.0, reduction="none", weight_temperature=4.0)
    torch.testing.assert_close(at_other_temperature, loss, rtol=1e-12, atol=0)


def test_uniform_weights_give_half_the_population_variance_in_ikl() -> None:
    student, teacher = _logits(6, 31), _logits(6, 31)
    uniform = torch.full((6, 31), 1 / 31, dtype=torch.float64)
    loss = ikl_loss(student, teacher, alpha=0.0, class_prior=uniform, reduction="none")
    torch.testing.assert_close(loss, 0.5 * (teacher - student).var(1, correction=0), rtol=1e-12, atol=0)


def test_two_classes_by_hand() -> None:
    """d = (0, 3), w = (1/4, 3/4): E = 2 * 1/4 * 3/16 * 9 = 27/32; H = log 2 for a uniform student."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    prior = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    weighted_mse = ikl_loss(student, teacher, alpha=0.0, class_prior=prior)
    cross_entropy = ikl_loss(student, teacher, beta=0.0, class_prior=prior)
    torch.testing.assert_close(weighted_mse.item(), 27 / 32)
    torch.testing.assert_close(cross_entropy.item(), math.log(2.0))


@every_use
def test_a_shift_of_the_logits_changes_nothing(kind: str, settings: dict[str, float], with_prior: bool) -> None:
    student, teacher = _logits(4, 6).requires_grad_(), _logits(4, 6).requires_grad_()
    shifts = 10 * torch.randn(2, 4, 1, dtype=torch.float64)
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(4, 6)} if with_prior else {})}
    plain = LOSSES[kind](student, teacher, **used)
    shifted = LOSSES[kind](student + shifts[0], teacher + shifts[1], **used)
    torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=0)
    for one, other in zip(
        torch.autograd.grad(plain, (student, teacher)), torch.autograd.grad(shifted, (student, teacher)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        # Its differential form: the gradient of every sample sums to 0.
        torch.testing.assert_close(one.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


@every_use
def test_the_order_of_classes_and_samples_does_not_matter(
    kind: str, settings: dict[str, float], with_prior: bool
) -> None:
    student, teacher, prior = _logits(5, 6), _logits(5, 6), _prior(5, 6)
    classes, samples = torch.randperm(6), torch.randperm(5)

    def values(order_of_classes: Tensor, order_of_samples: Tensor) -> Tensor:
        tensors = [x[order_of_samples][:, order_of_classes] for x in (student, teacher, prior)]
        used: dict[str, Any] = {**settings, **({"class_prior": tensors[2]} if with_prior else {})}
        return LOSSES[kind](*tensors[:2], reduction="none", **used)

    plain = values(torch.arange(6), torch.arange(5))
    torch.testing.assert_close(values(classes, torch.arange(5)), plain, rtol=1e-10, atol=0)
    torch.testing.assert_close(values(torch.arange(6), samples), plain[samples], rtol=1e-10, atol=0)


def test_equal_logits_leave_the_entropy_of_the_teacher() -> None:
    logits = _logits(4, 6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    for loss in (dkl_loss, ikl_loss, gkl_loss):
        torch.testing.assert_close(loss(logits, logits, reduction="none"), entropy)


# --- layouts ---------------------------------------------------------------------------------------------------------


@every_use
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 3, 5), (2, 3, 2, 1, 3)], ids=str)
def test_dense_logits_match_their_flattening(
    kind: str, settings: dict[str, float], with_prior: bool, shape: tuple[int, ...]
) -> None:
    student, teacher = _logits(*shape), _logits(*shape)
    priors: list[dict[str, Any]] = [{}]
    if with_prior:  # one row per sample, or one per place
        priors = [{"class_prior": _prior(*shape[:2])}, {"class_prior": _prior(*shape)}]
    for prior in priors:
        for reduction in REDUCTIONS:
            oracles.assert_matches(LOSSES[kind], kind, student, teacher, reduction=reduction, **settings, **prior)


def _laid_out(dense: Tensor, layout: str) -> Tensor:
    """The same (N, C, H, W) numbers with other strides."""
    if layout == "channels_last":
        return dense.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "every second":
        wide = dense.new_full([2 * size for size in dense.shape], float("nan"))
        wide[::2, ::2, ::2, ::2] = dense
        return wide[::2, ::2, ::2, ::2]
    return dense.flip(3).contiguous().flip(3)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every second", "flipped"])
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_strides_do_not_matter(kind: str, layout: str) -> None:
    dense = [_logits(2, 5, 3, 4) for _ in range(3)]
    student, teacher, prior = (_laid_out(x, layout) for x in (*dense[:2], torch.softmax(dense[2], 1)))
    settings: dict[str, Any] = {"gamma": 0.3} if kind == "gkl" else {}
    oracles.assert_matches(LOSSES[kind], kind, student, teacher, **settings)
    oracles.assert_matches(LOSSES[kind], kind, student[..., 1, 2], teacher[..., 1, 2], **settings)
    if kind != "dkl":
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, class_prior=prior, **settings)
        oracles.assert_matches(
            LOSSES[kind], kind, student[..., 1, 2], teacher[..., 1, 2], class_prior=prior[..., 0, 0], **settings
        )


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_expanded_inputs(kind: str) -> None:
    settings: dict[str, Any] = {"gamma": 0.3} if kind == "gkl" else {}
    row = _logits(1, 5)
    oracles.assert_matches(LOSSES[kind], kind, row.expand(4, 5), _logits(4, 5), **settings)
    oracles.assert_matches(LOSSES[kind], kind, _logits(4, 5), row.expand(4, 5), **settings)
    places = _logits(3, 5, 1)
    oracles.assert_matches(LOSSES[kind], kind, places.expand(3, 5, 6), _logits(3, 5, 6), **settings)
    if kind != "dkl":
        prior = _prior(1, 5).expand(4, 5)
        oracles.assert_matches(LOSSES[kind], kind, _logits(4, 5), _logits(4, 5), class_prior=prior, **settings)


def test_gradients_reach_what_an_expanded_input_came_from() -> None:
    row = _logits(1, 5).requires_grad_()
    teacher = _logits(4, 5)
    ikl_loss(row.expand(4, 5), teacher, reduction="sum").backward()
    expected = oracles.decoupled("ikl", row.expand(4, 5), teacher).student_gradient.sum(0, keepdim=True)
    oracles.assert_close(row.grad, expected, torch.float64)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_an_empty_batch_gives_zero(kind: str, shape: tuple[int, ...], reduction: str) -> None:
    for settings in ({}, {"gamma": 0.3}, {"gamma": 0.3, "class_prior": torch.full(shape[:2], 1 / 3)}):
        if settings and kind != "gkl":
            continue
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        loss = LOSSES[kind](student, teacher, reduction=reduction, **settings)
        assert loss.shape == ((shape[0], *shape[2:]) if reduction == "none" else ())
        assert loss.sum().item() == 0.0
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.shape == teacher.grad.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_one_class_gives_zero(kind: str, reduction: str) -> None:
    student, teacher = _logits(3, 1).requires_grad_(), _logits(3, 1).requires_grad_()
    loss = LOSSES[kind](student, teacher, reduction=reduction)
    assert torch.count_nonzero(loss) == 0
    loss.sum().backward()
    assert torch.count_nonzero(student.grad) == torch.count_nonzero(teacher.grad) == 0


def test_meta_tensors_give_the_shape() -> None:
    """Shape inference without data, and the way of devices other than the CPU: nothing waits for a number."""
    student, teacher = (torch.empty(3, 5, 4, device="meta", requires_grad=True) for _ in range(2))
    for loss_function in LOSSES.values():
        loss = loss_function(student, teacher, reduction="none")
        assert loss.shape == (3, 4)
        gradients = torch.autograd.grad(loss.sum(), (student, teacher))
        assert [gradient.shape for gradient in gradients] == [student.shape, teacher.shape]
    prior = torch.empty(3, 5, device="meta")
    (gradient,) = torch.autograd.grad(gkl_loss(student, teacher, gamma=0.3, class_prior=prior), student)
    assert gradient.shape == student.shape


# --- blocks of rows --------------------------------------------------------------------------------------------------


@every_use
@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 6])
def test_blocks_of_rows_do_not_show(
    monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, float], with_prior: bool, rows_per_block: int
) -> None:
    """Seven rows of five classes: several blocks, the last one partial."""
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 5 * rows_per_block + 1)
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(7, 5)} if with_prior else {})}
    for reduction in REDUCTIONS:
        oracles.assert_matches(LOSSES[kind], kind, _logits(7, 5), _logits(7, 5), reduction=reduction, **used)


@every_use
@pytest.mark.parametrize("rows_per_block", [1, 3, 6, 7, 13])
def test_blocks_of_places_do_not_show(
    monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, float], with_prior: bool, rows_per_block: int
) -> None:
    """Three samples of six places: blocks inside a sample, of one sample and of two, each with a partial one."""
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 5 * rows_per_block)
    student, teacher = _logits(3, 5, 2, 3), _logits(3, 5, 2, 3)
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(3, 5)} if with_prior else {})}
    for reduction in REDUCTIONS:
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, reduction=reduction, **used)


def test_a_row_larger_than_a_block_is_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 1)
    oracles.assert_matches(gkl_loss, "gkl", _logits(4, 50), _logits(4, 50), gamma=0.3)
    oracles.assert_matches(gkl_loss, "gkl", _logits(2, 5, 3), _logits(2, 5, 3), gamma=0.3)


@every_use
def test_the_shipped_block_size_with_two_threads(
    monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, float], with_prior: bool
) -> None:
    """Large enough for several blocks as they are, and for torch to share a block's work among threads."""
    limit = ikl_plugins._fused._BLOCK_ELEMENTS_CPU
    shape = (2 * limit // 1000 + 7, 1000)
    student, teacher = (_logits(*shape).requires_grad_() for _ in range(2))
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(*shape)} if with_prior else {})}
    results = []
    for threads, elements in ((2, limit), (1, 2**40)):
        monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", elements)
        torch.set_num_threads(threads)
        try:
            loss = LOSSES[kind](student, teacher, **used)
            results.append((loss, *torch.autograd.grad(loss, (student, teacher))))
        finally:
            torch.set_num_threads(1)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-15)


class _LargestResult(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation made; views of its operands do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands, results = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result)
        )
        known = {x.untyped_storage().data_ptr() for x in operands}
        made = [x.numel() for x in results if x.untyped_storage().data_ptr() not in known]
        self.elements = max([self.elements, *made])
        return result


@every_use
@pytest.mark.parametrize("create_graph", [False, True])
def test_nothing_larger_than_the_logits_is_made(
    kind: str, settings: dict[str, float], with_prior: bool, create_graph: bool
) -> None:
    """No table of pairs, whichever way the gradient takes."""
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(3, 50)} if with_prior else {})}
    student, teacher = _logits(3, 50).requires_grad_(), _logits(3, 50).requires_grad_()
    with _LargestResult() as largest:
        loss = LOSSES[kind](student, teacher, **used)
        torch.autograd.grad(loss, (student, teacher), create_graph=create_graph)
    assert 3 * 50 <= largest.elements <= 3 * 3 * 50  # three blocks of scratch may come in one piece


@every_use
def test_without_gradients_nothing_larger_than_the_scratch_is_made(
    monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, float], with_prior: bool
) -> None:
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 4 * 5)
    used: dict[str, Any] = {**settings, **({"class_prior": _prior(30, 5)} if with_prior else {})}
    student, teacher = _logits(30, 5).requires_grad_(), _logits(30, 5).requires_grad_()
    with torch.no_grad(), _LargestResult() as largest:
        LOSSES[kind](student, teacher, **used)
    assert largest.elements <= 3 * 4 * 5
    with _LargestResult() as largest:
        LOSSES[kind](student, teacher.detach(), **used)
    assert largest.elements == 30 * 5


def test_blocks_bound_the_size_of_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk really is one: no call of softmax sees more rows than a block holds."""
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 4 * 5)
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.softmax:
                seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Spy():
        ikl_loss(_logits(10, 5), _logits(10, 5))
    assert max(seen) == 4


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_row_without_numbers_is_not_hidden_by_the_batch_s_divisor(gamma: float) -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    teacher[1, 2] = math.nan
    values = gkl_loss(student, teacher, gamma=gamma, reduction="none")
    assert values[1].isnan()
    if gamma != 1.0:  # the sum of all pair weights is in every row
        assert values.isnan().all()
