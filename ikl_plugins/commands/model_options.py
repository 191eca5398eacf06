"""What evaluate, submit and rank share on their command lines: a model, images to run it on, and known names."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .._limits import printable
from .config import config_path

if TYPE_CHECKING:
    from torch import nn

    from ..robustbench import Images
    from ..robustbench.host_data import HostData

__all__ = [
    "ATTACKS",
    "DATASETS",
    "NORMS",
    "PRECISIONS",
    "THREAT_MODELS",
    "VERSIONS",
    "LoadedModel",
    "add_data_arguments",
    "add_device_argument",
    "add_model_arguments",
    "images_from",
    "model_from",
]

# Names of the room, again: it imports torch, and --help and completion shall not. A test compares them.
DATASETS = ("cifar10", "cifar100", "imagenet")
THREAT_MODELS = ("Linf", "L2", "corruptions", "corruptions_3d")
NORMS = ("Linf", "L2", "L1")  # AutoAttack's; RobustBench has no leaderboard for L1
PRECISIONS = ("float32", "bfloat16")
ATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
VERSIONS = ("standard", "plus", "rand")
WEIGHTS = ("averaged", "last")
# The ways to a model, and which of the options that not all of them read each one does.
_READ = {
    "checkpoint": ("checkpoint", "architecture", "num_classes", "mean", "std", "weights"),
    "mmpretrain": ("checkpoint", "weights", "channel_order"),
    "torchdistill": ("checkpoint",),
    "timm": ("checkpoint", "mean", "std", "weights", "image_size"),
    "torchvision": ("checkpoint", "mean", "std", "weights", "weights_name"),
    "huggingface": (),
    "zoo": (),
}
_SOME_READ = tuple(dict.fromkeys(option for options in _READ.values() for option in options))
_FETCHED = ("timm", "torchvision", "huggingface", "zoo")  # without a checkpoint too


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode, of images in [0, 1].

    Attributes:
        model: the module.
        name: of it.
        checkpoint: the file of its weights if it has one of its own.
        host: the test data of the config that it is from, if it is from one.
    """

    model: nn.Module
    name: str
    checkpoint: Path | None
    host: HostData | None = None


def add_model_arguments(parser: argparse.ArgumentParser, dataset: str | None = DATASETS[0]) -> None:
    """Adds the arguments that :func:`model_from` reads, with a default of ``--dataset``."""
    add = parser.add_argument_group("model").add_argument
    example = "such as WideResNet-34-10 or DMWideResNet-28-10-SiLU"
    add("--checkpoint", type=Path, metavar="FILE", help="its weights")
    add("--architecture", metavar="NAME", help=f"of the checkpoint, {example}")
    default = dataset or "that of the evaluation"
    add("--dataset", choices=DATASETS, default=dataset, help=f"that it was trained on (default: {default})")
    add("--num-classes", type=int, metavar="N", help="if not those of the data set")
    add("--mean", type=_numbers, metavar="R,G,B", help="of the normalisation, where no architecture has one")
    add("--std", type=_numbers, metavar="R,G,B")
    add("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="of a checkpoint with both (default: averaged)")
    add(
        "--mmpretrain",
        type=Path,
        metavar="CONFIG",
        help="config that the checkpoint was trained with, or its shipped name",
    )
    add("--channel-order", choices=("rgb", "bgr"), help="of --mmpretrain's images, where its config does not say")
    add(
        "--torchdistill",
        type=Path,
        metavar="YAML",
        help="config that the checkpoint was trained with, or its shipped name",
    )
    add("--timm", metavar="NAME", help="a model of timm, with --checkpoint or its pretrained weights")
    add("--image-size", type=int, metavar="N", help="of --timm, if not its own")
    add("--torchvision", metavar="NAME", help="a model of torchvision, with --checkpoint or its pretrained weights")
    add("--weights-name", metavar="NAME", help="of --torchvision's weights, whose images it takes (default: DEFAULT)")
    add("--huggingface", metavar="FOLDER", help="an image classifier of transformers: its folder, or name on the hub")
    add("--zoo", metavar="NAME", help="a model of RobustBench")
    add("--model-dir", type=Path, default=Path("models"), help="where RobustBench's models lie (default: models)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that :func:`images_from` reads."""
    add = parser.add_argument_group("data").add_argument
    kinds = f"{', '.join(DATASETS)}, a folder with a folder of images per class, or an .npz file"
    add("--data", metavar="DATA", help=f"{kinds} (default: the config's own test data, else that of --dataset)")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets lie (default: data)")
    add("--offline", action="store_true", help="never download")
    add("--preprocessing", metavar="NAME", help="one of RobustBench's, such as Res256Crop224")
    add("--n-examples", type=int, metavar="N", help="how many images (default: all)")


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """Adds ``--device``."""
    parser.add_argument("--device", type=_device, default="auto", help="(default: cuda where there is any)")


def _device(text: str) -> str:
    if text != "auto":
        return text
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from error


def images_from(
    arguments: argparse.Namespace, *, caller: str, loaded: LoadedModel | None = None, reorder: bool = True
) -> Images:
    """The images that a command line names, by both groups of arguments.

    Args:
        arguments: of the command line.
        caller: whom a refusal names.
        loaded: the model. One of a config without ``--data`` gets the config's own test data; with it, class names are
            put in the config's order, and a line says so. One of timm, torchvision or Hugging Face gets images that are
            made as its library makes them.
        reorder: False to refuse another order.
    """
    from ..robustbench import load_images
    from ..robustbench.host_data import host_images, in_class_order
    from ..robustbench.image_models import ImageModel, images_for

    host = None if loaded is None else loaded.host
    if host is not None and arguments.data is None:
        if arguments.preprocessing is not None:
            raise ValueError(
                f"{caller}: the config's own data do not read --preprocessing. Leave it out, or add --data."
            )
        return host_images(caller, host, arguments.n_examples)
    source = arguments.dataset if arguments.data is None else arguments.data
    grey = host is not None and host.channels == 1 and source not in DATASETS and Path(source).expanduser().is_dir()
    options = {name: getattr(arguments, name) for name in ("data_dir", "n_examples", "offline", "preprocessing")}
    if loaded is not None and isinstance(loaded.model, ImageModel):
        made = images_for(loaded.model, source, **options)
        if made.classes is not None and list(made.classes) != sorted(made.classes):
            print(
                f"labels of {printable(made.name)} are in {loaded.model.architecture.library}'s order of classes",
                flush=True,
            )
        return made
    images = load_images(source, channels=1 if grey else None, **options)
    if loaded is None or host is None:
        return images
    ordered = in_class_order(images, loaded.model, host)
    if ordered is not images:
        if not reorder:
            raise ValueError(f"{caller}: the classes of {images.name} must be in the config's order, got another.")
        print(f"labels of {printable(images.name)} are now in the order of {printable(host.name)}", flush=True)
    return ordered


def model_from(arguments: argparse.Namespace, *, caller: str) -> LoadedModel:
    """The model that a command line names, by :func:`add_model_arguments`; ``caller`` is whom a refusal names.

    ``threat_model`` and ``offline`` are read if they are there.
    """
    way = _way(caller, arguments)
    if way == "zoo":
        return _from_zoo(caller, arguments)
    if way in ("timm", "torchvision", "huggingface"):
        return _of_library(way, arguments)
    from ..robustbench import loading
    from ..robustbench.mmpretrain_data import MMPretrainData
    from ..robustbench.torchdistill_data import TorchdistillData

    host: HostData | None = None
    averaged = arguments.weights == WEIGHTS[0]
    model: nn.Module
    if way == "mmpretrain":
        name = arguments.mmpretrain.stem
        model = loading.from_mmpretrain(
            _config(arguments.mmpretrain),
            arguments.checkpoint,
            averaged=averaged,
            channel_order=arguments.channel_order,
        )
        host = MMPretrainData(caller, _config(arguments.mmpretrain), arguments.channel_order)
    elif way == "torchdistill":
        name = arguments.torchdistill.stem
        # Read once: its data sets are built with it.
        host = data = TorchdistillData(caller, _config(arguments.torchdistill))
        model = loading.from_torchdistill(data, arguments.checkpoint)
    else:
        name = arguments.architecture
        model = loading.load_checkpoint(
            arguments.checkpoint,
            name,
            arguments.dataset,
            num_classes=arguments.num_classes,
            mean=arguments.mean,
            std=arguments.std,
            averaged=averaged,
        )
    return LoadedModel(model, name, arguments.checkpoint, host)


def _config(given: Path) -> Path:
    """The file, or the shipped config of that name; of what is neither the loading says so."""
    with contextlib.suppress(ValueError):
        return config_path(given)
    return given


def _way(caller: str, arguments: argparse.Namespace) -> str:
    """The one way to a model, after what is missing and what that way does not read."""
    ways = [way for way in _READ if way != "checkpoint" and getattr(arguments, way) is not None]
    if len(ways) > 1:
        raise ValueError(f"{caller}: one model must be named, got --{' and --'.join(ways)}. Leave out all but one.")
    way = ways[0] if ways else "checkpoint"
    if way not in _FETCHED and arguments.checkpoint is None:
        what = f"--{way} comes without" if ways else "there is no"
        raise ValueError(
            f"{caller}: a model must be named, but {what} --checkpoint. Add --checkpoint FILE with its "
            "network, or --zoo, --timm, --torchvision or --huggingface NAME."
        )
    if way == "checkpoint" and arguments.architecture is None:
        raise ValueError(
            f"{caller}: --checkpoint needs its network. Add --architecture, --mmpretrain, --torchdistill, --timm or "
            "--torchvision."
        )
    for name in _SOME_READ:
        if name not in _READ[way] and getattr(arguments, name) not in (None, WEIGHTS[0]):
            raise ValueError(f"{caller}: --{way} does not read --{name.replace('_', '-')}. Leave it out.")
    return way


def _of_library(way: str, arguments: argparse.Namespace) -> LoadedModel:
    from ..robustbench import image_models

    name = getattr(arguments, way)
    options = {option: getattr(arguments, option) for option in _READ[way] if option != "weights"}
    options["offline"] = getattr(arguments, "offline", False)
    if "weights" in _READ[way]:
        options["averaged"] = arguments.weights == WEIGHTS[0]
    model = getattr(image_models, f"from_{way}")(name, **options)
    return LoadedModel(model, name, arguments.checkpoint)


def _from_zoo(caller: str, arguments: argparse.Namespace) -> LoadedModel:
    from ..models.robustbench_zoo import zoo_model

    model, path = zoo_model(
        arguments.zoo,
        arguments.dataset,
        getattr(arguments, "threat_model", "Linf"),
        arguments.model_dir,
        offline=f"--zoo {arguments.zoo} with --offline" if getattr(arguments, "offline", False) else None,
        caller=caller,
    )
    return LoadedModel(model, arguments.zoo, path if path.is_file() else None)
