"""A few real digits, and networks that have seen none: what trains in a second."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from ikl_plugins.commands.data import prepare_digits
from campaign.record import TOOLS

__all__ = ["MMPRETRAIN", "TORCHDISTILL", "few_digits", "mmpretrain_config", "mmpretrain_teacher", "quiet"]

TORCHDISTILL = TOOLS.parent / "configs" / "torchdistill" / "digits"
MMPRETRAIN = TOOLS.parent / "configs" / "mmpretrain" / "digits"
IMAGES = {"train": 8, "val": 3, "test": 3}  # of each class


def few_digits(folder: Path, images: dict[str, int] | None = None) -> Path:
    """A data folder with the first digits of each class.

    Args:
        folder: where it shall be.
        images: how many of each class; :data:`IMAGES` if None.

    Returns:
        The folder, which has digits/{train,val,test}.
    """
    few = folder / "few"
    if few.exists():
        return few
    whole = prepare_digits(folder / "whole")
    aside = folder / ".few.partial"
    shutil.rmtree(aside, ignore_errors=True)
    for split, count in (IMAGES if images is None else images).items():
        for label in sorted((whole / split).iterdir()):
            target = aside / "digits" / split / label.name
            target.mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                shutil.copy(image, target)
    shutil.rmtree(folder / "whole")
    aside.rename(few)
    return few


def mmpretrain_config(name: str, **options: Any) -> Any:
    """A shipped config of the digits as MMEngine reads it, with options merged in."""
    from mmengine.config import Config

    config = Config.fromfile(MMPRETRAIN / f"{name}.py", import_custom_modules=False)
    config.merge_from_dict(options)
    return config


def mmpretrain_teacher(path: Path) -> Path:
    """Writes a checkpoint of the teacher's network, not trained."""
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(mmpretrain_config("teacher").model)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path


def quiet() -> None:
    """No log lines and no warnings of the hosts in this process."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
