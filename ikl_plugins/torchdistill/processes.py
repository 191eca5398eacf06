"""The pre-epoch process: one line of a torchdistill config that closes what torchdistill leaves open.

    train:
      pre_epoch_process: 'ikl_pre_epoch_process'

torchdistill never puts a frozen teacher in eval mode, tells neither a loss nor an attack where an epoch begins, keeps
no state of a loss in a checkpoint, and wraps a student in DistributedDataParallel only where the config says so and
only on CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchdistill.common.module_util import check_if_wrapped, get_updatable_param_names
from torchdistill.core.distillation import DistillationBox
from torchdistill.core.interfaces.pre_epoch_proc import (
    default_pre_epoch_process_with_teacher,
    default_pre_epoch_process_without_teacher,
)
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from .._run_record import check_resumed
from ..class_prior import ClassPrior
from .adversarial import AdversarialForward, TeacherForward
from .losses import MidLevelLoss, find_losses
from .run_settings import RECORD, record_settings
from .teacher_cache import CachedForward, FixedViews

__all__ = ["ALLOWING", "ikl_pre_epoch_process", "process_allowing_changes"]

_logger = logging.getLogger(__name__)
_CALLER = "ikl_pre_epoch_process"
ALLOWING = "ikl_pre_epoch_process(allow_changes=True)"
_RECORD = "ikl_plugins"  # the key in the optimizer's first parameter group


def ikl_pre_epoch_process(box: Any, epoch: int | None = None, *, allow_changes: bool = False, **kwargs: Any) -> None:
    """torchdistill's default pre-epoch process, and then what a teacher, a class prior and several ranks need.

    - A frozen teacher is put in eval mode, so that its BatchNorm statistics stay as they are.
    - Each of this package's losses in the criterion is told the epoch and its number of batches, and moved to the
      device.
    - A data set whose augmentations recur is told the epoch, and a teacher whose logits are kept its data set.
    - A forward process of adversarial training is told the epoch, the number of epochs and the class prior; in an
      adversarial distillation also the teacher, whose own forward process is kept inside another.
    - Class priors join the optimizer's state, in ``param_groups[0]['ikl_plugins']``: whatever saves and loads the
      optimizer, upstream's script with ``--start_epoch`` for one, carries them along.
    - So do the settings of the run. One that goes on with others is refused, field by field.
    - In distributed training a student that nobody has wrapped is wrapped in DistributedDataParallel.

    Args:
        box: torchdistill's distillation or training box, of one or several stages.
        epoch: number of the epoch, 0 for the first.
        allow_changes: only warn of other settings, as the key ``'ikl_pre_epoch_process(allow_changes=True)'`` does.
        **kwargs: passed on to the default process.

    Raises:
        ValueError: ``epoch`` is missing; a checkpoint's class prior or settings do not fit; a teacher is to be trained
            on several ranks without a wrapper, or along with a student that is attacked through it.
    """
    if isinstance(epoch, bool) or not isinstance(epoch, int):
        raise ValueError(f"{_CALLER}: `epoch` must be the number of the epoch, from 0, got {epoch!r}.")
    started_with = box.optimizer.param_groups[0].get(RECORD)
    goes_on = epoch > 0 and RECORD not in vars(box)
    settings = record_settings(box)
    if goes_on:
        way_out = f"Take the old ones, or set pre_epoch_process: '{ALLOWING}'."
        check_resumed(
            _CALLER, "the checkpoint", started_with, settings, allowed=allow_changes, way_out=way_out, logger=_logger
        )
    box.ikl_epoch = epoch  # for the post-epoch process, which torchdistill does not tell
    stage, first_epoch, epochs = _stage_of(box)
    epoch_of_stage = max(1, epoch - first_epoch + 1)
    with_teacher = isinstance(box, DistillationBox)
    if box.distributed:
        _replicate(box, "student_model" if with_teacher else "model")

    if with_teacher:
        default_pre_epoch_process_with_teacher(box, epoch=epoch, **kwargs)
        _settle_teacher(box, first=epoch_of_stage == 1)
        process = box.teacher_forward_proc
        process = process.process if isinstance(process, TeacherForward) else process
        box.teacher_forward_proc = process.for_box(box) if isinstance(process, CachedForward) else process
    else:
        default_pre_epoch_process_without_teacher(box, epoch=epoch, **kwargs)
    data = getattr(box.train_data_loader, "dataset", None)
    if isinstance(data, FixedViews):
        data.epoch.fill_(epoch)
    losses = find_losses(box.criterion)
    for term, loss in losses.items():
        loss.to(box.device)
        loss.term = term
    process = "student_forward_proc" if with_teacher else "model_forward_proc"
    forward = getattr(box, process)
    if isinstance(forward, AdversarialForward):
        teacher = _teacher_of(box, losses, forward) if with_teacher else None
        setattr(box, process, forward.in_epoch(epoch_of_stage, epochs, _prior_of(losses, forward), teacher))
    _keep_priors(box.optimizer, losses, stage, epoch_of_stage)
    for loss in losses.values():
        loss.begin_epoch(epoch_of_stage, _batches(box.train_data_loader))


def process_allowing_changes(box: Any, epoch: int | None = None, **kwargs: Any) -> None:
    """:func:`ikl_pre_epoch_process` that only warns of what a run was not started with."""
    ikl_pre_epoch_process(box, epoch, allow_changes=True, **kwargs)


def _prior_of(losses: dict[str, MidLevelLoss], forward: AdversarialForward) -> ClassPrior | None:
    """The class prior that weighs the attack as it weighs the loss."""
    priors = {term: loss.class_prior for term, loss in losses.items() if loss.class_prior is not None}
    if len(priors) > 1 and forward.attack.uses_prior:
        raise ValueError(
            f"{_CALLER}: the attack's objective '{forward.attack.objective}' must have one class prior, got those of "
            f"{', '.join(priors)}. Set global_info: False in all but one."
        )
    return next(iter(priors.values()), None)


def _teacher_of(box: Any, losses: dict[str, MidLevelLoss], forward: AdversarialForward) -> TeacherForward | None:
    """The teacher's forward process, made one that the attack can ask."""
    if forward.teacher_view is None:
        return None
    attacked = forward.teacher_view == "adversarial"
    if attacked and box.teacher_updatable:
        raise ValueError(
            f"{_CALLER}: a teacher of adversarial images must be frozen. "
            f"Add to `train:` of the config:\n  teacher:\n    requires_grad: False"
        )
    alone = losses.keys() == getattr(box.criterion, "term_dict", {}).keys()
    natural = not (attacked and alone and not any(loss.teacher_natural_weight for loss in losses.values()))
    taught = box.teacher_forward_proc = TeacherForward(box.teacher_forward_proc, natural=natural)
    return taught


def _stage_of(box: Any) -> tuple[int, int, int]:
    """Number of the running stage, of its first epoch, and how many epochs it has."""
    stage = getattr(box, "stage_number", None)
    if stage is None:
        return 1, 0, box.num_epochs
    epochs = box.train_config[f"stage{stage}"]["num_epochs"]
    return stage, box.stage_end_epoch - epochs, epochs


def _batches(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # an iterable data set without a length
        return None


def _settle_teacher(box: Any, *, first: bool) -> None:
    if not box.teacher_updatable:
        box.teacher_model.eval()
        return
    if first:
        _logger.warning(
            "%s: the teacher is trained along, so it is not put in eval mode. If it should be frozen, add to `train:` "
            "of the config:\n  teacher:\n    requires_grad: False",
            _CALLER,
        )
    trained = len(get_updatable_param_names(box.teacher_model)) > 0
    if box.distributed and trained and not _keeps_step(box.teacher_model):
        raise ValueError(
            f"{_CALLER}: a teacher that is trained on several ranks must be wrapped. "
            f"Add to `train:` of the config:\n  teacher:\n    requires_grad: False\n"
            f"or, on CUDA:\n  teacher:\n    wrapper: 'DistributedDataParallel'"
        )


# --- the class priors in the optimizer's state -----------------------------------------------------------------------


def _keep_priors(optimizer: Any, losses: dict[str, MidLevelLoss], stage: int, epoch_of_stage: int) -> None:
    """Makes the optimizer hold the live class priors, after taking over those that a checkpoint has left there."""
    group = optimizer.param_groups[0]
    saved = group.get(_RECORD, {})
    if not isinstance(saved, Mapping) or not all(isinstance(record, Mapping) for record in saved.values()):
        raise ValueError(f"{_CALLER}: the checkpoint's `{_RECORD}` must map terms to class priors. Load another.")
    records = {}
    for term, loss in losses.items():
        if loss.class_prior is None:
            continue
        record = saved.get(term)
        records[term] = loss.prior_record(stage)
        if record is not None and record.get("stage") == stage:
            loss.restore_prior(record, term)  # in a run that goes on, the record is the prior itself
        elif epoch_of_stage > 1:
            held = [name for name, other in saved.items() if other.get("stage") == stage]
            _logger.warning(
                "%s: training goes on at epoch %d, but the checkpoint holds no class prior of term '%s' (of terms: "
                "%s). It starts uniform.",
                _CALLER,
                epoch_of_stage,
                term,
                ", ".join(held) or "none",
            )
    if records:
        group[_RECORD] = records
    else:
        group.pop(_RECORD, None)


# --- several ranks ---------------------------------------------------------------------------------------------------


def _keeps_step(model: nn.Module) -> bool:
    """Whether somebody else averages the gradients; auxiliary wrappers wrap their parts themselves."""
    return check_if_wrapped(model) or isinstance(model, AuxiliaryModelWrapper)


def _replicate(box: Any, attribute: str) -> None:
    """Wraps the trained model unless somebody has. Each stage begins with the bare model and gets its own wrapper."""
    model = getattr(box, attribute)
    if _keeps_step(model) or not get_updatable_param_names(model):
        return
    some_frozen = box.student_any_frozen if attribute == "student_model" else box.model_any_frozen
    wrapped = DistributedDataParallel(
        model,
        device_ids=box.device_ids if box.device.type == "cuda" else None,
        find_unused_parameters=bool(some_frozen),
    )
    setattr(box, attribute, wrapped)
