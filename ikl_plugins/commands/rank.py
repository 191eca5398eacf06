"""Where a result stands among the entries of RobustBench's leaderboard, without a network connection.

    ikl rank runs/wrn/evaluation.json --plot rank.png
    ikl rank runs/wrn/evaluation.json --checkpoint wrn.pth --architecture WideResNet-34-10
    ikl rank --dataset cifar100 --threat-model Linf --eps 8/255 \\
        --robust 31.91 --natural 65.76 --additional-data no

The table of entries is part of this package; the output says of which day it is. With the model and the images, named
as for ikl evaluate, the model is run again on some of them, natural and adversarial, and compared with the log.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._limits import one_line, printable
from .model_options import (
    DATASETS,
    NORMS,
    THREAT_MODELS,
    add_data_arguments,
    add_device_argument,
    add_model_arguments,
    images_from,
    model_from,
)

if TYPE_CHECKING:
    from ..robustbench import Evaluation, Ranking

__all__ = ["configure", "run"]

CALLER = "ikl rank"
# Options that name a model.
_MODEL = ("checkpoint", "architecture", "mmpretrain", "torchdistill", "timm", "torchvision", "huggingface", "zoo")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model_arguments(parser, dataset=None)
    add_data_arguments(parser)
    add = parser.add_argument
    add("evaluation", nargs="?", type=Path, help="evaluation.json of ikl evaluate")
    add("--threat-model", metavar="NAME", help=f"{', '.join(THREAT_MODELS)} (default: Linf)")
    add("--eps", metavar="EPS", help="radius of the result, refused if it is not the leaderboard's")
    add("--robust", type=float, metavar="PERCENT", help="robust accuracy by standard AutoAttack")
    add("--natural", type=float, metavar="PERCENT", help="natural accuracy")
    add("--additional-data", choices=("yes", "no"), help="trained on more than the data set's own images")
    add("--name", help="of the result; an entry of this name is not compared with")
    add("--without-unreliable", action="store_true", help="leave out entries that RobustBench marks as unreliable")
    add("--batch-size", type=int, default=128, help="of the model, where it is run (default: 128)")
    add_device_argument(parser)
    add("--plot", type=Path, metavar="FILE", help="natural against robust accuracy, as .png")


def run(arguments: argparse.Namespace) -> None:
    """Prints the ranking, and why it may not be RobustBench's."""
    from .. import _validation as check
    from ..robustbench.leaderboard import draw, rank

    known = {*THREAT_MODELS, *NORMS}
    if arguments.threat_model is not None and arguments.threat_model not in known:
        raise ValueError(check.unknown_name_message(CALLER, "threat model", arguments.threat_model, known))
    log: dict[str, Any] | None = None
    run_again = ""
    options: dict[str, Any] = {
        "additional_data": {None: None, "yes": True, "no": False}[arguments.additional_data],
        "include_unreliable": not arguments.without_unreliable,
    }
    if arguments.evaluation is not None:
        evaluation = _evaluation(arguments)
        log = evaluation.log
        dataset, threat_model, robust = _dataset(arguments, log), log["threat_model"], log["robust_accuracy"]
        options.update(natural_accuracy=log["natural_accuracy"], eps=log["eps"], name=log["model"])
        run_again = _run_again(arguments, evaluation, dataset)
    elif arguments.robust is None or arguments.dataset is None:
        raise ValueError(
            f"{CALLER}: a result must be named. Pass evaluation.json, or --robust PERCENT with --dataset NAME."
        )
    else:
        dataset, threat_model, robust = arguments.dataset, arguments.threat_model or "Linf", arguments.robust
        options.update(natural_accuracy=arguments.natural, eps=arguments.eps)
    if arguments.name is not None:
        options["name"] = arguments.name
    ranking = rank(dataset, threat_model, robust, **options)
    print(ranking.markdown(), end="")
    if log is not None:
        for note in (run_again, *_notes(log, dataset, ranking, options)):
            print(f"\n{one_line(note)}")
    if arguments.plot is not None:
        draw(ranking, arguments.plot)
        print(f"\nplot: {printable(arguments.plot, None)}")


def _evaluation(arguments: argparse.Namespace) -> Evaluation:
    from ..robustbench import Evaluation

    for name in ("robust", "natural", "eps", "threat_model"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{CALLER}: {option} must be left out, as {arguments.evaluation} has its own.")
    evaluation = Evaluation.load(arguments.evaluation)
    if not evaluation.finished:
        raise ValueError(
            f"{CALLER}: {arguments.evaluation} must be a finished evaluation, but was interrupted. Run ikl "
            "evaluate again."
        )
    return evaluation


def _run_again(arguments: argparse.Namespace, evaluation: Evaluation, dataset: str) -> str:
    """Compares the log with the model, if one is named; what to say of it."""
    from ..robustbench import verify

    named = vars(arguments)
    if not any(named[way] is not None for way in _MODEL):
        return (
            "The model was not run: the accuracies are those that the log states. Name it and its images as for ikl "
            "evaluate (--checkpoint FILE --architecture NAME --data DATA) to compare."
        )
    data = evaluation.log["data"] or evaluation.log
    named.update(dataset=dataset, threat_model=evaluation.log["threat_model"], n_examples=data["n_examples"])
    loaded = model_from(arguments, caller=CALLER)
    images = images_from(arguments, caller=CALLER, loaded=loaded)
    options = {name: named[name] for name in ("batch_size", "device", "data_dir")}
    return f"The model: {verify(loaded.model, evaluation, images, **options)}."


def _named(log: dict[str, Any]) -> Any:
    return log["dataset"] or (log["data"] or {}).get("name")


def _dataset(arguments: argparse.Namespace, log: dict[str, Any]) -> str:
    data, given = _named(log), arguments.dataset
    if data in DATASETS and given not in (None, data):
        raise ValueError(f"{CALLER}: --dataset must be {data}, that of the evaluation, got {given}. Leave it out.")
    if given is None and data not in DATASETS:
        raise ValueError(
            f"{CALLER}: the evaluation is on {data!r}, which has no leaderboard. Name one: --dataset {DATASETS[0]}."
        )
    return str(data if given is None else given)


def _notes(log: dict[str, Any], dataset: str, ranking: Ranking, options: dict[str, Any]) -> list[str]:
    """Why the place may not be the one that RobustBench would give."""
    from ..robustbench.evaluation.verdict import not_standard_in_words
    from ..robustbench.known_sets import KNOWN
    from ..robustbench.leaderboard import rank
    from ..robustbench.report import binomial_interval

    notes = [f"AutoAttack warns: {warning}" for warning in log["warnings"]]
    if _named(log) != dataset:
        notes.append(
            f"The evaluation is on {_named(log)}, the entries on the test images of {dataset}: not comparable."
        )
    if not log["standard"] and log["eps"] is not None:
        what = not_standard_in_words(log)
        notes.append(f"The entries are by standard AutoAttack, the result by {what}: it may be too high.")
    count, whole = log["n_examples"], KNOWN[dataset].n_examples
    if count < whole:
        low, high = binomial_interval(round(log["robust_accuracy"] / 100 * count), count)
        places = [rank(dataset, ranking.threat_model, bound, **options).overall.place for bound in (high, low)]
        notes.append(
            f"Only {count} of {whole} images: with 95 % probability the accuracy on all lies "
            f"between {low:.2f} % and {high:.2f} %, and the place between {places[0]} and {places[1]}."
        )
    return notes
