"""Writes what RobustBench asks for when a model is submitted: entry, form, checkpoint, log, checks, checksums.

    ikl submit --checkpoint wrn.pth --architecture WideResNet-34-10 --dataset cifar100 \\
        --evaluation runs/wrn/evaluation.json --name Cui2023Decoupled_WRN-34-10 \\
        --title "Decoupled Kullback-Leibler Divergence Loss" --link https://arxiv.org/abs/2305.13948 \\
        --authors "Jiequan Cui, Zhuotao Tian, Zhisheng Zhong, Xiaojuan Qi, Bei Yu, Hanwang Zhang" \\
        --venue "NeurIPS 2024" --additional-data no --generated-data no --licence MIT --output submission

The checkpoint must be the one that ikl evaluate has evaluated, and --data and the like must name its images, as there:
the model is run again on some of them, natural and adversarial, and compared with the log. Preflight checks it on 128
of them unless --n-examples says otherwise; one that fails writes nothing.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._limits import one_line, printable
from .model_options import add_data_arguments, add_device_argument, add_model_arguments, images_from, model_from

if TYPE_CHECKING:
    from torch import nn

    from ..robustbench import Images, Preflight

__all__ = ["configure", "run"]

CALLER = "ikl submit"
PREFLIGHT_IMAGES = 128


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.set_defaults(n_examples=PREFLIGHT_IMAGES)
    add = parser.add_argument_group("submission").add_argument
    add("--evaluation", type=Path, required=True, metavar="FILE", help="log of ikl evaluate")
    add("--name", required=True, help="of the entry, such as Cui2023Decoupled_WRN-28-10")
    add("--title", required=True, help="of the paper")
    add("--link", required=True, metavar="URL", help="to the paper")
    add("--authors", required=True, help="of the paper, with commas between")
    add("--venue", required=True, help="such as 'NeurIPS 2024' or 'arXiv, May 2023'")
    real = "were more real images used than the data set's own, by the model, its teacher or its generator?"
    add("--additional-data", required=True, choices=("yes", "no"), help=real)
    add("--generated-data", required=True, choices=("yes", "no"), help="were generated images trained on?")
    add("--footnote", help="for the leaderboard; with generated data it must say how many images")
    add("--licence", required=True, help="MIT, or the address of another one")
    add("--reported", type=float, metavar="PERCENT", help="robust accuracy in the paper, if it is another")
    add("--number-forward-passes", type=int, default=1, metavar="N", help="per prediction (default: 1)")
    add("--checkpoint-link", metavar="URL", help="where the checkpoint lies")
    add("--code-link", metavar="URL", help="where the code lies")
    add("--gdrive-id", metavar="ID", help="Google Drive's id of the checkpoint, for the zoo")
    add("--no-model-zoo", dest="model_zoo", action="store_false", help="for the leaderboard alone")
    add("--acknowledge-unreliable", metavar="TEXT", help="why a result that AutoAttack flags stands, for the form")
    others = "records of external evaluations, such as adaptive attacks (docs/robustbench.md)"
    add("--external", type=Path, nargs="+", default=(), metavar="FILE", help=others)
    add("--demonstration", action="store_true", help="take any evaluation, and mark every file")
    add("--allow-failed-preflight", action="store_true", help="and say in the form what failed")
    add("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--force", action="store_true", help="replace a submission that is there")
    add("--batch-size", type=int, help="of the checks (default: that of the evaluation)")
    add_device_argument(parser)


# What write_submission takes by the name that the command line has for it.
_AS_GIVEN = (
    "name",
    "architecture",
    "dataset",
    "title",
    "link",
    "authors",
    "venue",
    "licence",
    "footnote",
    "reported",
    "number_forward_passes",
    "checkpoint_link",
    "code_link",
    "gdrive_id",
    "model_zoo",
    "data_dir",
    "mean",
    "std",
    "acknowledge_unreliable",
    "external",
    "demonstration",
    "allow_failed_preflight",
    "force",
)
# What is said of the files of a submission, and not of the result.
_OF_FILES = {"gdrive_id", "model_zoo", "data_dir", "mean", "std"}


def run(arguments: argparse.Namespace) -> None:
    """Checks the model, writes the submission and says what is left to do."""
    from ..robustbench import Evaluation, write_submission
    from ..robustbench.submission import alone, check_statements

    others = ("mmpretrain", "torchdistill", "huggingface", "zoo")
    way = next((way for way in others if getattr(arguments, way) is not None), None)
    if way:
        raise ValueError(
            f"{CALLER}: the model must be of RobustBench's own architectures, timm or torchvision, got --{way}. Pass "
            "--checkpoint FILE --architecture NAME."
        )
    given = {
        **{name: getattr(arguments, name) for name in _AS_GIVEN},
        "evaluation": Evaluation.load(arguments.evaluation),
        "additional_data": arguments.additional_data == "yes",
        "generated_data": arguments.generated_data == "yes",
    }
    ways = (arguments.architecture, arguments.timm, arguments.torchvision)
    if any(way is not None for way in ways):  # without one the loading says what is missing
        with warnings.catch_warnings(), alone(arguments.output):
            warnings.simplefilter("ignore")  # they come when the submission is written
            check_statements(arguments.output, **{name: given[name] for name in given.keys() - _OF_FILES})
    loaded = model_from(arguments, caller=CALLER)
    model = loaded.model
    checked, log = arguments.n_examples, given["evaluation"].log
    arguments.n_examples = (log["data"] or log)["n_examples"]

    @functools.cache
    def images() -> Images:
        return images_from(arguments, caller=CALLER, loaded=loaded)

    folder = write_submission(
        arguments.output,
        model=model.to(arguments.device),
        images=images,
        preflight=lambda: _checked(arguments, model, images(), checked, log),
        **given,
    )
    print(f"submission: {printable(folder, None)}")
    for line in (folder / "new_models_form.md").read_text(encoding="utf-8").splitlines():
        if "TO BE FILLED IN" in line:
            print(f"still open in new_models_form.md: {line}")
    if arguments.demonstration:
        print("This is a demonstration: its files say so, and RobustBench would not take it.")
    else:
        print("Next: fill in what is open, and post the form at https://github.com/RobustBench/robustbench/issues/new")


def _checked(
    arguments: argparse.Namespace, model: nn.Module, images: Images, count: int, log: dict[str, Any]
) -> Preflight:
    from ..robustbench import preflight
    from ..robustbench.data import spread
    from ..robustbench.preflight.result import WORDS

    rows = list(range(len(images)))
    # A class folder is read class after class.
    rows = rows[:count] if images.files is None else spread(rows, images.labels.tolist(), count)
    report = preflight(
        model,
        images.images[rows].to(arguments.device),
        images.labels[rows].to(arguments.device),
        eps=log["eps"],
        norm="L2" if log["threat_model"] == "L2" else "Linf",
        claimed=log["robust_accuracy"] if arguments.reported is None else arguments.reported,
        measured=log["robust_accuracy"],
        batch_size=arguments.batch_size or log["batch_size"],
        number_forward_passes=arguments.number_forward_passes,
        data=images,
        progress=lambda found: print(
            f"preflight, {found.name}: {WORDS[found.passed]}. {one_line(found.why)}", flush=True
        ),
    )
    print(f"preflight: {report.judged_by}")
    return report
