"""The adversarial part of tools/reproduce.py: the plan, the jobs' small parts, tables and plots."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from evidence import cache, reproduce_adversarial_jobs
from evidence import reproduce_adversarial_plan as plan
from evidence.reproduce import DOCS, main
from evidence.reproduce_adversarial_jobs import to_hex
from evidence.reproduce_adversarial_report import FIGURES, render
from evidence.reproduce_adversarial_results import difference

RECORDED = json.loads((DOCS / "results" / "adversarial.json").read_text())


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_recorded_jobs_are_those_that_the_plan_asks_for():
    """Results that were computed once stay results."""
    assert RECORDED["budget"] == json.loads(json.dumps(plan.FULL._asdict()))
    jobs = [*plan.search_jobs(plan.FULL), *itertools.chain(*plan.planned(plan.FULL, RECORDED["scales"]))]
    assert {job.name for job in jobs} == set(RECORDED["jobs"])
    for job in jobs:
        kept = RECORDED["jobs"][job.name]
        assert kept["function"] == job.function
        if job.name != "checks":  # was recorded before its settings had all that it depends on
            assert kept["settings"] == json.loads(json.dumps(job.settings))


def test_the_best_robust_accuracy_decides_then_natural_accuracy_then_the_published_weight():
    def results(scores):
        return {
            plan.search_name(method, scale): {
                "result": {"validation": [{"accuracy/top1": natural, "robust/top1": robust}]}
            }
            for method in plan.METHODS
            for scale, (natural, robust) in zip(plan.FULL.scales, scores, strict=True)
        }

    def chosen(*scores):
        return set(plan.choose_scales(plan.FULL, results(scores)).values())

    assert chosen((10, 3), (90, 1), (80, 2)) == {0.5}
    assert chosen((10, 3), (11, 3), (80, 2)) == {1.0}
    assert chosen((10, 3), (10, 3), (10, 3)) == {1.0}
    one = results([(1, 1), (1, 2), (1, 3)])
    one[plan.search_name(plan.TRADES, 0.5)]["result"]["validation"][-1]["robust/top1"] = 9
    scales = plan.choose_scales(plan.FULL, one)
    assert scales[plan.TRADES] == scales[plan.DKL] == 0.5
    assert scales[plan.IKL] == 2.0


# --- small parts of the jobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_that_ended_before_its_validation_repeats_its_last_epoch(tmp_path, monkeypatch, epochs):
    work = tmp_path / "work"
    calls = []

    def main(command):
        """Trains what is missing; the first process ends between the last checkpoint and the validation."""
        last = work / "last_checkpoint"
        done = int(re.search(r"epoch_(\d+)\.pth$", last.read_text())[1]) if last.is_file() else 0
        calls.append(done)
        lines = []
        for epoch in range(done + 1, epochs + 1):
            (work / f"epoch_{epoch}.pth").write_bytes(b"weights")
            last.write_text(str(work / f"epoch_{epoch}.pth"))
            lines.append({"epoch": epoch, "step": epoch, "loss": 1.0, "time": 0.1})
        if lines and len(calls) > 1:
            lines.append({"step": epochs, "accuracy/top1": 40.0, "robust/top1": 20.0})
        folder = work / f"2026010{len(calls)}_000000" / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))

    work.mkdir()
    monkeypatch.setattr(reproduce_adversarial_jobs.mmpretrain_training, "main", main)
    settings = {"config": "adversarial_ikl", "seed": 0, "epochs": epochs, "options": {}}
    found = reproduce_adversarial_jobs.train(settings, tmp_path)
    assert calls == [0, epochs - 1]
    assert found["validation"] == [{"epoch": epochs, "accuracy/top1": 40.0, "robust/top1": 20.0}]
    assert [row["epoch"] for row in found["log"]] == list(range(1, epochs + 1))


# --- tables and plots ------------------------------------------------------------------------------------------------


def changed(rights):
    """The recorded results with other answers: by method, of each seed with AWP, which images are right."""
    content = copy.deepcopy(RECORDED)
    for method, seeds in rights.items():
        for seed, right in enumerate(seeds):
            result = content["jobs"][f"autoattack-{method}-awp-{seed}"]["result"]
            result.update(images=len(right), robust=to_hex(torch.tensor(right)))
    return content


@pytest.mark.parametrize(
    ("share", "found"),
    [(0.40, "the paper's sign (+10.00"), (0.30, "not decided (+0.00"), (0.20, "not the paper's sign (-10.00")],
)
def test_the_order_is_what_the_images_show(share, found):
    ours, theirs = [3 * [(torch.arange(500) < 500 * one).tolist()] for one in (share, 0.3)]
    text = render(changed({plan.IKL: ours, plan.TRADES: theirs}))
    (line,) = [line for line in text.splitlines() if line.startswith("- IKL against TRADES")]
    assert f"AutoAttack {found}" in line


def test_differences_are_taken_image_by_image():
    ours = [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    theirs = [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    labels = [[f"{method}-awp-{seed}" for seed in range(3)] for method in (plan.IKL, plan.TRADES)]
    mean, half = difference(changed({plan.IKL: ours, plan.TRADES: theirs}), "autoattack", *labels)
    # Per image: 1, 1/3, -1/3, -2/3.
    assert mean == pytest.approx(100 / 12)
    spread = math.sqrt(sum((value - 1 / 12) ** 2 for value in (1, 1 / 3, -1 / 3, -2 / 3)) / 3)
    assert half == pytest.approx(100 * 1.96 * spread / 2)


# --- the real thing, small -------------------------------------------------------------------------------------------


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """Images of noise around a colour for each class, as prepare_data leaves them."""
    import numpy
    from PIL import Image

    noise = numpy.random.default_rng(0)
    colours = noise.integers(40, 215, (10, 1, 1, 3))
    for split, images in (("train", 40), ("val", 4), ("test", 4)):
        for label in range(10):
            folder = tmp_path / "data" / "cifar10" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = (colours[label] + noise.integers(-40, 40, (32, 32, 3))).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{number:04}.png")
    (tmp_path / "data" / "cifar10" / "manifest.json").write_text('{"made": "up"}')
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.slow
def test_quick_runs_and_goes_on(small_data, monkeypatch, capsys):
    indices = {"train_dataloader.dataset.indices": list(range(0, 400, 4)), "val_dataloader.dataset.indices": [0, 20]}
    small = {name: {**getattr(plan.QUICK, name), **indices} for name in ("options", "few", "longer")}
    monkeypatch.setattr(plan, "QUICK", plan.QUICK._replace(**small))
    monkeypatch.chdir(small_data)
    arguments = ["adversarial", "--quick", "--output", "out", "--results", "results"]
    real = cache.run_jobs
    calls = []

    def interrupted(jobs, *args, **kwargs):
        calls.append(len(jobs))
        if len(calls) == 2:  # the trainings of the main table: one is done, the others are not
            real(jobs[:1], *args, **kwargs)
            raise KeyboardInterrupt
        return real(jobs, *args, **kwargs)

    monkeypatch.setattr(cache, "run_jobs", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        main(arguments)
    monkeypatch.setattr(cache, "run_jobs", real)
    assert not (small_data / "results").exists()
    capsys.readouterr()
    main(arguments)
    said = capsys.readouterr().out
    assert "train-adversarial_trades-awp-0: begins" not in said
    assert "search-" not in said
    assert "Written: results/adversarial.json, results/adversarial.md, results/adversarial_test.png" in said
    content = json.loads((small_data / "results" / "adversarial.json").read_text())
    assert (small_data / "results" / "adversarial.md").read_text() == render(content)
    assert all((small_data / "results" / name).is_file() for name in FIGURES)
    checks = content["jobs"]["checks"]["result"]
    assert checks["gradients"]["float64"] < 1e-12
    assert checks["gradients"]["float32"] < 1e-4
    assert checks["apart"][0]["dkl"] < checks["apart"][0]["other_seed"]
