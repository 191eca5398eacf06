"""RobustBench's own network classes by the names that its leaderboard gives them.

What is trained as one of these loads into RobustBench key for key, because it is that class. RobustBench is imported
when a network is built, not before.

- ``WideResNet-34-10``: any depth 6n + 4 and any width, without the sub-block that its forward never uses;
- ``DMWideResNet-28-10-SiLU``: likewise, with -SiLU, -ReLU or -Swish: the network of training on generated data;
- ``ResNet-18``: also 34, 50, 101, 152;
- ``PreActResNet-18``: also 34;
- ``DMPreActResNet-18-SiLU``: also 34, -ReLU and -Swish.

All are made for images of 32x32 in [0, 1]. The DM networks normalise them; the others take them as they are.
"""

from __future__ import annotations

import functools
import importlib
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation as check
from .. import models
from .._robustbench_import import import_robustbench

__all__ = [
    "LAST_LAYERS",
    "Architecture",
    "class_count",
    "nearest_architecture",
    "parse_architecture",
    "robustbench_network",
    "zoo_model",
]

_CALLER = "robustbench_network"
_ROOM = "robustbench.model_zoo.architectures"
_MODULES = {
    "WideResNet": "wide_resnet",
    "DMWideResNet": "dm_wide_resnet",
    "ResNet": "resnet",
    "PreActResNet": "resnet",
    "DMPreActResNet": "dm_wide_resnet",
}
_BLOCKS = {
    "ResNet": {
        18: ("BasicBlock", [2, 2, 2, 2]),
        34: ("BasicBlock", [3, 4, 6, 3]),
        50: ("Bottleneck", [3, 4, 6, 3]),
        101: ("Bottleneck", [3, 4, 23, 3]),
        152: ("Bottleneck", [3, 8, 36, 3]),
    },
    "PreActResNet": {18: ("PreActBlock", [2, 2, 2, 2]), 34: ("PreActBlock", [3, 4, 6, 3])},
}
_DEPTHS = {"DMPreActResNet": (18, 34), **{family: tuple(blocks) for family, blocks in _BLOCKS.items()}}
_ACTIVATIONS = ("SiLU", "ReLU", "Swish")
_UNTOLD = "-SiLU"  # weights do not tell the activation
_CONSTANTS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # data sets whose mean and std RobustBench holds
_EXAMPLES = (
    "DMPreActResNet-18-SiLU",
    "DMWideResNet-28-10-SiLU",
    "PreActResNet-18",
    "ResNet-18",
    "WideResNet-28-10",
    "WideResNet-34-10",
)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels
LAST_LAYERS = ("fc", "linear", "logits", "classifier", "classifier.0")
_SIMILAR = 0.5  # share of entries in common above which one network is called near another


@dataclass(frozen=True)
class Architecture:
    """What a name says; :func:`parse_architecture` makes it.

    Attributes:
        family: RobustBench's class.
        depth: number of layers.
        width: factor on the channels; None where the class has none.
        activation: 'SiLU', 'ReLU' or 'Swish'; None where the class has one alone.
    """

    family: str
    depth: int
    width: int | None = None
    activation: str | None = None

    @property
    def name(self) -> str:
        """The name, as :func:`parse_architecture` takes it."""
        return "-".join(str(part) for part in (self.family, self.depth, self.width, self.activation) if part)

    @property
    def normalises(self) -> bool:
        """Whether the network itself subtracts a mean and divides by a standard deviation."""
        return self.activation is not None

    def expression(
        self,
        dataset: str = "cifar10",
        num_classes: int = 10,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> str:
        """The network as RobustBench's zoo would write it; arguments are those of :func:`robustbench_network`.

        Returns:
            A Python expression. It evaluates after :meth:`imports`.
        """
        positional, keywords = self._arguments(num_classes, dataset, *_statistics(self, dataset, mean, std))
        if num_classes == 10 and not self.normalises:
            del keywords["num_classes"]  # RobustBench's default
        arguments = [*map(_source, positional), *(f"{name}={_source(value)}" for name, value in keywords.items())]
        return f"{self.family}({', '.join(arguments)})"

    def imports(self, dataset: str = "cifar10", *, mean: Sequence[float] | None = None) -> tuple[str, ...]:
        """The import statements that :meth:`expression` needs with the same data set and mean, one line each."""
        positional, keywords = self._arguments(10, dataset, mean, mean)  # the std adds no name of its own
        names = {value for value in (*positional, *keywords.values()) if isinstance(value, _Name)}
        ours = sorted({self.family, *(name for name in names if not name.startswith("nn."))})
        lines = [f"from {_ROOM}.{_MODULES[self.family]} import {', '.join(ours)}"]
        return (*lines, "from torch import nn") if any(name.startswith("nn.") for name in names) else tuple(lines)

    def build(
        self,
        num_classes: int = 10,
        *,
        dataset: str = "cifar10",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> nn.Module:
        """The network; see :func:`robustbench_network`."""
        check.check_num_classes(_CALLER, num_classes)
        positional, keywords = self._arguments(num_classes, dataset, *_statistics(self, dataset, mean, std))
        import_robustbench()
        module = importlib.import_module(f"{_ROOM}.{_MODULES[self.family]}")

        def resolved(value: Any) -> Any:
            if not isinstance(value, _Name):
                return value
            return getattr(nn, value.removeprefix("nn.")) if value.startswith("nn.") else getattr(module, value)

        kind: Callable[..., nn.Module] = getattr(module, self.family)
        return kind(*map(resolved, positional), **{name: resolved(value) for name, value in keywords.items()})

    def _arguments(
        self, num_classes: int, dataset: str, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """What RobustBench's class is called with, names of its module and of ``torch.nn`` as such."""
        keywords: dict[str, Any] = {"num_classes": num_classes}
        if self.family in _BLOCKS:
            block, counts = _BLOCKS[self.family][self.depth]
            return [_Name(block), counts], keywords
        keywords["depth"] = self.depth
        if self.family == "WideResNet":
            return [], {**keywords, "widen_factor": self.width, "sub_block1": False}
        keywords["width"] = self.width or 0
        keywords["activation_fn"] = _Name("Swish" if self.activation == "Swish" else f"nn.{self.activation}")
        for name, values in (("mean", mean), ("std", std)):
            keywords[name] = values or _Name(f"{_CONSTANTS.get(dataset)}_{name.upper()}")
        return [], keywords


class _Name(str):
    """A name in an expression, and no text."""


def _source(value: Any) -> str:
    return str(value) if isinstance(value, _Name) else repr(value)


def parse_architecture(name: str, *, caller: str = "parse_architecture") -> Architecture:
    """Reads the name of an architecture.

    Args:
        name: 'WideResNet-D-W', 'DMWideResNet-D-W-SiLU' (or -ReLU, -Swish), 'ResNet-D', 'PreActResNet-D' or
            'DMPreActResNet-D-SiLU'.
        caller: whom a refusal names.

    Returns:
        The architecture.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: an unknown name, or a depth or width that the class does not have.

    Example:
        >>> parse_architecture("WideResNet-34-10")
        Architecture(family='WideResNet', depth=34, width=10, activation=None)
    """
    if not isinstance(name, str):
        raise TypeError(
            f"{caller}: `architecture` must be a name, got {type(name).__name__}. Write 'WideResNet-34-10'."
        )
    activations = "|".join(_ACTIVATIONS)
    found = re.fullmatch(rf"(\w+)-(\d+)(?:-(\d+))?(?:-({activations}))?", name)
    family, depth, width, activation = found.groups() if found else (None,) * 4
    complete = (width is not None, activation is not None) == (
        str(family).endswith("WideResNet"),
        str(family).startswith("DM"),
    )
    if family not in _MODULES or depth is None or not complete:
        if re.match(r"DMWideResNet-\d+-\d+|DMPreActResNet-\d+", name):
            raise ValueError(
                f"{caller}: `architecture` must end with {', '.join(f'-{one}' for one in _ACTIVATIONS)}, got "
                f"{name}. The official one is {_EXAMPLES[1]}."
            )
        known = check.unknown_name_message(caller, "architecture", name, _EXAMPLES)
        raise ValueError(f"{known} Other depths and widths are named alike.")
    architecture = Architecture(family, int(depth), None if width is None else int(width), activation)
    if architecture.family in _DEPTHS:
        depths = _DEPTHS[architecture.family]
        if architecture.depth not in depths:
            raise ValueError(
                f"{caller}: `architecture` must have a depth of {architecture.family}, got {name}. "
                f"Use one of {', '.join(map(str, depths))}."
            )
    elif architecture.depth < 10 or (architecture.depth - 4) % 6:
        raise ValueError(f"{caller}: `architecture` must have a depth of 6n + 4, n >= 1, got {name}.")
    elif not architecture.width:
        raise ValueError(f"{caller}: `architecture` must have a width of at least 1, got {name}.")
    return architecture


def robustbench_network(
    architecture: str,
    num_classes: int = 10,
    *,
    dataset: str = "cifar10",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """An untrained network of RobustBench's own class.

    Args:
        architecture: its name; see :func:`parse_architecture`.
        num_classes: number of logits.
        dataset: 'cifar10' or 'cifar100', whose mean and std a DMWideResNet or DMPreActResNet normalises with. The other
            classes take images as they are.
        mean: of the three channels in [0, 1], in place of that of the data set.
        std: likewise.

    Returns:
        The network: images in [0, 1] of shape (N, 3, 32, 32) in, logits (N, num_classes) out. Its initial weights are
        those that RobustBench's constructor draws.

    Raises:
        ImportError: RobustBench is not installed.
        TypeError: a name or number that is none.
        ValueError: an unknown name, a value out of range, or mean and std for a class without.

    Example:
        >>> import torch
        >>> from ikl_plugins.models.robustbench_zoo import robustbench_network
        >>> model = robustbench_network("WideResNet-10-1", num_classes=10)
        >>> type(model).__module__, model(torch.zeros(2, 3, 32, 32)).shape
        ('robustbench.model_zoo.architectures.wide_resnet', torch.Size([2, 10]))
    """
    parsed = parse_architecture(architecture, caller=_CALLER)
    return parsed.build(num_classes, dataset=dataset, mean=mean, std=std)


def zoo_model(
    name: str,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    model_dir: Path | str = "models",
    *,
    offline: str | None = None,
    caller: str = "zoo_model",
) -> tuple[nn.Module, Path]:
    """A trained model of RobustBench's zoo, by RobustBench's own loader.

    Args:
        name: in the zoo, 'Cui2023Decoupled_WRN-28-10' for one.
        dataset: 'cifar10', 'cifar100' or 'imagenet'.
        threat_model: 'Linf', 'L2' or 'corruptions'.
        model_dir: folder of its files, in which RobustBench downloads what is not there.
        offline: who must not download, for the message; None where it may be.
        caller: how errors call the one who asks.

    Returns:
        The model in eval mode: images in [0, 1], RGB, to logits; and where its file is.

    Raises:
        ImportError: RobustBench is not installed.
        ValueError: an unknown name, a missing file with ``offline``, or a file that is none of that model.
    """
    robustbench = import_robustbench()
    folder = threat_model.replace("_3d", "")
    known = robustbench.data.all_models[robustbench.data.BenchmarkDataset(dataset)][
        robustbench.data.ThreatModel(folder)
    ]
    if name not in known:
        raise ValueError(check.unknown_name_message(caller, f"{dataset} {folder} model", name, known))
    path = Path(model_dir) / dataset / folder / f"{name}.pt"
    drive = known[name]["gdrive_id"]
    parts = [path]
    if isinstance(drive, list):
        parts = [path.with_name(f"{path.name}_m{part}.pt") for part in range(len(drive))]
    missing = [part for part in parts if not part.is_file()]
    if missing and offline is not None:
        raise ValueError(
            f"{caller}: {offline} needs its file, but there is none at {missing[0]}. Fetch {drive} from Google Drive."
        )
    try:
        model = robustbench.load_model(name, model_dir=model_dir, dataset=dataset, threat_model=folder)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{caller}: {path} must be the checkpoint of {name}, but loading it gave: {reason} Fetch it again."
        ) from error
    return model, path


def class_count(weights: Mapping[str, Tensor]) -> int | None:
    """The number of logits that a state dict's last layer gives.

    Args:
        weights: by the names of a network of this module or of :mod:`ikl_plugins.models`.

    Returns:
        The number; None if there is no such layer.
    """
    for layer in LAST_LAYERS:
        weight = weights.get(f"{layer}.weight")
        if weight is not None and weight.dim() == 2:
            return int(weight.shape[0])
    return None


def nearest_architecture(weights: Mapping[str, Tensor]) -> str | None:
    """Which network a state dict is of, or looks like.

    Args:
        weights: tensors by name, without prefixes such as 'module.'.

    Returns:
        A name that :func:`robustbench_network` takes, or one of :mod:`ikl_plugins.models`. One whose names and shapes
        all agree, the last layer's class count aside; else the one with the most in common, if that is at least
        half; else None. Weights do not tell SiLU from ReLU: SiLU it is then.

    Raises:
        ImportError: RobustBench is not installed.
    """
    ours = _entries(weights)
    if not ours:
        return None
    scores: dict[str, float] = {}
    for name in _candidates(weights):
        theirs = _entries_of(name)
        scores[name] = len(ours & theirs) / len(ours | theirs)
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= _SIMILAR else None


def _candidates(weights: Mapping[str, Tensor]) -> list[str]:
    """Networks to compare with, the likeliest first: names alone give depth and width of the wide ones."""
    names: list[str] = []
    for family, pattern, first, activation in (
        ("WideResNet", r"block1\.layer\.\d+\.conv1\.weight", "block1.layer.0.conv1.weight", ""),
        ("DMWideResNet", r"layer\.0\.block\.\d+\.conv_0\.weight", "layer.0.block.0.conv_0.weight", _UNTOLD),
    ):
        blocks = sum(re.fullmatch(pattern, name) is not None for name in weights)
        if first in weights and weights[first].dim() == 4 and weights[first].shape[0] >= 16:
            names.append(f"{family}-{6 * blocks + 4}-{weights[first].shape[0] // 16}{activation}")
    if not names:
        for family, depths in _DEPTHS.items():
            names += [f"{family}-{depth}{_UNTOLD if family.startswith('DM') else ''}" for depth in depths]
    return [*names, *models.__all__]


@functools.lru_cache(maxsize=64)
def _entries_of(name: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """:func:`_entries` of a network by its name."""
    with torch.device("meta"):
        network = getattr(models, name)() if name in models.__all__ else robustbench_network(name)
    return _entries(network.state_dict())


def _entries(weights: Mapping[str, Tensor]) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without the class count."""
    return frozenset(
        (name, tuple(tensor.shape[1:] if name.rpartition(".")[0] in LAST_LAYERS else tensor.shape))
        for name, tensor in weights.items()
    )


def _statistics(
    architecture: Architecture, dataset: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Statistics | tuple[None, None]:
    """Mean and std as they were given, checked; a pair of None for those of the data set, or where there are none."""
    given = given_statistics(_CALLER, mean, std, channels=3)
    if given is not None and not architecture.normalises:
        raise ValueError(
            f"{_CALLER}: `mean` and `std` must be left out for {architecture.name}, got mean={mean}. A "
            "DMWideResNet takes them."
        )
    if given is None and architecture.normalises and dataset not in _CONSTANTS:
        raise ValueError(
            f"{_CALLER}: {architecture.name} must know mean and std, got neither for dataset={dataset!r}. "
            "Give `mean` and `std`."
        )
    return given or (None, None)


def given_statistics(
    caller: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int | None = None
) -> Statistics | None:
    """:func:`check_statistics` of what may be given both or not at all."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"{caller}: `mean` and `std` must be given both or neither, got mean={mean}, std={std}.")
    return check_statistics(caller, mean, std, channels)


def check_statistics(
    caller: str, mean: Sequence[float], std: Sequence[float], channels: int | None = None
) -> Statistics:
    """Refuses a mean and std that are not finite numbers, one a channel or one for all, std above 0.

    Both come back as tuples with a number for each of the ``channels``; None for as many as there are in ``mean`` or
    ``std``.
    """
    for name, values in (("mean", mean), ("std", std)):
        rule = f"`{name}` must be finite numbers{' above 0' if name == 'std' else ''}, one a channel or one for all"
        if not isinstance(values, (tuple, list)):
            raise TypeError(f"{caller}: {rule}, got {values!r}. Give a sequence of them, for pixels in [0, 1].")
        numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) != len(values) or not numbers or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"{caller}: {rule}, got {values}. Give them for pixels in [0, 1].")
    count = channels or max(len(mean), len(std))
    if not {len(mean), len(std)} <= {1, count}:
        raise ValueError(
            f"{caller}: `mean` and `std` must have one number for each of {count} channels, or one for all, got {mean} "
            f"and {std}."
        )
    spread_mean, spread_std = (tuple(map(float, values)) * (count // len(values)) for values in (mean, std))
    return spread_mean, spread_std
