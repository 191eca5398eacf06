"""Whether a teacher classifies the inputs that its student gives it, looked at before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import mmengine.dist
import torch
from mmengine.dataset import Compose
from mmengine.logging import MMLogger
from torch import Tensor

from .._accuracy import LEAST_IMAGES, at_chance, worse
from .._random_states import kept_random_states
from ..mmengine.dry_run import batches

__all__ = ["check_teacher"]

_WAY_OUT = "Check `teacher_ckpt`, the order of its classes, and give `teacher_input=dict(size=..., mean=..., std=...)`."


def check_teacher(model: Any, runner: Any) -> None:
    """Logs the teacher's accuracy on validation images, beside that which its own config's test pipeline gives.

    Args:
        model: a DistillationClassifier. No random number generator moves.
        runner: MMEngine's runner.
    """
    logger, name = MMLogger.get_current_instance(), type(model).__name__
    if runner.val_loop is None:
        logger.warning("%s: the teacher is not tested, because the config has no `val_dataloader`.", name)
        return
    loader = runner.val_loop.dataloader
    with kept_random_states():
        right, classes = _answers(model.teacher, _batches(loader, model), model.data_preprocessor, model.teacher)
        own, reason = _own_answers(model, loader)
    # Of each image whether it is right, whether its own pipeline makes it right, and how many images there are.
    both = 0 if own is None else int((right & own).sum())
    counts = torch.tensor([len(right), int(right.sum()), 0 if own is None else int(own.sum()), both, int(own is None)])
    mmengine.dist.all_reduce(counts)
    total, hits, own_hits, both, untold = counts.tolist()
    if total == 0:
        logger.warning("%s: the teacher is not tested: the validation data has no batches or no labels.", name)
        return
    accuracy, own_accuracy = 100.0 * hits / total, 100.0 * own_hits / total
    by_own = (
        f"not known by its own test pipeline: {reason}" if untold else f"{own_accuracy:.2f} % by its own test pipeline"
    )
    logger.info(
        "%s: the teacher's top-1 accuracy on %d validation images is %.2f %%; %s.", name, total, accuracy, by_own
    )
    if at_chance(hits, total, classes):
        what = f"is not better than chance ({accuracy:.2f} % of {classes} classes; {by_own})"
    elif not untold and worse(hits - both, own_hits - both):
        what = f"has {accuracy:.2f} % on the student's inputs, but {by_own}"
    else:
        return
    logger.warning("%s: the teacher %s. %s", name, what, _WAY_OUT)


def _indices(loader: Any, model: Any) -> list[int] | None:
    """Images spread over the validation set, of this rank; None if it has no order. Folders are sorted by class."""
    size = getattr(loader, "batch_size", None)
    if getattr(loader, "batch_sampler", None) is None or size is None:
        return None
    length = len(loader.dataset)
    count = min(length, max(LEAST_IMAGES, model.teacher_val_batches * size * mmengine.dist.get_world_size()))
    spread = [index * length // count for index in range(count)] if count else []
    return spread[mmengine.dist.get_rank() :: mmengine.dist.get_world_size()]


def _batches(loader: Any, model: Any) -> Iterator[Any]:
    indices = _indices(loader, model)
    if indices is None:
        yield from islice(batches(loader), model.teacher_val_batches)
        return
    for start in range(0, len(indices), loader.batch_size):
        yield loader.collate_fn([loader.dataset[index] for index in indices[start : start + loader.batch_size]])


@torch.no_grad()
def _answers(
    teacher: Any, data: Iterator[Any], preprocessor: Any, logits_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, int]:
    """Whether the answer to each image is right, and the number of classes; empty without labels."""
    found, classes = [], 1
    for batch in data:
        prepared = preprocessor(batch, False)
        samples = prepared["data_samples"]
        if not samples or any("gt_label" not in sample for sample in samples):
            return torch.zeros(0, dtype=torch.bool), 1
        logits = logits_of(prepared["inputs"])
        classes = logits.shape[1]
        found += [guess in sample.gt_label for guess, sample in zip(logits.argmax(1).tolist(), samples, strict=True)]
    return torch.tensor(found, dtype=torch.bool), classes


def _own_answers(model: Any, loader: Any) -> tuple[Tensor | None, str]:
    """The same of the teacher's own test pipeline and data preprocessor; None, and why they cannot be had."""
    teacher, indices = model.teacher, _indices(loader, model)
    if teacher.pipeline is None:
        return None, "`teacher` is no config file with a test pipeline"
    if indices is None or not hasattr(loader.dataset, "get_data_info"):
        return None, f"{type(loader.dataset).__name__} gives no images without its own pipeline"
    try:
        preprocessor = teacher.module.data_preprocessor  # not of a bare network
        preprocessor.to(next(teacher.module.parameters()).device)
        pipeline = Compose(list(teacher.pipeline))
        samples = (pipeline(loader.dataset.get_data_info(index)) for index in indices)
        data = ({key: [value] for key, value in sample.items()} for sample in samples)
        return _answers(teacher, data, preprocessor, teacher.logits_of)[0], ""
    except Exception as error:  # of transforms and networks of any kind
        return None, f"it cannot read these data: {type(error).__name__}: {error}"
