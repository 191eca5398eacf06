"""The benchmark compares like with like, and writes what it measured."""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

from evidence import bench
import pytest
import torch

from ikl_plugins import _fused, native


def test_the_compared_forms_are_one_loss() -> None:
    student, teacher = bench.logits(5, 7)
    forms = {name: bench.METHODS[name](student, teacher) for name in ("IKL", "IKL composed")}
    forms["pairwise"] = bench.pairwise(student, teacher)
    for value in forms.values():
        torch.testing.assert_close(value, forms["pairwise"], rtol=1e-5, atol=0)


def test_the_steps_are_one_loss() -> None:
    """Each step but the first of the table; what is compiled and what is built have tests of their own."""
    student, teacher = bench.logits(5, 7)
    # Weights and soft labels are tempered, the weighted MSE is not.
    difference, weights = teacher - student, torch.softmax(teacher / 4, 1)
    gaps = difference[:, :, None] - difference[:, None, :]
    mse = 0.25 * (weights[:, :, None] * weights[:, None, :] * gaps**2).sum() / 5
    expected = mse - (weights * torch.log_softmax(student / 4, 1)).sum() / 5
    names = bench.without_operator(bench.STEPS, built=False)
    for name in names[1:]:
        if "torch.compile" not in name:
            torch.testing.assert_close(bench.STEPS[name](student, teacher), expected, rtol=1e-5, atol=0)
    assert len(names) == 6


def test_a_step_leaves_the_block_size_as_it_was() -> None:
    before = _fused._BLOCK_ELEMENTS_CPU

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        assert before < _fused._BLOCK_ELEMENTS_CPU
        return student.sum()

    bench.in_one_block(loss)(torch.zeros(1, 2), torch.zeros(1, 2))
    assert before == _fused._BLOCK_ELEMENTS_CPU


def test_both_ways_to_the_weights_agree() -> None:
    _, teacher = bench.logits(5, 7)
    powers = torch.softmax(teacher.double() / 4, 1) ** 0.5
    for way in bench.WEIGHTS.values():
        weights, mass = way(teacher)
        torch.testing.assert_close(mass.double(), powers.sum(1, keepdim=True), rtol=1e-5, atol=0)
        torch.testing.assert_close((weights * mass).double(), powers, rtol=1e-5, atol=0)


def test_the_operator_is_on_inside_its_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    switched = []
    monkeypatch.setattr(native, "enable", lambda: switched.append("on"))
    monkeypatch.setattr(native, "disable", lambda: switched.append("off"))

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        assert switched == ["on"]
        return student.sum()

    assert bench.by_operator(loss)(torch.ones(1, 2), torch.ones(1, 2)) == 2
    assert switched == ["on", "off"]
    names = bench.without_operator(bench.METHODS, built=False)
    assert set(bench.METHODS) - set(names) == {"IKL, C++ operator", "GKL gamma 0.5, C++ operator"}
    assert bench.without_operator(bench.METHODS, built=True) == list(bench.METHODS)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(native, "build", build)
    assert not bench.can_build("Measured")
    assert capsys.readouterr().out == "Measured without the C++ operator: no compiler\n"


def test_shapes_reach_from_a_hundred_classes_to_a_vocabulary() -> None:
    classes = [classes for _, classes in bench.SHAPES]
    assert min(classes) == 100
    assert max(classes) == 128256
    assert all(one <= 13 * other for other, one in itertools.pairwise(sorted(classes)))


def test_the_baseline_is_kl_divergence() -> None:
    student, teacher = bench.logits(5, 7)
    p, q = torch.softmax(teacher.double(), 1), torch.softmax(student.double(), 1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(bench.kl(student, teacher).double(), expected, rtol=1e-5, atol=0)


def test_peak_memory_counts_logits_tensors() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell a process its peak memory")
    # In a process of its own, as the benchmark does it: here memory that earlier tests have freed would be used again.
    code = """
import bench, torch
bench.MEMORY_SHAPE = (512, 8192)
held = []

def three_tensors(student, teacher):
    held.extend(torch.ones_like(student) for _ in range(3))
    return student.sum()  # its gradient is an expanded scalar, made full by the leaf: one more

bench.METHODS["IKL"] = three_tensors
print(bench.peak_memory("IKL"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(bench.__file__).parent, capture_output=True, text=True, check=True
    )
    assert 2.8 < float(done.stdout) < 5.2


def test_a_run_writes_table_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", [(4, 3), (2, 50)])
    monkeypatch.setattr(bench, "PAIRWISE_SHAPE", (2, 10))
    monkeypatch.setattr(bench, "LINEAR_CLASSES", [10, 20])
    monkeypatch.setattr(bench, "STEP_SHAPES", [(3, 4)])
    monkeypatch.setattr(bench, "can_build", lambda what: False)  # neither the operator nor torch.compile
    monkeypatch.setattr(bench, "peak_memory_of", lambda name: 1.25)
    monkeypatch.setattr(bench, "import_milliseconds", lambda: 3.0)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--output", str(tmp_path / "out"), "--seconds", "0"])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "out" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = [row for row in rows if row["kind"] == "time"]
    assert {(row["rows"], row["classes"]) for row in timed} == {("4", "3"), ("2", "50")}
    assert {row["method"] for row in timed} == set(bench.without_operator(bench.METHODS, built=False))
    assert all(float(row["seconds"]) > 0 and row["torch"] == torch.__version__ for row in timed)
    for row in timed:
        base = next(r for r in timed if r["method"] == "KL" and r["classes"] == row["classes"])
        assert float(row["ratio"]) == pytest.approx(float(row["seconds"]) / float(base["seconds"]), rel=1e-3, abs=1e-4)
    steps = [row for row in rows if row["kind"] == "step"]
    assert {row["method"] for row in steps} == set(bench.STEPS) - {"C++ operator", "plain code through torch.compile"}
    assert {row["method"] for row in rows if row["kind"] == "weights"} == set(bench.WEIGHTS)
    table = (tmp_path / "out" / "losses.md").read_text()
    assert "| (4, 3) | 1 (" in table
    assert torch.__version__ in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["losses.csv", "losses.md"]
