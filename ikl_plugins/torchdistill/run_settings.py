"""What a run of torchdistill is started with, in the optimizer's state, which upstream's script saves and loads."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torchdistill.core.distillation import DistillationBox

from .._run_record import settings_of
from ..models.weights import network_sha256
from .adversarial import AdversarialForward
from .losses import find_losses

__all__ = ["RECORD", "record_settings"]

RECORD = "ikl_settings"  # the key in the optimizer's first parameter group, and the box's attribute


def record_settings(box: Any) -> dict[str, Any]:
    """Puts the settings of the running stage into the optimizer's state, and gives them back.

    They are taken in the first call of a stage and stay while it lasts. Call it before a checkpoint is loaded: that
    brings a schedule and a record of its own.
    """
    stage = getattr(box, "stage_number", 1)
    record: dict[str, Any] = vars(box).get(RECORD, {})
    if record.get("stage") != stage:
        record = vars(box)[RECORD] = {"stage": stage, **_settings(box)}
    box.optimizer.param_groups[0][RECORD] = record
    return record


def _settings(box: Any) -> dict[str, Any]:
    with_teacher = isinstance(box, DistillationBox)
    forward = box.student_forward_proc if with_teacher else box.model_forward_proc
    loader, terms = box.train_data_loader, getattr(box.criterion, "term_dict", {})
    losses = {term: {"weight": weight, **settings_of(loss)} for term, (loss, weight) in terms.items()}
    for term, loss in find_losses(box.criterion).items():
        losses[term] = {**losses.get(term, {}), **settings_of(loss.core), **settings_of(loss)}
    frozen = with_teacher and not box.teacher_updatable
    return {
        "losses": losses,
        "attack": {**settings_of(forward.attack), **forward.view()}
        if isinstance(forward, AdversarialForward)
        else None,
        "teacher": {"weights": network_sha256(box.teacher_model)} if frozen else None,
        "batch_size": getattr(loader, "batch_size", None),  # a config may have forgotten its loader
        "world_size": dist.get_world_size() if box.distributed else 1,
        "train_images": len(loader.dataset) if hasattr(getattr(loader, "dataset", None), "__len__") else None,
        "grad_accum_step": box.grad_accum_step,
        "max_grad_norm": box.max_grad_norm,
        "optimizer": settings_of(box.optimizer),
        "schedule": None if box.lr_scheduler is None else settings_of(box.lr_scheduler),
        "epochs": box.num_epochs,
    }
