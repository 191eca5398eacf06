"""tools/demo.py: its numbers, what it keeps and redoes, and the whole of it on a tenth of the digits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo import main as demo
from demo import adversarial as demo_adversarial
from demo import robustbench as demo_robustbench
from ikl_plugins.commands import data as prepare_data
import pytest
from demo_adversarial_results import made_up_adversarial_results

torch = pytest.importorskip("torch")
for package, extra in (
    ("torchdistill", "torchdistill"), ("mmpretrain", "mmpretrain"), ("sklearn", "demo"), ("tqdm", "demo"),
    ("matplotlib", "demo"),
):  # fmt: skip
    pytest.importorskip(package, reason=f"tools/demo.py needs {package} (extra `{extra}`)")

TOOL = Path(demo.__file__)
TABLE_LINE = re.compile(r"^\| (CE|KL|DKL|IKL|GKL) +\|", re.MULTILINE)


def made_up_results(seeds=3, epochs=5, methods=tuple(demo.METHODS)):
    """Results with numbers that no training gave, each of them different."""
    draw = random.Random(0)
    runs = {}
    for seed in range(seeds):
        for method in methods:
            terms = {"weighted_mse": [draw.random() for _ in range(epochs)]}
            terms["soft_cross_entropy"] = [2 + draw.random() for _ in range(epochs)]
            runs[f"{method}/{seed}"] = {
                "seed": seed,
                "test_accuracy": draw.randrange(270, 300) / 3,
                "measured": [dict(zip(terms, row, strict=True)) for row in zip(*terms.values(), strict=True)],
                "terms": terms if method in ("dkl", "ikl", "gkl") else {},
                "class_prior": [[0.91 if row == column else 0.01 for column in range(10)] for row in range(10)],
            }
    return {
        "runs": runs,
        "teacher": {"test_accuracy": 98.0, "soft_entropy": 1.9},
        "networks": {"teacher": "resnet14", "student": "resnet8"},
        "data": {"train": 1200, "val": 297, "test": 300},
        "environment": {"versions": {"python": "3.11", "torch": "2"}, "threads": 1, "machine": "x86_64 with 2 cores"},
        "prior_temperature": 4.0,
        "batch_size": 64,
        "step_seconds": {method: [draw.uniform(0.01, 0.03) for _ in range(9)] for method in demo.METHODS},
    }


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_summary_is_mean_deviation_and_median_ratio():
    numpy = pytest.importorskip("numpy")
    results = made_up_results()
    rows = demo.summarise(results)
    assert [row.method for row in rows] == ["ce", "kd", "dkl", "ikl", "gkl"]
    baseline = numpy.array(results["step_seconds"]["kd"])
    for row in rows:
        accuracies = [results["runs"][f"{row.method}/{seed}"]["test_accuracy"] for seed in range(3)]
        assert row.accuracies == accuracies
        assert row.mean == pytest.approx(numpy.mean(accuracies))
        assert row.deviation == pytest.approx(numpy.std(accuracies, ddof=1))
        seconds = numpy.array(results["step_seconds"][row.method])
        assert row.relative_step == pytest.approx(numpy.median(seconds / baseline))
        assert row.relative_step != pytest.approx(numpy.median(seconds) / numpy.median(baseline)) or row.method == "kd"
        assert row.step_ms == pytest.approx(1000 * numpy.median(seconds))
    assert rows[1].relative_step == 1.0


def test_one_seed_has_no_deviation_and_a_loss_without_runs_no_row():
    rows = demo.summarise(made_up_results(seeds=1, methods=("ce", "ikl")))
    assert [(row.method, row.deviation) for row in rows] == [("ce", None), ("ikl", None)]


def test_many_seeds_show_their_range():
    results = made_up_results(seeds=6)
    accuracies = [results["runs"][f"ikl/{seed}"]["test_accuracy"] for seed in range(6)]
    assert f"| {min(accuracies):.2f} to {max(accuracies):.2f} |" in demo.markdown(results)


def test_the_report_prints_the_numbers_and_their_order_whatever_it_is():
    results = made_up_results(seeds=2)
    accuracies = {"ce": (97.0, 98.0), "kd": (90.0, 91.0), "dkl": (90.0, 91.0), "ikl": (80.0, 84.0), "gkl": (99.0, 99.0)}
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            results["runs"][f"{method}/{seed}"]["test_accuracy"] = value
        results["step_seconds"][method] = [0.02, 0.04, 0.02]
    results["step_seconds"]["ikl"] = [0.015, 0.01, 0.015]
    report = demo.markdown(results)
    lines = {line.split("|")[1].strip(): line for line in report.splitlines() if TABLE_LINE.match(line)}
    cells = {name: [cell.strip() for cell in line.split("|")[3:-1]] for name, line in lines.items()}
    assert cells == {
        "CE": ["97.50 ± 0.71", "97.00, 98.00", "1.00", "20.0"],
        "KL": ["90.50 ± 0.71", "90.00, 91.00", "1.00", "20.0"],
        "DKL": ["90.50 ± 0.71", "90.00, 91.00", "1.00", "20.0"],
        "IKL": ["82.00 ± 2.83", "80.00, 84.00", "0.75", "15.0"],
        "GKL": ["99.00 ± 0.00", "99.00, 99.00", "1.00", "20.0"],
    }
    assert "By mean: GKL 99.00, CE 97.50, KL = DKL 90.50, IKL 82.00." in report
    assert len({len(line) for line in report.splitlines() if line.startswith("| ")}) == 1
    assert "a batch of 64; the losses take turns step by step, and the median of 3 rounds is given" in report
    assert "Teacher resnet14, 98.00 % on the test images; student resnet8; 1,200 training" in report
    # The mean accuracy is 91.9 %: 1.96 sqrt(.919 * .081 / 300) = 3.09 %.
    assert "one image is 0.33 points" in report
    assert "leaves about ±3.1 points (95 %)" in report
    assert "What 2 seeds on 300 test images can show: whether" in report


@pytest.mark.parametrize(("accuracy", "margin"), [(100.0, "0.5"), (0.0, "0.5"), (50.0, "5.7")])
def test_the_margin_never_claims_certainty(accuracy, margin):
    results = made_up_results(seeds=1)
    for run in results["runs"].values():
        run["test_accuracy"] = accuracy
    report = demo.markdown(results)
    assert "What 1 seed on 300 test images" in report
    assert f"±{margin} points" in report


def test_each_seed_runs_the_losses_in_another_order():
    names = list(demo.METHODS)
    orders = [demo._rotated(names, seed) for seed in range(6)]
    assert [order[0] for order in orders] == ["ce", "kd", "dkl", "ikl", "gkl", "ce"]
    assert all(sorted(order) == sorted(names) for order in orders)


def test_the_plots_are_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for seeds, epochs in ((3, 5), (1, 1)):
        results = made_up_results(seeds, epochs)
        for draw in (demo.draw_table, demo.draw_curves, demo.draw_class_prior):
            path = tmp_path / f"{draw.__name__}_{seeds}.png"
            draw(results, path)
            with image.open(path) as drawn:
                assert drawn.format == "PNG"
                assert drawn.width > 800
                assert len(drawn.convert("RGB").getcolors(2**24)) > 20
    assert not list(tmp_path.glob(".*"))


# --- a tenth of the digits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A data folder as prepare_data leaves it, with 120, 20 and 20 digits instead of all."""
    whole = prepare_data.prepare_digits(tmp_path_factory.mktemp("whole"))
    data = tmp_path_factory.mktemp("few")
    manifest = json.loads((whole / "manifest.json").read_text())
    for split, per_class in {"train": 12, "val": 2, "test": 2}.items():
        folders = sorted((whole / split).iterdir())
        chosen = [path for folder in folders for path in sorted(folder.iterdir())[:per_class]]
        for path in chosen:
            target = data / "digits" / path.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        manifest["splits"][split] = {"images": len(chosen), "per_class": {}, "sha256": "few"}
    (data / "digits" / "manifest.json").write_text(json.dumps(manifest))
    return data


@pytest.fixture
def here(few_digits, tmp_path, monkeypatch):
    """An empty working directory, the few digits as data, and the threads restored."""
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(few_digits))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


class FakeTraining:
    """Stands in for the driver's run: an untrained network as the checkpoint, made-up numbers."""

    def __init__(self, monkeypatch, here):
        from ikl_plugins.torchdistill import training as train_torchdistill

        self.driver = train_torchdistill
        self.calls = []
        self.stop_before = None
        monkeypatch.setattr(train_torchdistill, "run", self)
        # Two epochs each, so that there is an end of an epoch in the middle of a run.
        self.configs = here / "configs"
        self.configs.mkdir()
        for path in demo.CONFIGS.glob("*.yaml"):
            text, changes = re.subn(r"num_epochs: \d+", "num_epochs: 2", path.read_text())
            assert changes == 1
            (self.configs / path.name).write_text(text)
        monkeypatch.setattr(demo, "CONFIGS", self.configs)
        monkeypatch.setattr(demo, "TIMED_EPOCHS", 1)
        # These take seconds and have tests of their own.
        for module, draw in (
            (demo, "draw_table"), (demo, "draw_curves"), (demo, "draw_class_prior"),
            (demo_adversarial, "draw_images"), (demo_adversarial, "draw_robust_accuracy"),
        ):  # fmt: skip
            monkeypatch.setattr(module, draw, lambda results, path: path.write_bytes(b""))
        monkeypatch.setattr(demo_adversarial, "AdversarialRuns", FakeAdversarialRuns)
        monkeypatch.setattr(demo_robustbench, "RobustBenchRun", FakeRobustBenchRun)

    def __call__(self, config, *, device="cpu", seed=0, start_epoch=0, progress=None):
        from ikl_plugins import models

        model = config["models"].get("student_model", config["models"].get("model"))
        checkpoint = Path(model["dst_ckpt"])
        if checkpoint.stem == self.stop_before:
            raise KeyboardInterrupt
        self.calls.append(checkpoint.stem)
        network = getattr(models, model["key"].removeprefix("ikl_plugins."))(**model["kwargs"])
        epochs = config["train"]["num_epochs"]
        method = checkpoint.stem.split("_")[0]
        history = []
        for epoch in range(epochs):
            progress(epoch * 2 + 1, epochs * 2, f"epoch {epoch + 1}")
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            progress(epoch * 2 + 2, epochs * 2, f"epoch {epoch + 1}")
            for path in (checkpoint, self.driver.last_path(checkpoint)):
                torch.save({"model": network.state_dict()}, path)
            row = {"epoch": epoch, "lr": 0.1, "train_loss": 1.0, "val_accuracy": 50.0, "seconds_per_step": 0.01}
            if method in ("dkl", "ikl", "gkl"):
                row |= {f"{method}/weighted_mse": 1.0 + epoch, f"{method}/soft_cross_entropy": 2.0 + epoch}
            history.append(row)
        return {
            "test_accuracy": 50.0 + len(self.calls),
            "best_val_accuracy": 50.0,
            "history": history,
            "class_prior": {method: torch.full((10, 10), 0.1)} if method in ("ikl", "gkl") else {},
        }


class FakeAdversarialRuns:
    """Stands in for the adversarial part, which has tests of its own."""

    def __init__(self, *args, **keywords):
        pass

    def run(self, kept, steps, done):
        found = bool(kept)
        kept.update(made_up_adversarial_results())
        for _ in range(demo_adversarial.PARTS):
            done("a part", found)

    def trained(self, method):
        return "config", f"checkpoint of {method}"


class FakeRobustBenchRun:
    """Stands in for the last part, which has tests of its own."""

    def __init__(self, folder, data, config, checkpoint):
        assert folder.name == "robustbench"
        assert (config, checkpoint) == ("config", "checkpoint of adversarial_ikl")

    def run(self, kept, steps, done):
        found = bool(kept)
        kept.update(
            architecture="WideResNet-10-1", eps="16/255", images=20, natural_accuracy=95.0, robust_accuracy=90.0,
            attacks=["apgd-ce"], seconds=1.0, versions={"torch": "2"}, checks={"eval mode": True, "claim": None},
        )  # fmt: skip
        for _ in range(demo_robustbench.PARTS):
            done("a part", found)


def read_results(output):
    return json.loads((output / "results.json").read_text())


def test_a_second_call_keeps_every_run_and_fresh_forgets_them(here, monkeypatch, capsys):
    training = FakeTraining(monkeypatch, here)
    torch.set_num_threads(2)
    demo.main(["--seeds", "2"])
    assert torch.get_num_threads() == 1
    assert training.calls == [
        "teacher",
        *(f"{method}_seed0" for method in ("ce", "kd", "dkl", "ikl", "gkl")),
        *(f"{method}_seed1" for method in ("kd", "dkl", "ikl", "gkl", "ce")),
    ]
    out = capsys.readouterr().out
    assert "18 parts done, 0 kept from an earlier call" in out
    first = read_results(here / "runs/demo")
    assert first["reported"] == [f"{method}/{seed}" for seed in (0, 1) for method in demo.METHODS]
    assert sorted(path.name for path in (here / "runs/demo").iterdir()) == [
        "adversarial_images.png", "checkpoints", "class_prior.png", "curves.png", "results.json",
        "robust_accuracy.png", "table.md", "table.png",
    ]  # fmt: skip

    training.calls.clear()
    demo.main(["--seeds", "2"])
    assert training.calls == []
    assert "0 parts done, 18 kept from an earlier call" in capsys.readouterr().out
    assert read_results(here / "runs/demo") == first

    demo.main(["--seeds", "1", "--fresh"])
    assert len(training.calls) == 6
    assert list(read_results(here / "runs/demo")["runs"]) == [f"{method}/0" for method in demo.METHODS]


def test_more_seeds_add_runs_and_fewer_show_fewer_and_lose_none(here, monkeypatch):
    training = FakeTraining(monkeypatch, here)
    demo.main(["--seeds", "1"])
    training.calls.clear()
    demo.main(["--seeds", "2"])
    assert training.calls == [f"{method}_seed1" for method in ("kd", "dkl", "ikl", "gkl", "ce")]
    assert "over seeds 0, 1." in (here / "runs/demo/table.md").read_text()
    training.calls.clear()
    demo.main(["--seeds", "1"])
    assert "over seeds 0." in (here / "runs/demo/table.md").read_text()
    assert read_results(here / "runs/demo")["reported"] == [f"{method}/0" for method in demo.METHODS]
    demo.main(["--seeds", "2"])
    assert training.calls == []


def test_runs_of_other_settings_are_made_anew(here, monkeypatch):
    training = FakeTraining(monkeypatch, here)
    demo.main(["--quick"])
    training.calls.clear()
    demo.main(["--seeds", "1"])  # more epochs
    assert len(training.calls) == 6

    training.calls.clear()
    text = (training.configs / "ikl.yaml").read_text()
    assert "beta: 4.0" in text
    (training.configs / "ikl.yaml").write_text(text.replace("beta: 4.0", "beta: 5.0"))
    demo.main(["--seeds", "1"])
    assert training.calls == ["ikl_seed0"]

    training.calls.clear()
    (here / "runs/demo/checkpoints/teacher.pt").unlink()
    demo.main(["--seeds", "1"])
    assert training.calls == ["teacher"]


def test_an_interruption_keeps_the_finished_runs(here, monkeypatch):
    training = FakeTraining(monkeypatch, here)
    training.stop_before = "dkl_seed0"
    with pytest.raises(SystemExit, match=r"interrupted; 3 finished parts are kept in runs/demo, call again to go on"):
        demo.main(["--seeds", "1"])
    assert training.calls == ["teacher", "ce_seed0", "kd_seed0"]
    kept = read_results(here / "runs/demo")["runs"]
    assert list(kept) == ["ce/0", "kd/0"]
    training.calls.clear()
    training.stop_before = None
    demo.main(["--seeds", "1"])
    assert training.calls == ["dkl_seed0", "ikl_seed0", "gkl_seed0"]
    finished = read_results(here / "runs/demo")["runs"]
    assert {key: finished[key] for key in kept} == kept


def test_both_terms_are_measured_after_each_epoch(here, monkeypatch):
    training = FakeTraining(monkeypatch, here)
    demo.main(["--seeds", "1"])
    results = read_results(here / "runs/demo")
    from ikl_plugins import models

    config = training.driver.load_config(demo.CONFIGS / "kd.yaml")
    images = torch.stack([image for image, _ in config["datasets"]["digits/val"]])
    logits = {}
    for name, network in (("teacher", models.resnet14), ("kd_seed0", models.resnet8)):
        model = network(num_classes=10).eval()
        model.load_state_dict(training.driver.load_checkpoint(f"runs/demo/checkpoints/{name}.pt")["model"])
        with torch.no_grad():
            logits[name] = model(images).double()
    teacher, student = logits["teacher"], logits["kd_seed0"]
    labels = (teacher / 4).softmax(1)
    mse = 0.0
    for label, difference in zip(labels, teacher - student, strict=True):
        pairs = difference[:, None] - difference[None, :]
        mse += 0.25 * (label[:, None] * label[None, :] * pairs**2).sum().item() / len(labels)
    cross_entropy = -(labels * (student / 4).log_softmax(1)).sum(1).mean().item()
    measured = results["runs"]["kd/0"]["measured"]
    assert len(measured) == config["train"]["num_epochs"] == 2
    assert measured[-1]["weighted_mse"] == pytest.approx(mse, rel=1e-4)
    assert measured[-1]["soft_cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    entropy = -(labels * labels.log()).sum(1).mean().item()
    assert results["teacher"]["soft_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert results["runs"]["gkl/0"]["terms"]["soft_cross_entropy"][:2] == [2.0, 3.0]
    assert results["runs"]["kd/0"]["terms"] == {}


def test_what_happens_at_the_end_of_an_epoch_sees_that_epoch_s_checkpoint():
    seen = []
    progress = demo._at_epoch_ends(lambda step, total, text: seen.append(step), 3, lambda: seen.append("act"))
    for step in range(1, 7):
        progress(step, 6, "")
    assert seen == [1, 2, "act", 3, 4, "act", 5, 6]


def test_damaged_results_are_refused(here):
    (here / "out").mkdir()
    (here / "out/results.json").write_text('{"format": 1, "runs')
    with pytest.raises(SystemExit, match=r"error: demo: out/results\.json must be a results file, .* Pass --fresh"):
        demo.main(["--quick", "--output", "out"])


def test_no_seeds_are_refused():
    with pytest.raises(SystemExit, match="error: demo: --seeds must be at least 1, got 0"):
        demo.main(["--seeds", "0"])


def test_a_missing_package_names_the_pip_line(here, monkeypatch):
    monkeypatch.delitem(sys.modules, "train_torchdistill", raising=False)
    monkeypatch.setitem(sys.modules, "torchdistill.common.main_util", None)
    with pytest.raises(
        SystemExit, match=r"`torchdistill.common.main_util` is missing\. Run: python -m pip install --editable '"
    ):
        demo.main(["--quick"])


def test_an_output_that_cannot_be_a_folder_is_named_before_the_training(here, monkeypatch):
    training = FakeTraining(monkeypatch, here)
    (here / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*Not a directory: 'file/out"):
        demo.main(["--quick", "--output", "file/out"])
    assert training.calls == []


def test_a_killed_demo_goes_on_where_it_stopped(few_digits, tmp_path):
    """The real training, in processes of their own."""
    command = [sys.executable, str(TOOL), "--quick", "--output", str(tmp_path / "demo")]
    environment = {**os.environ, "IKL_PLUGINS_DATA": str(few_digits)}
    run = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("[ 3/13]"):
            break
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    kept = read_results(tmp_path / "demo")
    assert {"ce/0", "kd/0"} <= set(kept["runs"])
    assert not (tmp_path / "demo/table.md").exists()

    begin = time.monotonic()
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - begin < 300
    finished = read_results(tmp_path / "demo")
    assert finished["teacher"] == kept["teacher"]
    assert {key: finished["runs"][key] for key in kept["runs"]} == kept["runs"]
    assert finished["reported"] == [f"{method}/0" for method in demo.METHODS]
    assert "[ 3/13] KL   seed 0" in again.stdout
    assert again.stdout.count("(kept from an earlier call)") == len(kept["runs"]) + 1
    assert {len(seconds) for seconds in finished["step_seconds"].values()} == {1}
    assert TABLE_LINE.findall(again.stdout) == ["CE", "KL", "DKL", "IKL", "GKL", "IKL"]  # the last is under attack
    assert (tmp_path / "demo/table.md").read_text() in again.stdout
    assert finished["environment"]["threads"] == 1
    assert set(finished["environment"]["versions"]) == {
        "python", "ikl_plugins", "torch", "torchvision", "torchdistill", "numpy",
    }  # fmt: skip
    for method in demo_adversarial.METHODS:
        natural, *attacked = finished["adversarial"]["evaluation"]["accuracy"][method]
        assert 0 <= attacked[-1] <= natural <= 100
        assert finished["adversarial"]["runs"][method]["epochs"] == 1
        assert (tmp_path / "demo/adversarial" / finished["adversarial"]["runs"][method]["checkpoint"]).is_file()
    for name in ("table", "curves", "class_prior", "adversarial_images", "robust_accuracy"):
        assert (tmp_path / f"demo/{name}.png").read_bytes().startswith(b"\x89PNG")
    place = tmp_path / "demo/robustbench/submission"
    (entry,) = (place / "model_info/cifar10/Linf").glob("*.json")
    assert json.loads(entry.read_text())["autoattack_acc"] == f"{finished['robustbench']['robust_accuracy']:.2f}"
    assert (place / f"models/cifar10/Linf/{entry.stem}.pt").is_file()
    assert "Demonstration" in (place / "new_models_form.md").read_text()
    assert (tmp_path / "demo/robustbench/evaluation/report.md").is_file()
    priors = torch.tensor(finished["runs"]["ikl/0"]["class_prior"])
    torch.testing.assert_close(priors.sum(1), torch.ones(10))
    for run in finished["runs"].values():
        assert len(run["seconds_per_step"]) == len(run["measured"]) == 1
        assert run["test_accuracy"] * 20 / 100 == int(run["test_accuracy"] * 20 / 100)
