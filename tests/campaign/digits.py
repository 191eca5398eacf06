"""A few real digits, and networks that have seen none: what trains in a second."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from campaign.record import ROOT
from ikl_plugins.commands.data import prepare_digits

TORCHDISTILL = ROOT / "configs" / "torchdistill" / "digits"
MMPRETRAIN = ROOT / "configs" / "mmpretrain" / "digits"
IMAGES = {"train": 8, "val": 3, "test": 3}  # of each class


def few_digits(folder: Path, images: dict[str, int] | None = None) -> Path:
    """A data folder, ``folder``/few, with the first digits of each class; ``images`` of each, by default IMAGES."""
    few = folder / "few"
    if few.exists():
        return few
    whole = prepare_digits(folder / "whole")
    for split, count in (images or IMAGES).items():
        for label in sorted((whole / split).iterdir()):
            target = few / "digits" / split / label.name
            target.mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                shutil.copy(image, target)
    shutil.rmtree(folder / "whole")
    return few


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """Replaces parts of a shipped config, each of which must be there once."""
    for old, new in pairs:
        if text.count(old) != 1:
            raise ValueError(f"campaign: the config must have {old!r} once, got {text.count(old)}. Adapt the campaign.")
        text = text.replace(old, new)
    return text


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
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path


def torchdistill_teacher(path: Path) -> Path:
    """Writes a checkpoint of the teacher's network, not trained."""
    from torchdistill.models.registry import get_model

    import ikl_plugins.torchdistill  # noqa: F401  # registers the networks

    torch.manual_seed(0)
    torch.save({"model": get_model("ikl_plugins.resnet14", num_classes=10).state_dict()}, path)
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines and no warnings of the hosts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
