"""The mid-level losses as torchdistill builds and calls them, against the paper's sums and by their refusals."""

import copy
import re

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.losses.high_level import WeightedSumLoss
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss

from ikl_plugins import losses as core
from ikl_plugins.torchdistill import DKLLoss, GKLLoss, IKLLoss, find_losses

KEYS = {"DKLLoss": "dkl", "DKL": "dkl", "IKLLoss": "ikl", "IKL": "ikl", "GKLLoss": "gkl", "GKL": "gkl"}
PLACES = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}


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


def test_dkl_has_the_gradients_of_torchdistills_kd_loss():
    student, teacher, targets = batch()
    kd = make("KDLoss", temperature=4.0, alpha=0.1, beta=0.9, reduction="batchmean")
    dkl = make("DKLLoss", temperature=4.0, ce_weight=0.1, alpha=0.9 * 4**2, beta=0.9 * 4**2)
    gradients = [torch.autograd.grad(call(loss, student, teacher, targets), student)[0] for loss in (kd, dkl)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=0)


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


def test_half_precision_logits_give_a_float32_loss():
    student, teacher, targets = batch(dtype=torch.float32)
    value = call(make("IKL", ce_weight=1.0), student.half(), teacher.half(), targets)
    full = call(make("IKL", ce_weight=1.0), student.half().float(), teacher.half().float(), targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, full)


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


def mean_predictions(batches, classes, temperature, previous):
    """What the prior must be after an epoch: per class the mean of softmax(teacher / T); unseen classes keep theirs."""
    found = previous.clone()
    for label in range(classes):
        rows = [
            logits[targets == label].softmax(1) for logits, targets in ((t / temperature, y) for _, t, y in batches)
        ]
        rows = torch.cat(rows)
        if len(rows):
            found[label] = rows.mean(0)
    return found


@pytest.mark.parametrize("key", ["IKL", "GKL"])
def test_the_prior_rolls_behind_the_last_batch_and_weighs_the_next_epoch(key):
    loss = make(key, global_info=True, num_classes=5, weight_temperature=2.0)
    expected = torch.full((5, 5), 0.2)
    for epoch in (1, 2, 3):
        batches = [batch(rows=4, dtype=torch.float32) for _ in range(3)]
        loss.begin_epoch(epoch, len(batches))
        for student, teacher, targets in batches:
            torch.testing.assert_close(loss.class_prior.matrix, expected)
            value = call(loss, student, teacher, targets)
            wanted = oracles.decoupled(KEYS[key], student, teacher, class_prior=expected[targets]).loss("batchmean")
            torch.testing.assert_close(value.detach(), wanted.float())
        expected = mean_predictions(batches, 5, 2.0, expected)
        torch.testing.assert_close(loss.class_prior.matrix, expected)
        assert loss.class_prior.counts.sum() == 0


def test_an_epoch_cut_short_is_rolled_when_the_next_begins():
    loss = make("IKL", global_info=True, num_classes=5)
    batches = [batch(dtype=torch.float32) for _ in range(2)]
    loss.begin_epoch(1, 10)
    for one in batches:
        call(loss, *one)
    torch.testing.assert_close(loss.class_prior.matrix, torch.full((5, 5), 0.2))
    loss.begin_epoch(2, 10)
    torch.testing.assert_close(loss.class_prior.matrix, mean_predictions(batches, 5, 1.0, torch.full((5, 5), 0.2)))


def test_evaluation_neither_observes_nor_counts():
    loss = make("IKL", global_info=True, num_classes=5)
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


def test_a_batch_too_many_is_refused():
    loss = make("IKL", global_info=True, num_classes=5)
    loss.begin_epoch(1, 2)
    one = batch(dtype=torch.float32)
    call(loss, *one)
    call(loss, *one)
    with pytest.raises(
        ValueError, match=r"no more than the 2 batches of `train_data_loader`.*forward_process once per"
    ):
        call(loss, *one)


def test_without_a_length_the_prior_waits_for_the_next_epoch():
    loss = make("IKL", global_info=True, num_classes=5)
    loss.begin_epoch(1, None)
    one = batch(dtype=torch.float32)
    call(loss, *one)
    assert loss.class_prior.counts.sum() == 6
    loss.begin_epoch(2, None)
    torch.testing.assert_close(loss.class_prior.matrix, mean_predictions([one], 5, 1.0, torch.full((5, 5), 0.2)))


def test_the_record_is_live_and_comes_back():
    loss = make("IKL", global_info=True, num_classes=5)
    record = loss.prior_record(2)
    loss.begin_epoch(1, 1)
    call(loss, *batch(dtype=torch.float32))
    assert record["stage"] == 2
    assert record["matrix"] is loss.class_prior.matrix
    loss.double()  # replaces the buffers, as a move to another device does
    assert record["matrix"] is loss.class_prior.matrix
    assert loss.prior_record(2) is record

    other = make("IKL", global_info=True, num_classes=5)
    other.restore_prior(copy.deepcopy(record), "ikl")
    torch.testing.assert_close(other.class_prior.matrix, loss.class_prior.matrix.float())
    assert other.class_prior.matrix is not record["matrix"]


@pytest.mark.parametrize("broken", ["shape", "missing"])
def test_a_record_that_does_not_fit_is_refused(broken):
    record = dict(make("IKL", global_info=True, num_classes=7).prior_record(1))
    if broken == "missing":
        record.pop("matrix")
    loss = make("IKL", global_info=True, num_classes=5)
    found = r"got \(7, 7\)" if broken == "shape" else "got None"
    with pytest.raises(ValueError, match=rf"prior of term 'mine' must fit num_classes=5.*`matrix`.*\(5, 5\), {found}"):
        loss.restore_prior(record, "mine")
    make("IKL").restore_prior(record, "mine")  # nothing to restore into


def test_the_loss_follows_the_device_of_the_logits():
    # The meta device stands for an accelerator: tensors of it and of the CPU do not mix.
    loss = make("IKL", global_info=True, num_classes=5)
    record = loss.prior_record(1)
    student = torch.randn(4, 5, device="meta")
    value = call(loss, student, student, torch.zeros(4, dtype=torch.long, device="meta"))
    assert value.device.type == "meta"
    assert loss.class_prior.matrix.device.type == "meta"
    assert record["matrix"] is loss.class_prior.matrix


# --- where the logits are --------------------------------------------------------------------------------------------


def test_student_and_teacher_may_have_their_own_places():
    student, teacher, _ = batch()
    loss = get_mid_level_loss(
        {
            "key": "IKL",
            "kwargs": {
                "student_module_path": "head.fc",
                "student_module_io": "output",
                "teacher_module_path": "softmax",
                "teacher_module_io": "input",
            },
        }
    )
    value = loss({".": {}, "head.fc": {"output": student}}, {"softmax": {"input": teacher, "output": None}})
    torch.testing.assert_close(value.detach(), oracles.decoupled("ikl", student, teacher).loss("batchmean"))


def test_a_path_that_nobody_recorded_is_refused_with_the_lines_to_add():
    loss = make("IKL", student_module_path="fc")
    student, teacher, _ = batch()
    message = (
        "IKLLoss: `student_module_path` must name a module whose output is recorded, but 'fc' is not; recorded of the "
        "student: '.' (output); 'layer3' (input, output). Add to `train:` of the config:\n"
        "  student:\n    forward_hook:\n      output: ['fc']"
    )
    recorded = {".": {"output": student}, "layer3": {"output": student, "input": student}}
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(recorded, {".": {"output": teacher}})
    with pytest.raises(ValueError, match="recorded of the student: nothing"):
        loss({".": {}}, {".": {"output": teacher}})


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ({"out": 1, "aux": 2}, "a dict with the keys 'out', 'aux'"),
        ((1, 2), "a tuple"),
        (None, "a NoneType"),
    ],
)
def test_an_output_that_is_no_tensor_is_refused_with_the_lines_to_add(output, what):
    _, teacher, _ = batch()
    message = (
        f"that of '.' is {what}. Name the layer that gives the logits, here called 'fc': teacher_module_path: 'fc'."
    )
    with pytest.raises(ValueError, match=re.escape(message) + r"(.|\n)*  teacher:\n    forward_hook:\n"):
        call(make("IKL"), teacher, output)


def test_a_config_without_a_teacher_is_refused():
    student, *_ = batch()
    with pytest.raises(
        ValueError, match=r"must lead to a teacher, but this config trains without one.*`teacher_model`"
    ):
        make("IKL")({".": {"output": student}}, {})


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        ({"student_module_path": 3}, TypeError, "`student_module_path` must be a string, got 3 of type int"),
        ({"teacher_module_io": "out"}, ValueError, "`teacher_module_io` must be 'output' or 'input', got 'out'"),
        ({"student_module_io": "input"}, ValueError, "must be 'output' for the model itself, got 'input'"),
    ],
)
def test_places_that_cannot_be_are_refused(places, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make("IKL", **places)


# --- keywords and targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "keyword", "nearest"),
    [
        ("IKLLoss", "temprature", "temperature"),
        ("IKL", "ce_wieght", "ce_weight"),
        ("GKL", "warmup_epoch", "warmup_epochs"),
        ("DKL", "redution", "reduction"),
        ("IKL", "gama", None),
    ],
)
def test_a_misspelled_keyword_names_the_nearest(key, keyword, nearest):
    hint = rf"Did you mean `{nearest}`\? Known: alpha" if nearest else "Known: alpha"
    with pytest.raises(TypeError, match=f"Loss: unknown keyword `{keyword}`. {hint}"):
        make(key, **{keyword: 1.0})


def test_the_known_keywords_are_those_of_the_loss():
    with pytest.raises(TypeError, match="unknown keyword `gamma`"):
        make("IKL", gamma=0.5)
    with pytest.raises(TypeError, match="unknown keyword `weight_temperature`"):
        make("DKL", weight_temperature=2.0)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ce_weight": -1.0}, ValueError, "IKLLoss: `ce_weight` must be a finite number of at least 0, got -1.0"),
        ({"ce_weight": "1e-1"}, TypeError, "IKLLoss: `ce_weight` must be a finite number of at least 0, got '1e-1'"),
        ({"warmup_epochs": -5}, ValueError, "IKLLoss: `warmup_epochs` must be a finite number of at least 0, got -5"),
        ({"reduction": "mean"}, ValueError, "IKLLoss: `reduction` must be one of 'batchmean', 'sum', 'none'"),
        ({"temperature": 0.0}, ValueError, "IKLLoss: `temperature` must be a finite number above 0"),
        ({"global_info": True}, ValueError, "IKLLoss: `num_classes` must be given with global_info=True"),
    ],
)
def test_values_out_of_range_are_refused(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make("IKL", **kwargs)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, ValueError, "IKLLoss: `targets` must be given with ce_weight=1.0, got None"),
        ({"labels": 1}, TypeError, "IKLLoss: `targets` must be a tensor of class indices, got dict"),
        ((1, 2), TypeError, "IKLLoss: `targets` must be a tensor of class indices, got tuple"),
        (torch.tensor([0, 1, 2, 3, 4, 5]), ValueError, "IKLLoss: `targets` must lie in [0, 4], got values from 0 to 5"),
        (torch.tensor([0, 1]), ValueError, "`targets` must have shape (6,) for logits of shape (6, 5), got (2,)"),
        (torch.rand(6), TypeError, "IKLLoss: `targets` must hold integer class indices, got torch.float32"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, error, message):
    student, teacher, _ = batch()
    with pytest.raises(error, match=re.escape(message)):
        call(make("IKL", ce_weight=1.0), student, teacher, targets)


def test_the_prior_needs_targets():
    loss = make("IKL", global_info=True, num_classes=5)
    loss.begin_epoch(1, 1)
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match="`targets` must be given"):
        call(loss, student, teacher, None)
    with pytest.raises(TypeError, match="`targets` must be a tensor of class indices, got list"):
        call(loss, student, teacher, [0])


@pytest.mark.parametrize(
    ("kwargs", "cause"),
    [({"global_info": True, "num_classes": 5}, "global_info=True"), ({"warmup_epochs": 2}, "warmup_epochs=2")],
)
def test_epochs_that_nobody_announces_are_refused_with_the_line_to_add(kwargs, cause):
    message = (
        f"IKLLoss: {cause} must know where epochs begin, but nobody has said so. Add this line to `train:` of the "
        "config (or to each of its stages that uses the loss):\n  pre_epoch_process: 'ikl_pre_epoch_process'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call(make("IKL", **kwargs), *batch(dtype=torch.float32))


def test_without_prior_and_ramp_nobody_need_announce_epochs():
    assert call(make("IKL", warmup_epochs=1), *batch()).isfinite()


# --- inside a criterion ----------------------------------------------------------------------------------------------


def sub_terms():
    kd = {"key": "KDLoss", "kwargs": {**PLACES, "temperature": 4.0, "alpha": 0.5}}
    ce = {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}}
    wrapper = {
        "key": "SimpleLossWrapper",
        "kwargs": {
            "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
            "target": {"uses_label": True},
        },
    }
    ikl = {"key": "IKLLoss", "kwargs": {**PLACES, "beta": 2.0}}
    gkl = {"key": "GKL", "kwargs": {**PLACES, "gamma": 0.5}}
    return {
        "kd": {"criterion": kd, "weight": 1.0},
        "ikl": {"criterion": ikl, "weight": 0.3},
        "ce": {"criterion": ce, "criterion_wrapper": wrapper, "weight": 2.0},
        "gkl": {"criterion": gkl, "weight": 0.7},
    }


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


@pytest.mark.parametrize(
    ("adapter", "module"), [(DKLLoss, core.DKLLoss), (IKLLoss, core.IKLLoss), (GKLLoss, core.GKLLoss)]
)
def test_the_core_module_does_the_mathematics(adapter, module):
    loss = adapter(".", "output", ".", "output", alpha=2.0, num_classes=5)
    assert type(loss.core) is module
    assert loss.core.alpha == 2.0
    assert loss.core.num_classes == 5
