"""ikl_pre_epoch_process in torchdistill's own boxes: teacher, epochs, class priors through checkpoints, stages."""

import argparse
import copy
import logging
import math
import re

import oracles
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.common.main_util import load_ckpt, save_ckpt
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.models.wrapper import EmptyModule
from torchdistill_boxes import BATCH, CLASSES, CPU, IMAGES, OURS, PRIOR, stage, the_loss, train_epoch

from ikl_plugins.torchdistill import epoch_log, processes

DEFAULT = "default_pre_epoch_process_with_teacher"
UNIFORM = torch.full((CLASSES, CLASSES), 1 / CLASSES)


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


class DictNet(nn.Module):
    """A network as torchvision's segmentation models are: its output is a dict."""

    def __init__(self, seed):
        super().__init__()
        self.body = net(seed)

    def forward(self, x):
        return {"out": self.body(x), "aux": x}


def images():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(IMAGES, 6, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (IMAGES,), generator=generator))


def make_box(config, teacher=None, student=None, distributed=False):
    teacher = net(1) if teacher is None else teacher
    student = net(2) if student is None else student
    return get_distillation_box(teacher, student, {"train": images()}, config, CPU, None, distributed, 1)


@torch.no_grad()
def mean_predictions(teacher, temperature=2.0):
    """What the prior must be after an epoch: for each class the mean of softmax(teacher / T)."""
    x, y = images().tensors
    predictions = (copy.deepcopy(teacher).eval()(x) / temperature).softmax(1)
    return torch.stack([predictions[y == label].mean(0) for label in range(CLASSES)])


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "moves"), [("ikl_pre_epoch_process", False), (DEFAULT, True), (None, True)])
def test_only_our_process_keeps_the_teachers_statistics(process, moves):
    teacher = net(1)
    box = make_box(stage(process=process), teacher=teacher)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    for epoch in range(2):
        train_epoch(box, epoch)
        assert box.student_model.training
        assert box.teacher_model.training is moves
        box.student_model.eval()  # as an evaluation between epochs does
        box.post_epoch_process()
    after = dict(teacher.named_buffers())
    assert before  # there are statistics to move
    for name, buffer in before.items():
        assert torch.equal(buffer, after[name]) is not moves, name


def test_a_teacher_that_is_trained_along_keeps_its_mode_and_is_warned_of_once(caplog):
    config = stage()
    config["teacher"]["requires_grad"] = True
    box = make_box(config)
    with caplog.at_level(logging.WARNING, logger="ikl_plugins"):
        for epoch in range(3):
            train_epoch(box, epoch)
            box.post_epoch_process()
    assert box.teacher_model.training
    (record,) = caplog.records
    assert "the teacher is trained along" in record.message
    assert "teacher:\n    requires_grad: False" in record.message


# --- epochs and the class prior --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_prior_is_the_mean_prediction_of_each_class_when_the_epoch_is_over(accumulate):
    box = make_box(stage(**PRIOR, accumulate=accumulate))
    expected = mean_predictions(box.teacher_model)
    prior = the_loss(box).class_prior
    torch.testing.assert_close(prior.matrix, UNIFORM)
    for epoch in range(2):
        train_epoch(box, epoch)
        # Before validation and before anybody saves: upstream's script saves before post_epoch_process.
        torch.testing.assert_close(prior.matrix, expected)
        assert prior.counts.sum() == 0
        box.post_epoch_process()
    assert box.stage_grad_count == 2 * IMAGES // BATCH


def make_training_box(distributed=False):
    config = stage()
    config["model"] = config.pop("student")
    del config["teacher"]
    source = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    wrapper = {"key": "SimpleLossWrapper", "kwargs": {"input": source, "target": {"uses_label": True}}}
    term = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "criterion_wrapper": wrapper, "weight": 1.0}
    config["criterion"] = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": term}}}
    return get_training_box(net(2), {"train": images()}, config, CPU, None, distributed, 1)


def test_a_training_box_takes_the_process_too():
    box = make_training_box()
    box.model.eval()
    before = box.model[0].weight.detach().clone()
    train_epoch(box, 0)
    assert box.model.training
    assert not torch.equal(before, box.model[0].weight)
    assert "ikl_plugins" not in box.optimizer.param_groups[0]


# --- models with a dict for an output --------------------------------------------------------------------------------


def dict_config(**kwargs):
    config = stage(student_module_path="body", teacher_module_path="body", **kwargs)
    for role in ("student", "teacher"):
        config[role]["forward_hook"] = {"output": ["body"]}
    return config


def test_dict_valued_models_work_through_a_hook_and_as_plain_ones_do():
    box = make_box(dict_config(**PRIOR), teacher=DictNet(1), student=DictNet(2))
    plain = make_box(stage(**PRIOR))
    for epoch in range(2):
        train_epoch(box, epoch)
        train_epoch(plain, epoch)
    torch.testing.assert_close(the_loss(box).class_prior.matrix, the_loss(plain).class_prior.matrix)
    for ours, theirs in zip(box.student_model.parameters(), plain.student_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# --- the prior through checkpoints -----------------------------------------------------------------------------------


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole epochs", "no length", "cut short"])
def test_the_log_has_the_terms_and_the_prior_of_each_epoch(way, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="ikl_plugins")
    monkeypatch.setattr(epoch_log, "_FOLD", 2)  # batches; there are 3 in an epoch
    box = make_box(stage(**PRIOR, epochs=3))
    if way == "no length":
        monkeypatch.setattr(processes, "_batches", lambda loader: None)
    means, loss = [], the_loss(box)
    forward = loss.core.forward
    terms = []

    def noting(*args, **kwargs):
        value = forward(*args, **kwargs)
        terms.append([float(term) for term in loss.last_terms])
        return value

    loss.core.forward = noting
    for epoch in range(3):
        terms.clear()
        train_epoch(box, epoch, steps=2 if way == "cut short" else None)
        means.append(torch.tensor(terms).mean(0).tolist())
        if way == "whole epochs":  # before the script validates
            assert f"ikl, epoch {epoch + 1}: " in caplog.text
    box.pre_epoch_process(epoch=3)
    lines = [re.findall(r"[\d.]+(?:e-\d+)?", text) for text in re.findall(r"ikl, epoch \d: .*", caplog.text)]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    for line, mean in zip(lines, means, strict=True):
        assert [float(number) for number in line[1:3]] == pytest.approx(mean, rel=2e-3)
        assert float(line[4]) == pytest.approx(math.log(CLASSES), rel=2e-3)
    if way != "cut short":
        rows = mean_predictions(box.teacher_model)
        assert float(lines[-1][3]) == pytest.approx(float(-(rows * rows.log()).sum(1).mean()), rel=2e-3)
    pictures = re.findall(r"ikl, class prior behind epoch (\d), a row a label:((?:\n  [^\n]{7})+)", caplog.text)
    assert [(epoch, picture.count("\n")) for epoch, picture in pictures] == [("1", CLASSES), ("2", CLASSES)]


def save_as_upstream(box, path):
    save_ckpt(box.org_student_model, box.optimizer, box.lr_scheduler, 0.0, argparse.Namespace(start_epoch=0), str(path))


def resume_as_upstream(config, path):
    box = make_box(config, student=net(3))
    load_ckpt(str(path), model=box.org_student_model)
    load_ckpt(str(path), optimizer=box.optimizer, lr_scheduler=box.lr_scheduler)
    return box


def test_the_prior_survives_start_epoch(tmp_path):
    """The teacher changes between the epochs and with it the prior; the second one is cut short."""
    box = make_box(stage(**PRIOR, epochs=4))
    matrices = []
    for epoch, steps in enumerate((None, 2, None, None)):
        train_epoch(box, epoch, steps=steps)
        matrices.append(the_loss(box).class_prior.matrix.clone())
        save_as_upstream(box, tmp_path / f"{epoch}.pt")
        record = torch.load(tmp_path / f"{epoch}.pt", weights_only=False)["optimizer"]["param_groups"][0]["ikl_plugins"]
        assert torch.equal(record["ikl"]["matrix"], matrices[-1])
        assert bool(record["ikl"]["counts"].sum() == 0) is (steps is None)
        box.post_epoch_process()
        with torch.no_grad():
            box.teacher_model[-1].weight.mul_(2.0)

    resumed = resume_as_upstream(stage(**PRIOR, epochs=4, process=processes.ALLOWING), tmp_path / "1.pt")
    assert torch.equal(the_loss(resumed).class_prior.matrix, UNIFORM)
    with torch.no_grad():
        resumed.teacher_model[-1].weight.mul_(4.0)
    for epoch in (2, 3):
        train_epoch(resumed, epoch)
        assert torch.equal(the_loss(resumed).class_prior.matrix, matrices[epoch])
        resumed.post_epoch_process()
        with torch.no_grad():
            resumed.teacher_model[-1].weight.mul_(2.0)
    for ours, theirs in zip(resumed.student_model.parameters(), box.student_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("written_by", "resumed_by", "warning"),
    [
        ({**PRIOR}, {**PRIOR}, None),
        ({}, {}, None),
        ({**PRIOR}, {}, None),
        ({}, {**PRIOR}, "no class prior of term 'ikl' (of terms: none)"),
        ({**PRIOR}, {**PRIOR, "term": "renamed"}, "no class prior of term 'renamed' (of terms: ikl)"),
    ],
)
def test_a_prior_that_a_resumed_run_misses_is_warned_of_once(tmp_path, caplog, written_by, resumed_by, warning):
    before = make_box(stage(**written_by))
    train_epoch(before, 0)
    save_as_upstream(before, tmp_path / "one.pt")
    resumed = resume_as_upstream(stage(**resumed_by, process=processes.ALLOWING), tmp_path / "one.pt")
    with caplog.at_level(logging.WARNING, logger="ikl_plugins"):
        for epoch in (1, 2):
            train_epoch(resumed, epoch)
    messages = [record.message for record in caplog.records if "losses." not in record.message]
    assert [f"at epoch 2, but the checkpoint holds {warning}" in message for message in messages] == [True] * bool(
        warning
    )


# --- several stages --------------------------------------------------------------------------------------------------


# What the config of the resumed run has, and what is said of it.
CHANGES = {
    "the same": ({}, None),
    "numbers of a preset": ({"preset": None, "alpha": 4.0, "beta": 0.5, "temperature": 4.0, "ce_weight": 1.0}, None),
    "another loss": ({"key": "GKLLoss", "beta": 0.5}, "losses.ikl.type (was 'IKLLoss', is 'GKLLoss')"),
    "another temperature": ({"temperature": 2.0}, "losses.ikl.temperature (was 4.0, is 2.0)"),
    "another weight": ({"ce_weight": 0.5}, "losses.ikl.ce_weight (was 1.0, is 0.5)"),
    "another ramp": ({"warmup_epochs": 4}, "losses.ikl.warmup_epochs (was 0, is 4)"),
    "another accumulation": ({"accumulate": 2}, "grad_accum_step (was 1, is 2)"),
    "another term": ({"term": "b"}, "losses.b (was None, is 'IKLLoss'), losses.ikl (was 'IKLLoss', is None)"),
    "another teacher": ({"teacher": 9}, "teacher.weights (was "),
    "another batch size": ({"batch_size": 4}, "batch_size (was 8, is 4)"),
    "another learning rate": ({"lr": 0.5}, "optimizer.lr (was 0.1, is 0.5)"),
    "another weight of a term": ({"weight": 0.5}, "losses.ikl.weight (was 1.0, is 0.5)"),
}
PRESET = {"preset": "start", "weight_temperature": 4.0}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_that_goes_on_keeps_its_settings_also_in_upstreams_script(tmp_path, caplog, case):
    changes, refusal = dict(CHANGES[case][0]), CHANGES[case][1]
    before = make_box(stage(**PRESET))
    train_epoch(before, 0)
    save_as_upstream(before, tmp_path / "one.pt")
    others = {name: changes.pop(name) for name in ("teacher", "batch_size", "lr", "weight") if name in changes}

    def resumed(process):
        config = stage(**{**PRESET, **changes}, process=process)
        (term,) = config["criterion"]["kwargs"]["sub_terms"].values()
        term["weight"] = others.get("weight", 1.0)
        config["optimizer"]["kwargs"]["lr"] = others.get("lr", 0.1)
        config["train_data_loader"]["kwargs"] = {"batch_size": others.get("batch_size", BATCH)}
        box = make_box(config, teacher=net(others.get("teacher", 1)), student=net(3))
        load_ckpt(str(tmp_path / "one.pt"), optimizer=box.optimizer)
        return box

    box = resumed(OURS)
    if refusal is None:
        train_epoch(box, 1)
    else:
        with pytest.raises(ValueError, match=re.escape(f"keep its settings, but others are {refusal}")):
            train_epoch(box, 1)
    caplog.clear()
    box = resumed(processes.ALLOWING)
    train_epoch(box, 1)
    train_epoch(box, 2)
    said = [record.message for record in caplog.records if ": was " in record.message]
    fields = re.findall(r"([\w.]+) \(was", refusal or "")
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == fields  # once
    # What goes on from here goes on with these.
    save_as_upstream(box, tmp_path / "one.pt")
    train_epoch(resumed(OURS), 3)


def test_a_checkpoint_without_a_record_goes_on_with_one_line(tmp_path, caplog):
    before = make_box(stage())
    train_epoch(before, 0)
    before.optimizer.param_groups[0].pop("ikl_settings")
    save_as_upstream(before, tmp_path / "one.pt")
    resumed = resume_as_upstream(stage(temperature=3.0), tmp_path / "one.pt")
    for epoch in (1, 2):
        train_epoch(resumed, epoch)
    lines = [record.message for record in caplog.records if "has no record of its run's settings" in record.message]
    assert len(lines) == 1


@pytest.mark.parametrize("own_optimizer", [True, False])
def test_each_stage_counts_its_own_epochs_and_has_its_own_prior(own_optimizer):
    config = {
        "stage1": stage("IKLLoss", **PRIOR, warmup_epochs=2, epochs=2),
        "stage2": stage("GKLLoss", **PRIOR, warmup_epochs=4, epochs=3, optimizer=own_optimizer, gamma=0.5),
    }
    box = make_box(config)
    means = mean_predictions(box.teacher_model)
    x, y = images().tensors
    for epoch in range(5):
        torch.manual_seed(epoch)
        box.pre_epoch_process(epoch=epoch)
        loss = the_loss(box)
        expected = UNIFORM if epoch in (0, 2) else means
        torch.testing.assert_close(loss.class_prior.matrix, expected)
        with torch.no_grad():  # not counted as a batch of the epoch
            value = box.forward_process(x, y)
            logits = box.student_model(x), box.teacher_model(x)
        kind, keywords, factor = ("ikl", {}, (epoch + 1) / 2) if epoch < 2 else ("gkl", {"gamma": 0.5}, (epoch - 1) / 4)
        wanted = oracles.decoupled(kind, *logits, class_prior=expected[y], **keywords).loss("batchmean")
        torch.testing.assert_close(value, factor * wanted.float())
        for images_, targets, extra in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(images_, targets, extra))
        record = box.optimizer.param_groups[0]["ikl_plugins"]["ikl"]
        assert record["stage"] == (1 if epoch < 2 else 2)
        assert record["matrix"] is loss.class_prior.matrix
        torch.testing.assert_close(loss.class_prior.matrix, means)
        box.post_epoch_process()


# --- several ranks: what one process can see of it -------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
def test_a_student_that_nobody_wrapped_is_wrapped_once_a_stage():
    config = {"stage1": dict_config(**PRIOR, epochs=2), "stage2": dict_config(**PRIOR, epochs=1)}
    config["stage1"]["student"]["frozen_modules"] = ["body.0"]
    student = DictNet(2)
    first = student.body[0].weight.detach().clone()
    box = make_box(config, teacher=DictNet(1), student=student, distributed=True)
    wrappers = []
    for epoch in range(3):
        train_epoch(box, epoch)
        assert isinstance(box.student_model, DistributedDataParallel)
        assert box.student_model.module is student
        assert box.student_model.find_unused_parameters is (epoch < 2)
        assert not isinstance(box.teacher_model, DistributedDataParallel)
        assert torch.equal(student.body[0].weight, first) is (epoch < 2)
        torch.testing.assert_close(the_loss(box).class_prior.matrix, mean_predictions(box.teacher_model.body))
        wrappers.append(box.student_model)
        box.post_epoch_process()
    assert wrappers[0] is wrappers[1]
    assert wrappers[1] is not wrappers[2]
    box.clean_modules()
    assert not student.body._forward_hooks


@pytest.mark.usefixtures("process_group")
def test_what_is_wrapped_or_trains_nothing_is_left_alone():
    box = make_training_box(distributed=True)
    wrapped = box.model = DistributedDataParallel(box.model)
    box.pre_epoch_process(epoch=0)
    assert box.model is wrapped

    box = make_training_box(distributed=True)
    for trains in (False, True):
        box.model.requires_grad_(trains)
        box.pre_epoch_process(epoch=0)
        assert isinstance(box.model, DistributedDataParallel) is trains

    box = make_box(stage(), distributed=True)
    auxiliary = box.student_model = EmptyModule()
    auxiliary.weight = nn.Parameter(torch.zeros(1))
    box.pre_epoch_process(epoch=0)
    assert box.student_model is auxiliary


# --- refusals --------------------------------------------------------------------------------------------------------


def trained_teacher():
    config = stage()
    del config["teacher"]["requires_grad"]
    return make_box(config, distributed=True)


def with_record(record):
    def make():
        box = make_box(stage(**PRIOR))
        box.optimizer.param_groups[0]["ikl_plugins"] = record
        return box

    return make


# id: box, epoch, the fragment that matters
EPOCHS = "must know where epochs begin"
REFUSED = {
    **{f"epoch {epoch!r}": (lambda: make_box(stage()), epoch, f"got {epoch!r}") for epoch in (None, "3", True)},
    "prior": (lambda: make_box(stage(process=None, **PRIOR)), 0, EPOCHS),
    "prior, default": (lambda: make_box(stage(process=DEFAULT, **PRIOR)), 0, EPOCHS),
    "ramp": (lambda: make_box(stage(process=DEFAULT, warmup_epochs=3)), 0, EPOCHS),
    "classes": (with_record({"ikl": {"stage": 1, "matrix": torch.eye(9)}}), 1, r"term 'ikl'.*\(4, 4\), got.*\(9, 9\)"),
    "record": (with_record({"ikl": torch.eye(4)}), 1, "must map terms to class priors"),
    "records": (with_record([1]), 1, "must map terms to class priors"),
    "teacher": (trained_teacher, 0, "requires_grad: False"),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, epoch, message = REFUSED[case]
    box = make()
    with pytest.raises(ValueError, match=message):
        train_epoch(box, epoch)
