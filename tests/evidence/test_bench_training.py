"""What is timed is torchdistill's training as the shipped configs have it, and the same for every method."""

import csv
import itertools
import pathlib

import pytest
import torch
from evidence import bench, bench_training
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.mid_level import KDLoss

from ikl_plugins import native
from ikl_plugins.torchdistill import IKLLoss, find_losses

SMALL = [case._replace(batch=4, size=size) for case, size in zip(bench_training.CASES, (8, 32), strict=True)]
by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_operator", None)
    monkeypatch.setattr(native, "_undecided", False)
    monkeypatch.setattr(bench_training, "EPOCH", 2)
    # The operator has tests of its own; here it shall not need a compiler.
    monkeypatch.setattr(native, "enable", native.disable)


def _criterion(training: bench_training.Training) -> torch.nn.Module:
    ((criterion, weight),) = training.box.criterion.term_dict.values()
    assert weight == 1.0
    return criterion


@by_case
def test_boxes_and_criteria_are_torchdistills(case: bench_training.Case) -> None:
    for method in bench_training.TIMED:
        training = bench_training.Training(case, method, 2)
        assert type(training.box) is DistillationBox
        criterion = _criterion(training)
        assert type(criterion) is (KDLoss if method in (bench_training.KD, bench_training.AGAIN) else IKLLoss)
        shipped = bench_training.shipped(case.kd if isinstance(criterion, KDLoss) else case.ikl)
        (term,) = shipped["train"]["criterion"]["kwargs"]["sub_terms"].values()
        given = term["criterion"]["kwargs"]
        if isinstance(criterion, IKLLoss):
            assert criterion.core.beta == given["beta"]
            assert criterion.core.global_info == given["global_info"] == (case.classes == 1000)
        else:
            assert (criterion.temperature, criterion.beta) == (given["temperature"], given["beta"])


@by_case
def test_methods_share_networks_weights_and_batches(case: bench_training.Case) -> None:
    trainings = [bench_training.Training(case, method, 2) for method in bench_training.MEASURED]
    for one, other in itertools.pairwise(trainings):
        for role in ("teacher_model", "student_model"):
            states = [getattr(training.box, role).state_dict() for training in (one, other)]
            assert list(states[0]) == list(states[1])
            assert all(map(torch.equal, *(state.values() for state in states)))
    first = [next(training.batches) for training in trainings]
    assert first[0][0].shape == (4, 3, case.size, case.size)
    for images, labels, _ in first[1:]:
        assert torch.equal(images, first[0][0])
        assert torch.equal(labels, first[0][1])


def test_a_step_trains_and_an_epoch_rolls_the_prior() -> None:
    training = bench_training.Training(SMALL[1], bench_training.IKL, 2)
    before = [parameter.clone() for parameter in training.box.student_model.parameters()]
    (loss,) = find_losses(training.box.criterion).values()
    assert loss.class_prior is not None
    uniform = loss.class_prior.matrix.clone()
    assert training.step() > 0
    assert torch.equal(loss.class_prior.matrix, uniform)
    after = list(training.box.student_model.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    training.step()
    assert not torch.equal(loss.class_prior.matrix, uniform)
    training.step()  # another epoch


def test_the_pairwise_criterion_is_the_same_loss() -> None:
    student, teacher = torch.randn(4, 1000, requires_grad=True), torch.randn(4, 1000)
    io_dict = {"student": {".": {"output": student}}, "teacher": {".": {"output": teacher}}}
    found = []
    for method in (bench_training.IKL, bench_training.PAIRWISE):
        training = bench_training.Training(SMALL[1], method, 2)
        training.box.pre_epoch_process(epoch=0)
        loss = training.box.criterion(io_dict, {}, torch.tensor([1, 5, 5, 999]))
        found.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_labels_alone_see_no_teacher() -> None:
    training = bench_training.Training(SMALL[0], bench_training.NOTHING, 2)
    student = torch.randn(4, 100)
    io_dict = {"student": {".": {"output": student}}, "teacher": {".": {"output": torch.full((4, 100), torch.nan)}}}
    labels = torch.arange(4)
    expected = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(training.box.criterion(io_dict, {}, labels), expected)


def test_a_run_writes_table_and_csv(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_training, "CASES", SMALL[:1])
    monkeypatch.setattr(bench_training, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(bench, "can_build", lambda: True)
    peaks = dict(zip(bench_training.MEASURED, (2000.0, 2001.0, 2002.0, 2003.0, 3000.0), strict=True))
    monkeypatch.setattr(bench_training, "peak_of", peaks.__getitem__)
    bench.main(["training", "--output", str(tmp_path / "out"), "--seconds", "0", "--threads", "1"])
    rows = list(csv.DictReader((tmp_path / "out" / "training.csv").read_text().splitlines()))
    assert all(row["torch"] == torch.__version__ and row["threads"] == "1" and row["processor"] for row in rows)
    timed = [row for row in rows if row["kind"] == "time"]
    assert [row["method"] for row in timed] == 2 * list(bench_training.TIMED)
    assert all(float(row["ratio"]) == 1 for row in timed if row["method"] == bench_training.KD)
    memory = {row["method"]: row for row in rows if row["kind"] == "memory"}
    assert list(memory) == bench_training.MEASURED
    assert memory[bench_training.PAIRWISE]["share"] == "0.3333"
    assert "| IKL by pairs | 3000 | 1000 | 33.3 % |" in (tmp_path / "out" / "training.md").read_text()
