"""The benchmark compares like with like, and writes what it measured."""

import csv
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import torch


def test_the_compared_forms_are_one_loss() -> None:
    student, teacher = bench.logits(5, 7)
    forms = {name: bench.METHODS[name](student, teacher) for name in ("IKL", "IKL composed")}
    forms["pairwise"] = bench.pairwise(student, teacher)
    for value in forms.values():
        torch.testing.assert_close(value, forms["pairwise"], rtol=1e-5, atol=0)


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
    assert {row["method"] for row in timed} == set(bench.METHODS)
    assert all(float(row["seconds"]) > 0 and row["torch"] == torch.__version__ for row in timed)
    for row in timed:
        base = next(r for r in timed if r["method"] == "KL" and r["classes"] == row["classes"])
        assert float(row["ratio"]) == pytest.approx(float(row["seconds"]) / float(base["seconds"]), rel=1e-3, abs=1e-4)
    table = (tmp_path / "out" / "losses.md").read_text()
    assert "| (4, 3) | 1 (" in table
    assert torch.__version__ in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["losses.csv", "losses.md"]
