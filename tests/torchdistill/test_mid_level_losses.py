"""The mid-level losses as torchdistill builds and calls them, against the paper's sums and by their refusals."""

import copy
import pickle
import re

import bad_priors
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.losses.high_level import WeightedSumLoss
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss
from torchdistill_boxes import PLACES, ROLES

from ikl_plugins import losses as core
from ikl_plugins.torchdistill import AdversarialLogits, DKLLoss, GKLLoss, IKLLoss, find_losses

KEYS = {"DKLLoss": "dkl", "DKL": "dkl", "IKLLoss": "ikl", "IKL": "ikl", "GKLLoss": "gkl", "GKL": "gkl"}
PRIOR = {"global_info": True, "num_classes": 5}


def make(key, **kwargs):
    """A loss as a YAML file makes it."""
    return get_mid_level_loss({"key": key, "kwargs": {**PLACES, **kwargs}})


def batch(rows=6, classes=5, shape=(), dtype=torch.float64):
    student = torch.randn(rows, classes, *shape, dtype=dtype, requires_grad=True)
    teacher = 3 * torch.randn(rows, classes, *shape, dtype=dtype)
    return student, teacher, torch.randint(classes, (rows, *shape))


def call(loss, student, teacher, targets=None):
    return loss({".": {"output": student}}, {".": {"output": teacher}}, targets)


def cross_entropy(student, targets):
    """Mean of -log softmax at the label, and its gradient."""
    probabilities = student.detach().softmax(1)
    rows = torch.arange(len(targets))
    gradient = probabilities.clone()
    gradient[rows, targets] -= 1
    return -probabilities[rows, targets].log().mean(), gradient / len(targets)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_preset_is_that_of_the_core_with_the_labels_beside_it(key):
    name = f"{KEYS[key].upper()}Loss"
    for preset in ("start", "cifar10_adversarial"):
        loss, expected = make(key, preset=preset, alpha=7.0), core.LOSSES[name].preset(preset, alpha=7.0)
        assert repr(loss.core) == repr(expected)
        assert (loss.ce_weight, loss.warmup_epochs) == (1.0, 0)
    assert make(key, preset="start", ce_weight=0.5, warmup_epochs=3).ce_weight == 0.5
    with pytest.raises(ValueError, match="unknown preset `nothing`"):
        make(key, preset="nothing")


def test_a_published_preset_has_the_published_ramp():
    assert make("IKL", preset="cifar100_distillation").warmup_epochs == 20
    assert make("IKL", preset="cifar100_distillation", warmup_epochs=2).warmup_epochs == 2
    assert make("IKL").ce_weight == 0.0


@pytest.mark.parametrize("key", KEYS)
def test_every_key_gives_the_formula_plus_the_labels(key):
    kind = KEYS[key]
    keywords = {"alpha": 2.0, "beta": 3.0, "temperature": 4.0}
    if kind != "dkl":
        keywords["weight_temperature"] = 2.0
    if kind == "gkl":
        keywords["gamma"] = 0.3
    loss = make(key, ce_weight=0.5, **keywords)
    student, teacher, targets = batch()
    value = call(loss, student, teacher, targets)
    value.backward()

    expected = oracles.decoupled(kind, student, teacher, **keywords)
    labels_value, labels_gradient = cross_entropy(student, targets)
    torch.testing.assert_close(value.detach(), expected.loss("batchmean") + 0.5 * labels_value)
    torch.testing.assert_close(student.grad, expected.gradients("batchmean")[0] + 0.5 * labels_gradient)
    mse, soft = loss.last_terms
    torch.testing.assert_close(mse, expected.weighted_mse.mean())
    torch.testing.assert_close(soft, expected.cross_entropy.mean())


@pytest.mark.parametrize(("reduction", "hard"), [("batchmean", "mean"), ("sum", "sum"), ("none", "none")])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_both_parts_have_the_declared_reduction(reduction, hard, shape):
    student, teacher, targets = batch(shape=shape)
    value = call(make("IKL", ce_weight=0.7, reduction=reduction), student, teacher, targets)
    flat = [oracles.flatten_places(logits.detach()) for logits in (student, teacher)]
    expected = oracles.decoupled("ikl", *flat).loss(reduction)
    hard_value = F.cross_entropy(student, targets, reduction=hard)
    torch.testing.assert_close(value, expected.reshape(value.shape) + 0.7 * hard_value)


def test_probabilities_will_do_for_the_hard_part():
    student, teacher, _ = batch()
    mixed = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    value = call(make("IKL", alpha=0.0, beta=0.0, ce_weight=1.0), student, teacher, mixed)
    torch.testing.assert_close(value, -(mixed * student.log_softmax(1)).sum(1).mean())


def test_targets_of_any_kind_are_ignored_where_nothing_needs_them():
    student, teacher, _ = batch()
    assert call(make("IKL"), student, teacher, {"boxes": 1}) == call(make("IKL"), student, teacher, None)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_ramp_scales_the_core_and_not_the_labels(warmup):
    student, teacher, targets = batch()
    loss = make("GKL", ce_weight=0.5, warmup_epochs=warmup)
    soft = oracles.decoupled("gkl", student, teacher).loss("batchmean")
    hard = cross_entropy(student, targets)[0]
    for epoch in (1, 2, 3, 4, 9):
        loss.begin_epoch(epoch, 1)
        factor = min(epoch / warmup, 1.0) if warmup else 1.0
        torch.testing.assert_close(call(loss, student, teacher, targets).detach(), factor * soft + 0.5 * hard)


# --- the class prior -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 10, None])
@pytest.mark.parametrize("key", ["IKL", "GKL"])
def test_the_prior_rolls_behind_the_last_batch_or_at_the_next_epoch_and_weighs_that(key, length):
    """Of the announced batches; where an epoch is cut short or has no length, when the next begins."""
    loss = make(key, **PRIOR, weight_temperature=2.0)
    expected = torch.full((5, 5), 0.2)
    for epoch in (1, 2, 3):
        loss.begin_epoch(epoch, length)
        batches = [batch(rows=4, dtype=torch.float32) for _ in range(3)]
        for student, teacher, targets in batches:
            torch.testing.assert_close(loss.class_prior.matrix, expected)
            value = call(loss, student, teacher, targets)
            wanted = oracles.decoupled(KEYS[key], student, teacher, class_prior=expected[targets]).loss("batchmean")
            torch.testing.assert_close(value.detach(), wanted.float())
        assert bool(loss.class_prior.counts.sum() == 0) is (length == 3)
        rows = torch.cat([(teacher / 2.0).softmax(1) for _, teacher, _ in batches])
        labels = torch.cat([targets for *_, targets in batches])
        for label in labels.unique():
            expected[label] = rows[labels == label].mean(0)


def test_evaluation_neither_observes_nor_counts():
    loss = make("IKL", **PRIOR)
    student, teacher, targets = batch(dtype=torch.float32)
    call(loss, student.detach(), teacher, targets)  # before any epoch has begun
    loss.begin_epoch(1, 1)
    for _ in range(3):
        with torch.no_grad():
            call(loss, student * 1.0, teacher, targets)
    assert loss.class_prior.counts.sum() == 0
    torch.testing.assert_close(loss.class_prior.matrix, torch.full((5, 5), 0.2))
    call(loss, student, teacher, targets)  # and the one training batch of the epoch still fits
    assert not torch.equal(loss.class_prior.matrix, torch.full((5, 5), 0.2))


def test_the_record_is_live_and_comes_back():
    loss = make("IKL", **PRIOR)
    record = loss.prior_record(2)
    loss.begin_epoch(1, 1)
    call(loss, *batch(dtype=torch.float32))
    assert record["stage"] == 2
    assert record["matrix"] is loss.class_prior.matrix
    loss.double()  # replaces the buffers, as a move to another device does
    assert record["matrix"] is loss.class_prior.matrix
    assert loss.prior_record(2) is record

    other = make("IKL", **PRIOR)
    other.restore_prior(copy.deepcopy(record), "ikl")
    torch.testing.assert_close(other.class_prior.matrix, loss.class_prior.matrix.float())
    assert other.class_prior.matrix is not record["matrix"]


@pytest.mark.parametrize("name", bad_priors.BAD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_record_that_is_no_class_prior_is_refused(name):
    entry, make_state = bad_priors.BAD[name]
    loss = make("IKL", global_info=True, num_classes=4)
    with pytest.raises(ValueError, match=rf"^IKLLoss, term 'mine': the class prior's `{entry}` must .*, got .*\. Load"):
        loss.restore_prior({"stage": 1, **make_state()}, "mine")
    assert torch.equal(loss.class_prior.matrix, torch.full((4, 4), 0.25))
    make("IKL").restore_prior(make_state(), "mine")  # nothing to restore into


def test_the_loss_follows_the_device_of_the_logits():
    # The meta device stands for an accelerator: tensors of it and of the CPU do not mix.
    loss = make("IKL", **PRIOR)
    record = loss.prior_record(1)
    student = torch.randn(4, 5, device="meta")
    value = call(loss, student, student, torch.zeros(4, dtype=torch.long, device="meta"))
    assert value.device.type == "meta"
    assert loss.class_prior.matrix.device.type == "meta"
    assert record["matrix"] is loss.class_prior.matrix


# --- where the logits are --------------------------------------------------------------------------------------------


def test_student_and_teacher_may_have_their_own_places():
    student, teacher, _ = batch()
    places = {"student_module_path": "head.fc", "teacher_module_path": "softmax", "teacher_module_io": "input"}
    value = make("IKL", **places)(
        {".": {}, "head.fc": {"output": student}}, {"softmax": {"input": teacher, "output": None}}
    )
    torch.testing.assert_close(value.detach(), oracles.decoupled("ikl", student, teacher).loss("batchmean"))


def test_the_views_of_adversarial_training_take_the_places():
    natural, adversarial, teacher = torch.randn(3, 5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    views = {".": {"output": AdversarialLogits(natural=natural, adversarial=adversarial)}}
    loss = make("IKL", ce_weight=0.5)
    hard = 0.5 * F.cross_entropy(natural, labels)
    for teacher_io, reference in (({}, natural), ({".": {"output": teacher}}, teacher)):
        soft = oracles.decoupled("ikl", adversarial, reference).loss("batchmean")
        torch.testing.assert_close(loss(views, teacher_io, labels), soft + hard)
    hooked = make("IKL", teacher_module_path="fc")
    assert hooked(views, {"fc": {"output": teacher}}, labels).isfinite()  # the teacher has one forward


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "kwargs", "error", "message"),
    [
        ("IKLLoss", {"temprature": 1.0}, TypeError, "Did you mean `temperature`? Known: alpha"),
        ("IKL", {"ce_wieght": 1.0}, TypeError, "Did you mean `ce_weight`?"),
        ("GKL", {"warmup_epoch": 1}, TypeError, "Did you mean `warmup_epochs`?"),
        ("IKL", {"gamma": 0.5}, TypeError, "unknown keyword `gamma`"),
        ("DKL", {"weight_temperature": 2.0}, TypeError, "unknown keyword `weight_temperature`"),
        ("IKL", {"loss_keywords": {}}, TypeError, "unknown keyword `loss_keywords`"),
        ("IKL", {"ce_weight": -1.0}, ValueError, "`ce_weight` must be a finite number of at least 0, got -1.0"),
        ("IKL", {"ce_weight": "1e-1"}, TypeError, "`ce_weight` must be a finite number of at least 0, got '1e-1'"),
        ("IKL", {"warmup_epochs": -5}, ValueError, "`warmup_epochs` must be a finite number of at least 0, got -5"),
        ("IKL", {"reduction": "mean"}, ValueError, "`reduction` must be one of 'batchmean', 'sum', 'none'"),
        ("IKL", {"temperature": 0.0}, ValueError, "IKLLoss: `temperature` must be a finite number above 0"),
        ("IKL", {"global_info": True}, ValueError, "`num_classes` must be given"),
        ("IKL", {"student_module_path": 3}, TypeError, "`student_module_path` must be a string, got 3"),
        ("IKL", {"teacher_module_io": "out"}, ValueError, "`teacher_module_io` must be 'output' or 'input', got 'out'"),
        ("IKL", {"student_module_io": "input"}, ValueError, "must be 'output' for the model itself"),
    ],
)
def test_settings_that_do_not_fit_are_refused(key, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(key, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "targets", "error", "message"),
    [
        ({"ce_weight": 1.0}, None, ValueError, "IKLLoss: `targets` must be given"),
        ({"ce_weight": 1.0}, {"labels": 1}, TypeError, "class indices, got dict"),
        ({"ce_weight": 1.0}, (1, 2), TypeError, "class indices, got tuple"),
        ({"ce_weight": 1.0}, torch.arange(6), ValueError, "`targets` must lie in [0, 4], got values from 0 to 5"),
        ({"ce_weight": 1.0}, torch.tensor([0, 1]), ValueError, "must have shape (6,) for logits of shape (6, 5)"),
        ({"ce_weight": 1.0}, torch.rand(6), TypeError, "must hold integer class indices, got torch.float32"),
        ({**PRIOR}, None, ValueError, "IKLLoss: `targets` must be given"),
        ({**PRIOR}, [0], TypeError, "class indices, got list"),
        ({**PRIOR, "ce_weight": 1.0}, torch.rand(6, 5), TypeError, "must hold integer class indices"),
    ],
)
def test_targets_that_do_not_fit_are_refused(kwargs, targets, error, message):
    student, teacher, _ = batch(dtype=torch.float32)
    loss = make("IKL", **kwargs)
    loss.begin_epoch(1, 1)
    with pytest.raises(error, match=re.escape(message)):
        call(loss, student, teacher, targets)


LOGITS = torch.zeros(2, 3, requires_grad=True)
VIEWS = AdversarialLogits(natural=LOGITS, adversarial=LOGITS)
PLAIN = {".": {"output": LOGITS}}
TWICE = {**PLAIN, "a": {"output": LOGITS, "input": LOGITS}, "b": {}}
TO_FC = {role: {f"{role}_module_path": "fc"} for role in ROLES}


@pytest.mark.parametrize(
    ("places", "student", "teacher", "message"),
    [
        (
            TO_FC["student"],
            PLAIN,
            PLAIN,
            "student: '.' (output). Add to `train:` of the config:\n  student:\n    forward_h",
        ),
        (
            TO_FC["teacher"],
            PLAIN,
            TWICE,
            "teacher: '.' (output); 'a' (input, output). Add to `train:` of the config:\n  t",
        ),
        ({}, {".": {}}, PLAIN, "recorded of the student: nothing"),
        ({}, PLAIN, {".": {"output": {"out": 1, "aux": 2}}}, "a dict with the keys 'out', 'aux'."),
        ({}, PLAIN, {".": {"output": (1, 2)}}, "is a tuple. "),
        ({}, {".": {"output": None}}, PLAIN, "is a NoneType. "),
        ({}, {".": {"output": None}}, PLAIN, "student_module_path: 'fc'. Add to `train:` of the config:\n  student:\n"),
        ({}, PLAIN, {}, "trains without one"),
        ({}, PLAIN, {".": {"output": VIEWS}}, "a teacher must see natural images"),
        (TO_FC["student"], {".": {"output": VIEWS}}, PLAIN, "`student_module_path` must be '.' in adversar"),
        (TO_FC["teacher"], {".": {"output": VIEWS}}, {}, "`teacher_module_path` must be '.' in adversar"),
    ],
)
def test_logits_that_are_not_there_are_refused_with_the_lines_to_add(places, student, teacher, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make("IKL", **places)(student, teacher)


@pytest.mark.parametrize(("kwargs", "cause"), [(PRIOR, "global_info=True"), ({"warmup_epochs": 2}, "warmup_epochs=2")])
def test_epochs_that_nobody_announces_are_refused_with_the_line_to_add(kwargs, cause):
    line = rf"{cause} must know where epochs begin(.|\n)*\n  pre_epoch_process: 'ikl_pre_epoch_process'$"
    with pytest.raises(ValueError, match=line):
        call(make("IKL", **kwargs), *batch(dtype=torch.float32))


def test_a_batch_too_many_is_refused():
    loss = make("IKL", **PRIOR)
    loss.begin_epoch(1, 2)
    one = batch(dtype=torch.float32)
    for _ in range(2):
        call(loss, *one)
    with pytest.raises(ValueError, match="no more than the 2 batches of `train_data_loader`"):
        call(loss, *one)


# --- inside a criterion ----------------------------------------------------------------------------------------------


def sub_terms():
    source = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    wrapper = {"key": "SimpleLossWrapper", "kwargs": {"input": source, "target": {"uses_label": True}}}
    criteria = {
        "kd": (1.0, {"key": "KDLoss", "kwargs": {**PLACES, "temperature": 4.0, "alpha": 0.5}}),
        "ikl": (0.3, {"key": "IKLLoss", "kwargs": {**PLACES, "beta": 2.0}}),
        "ce": (2.0, {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}}),
        "gkl": (0.7, {"key": "GKL", "kwargs": {**PLACES, "gamma": 0.5}}),
    }
    terms = {name: {"criterion": criterion, "weight": weight} for name, (weight, criterion) in criteria.items()}
    terms["ce"]["criterion_wrapper"] = wrapper
    return terms


def test_they_add_up_as_terms_of_a_weighted_sum():
    terms = sub_terms()
    criterion = get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}})
    student, teacher, targets = batch()
    io_dict = {"student": {".": {"output": student}}, "teacher": {".": {"output": teacher}}}
    value = criterion(io_dict, {}, targets)
    without = {name: term for name, term in terms.items() if name not in ("ikl", "gkl")}
    rest = get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": without}})(io_dict, {}, targets)
    ikl = oracles.decoupled("ikl", student, teacher, beta=2.0).loss("batchmean")
    gkl = oracles.decoupled("gkl", student, teacher, gamma=0.5).loss("batchmean")
    torch.testing.assert_close(value, rest + 0.3 * ikl + 0.7 * gkl)
    assert str(criterion).count("student='.' output, teacher='.' output, ce_weight=0.0") == 2


def test_find_losses_looks_into_terms_and_wrappers():
    criterion = get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": sub_terms()}})
    found = find_losses(criterion)
    assert {name: type(loss) for name, loss in found.items()} == {"ikl": IKLLoss, "gkl": GKLLoss}

    inner = nn.Sequential(make("DKL"))
    nested = WeightedSumLoss(
        sub_terms={"outer": {"criterion": criterion, "weight": 1.0}, "box": {"criterion": inner, "weight": 1.0}}
    )
    assert {name: type(loss) for name, loss in find_losses(nested).items()} == {
        "outer.ikl": IKLLoss,
        "outer.gkl": GKLLoss,
        "box.0": DKLLoss,
    }
    assert find_losses(nn.CrossEntropyLoss()) == {}


# --- the table of losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_class", [DKLLoss, IKLLoss, GKLLoss])
def test_a_class_wraps_that_of_the_core_and_travels(loss_class):
    loss = loss_class(".", "output", ".", "output", alpha=2.0, num_classes=5)
    assert type(loss.core) is getattr(core, loss_class.__name__)
    assert (loss.core.alpha, loss.core.num_classes) == (2.0, 5)
    student, teacher, _ = batch(dtype=torch.float32)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):  # noqa: S301
        assert type(other) is loss_class
        assert torch.equal(call(other, student, teacher), call(loss, student, teacher))


def test_each_argument_is_checked_once(monkeypatch):
    loss = make("IKL", **PRIOR, ce_weight=1.0, warmup_epochs=4)
    loss.begin_epoch(1, 1)
    looks = []
    original = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda values: looks.append(tuple(values.shape)) or original(values))
    _, _, labels = arguments = batch(dtype=torch.float32)
    call(loss, *arguments)
    assert looks == [tuple(labels.shape), (5, 5)]  # the labels, though cross entropy needs them as well, and the prior
