"""What torchdistill knows after ``import ikl_plugins.torchdistill``, and under which keys."""

from __future__ import annotations

from typing import Any

from torchdistill.core.interfaces.registry import PRE_EPOCH_PROC_FUNC_DICT, register_pre_epoch_proc_func
from torchdistill.datasets.registry import DATASET_WRAPPER_DICT, register_dataset_wrapper
from torchdistill.losses.registry import (
    LOSS_DICT,
    LOW_LEVEL_LOSS_DICT,
    MIDDLE_LEVEL_LOSS_DICT,
    register_mid_level_loss,
)
from torchdistill.models.registry import (
    AUXILIARY_MODEL_WRAPPER_DICT,
    MODEL_DICT,
    register_auxiliary_model_wrapper,
    register_model,
)

from .. import models
from ..models.robustbench_zoo import robustbench_network
from .losses import mid_level_losses
from .processes import ALLOWING, ikl_pre_epoch_process, process_allowing_changes
from .teacher import TeacherInput
from .teacher_cache import FixedViews

__all__ = ["known_keys", "register"]

_PROCESSES = {"ikl_pre_epoch_process": ikl_pre_epoch_process, ALLOWING: process_allowing_changes}
_WRAPPERS = {"TeacherInput": TeacherInput}
_DATASET_WRAPPERS = {"ikl_plugins.FixedViews": FixedViews}
# The prefix keeps them apart from torchvision's: upstream's script looks there first, and finds a `vgg13`.
_MODELS = {f"ikl_plugins.{name}": getattr(models, name) for name in models.__all__}
_MODELS["ikl_plugins.robustbench_network"] = robustbench_network  # it imports RobustBench when it builds one


def known_keys() -> set[str]:
    """What a config may name: the losses, long and short, and the process."""
    return {*_PROCESSES, *mid_level_losses(), *(name.removesuffix("Loss") for name in mid_level_losses())}


def register() -> None:
    """Registers losses, process, wrapper and networks with torchdistill; a second call changes nothing.

    Raises:
        ValueError: somebody else holds one of the keys. Nothing is registered then.
    """
    losses = mid_level_losses()
    losses |= {name.removesuffix("Loss"): loss for name, loss in losses.items()}
    # torchdistill overwrites in silence, so look first. A mid-level loss also hides a low-level one of its name.
    for kind, registries, entries in (
        ("loss", (MIDDLE_LEVEL_LOSS_DICT, LOW_LEVEL_LOSS_DICT, LOSS_DICT), losses),
        ("pre-epoch process", (PRE_EPOCH_PROC_FUNC_DICT,), _PROCESSES),
        ("auxiliary model wrapper", (AUXILIARY_MODEL_WRAPPER_DICT,), _WRAPPERS),
        ("data set wrapper", (DATASET_WRAPPER_DICT,), _DATASET_WRAPPERS),
        ("model", (MODEL_DICT,), _MODELS),
    ):
        for key, ours in entries.items():
            for registry in registries:
                if key in registry and _full_name(registry[key]) != _full_name(ours):
                    raise ValueError(
                        f"ikl_plugins.torchdistill: {kind} key '{key}' must be free, but "
                        f"{_full_name(registry[key])} holds it. "
                        f"Rename that one."
                    )
    for key, loss in losses.items():
        register_mid_level_loss(key=key)(loss)
    for key, process in _PROCESSES.items():
        register_pre_epoch_proc_func(key=key)(process)
    for key, wrapper in _WRAPPERS.items():
        register_auxiliary_model_wrapper(key=key)(wrapper)
    for key, dataset_wrapper in _DATASET_WRAPPERS.items():
        register_dataset_wrapper(key=key)(dataset_wrapper)
    for key, model in _MODELS.items():
        register_model(key=key)(model)


def _full_name(holder: Any) -> str:
    return f"{holder.__module__}.{getattr(holder, '__qualname__', type(holder).__qualname__)}"
