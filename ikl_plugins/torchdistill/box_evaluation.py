"""Robust accuracy in torchdistill: a post-epoch process that attacks validation images and keeps the best checkpoint.

    train:
      pre_epoch_process: 'ikl_pre_epoch_process'
      post_epoch_process: !import_call
        key: 'ikl_plugins.torchdistill.robust_evaluation'
        init:
          kwargs:
            eps: '8/255'
            interval: 5
            dst_ckpt: 'ikl_best_robust.pt'
            mean: *mean
            std: *std

torchdistill looks processes up by a string, so ``robust_evaluation`` registers one for its settings and gives back its
key. Upstream's script and `ikl train` run it alike; `ikl train --best_by robust` also keeps its own best checkpoint by
it. The attack is that of :mod:`ikl_plugins.adversarial.robust_evaluation`.
"""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchdistill.common.module_util import check_if_fsdp_wrapped, check_if_wrapped
from torchdistill.core.distillation import DistillationBox
from torchdistill.core.interfaces.post_epoch_proc import (
    default_post_epoch_process_with_teacher,
    default_post_epoch_process_without_teacher,
)
from torchdistill.core.interfaces.registry import POST_EPOCH_PROC_FUNC_DICT, register_post_epoch_proc_func

from .. import _validation as check
from .._random_states import kept_random_states
from ..adversarial import PixelSpace
from ..adversarial.robust_evaluation import RobustEvaluation
from .adversarial import GREY_LEVEL, WAY_OUT
from .losses import PROCESS_LINE
from .run_checkpoints import load_checkpoint, save

__all__ = ["BoxEvaluation", "evaluation_of", "robust_evaluation"]

_logger = logging.getLogger(__name__)
_CALLER = "robust_evaluation"
_STATE = "ikl_robust_evaluation"  # the box's attribute


def robust_evaluation(
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dst_ckpt: str | None = None,
    **settings: Any,
) -> str:
    """Registers a post-epoch process that evaluates under APGD-CE, for ``!import_call`` in a YAML file.

    It then calls torchdistill's default process. A training is the same with it and without it.

    Args:
        mean: what the data set's ``Normalize`` subtracts, one number per channel, of pixels in [0, 1]. None, together
            with ``std``, if the images are pixels.
        std: what it divides by.
        dst_ckpt: where the checkpoint with the highest robust accuracy goes, in the form of upstream's; None for none.
            A run that goes on from a later epoch than the first replaces only a worse one.
        **settings: keywords of :class:`ikl_plugins.adversarial.robust_evaluation.RobustEvaluation`, see there: ``eps``,
            ``norm``, ``n_examples``, ``interval``, ``n_restarts``, ``batch_size``, ``seed``.

    Returns:
        The key of the process, made of the settings.

    Raises:
        TypeError: an unknown keyword (the message names the nearest known one), or a value of the wrong type.
        ValueError: a value out of range.
        ImportError: no AutoAttack is installed.
    """
    known = [name for name in inspect.signature(RobustEvaluation).parameters if name != "caller"]
    for keyword in settings:
        if keyword not in known:
            raise TypeError(
                check.unknown_name_message(_CALLER, "keyword", keyword, [*known, "mean", "std", "dst_ckpt"])
            )
    if "eps" not in settings:
        raise TypeError(f"{_CALLER}: `eps` must be given. Pass a number or '8/255'.")
    space = PixelSpace(mean, std, tolerance=GREY_LEVEL, caller=_CALLER, way_out=WAY_OUT)
    evaluation = BoxEvaluation(RobustEvaluation(**settings, caller=_CALLER), space, dst_ckpt)

    def process(box: Any, metrics: Any = None, **kwargs: Any) -> None:
        evaluation.accuracy(box)
        with_teacher = isinstance(box, DistillationBox)
        default = (
            default_post_epoch_process_with_teacher if with_teacher else default_post_epoch_process_without_teacher
        )
        default(box, metrics=metrics, **kwargs)

    process.evaluation = evaluation  # type: ignore[attr-defined]
    shown = {**settings, "mean": mean, "std": std, "dst_ckpt": dst_ckpt}
    words = ", ".join(f"{name}={shown[name]!r}" for name in sorted(shown) if shown[name] is not None)
    key = f"ikl_plugins.{_CALLER}({words})"
    if key not in POST_EPOCH_PROC_FUNC_DICT:
        register_post_epoch_proc_func(key=key)(process)
    return key


def evaluation_of(box: Any) -> BoxEvaluation | None:
    """What the box's post-epoch process evaluates with, if it is one of ours."""
    processes: list[Any] = [vars(kind).get("post_epoch_process") for kind in type(box).__mro__]  # set on the class
    return next((process.evaluation for process in processes if hasattr(process, "evaluation")), None)


@dataclass
class _State:
    """What a box's evaluations leave for the next ones."""

    first_epoch: int
    epoch: int = -1
    accuracy: float | None = None
    best: float | None = None
    dataset: Any = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))


class BoxEvaluation:
    """Evaluates the student of a box, at most once an epoch.

    Args:
        evaluation: the attack.
        space: from the data set's images to pixels and back.
        dst_ckpt: where the best checkpoint goes.
    """

    def __init__(self, evaluation: RobustEvaluation, space: PixelSpace, dst_ckpt: str | None) -> None:
        self.evaluation = evaluation
        self.space = space
        self.dst_ckpt = None if dst_ckpt is None else Path(dst_ckpt)

    def accuracy(self, box: Any) -> float | None:
        """The robust accuracy in percent behind the running epoch; None in an epoch without evaluation.

        On rank 0 the log is told, and the best checkpoint is saved.

        Raises:
            ValueError: the epoch is not known; a sharded model; images that are no pixels, or without one label each; a
                model that returns no logits.
        """
        epoch: int | None = getattr(box, "ikl_epoch", None)
        if epoch is None:
            raise ValueError(
                f"{_CALLER}: it must know where epochs begin. Add to `train:` of the config, or to each "
                f"stage:\n  {PROCESS_LINE}"
            )
        state: _State = box.__dict__.setdefault(_STATE, _State(epoch))
        if state.epoch == epoch:
            return state.accuracy
        state.epoch, state.accuracy = epoch, None
        if not self.evaluation.due(epoch + 1, box.num_epochs):
            return None
        network = _network(box)
        self._read(box, state)

        def logits(pixels: Tensor) -> Tensor:
            found = network(self.space.to_inputs(pixels))
            if not isinstance(found, Tensor):
                raise ValueError(
                    f"{_CALLER}: the model must return the tensor of logits, got a {type(found).__name__}. "
                    f"Use another network."
                )
            return found.float()

        found = self.evaluation.accuracies(network, logits, state.images.to(box.device), state.labels.to(box.device))
        state.accuracy = found.robust
        if not box.distributed or dist.get_rank() == 0:
            _logger.info(
                "robust accuracy, epoch %d: %.2f %% under APGD-CE (%s), natural %.2f %%, of %d validation images",
                epoch + 1,
                found.robust,
                self.evaluation.text,
                found.natural,
                len(state.labels),
            )
            self._keep_best(box, network, state)
        return state.accuracy

    def _keep_best(self, box: Any, network: nn.Module, state: _State) -> None:
        if self.dst_ckpt is None or state.accuracy is None:
            return
        if state.best is None:
            resumed = state.first_epoch > 0 and self.dst_ckpt.is_file()
            state.best = load_checkpoint(self.dst_ckpt)["best_value"] if resumed else -1.0
        if state.accuracy <= state.best:
            return
        state.best = state.accuracy
        scheduler = box.lr_scheduler
        content = {  # as upstream's script saves it
            "model": network.state_dict(),
            "optimizer": box.optimizer.state_dict(),
            "best_value": state.best,
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "args": argparse.Namespace(epoch=state.epoch),
        }
        save(self.dst_ckpt, content)
        _logger.info("best robust accuracy: checkpoint saved to %s", self.dst_ckpt)

    def _read(self, box: Any, state: _State) -> None:
        """Pixels and labels of the validation set, on the CPU, once for each set."""
        dataset = box.val_data_loader.dataset
        if state.dataset is dataset:
            return
        known = getattr(dataset, "targets", None)
        chosen = self.evaluation.chosen(None if known is None else list(map(int, known)), len(dataset))
        with kept_random_states():
            inputs, labels = default_collate([dataset[index][:2] for index in chosen])
        state.images, state.labels = self.space.to_pixels(inputs.float()), labels
        state.dataset = dataset


def _network(box: Any) -> nn.Module:
    """The network that is trained, as the scripts validate and save it."""
    with_teacher = isinstance(box, DistillationBox)
    running = box.student_model if with_teacher else box.model
    if check_if_fsdp_wrapped(running):
        raise ValueError(
            f"{_CALLER}: the model must be whole in each process, got {type(running).__name__}. "
            f"Set `wrapper: 'DistributedDataParallel'`."
        )
    network: nn.Module = box.org_student_model if with_teacher else box.org_model
    return network.get_submodule("module") if check_if_wrapped(network) else network
