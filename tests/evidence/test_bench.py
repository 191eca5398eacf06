"""The benchmark of the losses compares like with like; the command writes what was measured, and the page says it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evidence import bench
from evidence import bench_losses as losses
from evidence.cache import TOOLS


def plain(student, teacher, temperature):
    """IKL by pairs; weights and soft labels are tempered, the weighted MSE is not."""
    difference, weights = teacher - student, torch.softmax(teacher / temperature, 1)
    gaps = difference[:, :, None] - difference[:, None, :]
    mse = 0.25 * (weights[:, :, None] * weights[:, None, :] * gaps**2).sum() / len(student)
    return mse - (weights * torch.log_softmax(student / temperature, 1)).sum() / len(student)


FORMS = {
    "pairwise": (losses.pairwise, 1.0),
    **{name: (losses.METHODS[name], 1.0) for name in ("IKL", "IKL composed")},
    # What is compiled and what is built have tests of their own.
    **{name: (losses.STEPS[name], 4.0) for name in list(losses.STEPS)[1:-1] if name != losses.COMPILED},
}


@pytest.mark.parametrize("name", FORMS)
def test_the_compared_forms_are_one_loss(name):
    form, temperature = FORMS[name]
    student, teacher = losses.logits(5, 7)
    torch.testing.assert_close(form(student, teacher), plain(student, teacher, temperature), rtol=1e-5, atol=0)


def test_the_baseline_is_kl_divergence():
    student, teacher = losses.logits(5, 7)
    p, q = torch.softmax(teacher.double(), 1), torch.softmax(student.double(), 1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(losses.kl(student, teacher).double(), expected, rtol=1e-5, atol=0)


def test_both_ways_to_the_weights_agree():
    _, teacher = losses.logits(5, 7)
    powers = torch.softmax(teacher.double() / 4, 1) ** 0.5
    for way in losses.WEIGHTS.values():
        weights, mass = way(teacher)
        torch.testing.assert_close(mass.double(), powers.sum(1, keepdim=True), rtol=1e-5, atol=0)
        torch.testing.assert_close((weights * mass).double(), powers, rtol=1e-5, atol=0)


# Three tensors are held and the gradient is one more; the sum's own is an expanded scalar.
LOGITS_TENSORS = """
from evidence import bench_losses as losses
import torch
losses.MEMORY_SHAPE = (512, 8192)
held = []
def three(student, teacher):
    held.extend(torch.ones_like(student) for _ in range(3))
    return student.sum()
losses.METHODS["IKL"] = three
print(losses.peak("IKL"))
"""
MEBIBYTES = """
from evidence import bench_training as training
import torch
training.MEMORY_CASE = training.CASES[0]._replace(size=8, batch=2)
plain = training.peak(training.NOTHING)
held = torch.ones(400 * 2**18)
print(training.peak(training.NOTHING) - plain)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("code", "least", "most"), [(LOGITS_TENSORS, 2.8, 5.2), (MEBIBYTES, 380, 440)])
def test_peak_memory_is_counted(code, least, most):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell a process its peak memory")
    # In a process of its own, as the benchmark does it: here memory that earlier tests have freed would be used again.
    done = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True, check=True)
    assert least < float(done.stdout.split()[-1]) < most


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
def test_a_run_writes_table_and_csv(tmp_path, monkeypatch):
    for name, value in {
        "SHAPES": [(4, 3), (2, 50)],
        "PAIRWISE_SHAPE": (2, 10),
        "LINEAR_CLASSES": [10, 20],
        "STEP_SHAPES": [(3, 4)],
        "import_seconds": lambda: 0.003,
    }.items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(bench, "can_build", lambda: False)  # neither the operator nor torch.compile
    monkeypatch.setattr(bench, "peak_of", lambda *asked, **options: 1.25)
    bench.main(["losses", "--output", str(tmp_path / "out"), "--seconds", "0", "--threads", "1"])
    rows = list(csv.DictReader((tmp_path / "out" / "losses.csv").read_text().splitlines()))
    assert all(row["torch"] == torch.__version__ and row["threads"] == "1" and row["processor"] for row in rows)
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("time", "step", "weights")}
    assert {(row["rows"], row["classes"]) for row in kinds["time"]} == {("4", "3"), ("2", "50")}
    assert {row["method"] for row in kinds["time"]} == set(bench.runnable(losses.METHODS, built=False))
    for row in kinds["time"]:
        base = next(r for r in kinds["time"] if r["method"] == "KL" and r["classes"] == row["classes"])
        assert float(row["seconds"]) > 0
        assert float(row["ratio"]) == pytest.approx(float(row["seconds"]) / float(base["seconds"]), rel=1e-3, abs=1e-4)
    assert {row["method"] for row in kinds["step"]} == set(losses.STEPS) - {"C++ operator", losses.COMPILED}
    assert {row["method"] for row in kinds["weights"]} == set(losses.WEIGHTS)
    assert "| (4, 3) | 1 (" in (tmp_path / "out" / "losses.md").read_text()
