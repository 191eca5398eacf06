"""Teacher logits kept on disk, as torchdistill itself did up to 1.1.4, and for augmented images too.

A data set wrapper lets each image recur in a few fixed augmentations; a forward process of the teacher reads the logits
of those that it has seen, and runs the teacher for the others.
"""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT, register_forward_proc_func
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from .._logit_records import LogitRecords, check_settings, digest, image_mark, seeded
from ..models.weights import network_sha256
from .losses import PROCESS_LINE, shown_output

__all__ = ["CachedForward", "FixedViews", "cached_forward"]

_CALLER = "cached_forward"
ROW = "ikl_plugins.teacher_row"
_WRAPPER_LINES = "dataset_wrapper:\n      key: 'ikl_plugins.FixedViews'\n      kwargs:\n        views: 8"

_logger = logging.getLogger(__name__)


class FixedViews(BaseDatasetWrapper):  # type: ignore[misc]  # the base class has no types
    """Images of which each has a few augmentations, one for an epoch: ``dataset_wrapper:`` of ``train_data_loader:``.

    The random numbers of Python, NumPy and torch that make an image follow from the seed, the view and its index, with
    any number of workers and ranks. ``ikl_pre_epoch_process`` tells the epoch.

    Args:
        org_dataset: the data set, which torchdistill hands over.
        views: number of augmentations; epoch e shows number e mod views.
        seed: of the augmentations.

    Raises:
        TypeError: no integers.
        ValueError: ``views`` below 1, or a negative seed.
    """

    def __init__(self, org_dataset: Any, views: int, seed: int = 0) -> None:
        super().__init__(org_dataset)
        check_settings("FixedViews", views, seed, "float32")
        self.views = views
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that stay see it change

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        """Image, target, and the number of the image's record with its checksum."""
        view = int(self.epoch) % self.views
        with seeded(self.seed, view, index):
            image, target, more = super().__getitem__(index)
        row = torch.tensor([view * len(self) + index, image_mark("FixedViews", image)])
        return image, target, {**more, ROW: row}

    def fields(self) -> dict[str, str]:
        """What its images depend on."""
        data = self.org_dataset
        shown = (repr(getattr(data, name, None)) for name in ("samples", "transform"))
        named = [re.sub(r" at 0x[0-9a-f]+", "", one).encode() for one in shown]
        kind = f"{type(data).__name__}, {len(self)} in {self.views} views, seed {self.seed}"
        return {"data": digest(named), "images": kind}


def cached_forward(folder: str, dtype: str = "float32") -> str:
    """A forward process for ``train: teacher: forward_proc:`` that keeps the teacher's logits on disk.

    It takes ``dataset_wrapper: {key: 'ikl_plugins.FixedViews'}`` in ``train_data_loader:``, ``ikl_pre_epoch_process``
    and a frozen teacher without forward hooks.

    Args:
        folder: where the logits are kept; each teacher, pipeline and data set has a folder of its own in it.
        dtype: ``'float32'``, or ``'float16'`` for half the file and rounded logits.

    Returns:
        The key under which the process is registered.

    Raises:
        ValueError: another ``dtype``.

    Example:
        >>> from ikl_plugins.torchdistill.teacher_cache import cached_forward
        >>> cached_forward("runs/teacher_logits")
        "ikl_plugins.cached_forward(dtype='float32', folder='runs/teacher_logits')"
    """
    check_settings(_CALLER, 1, 0, dtype)
    key = f"ikl_plugins.{_CALLER}(dtype={dtype!r}, folder={folder!r})"
    if not isinstance(FORWARD_PROC_FUNC_DICT.get(key), CachedForward):
        register_forward_proc_func(key=key)(CachedForward(folder, dtype))
    return key


class CachedForward:
    """See :func:`cached_forward`."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.folder = folder
        self.dtype = dtype
        self.data: FixedViews | None = None
        self._records: LogitRecords | None = None

    def for_box(self, box: Any) -> CachedForward:
        """The forward process of a box: its own, as boxes of the same settings share the registered one.

        Raises:
            ValueError: the box has no ``FixedViews``, a teacher that is trained, or forward hooks of the teacher.
        """
        data = getattr(box.train_data_loader, "dataset", None)
        if not isinstance(data, FixedViews):
            raise ValueError(
                f"{_CALLER}: the images must recur, got {type(data).__name__}. "
                f"Add to `train_data_loader:`:\n    {_WRAPPER_LINES}"
            )
        if box.teacher_updatable or box.target_teacher_pairs:
            what = "one that is trained" if box.teacher_updatable else "forward hooks"
            raise ValueError(f"{_CALLER}: the teacher must be frozen and give logits alone, got {what}. Drop that.")
        if self.data is data:
            return self
        own = copy.copy(self)
        own.data, own._records = data, None
        return own

    def __call__(
        self, model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None, **kwargs: Any
    ) -> Any:
        """The teacher's logits (N, classes) of a batch; images without a record are the teacher's own.

        Raises:
            OSError: the file cannot be made, read or written.
            ValueError: no epoch has begun; images that a collate function has changed; a teacher that gives no logits;
                float16 cannot hold them.
        """
        found = (supp_dict or {}).get(ROW)
        if found is None:
            return model(sample_batch)
        if self.data is None:
            raise ValueError(
                f"{_CALLER}: it must know where epochs begin. Add to `train:` of the config:\n  {PROCESS_LINE}"
            )
        numbers, marks = found.T.tolist()
        if image_mark(_CALLER, sample_batch[0]) != marks[0]:  # one for all, as a collator changes the whole batch
            raise ValueError(
                f"{_CALLER}: the batch must hold the images of the data set, got others. "
                f"Drop what mixes or changes them behind it, such as `collate_fn`."
            )
        kept = None if self._records is None else self._records.read(numbers, marks)
        if kept is None:
            logits = model(sample_batch)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise ValueError(
                    f"{_CALLER}: the teacher must give logits (N, C), got {shown_output(logits)}. Use another."
                )
            if self._records is None:  # a run that begins with a whole file asks once, for the number of classes
                self._records = self._open(model, logits, self.data)
            kept = self._records.write(numbers, marks, logits)
        return kept.to(sample_batch.device)

    def _open(self, model: nn.Module, logits: Tensor, data: FixedViews) -> LogitRecords:
        fields = {"teacher": network_sha256(model), "teacher_config": digest([repr(model).encode()])}
        fields |= {**data.fields(), "autocast": str(logits.dtype)}
        rows = data.views * len(data)
        records = LogitRecords(
            _CALLER, Path(self.folder).expanduser(), fields, rows, logits.shape[1], self.dtype, warn=_logger.warning
        )
        _logger.info("%s: the teacher's logits are kept in %s", _CALLER, records.path)
        return records
