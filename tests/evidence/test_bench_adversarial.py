"""Both ways of a step of adversarial training are one computation, and the benchmark writes what it measured."""

import csv
from pathlib import Path

import pytest
import torch
from evidence import bench_adversarial as bench
from evidence.bench import main

OURS = [bench.DEFAULT_FORMAT, bench.CHANNELS_LAST]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WIDTH", 1), ("BATCH", 6), ("SIZE", 8), ("GRADIENT_BATCH", 6)):
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.label)
def test_gradients_are_those_of_the_authors_step(case: bench.Case, method: str) -> None:
    start = bench.problem(case.classes, torch.float64)
    official, ours = (bench.METHODS[name](start, case) for name in (bench.OFFICIAL, method))
    expected, official_images = bench.gradients(official, start)
    found, images = bench.gradients(ours, start)
    assert len(expected) == sum(parameter.numel() for parameter in start.model.parameters())
    torch.testing.assert_close(images, official_images, rtol=0, atol=1e-12)
    assert bench.relative(found, expected) < 1e-9

    # What else a step leaves behind: running statistics, the predictions collected by label, the weights.
    for name, buffer in official.model.named_buffers():
        torch.testing.assert_close(ours.model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.prior.sums, official.collected, rtol=1e-9, atol=1e-12)
    for step in (official, ours):
        step.update()
    for name, parameter in official.model.named_parameters():
        # Weight decay sees the perturbed weights in one order of undoing and stepping and the weights in the other.
        decay = bench.LEARNING_RATE * 5e-4 * bench.GAMMA * parameter.detach().norm().item() if case.awp else 0.0
        torch.testing.assert_close(ours.model.get_parameter(name), parameter, rtol=0, atol=1.1 * decay + 1e-12)


def test_each_part_of_the_authors_step_matters() -> None:
    """The equality above compares steps whose objective and perturbation do something."""
    start = bench.problem(10, torch.float64)
    found = {
        (objective, awp): bench.gradients(bench.METHODS[bench.OFFICIAL](start, bench.Case(10, objective, awp)), start)
        for objective in ("soft_cross_entropy", "ikl")
        for awp in (False, True)
    }
    plain, images = found["soft_cross_entropy", False]
    assert bench.relative(found["soft_cross_entropy", True][0], plain) > 1e-3
    assert bench.relative(found["ikl", False][0], plain) > 1e-3
    change = images - start.images
    assert change.abs().max().item() == pytest.approx(bench.EPS)
    assert (change.abs() > 0.9 * bench.EPS).double().mean() > 0.5


def test_deviations_see_other_gradients_and_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weaker(bench.OurStep):
        def attack(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return images + 0.1 * (super().attack(images, labels) - images)

    class Scaled(bench.OurStep):
        def backward(self, images: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor) -> None:
            super().backward(images, adversarial, labels)
            for parameter in self.model.parameters():
                parameter.grad.mul_(1.5)

    monkeypatch.setitem(bench.METHODS, "weaker", Weaker)
    monkeypatch.setitem(bench.METHODS, "scaled", Scaled)
    found = bench.deviations(bench.Case(10, "soft_cross_entropy", awp=False))
    double, rounding, single, pixels = found["weaker"]
    assert min(double, single) > 1e-3
    assert rounding < 1e-3  # the authors' images are given
    assert pixels > 0.5
    double, rounding, single, pixels = found["scaled"]
    assert double == pytest.approx(0.5)
    assert rounding == pytest.approx(0.5, abs=1e-3)
    assert found[bench.OFFICIAL]._replace(rounding=0.0) == (0, 0, 0, 0)
    assert 0 < found[bench.OFFICIAL].rounding < 1e-3
    for name in OURS:
        assert found[name].double < 1e-9
        assert found[name].rounding < 1e-3


def test_a_run_writes_table_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(bench, "CASES", [bench.CASES[0], bench.CASES[-1]])
    main(["adversarial", "--output", str(tmp_path / "out"), "--seconds", "0", "--threads", "1"])
    rows = list(csv.DictReader((tmp_path / "out" / "adversarial.csv").read_text().splitlines()))
    assert all(row["torch"] == torch.__version__ and row["threads"] == "1" and row["processor"] for row in rows)
    timed = [row for row in rows if row["kind"] == "time"]
    cases = {(row["classes"], row["objective"], row["awp"]) for row in timed}
    assert cases == {(str(case.classes), case.objective, str(case.awp)) for case in bench.CASES}
    assert {row["method"] for row in timed} == set(bench.METHODS)
    assert all(float(row["seconds"]) > 0 for row in timed)
    assert all(float(row["faster"]) == 1 for row in timed if row["method"] == bench.OFFICIAL)
    found = [row for row in rows if row["kind"] == "gradients"]
    assert len(found) == len(bench.CASES) * len(bench.METHODS)
    assert all(float(row["double"]) < 1e-9 for row in found)
    assert "| 100 classes, ikl, AWP on | 1.00 (" in (tmp_path / "out" / "adversarial.md").read_text()
