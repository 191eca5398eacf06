"""Whether RobustBench would take a network and an evaluation: known before the attacks, and so said before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation as check
from ..models.robustbench_zoo import Architecture, class_count, nearest_architecture, parse_architecture
from .conditions import own_conditions, precision
from .eps import Eps, as_fraction, parse_eps
from .known_sets import KNOWN
from .leaderboard import board_eps, entries
from .loading import DATASET_CLASSES, HostClassifier, Normalised

__all__ = [
    "against_benchmark",
    "check_dataset",
    "check_network",
    "network_obstacle",
    "same_eps",
    "submission_obstacles",
]
__all__ += ["same_logits"]

CALLER = "write_submission"
_DATASETS = ("cifar10", "cifar100")
_CORRUPTIONS = 15 * 5  # corruptions and severities of CIFAR-10-C and CIFAR-100-C
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
    data: str | None = None,
    n_examples: int | None = None,
) -> tuple[str, ...]:
    """What :func:`~ikl_plugins.robustbench.submission.write_submission` would refuse after an evaluation like this.

    Args:
        model: that will be evaluated.
        dataset: of the leaderboard.
        architecture, mean, std: as the submission will name them; None for the network that the weights look like.
        threat_model, eps, version, attacks: of the evaluation.
        data: name of its images; None for ``dataset``.
        n_examples: how many there are; None for all.

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
    if architecture is not None:
        try:
            check_network(model, parse_architecture(architecture, caller=CALLER), dataset, mean, std)
        except ValueError as error:
            reason = _bare(error)
    if reason is not None:
        found.append(reason)
    plan = {
        "threat_model": threat_model,
        "dataset": dataset,
        "corruptions": range(_CORRUPTIONS),
        "standard": version == "standard" and attacks is None,
        "version": version,
        "attacks": attacks or [version],
        "data": {"name": dataset if data is None else data},
        "n_examples": KNOWN[dataset].n_examples if n_examples is None else n_examples,
        "n_classes": class_count(_tensors(model)) or DATASET_CLASSES[dataset],
        "eps": None if eps is None else parse_eps(CALLER, eps, norm="L2").text,  # without the warning of Linf
    }
    wrong = against_benchmark(plan, dataset)
    return (*found, f"The evaluation must {wrong}.") if wrong is not None else tuple(found)


def _bare(error: ValueError) -> str:
    return str(error).partition(": ")[2]  # without the caller


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in _uncompiled(model).state_dict().items() if isinstance(value, Tensor)}


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


def check_network(
    model: object,
    architecture: Architecture,
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
    if isinstance(model, (Normalised, HostClassifier)):
        _check_class(model)
    state = model.state_dict()
    network = architecture.build(class_count(state) or DATASET_CLASSES[dataset], dataset=dataset, mean=mean, std=std)
    own = network.state_dict()
    missing = [key for key in own if key not in state or state[key].shape != own[key].shape]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        nearest = nearest_architecture(state)
        raise ValueError(
            f"{CALLER}: `model` must be a {architecture.name}, but has other entries (missing: "
            f"{check.first_names(missing) or 'none'}; unexpected: {check.first_names(unexpected) or 'none'}). "
            f"{'Name its own architecture' if nearest in (None, architecture.name) else f'Name {nearest}'}."
        )
    if type(model) is not type(network):
        raise ValueError(
            f"{CALLER}: `model` must be RobustBench's {type(network).__name__}, got {type(model).__name__}. "
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


def same_logits(network: nn.Module, model: nn.Module) -> bool:
    """Whether two networks of equal weights are one: what no weight tells are activation, mean and std."""
    with own_conditions(), torch.no_grad():
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return torch.equal(network.eval()(images), copy.deepcopy(model).cpu().eval()(images))


def check_dataset(dataset: str, threat_model: str) -> None:
    """Refuses what has no leaderboard, and ImageNet."""
    if dataset == "imagenet" or threat_model == "corruptions_3d":
        raise ValueError(
            f"{CALLER}: `dataset` must be 'cifar10' or 'cifar100', got 'imagenet'. Fill RobustBench's form by hand."
        )
    if dataset not in _DATASETS:
        raise ValueError(check.unknown_name_message(CALLER, "data set", dataset, _DATASETS))
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
        return f"be of standard AutoAttack, got version {log['version']!r} with {', '.join(log['attacks'])}"
    if data != dataset:
        return f"be on the test images of {dataset}, got {data!r}"
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
