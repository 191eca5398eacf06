"""Writes what RobustBench asks for when a model is submitted: entry, form, checkpoint, log, checks, checksums.

    ikl submit --checkpoint wrn.pth --architecture WideResNet-34-10 --dataset cifar100 \\
        --evaluation runs/wrn/evaluation.json --name Cui2023Decoupled_WRN-34-10 \\
        --title "Decoupled Kullback-Leibler Divergence Loss" --link https://arxiv.org/abs/2305.13948 \\
        --authors "Jiequan Cui, Zhuotao Tian, Zhisheng Zhong, Xiaojuan Qi, Bei Yu, Hanwang Zhang" \\
        --venue "NeurIPS 2024" --additional-data no --generated-data no --licence MIT --output submission

The checkpoint must be the one that ikl evaluate has evaluated. Preflight checks it on images of --data,
128 of them unless --n-examples says otherwise; one that fails writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from ikl_plugins.commands.model_options import add_data_arguments, add_model_arguments, images_from, model_from

from ikl_plugins.models.robustbench_zoo import parse_architecture
from ikl_plugins.robustbench.evaluation_log import Evaluation
from ikl_plugins.robustbench.preflight import Preflight, preflight
from ikl_plugins.robustbench.submission import write_submission

__all__ = ["configure", "run"]

CALLER = "robustbench_submit"
PREFLIGHT_IMAGES = 128


def run(args: argparse.Namespace) -> Path:
    """Runs a parsed command line.

    Args:
        args: of this tool.

    Returns:
        The folder of the submission.

    Raises:
        ImportError: a package is missing.
        OSError: the folder cannot be written; what was there before is as it was.
        RuntimeError: the model cannot run on the images, or the device has too little memory.
        TypeError: see :func:`ikl_plugins.robustbench.submission.write_submission`.
        ValueError: see there; or the model is not named by a checkpoint and an architecture of RobustBench.
    """
    ways = [way for way in ("mmpretrain", "torchdistill", "zoo") if getattr(args, way) is not None]
    if ways:
        raise ValueError(
            f"{CALLER}: the model must be one of RobustBench's own architectures, got --{ways[0]}. Train the network "
            f"as RobustBenchNetwork (mmpretrain) or ikl_plugins.robustbench_network (torchdistill), and evaluate and "
            f"submit it with --checkpoint FILE --architecture NAME."
        )
    if args.architecture is not None:
        parse_architecture(args.architecture, caller=CALLER)
    loaded = model_from(args, caller=CALLER)
    evaluation = Evaluation.load(args.evaluation)
    report = _checked(args, loaded.model, evaluation)
    folder = write_submission(
        args.output,
        name=args.name,
        model=loaded.model,
        architecture=args.architecture,
        dataset=args.dataset,
        evaluation=evaluation,
        preflight=report,
        title=args.title,
        link=args.link,
        authors=args.authors,
        venue=args.venue,
        additional_data=args.additional_data == "yes",
        generated_data=args.generated_data == "yes",
        licence=args.licence,
        footnote=args.footnote,
        reported=args.reported,
        number_forward_passes=args.number_forward_passes,
        checkpoint_link=args.checkpoint_link,
        code_link=args.code_link,
        gdrive_id=args.gdrive_id,
        model_zoo=not args.no_model_zoo,
        mean=args.mean,
        std=args.std,
        demonstration=args.demonstration,
        allow_failed_preflight=args.allow_failed_preflight,
        force=args.force,
    )
    print(f"submission: {folder}")
    open_lines = [
        line for line in (folder / "new_models_form.md").read_text().splitlines() if "TO BE FILLED IN" in line
    ]
    for line in open_lines:
        print(f"still open in new_models_form.md: {line}")
    if args.demonstration:
        print("This is a demonstration: its files say so, and RobustBench would not take it.")
    else:
        print("Next: fill in what is open, and post the form at https://github.com/RobustBench/robustbench/issues/new")
    return folder


def _checked(args: argparse.Namespace, model: torch.nn.Module, evaluation: Evaluation) -> Preflight:
    images = images_from(args, caller=CALLER)
    log = evaluation.log
    report = preflight(
        model.to(args.device),
        images.images.to(args.device),
        images.labels.to(args.device),
        eps=log["eps"],
        norm="L2" if log["threat_model"] == "L2" else "Linf",
        claimed=log["robust_accuracy"] if args.reported is None else args.reported,
        measured=log["robust_accuracy"],
        batch_size=args.batch_size,
        number_forward_passes=args.number_forward_passes,
    )
    words = {True: "pass", False: "FAIL", None: "not checked"}
    for found in report.checks:
        print(f"preflight, {found.name}: {words[found.passed]}. {found.why}")
    return report


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(n_examples=PREFLIGHT_IMAGES)
    group = parser.add_argument_group("submission")
    group.add_argument("--evaluation", type=Path, required=True, metavar="FILE", help="log of ikl evaluate")
    group.add_argument("--name", required=True, help="of the entry, such as Cui2023Decoupled_WRN-28-10")
    group.add_argument("--title", required=True, help="of the paper")
    group.add_argument("--link", required=True, metavar="URL", help="to the paper")
    group.add_argument("--authors", required=True, help="of the paper, with commas between")
    group.add_argument("--venue", required=True, help="such as 'NeurIPS 2024' or 'arXiv, May 2023'")
    group.add_argument(
        "--additional-data",
        required=True,
        choices=("yes", "no"),
        help="were more real images used than the data set's own, by the model, its teacher or its generator?",
    )
    group.add_argument(
        "--generated-data", required=True, choices=("yes", "no"), help="were generated images trained on?"
    )
    group.add_argument("--footnote", help="for the leaderboard; with generated data it must say how many images")
    group.add_argument("--licence", required=True, help="MIT, or the address of another one")
    group.add_argument(
        "--reported", type=float, metavar="PERCENT", help="robust accuracy in the paper, if it is another"
    )
    group.add_argument("--number-forward-passes", type=int, default=1, metavar="N", help="per prediction (default: 1)")
    group.add_argument("--checkpoint-link", metavar="URL", help="where the checkpoint lies")
    group.add_argument("--code-link", metavar="URL", help="where the code lies")
    group.add_argument("--gdrive-id", metavar="ID", help="Google Drive's id of the checkpoint, for the zoo")
    group.add_argument("--no-model-zoo", action="store_true", help="for the leaderboard alone")
    group.add_argument("--demonstration", action="store_true", help="take any evaluation, and mark every file")
    group.add_argument("--allow-failed-preflight", action="store_true", help="and say in the form what failed")
    group.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    group.add_argument("--force", action="store_true", help="replace a submission that is there")
    group.add_argument("--batch-size", type=int, default=32, help="of the checks (default: 32)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the checks")
