"""What is counted runs without a device as well, where nothing is launched."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from evidence import bench, bench_device
from evidence import device as on

CPU = torch.device("cpu")


def test_a_run_writes_table_and_csv(tmp_path: Path) -> None:
    bench.main(["device", "--device", "cpu", "--output", str(tmp_path), "--threads", "1"])
    rows = list(csv.DictReader((tmp_path / "device.csv").read_text().splitlines()))
    parts = [row["part"] for row in rows]
    assert list(dict.fromkeys(parts)) == [
        "loss",
        "criterion of torchdistill",
        "attack of 10 steps",
        "weight perturbation",
        "iteration of MMPretrain",
    ]
    assert {row["launches"] for row in rows} == {row["waits"] for row in rows} == {"0"}
    assert "| weight perturbation | 21 weights, there and back | 0 | 0 |" in (tmp_path / "device.md").read_text()


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        bench.main(["device", "--output", str(tmp_path)])


def test_a_table_of_the_counting_runtime_claims_no_gpu() -> None:
    row = {"part": "loss", "step": "IKL", "way": "walk", "launches": "22", "waits": "0", "torch": "2.14.1"}
    table = bench_device.render([{**row, "counter": "counting runtime"}])
    assert table.startswith("Counted by a CUDA runtime that launches nothing, on no GPU")
    assert "| loss | IKL (walk) | 22 | 0 |" in table
    assert "Counted on H, driver 5" in bench_device.render([{**row, "counter": "", "device": "H", "driver": "5"}])


def test_seconds_without_a_device_are_the_clocks() -> None:
    assert 0 <= on.timed_on(CPU, lambda: None)() < 1
    assert on.facts(CPU) == {"device": "cpu"}
    assert on.ways(CPU) == [on.WALK]
