"""What is timed are training steps of MMPretrain in which only the teacher's option differs."""

import csv

import torch
from evidence import bench, bench_teacher

from ikl_plugins.mmpretrain import FrozenTeacher


def test_a_run_writes_table_and_csv_and_asks_no_teacher_whose_logits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_teacher, "BATCH", 2)
    monkeypatch.setattr(bench_teacher, "BATCHES", 2)
    monkeypatch.setattr(bench_teacher, "LEAST_ROUNDS", 1)
    methods = {name: keywords for name, keywords in bench_teacher.METHODS.items() if "teacher_compile" not in keywords}
    monkeypatch.setattr(bench_teacher, "METHODS", methods)
    asked, ask = [], FrozenTeacher.logits_of

    def logits_of(teacher, inputs):
        asked.append(ask(teacher, inputs))
        return asked[-1]

    monkeypatch.setattr(FrozenTeacher, "logits_of", logits_of)
    bench.main(["teacher", "--output", str(tmp_path / "out"), "--seconds", "0", "--threads", "1"])
    rows = list(csv.DictReader((tmp_path / "out" / "teacher.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == list(methods)
    assert rows[0]["faster"] == "1.0000"
    assert "| teacher_cache, kept |" in (tmp_path / "out" / "teacher.md").read_text()
    others = len(methods) - 1  # three rounds each; the kept logits come from two steps before them
    assert len(asked) == 3 * others + 2
    assert all(logits.shape == (2, 100) and logits.dtype == torch.float32 for logits in asked)
