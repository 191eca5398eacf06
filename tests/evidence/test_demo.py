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
from demo import adversarial, distill
from evidence.cache import TOOLS, read_json

from ikl_plugins import models
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


# --- what is measured ------------------------------------------------------------------------------------------------


def test_both_terms_are_those_of_the_pairs(tmp_path):
    images, networks = [(torch.rand(3, 32, 32), 0) for _ in range(12)], {}
    for name in ("resnet14", "resnet8"):
        networks[name] = getattr(models, name)(num_classes=10).eval()
        torch.save({"model": networks[name].state_dict()}, tmp_path / f"{name}.pt")
    teacher_block, student_block = ({"key": f"ikl_plugins.{name}", "kwargs": {"num_classes": 10}} for name in networks)
    measure = distill.Measure(images, teacher_block, tmp_path / "resnet14.pt")
    found = measure(student_block, tmp_path / "resnet8.pt")
    with torch.no_grad():
        batch = torch.stack([image for image, _ in images])
        teacher, student = (network(batch).double() for network in networks.values())
    labels = (teacher / 4).softmax(1)
    mse = 0.0
    for label, gap in zip(labels, teacher - student, strict=True):
        pairs = gap[:, None] - gap[None, :]
        mse += 0.25 * (label[:, None] * label[None, :] * pairs**2).sum().item() / len(labels)
    assert found["weighted_mse"] == pytest.approx(mse, rel=1e-4)
    cross_entropy = -(labels * (student / 4).log_softmax(1)).sum(1).mean().item()
    assert found["soft_cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert measure.soft_entropy == pytest.approx(-(labels * labels.log()).sum(1).mean().item(), rel=1e-5)


def test_the_end_of_an_epoch_sees_that_epoch_s_checkpoint():
    seen = []
    progress = distill.at_epoch_ends(lambda step, total, text: seen.append(step), 3, lambda: seen.append("act"))
    for step in range(1, 7):
        progress(step, 6, "")
    assert seen == [1, 2, "act", 3, 4, "act", 5, 6]


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
