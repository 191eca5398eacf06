"""Teachers in torchdistill: inputs of their own, weights that somebody has trained, and their accuracy before a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset
from torchdistill.datasets.util import build_data_loader
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from .. import _validation as check
from .._accuracy import LEAST_IMAGES, at_chance
from ..adversarial import PixelSpace
from ..models.weights import drawn_parameters
from .run_checkpoints import CALLER

__all__ = ["TeacherInput", "check_teacher", "refuse_untrained"]

_WAY_OUT = "Check its `src_ckpt:` and the order of its classes, and give its size, mean and std: key 'TeacherInput'."

logger = logging.getLogger(__name__)


class TeacherInput(AuxiliaryModelWrapper):  # type: ignore[misc]  # the base class has no types
    """Gives a teacher the student's images in the size and the normalisation that it was trained with.

    It stands as ``auxiliary_model_wrapper:`` in ``train: teacher:``. The logits are at the path '.' as before; paths of
    the teacher's modules begin with ``teacher_model.``.

    Args:
        teacher_model: the network, which torchdistill hands over.
        size: the teacher's, a number or height and width; None for the student's.
        mean: of the teacher's normalisation of pixels in [0, 1], one number for each channel; None for none.
        std: likewise.
        student_mean: of the normalisation in the transform of the data set; None for none.
        student_std: likewise.
        **_: what else torchdistill hands over.

    Raises:
        TypeError: numbers that are none.
        ValueError: a number out of range, or a mean without its std.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        student_mean: Sequence[float] | None = None,
        student_std: Sequence[float] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        caller = "TeacherInput"
        self.teacher_model = teacher_model
        sides = [size, size] if isinstance(size, int) else size
        if sides is not None and (not isinstance(sides, (list, tuple)) or len(sides) != 2):
            raise ValueError(f"{caller}: `size` must be a number or two, got {size!r}. Write size: 224.")
        self.size = None if sides is None else [check.check_integer(caller, "size", side) for side in sides]
        student = PixelSpace(student_mean, student_std, caller=caller)
        self.convert = student.conversion_to(PixelSpace(mean, std, caller=caller))

    def forward(self, images: Tensor) -> Any:
        """What the teacher gives for the student's inputs, shape (N, C, H, W)."""
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return self.teacher_model(images if self.convert is None else self.convert(images))


def refuse_untrained(
    teacher: nn.Module, block: dict[str, Any], train: dict[str, Any], build: Callable[[], nn.Module]
) -> None:
    """Refuses a frozen teacher, or a part of one, that nobody has trained.

    Args:
        teacher: the network.
        block: its block under `models:`.
        train: the block of the training, with its stages.
        build: makes the network once more.

    Raises:
        ValueError: there is no `src_ckpt:`, and building it twice gives two different networks.
    """
    stages = [train, *(stage for key, stage in train.items() if key.startswith("stage"))]
    roles = [stage["teacher"] for stage in stages if isinstance(stage.get("teacher"), dict)]
    frozen = bool(roles) and not any(role.get("requires_grad", True) for role in roles)
    if not frozen or any(role.get("src_ckpt") for role in [block, *roles]):
        return
    drawn = drawn_parameters(teacher, build)
    if drawn:
        raise ValueError(
            f"{CALLER}: the teacher must be trained, but {check.first_names(drawn)} are as they were drawn. "
            f"Give it `src_ckpt:`, or pretrained weights of its own classes."
        )


def check_teacher(box: Any, loader: dict[str, Any], datasets: dict[str, Any]) -> None:
    """Logs the teacher's accuracy on a batch of validation images, spread over the set: folders are sorted by class.

    It is asked as in training, by the `forward_proc:` of the config.

    Args:
        box: torchdistill's box. The mode of its modules stays.
        loader: the block of the validation loader.
        datasets: those of the config.
    """
    teacher = getattr(box, "teacher_model", None)
    if teacher is None or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        return
    dataset = datasets[loader["dataset_id"]]
    length = len(dataset)
    count = min(length, max(LEAST_IMAGES, loader["kwargs"].get("batch_size") or 1))
    spread = Subset(dataset, [index * length // count for index in range(count)])
    modes = [(module, module.training) for module in teacher.modules()]
    right = total = classes = 0
    try:
        teacher.eval()
        for images, targets in build_data_loader(spread, loader, distributed=False):
            with torch.no_grad():
                logits = box.teacher_forward_proc(teacher, images.to(box.device), targets.to(box.device), {})
            if not isinstance(logits, Tensor) or logits.dim() != 2 or targets.dim() != 1:
                logger.info("the teacher is not tested: it gives no logits of shape (N, C) for images of one class")
                return
            right += int((logits.argmax(1) == targets.to(logits.device)).sum())
            total, classes = total + len(targets), logits.shape[1]
    finally:
        for module, training in modes:
            module.training = training
    accuracy = 100.0 * right / max(1, total)
    logger.info(
        "the teacher's accuracy on %d validation images is %.2f; by its own test pipeline not known, as torchdistill's "
        "files have none",
        total,
        accuracy,
    )
    if at_chance(right, total, classes):
        logger.warning("the teacher is not better than chance (%.2f %% of %d classes). %s", accuracy, classes, _WAY_OUT)
