"""The one strict load: weights whose names and shapes are those of the network, or a refusal that says what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .. import _validation as check

__all__ = ["Misfit", "load_strictly", "strip_prefixes"]

# Wrappers, MMPretrain's classifiers, a Sequential of one network.
PREFIXES = ("module.", "model.", "backbone.", "0.")
_WAY_OUT = "Name the config that it was trained with, or another checkpoint."


class Misfit(NamedTuple):
    """The names in which weights and network differ.

    Attributes:
        missing: in the network alone.
        unexpected: in the weights alone.
        shapes: in both, with another shape.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]


def strip_prefixes(weights: Mapping[str, Tensor], prefixes: Sequence[str] = PREFIXES) -> dict[str, Tensor]:
    """The weights without the prefixes that all their names have, one after another."""
    stripped = dict(weights)
    while stripped:
        common = next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in stripped)), None)
        if common is None:
            break
        stripped = {name.removeprefix(common): tensor for name, tensor in stripped.items()}
    return stripped


def load_strictly(
    caller: str,
    network: nn.Module,
    weights: Mapping[str, Tensor],
    path: Path | str,
    target: str,
    way_out: str | Callable[[Misfit], str] = _WAY_OUT,
) -> None:
    """Loads weights into a network, whose own hooks may rename them on the way.

    Args:
        caller: whom a refusal names.
        network: gets the weights.
        weights: tensors by name.
        path: where they come from, for the message.
        target: what the network is called in it.
        way_out: the sentence at its end, or what makes one of the difference.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs.
    """
    own = network.state_dict()
    shapes = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if shapes:  # torch itself would raise before it has named what is missing
        missing, unexpected = (
            [name for name in own if name not in weights],
            [name for name in weights if name not in own],
        )
    else:
        missing, unexpected = network.load_state_dict(weights, strict=False)
    misfit = Misfit(missing, unexpected, shapes)
    if not any(misfit):
        return
    differ = [f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in shapes]
    named = {"missing": missing, "unexpected": unexpected, "other shapes": differ}
    found = "; ".join(f"{kind}: {check.first_names(names)}" for kind, names in named.items() if names)
    end = way_out if isinstance(way_out, str) else way_out(misfit)
    raise ValueError(f"{caller}: the checkpoint {path} must fit {target}, but it does not; {found}. {end}")
