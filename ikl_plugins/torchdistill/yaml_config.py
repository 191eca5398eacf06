"""Reading a YAML file of torchdistill for the driver, and building the networks that it names."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from .._files import check_config_text, configs_folder
from .._limits import check_regular_file
from ..checkpoints import load_weights
from .registration import known_keys
from .run_checkpoints import CALLER, load_model

logger = logging.getLogger(__name__)

__all__ = ["build_model", "load_config", "student_config", "val_loader"]

_PACKAGE = "ikl_plugins.torchdistill"
_COMPARE = "Compare a config of `ikl config list torchdistill`."


def load_config(path: Path | str) -> dict[str, Any]:
    """Reads a YAML file as torchdistill does, its data sets included.

    Args:
        path: the file. It is trusted: `!import_call` runs what it names.

    Returns:
        The config, as :func:`ikl_plugins.torchdistill.training.run` takes it.

    Raises:
        ValueError: the file is missing, not in UTF-8 or no YAML, lacks a block, or names data that is not there.
    """
    if not Path(path).is_file():
        raise ValueError(f"{CALLER}: the config must be a YAML file, but there is none at {path}.")
    check_config_text(CALLER, path)
    try:
        config = load_yaml_file(os.fspath(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{CALLER}: {path} must be a YAML file, but it is not: {error}.") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of a date that is none, or what a tag runs
        raise ValueError(f"{CALLER}: {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CALLER}: {path} must hold a mapping, got {type(config).__name__}. {_COMPARE}")
    for keys in (("datasets",), ("models",), ("train",), ("test", "test_data_loader")):
        block: Any = config
        for key in keys:
            block = block.get(key) if isinstance(block, dict) else None
        if not isinstance(block, dict):
            raise ValueError(f"{CALLER}: {path} must have the block `{': '.join(keys)}:`. {_COMPARE}")
    for role, model in config["models"].items():
        if not isinstance(model, dict):
            raise ValueError(
                f"{CALLER}: `models: {role}:` must be a mapping, got {model!r}. Give it `key:` and `kwargs:`."
            )
    if "dst_ckpt" not in student_config(config):
        raise ValueError(f"{CALLER}: {path} must have `dst_ckpt:` under `models:`, the path of the trained model.")
    named = sorted(_keys_in(config["train"]) & known_keys())
    if named and _PACKAGE not in Path(path).read_text(encoding="utf-8"):  # an `!import_call` of it imports it as well
        logger.warning(
            "%s: %s names %s, but does not import them, so that torchdistill's own script does not know them. Add:\n"
            "  dependencies: ['%s']",
            CALLER,
            path,
            ", ".join(named),
            _PACKAGE,
        )
    return config


def _keys_in(value: Any) -> set[str]:
    """All strings of a config."""
    if isinstance(value, str):
        return {value}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*map(_keys_in, parts))


def student_config(config: dict[str, Any]) -> dict[str, Any]:
    """The block of the network that is trained."""
    models = config["models"]
    found: dict[str, Any] | None = models.get("student_model", models.get("model"))
    if found is None:
        raise ValueError(f"{CALLER}: the config must have `student_model:` or `model:` under `models:`. {_COMPARE}")
    return found


def val_loader(train_config: dict[str, Any], stage: int) -> tuple[str, Any]:
    """Where the validation loader of a stage stands, and its block; a stage without one keeps that of the last."""
    for number in range(stage, 0, -1):
        block = train_config.get(f"stage{number}", {})
        if "val_data_loader" in block:
            return f"train: stage{number}: val_data_loader", block["val_data_loader"]
    return "train: val_data_loader", train_config.get("val_data_loader")


def build_model(model_config: dict[str, Any], role: str, device: torch.device, distributed: bool) -> nn.Module:
    """The network of a block, with the weights of its `src_ckpt`.

    Raises:
        ValueError: the block has no `key:` or `kwargs:`; the checkpoint is missing, damaged or of another network.
    """
    kwargs = model_config.get("kwargs")
    if "key" not in model_config or not isinstance(kwargs, dict):
        raise ValueError(
            f"{CALLER}: the {role} must have a network's name as `key:` and arguments as `kwargs:`, got "
            f"{model_config}. "
            f"Write `kwargs: {{}}`."
        )
    model: nn.Module | None = get_image_classification_model(model_config, distributed)
    if model is None:
        model = get_model(model_config["key"], model_config.get("repo_or_dir"), **kwargs)
    source = model_config.get("src_ckpt")
    if source is not None:
        check_regular_file(CALLER, source)
        if not Path(source).is_file():
            raise ValueError(
                f"{CALLER}: `src_ckpt` of the {role} must be a checkpoint file, but there is none at {source}. "
                f"{_who_trains(str(source))}."
            )
        load_model(model, load_weights(source), source, model_config["key"])
    return model.to(device)


def _who_trains(path: str) -> str:
    """The command that makes a checkpoint, if a shipped config does."""
    folder = configs_folder()
    for file in sorted((folder / "torchdistill").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if re.search(rf"dst_ckpt: *['\"]?{re.escape(path)}['\"]? *$", text, re.MULTILINE):
            return f"Train it first: ikl train {file.relative_to(folder).as_posix()}"
    return "Train it first, or correct the path"
