"""Evaluates a checkpoint with AutoAttack or under common corruptions, as RobustBench does, and writes a report.

    ikl evaluate --checkpoint wrn.pth --architecture WideResNet-34-10 --eps 8/255 --output runs/wrn
    ikl evaluate --mmpretrain configs/....py --checkpoint epoch_5.pth --data data/digits/test \\
        --eps 8/255 --curve 2/255,4/255,16/255 --output runs/digits
    ikl evaluate --zoo Cui2023Decoupled_WRN-28-10 --threat-model corruptions --output runs/zoo

The output folder gets evaluation.json, the adversarial images, report.md and its pictures. An interrupted evaluation
goes on when the same command runs again, and ends as if it had never stopped.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from ikl_plugins.commands.model_options import (
    LoadedModel,
    add_data_arguments,
    add_model_arguments,
    images_from,
    model_from,
)

from ikl_plugins.robustbench.corruptions import evaluate_corruptions
from ikl_plugins.robustbench.data import Images, load_images
from ikl_plugins.robustbench.eps import Eps
from ikl_plugins.robustbench.evaluation import ATTACKS, VERSIONS, Progress, check_radii, curve, evaluate
from ikl_plugins.robustbench.evaluation_log import Evaluation
from ikl_plugins.robustbench.report import require_matplotlib, write_report

__all__ = ["configure", "run"]

INTERRUPTED = "run the same command again to go on"

CALLER = "robustbench_eval"
LOG = "evaluation.json"
THREAT_MODELS = ("Linf", "L2", "corruptions", "corruptions_3d")


def run(args: argparse.Namespace) -> Evaluation:
    """Runs a parsed command line.

    Args:
        args: of this tool.

    Returns:
        The evaluation, which also lies in the output folder.

    Raises:
        ImportError: a package is missing.
        OSError: the output cannot be written; what was there before is as it was.
        RuntimeError: the model cannot run on the images, or the device has too little memory.
        TypeError: see :func:`ikl_plugins.robustbench.evaluation.evaluate`.
        ValueError: see there.
    """
    corrupted = args.threat_model.startswith("corruptions")
    _check_together(args, corrupted)
    require_matplotlib()  # rather now than when the attacks have run
    loaded = model_from(args, caller=CALLER)
    if corrupted:
        evaluation, images = _corruptions(args, loaded)
    else:
        images = images_from(args, caller=CALLER)
        _say(f"{len(images)} images of {images.name}, model {loaded.name}")
        evaluation = _attack(args, loaded, images)
    natural = "" if evaluation.natural_accuracy is None else f"natural accuracy {evaluation.natural_accuracy:.2f} %, "
    _say(f"{natural}robust accuracy {evaluation.robust_accuracy:.2f} % ({_what(evaluation)})")
    for warning in evaluation.log["warnings"]:
        _say(f"AutoAttack warns: {warning}")
    _say(f"report: {write_report(evaluation, args.output, images=images)}")
    return evaluation


def _attack(args: argparse.Namespace, loaded: LoadedModel, images: Images) -> Evaluation:
    options = {
        "norm": args.threat_model,
        "version": args.version,
        "attacks": args.attacks,
        "batch_size": args.batch_size,
        "device": args.device,
        "seed": args.seed,
        "checkpoint": loaded.checkpoint,
        "data": images,
        "model_name": loaded.name,
    }
    log = args.output / LOG
    evaluation = evaluate(
        loaded.model, images.images, images.labels, eps=args.eps, log=log, progress=_Printer(), **options
    )
    if args.curve is not None:
        printer = _Printer()
        points = curve(
            loaded.model,
            images.images,
            images.labels,
            args.curve,
            folder=args.output / "curve",
            progress=lambda eps, made: printer(made, eps),
            **options,
        )
        evaluation.log["curve"] = points
        evaluation.save(log)
    return evaluation


def _corruptions(args: argparse.Namespace, loaded: LoadedModel) -> tuple[Evaluation, Images]:
    natural = load_images(
        args.dataset,
        data_dir=args.data_dir,
        n_examples=args.n_examples,
        offline=args.offline,
        preprocessing=args.preprocessing,
    )
    evaluation = evaluate_corruptions(
        loaded.model,
        args.dataset,
        data_dir=args.data_dir,
        n_examples=args.n_examples,
        threat_model=args.threat_model,
        natural=natural,
        offline=args.offline,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
        log=args.output / LOG,
        checkpoint=loaded.checkpoint,
        model_name=loaded.name,
        progress=lambda made: _say(
            f"{made.attack} ({made.batch}/{made.batches}): {made.standing} of {made.n_examples} right"
        ),
    )
    note = evaluation.log["corruptions_mce_note"]
    _say(
        f"mean corruption error {note}" if note else f"mean corruption error {evaluation.log['corruptions_mce']:.2f} %"
    )
    return evaluation, natural


class _Printer:
    """Prints a line after each attack; on a terminal one after each batch that the next one overwrites."""

    def __call__(self, made: Progress, eps: Eps | None = None) -> None:
        last = made.batch == made.batches
        if not last and not sys.stdout.isatty():
            return
        name = made.attack if eps is None else f"eps {eps}, {made.attack}"
        text = f"{name}: {made.standing} of {made.n_examples} standing ({made.seconds:.0f} s)"
        if last:
            _say(("\r\x1b[K" if sys.stdout.isatty() else "") + text)
        else:
            print(f"\r{text}, batch {made.batch}/{made.batches}\x1b[K", end="", flush=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _what(evaluation: Evaluation) -> str:
    log = evaluation.log
    if log["eps"] is None:
        return f"mean over {len(log['corruptions'])} corruptions and severities"
    version = f"part of {log['version']} AutoAttack" if log["dropped"] else f"AutoAttack {log['version']}"
    name = "standard AutoAttack" if evaluation.standard else f"{version}: {', '.join(log['attacks'])}"
    return f"{log['threat_model']}, eps {log['eps']}, {name}"


def _check_together(args: argparse.Namespace, corrupted: bool) -> None:
    attack_options = {
        "--eps": args.eps is not None,
        "--attacks": args.attacks is not None,
        "--curve": args.curve is not None,
        "--version": args.version != VERSIONS[0],
        "--data": args.data is not None,
    }
    if corrupted:
        for option, given in attack_options.items():
            if given:
                raise ValueError(
                    f"{CALLER}: --threat-model {args.threat_model} must come without {option}, which it does not read. "
                    f"Leave it out; --dataset names the data."
                )
    elif args.eps is None:
        raise ValueError(f"{CALLER}: --threat-model {args.threat_model} needs a radius. Add --eps 8/255.")
    elif args.curve is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when the radii are used
            check_radii(f"{CALLER}, --curve", args.curve, args.threat_model)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--threat-model", choices=THREAT_MODELS, default="Linf", help="(default: Linf)")
    group.add_argument("--eps", metavar="EPS", help="radius, as a fraction: 8/255")
    group.add_argument("--version", choices=VERSIONS, default=VERSIONS[0], help="of AutoAttack (default: standard)")
    group.add_argument("--attacks", type=_names, metavar="A,B", help=f"some of {', '.join(ATTACKS)} instead")
    group.add_argument("--curve", type=_names, metavar="EPS,EPS", help="radii at which to measure as well")
    group.add_argument("--batch-size", type=int, default=128, help="images per batch (default: 128)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--seed", type=int, default=0, help="of all attacks (default: 0)")
    group.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the results go")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
