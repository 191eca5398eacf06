"""`ikl rank`: from numbers, and from the log of an evaluation."""

from __future__ import annotations

import json

import pytest
from quick_autoattack import made_up_log

from ikl_plugins.commands.main import main as ikl
from ikl_plugins.robustbench.leaderboard import entries
from ikl_plugins.robustbench.report import binomial_interval

NUMBERS = ["--dataset", "cifar100", "--robust", "31.91"]


def main(arguments):
    ikl(["rank", *arguments])


def log(**changes):
    """Of a result on CIFAR-100."""
    numbers = {"natural_accuracy": 65.76, "robust_accuracy": 31.91}
    return made_up_log(**{"model": "WideResNet-34-10", "data": {"name": "cifar100"}, **numbers, **changes})


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
    path = written(data={"name": "data/digits/test"}, standard=False, attacks=["apgd-ce"], n_examples=100)
    main([path, "--dataset", "cifar100"])
    notes = capsys.readouterr().out
    assert "on data/digits/test" in notes
    assert "by apgd-ce" in notes
    board = entries("cifar100", "Linf")
    low, high = binomial_interval(32, 100)
    places = [1 + sum(entry.robust_accuracy > round(bound, 2) for entry in board) for bound in (high, low)]
    assert f"between {low:.2f} % and {high:.2f} %" in notes
    assert f"between {places[0]} and {places[1]}" in notes


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
        ({"data": {"name": "a.npz"}}, "", "ikl rank: the evaluation is on 'a.npz', which has no leaderboard"),
        ({"finished": False}, "", "ikl rank: .* must be a finished evaluation, but was interrupted. Run ikl evaluate"),
    ],
)
def test_errors_are_one_line(changes, arguments, fragment, written):
    path = [] if changes is None else [written(**changes)]
    with pytest.raises(SystemExit, match=f"^error: {fragment}[^\\n]*$"):
        main([*path, *arguments.split()])
