"""The one strict load: weights whose names and shapes are those of the network, or a refusal that says what differs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _validation as check
from .._limits import printable
from ..checkpoints import check_dense, plain_name
from .robustbench_zoo import Statistics

__all__ = [
    "Misfit",
    "Statistics",
    "bare",
    "drawn_parameters",
    "fits",
    "load_strictly",
    "network_sha256",
    "parts",
    "same_statistics",
    "state_sha256",
    "without_normaliser",
]

_WAY_OUT = "Name the config that it was trained with, or another checkpoint."
# The class statistics of this package's classifiers for MMPretrain.
_PRIOR = re.compile(r"(?:distill_loss|robust_loss)\.class_prior\.(?:matrix|sums|counts)")
# Of the official WideResNet, whose forward never uses it; RobustBench and the official evaluation leave it out.
_UNUSED = "sub_block1."
_COUNTER = ".num_batches_tracked"
# How layers that normalise images call what they hold.
_NORMALISERS = {"mean": "std", "_mean": "_std", "new_mean": "new_std", "mu": "sigma"}
_GREY_LEVELS = 1.0  # above it a mean is not of pixels in [0, 1]


class Misfit(NamedTuple):
    """The names in which weights and network differ.

    Attributes:
        missing: in the network alone.
        unexpected: in the weights alone.
        shapes: in both, with another shape, or numbers of another kind.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]


def bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers have put into their names, nor what all names begin with."""
    found = _plain(weights)
    prefix = max(_prefixes(found), default="", key=len)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def parts(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What lies side by side in the names, as a student and a teacher do: ``bare`` weights by what they begin with."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in bare(weights).items():
        first, _, rest = name.partition(".")
        if rest:
            found.setdefault(f"{first}.", {})[rest] = tensor
    return found


def without_normaliser(
    caller: str, weights: Mapping[str, Tensor], path: Path | str
) -> tuple[dict[str, Tensor], Statistics | None]:
    """Takes the mean and std of a layer that normalises images out of weights.

    Args:
        caller: whom a refusal names.
        weights: tensors by name.
        path: where they come from, for the message.

    Returns:
        The other weights, and mean and std for pixels in [0, 1]; None if there is no such layer.

    Raises:
        ValueError: two such layers differ, or one is for pixels up to 255.
    """
    check_dense(caller, weights, path)
    rest = dict(weights)
    found: set[Statistics] = set()
    for name in weights:
        prefix, _, last = name.rpartition(".")
        other = f"{prefix}.{_NORMALISERS.get(last)}".lstrip(".")
        pair = [weights[one] for one in (name, other) if one in weights]
        if (
            last in _NORMALISERS
            and len(pair) == 2
            and all(0 < one.numel() <= 4 and one.is_floating_point() for one in pair)
        ):
            mean, std = (tuple(rest.pop(one).flatten().tolist()) for one in (name, other))
            found.add((mean, std))
    if len(found) > 1 or any(max(mean) > _GREY_LEVELS for mean, _ in found):
        shown = " and ".join(f"mean {mean}, std {std}" for mean, std in sorted(found))
        raise ValueError(
            f"{caller}: {path} must normalise pixels in [0, 1] in one way, got {shown}. Take that layer out."
        )
    return rest, next(iter(found), None)


def load_strictly(
    caller: str,
    network: nn.Module,
    weights: Mapping[str, Tensor],
    path: Path | str,
    target: str,
    way_out: str | Callable[[Misfit], str] = _WAY_OUT,
    *,
    statistics: Statistics | None = None,
) -> None:
    """Loads weights into a network, whose own hooks may rename them on the way.

    What wrappers put into names (``module.``, ``_orig_mod.``), and what all names begin with (``model.``, ``1.``), is
    taken off if all names are then exactly the network's. Left out are the class statistics of this package's
    classifiers for MMPretrain, the unused ``sub_block1`` of the official WideResNet, and a mean and std that the caller
    has.

    Args:
        caller: whom a refusal names.
        network: gets the weights.
        weights: tensors by name.
        path: where they come from, for the message.
        target: what the network is called in it.
        way_out: the sentence at its end, or what makes one of the difference.
        statistics: with what images are normalised before they reach the network.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs; weights are integers, of 8 bits, complex or not
            dense (:func:`ikl_plugins.checkpoints.check_dense`); the weights have a layer that normalises images
            otherwise than with ``statistics``.
    """
    check_dense(caller, weights, path)
    own = network.state_dict()
    renamed = _fitted(weights, own)
    if renamed is None:
        rest, normaliser = without_normaliser(caller, weights, path)
        renamed = _fitted(_without_copies(rest, own), own)
        if renamed is not None and normaliser is not None and not same_statistics(normaliser, statistics):
            raise ValueError(
                f"{caller}: {path} normalises images with mean {normaliser[0]} and std {normaliser[1]}, which {target} "
                f"does not. Normalise them so in the data, and save the network alone."
            )
    if renamed is not None:
        weights = renamed
    shapes = [name for name in own if name in weights and not fits(weights[name], own[name])]
    complex_ones = [name for name in own if name in weights and weights[name].is_complex() > own[name].is_complex()]
    if complex_ones:  # torch would drop the imaginary part
        raise ValueError(
            f"{caller}: the checkpoint {path} must hold real numbers for {target}, but {complex_ones[0]} is complex. "
            f"Save its real part."
        )
    if not shapes:  # torch itself would raise before it has named what is missing
        missing, unexpected = network.load_state_dict(weights, strict=False)
        if not missing and not unexpected:
            return
    weights = _nearest(weights, own)
    shapes = [name for name in own if name in weights and not fits(weights[name], own[name])]
    misfit = Misfit(
        [name for name in own if name not in weights], [name for name in weights if name not in own], shapes
    )
    differ = [f"{name} {_kind(weights[name], own[name])} instead of {_kind(own[name], own[name])}" for name in shapes]
    unexpected = [printable(name) or "''" for name in misfit.unexpected]
    named = {"missing": misfit.missing, "unexpected": unexpected, "other shapes": differ}
    found = "; ".join(f"{kind}: {check.first_names(names)}" for kind, names in named.items() if names)
    side_by_side = parts(weights)
    inside = [prefix for prefix, part in side_by_side.items() if _fitted(part, own) is not None]
    if inside:
        others = check.first_names(
            [printable(prefix) for prefix in side_by_side if prefix not in inside] or ["each other"]
        )
        end = f"It is under {printable(' and '.join(inside))}, beside {others}: save it alone."
    else:
        end = way_out if isinstance(way_out, str) else way_out(misfit)
    raise ValueError(f"{caller}: the checkpoint {path} must fit {target}, but it does not; {found}. {end}")


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether weights have a parameter's shape and, where it is floating, its kind of numbers: torch would cast any."""
    return tensor.shape == own.shape and (own.dtype not in check.FLOATING or tensor.dtype in check.FLOATING)


def _kind(tensor: Tensor, own: Tensor) -> str:
    shape = str(tuple(tensor.shape))
    return shape if own.dtype not in check.FLOATING or tensor.dtype in check.FLOATING else f"{shape} of {tensor.dtype}"


def drawn_parameters(network: nn.Module, build: Callable[[], nn.Module]) -> list[str]:
    """The parameters that nobody has trained, of a network that has fetched its weights while it was built.

    Args:
        network: the network.
        build: makes it once more, with other random numbers.

    Returns:
        Their names: those that differ, and matrices of zeros. Of torch's random numbers none are used up.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(torch.initial_seed() + 1)
        again = dict(build().named_parameters())
    return [
        name
        for name, parameter in network.named_parameters()
        if not torch.equal(parameter, again[name].to(parameter.device)) or (parameter.dim() > 1 and not parameter.any())
    ]


def same_statistics(one: Statistics, other: Statistics | None) -> bool:
    """Whether two pairs of mean and std are one but for rounding."""
    if other is None:
        return False
    return all(
        torch.allclose(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-4) for a, b in zip(one, other, strict=True)
    )


def _fitted(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights by the network's names if these are exactly theirs without wrappers and what all begin with."""
    if weights.keys() == own.keys():
        return dict(weights)
    names = {plain_name(name): name for name in own}
    found = _plain(weights)
    if len(names) < len(own):  # parts of the network itself are called like wrappers
        names, found = dict(zip(own, own, strict=True)), dict(weights)
    found = {
        name: tensor
        for name, tensor in found.items()
        if name in names or not (_PRIOR.fullmatch(name) or name.rpartition(".")[2] == "n_averaged")
    }
    for prefix in ("", *_prefixes(found)):
        inner = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        kept = {
            name: tensor
            for name, tensor in inner.items()
            if name.replace(_UNUSED, "block1.") not in names or name in names
        }
        # Files of torch 0.3 have no counters of BatchNorm, and torch itself loads them.
        if kept.keys() == names.keys() - {name for name in names if name.endswith(_COUNTER) and name not in kept}:
            return {names[name]: tensor for name, tensor in kept.items()}
    return None


def _without_copies(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what is there a second time, as MadryLab's attacker holds the network that it attacks."""
    for prefix, part in parts(weights).items():
        if (fitted := _fitted(part, own)) is not None:
            rest = {name: tensor for name, tensor in bare(weights).items() if not name.startswith(prefix)}
            if all(
                any(name.endswith(f".{one}") and torch.equal(tensor, fitted[one]) for one in fitted)
                for name, tensor in rest.items()
            ):
                return fitted
    return dict(weights)


def state_sha256(state: Mapping[str, Any]) -> str:
    """The checksum of a state dict, 64 hexadecimal digits: of names, dtypes, shapes and values, in the order of names.

    It is the same on any device.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_sha256(network: nn.Module) -> str:
    """:func:`state_sha256` of a network, compiled or wrapped or not."""
    return state_sha256({plain_name(name): value for name, value in network.state_dict().items()})


def _nearest(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that have the most in common with the network's."""
    plain = _plain(weights)
    candidates = [dict(weights)]
    candidates += [{name.removeprefix(prefix): plain[name] for name in plain} for prefix in ("", *_prefixes(plain))]
    return max(candidates, key=lambda named: len(named.keys() & own.keys()))


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {plain_name(name): tensor for name, tensor in weights.items()}
    return found if len(found) == len(weights) else dict(weights)


def _prefixes(names: Iterable[str]) -> list[str]:
    """What all names begin with, the shortest first."""
    found: list[str] = []
    for layer in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(layer)) > 1:
            break
        found.append(f"{found[-1] if found else ''}{layer[0]}.")
    return found
