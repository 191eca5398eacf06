"""`ikl rank`: from numbers, and from the log of an evaluation."""

from __future__ import annotations

import pytest
import torch
from quick_autoattack import Harmless, consistent_log, robustbench, write_network_and_images

from ikl_plugins.commands.main import main as ikl
from ikl_plugins.robustbench import evaluate, load_images
from ikl_plugins.robustbench.evaluation.log import write_log
from ikl_plugins.robustbench.leaderboard import entries
from ikl_plugins.robustbench.report import binomial_interval

NUMBERS = ["--dataset", "cifar100", "--robust", "31.91"]


def main(arguments):
    ikl(["rank", *arguments])


@pytest.fixture
def written(tmp_path):
    """Writes the log of a result on CIFAR-100."""

    def write(count=10000, natural=6576, robust=3191, **changes):
        path = tmp_path / "evaluation.json"
        log = consistent_log(count, natural, robust, classes=100, model="WideResNet-34-10")
        data = {**log["data"], **changes.pop("data", {})}
        write_log({**log, "data": data, **changes}, path)
        return str(path)

    return write


def test_ranks_numbers(capsys):
    main([*NUMBERS, "--natural", "65.76", "--eps", "8/255", "--additional-data", "no", "--name", "Mine2025Better"])
    text = capsys.readouterr().out
    assert "| all | 16 to 18 of 39 | Cui2023Decoupled_WRN-34-10, Jia2022LAS-AT_34_20 |" in text
    assert "| without additional data (as this result) |" in text


def test_leaves_unreliable_entries_out(capsys):
    main(["--dataset", "cifar10", "--robust", "57.09"])
    assert "| all | 49 to 51 of 100 |" in capsys.readouterr().out
    main(["--dataset", "cifar10", "--robust", "57.09", "--without-unreliable"])
    assert "| all | 48 to 50 of 98 |" in capsys.readouterr().out


def test_ranks_a_log(written, capsys):
    main([written(), "--name", "Cui2023Decoupled_WRN-34-10", "--additional-data", "no"])
    text = capsys.readouterr().out
    assert "| all | 16 to 17 of 38 | Jia2022LAS-AT_34_20 |" in text


def test_says_why_a_log_may_not_be_comparable(written, capsys):
    elsewhere, attack = {"name": "data/digits/test", "source": None}, {"attacks": ["apgd-ce"], "n_target_classes": None}
    progress = consistent_log(100, 66, 32, classes=100)["progress"][:1]
    custom = {"version": "custom", "standard": False, **attack, "progress": progress}
    main([written(100, 66, 32, data=elsewhere, **custom), "--dataset", "cifar100"])
    notes = capsys.readouterr().out
    assert "The model was not run: the accuracies are those that the log states." in notes
    assert "on data/digits/test" in notes
    assert "by apgd-ce" in notes
    board = entries("cifar100", "Linf")
    low, high = binomial_interval(32, 100)
    places = [1 + sum(entry.robust_accuracy > round(bound, 2) for entry in board) for bound in (high, low)]
    assert f"between {low:.2f} % and {high:.2f} %" in notes
    assert f"between {places[0]} and {places[1]}" in notes


def test_runs_the_model_again(tmp_path, monkeypatch, capsys):
    net, images, labels = write_network_and_images(tmp_path, 12)
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Harmless)
    data, log = load_images(tmp_path / "images.npz"), tmp_path / "evaluation.json"
    evaluate(net, images, labels, eps="8/255", data=data, log=log, progress=False)
    model = f"--checkpoint {tmp_path}/net.pt --architecture WideResNet-10-1 --data {tmp_path}/images.npz"
    main([str(log), "--dataset", "cifar10", *model.split()])
    assert "The model: run again on 12 of 12 natural and 0 of 0 adversarial images: as the" in capsys.readouterr().out
    with torch.no_grad():
        net.fc.bias += 1e-3
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(SystemExit, match=r"^error: verify: `weights_sha256` of the log is "):
        main([str(log), "--dataset", "cifar10", *model.split()])


@pytest.mark.parametrize(
    ("changes", "arguments", "fragment"),
    [
        (None, "", "ikl rank: a result must be named"),
        (None, "--robust 50", "ikl rank: a result must be named"),
        (None, "--dataset cifar100", "ikl rank: a result must be named"),
        (None, "missing.json", "Evaluation.load: the log must be a file, but there is none at missing.json"),
        ({}, "--robust 40", "ikl rank: --robust must be left out"),
        ({}, "--eps 8/255", "ikl rank: --eps must be left out"),
        ({}, "--dataset cifar10", "ikl rank: --dataset must be cifar100, that of the evaluation, got cifar10"),
        (
            {"data": {"name": "a.npz", "source": None}},
            "",
            "ikl rank: the evaluation is on 'a.npz', which has no leaderboard",
        ),
        ({"finished": False}, "", "ikl rank: .* must be a finished evaluation, but was interrupted. Run ikl evaluate"),
    ],
)
def test_errors_are_one_line(changes, arguments, fragment, written):
    path = [] if changes is None else [written(**changes)]
    with pytest.raises(SystemExit, match=f"^error: {fragment}[^\\n]*$"):
        main([*path, *arguments.split()])
