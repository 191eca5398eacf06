"""The checkpoints of a run: the best one as upstream's script saves it, and the last one, from which a run goes on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.common.module_util import check_if_wrapped, get_updatable_param_names

from .._files import written_aside
from .._limits import printable
from .._run_record import check_resumed
from ..checkpoints import check_dense, load_content
from ..models.weights import load_strictly
from .run_settings import RECORD, record_settings

__all__ = ["CALLER", "RunCheckpoints", "last_path", "load_checkpoint", "load_model", "save"]

CALLER = "ikl train"
_ANEW = "Start with --start_epoch 0."
# What a run goes on with, beside its weights.
_KINDS: dict[str, type | tuple[type, ...]] = {"epoch": int, "grad_count": int, "best_value": (int, float)}
_KINDS |= {"history": list, "gradients": list, "modules": dict, "optimizer": dict, "args": argparse.Namespace}

logger = logging.getLogger(__name__)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint of this driver or of upstream's script, without running what it holds.

    Args:
        path: the file.

    Returns:
        'model', 'optimizer', 'lr_scheduler', 'best_value' and 'args'; of other files whatever their mapping holds.

    Raises:
        ValueError: the file is missing or damaged, or holds more than tensors, plain values and an argparse.Namespace.
    """
    content = load_content(path)
    if not isinstance(content, dict):
        raise ValueError(f"{CALLER}: the checkpoint {path} must hold a mapping, got {type(content).__name__}.")
    return content


def last_path(path: Path | str) -> Path:
    """Where the last checkpoint lies beside the best one: `ikl.pt` -> `ikl_last.pt`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_last{path.suffix}")


def load_model(model: nn.Module, weights: Any, path: Path | str, key: str) -> None:
    """Loads the weights of a checkpoint, or refuses those that are not the network's."""
    way_out = "Correct the model's `key:` or `kwargs:`, or name another checkpoint."
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{CALLER}: the checkpoint {path} must hold weights for the model '{key}'. {way_out}")
    load_strictly(CALLER, model, weights, path, f"the model '{key}'", way_out)


class RunCheckpoints:
    """What a run saves, and what a resumed run must find again.

    Args:
        box: torchdistill's box of the run.
        model: the network that is trained, not wrapped.
        config: its block of the config: where the best checkpoint goes, and what the network is called.
        args: the options that a resumed run must share.

    Attributes:
        best_value: the highest validation accuracy, below 0 before the first.
        history: a row per finished epoch.
    """

    def __init__(self, box: Any, model: nn.Module, config: Mapping[str, Any], args: argparse.Namespace) -> None:
        self.box, self.model, self.key, self.args = box, model, config["key"], args
        self.best = Path(config["dst_ckpt"])
        self.last = last_path(self.best)
        self.best_value = -1.0
        self.history: list[dict[str, Any]] = []
        record_settings(box)

    def content(self) -> dict[str, Any]:
        """What upstream's script saves, under its names."""
        scheduler = self.box.lr_scheduler
        record_settings(self.box)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.box.optimizer.state_dict(),
            "best_value": self.best_value,
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "args": self.args,
        }

    def save_best(self) -> None:
        save(self.best, self.content())

    def save_last(self, epochs: int) -> None:
        """Saves what the rest of the training depends on, after ``epochs`` finished epochs."""
        others = {
            "epoch": epochs,
            "history": self.history,
            "modules": {name: module.state_dict() for name, module in self._other_modules().items()},
            # Gradients wait for their step where `grad_accum_step` does not divide the batches of an epoch.
            "grad_count": self.box.stage_grad_count,
            "gradients": [parameter.grad for parameter in self._parameters()],
        }
        save(self.last, {**self.content(), **others})

    def load_best(self) -> None:
        best = load_checkpoint(self.best)
        load_model(self.model, best.get("model", best), self.best, self.key)

    def resume(self, epoch: int, *, allow_changes: bool = False) -> None:
        """Goes back to where ``epoch`` epochs were finished.

        Args:
            epoch: their number.
            allow_changes: only warn of settings that the run was not started with.

        Raises:
            ValueError: there is no last checkpoint, or it is of another epoch, model or other settings.
        """
        content = self._last_content(epoch)
        box = self.box
        self._advance_stages(epoch)
        self._check_settings(content, allow_changes)
        load_model(self.model, content["model"], self.last, self.key)
        for name, module in self._other_modules().items():
            load_model(module, content["modules"].get(name), self.last, name)
        try:
            box.optimizer.load_state_dict(content["optimizer"])
            if box.lr_scheduler is not None:
                box.lr_scheduler.load_state_dict(content["lr_scheduler"])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{CALLER}: {self.last} must fit the config's optimizer and scheduler: {printable(error, 200)}. "
                f"Resume with the old one."
            ) from error
        record_settings(box)  # in place of the checkpoint's
        for state in box.optimizer.state.values():
            check_dense(CALLER, {str(name): value for name, value in state.items()}, self.last)
        parameters, gradients = self._parameters(), content["gradients"]
        check_dense(CALLER, {f"gradient {number}": gradient for number, gradient in enumerate(gradients)}, self.last)
        if len(gradients) != len(parameters) or any(
            gradient is not None and getattr(gradient, "shape", None) != parameter.shape
            for parameter, gradient in zip(parameters, gradients, strict=False)
        ):
            raise ValueError(f"{CALLER}: {self.last} must have gradients of the config's model. {_ANEW}")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        box.stage_grad_count = content["grad_count"]
        same = getattr(content["args"], "best_by", None) == self.args.best_by
        self.best_value = content["best_value"] if same else -1.0
        self.history = content["history"]

    def _last_content(self, epoch: int) -> dict[str, Any]:
        path = self.last
        if not path.is_file():
            raise ValueError(
                f"{CALLER}: --start_epoch {epoch} needs the last checkpoint, but there is none at {path}. "
                f"Start with --start_epoch 0."
            )
        content = load_checkpoint(path)
        own = (*self.content(), "epoch", "history", "modules", "grad_count", "gradients")
        missing = [key for key in own if key not in content]
        if missing:
            raise ValueError(
                f"{CALLER}: {path} must be a last checkpoint of this driver, but lacks {', '.join(missing)}. "
                f"Start with --start_epoch 0."
            )
        odd = [name for name, kind in _KINDS.items() if not isinstance(content[name], kind)]
        odd += ["history"] if not odd and not all(isinstance(row, Mapping) for row in content["history"]) else []
        if odd:
            kind = type(content[odd[0]]).__name__
            raise ValueError(f"{CALLER}: `{odd[0]}` of {path} must be what this driver saves, got a {kind}. {_ANEW}")
        if content["epoch"] != epoch:
            raise ValueError(
                f"{CALLER}: --start_epoch must be the number of finished epochs of {path}, got {epoch}. "
                f"Use --start_epoch {content['epoch']}."
            )
        return content

    def _check_settings(self, content: Mapping[str, Any], allowed: bool) -> None:
        args, names = content["args"], ("seed", "world_size", "best_by")
        try:
            record = dict(content["optimizer"]["param_groups"][0].get(RECORD, {}))
        except (AttributeError, IndexError, KeyError, TypeError):  # loading the optimizer will say what is wrong
            record = {}
        check_resumed(
            CALLER,
            self.last,
            {**record, **{name: getattr(args, name, None) for name in names}},
            {**record_settings(self.box), **{name: getattr(self.args, name) for name in names}},
            allowed=allowed,
            way_out="Take the old ones, or add --allow_changes.",
            logger=logger,
        )

    def _advance_stages(self, epoch: int) -> None:
        """Brings a box of several stages to the stage of ``epoch``; it would begin with the first."""
        box = self.box
        if not hasattr(box, "stage_number"):
            return
        for role in ("student", "teacher", "model"):
            if "dst_ckpt" in box.train_config.get(role, {}):
                raise ValueError(
                    f"{CALLER}: a run with `train: {role}: dst_ckpt:` cannot be resumed, as it would overwrite that. "
                    f"Start with --start_epoch 0."
                )
        while box.stage_end_epoch <= epoch < box.num_epochs:
            box.advance_to_next_stage()
        box.current_epoch = epoch

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.box.optimizer.param_groups for parameter in group["params"]]

    def _other_modules(self) -> dict[str, nn.Module]:
        """What is trained beside the model: adaptation modules of a redesigned student, or a teacher."""
        found = {}
        for name in ("student_model", "teacher_model", "model"):
            module = getattr(self.box, name, None)
            if module is not None and check_if_wrapped(module):
                module = module.module
            if module is not None and module is not self.model and get_updatable_param_names(module):
                found[name] = module
        return found


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes aside and renames: an interruption or a full disk leaves the old file as it was."""
    with written_aside(path) as aside, aside.open("wb") as file:
        torch.save(content, file)
