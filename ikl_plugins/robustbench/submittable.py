"""Whether RobustBench would take a network and an evaluation: known before the attacks, and so said before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation as check
from .._robustbench_import import import_robustbench
from ..models.robustbench_zoo import (
    Architecture,
    Statistics,
    class_count,
    nearest_architecture,
    parse_architecture,
)
from ..models.weights import same_statistics
from .conditions import own_conditions, precision
from .eps import Eps, as_fraction, parse_eps
from .evaluation.verdict import STANDARD, not_standard_in_words
from .image_models import ImageArchitecture, ImageModel
from .known_sets import KNOWN
from .leaderboard import board_eps, entries
from .loading import DATASET_CLASSES, HostClassifier, Normalised

__all__ = [
    "against_benchmark",
    "check_dataset",
    "check_loadable_name",
    "check_network",
    "count_classes",
    "named_architecture",
    "network_obstacle",
    "same_eps",
    "submission_obstacles",
]
__all__ += ["same_logits", "statistics_of", "stored_weights"]

CALLER = "write_submission"
_CORRUPTIONS = 15 * 5  # corruptions and severities of CIFAR-10-C, CIFAR-100-C and ImageNet-C
_ROOM = "robustbench.model_zoo.architectures."


def submission_obstacles(
    model: nn.Module,
    dataset: str,
    *,
    architecture: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    threat_model: str = "Linf",
    eps: str | float | Eps | None = None,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    precision: str = "float32",
    data: str | None = None,
    n_examples: int | None = None,
    preprocessing: str | None = "Res256Crop224",
) -> tuple[str, ...]:
    """What :func:`~ikl_plugins.robustbench.submission.write_submission` would refuse after an evaluation like this.

    Args:
        model: that will be evaluated.
        dataset: of the leaderboard.
        architecture, mean, std: as the submission will name them; None for the network that the weights look like.
        threat_model, eps, version, attacks, parameters: of the evaluation.
        precision: as its log will have it.
        data: name of its images; None for ``dataset``.
        n_examples: how many there are; None for all.
        preprocessing: of ImageNet's images, as :class:`~ikl_plugins.robustbench.Images` names it.

    Returns:
        Sentences, at most one on the network and one on the evaluation; none if nothing is known against it.

    Raises:
        ValueError: a radius that is none.
    """
    try:
        check_dataset(dataset, threat_model)
    except ValueError as error:
        return (_bare(error),)
    found = []
    reason = network_obstacle(model) if architecture is None else None
    named = architecture is not None or dataset == "imagenet" or isinstance(_uncompiled(model), ImageModel)
    if reason is None and named:
        try:
            check_network(model, named_architecture(model, architecture, dataset), dataset, mean, std)
        except ValueError as error:
            reason = _bare(error)
    if reason is not None:
        found.append(reason)
    plan = {
        "threat_model": threat_model,
        "dataset": dataset,
        "corruptions": range(_CORRUPTIONS),
        "standard": version == "standard" and attacks is None and not parameters and precision == "float32",
        "version": version,
        "attacks": attacks or (STANDARD if version == "standard" else ()),
        "parameters": parameters or {},
        "precision": precision,
        "data": {"name": dataset if data is None else data, "preprocessing": preprocessing},
        "n_examples": KNOWN[dataset].n_examples if n_examples is None else n_examples,
        "n_classes": count_classes(model) or DATASET_CLASSES[dataset],
        "eps": None if eps is None else parse_eps(CALLER, eps, norm="L2").text,  # without the warning of Linf
    }
    wrong = against_benchmark(plan, dataset)
    return (*found, f"The evaluation must {wrong}.") if wrong is not None else tuple(found)


def _bare(error: ValueError) -> str:
    return str(error).partition(": ")[2]  # without the caller


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in _uncompiled(model).state_dict().items() if isinstance(value, Tensor)}


def count_classes(model: nn.Module) -> int | None:
    """The number of logits; None where nothing tells it."""
    model = _uncompiled(model)
    return model.num_classes if isinstance(model, ImageModel) else class_count(_tensors(model))


def statistics_of(model: nn.Module) -> Statistics | None:
    """The mean and std around a network of timm or torchvision; None for others."""
    model = _uncompiled(model)
    return model.statistics if isinstance(model, ImageModel) else None


def network_obstacle(model: nn.Module) -> str | None:
    """Why RobustBench would not take a network of this class, whatever its name; None if nothing is known."""
    try:
        _check_class(model)
    except ValueError as error:
        return _bare(error)
    return None


def _uncompiled(model: Any) -> Any:
    """The module that torch.compile has wrapped, which is what is submitted."""
    return getattr(model, "_orig_mod", model)


def _check_class(model: nn.Module) -> None:
    model = _uncompiled(model)
    if isinstance(model, ImageModel):
        if model.architecture.library == "transformers":
            raise ValueError(
                f"{CALLER}: `model` must be of timm, torchvision or RobustBench's own class, got one of transformers. "
                "timm has most of its networks."
            )
        return
    if isinstance(model, (Normalised, HostClassifier)):
        way_out = "Train a DMWideResNet." if isinstance(model, Normalised) else "Load its file with load_checkpoint."
        raise ValueError(
            f"{CALLER}: `model` must be of RobustBench's own class, got a {type(model).__name__} around one. {way_out}"
        )
    if not type(model).__module__.startswith(_ROOM):
        nearest = nearest_architecture(_tensors(model))
        way_out = "Train one that it lists." if nearest is None else f"Its weights look like {nearest}."
        raise ValueError(
            f"{CALLER}: `model` must be of one of RobustBench's architectures, got {type(model).__name__}. {way_out}"
        )


def named_architecture(model: object, name: str | None, dataset: str | None = None) -> Architecture | ImageArchitecture:
    """What the zoo's entry builds: what a model of timm or torchvision says itself, else the architecture of a name."""
    model = _uncompiled(model)
    if isinstance(model, ImageModel):
        if name is not None:
            raise ValueError(f"{CALLER}: `architecture` must be left out for {model.architecture.name}, got {name!r}.")
        return model.architecture
    if dataset == "imagenet":
        raise ValueError(
            f"{CALLER}: `model` must be of timm or torchvision for imagenet, got {type(model).__name__}. Use from_timm."
        )
    if name is None:
        raise ValueError(f"{CALLER}: `architecture` must be named, got None. Pass WideResNet-34-10.")
    return parse_architecture(name, caller=CALLER)


def check_network(
    model: object,
    architecture: Architecture | ImageArchitecture,
    dataset: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Tensor]:
    """The weights of a network that is exactly this architecture, with these mean and std; others are refused."""
    model = _uncompiled(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{CALLER}: `model` must be the network that was evaluated, got {type(model).__name__}. Use "
            "load_checkpoint."
        )
    if isinstance(model, (Normalised, HostClassifier, ImageModel)):
        _check_class(model)
    state = model.state_dict()
    network: nn.Module
    if isinstance(architecture, ImageArchitecture):
        network = _zoo_network(model, architecture, mean, std)
    else:
        count = class_count(state) or DATASET_CLASSES[dataset]
        network = architecture.build(count, dataset=dataset, mean=mean, std=std)
    own = network.state_dict()
    missing = [key for key in own if key not in state or state[key].shape != own[key].shape]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        nearest = None if isinstance(model, ImageModel) else nearest_architecture(state)
        raise ValueError(
            f"{CALLER}: `model` must be a {architecture.name}, but has other entries (missing: "
            f"{check.first_names(missing) or 'none'}; unexpected: {check.first_names(unexpected) or 'none'}). "
            f"{'Name its own architecture' if nearest in (None, architecture.name) else f'Name {nearest}'}."
        )
    if _kind(model) is not _kind(network):
        raise ValueError(
            f"{CALLER}: `model` must be RobustBench's {_kind(network).__name__}, got {_kind(model).__name__}. "
            "Use load_checkpoint."
        )
    if precision(model) != "float32":
        raise ValueError(f"{CALLER}: `model` must have float32 weights, got {precision(model)}. Call `model.float()`.")
    network.load_state_dict(state)
    if not same_logits(network, model):
        raise ValueError(
            f"{CALLER}: `model` must give the logits of the zoo entry, but does not. Check activation, `mean` "
            "and `std`."
        )
    return {key: state[key].detach().cpu().contiguous().clone() for key in own}


def _zoo_network(
    model: nn.Module, architecture: ImageArchitecture, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """What the zoo's entry gives for a model of timm or torchvision."""
    if not isinstance(model, ImageModel):
        raise ValueError(f"{CALLER}: `model` must be a {architecture.name}, got {type(model).__name__}. Use from_timm.")
    if mean is not None and std is not None and not same_statistics((tuple(mean), tuple(std)), model.statistics):
        raise ValueError(f"{CALLER}: `mean` and `std` must be those of `model`, got {mean} and {std}. Leave them out.")
    normalize_model = import_robustbench().model_zoo.architectures.utils_architectures.normalize_model
    network: nn.Module = normalize_model(architecture.build(model.num_classes), *model.statistics)
    return network


def _kind(network: nn.Module) -> type[nn.Module]:
    """The class of a network, of one behind RobustBench's ``normalize_model`` the inner one's."""
    inner = network._modules.get("model") if isinstance(network, nn.Sequential) else None
    return type(network if inner is None else inner)


def stored_weights(weights: Mapping[str, Tensor], model: nn.Module, dataset: str) -> dict[str, Tensor]:
    """The weights by the names from which RobustBench's ``load_model`` makes the network's own.

    It takes as many letters as 'module.' and then 'model.' have off each name that has them anywhere. For ImageNet it
    then puts 'model.' in front, and leaves mean and std to the entry.
    """
    if isinstance(_uncompiled(model), ImageModel) and dataset == "imagenet":
        weights = {name.removeprefix("model."): weights[name] for name in weights if not name.startswith("normalize.")}
    found = {}
    for name, value in weights.items():
        for part in ("model.", "module."):
            name = part + name if part in name else name
        found[name] = value
    return found


def check_loadable_name(name: str, dataset: str) -> None:
    """Refuses a name with which RobustBench's ``load_model`` would not read the checkpoint."""
    if dataset == "imagenet" and "Standard" in name:
        raise ValueError(f"{CALLER}: `name` must not have Standard for imagenet, got {name!r}: its weights go unread.")


def same_logits(network: nn.Module, model: nn.Module) -> bool:
    """Whether two networks of equal weights are one: what no weight tells are activation, mean and std."""
    inner = _uncompiled(model)
    size = inner.geometry.size if isinstance(inner, ImageModel) else (32, 32)
    with own_conditions(), torch.no_grad():
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        return torch.equal(network.eval()(images), copy.deepcopy(model).cpu().eval()(images))


def check_dataset(dataset: str, threat_model: str) -> None:
    """Refuses what has no leaderboard, and 3D corruptions, which RobustBench keeps in the entry of the others."""
    if threat_model == "corruptions_3d":
        raise ValueError(
            f"{CALLER}: `threat_model` must be 'Linf', 'L2' or 'corruptions', got 'corruptions_3d'. Fill RobustBench's "
            "form by hand."
        )
    if dataset not in KNOWN:
        raise ValueError(check.unknown_name_message(CALLER, "data set", dataset, KNOWN))
    entries(dataset, threat_model)


def against_benchmark(log: Mapping[str, Any], dataset: str) -> str | None:
    """What an evaluation lacks to be the benchmark's: all images, all attacks, the radius of the leaderboard."""
    corrupted = log["threat_model"] == "corruptions"
    data = (log["data"] or {}).get("name")
    classes = DATASET_CLASSES[dataset]
    if corrupted and (log["dataset"] != dataset or len(log["corruptions"]) != _CORRUPTIONS):
        found = f"{len(log['corruptions'])} of {log['dataset']}"
        return f"have all {_CORRUPTIONS} corruptions and severities of {dataset}, got {found}"
    if not corrupted and not log["standard"]:
        return f"be of standard AutoAttack, got {not_standard_in_words(log)}"
    if data != dataset:
        return f"be on the test images of {dataset}, got {data!r}"
    preprocessing = (log["data"] or {}).get("preprocessing")
    known = [name for name in import_robustbench().data.PREPROCESSINGS if name is not None]
    if dataset == "imagenet" and preprocessing not in known:
        return f"be on images made by one of {', '.join(known)} (--preprocessing), got {preprocessing!r}"
    if log["n_examples"] < (images := KNOWN[dataset].n_examples):
        return f"have all {images} test images, got {log['n_examples']}"
    if log["n_classes"] != classes:
        return f"be of a model with {classes} classes, got {log['n_classes']}"
    if not corrupted and not same_eps(log, dataset):
        return f"be at eps {board_eps(dataset, log['threat_model'])}, that of the leaderboard, got {log['eps']}"
    return None


def same_eps(log: Mapping[str, Any], dataset: str) -> bool:
    """Whether the radius is the leaderboard's, however it is written."""
    board = board_eps(dataset, log["threat_model"])
    if board is None or log["eps"] is None:
        return board is None and log["eps"] is None
    return as_fraction(log["eps"]) == as_fraction(board)
