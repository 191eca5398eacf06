"""tools/demo.py: its numbers, what it keeps and redoes, and the whole of it on a tenth of the digits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from demo import adversarial, distill, robustbench
from demo import main as demo
from demo_adversarial_results import made_up_adversarial_results
from evidence.cache import TOOLS, read_json

from ikl_plugins.commands.data import prepare_digits

TABLE_LINE = re.compile(r"^\| (CE|KL|DKL|IKL|GKL) +\|", re.MULTILINE)


def made_up_results(seeds=3, epochs=5, methods=tuple(distill.METHODS)):
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
        "step_seconds": {method: [draw.uniform(0.01, 0.03) for _ in range(9)] for method in distill.METHODS},
    }


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_report_prints_the_numbers_and_their_order_whatever_it_is():
    results = made_up_results(seeds=2)
    accuracies = {"ce": (97.0, 98.0), "kd": (90.0, 91.0), "dkl": (90.0, 91.0), "ikl": (80.0, 84.0), "gkl": (99.0, 99.0)}
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            results["runs"][f"{method}/{seed}"]["test_accuracy"] = value
        results["step_seconds"][method] = [0.02, 0.04, 0.02]
    # The median of the ratios, .75, is not that of the medians.
    results["step_seconds"]["ikl"] = [0.016, 0.03, 0.014]
    report = distill.markdown(results)
    lines = {line.split("|")[1].strip(): line for line in report.splitlines() if TABLE_LINE.match(line)}
    cells = {name: [cell.strip() for cell in line.split("|")[3:-1]] for name, line in lines.items()}
    assert cells == {
        "CE": ["97.50 ± 0.71", "97.00, 98.00", "1.00", "20.0"],
        "KL": ["90.50 ± 0.71", "90.00, 91.00", "1.00", "20.0"],
        "DKL": ["90.50 ± 0.71", "90.00, 91.00", "1.00", "20.0"],
        "IKL": ["82.00 ± 2.83", "80.00, 84.00", "0.75", "16.0"],
        "GKL": ["99.00 ± 0.00", "99.00, 99.00", "1.00", "20.0"],
    }
    assert "By mean: GKL 99.00, CE 97.50, KL = DKL 90.50, IKL 82.00." in report
    # The mean accuracy is 91.9 %: 1.96 sqrt(.919 * .081 / 300) = 3.09 %.
    assert "leaves about ±3.1 points (95 %)" in report


@pytest.mark.parametrize(("seeds", "epochs"), [(3, 5), (1, 1)])
def test_the_plots_are_images(tmp_path, seeds, epochs):
    from PIL import Image

    results = made_up_results(seeds, epochs)
    seeds_matter = (distill.draw_table, distill.draw_curves)
    for draw in (*seeds_matter, distill.draw_class_prior) if seeds > 1 else seeds_matter:
        path = tmp_path / f"{draw.__name__}.png"
        draw(results, path)
        with Image.open(path) as drawn:
            assert drawn.format == "PNG"
            assert drawn.width > 800
            assert len(drawn.convert("RGB").getcolors(2**24)) > 20


# --- a tenth of the digits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A data folder as `ikl data` leaves it, with 120, 20 and 20 digits instead of all."""
    whole = prepare_digits(tmp_path_factory.mktemp("whole"))
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


class FakeTraining:
    """Stands in for the driver's run: an untrained network as the checkpoint, made-up numbers."""

    def __init__(self, monkeypatch, here):
        self.calls = []
        self.stop_before = None
        monkeypatch.setattr(distill.training, "run", self)
        # Two epochs each, so that there is an end of an epoch in the middle of a run.
        self.configs = here / "configs"
        self.configs.mkdir()
        for path in distill.CONFIGS.glob("*.yaml"):
            text, changes = re.subn(r"num_epochs: \d+", "num_epochs: 2", path.read_text())
            assert changes == 1
            (self.configs / path.name).write_text(text)
        monkeypatch.setattr(distill, "CONFIGS", self.configs)
        monkeypatch.setattr(distill, "TIMED_EPOCHS", 1)
        # These take seconds and have tests of their own.
        for module in (distill, adversarial):
            for draw in [name for name in vars(module) if name.startswith("draw_") and "with" not in name]:
                monkeypatch.setattr(module, draw, lambda results, path: path.write_bytes(b""))
        monkeypatch.setattr(adversarial, "AdversarialRuns", FakeAdversarialRuns)
        monkeypatch.setattr(robustbench, "evaluate_and_submit", fake_evaluation)

    def __call__(self, config, *, seed=0, progress=None):
        from ikl_plugins import models

        model = distill._student(config)
        method = model["dst_ckpt"].rpartition("/")[2].removesuffix(".pt")
        name = f"{method}-{seed}"
        if name == self.stop_before:
            raise KeyboardInterrupt
        self.calls.append(name)
        network = getattr(models, model["key"].removeprefix("ikl_plugins."))(**model["kwargs"])
        epochs = config["train"]["num_epochs"]
        history = []
        for epoch in range(epochs):
            for step in (1, 2):
                progress(epoch * 2 + step, epochs * 2, f"epoch {epoch + 1}")
            for path in (model["dst_ckpt"], distill.training.last_path(model["dst_ckpt"])):
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

    def new_calls(self):
        """What was trained since the last time."""
        calls, self.calls = self.calls, []
        return calls


class FakeAdversarialRuns:
    """Stands in for the adversarial part, which has tests of its own."""

    def __init__(self, *args, **keywords):
        pass

    def run(self):
        return made_up_adversarial_results()

    def trained(self, method):
        return "config", f"checkpoint of {method}"


def fake_evaluation(parts, data, config, checkpoint):
    """Stands in for the last part, which has tests of its own."""
    assert (config, checkpoint) == ("config", "checkpoint of adversarial_ikl")
    numbers = {"images": 20, "natural_accuracy": 95.0, "robust_accuracy": 90.0, "seconds": 1.0}
    told = {"architecture": "WideResNet-10-1", "eps": "16/255", "attacks": ["apgd-ce"], "versions": {"torch": "2"}}
    return {**numbers, **told, "checks": {"eval mode": True, "claim": None}}


@pytest.fixture
def training(few_digits, tmp_path, monkeypatch):
    """Made-up trainings in an empty working directory, the few digits as data; the threads are restored."""
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(few_digits))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield FakeTraining(monkeypatch, tmp_path)
    torch.set_num_threads(threads)


STUDENTS = [f"{method}-0" for method in distill.METHODS]


def test_runs_are_kept_until_what_decides_them_changes(training, tmp_path, capsys):
    output = tmp_path / "runs/demo"
    torch.set_num_threads(2)
    demo.main(["--seeds", "1"])
    assert torch.get_num_threads() == 1
    assert training.new_calls() == ["teacher-0", *STUDENTS]
    assert "7 parts done, 0 kept from an earlier call" in capsys.readouterr().out
    first = read_json(output / "results.json")
    assert list(first["runs"]) == [f"{method}/0" for method in distill.METHODS]

    demo.main(["--seeds", "2"])
    assert training.new_calls() == [f"{method}-1" for method in distill.METHODS]
    assert "over seeds 0, 1." in (output / "table.md").read_text()
    demo.main(["--seeds", "1"])
    assert training.new_calls() == []
    assert "0 parts done, 7 kept from an earlier call" in capsys.readouterr().out
    assert read_json(output / "results.json") == first
    assert "over seeds 0." in (output / "table.md").read_text()

    config = training.configs / "ikl.yaml"
    config.write_text(config.read_text().replace("beta: 4.0", "beta: 5.0"))
    demo.main(["--seeds", "1"])
    assert training.new_calls() == ["ikl-0"]
    (output / "teacher/teacher.pt").unlink()
    demo.main(["--seeds", "1"])
    assert training.new_calls() == ["teacher-0"]
    for options in (["--quick"], ["--quick", "--fresh"]):  # fewer epochs
        demo.main(options)
        assert training.new_calls() == ["teacher-0", *STUDENTS]


def test_an_interruption_keeps_the_finished_runs(training):
    training.stop_before = "dkl-0"
    with pytest.raises(SystemExit, match=r"interrupted; 3 finished parts are kept in runs/demo, call again to go on"):
        demo.main(["--seeds", "1"])
    assert training.new_calls() == ["teacher-0", "ce-0", "kd-0"]
    training.stop_before = None
    demo.main(["--seeds", "1"])
    assert training.new_calls() == ["dkl-0", "ikl-0", "gkl-0"]


def test_both_terms_are_measured_after_each_epoch(training, tmp_path):
    from ikl_plugins import models

    demo.main(["--seeds", "1"])
    results = read_json(tmp_path / "runs/demo/results.json")
    config = distill.training.load_config(distill.CONFIGS / "kd.yaml")
    images = torch.stack([image for image, _ in config["datasets"]["digits/val"]])
    logits = {}
    for name, network in (("teacher/teacher", models.resnet14), ("students/kd-0/kd", models.resnet8)):
        model = network(num_classes=10).eval()
        model.load_state_dict(distill.training.load_checkpoint(tmp_path / f"runs/demo/{name}.pt")["model"])
        with torch.no_grad():
            logits[name] = model(images).double()
    teacher, student = logits.values()
    labels = (teacher / 4).softmax(1)
    mse = 0.0
    for label, gap in zip(labels, teacher - student, strict=True):
        pairs = gap[:, None] - gap[None, :]
        mse += 0.25 * (label[:, None] * label[None, :] * pairs**2).sum().item() / len(labels)
    cross_entropy = -(labels * (student / 4).log_softmax(1)).sum(1).mean().item()
    measured = results["runs"]["kd/0"]["measured"]
    assert len(measured) == config["train"]["num_epochs"] == 2
    assert measured[-1]["weighted_mse"] == pytest.approx(mse, rel=1e-4)
    assert measured[-1]["soft_cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    entropy = -(labels * labels.log()).sum(1).mean().item()
    assert results["teacher"]["soft_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert results["runs"]["gkl/0"]["terms"]["soft_cross_entropy"] == [2.0, 3.0]
    assert results["runs"]["kd/0"]["terms"] == {}


def test_what_a_user_can_mend_ends_it_with_one_line(training, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: demo: --seeds must be at least 1, got 0"):
        demo.main(["--seeds", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*Not a directory: 'file/out"):
        demo.main(["--quick", "--output", "file/out"])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"`tqdm` is missing\. Run: python -m pip install --editable"):
        demo.main(["--quick"])
    assert training.calls == []


@pytest.mark.slow
def test_a_killed_demo_goes_on_where_it_stopped(few_digits, tmp_path):
    """The real training, in processes of their own."""
    output = tmp_path / "demo"
    command = [sys.executable, str(TOOLS / "demo.py"), "--quick", "--output", str(output)]
    environment = {**os.environ, "IKL_PLUGINS_DATA": str(few_digits)}
    run = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("[ 3/12]"):
            break
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    kept = {name: read_json(output / name / "result.json") for name in ("teacher", "students/ce-0", "students/kd-0")}
    assert not (output / "table.md").exists()

    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert {name: read_json(output / name / "result.json") for name in kept} == kept
    assert again.stdout.count("(kept from an earlier call)") >= len(kept)
    assert TABLE_LINE.findall(again.stdout) == ["CE", "KL", "DKL", "IKL", "GKL", "IKL"]  # the last is under attack
    assert (output / "table.md").read_text() in again.stdout
    finished = read_json(output / "results.json")
    for method in adversarial.METHODS:
        natural, *attacked = finished["adversarial"]["evaluation"]["accuracy"][method]
        assert 0 <= attacked[-1] <= natural <= 100
        assert finished["adversarial"]["runs"][method]["epochs"] == 1
    for name in ("table", "curves", "class_prior", "adversarial_images", "robust_accuracy"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (entry,) = (output / "robustbench/submission/model_info/cifar10/Linf").glob("*.json")
    assert json.loads(entry.read_text())["autoattack_acc"] == f"{finished['robustbench']['robust_accuracy']:.2f}"
    assert (output / "robustbench/evaluation/report.md").is_file()
    priors = torch.tensor(finished["runs"]["ikl/0"]["class_prior"])
    torch.testing.assert_close(priors.sum(1), torch.ones(10))
    for run in finished["runs"].values():
        assert len(run["seconds_per_step"]) == len(run["measured"]) == 1
        assert run["test_accuracy"] * 20 / 100 == int(run["test_accuracy"] * 20 / 100)
