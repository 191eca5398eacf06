"""Teacher logits kept on disk: each image recurs in a few fixed augmentations, and the teacher sees each of them once.

The random numbers of an image follow from (seed, view, index), whichever worker or rank loads it. The view travels with
the index from the batch sampler to the data set, so that persistent workers and batches loaded ahead have it too.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.logging import MMLogger
from mmengine.runner import IterBasedTrainLoop
from mmpretrain.engine.hooks import SwitchRecipeHook
from mmpretrain.models import ClsDataPreprocessor
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .. import _validation as check
from .._logit_records import LogitRecords, check_settings, digest, image_mark, seeded
from .._random_states import kept_random_states
from ..models.weights import network_sha256
from .teacher import FrozenTeacher

__all__ = ["LogitCache"]

_CALLER = "DistillationClassifier"
_KEYS = ("folder", "views", "dtype", "seed")
_ROW = "teacher_row"  # of a data sample: number of the record, checksum and size of the image


class LogitCache:
    """The teacher's logits of a training, read from a file where it has them.

    Args:
        settings: the config's ``teacher_cache``: ``folder``; ``views``, how many augmentations of each image there are,
            epoch e sees number e mod views; ``dtype`` on disk, ``'float32'`` (default) or ``'float16'``; ``seed`` of
            the augmentations, 0.
        preprocessor: the student's.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: an unknown or missing key, or a value out of range; batch augmentations; another data preprocessor
            than MMPretrain's ``ClsDataPreprocessor``.
    """

    def __init__(self, settings: Mapping[str, Any], preprocessor: nn.Module) -> None:
        if not isinstance(settings, Mapping) or not {"folder", "views"} <= set(settings):
            raise ValueError(
                f"{_CALLER}: `teacher_cache` must have folder and views, got {settings!r}. "
                f"Write dict(folder='...', views=8)."
            )
        for name in settings:
            if name not in _KEYS:
                raise ValueError(check.unknown_name_message(_CALLER, "key of `teacher_cache`", name, _KEYS))
        self.views, self.seed = settings["views"], settings.get("seed", 0)
        self.dtype = settings.get("dtype", "float32")
        check_settings(_CALLER, self.views, self.seed, self.dtype)
        if getattr(preprocessor, "batch_augments", None) is not None:
            raise ValueError(
                f"{_CALLER}: `teacher_cache` must have images that are not mixed, got `augments` of `train_cfg`. "
                f"Drop one of them."
            )
        if type(preprocessor).forward is not ClsDataPreprocessor.forward:
            raise ValueError(
                f"{_CALLER}: `teacher_cache` must have a ClsDataPreprocessor, got {type(preprocessor).__name__}. "
                f"Drop one of them."
            )
        self.folder = Path(str(settings["folder"])).expanduser()
        self.fields: dict[str, str] = {}
        self._rows = 0
        self._records: LogitRecords | None = None
        self._asked = True  # whether the teacher has run in this epoch

    def attach(self, teacher: FrozenTeacher, preprocessor: nn.Module, runner: Any) -> None:
        """Gives the training data its fixed augmentations, and takes down what the logits depend on.

        Args:
            teacher: the holder.
            preprocessor: the student's.
            runner: MMEngine's runner, before its first step.

        Raises:
            ValueError: data without indices, or a hook that changes the pipeline.
        """
        if any(isinstance(hook, SwitchRecipeHook) for hook in runner.hooks):
            raise ValueError(
                f"{_CALLER}: `teacher_cache` must have one pipeline, got a SwitchRecipeHook. Drop one of them."
            )
        loop = runner.train_loop
        loader = loop.dataloader
        if isinstance(loader.dataset, _FixedViews):
            return
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise ValueError(
                f"{_CALLER}: `teacher_cache` must have batches of indexed images, got {type(loader.dataset).__name__}. "
                f"Use a data set with a sampler."
            )
        length = len(loader.dataset)
        self._rows = self.views * length
        own = runner.cfg.get("train_dataloader") if runner.cfg is not None else None
        pipeline = own.get("dataset") if isinstance(own, Mapping) else None
        self.fields = {
            "teacher": network_sha256(teacher.module),
            "teacher_config": digest([_text(teacher.settings).encode(), repr(teacher.module).encode()]),
            "teacher_inputs": digest([_preprocessing(part).encode() for part in (preprocessor, teacher.module)]),
            "teacher_precision": str(teacher.precision),
            "pipeline": digest([_text(pipeline).encode()]),
            "data": digest(_names(loader.dataset)),
            "images": f"{length} in {self.views} views, seed {self.seed}",
        }
        views = _ViewBatches(loader.batch_sampler, loop, self.views, length)
        # A DataLoader refuses to have these two set, but reads them anew in each epoch; all others keep this loader.
        loader.__dict__.update(dataset=_FixedViews(loader.dataset, self.seed, length), batch_sampler=views)
        if isinstance(loop, IterBasedTrainLoop):  # it has begun to iterate when it was built
            loader._iterator = None  # of persistent workers
            sampler = getattr(views.inner, "sampler", None)
            if isinstance(sampler, InfiniteSampler):
                sampler.indices = sampler._indices_of_rank()
            with kept_random_states():
                loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)

    def begin_epoch(self, teacher: FrozenTeacher) -> None:
        """Takes a teacher off the device that has not run in the epoch before."""
        if not self._asked:
            teacher.module.cpu()
        self._asked = False

    def __call__(self, teacher: FrozenTeacher, inputs: Tensor, data_samples: Sequence[Any], student: Tensor) -> Tensor:
        """The teacher's logits of a training batch; the teacher runs only if one of them is not kept.

        Args:
            teacher: the holder.
            inputs: the student's inputs (N, C, H, W).
            data_samples: one of each image.
            student: the student's logits (N, classes).

        Returns:
            Logits (N, classes) of at least float32, rounded to ``dtype`` also where the teacher has just run.

        Raises:
            OSError: the file cannot be made, read or written.
            ValueError: images of several sizes in a batch; float16 cannot hold the logits.
        """
        found = [sample.get(_ROW) for sample in data_samples]
        if None in found:  # not of the training data
            teacher.module.to(inputs.device)
            return teacher(inputs)
        numbers, marks, sizes = zip(*found, strict=True)
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{_CALLER}: `teacher_cache` must have images of one size, got {sorted(set(sizes))[:2]}. "
                f"Resize or crop them."
            )
        records = self._open(teacher, inputs, student.shape[1])
        logits = records.read(numbers, marks)
        if logits is None:
            teacher.module.to(inputs.device)
            self._asked = True
            given = teacher(inputs)
            if given.shape != student.shape:  # the caller tells
                return given
            logits = records.write(numbers, marks, given)
        return logits.to(inputs.device, torch.promote_types(student.dtype, torch.float32))

    def _open(self, teacher: FrozenTeacher, inputs: Tensor, classes: int) -> LogitRecords:
        if self._records is None:
            kind = inputs.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            fields = {**self.fields, "autocast": str(None if teacher.precision else autocast)}
            logger = MMLogger.get_current_instance()
            self._records = LogitRecords(
                _CALLER, self.folder, fields, self._rows, classes, self.dtype, warn=logger.warning
            )
            logger.info(
                "%s: the teacher's logits are kept in %s (%.1f MB when all are there).",
                _CALLER,
                self._records.path,
                self._records.rows.nbytes / 1e6,
            )
        return self._records

    def __deepcopy__(self, memo: dict[int, Any]) -> LogitCache:
        return self


class _FixedViews:
    """A data set whose item (index, view) has its own random numbers; otherwise the data set inside."""

    def __init__(self, inner: Any, seed: int, length: int) -> None:
        self.inner = inner
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # while it is unpickled; what a loader asks for
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getitem__(self, item: Any) -> Any:
        if not isinstance(item, tuple):
            return self.inner[item]
        index, view = item
        with seeded(self.seed, view, index):
            data = self.inner[index]
        if not isinstance(data, Mapping) or "data_samples" not in data:
            raise ValueError(f"{_CALLER}: `teacher_cache` must have data samples. End the pipeline with PackInputs.")
        image = data["inputs"]
        mark = image_mark(_CALLER, image)
        sample = data["data_samples"].clone()  # a data set in memory gives the same one each time
        row = view * self.length + index, mark, tuple(image.shape[-2:])
        sample.set_field(row, _ROW, field_type="metainfo", dtype=None)
        return {**data, "data_samples": sample}


class _ViewBatches:
    """A batch sampler whose indices come with the view of their epoch; otherwise the batch sampler inside."""

    def __init__(self, inner: Any, loop: Any, views: int, length: int) -> None:
        self.inner = inner
        self.loop = loop
        self.views = views
        self.length = length
        self.passes = 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # A resumed loop of iterations replays its batches, one of epochs knows their number.
        epoch = self.passes if isinstance(self.loop, IterBasedTrainLoop) else self.loop.epoch
        self.passes += 1
        endless = isinstance(getattr(self.inner, "sampler", None), InfiniteSampler)
        rank, world_size = get_dist_info()
        drawn = rank  # by all ranks together
        for batch in self.inner:
            pairs = []
            for index in batch:
                pairs.append((index, (epoch + (drawn // self.length if endless else 0)) % self.views))
                drawn += world_size
            yield pairs


# --- what logits depend on -------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A config as text that is the same in each run."""

    def named(other: Any) -> str:
        kind: Any = other if hasattr(other, "__qualname__") else type(other)
        return f"{kind.__module__}.{kind.__qualname__}"

    return json.dumps(value, sort_keys=True, default=named)


def _preprocessing(module: nn.Module) -> str:
    """What a data preprocessor, or that of a network, does: its plain settings and its mean and std."""
    owner = getattr(module, "data_preprocessor", module)
    plain = {name: value for name, value in vars(owner).items() if isinstance(value, (bool, int, float, str))}
    buffers = {name: buffer.tolist() for name, buffer in owner.named_buffers(recurse=False) if buffer.numel() < 99}
    return _text([type(owner).__name__, {**plain, "training": None}, buffers])


def _names(dataset: Any) -> Iterator[Any]:
    """What names the images of a data set, and of those inside it."""
    yield f"{type(dataset).__name__} {len(dataset)}".encode()
    named = getattr(dataset, "data_bytes", None)
    if named is not None:
        yield numpy.ascontiguousarray(named).data
    elif getattr(dataset, "data_list", None):
        yield pickle.dumps(dataset.data_list)
    for inner in [*getattr(dataset, "datasets", []), *filter(None, [getattr(dataset, "dataset", None)])]:
        yield from _names(inner)
