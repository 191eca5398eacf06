"""What MMEngine knows after ``import ikl_plugins.mmengine``, and the one way to register for the packages on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mmengine import registry as root

from .averaging import WarmupEMA
from .hooks import IKLHook
from .losses import LOSSES, KLLoss
from .optim import AutocastOptimWrapper
from .schedules import BatchNormMomentumHook, OneCycleMomentum, ResumableOneCycleLR

__all__ = ["ENTRIES", "Entry", "register", "register_entries"]


class Entry(NamedTuple):
    """A class or function, and the name that a registry shall know it by.

    Attributes:
        registry: MMEngine's or that of a library on top.
        kind: what it is, for messages.
        name: what a config writes as ``type``.
        ours: the class or function.
    """

    registry: Any
    kind: str
    name: str
    ours: Any


ENTRIES = (
    *(Entry(root.MODELS, "loss", name, loss) for name, loss in {**LOSSES, "KLLoss": KLLoss}.items()),
    Entry(root.MODELS, "averaged model", "WarmupEMA", WarmupEMA),
    Entry(root.HOOKS, "hook", "IKLHook", IKLHook),
    Entry(root.HOOKS, "hook", "BatchNormMomentumHook", BatchNormMomentumHook),
    Entry(root.PARAM_SCHEDULERS, "parameter scheduler", "ResumableOneCycleLR", ResumableOneCycleLR),
    Entry(root.PARAM_SCHEDULERS, "parameter scheduler", "OneCycleMomentum", OneCycleMomentum),
    Entry(root.OPTIM_WRAPPERS, "optimizer wrapper", "AutocastOptimWrapper", AutocastOptimWrapper),
)


def register() -> None:
    """Registers everything of this package; a second call changes nothing.

    Raises:
        ValueError: somebody else holds one of the names. Nothing is registered then.
    """
    register_entries("ikl_plugins.mmengine", ENTRIES)


def register_entries(caller: str, entries: Sequence[Entry]) -> None:
    """Registers all of ``entries``, or none if somebody else holds one of the names."""
    for registry, kind, name, ours in entries:
        # The same name in another library's registry would hide that of the root.
        for where in (registry, *registry.children.values()):
            holder = where.module_dict.get(name)
            if holder is not None and _full_name(holder) != _full_name(ours):
                raise ValueError(
                    f"{caller}: the {kind} name '{name}' must be free, but {_full_name(holder)} holds it in "
                    f"{where.scope}. "
                    f"Rename that one."
                )
    for registry, _, name, ours in entries:
        if registry.module_dict.get(name) is not ours:
            registry.register_module(name=name, module=ours, force=True)


def _full_name(holder: Any) -> str:
    return f"{holder.__module__}.{getattr(holder, '__qualname__', type(holder).__qualname__)}"
