"""The teacher of a distillation: built, filled with weights, checked, and kept out of everything that is trained."""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from .._files import check_config_text
from ..checkpoints import is_address, load_weights
from ..models.weights import load_strictly
from .classifier import EpochClassifier
from .pixels import pixel_space

__all__ = ["FrozenTeacher", "build_teacher"]

_EXTRAS = ("distill_loss.", "robust_loss.", "data_preprocessor.")
_INLINE = "teacher=dict(type='ImageClassifier', backbone=..., head=...)"


class FrozenTeacher:
    """Holds a frozen network outside the module tree.

    No checkpoint, optimizer, weight average or data-parallel wrapper sees it. A copy of the model shares the teacher:
    ``copy.deepcopy`` of the holder is the holder. Its owner forwards ``.to()``, ``.half()`` and the like to
    :meth:`apply`.

    Args:
        module: the network; its parameters are frozen and it is put in eval mode.
        conversion: from the student's inputs to the teacher's; None where they are the same.

    Attributes:
        module: the network.
        num_classes: number of classes if its head says so, else None.
    """

    def __init__(self, module: nn.Module, conversion: Callable[[Tensor], Tensor] | None = None) -> None:
        module.eval()  # some of MMPretrain's networks return nothing from it
        self.module = module.requires_grad_(False)
        self.conversion = conversion
        self.num_classes: int | None = getattr(getattr(module, "head", None), "num_classes", None)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The teacher's logits (N, classes) of the student's inputs (N, C, H, W), under the caller's autocast."""
        if self.module.training:  # somebody else holds it as well
            self.module.eval()
        logits = self.module(inputs if self.conversion is None else self.conversion(inputs))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"teacher: `{type(self.module).__name__}` must give logits of shape (N, C), got {what}. "
                f"Use a classifier."
            )
        return logits

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies what ``nn.Module._apply`` does to the owner's tensors."""
        self.module._apply(function)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


def build_teacher(
    teacher: str | Path | Mapping[str, Any] | nn.Module,
    teacher_ckpt: str | Path | None = None,
    *,
    student: EpochClassifier,
) -> FrozenTeacher:
    """A teacher from a config, with its weights, checked against the student.

    Args:
        teacher: path of a config file, whose ``model`` is built with its ``data_preprocessor``; or config dict of a
            model; or the network itself. Of a classifier of this package the plain ``ImageClassifier`` inside is built.
        teacher_ckpt: file or http(s) address of its checkpoint; ``*`` stands for what one file alone has there, such as
            the epoch in MMEngine's name of the best one. Without a checkpoint a network keeps the weights that it has,
            and a config must name pretrained weights itself.
        student: the classifier that it will teach.

    Returns:
        The holder. Where mean, std or channel order of the teacher's data preprocessor are not the student's, the
        holder converts; a config dict or a network without data preprocessor sees the student's inputs. Padding is
        left as the student has it.

    Raises:
        TypeError: ``teacher`` is none of these.
        ValueError: a file is missing; weights do not fit the network or are missing; class counts differ.
    """
    caller = type(student).__name__
    origin = ""
    if isinstance(teacher, nn.Module):
        module = teacher
    else:
        if isinstance(teacher, (str, Path)):
            origin = str(teacher)
            config = _read_config(caller, origin)
        elif isinstance(teacher, Mapping):
            config = copy.deepcopy(dict(teacher))
        else:
            raise TypeError(
                f"{caller}: `teacher` must be the path of a config, a dict or a module, got {type(teacher).__name__}. "
                f"Write {_INLINE}."
            )
        config = _plain_config(config)
        own_inputs = config.get("data_preprocessor") is not None or bool(origin)
        module = MODELS.build(config)
        if teacher_ckpt is None:
            _initialise(caller, module, config, origin)
    if teacher_ckpt is not None:
        _load(caller, module, str(teacher_ckpt), origin)

    conversion = None
    if isinstance(teacher, nn.Module) or own_inputs:
        conversion = _conversion(student, module)
    holder = FrozenTeacher(module, conversion)
    classes = getattr(student.head, "num_classes", None)
    if None not in (classes, holder.num_classes) and classes != holder.num_classes:
        raise ValueError(
            f"{caller}: `teacher` must have the class count of the student, got {holder.num_classes} and {classes}. "
            f"Take another teacher."
        )
    return holder


def _read_config(caller: str, path: str) -> dict[str, Any]:
    if not Path(path).expanduser().is_file():
        raise ValueError(
            f"{caller}: `teacher` must be the path of a config, but there is none at {path} (seen from {Path.cwd()}). "
            f"Correct it."
        )
    check_config_text(caller, path)
    file = Config.fromfile(str(Path(path).expanduser()))
    model = file.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f"{caller}: `teacher` must be a config with a `model`, but {path} has none.")
    config = copy.deepcopy(dict(model))
    if config.get("data_preprocessor") is None:
        config["data_preprocessor"] = copy.deepcopy(file.get("data_preprocessor")) or {}
    return config


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Of a classifier of this package the classifier that its checkpoint loads into."""
    kind = config.get("type")
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(cls, type) and issubclass(cls, EpochClassifier):
        return cls.plain_config(config)
    return config


def _initialise(caller: str, module: nn.Module, config: Mapping[str, Any], origin: str) -> None:
    """Loads the weights that a config names for the whole network, or refuses an untrained teacher."""
    named = config.get("pretrained")
    init_cfg = config.get("init_cfg")
    if not named and isinstance(init_cfg, Mapping) and init_cfg.get("type") in ("Pretrained", PretrainedInit):
        named = None if init_cfg.get("prefix") else init_cfg.get("checkpoint")
    if named is True:
        return  # the network has fetched its weights itself, as those of timm and Hugging Face do
    if named:
        _load(caller, module, str(named), origin)
        return
    raise ValueError(
        f"{caller}: `teacher_ckpt` must be given, got None or a backbone alone. Write teacher_ckpt='....pth'."
    )


def _load(caller: str, module: nn.Module, path: str, origin: str) -> None:
    """Loads a checkpoint whose names and shapes are exactly those of the network."""
    if "://" in path and not is_address(path):
        raise ValueError(f"{caller}: `teacher_ckpt` must be a file or an http(s) address, got {path}. Fetch it.")
    if "*" in path and not is_address(path):
        found = sorted(glob.glob(str(Path(path).expanduser())))
        if len(found) > 1:
            raise ValueError(f"{caller}: `teacher_ckpt` must fit one file, {path} fits {len(found)}. Name one.")
        path = found[0] if found else path
    if not is_address(path) and not Path(path).expanduser().is_file():
        raise ValueError(
            f"{caller}: `teacher_ckpt` must be a file, but there is none at {path} (seen from {Path.cwd()}). "
            f"Correct it, or train the teacher first: ikl train {origin or 'TEACHER_CONFIG'}"
        )
    own = module.state_dict()
    weights = {key: value for key, value in load_weights(path).items() if key in own or not key.startswith(_EXTRAS)}
    load_strictly(caller, module, weights, path, "the network in `teacher`")


def _conversion(student: EpochClassifier, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    theirs = getattr(module, "data_preprocessor", None)
    if theirs is None:
        return None
    return pixel_space(student.data_preprocessor).conversion_to(pixel_space(theirs))
