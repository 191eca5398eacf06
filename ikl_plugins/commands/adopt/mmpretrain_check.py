"""``--check`` for MMPretrain: the new model is built and takes the losses of two random images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, init_default_scope
from mmpretrain.registry import METRICS, MODELS
from mmpretrain.structures import DataSample

import ikl_plugins.mmpretrain  # noqa: F401  # registers

from .messages import CALLER, first_line

__all__ = ["check_file", "image_shape"]

_BATCH = 2
_DEFAULT_SIDE = 224


def check_file(path: Path) -> list[str]:
    """Reads a config, builds its model, hooks and metrics, and runs the model's losses forward and backward.

    Returns:
        What was checked, a line each.

    Raises:
        ImportError: a module of ``custom_imports`` is missing.
        ValueError: anything that goes wrong, by its first line.
    """
    try:
        config = Config.fromfile(str(path))
    except ImportError:
        raise
    except Exception as error:  # a config is a program
        raise ValueError(f"{CALLER}: the new config must be read, but {first_line(error)}") from error
    init_default_scope(config.get("default_scope") or "mmpretrain")
    try:
        model = _build(config)
        for hook in config.get("custom_hooks") or []:
            settings = dict(hook)
            settings.pop("priority", None)  # it is the runner's
            HOOKS.build(settings)
        evaluators = config.get("val_evaluator") or []
        for metric in evaluators if isinstance(evaluators, list) else [evaluators]:
            METRICS.build(metric)
    except Exception as error:  # of any part
        raise ValueError(f"{CALLER}: the new config must build, but {first_line(error)}") from error
    shape = image_shape(config, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    built = f"{type(model).__name__} with {parameters:,} parameters, {len(config.get('custom_hooks') or [])} hooks"
    try:
        losses = _step(model, shape)
    except Exception as error:
        raise ValueError(
            f"{CALLER}: the new model must train on {_BATCH} random images of shape {shape}, but {first_line(error)}"
        ) from error
    shown = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items() if "loss" in name)
    return [built, f"a batch of random images of shape {shape}: {shown}; its gradients are finite"]


def _build(config: Any) -> Any:
    settings = config.model.to_dict() if hasattr(config.model, "to_dict") else dict(config.model)
    top = config.get("data_preprocessor")
    if top is not None:
        settings.setdefault("data_preprocessor", top.to_dict() if hasattr(top, "to_dict") else dict(top))
    return MODELS.build(settings)


def image_shape(config: Any, model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the training images, as far as the config tells."""
    side = None
    for transform in _pipeline(config.get("train_dataloader")):
        for key in ("crop_size", "scale"):
            value = transform.get(key)
            if isinstance(value, (list, tuple)):
                value = value[-1]
            if isinstance(value, int) and not isinstance(value, bool):
                side = value
    if side is None:
        size = getattr(model.backbone, "img_size", None)
        size = size[-1] if isinstance(size, (list, tuple)) else size
        small = "cifar" in str(config.get("train_dataloader", "")).lower()
        side = size if isinstance(size, int) else 32 if small else _DEFAULT_SIDE
    mean = getattr(model.data_preprocessor, "mean", None)
    channels = 3 if mean is None else int(mean.numel())
    return channels, side, side


def _pipeline(value: Any) -> list[Any]:
    """The transforms of the data set that is trained on, whatever wraps it."""
    if not isinstance(value, Mapping):
        return []
    if isinstance(value.get("pipeline"), list):
        return [transform for transform in value["pipeline"] if isinstance(transform, Mapping)]
    return _pipeline(value.get("dataset"))


def _step(model: Any, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    classes = getattr(model.head, "num_classes", None) or _BATCH
    batch = {
        "inputs": [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(_BATCH)],
        "data_samples": [DataSample().set_gt_label(number % classes) for number in range(_BATCH)],
    }
    model.train()
    model.begin_epoch(1, 1)
    data = model.data_preprocessor(batch, True)
    losses = model.loss(**data)
    total, _ = model.parse_losses(losses)
    total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients or not all(bool(torch.isfinite(part).all()) for part in (total, *gradients)):
        raise ValueError(f"loss and gradients are not finite, got {total.item()}")
    return {name: value.detach() for name, value in losses.items() if isinstance(value, torch.Tensor)}
