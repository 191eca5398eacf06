"""What the robustbench tools share on their command lines: a model, and the images to run it on."""

from __future__ import annotations

import argparse
import pickle
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ikl_plugins import _validation as check
from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.robustbench.data import DATASETS, Images, load_images

__all__ = ["LoadedModel", "add_data_arguments", "add_model_arguments", "images_from", "model_from"]

WEIGHTS = ("averaged", "last")
_WAY_OUT = (
    "Pass --checkpoint FILE --architecture NAME, --mmpretrain CONFIG --checkpoint FILE, --torchdistill YAML "
    "--checkpoint FILE, or --zoo NAME."
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model from the command line.

    Attributes:
        model: in eval mode, of images in [0, 1].
        name: for reports.
        way: 'checkpoint', 'mmpretrain', 'torchdistill' or 'zoo'.
        checkpoint: the file that the weights are from; None for a zoo model without a file of its own.
        architecture: RobustBench's or mdistiller's name of it, where the command line says it.
        dataset: the data set of RobustBench that it belongs to.
    """

    model: nn.Module
    name: str
    way: str
    checkpoint: Path | None
    architecture: str | None
    dataset: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that :func:`model_from` reads.

    Args:
        parser: gets them in a group of their own.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights")
    group.add_argument(
        "--architecture", metavar="NAME", help="of the checkpoint, such as WideResNet-34-10 or DMWideResNet-28-10-SiLU"
    )
    group.add_argument(
        "--dataset", choices=DATASETS, default="cifar10", help="that it was trained on (default: cifar10)"
    )
    group.add_argument("--num-classes", type=int, metavar="N", help="if not those of the data set")
    group.add_argument(
        "--mean", type=_numbers, metavar="R,G,B", help="of the normalisation, where no architecture has one"
    )
    group.add_argument("--std", type=_numbers, metavar="R,G,B")
    group.add_argument(
        "--weights", choices=WEIGHTS, default="averaged", help="of a checkpoint with both (default: averaged)"
    )
    group.add_argument("--mmpretrain", type=Path, metavar="CONFIG", help="config that the checkpoint was trained with")
    group.add_argument(
        "--channel-order", choices=("rgb", "bgr"), help="of --mmpretrain's images, where its config does not say"
    )
    group.add_argument("--torchdistill", type=Path, metavar="YAML", help="config that the checkpoint was trained with")
    group.add_argument("--zoo", metavar="NAME", help="a model of RobustBench")
    group.add_argument(
        "--model-dir", type=Path, default=Path("models"), help="where RobustBench's models lie (default: models)"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that :func:`images_from` reads.

    Args:
        parser: gets them in a group of their own.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DATA",
        help=f"{', '.join(DATASETS)}, a folder with a folder of images per class, or an .npz file "
        f"(default: that of --dataset)",
    )
    group.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets lie (default: data)")
    group.add_argument("--offline", action="store_true", help="never download")
    group.add_argument("--preprocessing", metavar="NAME", help="one of RobustBench's, such as Res256Crop224")
    group.add_argument("--n-examples", type=int, metavar="N", help="how many images (default: all)")


def images_from(args: argparse.Namespace, *, caller: str = "robustbench") -> Images:
    """The images that a command line names.

    Args:
        args: parsed by a parser with both groups of arguments.
        caller: whom a refusal names.

    Returns:
        The images.

    Raises:
        TypeError: see :func:`ikl_plugins.robustbench.data.load_images`.
        ValueError: see there; or no data is named for a model whose config does not say RobustBench's name of it.
    """
    if args.data is None and (args.mmpretrain or args.torchdistill):
        raise ValueError(
            f"{caller}: with a config the data must be named, as --dataset may not be what the model was trained on. "
            f"Add --data FOLDER, --data FILE.npz or --data {args.dataset}."
        )
    return load_images(
        args.dataset if args.data is None else args.data,
        data_dir=args.data_dir,
        n_examples=args.n_examples,
        offline=args.offline,
        preprocessing=args.preprocessing,
    )


def model_from(args: argparse.Namespace, *, caller: str = "robustbench") -> LoadedModel:
    """The model that a command line names.

    Args:
        args: parsed by a parser with :func:`add_model_arguments`; ``threat_model`` and ``offline`` are read if there.
        caller: whom a refusal names.

    Returns:
        The model.

    Raises:
        ImportError: a host of the config is not installed.
        ValueError: no model is named, two are, or arguments that do not go together; a file that is missing or does
            not fit.
    """
    ways = [way for way in ("mmpretrain", "torchdistill", "zoo") if getattr(args, way) is not None]
    if len(ways) > 1:
        raise ValueError(f"{caller}: one model must be named, got --{' and --'.join(ways)}. Leave out all but one.")
    way = ways[0] if ways else "checkpoint"
    _check_together(caller, args, way)
    if way == "zoo":
        return _from_zoo(caller, args)

    from ikl_plugins.robustbench import loading

    averaged = args.weights == "averaged"
    if way == "mmpretrain":
        model = loading.from_mmpretrain(
            args.mmpretrain, args.checkpoint, averaged=averaged, channel_order=args.channel_order
        )
        return LoadedModel(model, args.mmpretrain.stem, way, args.checkpoint, None, args.dataset)
    if way == "torchdistill":
        model = loading.from_torchdistill(args.torchdistill, args.checkpoint)
        return LoadedModel(model, args.torchdistill.stem, way, args.checkpoint, None, args.dataset)
    model = loading.load_checkpoint(
        args.checkpoint,
        args.architecture,
        args.dataset,
        num_classes=args.num_classes,
        mean=args.mean,
        std=args.std,
        averaged=averaged,
    )
    return LoadedModel(model, args.architecture, way, args.checkpoint, args.architecture, args.dataset)


def _check_together(caller: str, args: argparse.Namespace, way: str) -> None:
    """Refuses an argument that is missing, and one that the way to the model does not read."""
    if way != "zoo" and args.checkpoint is None:
        what = f"--{way} comes without" if way != "checkpoint" else "there is no"
        raise ValueError(f"{caller}: a model must be named, but {what} --checkpoint. {_WAY_OUT}")
    if way == "checkpoint" and args.architecture is None:
        raise ValueError(
            f"{caller}: --checkpoint needs the network that it belongs to. Add --architecture NAME, such as "
            f"WideResNet-34-10, or --mmpretrain CONFIG or --torchdistill YAML."
        )
    given = {
        "--checkpoint": args.checkpoint is not None,
        "--architecture": args.architecture is not None,
        "--num-classes": args.num_classes is not None,
        "--mean": args.mean is not None,
        "--std": args.std is not None,
        "--weights": args.weights != WEIGHTS[0],
        "--channel-order": args.channel_order is not None,
    }
    unread = {
        "checkpoint": ("--channel-order",),
        "mmpretrain": ("--architecture", "--num-classes", "--mean", "--std"),
        "torchdistill": ("--architecture", "--num-classes", "--mean", "--std", "--weights", "--channel-order"),
        "zoo": tuple(given),
    }[way]
    for option in unread:
        if given[option]:
            raise ValueError(f"{caller}: --{way} must come without {option}, which is not for it. Leave it out.")


def _from_zoo(caller: str, args: argparse.Namespace) -> LoadedModel:
    robustbench = import_robustbench()
    threat_model = getattr(args, "threat_model", "Linf").replace("_3d", "")
    kinds = robustbench.data.BenchmarkDataset(args.dataset), robustbench.data.ThreatModel(threat_model)
    entries = robustbench.data.all_models[kinds[0]][kinds[1]]
    if args.zoo not in entries:
        raise ValueError(check.unknown_name_message(caller, f"{args.dataset} {threat_model} model", args.zoo, entries))
    path = args.model_dir / args.dataset / threat_model / f"{args.zoo}.pt"
    drive = entries[args.zoo]["gdrive_id"]
    parts = (
        [path.with_name(f"{path.name}_m{part}.pt") for part in range(len(drive))] if isinstance(drive, list) else [path]
    )
    missing = [part for part in parts if not part.is_file()]
    if missing and getattr(args, "offline", False):
        raise ValueError(
            f"{caller}: --zoo {args.zoo} with --offline needs its file, but there is none at {missing[0]}. "
            f"Fetch it (Google Drive id {drive}), or leave out --offline."
        )
    try:
        model = robustbench.load_model(
            args.zoo, model_dir=args.model_dir, dataset=args.dataset, threat_model=threat_model
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{caller}: {path} must be the checkpoint of {args.zoo}, but loading it gave: {reason} Fetch it again."
        ) from error
    return LoadedModel(model, args.zoo, "zoo", path if path.is_file() else None, None, args.dataset)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from error
