"""Where a result stands among the entries of RobustBench's leaderboard, without a network connection.

    ikl rank runs/wrn/evaluation.json --plot rank.png
    ikl rank --dataset cifar100 --threat-model Linf --eps 8/255 \\
        --robust 31.91 --natural 65.76 --additional-data no

The table of entries is part of this package; the output says of which day it is.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from ikl_plugins import _validation as check
from ikl_plugins.robustbench.evaluation_log import Evaluation
from ikl_plugins.robustbench.leaderboard import Ranking, draw, rank
from ikl_plugins.robustbench.report import binomial_interval

__all__ = ["configure", "run"]

CALLER = "robustbench_rank"
DATASETS = ("cifar10", "cifar100", "imagenet")
THREAT_MODELS = ("Linf", "L2", "corruptions", "corruptions_3d")
# Images of the benchmark: the test sets of CIFAR, and those of ImageNet that RobustBench lists.
IMAGES = {"cifar10": 10000, "cifar100": 10000, "imagenet": 5000}


def run(args: argparse.Namespace) -> Ranking:
    """Runs a parsed command line.

    Args:
        args: of this tool.

    Returns:
        The ranking, which is also printed.

    Raises:
        ImportError: --plot without matplotlib.
        OSError: the plot cannot be written.
        TypeError: see :func:`ikl_plugins.robustbench.leaderboard.rank`.
        ValueError: see there; or numbers are missing, or are given beside an evaluation that has its own.
    """
    for option, value, known in (
        ("data set", args.dataset, DATASETS),
        ("threat model", args.threat_model, THREAT_MODELS),
    ):
        if value is not None and value not in known:
            raise ValueError(check.unknown_name_message(CALLER, option, value, known))
    log: dict[str, Any] | None = None
    if args.evaluation is not None:
        log = _log(args)
    elif args.robust is None or args.dataset is None:
        raise ValueError(
            f"{CALLER}: a result must be named. Pass the evaluation.json of ikl evaluate, or --robust "
            f"PERCENT with --dataset NAME."
        )
    declared = {None: None, "yes": True, "no": False}[args.additional_data]
    options: dict[str, Any] = {
        "additional_data": declared,
        "eps": args.eps,
        "natural_accuracy": args.natural,
        "include_unreliable": not args.without_unreliable,
    }
    dataset, threat_model, robust = args.dataset, args.threat_model or "Linf", args.robust
    if log is not None:
        dataset, threat_model, robust = _dataset(args, log), log["threat_model"], log["robust_accuracy"]
        options.update(natural_accuracy=log["natural_accuracy"], eps=log["eps"], name=log["model"])
    if args.name is not None:
        options["name"] = args.name
    ranking = rank(dataset, threat_model, robust, **options)
    print(ranking.markdown(), end="")
    if log is not None:
        for note in _notes(log, dataset, ranking, options):
            print(f"\n{note}")
    if args.plot is not None:
        draw(ranking, args.plot)
        print(f"\nplot: {args.plot}")
    return ranking


def _log(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "--robust": args.robust,
        "--natural": args.natural,
        "--eps": args.eps,
        "--threat-model": args.threat_model,
    }
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{CALLER}: {option} must be left out, as {args.evaluation} has its own. Leave it out.")
    log: dict[str, Any] = Evaluation.load(args.evaluation).log
    if not log["finished"]:
        raise ValueError(
            f"{CALLER}: {args.evaluation} must be a finished evaluation, but was interrupted. "
            f"Run ikl evaluate with the same arguments to go on."
        )
    return log


def _dataset(args: argparse.Namespace, log: dict[str, Any]) -> str:
    data = log["dataset"] or (log["data"] or {}).get("name")
    if args.dataset is not None:
        if data in DATASETS and data != args.dataset:
            raise ValueError(
                f"{CALLER}: --dataset must be {data}, that of the evaluation, got {args.dataset}. Leave it out."
            )
        return str(args.dataset)
    if data not in DATASETS:
        raise ValueError(
            f"{CALLER}: the evaluation is on {data!r}, which has no leaderboard. Name one to compare with: --dataset "
            f"{DATASETS[0]}."
        )
    return str(data)


def _notes(log: dict[str, Any], dataset: str, ranking: Ranking, options: dict[str, Any]) -> list[str]:
    """Why the place may not be the one that RobustBench would give."""
    notes = []
    data = log["dataset"] or (log["data"] or {}).get("name")
    if data != dataset:
        notes.append(f"The evaluation is on {data}, the entries on the test images of {dataset}: not comparable.")
    if not log["standard"] and log["eps"] is not None:
        attacks = ", ".join(log["attacks"])
        notes.append(f"The entries are by standard AutoAttack, the result by {attacks}: it may be too high.")
    if log["n_examples"] < IMAGES[dataset]:
        standing = round(log["robust_accuracy"] / 100 * log["n_examples"])
        low, high = binomial_interval(standing, log["n_examples"])
        places = [rank(dataset, ranking.threat_model, bound, **options).overall.place for bound in (high, low)]
        notes.append(
            f"Only {log['n_examples']} of {IMAGES[dataset]} images: with 95 % probability the accuracy on all lies "
            f"between {low:.2f} % and {high:.2f} %, and the place between {places[0]} and {places[1]}."
        )
    return notes


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("evaluation", nargs="?", type=Path, help="evaluation.json of ikl evaluate")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)} (default: that of the evaluation)")
    parser.add_argument("--threat-model", metavar="NAME", help=f"{', '.join(THREAT_MODELS)} (default: Linf)")
    parser.add_argument("--eps", metavar="EPS", help="radius of the result, refused if it is not the leaderboard's")
    parser.add_argument("--robust", type=float, metavar="PERCENT", help="robust accuracy by standard AutoAttack")
    parser.add_argument("--natural", type=float, metavar="PERCENT", help="natural accuracy")
    parser.add_argument(
        "--additional-data", choices=("yes", "no"), help="trained on more than the data set's own images"
    )
    parser.add_argument("--name", help="of the result; an entry of this name is not compared with")
    parser.add_argument(
        "--without-unreliable", action="store_true", help="leave out entries that RobustBench marks as unreliable"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="natural against robust accuracy, as .png")
