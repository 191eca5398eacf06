"""What a run was started with, as plain values in its checkpoint, and in which of them a resumed run differs."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterator, Mapping
from inspect import getattr_static, signature
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import _validation as check
from ._limits import printable

__all__ = ["check_resumed", "differences", "settings_of"]

# What says nothing about the numbers of a training: checks, evaluation, layouts, ways to compute the same, and the
# places of torch's and MMEngine's schedulers, which move.
_NO_EFFECT = {"check_finite", "teacher_val_batches", "val_attack", "val_seed", "channels_last", "init_cfg", "verbose"}
_NO_EFFECT |= {"last_epoch", "last_step", "foreach", "fused", "capturable", "differentiable"}
# To train longer is no other run, and a schedule goes with it.
_ONLY_SAID = ("epochs", "iterations", "schedule")
# Both hosts take these from the checkpoint, whatever the config says.
_OF_CHECKPOINT = ("optimizer", "schedule")
_RESTORED = " (the checkpoint's goes on)"
_MISSING = object()


def settings_of(owner: Any) -> dict[str, Any]:
    """The type of an object, and each keyword of its constructor that it keeps, as it stands now, in plain values.

    Args:
        owner: a loss, an attack, a classifier, an optimizer, a scheduler. Its public attributes and those with one
            underscore count. Parts that are objects of this package come with their own settings, or with what their
            ``run_settings()`` gives; modules do not.
    """
    found: dict[str, Any] = {"type": type(owner).__name__}
    if isinstance(owner, torch.optim.Optimizer):
        kept = _plain(owner.defaults)  # param_groups have what a checkpoint has left there
        return found | {name: value for name, value in kept.items() if name not in _NO_EFFECT}
    starts = [vars(kind).get("__init__") for kind in type(owner).__mro__]
    names = [name for start in starts if isinstance(start, FunctionType) for name in signature(start).parameters]
    for name in names:
        for place in (name, f"_{name}"):
            value = _plain(getattr_static(owner, place, _MISSING))  # runs no property
            if value is not _MISSING and name not in _NO_EFFECT:
                found.setdefault(name, value)
    return found


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two records, by field: 'was 4.0, is 2.0'.

    A record is a mapping of mappings. Where one has a 'type', and at the top, what only one side has is passed over: an
    older release has not known it.
    """
    return {
        field: f"was {_shown(old)}, is {_shown(new)}" for field, old, new in _pairs("", was, now) if not _same(old, new)
    }


def check_resumed(
    caller: str,
    source: object,
    was: Any,
    now: Mapping[str, Any],
    *,
    allowed: bool,
    way_out: str,
    logger: logging.Logger,
) -> None:
    """Logs each field in which a resumed run differs from what it was started with, and refuses the run.

    All ranks must call this; what rank 0 finds counts for all.

    Args:
        caller: whom messages name.
        source: the checkpoint.
        was: its record, or anything else if it has none.
        now: that of this run.
        allowed: warn only, but for another optimizer, whose state would not fit.
        way_out: how to allow it.
        logger: of rank 0.

    Raises:
        ValueError: something differs, but for the number of epochs and the schedule.
    """
    was = was if isinstance(was, Mapping) else {}
    found, rank = differences(was, now), 0
    if dist.is_available() and dist.is_initialized():
        told, rank = [found] * dist.get_world_size(), dist.get_rank()
        dist.all_gather_object(told, found)  # rank 0, too, waits for the others before it stops
        found = told[0]
    if rank == 0 and "losses" not in was:
        logger.warning("%s: %s has no record of its run's settings; they are not compared", caller, source)
    fixed = [field for field in found if field.startswith("optimizer") and field.endswith(".type")]
    refused = fixed if allowed else [field for field in found if not field.startswith(_ONLY_SAID)]
    for field, text in (found if rank == 0 else {}).items():
        restored = field.startswith(_OF_CHECKPOINT) and field not in fixed
        # MMEngine's logger passes over a second warning of the same format.
        logger.warning(f"{caller}: {field}: {text}{_RESTORED if restored else ''}")
    if refused:
        raise ValueError(
            f"{caller}: a run that goes on from {source} must keep its settings, but others are "
            f"{check.first_names([f'{field} ({found[field]})' for field in refused])}. "
            f"{'Start a new one from its weights.' if allowed else way_out}"
        )


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        parts = {str(key): _plain(part) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not _MISSING}
    if isinstance(value, (list, tuple)):
        parts = {str(index): _plain(part) for index, part in enumerate(value)}
        if any(isinstance(part, dict) for part in parts.values()):
            return {index: part for index, part in parts.items() if part is not _MISSING}
        return _MISSING if any(part is _MISSING for part in parts.values()) else list(parts.values())
    if hasattr(value, "run_settings"):
        return value.run_settings()
    ours = type(value).__module__.partition(".")[0] == __package__
    return settings_of(value) if ours and not isinstance(value, nn.Module) else _MISSING


def _pairs(prefix: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The fields of two records; of those that only one has the other side is None."""
    if not isinstance(was, Mapping) or not isinstance(now, Mapping):
        yield prefix, was, now
        return
    common = prefix == "" or "type" in was or "type" in now
    for key in [*now, *(key for key in was if key not in now)]:
        if not common or (key in was and key in now):
            name = f"{prefix}.{printable(key)}" if prefix else str(key)
            yield from _pairs(name, was.get(key), now.get(key))


def _same(was: Any, now: Any) -> bool:
    if isinstance(now, list):
        return isinstance(was, list) and len(was) == len(now) and all(map(_same, was, now))
    return type(was) in (type(None), bool, int, float, str) and bool(was == now)


def _shown(value: Any) -> str:
    return printable(reprlib.repr(value.get("type", value) if isinstance(value, Mapping) else value))
