"""The loss modules: equal to the functions, and what they add: settings, the class prior, the last terms."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

import ikl_plugins._fused
from ikl_plugins import ClassPrior, DKLLoss, GKLLoss, IKLLoss, LossTerms, _validation, dkl_loss, gkl_loss, ikl_loss
from ikl_plugins.losses import warmup_factor

MODULES: dict[str, Any] = {"dkl": DKLLoss, "ikl": IKLLoss, "gkl": GKLLoss}
FUNCTIONS: dict[str, Any] = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
REDUCTIONS = ("batchmean", "sum", "none")
# No value is a default, and no two are equal: a setting that is dropped or swapped changes the loss.
SETTINGS: dict[str, dict[str, float]] = {
    "dkl": {"alpha": 1.5, "beta": 3.0, "temperature": 2.0},
    "ikl": {"alpha": 1.5, "beta": 3.0, "temperature": 2.0, "weight_temperature": 5.0},
    "gkl": {"alpha": 1.5, "beta": 3.0, "temperature": 2.0, "weight_temperature": 5.0, "gamma": 0.3},
}
every_kind = pytest.mark.parametrize("kind", oracles.KINDS)
with_a_prior = pytest.mark.parametrize("kind", ["ikl", "gkl"])


def _batch(samples: int = 6, classes: int = 5, *places: int) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (2.0 * torch.randn(samples, classes, *places, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_(), torch.randint(classes, (samples, *places))


def _same_state(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# --- the function inside ---------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("places", [(), (3,)], ids=str)
def test_module_is_the_function(kind: str, reduction: str, places: tuple[int, ...]) -> None:
    student, teacher, targets = _batch(6, 5, *places)
    module = MODULES[kind](**SETTINGS[kind], reduction=reduction)
    expected = FUNCTIONS[kind](student, teacher, **SETTINGS[kind], reduction=reduction)
    for arguments in ((student, teacher), (student, teacher, targets)):
        loss = module(*arguments)
        assert torch.equal(loss, expected)
        gradients = [torch.autograd.grad(x.sum(), (student, teacher), retain_graph=True) for x in (loss, expected)]
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)
    assert module.class_prior is None
    assert list(module.state_dict()) == []


@every_kind
def test_module_matches_the_pair_tables(kind: str) -> None:
    def loss(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        result: Tensor = MODULES[kind](**SETTINGS[kind], reduction=reduction)(student, teacher)
        return result

    student, teacher, _ = _batch()
    expected = oracles.decoupled(kind, student, teacher, **SETTINGS[kind])
    for reduction in REDUCTIONS:
        oracles.assert_close(loss(student, teacher, reduction=reduction), expected.loss(reduction), torch.float64)


@every_kind
def test_module_has_the_keywords_and_defaults_of_the_function(kind: str) -> None:
    of_function = inspect.signature(FUNCTIONS[kind]).parameters
    of_module = inspect.signature(MODULES[kind]).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in of_module.values())
    own = set(of_module) - set(of_function)
    assert own == {"global_info", "num_classes"}
    assert set(of_function) - set(of_module) <= {"student_logits", "teacher_logits", "class_prior"}
    for name in set(of_module) - own:
        assert of_module[name].default == of_function[name].default, name


@every_kind
def test_settings_may_be_changed_between_calls(kind: str) -> None:
    student, teacher, _ = _batch()
    module = MODULES[kind](**SETTINGS[kind])
    module.beta = 7.0
    assert torch.equal(module(student, teacher), FUNCTIONS[kind](student, teacher, **{**SETTINGS[kind], "beta": 7.0}))


@every_kind
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_last_terms_are_detached_and_sum_to_the_loss(kind: str, reduction: str) -> None:
    student, teacher, _ = _batch(6, 5, 2)
    module = MODULES[kind](**SETTINGS[kind], reduction=reduction)
    assert module.last_terms is None
    loss = module(student, teacher)
    terms = module.last_terms
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close(terms.weighted_mse + terms.soft_cross_entropy, loss.detach())
    expected = oracles.decoupled(
        kind, oracles.flatten_places(student), oracles.flatten_places(teacher), **SETTINGS[kind]
    )
    divisor = 12 if reduction == "batchmean" else 1
    for term, values in ((terms[0], expected.weighted_mse), (terms[1], expected.cross_entropy)):
        assert not term.requires_grad
        assert term.shape == loss.shape
        oracles.assert_close(term.sum(), values.sum() / divisor, torch.float64)
    loss.sum().backward()  # the terms are no second root of the graph
    module(student, teacher)
    assert module.last_terms is not terms


@every_kind
def test_last_terms_are_detached_on_the_way_of_compilation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, _ = _batch()
    module = MODULES[kind](**SETTINGS[kind])
    module(student, teacher)
    fused = module.last_terms
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module(student, teacher)
    assert not any(term.requires_grad for term in module.last_terms)
    torch.testing.assert_close(list(module.last_terms), list(fused), rtol=1e-10, atol=0)


@every_kind
def test_last_terms_are_zero_for_a_weight_of_zero(kind: str) -> None:
    student, teacher, _ = _batch()
    module = MODULES[kind](alpha=0.0)
    module(student, teacher)
    assert module.last_terms.soft_cross_entropy == 0
    assert module.last_terms.weighted_mse > 0
    module = MODULES[kind](beta=0.0)
    module(student, teacher)
    assert module.last_terms.weighted_mse == 0
    assert module.last_terms.soft_cross_entropy > 0


# --- the class prior -------------------------------------------------------------------------------------------------


@with_a_prior
@pytest.mark.parametrize("places", [(), (3,)], ids=str)
def test_global_info_uses_the_rows_of_the_targets(kind: str, places: tuple[int, ...]) -> None:
    module = MODULES[kind](**SETTINGS[kind], global_info=True, num_classes=5)
    matrix = torch.softmax(torch.randn(5, 5), 1)
    module.class_prior.matrix.copy_(matrix)
    student, teacher, targets = _batch(6, 5, *places)
    loss = module(student, teacher, targets)
    rows = matrix.double()[targets].movedim(-1, 1)
    flat = [oracles.flatten_places(x) for x in (student, teacher, rows)]
    settings = {**SETTINGS[kind], "class_prior": flat[2]}
    expected = oracles.decoupled(kind, flat[0], flat[1], **settings)  # type: ignore[arg-type]
    oracles.assert_close(loss, expected.loss("batchmean"), torch.float64)
    gradients = torch.autograd.grad(loss, (student, teacher))
    for gradient, wanted in zip(gradients, expected.gradients("batchmean"), strict=True):
        oracles.assert_close(oracles.flatten_places(gradient), wanted, torch.float64)


@with_a_prior
def test_two_epochs_by_hand(kind: str) -> None:
    """Uniform weights in the first epoch; in the second the mean of the first one's tempered teacher predictions."""
    module = MODULES[kind](**SETTINGS[kind], global_info=True, num_classes=5)
    batches = [_batch() for _ in range(3)]
    for student, teacher, targets in batches:
        expected = oracles.decoupled(
            kind, student, teacher, **SETTINGS[kind], class_prior=torch.full((6, 5), 0.2, dtype=torch.float64)
        )
        oracles.assert_close(module(student, teacher, targets), expected.loss("batchmean"), torch.float32)
    module.end_epoch()

    sums: dict[int, list[Tensor]] = {label: [] for label in range(5)}
    for _, teacher, targets in batches:
        for row, label in zip(teacher, targets.tolist(), strict=True):
            sums[label].append(oracles.softmax(row.detach(), SETTINGS[kind]["weight_temperature"]))
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    means = torch.stack([torch.stack(rows).mean(0) if rows else uniform for rows in sums.values()])
    torch.testing.assert_close(module.class_prior.matrix.double(), means, rtol=1e-5, atol=1e-7)
    student, teacher, targets = _batch()
    expected = oracles.decoupled(kind, student, teacher, **SETTINGS[kind], class_prior=means[targets])
    oracles.assert_close(module(student, teacher, targets), expected.loss("batchmean"), torch.float32)


@with_a_prior
def test_training_observes_and_evaluation_does_not(kind: str) -> None:
    module = MODULES[kind](global_info=True, num_classes=5)
    batch = _batch()
    module.eval()
    module(*batch)
    assert module.class_prior.counts.sum() == 0
    assert torch.count_nonzero(module.class_prior.sums) == 0
    module.train()
    module(*batch)
    assert torch.equal(module.class_prior.counts, torch.bincount(batch[2], minlength=5))
    with torch.no_grad():
        module(*batch)
    assert module.class_prior.counts.sum() == 12
    module.eval()
    module.end_epoch()  # rolls in either mode
    assert module.class_prior.counts.sum() == 0


@with_a_prior
@pytest.mark.parametrize("training", [True, False])
def test_observe_goes_before_the_mode(kind: str, training: bool) -> None:
    student, teacher, targets = _batch()
    for observe in (True, False):
        module = MODULES[kind](global_info=True, num_classes=5).train(training)
        module(student, teacher, targets, observe=observe)
        assert int(module.class_prior.counts.sum()) == (6 if observe else 0)
        assert module.training == training


@with_a_prior
def test_a_training_forward_checks_each_argument_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("check_reduction", "check_logits", "check_targets", "check_class_prior")
    made: list[str] = []
    for name in names:
        checked = getattr(_validation, name)

        def counted(*arguments: Any, name: str = name, checked: Any = checked, **more: Any) -> Any:
            made.append(name)
            return checked(*arguments, **more)

        monkeypatch.setattr(_validation, name, counted)
    student, teacher, targets = _batch()
    module = MODULES[kind](global_info=True, num_classes=5)
    made.clear()
    module(student, teacher, targets).backward()
    assert sorted(made) == sorted(names)


@with_a_prior
def test_the_batch_is_observed_after_its_loss(kind: str) -> None:
    """A refused batch leaves no trace, and an observed one does not change its own loss."""
    module = MODULES[kind](global_info=True, num_classes=5, check_finite=True)
    student, teacher, targets = _batch()
    first = module(student, teacher, targets)
    assert torch.equal(module(student, teacher, targets), first)
    before = copy.deepcopy(module.class_prior)
    with pytest.raises(ValueError, match="must be finite with check_finite"):
        module(student, teacher * float("nan"), targets)
    with pytest.raises(ValueError, match="`targets` must lie in"):
        module(student, teacher, targets + 5)
    assert _same_state(before, module.class_prior)


@with_a_prior
def test_state_survives_a_checkpoint_in_the_middle_of_an_epoch(kind: str) -> None:
    uninterrupted = MODULES[kind](**SETTINGS[kind], global_info=True, num_classes=5)
    batches = [_batch() for _ in range(4)]
    uninterrupted(*batches[0])
    uninterrupted.end_epoch()
    uninterrupted(*batches[1])
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"class_prior.matrix", "class_prior.sums", "class_prior.counts"}
    resumed = MODULES[kind](**SETTINGS[kind], global_info=True, num_classes=5)
    resumed.load_state_dict(state)
    for module in (uninterrupted, resumed):
        module(*batches[2])
        module.end_epoch()
    assert _same_state(uninterrupted, resumed)
    assert torch.equal(uninterrupted(*batches[3]), resumed(*batches[3]))


@every_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])  # noqa: S301
def test_copies_are_equal_and_independent(kind: str, duplicate: Any) -> None:
    extra: dict[str, Any] = {} if kind == "dkl" else {"global_info": True, "num_classes": 5}
    module = MODULES[kind](**SETTINGS[kind], reduction="sum", **extra)
    batch = _batch()
    module(*batch)  # with last terms
    twin = duplicate(module)
    assert repr(twin) == repr(module)
    assert _same_state(twin, module)
    assert torch.equal(twin(*batch), module(*batch))
    if kind != "dkl":
        twin.end_epoch()
        assert not _same_state(twin, module)


@with_a_prior
def test_a_model_in_half_precision_keeps_the_prior_wide(kind: str) -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)
            self.criterion = MODULES[kind](global_info=True, num_classes=5)

    model = Student().half()
    assert model.layer.weight.dtype == torch.float16
    assert model.criterion.class_prior.matrix.dtype == torch.float32
    logits = model.layer(torch.randn(4, 3).half())
    loss = model.criterion(logits, torch.randn(4, 5).half(), torch.tensor([0, 1, 2, 3]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.layer.weight.grad.dtype == torch.float16


@with_a_prior
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::DeprecationWarning")
def test_compiled_module_observes_as_well(kind: str) -> None:
    torch.compiler.reset()
    eager = MODULES[kind](global_info=True, num_classes=5)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batch = _batch()
    torch.testing.assert_close(compiled(*batch), eager(*batch), rtol=1e-10, atol=0)
    for mine in (module, eager):
        mine.end_epoch()
    torch.testing.assert_close(module.class_prior.matrix, eager.class_prior.matrix)
    torch.testing.assert_close(list(module.last_terms), list(eager.last_terms), rtol=1e-10, atol=0)


def test_end_epoch_without_global_info_does_nothing() -> None:
    for module in (DKLLoss(), IKLLoss(), GKLLoss(num_classes=4)):
        module.end_epoch()
        assert module.class_prior is None


def test_blocks_do_not_show_in_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets = _batch(7, 5)
    module = GKLLoss(gamma=0.3, global_info=True, num_classes=5, reduction="none")
    whole = module(student, teacher, targets), *module.last_terms
    monkeypatch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", 10)
    blocks = module(student, teacher, targets), *module.last_terms
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_repr_shows_the_settings() -> None:
    assert repr(DKLLoss(temperature=4.0)) == (
        "DKLLoss(alpha=1.0, beta=1.0, temperature=4.0, reduction='batchmean', global_info=False)"
    )
    text = repr(GKLLoss(gamma=0.2, weight_temperature=4.0, global_info=True, num_classes=10))
    for part in ("gamma=0.2", "weight_temperature=4.0", "global_info=True", repr(ClassPrior(10))):
        assert part in text


# --- the ramp --------------------------------------------------------------------------------------------------------


def test_warmup_factor_is_the_published_ramp() -> None:
    assert [warmup_factor(epoch, 5) for epoch in (1, 2, 5, 6, 100)] == [0.2, 0.4, 1.0, 1.0, 1.0]
    assert [warmup_factor(epoch, 1) for epoch in (1, 2)] == [1.0, 1.0]
    assert [warmup_factor(epoch, 0) for epoch in (1, 2)] == [1.0, 1.0]


def test_warmup_factor_refuses_what_is_no_epoch() -> None:
    with pytest.raises(
        ValueError, match=r"warmup_factor: `epoch` must be at least 1, got 0. Epochs are counted from 1"
    ):
        warmup_factor(0, 5)
    with pytest.raises(
        ValueError, match="warmup_factor: `warmup_epochs` must be a finite number of at least 0, got -1"
    ):
        warmup_factor(1, -1)
    with pytest.raises(
        TypeError, match="warmup_factor: `warmup_epochs` must be a finite number of at least 0, got '5'"
    ):
        warmup_factor(1, "5")  # type: ignore[arg-type]
