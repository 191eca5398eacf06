"""tools/robustbench_rank.py: from numbers, and from the log of an evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ikl_plugins.commands import rank as robustbench_rank
from ikl_plugins.commands.rank import main

from ikl_plugins.robustbench.report import binomial_interval

TOOL = Path(robustbench_rank.__file__)
NUMBERS = ["--dataset", "cifar100", "--robust", "31.91"]


def log(**changes):
    """What an evaluation of 10,000 images says; the rest is there and not read."""
    unread = (
        "versions", "weights_sha256", "version", "dropped", "labels", "natural_correct", "robust", "progress",
    )  # fmt: skip
    return {
        **dict.fromkeys(unread),
        "format": "ikl_plugins.robustbench.evaluation/1",
        "model": "WideResNet-34-10",
        "threat_model": "Linf",
        "eps": "8/255",
        "dataset": None,
        "data": {"name": "cifar100"},
        "standard": True,
        "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "n_examples": 10000,
        "natural_accuracy": 65.76,
        "robust_accuracy": 31.91,
        "finished": True,
        "adversarial": False,
        "fell_to": [],
        **changes,
    }


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        path = tmp_path / "evaluation.json"
        path.write_text(json.dumps(log(**changes)))
        return str(path)

    return write


def test_ranks_numbers(capsys):
    main([*NUMBERS, "--natural", "65.76", "--eps", "8/255", "--additional-data", "no", "--name", "Mine2025Better"])
    text = capsys.readouterr().out
    assert text.startswith(
        "# Mine2025Better on RobustBench: cifar100, Linf, eps = 8/255\n\nRobust accuracy 31.91 %, nat"
    )
    assert "| all | 16 to 18 of 39 | Cui2023Decoupled_WRN-34-10, Jia2022LAS-AT_34_20 |" in text
    assert "| without additional data (as this result) |" in text
    assert text.endswith("Current: https://robustbench.github.io\n")
    assert "the table of 2025-03-31" in text


def test_leaves_unreliable_entries_out(capsys):
    main(["--dataset", "cifar10", "--robust", "57.09"])
    assert "| all | 49 to 51 of 100 |" in capsys.readouterr().out
    main(["--dataset", "cifar10", "--robust", "57.09", "--without-unreliable"])
    assert "| all | 48 to 50 of 98 |" in capsys.readouterr().out


def test_ranks_a_log(written, capsys):
    main([written(), "--name", "Cui2023Decoupled_WRN-34-10", "--additional-data", "no"])
    text = capsys.readouterr().out
    assert "| all | 16 to 17 of 38 | Jia2022LAS-AT_34_20 |" in text
    assert "Robust accuracy 31.91 %, natural accuracy 65.76 %." in text
    assert "images:" not in text


def test_ranks_a_log_of_corruptions(written, capsys):
    path = written(
        threat_model="corruptions", eps=None, dataset="cifar10", data={"name": "cifar10"}, standard=False, attacks=[],
        robust_accuracy=90.0, natural_accuracy=95.0,
    )  # fmt: skip
    main([path])
    text = capsys.readouterr().out
    assert text.startswith("# WideResNet-34-10 on RobustBench: cifar10, corruptions\n")
    assert "AutoAttack" not in text


def test_says_why_a_log_may_not_be_comparable(written, capsys):
    path = written(data={"name": "data/digits/test"}, standard=False, attacks=["apgd-ce"], n_examples=100)
    main([path, "--dataset", "cifar100"])
    notes = capsys.readouterr().out.split("robustbench.github.io\n")[1]
    assert "The evaluation is on data/digits/test, the entries on the test images of cifar100: not comparable." in notes
    assert "The entries are by standard AutoAttack, the result by apgd-ce: it may be too high." in notes
    low, high = binomial_interval(32, 100)
    places = [1 + sum(e > round(bound, 2) for e in accuracies()) for bound in (high, low)]
    assert (
        f"Only 100 of 10000 images: with 95 % probability the accuracy on all lies between {low:.2f} % and "
        f"{high:.2f} %, and the place between {places[0]} and {places[1]}."
    ) in notes


def accuracies():
    from ikl_plugins.robustbench.leaderboard import entries

    return [entry.robust_accuracy for entry in entries("cifar100", "Linf")]


def test_draws_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = tmp_path / "rank.png"
    main([*NUMBERS, "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"plot: {path}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "robustbench_rank: a result must be named. Pass the evaluation.json of tools/robustbench_eval.py, or "),
        (["--robust", "50"], "robustbench_rank: a result must be named. "),
        (
            ["--dataset", "cifar", "--robust", "50"],
            "robustbench_rank: unknown data set `cifar`. Did you mean `cifar10`? Known: cifar10, cifar100, imagenet.",
        ),
        (
            [*NUMBERS, "--threat-model", "L1"],
            "robustbench_rank: unknown threat model `L1`. Known: L2, Linf, corruptions, ",
        ),
        (["--dataset", "cifar10", "--robust", "5709"], "rank: `robust_accuracy` must be in percent, 0 to 100, "),
        ([*NUMBERS, "--eps", "4/255"], "rank: `eps` must be 8/255, the radius of the leaderboard for cifar100"),
        (["missing.json"], "Evaluation.load: the log must be a file, but there is none at missing.json."),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert str(ended.value).startswith(f"error: {message}")
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--robust", "40"], "robustbench_rank: --robust must be left out, as "),
        ({}, ["--eps", "8/255"], "robustbench_rank: --eps must be left out, as "),
        (
            {},
            ["--dataset", "cifar10"],
            "robustbench_rank: --dataset must be cifar100, that of the evaluation, got cifar10. Leave it out.",
        ),
        (
            {"data": {"name": "digits.npz"}},
            [],
            "robustbench_rank: the evaluation is on 'digits.npz', which has no leaderboard. Name one to compare with: "
            "--dataset cifar10.",
        ),
        ({"data": None}, [], "robustbench_rank: the evaluation is on None, which has no leaderboard."),
        ({"eps": "4/255"}, [], "rank: `eps` must be 8/255, the radius of the leaderboard for cifar100 and Linf, got 4"),
    ],
)
def test_errors_of_logs_are_one_line(changes, arguments, message, written):
    with pytest.raises(SystemExit) as ended:
        main([written(**changes), *arguments])
    assert str(ended.value).startswith(f"error: {message}")


def test_refuses_an_unfinished_log(written):
    path = written(finished=False)
    with pytest.raises(SystemExit) as ended:
        main([path])
    assert str(ended.value) == (
        f"error: robustbench_rank: {path} must be a finished evaluation, but was interrupted. Run "
        f"tools/robustbench_eval.py with the same arguments to go on."
    )


def test_a_rounded_radius_is_warned_of_on_one_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit, match=r"^error: rank: `eps` must be 8/255, .*, got 0.031\."):
            main([*NUMBERS, "--eps", "0.031"])
    assert capsys.readouterr().err == (
        "warning: rank: `eps` = 0.031 is 7.905/255 and not 8/255. It is used as it is; for 8/255 write 8/255.\n"
    )


def test_knows_no_abbreviations(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--data", "cifar100", "--robust", "50"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --data" in capsys.readouterr().err


def test_runs_from_any_folder(tmp_path):
    command = [sys.executable, TOOL, "--dataset", "imagenet", "--robust", "55", "--eps", "4/255"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "imagenet, Linf, eps = 4/255" in done.stdout
