"""Evaluates a checkpoint with AutoAttack or under common corruptions, as RobustBench does, and writes a report.

    ikl evaluate --checkpoint wrn.pth --architecture WideResNet-34-10 --eps 8/255 --output runs/wrn
    ikl evaluate --mmpretrain mmpretrain/digits/adversarial_ikl.py --checkpoint epoch_5.pth --eps 8/255 \\
        --curve 2/255,4/255,16/255 --output runs/digits
    ikl evaluate --zoo Cui2023Decoupled_WRN-28-10 --threat-model corruptions --output runs/zoo

With a config the images are those of its own test, unless --data names others. Before any attack the natural accuracy
is shown beside that of the host's own test.

The output folder gets evaluation.json, the adversarial images, report.md and its pictures. An interrupted evaluation
goes on when the same command runs again, and ends as if it had never stopped. Several processes share the work, and
write what one alone would:

    torchrun --nproc_per_node 8 $(which ikl) evaluate ... --output runs/wrn      # a device each
    ikl evaluate ... --output runs/wrn --shard 3/8                               # eight jobs, one shared folder
    ikl evaluate --merge shard1 shard2 --output runs/wrn                         # folders that are not shared
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._limits import one_line
from .model_options import (
    ATTACKS,
    NORMS,
    PRECISIONS,
    THREAT_MODELS,
    VERSIONS,
    LoadedModel,
    add_data_arguments,
    add_device_argument,
    add_model_arguments,
    images_from,
    model_from,
)

if TYPE_CHECKING:
    from ..robustbench import Evaluation, Images

__all__ = ["INTERRUPTED", "LOG", "configure", "run"]

CALLER = "ikl evaluate"
_AGAIN = 75  # the exit status of what is to be run again (EX_TEMPFAIL)
_SURROGATE = ("surrogate_checkpoint", "surrogate_architecture")
_OF_ATTACKS = (*_SURROGATE, "eps", "attacks", "curve", "version", "data", "set", "precision", "channels_last", "shard")
_DEFAULTS = (None, VERSIONS[0], PRECISIONS[0], False)
INTERRUPTED = "run the same command again to go on"
LOG = "evaluation.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    group = parser.add_argument_group("evaluation")
    models = tuple(dict.fromkeys((*NORMS, *THREAT_MODELS)))
    group.add_argument("--threat-model", choices=models, default="Linf", help="(default: Linf)")
    group.add_argument("--eps", metavar="EPS", help="radius, as a fraction: 8/255")
    group.add_argument("--version", choices=VERSIONS, default=VERSIONS[0], help="of AutoAttack (default: standard)")
    own = "transfer-... of them, module:callable, or an entry point; first may be a version"
    group.add_argument("--attacks", type=_names, metavar="A,B", help=f"instead: {', '.join(ATTACKS)}, {own}")
    group.add_argument(
        "--set", type=_parameter, action="append", metavar="A.P=V", help="of an attack, such as square.n_queries=20000"
    )
    group.add_argument("--surrogate-checkpoint", type=Path, metavar="FILE", help="that transfer attacks are made on")
    group.add_argument("--surrogate-architecture", metavar="NAME", help="of the surrogate")
    group.add_argument("--curve", type=_names, metavar="EPS,EPS", help="radii at which to measure as well")
    batch = "images per batch, or auto for what fits memory (default: 128)"
    group.add_argument("--batch-size", type=_batch_size, default=128, metavar="N", help=batch)
    group.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="bfloat16 for a quick look")
    group.add_argument("--channels-last", action="store_true", help="memory layout, for a quick look")
    add_device_argument(group)
    group.add_argument("--seed", type=int, default=0, help="of all attacks (default: 0)")
    group.add_argument("--shard", metavar="K/N", help="do the K-th of N parts; the first writes the result")
    group.add_argument("--wait", type=float, metavar="SECONDS", help="for other shards, per attack (default: for ever)")
    group.add_argument("--merge", type=Path, nargs="+", metavar="FOLDER", help="unite outputs of shards; no model")
    group.add_argument("--export", type=Path, metavar="FILE", help="adversarial images of all images, as .npz or .pt")
    group.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the results go")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


def _parameter(text: str) -> tuple[str, str, int | float]:
    """'square.n_queries=20000' as attack, parameter and value."""
    key, _, value = text.partition("=")
    attack, _, name = key.strip().rpartition(".")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not attack or math.isnan(number):
        raise argparse.ArgumentTypeError(f"must be such as square.n_queries=20000, got {text!r}")
    return attack, name, int(value) if value.strip().isdecimal() else number


def _parameters(arguments: argparse.Namespace) -> dict[str, dict[str, int | float]]:
    found: dict[str, dict[str, int | float]] = {}
    for attack, name, value in arguments.set or ():
        found.setdefault(attack, {})[name] = value
    return found


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, prints the accuracies and writes the report."""
    from ..robustbench.evaluation import Unfinished
    from ..robustbench.figures import require_matplotlib

    require_matplotlib(CALLER)  # rather now than when the attacks have run
    if arguments.merge is not None:
        _merge(arguments)
        return
    with _one_of_several(arguments):
        try:
            _evaluate(arguments)
        except Unfinished as unfinished:
            print(one_line(unfinished), file=sys.stderr)
            sys.exit(_AGAIN)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    corrupted = arguments.threat_model.startswith("corruptions")
    _check_together(arguments, corrupted)
    loaded = model_from(arguments, caller=CALLER)
    try:
        evaluation, images = (_corruptions if corrupted else _attack)(arguments, loaded)
    except torch.cuda.OutOfMemoryError as error:
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"{CALLER}: {arguments.device} has too little memory ({first}). Lower --batch-size."
        ) from error
    if arguments.shard is None or arguments.shard[0] == 1:
        _tell(evaluation, arguments.output, images)
        if arguments.export is not None:
            _say(f"adversarial images: {evaluation.export(arguments.export, images)}")
    else:
        _say(f"shard {arguments.shard[0]} of {arguments.shard[1]} is done; the first one writes the result")


def _tell(evaluation: Evaluation, output: Path, images: Images | None) -> None:
    from ..robustbench import write_report

    natural = "" if evaluation.natural_accuracy is None else f"natural accuracy {evaluation.natural_accuracy:.2f} %, "
    _say(f"{natural}robust accuracy {evaluation.robust_accuracy:.2f} % ({_what(evaluation)})")
    for warning in evaluation.log["warnings"]:
        _say(f"AutoAttack warns: {warning}")
    if evaluation.log["unreliable"]:
        _say("AutoAttack's own checks say that this evaluation may be unreliable.")
    _say(f"report: {write_report(evaluation, output, images=images)}")


def _merge(arguments: argparse.Namespace) -> None:
    from ..robustbench.evaluation import merge

    for name in ("checkpoint", "mmpretrain", "torchdistill", "zoo", "wait", "export", *_OF_ATTACKS):
        if getattr(arguments, name) not in _DEFAULTS:
            option = name.replace("_", "-")
            raise ValueError(f"{CALLER}: --merge does not read --{option}, as it runs no model. Leave it out.")
    evaluation = merge([folder / LOG for folder in arguments.merge], arguments.output / LOG)
    if evaluation.finished:
        _tell(evaluation, arguments.output, None)
        if any((folder / "curve").is_dir() for folder in arguments.merge):
            _say(f"The curve is not merged. Run one process with --curve, and {arguments.output} as --output.")
        return
    last = evaluation.log["progress"][-1]
    _say(
        f"{last['attack']}: {last['batches_done']} of {last['batches']} batches are there. Run the shards again, each "
        f"with a copy of {arguments.output} as its --output, and merge again."
    )
    sys.exit(_AGAIN)


@contextlib.contextmanager
def _one_of_several(arguments: argparse.Namespace) -> Iterator[None]:
    """Reads --shard, or what torchrun has set: ranks take a device each, and all but the first are silent."""
    from ..robustbench.evaluation.shards import launched

    rank = launched(CALLER, os.environ)
    if arguments.shard is not None:
        if rank is not None:
            raise ValueError(f"{CALLER}: --shard must be left out under torchrun, where each rank is a shard.")
        numbers = arguments.shard.split("/")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{CALLER}: --shard must be two numbers such as 3/8, got {arguments.shard}.")
        arguments.shard = (int(numbers[0]), int(numbers[1]))
    arguments.silent = rank is not None and rank[0] > 1
    if rank is not None:
        arguments.shard = rank
        arguments.device = _own_device(arguments.device, int(os.environ.get("LOCAL_RANK", rank[0] - 1)))
    if not arguments.silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _own_device(device: str, local_rank: int) -> str:
    """Of the devices of this machine, that of the rank; several ranks share one where there are fewer."""
    import torch

    if device != "cuda":
        return device
    device = f"cuda:{local_rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    return device


def _check_together(arguments: argparse.Namespace, corrupted: bool) -> None:
    """Refuses options of attacks for corruptions, and radii that the attacks would refuse hours later."""
    threat_model = arguments.threat_model
    if arguments.export is not None:
        from ..robustbench.export import check_export_path

        check_export_path(f"{CALLER} --export", arguments.export)
    if corrupted:
        given = [name for name in (*_OF_ATTACKS, "export") if getattr(arguments, name) not in _DEFAULTS]
        given += ["batch_size auto"] if arguments.batch_size == "auto" else []
        for name in given:
            option = name.replace("_", "-")
            raise ValueError(f"{CALLER}: --threat-model {threat_model} does not read --{option}. Leave it out.")
        return
    if arguments.eps is None:
        raise ValueError(f"{CALLER}: --threat-model {threat_model} needs a radius. Add --eps 8/255.")
    if threat_model == "L1" and arguments.zoo is not None:
        raise ValueError(f"{CALLER}: --zoo has no models for L1. Name the file with --checkpoint.")
    from ..robustbench.evaluation import check_radii
    from ..robustbench.evaluation.plan import plan_attacks

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where module:callable is looked for, as by python -m
    surrogate = [getattr(arguments, name) is not None for name in _SURROGATE]
    if any(surrogate) and not all(surrogate):
        raise ValueError(f"{CALLER}: --surrogate-checkpoint and --surrogate-architecture go together. Add the other.")
    plan_attacks(CALLER, arguments.version, arguments.attacks, surrogate=all(surrogate))
    if arguments.curve is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when the radii are used
            check_radii(f"{CALLER} --curve", arguments.curve, threat_model)


def _attack(arguments: argparse.Namespace, loaded: LoadedModel) -> tuple[Evaluation, Images]:
    from ..robustbench.evaluation import curve, evaluate

    images = images_from(arguments, caller=CALLER, loaded=loaded)
    _check_natural(arguments, loaded, images)
    data = (loaded.model, images.images, images.labels)
    options = {
        "norm": arguments.threat_model,
        "version": arguments.version,
        "attacks": arguments.attacks,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "seed": arguments.seed,
        "checkpoint": loaded.checkpoint,
        "data": images,
        "model_name": loaded.name,
        "progress": not arguments.silent,
        "shard": arguments.shard,
        "wait": arguments.wait,
    }
    options.update(_other_attacks(arguments))
    log = arguments.output / LOG
    evaluation = evaluate(*data, eps=arguments.eps, log=log, **options)
    if arguments.curve is not None:
        points = curve(*data, arguments.curve, folder=arguments.output / "curve", **options)
        evaluation.log["curve"] = points
        if arguments.shard is None or arguments.shard[0] == 1:
            evaluation.save(log)
    return evaluation, images


def _other_attacks(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the attacks is not AutoAttack's."""
    from ..robustbench import load_checkpoint

    file, name = arguments.surrogate_checkpoint, arguments.surrogate_architecture
    more = {"num_classes": arguments.num_classes}
    return {
        "parameters": _parameters(arguments),
        "surrogate": None if file is None else load_checkpoint(file, name, arguments.dataset, **more),
        "precision": arguments.precision,
        "channels_last": arguments.channels_last,
    }


def _corruptions(arguments: argparse.Namespace, loaded: LoadedModel) -> tuple[Evaluation, Images]:
    from ..robustbench import evaluate_corruptions

    named = argparse.Namespace(**{**vars(arguments), "data": arguments.dataset})
    # The corrupted images have RobustBench's labels, which nobody puts in another order.
    natural = images_from(named, caller=CALLER, loaded=loaded, reorder=False)
    _check_natural(arguments, loaded, natural)
    evaluation = evaluate_corruptions(
        loaded.model,
        arguments.dataset,
        data_dir=arguments.data_dir,
        n_examples=arguments.n_examples,
        threat_model=arguments.threat_model,
        natural=natural,
        offline=arguments.offline,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
        log=arguments.output / LOG,
        checkpoint=loaded.checkpoint,
        model_name=loaded.name,
    )
    log = evaluation.log
    _say(f"mean corruption error {log['corruptions_mce_note'] or '{:.2f} %'.format(log['corruptions_mce'])}")
    return evaluation, natural


def _check_natural(arguments: argparse.Namespace, loaded: LoadedModel, images: Images) -> None:
    from ..robustbench import check_natural, submission_obstacles
    from ..robustbench.evaluation.precision import precision_in_words
    from ..robustbench.known_sets import recorded_name

    _say(f"{len(images)} images of {images.name}, model {loaded.name}")
    size = 128 if arguments.batch_size == "auto" else arguments.batch_size
    found = check_natural(loaded.model, images, loaded.host, batch_size=size, device=arguments.device)
    _say(str(found))
    if arguments.zoo is None:  # what is there need not be submitted
        names = ("architecture", "mean", "std", "threat_model", "eps", "version", "attacks")
        plan = {name: getattr(arguments, name) for name in names}
        plan.update(data=recorded_name(images.name, images.source), n_examples=len(images))
        plan.update(preprocessing=images.preprocessing)
        plan["parameters"] = _parameters(arguments)
        plan["precision"] = precision_in_words(CALLER, arguments.precision, arguments.channels_last)
        for obstacle in submission_obstacles(loaded.model, arguments.dataset, **plan):
            _say(f"RobustBench would not take the result: {obstacle}")


def _say(text: str) -> None:
    print(one_line(text), flush=True)


def _what(evaluation: Evaluation) -> str:
    from ..robustbench.evaluation.verdict import attacks_in_words

    log = evaluation.log
    if log["eps"] is None:
        return f"mean over {len(log['corruptions'])} corruptions and severities"
    return f"{log['threat_model']}, eps {log['eps']}, {attacks_in_words(log)}"
