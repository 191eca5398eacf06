"""`ikl rank`: from numbers, and from the log of an evaluation."""

from __future__ import annotations

import json
import warnings

import pytest

from ikl_plugins.commands.main import main as ikl
from ikl_plugins.robustbench.leaderboard import entries
from ikl_plugins.robustbench.report import binomial_interval

NUMBERS = ["--dataset", "cifar100", "--robust", "31.91"]


def main(arguments):
    ikl(["rank", *arguments])


def log(**changes):
    """What an evaluation of 10,000 images says; the rest is there and not read."""
    unread = ("versions", "weights_sha256", "version", "dropped", "labels", "natural_correct", "robust", "progress")
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
        threat_model="corruptions",
        eps=None,
        dataset="cifar10",
        data={"name": "cifar10"},
        standard=False,
        attacks=[],
        robust_accuracy=90.0,
        natural_accuracy=95.0,
    )
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
    board = entries("cifar100", "Linf")
    low, high = binomial_interval(32, 100)
    places = [1 + sum(entry.robust_accuracy > round(bound, 2) for entry in board) for bound in (high, low)]
    assert (
        f"Only 100 of 10000 images: with 95 % probability the accuracy on all lies between {low:.2f} % and "
        f"{high:.2f} %, and the place between {places[0]} and {places[1]}."
    ) in notes


def test_draws_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = tmp_path / "rank.png"
    main([*NUMBERS, "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"plot: {path}\n")


@pytest.mark.parametrize(
    ("changes", "arguments", "fragment"),
    [
        (None, "", "ikl rank: a result must be named"),
        (None, "--robust 50", "ikl rank: a result must be named"),
        (None, "--dataset cifar100", "ikl rank: a result must be named"),
        (None, "--dataset cifar --robust 50", "ikl rank: unknown data set `cifar`. Did you mean `cifar10`"),
        (None, "--dataset cifar10 --robust 50 --threat-model L1", "ikl rank: unknown threat model `L1`"),
        (None, "--dataset cifar10 --robust 5709", "rank: `robust_accuracy` must be in percent"),
        (None, "--dataset cifar100 --robust 31 --eps 4/255", "rank: `eps` must be 8/255"),
        (None, "missing.json", "Evaluation.load: the log must be a file, but there is none at missing.json"),
        ({}, "--robust 40", "ikl rank: --robust must be left out"),
        ({}, "--natural 40", "ikl rank: --natural must be left out"),
        ({}, "--eps 8/255", "ikl rank: --eps must be left out"),
        ({}, "--threat-model L2", "ikl rank: --threat-model must be left out"),
        ({}, "--dataset cifar10", "ikl rank: --dataset must be cifar100, that of the evaluation, got cifar10"),
        ({"data": {"name": "a.npz"}}, "", "ikl rank: the evaluation is on 'a.npz', which has no leaderboard"),
        ({"data": None}, "", "ikl rank: the evaluation is on None, which has no leaderboard"),
        ({"eps": "4/255"}, "", "rank: `eps` must be 8/255, the radius of the leaderboard for cifar100 and Linf, got 4"),
        ({"finished": False}, "", "ikl rank: .* must be a finished evaluation, but was interrupted. Run ikl evaluate"),
    ],
)
def test_errors_are_one_line(changes, arguments, fragment, written):
    path = [] if changes is None else [written(**changes)]
    with pytest.raises(SystemExit, match=f"^error: {fragment}[^\\n]*$"):
        main([*path, *arguments.split()])


def test_a_rounded_radius_is_warned_of_on_one_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit, match=r"^error: rank: `eps` must be 8/255, .*, got 0.031\."):
            main([*NUMBERS, "--eps", "0.031"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: rank: `eps` = 0.031 is 7.905/255 and not 8/255.")
