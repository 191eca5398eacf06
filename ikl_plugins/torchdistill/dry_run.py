"""What a run does for the first time after an epoch, or at its end, tried before the first step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torchdistill.datasets.util import build_data_loader

from .. import _validation as check
from .run_checkpoints import CALLER
from .teacher import check_teacher
from .yaml_config import val_loader

__all__ = ["dry_run"]


def dry_run(box: Any, config: dict[str, Any]) -> None:
    """Draws a batch of each validation and test set, tests the teacher, and takes a step back that the scheduler took.

    Raises:
        ValueError: a set that is not there or gives no batches of images and labels; a scheduler that cannot step.
    """
    if getattr(box, "train_data_loader", None) is None:
        raise ValueError(f"{CALLER}: `train:` must have `train_data_loader:`, but has none. Check its spelling.")
    train = config["train"]
    stages = sum(key.startswith("stage") for key in train) if hasattr(box, "stage_number") else 0
    loaders = dict(val_loader(train, stage) for stage in range(min(1, stages), stages + 1))
    loaders["test: test_data_loader"] = config["test"]["test_data_loader"]
    for where, loader in loaders.items():
        _check_loader(where, loader, config["datasets"])
    check_teacher(box, next(iter(loaders.values())), config["datasets"])
    _check_scheduler(box, train)


def _check_loader(where: str, config: Any, datasets: dict[str, Any]) -> None:
    if not isinstance(config, dict) or "dataset_id" not in config or not isinstance(config.get("kwargs"), dict):
        raise ValueError(f"{CALLER}: `{where}:` must name a `dataset_id:` and have `kwargs:`, got {config}.")
    name = config["dataset_id"]
    if name not in datasets:
        known = ", ".join(map(repr, datasets))
        raise ValueError(f"{CALLER}: `{where}: dataset_id:` must be one of `datasets:`, {known}, got {name!r}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself tells them
            images, targets = next(iter(build_data_loader(datasets[name], config, distributed=False)))
        if not (isinstance(images, Tensor) and isinstance(targets, Tensor)):
            raise TypeError(f"{type(images).__name__} and {type(targets).__name__}")
    except Exception as error:  # of data sets, transforms and workers of any kind
        steps = getattr(getattr(datasets[name], "transform", None), "transforms", ())
        step = check.failing_step(error, steps)
        source = repr(name) if step is None else f"{name!r}, `transforms:` {step},"
        raise ValueError(
            f"{CALLER}: `{where}:` with {config['kwargs']} must give batches of images and labels, but {source} gives "
            f"{type(error).__name__}: {error}. Correct it, or its `transform:`."
        ) from error


def _check_scheduler(box: Any, train: dict[str, Any]) -> None:
    scheduler, groups = box.lr_scheduler, box.optimizer.param_groups
    if scheduler is None or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return  # that one needs an accuracy
    before = copy.deepcopy(scheduler.state_dict())
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has not taken a step
            scheduler.step()
    except Exception as error:  # of schedulers of any kind
        raise ValueError(
            f"{CALLER}: `train: scheduler:` must be a schedule, but {train.get('scheduler')} gives "
            f"{type(error).__name__} in its first step: {error}. Correct its `kwargs:`."
        ) from error
    scheduler.load_state_dict(before)
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
