"""What the ways to a library's network share: the library, its hub, arguments of a training, the weights of a file."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..._limits import printable
from ...checkpoints import weights_in
from ...models.robustbench_zoo import Statistics
from ...models.weights import bare, load_strictly, same_statistics, without_normaliser
from .model import ImageArchitecture

__all__ = ["fetched", "library", "of_training", "trained", "understood", "unknown"]

_Fetched = TypeVar("_Fetched")


def library(caller: str, name: str) -> Any:
    """The module of that name, or the line that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{caller} needs {name}, but `{error.name}` is missing. Run: pip install {name}", name=error.name
        ) from error


def unknown(caller: str, name: str, known: Sequence[str], listed: str) -> ValueError:
    """The refusal of a name among too many to list."""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean `{nearest[0]}`? " if nearest else ""
    return ValueError(f"{caller}: unknown model `{name}`. {hint}{listed} has all {len(known):,}.")


def fetched(caller: str, what: str, offline: bool, fetch: Callable[[], _Fetched]) -> _Fetched:
    """What a library fetches, or finds in its cache; one line where it cannot."""
    if offline:
        raise ValueError(f"{caller}: the weights of {what} would be fetched, which `offline` forbids. Give a file.")
    try:
        return fetch()
    except Exception as error:  # the clients of the hubs have exceptions of their own
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{caller}: {what} cannot be had: {reason}. Fetch it elsewhere, and name the files."
        ) from error


@contextlib.contextmanager
def understood(caller: str, path: Path | str | None) -> Iterator[None]:
    """Refuses a file whose arguments a library cannot use; what its own code raises then is nearly anything."""
    try:
        yield
    except Exception as error:
        if path is None or str(error).startswith(f"{caller}"):
            raise
        raise ValueError(
            f"{caller}: the arguments in {path} must be those of its training, but give {type(error).__name__}: "
            f"{printable(error)}. Save the weights alone."
        ) from error


def of_training(caller: str, content: Any, key: str, name: str, path: Path | str | None) -> dict[str, Any]:
    """The arguments of a library's training script in a checkpoint; none where they lack ``key``.

    Raises:
        ValueError: they name another network.
    """
    args = content.get("args") if isinstance(content, Mapping) else None
    found = dict(vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {})
    if key not in found:
        return {}
    theirs = printable(found.get("model", name))
    if _plain(theirs) != _plain(name):
        raise ValueError(f"{caller}: {path} must be a checkpoint of {name}, but is of {theirs}. Name that.")
    return found


def _plain(name: str) -> str:
    """The name without timm's place of the weights, and without their tag."""
    return name.rpartition("/")[2].partition(".")[0]


def trained(
    caller: str,
    architecture: ImageArchitecture,
    network: nn.Module,
    content: Any,
    path: Path | str | None,
    averaged: bool,
    given: Statistics | None,
) -> tuple[nn.Module, Statistics | None]:
    """A network with the weights of a file and its number of classes, and the normalisation that is there or given."""
    where = str(path)
    weights, normaliser = without_normaliser(caller, weights_in(content, where, averaged=averaged), where)
    if normaliser is not None and given is not None and not same_statistics(normaliser, given):
        raise ValueError(
            f"{caller}: `mean` and `std` must be those in {where}, mean {normaliser[0]} and std {normaliser[1]}, got "
            f"mean {given[0]} and std {given[1]}. Leave them out."
        )
    inner = bare(weights)
    counts = {
        len(inner[name])
        for name, own in network.state_dict().items()
        if name in inner and inner[name].shape != own.shape and inner[name].shape[1:] == own.shape[1:]
    }
    if len(counts) == 1:  # all that differs, if anything, is the number of classes
        network = architecture.build(counts.pop())
    size = " and image_size (--image-size)" if architecture.library == "timm" else ""
    load_strictly(caller, network, weights, where, architecture.name, f"Name the network{size} that it is of.")
    return network, normaliser or given
