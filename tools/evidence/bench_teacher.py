"""What a teacher costs in a training step of MMPretrain, and what its options save: ResNet-56 to ResNet-8.

The classifier is DistillationClassifier with the networks, the pipeline and IKL of the shipped configs of CIFAR-100, on
random images. A step is a batch loaded in this process, its forward and backward pass and the optimizer's step. What is
compared takes turns in one process, with the same weights; a figure is the median over the rounds, a ratio that of the
rounds' ratios, and beside it stands that of the process's own time, which others on the machine do not lengthen.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mmpretrain.datasets  # noqa: F401 - registers the transforms
import numpy
import torch
from mmengine.dataset import BaseDataset, DefaultSampler, pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch.utils.data import DataLoader

import ikl_plugins.mmpretrain  # noqa: F401 - registers classifier, networks and losses
from evidence import bench
from evidence.bench import Row
from evidence.report import narrow_table
from evidence.timing import in_turn, median_ratio

SECONDS = 120.0
CLASSES, BATCH, BATCHES = 100, 64, 8
LEAST_ROUNDS = 5
PLAIN, AGAIN, KEPT = "teacher as it is", "again", "teacher_cache, kept"
METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    AGAIN: {},
    "teacher_precision='bf16'": {"teacher_precision": "bf16"},
    "teacher_channels_last": {"teacher_channels_last": True},
    "teacher_compile": {"teacher_compile": True},
    "all three": {"teacher_precision": "bf16", "teacher_channels_last": True, "teacher_compile": True},
    "teacher_cache, first views": {"teacher_cache": {"views": 4096}},  # each epoch has a new one
    KEPT: {"teacher_cache": {"views": 1}},
}
PIPELINE = [
    {"type": "RandomCrop", "crop_size": 32, "padding": 4},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    {"type": "PackInputs"},
]


class Images(BaseDataset):  # type: ignore[misc]
    """Random images of CIFAR's size, in memory."""

    def load_data_list(self) -> list[dict[str, Any]]:
        pixels = numpy.random.default_rng(0).integers(256, size=(BATCH * BATCHES, 32, 32, 3), dtype="u1")
        return [{"img": image, "gt_label": number % CLASSES} for number, image in enumerate(pixels)]


class Training:
    """Steps of one method, epoch after epoch."""

    def __init__(self, method: str, folder: str, device: torch.device) -> None:
        init_default_scope("mmpretrain")
        torch.manual_seed(0)
        settings = METHODS[method]
        if "teacher_cache" in settings:
            settings = {"teacher_cache": {**settings["teacher_cache"], "folder": folder}}
        network = {"type": "DistillationNetwork", "num_classes": CLASSES}
        self.model = MODELS.build(
            {
                "type": "DistillationClassifier",
                "data_preprocessor": {"mean": [129.0] * 3, "std": [68.0] * 3, "to_rgb": False},
                "backbone": {**network, "name": "resnet8"},
                "head": {"type": "LogitsClsHead", "num_classes": CLASSES, "loss": {"type": "CrossEntropyLoss"}},
                "teacher": MODELS.build({**network, "name": "resnet56"}),
                "distill_loss": {"type": "IKLLoss", "beta": 4.0},
                **settings,
            }
        ).to(device)
        self.model.train()
        # Low: random labels are not to be learnt, and no figure depends on it.
        self.optimizer = build_optim_wrapper(self.model, {"optimizer": {"type": "SGD", "lr": 0.001}})
        data = Images(pipeline=PIPELINE)
        self.loader = DataLoader(
            data, BATCH, sampler=DefaultSampler(data, shuffle=True, seed=0), collate_fn=pseudo_collate
        )
        self.batches = self._batches()
        self.loop = SimpleNamespace(dataloader=self.loader, epoch=0)
        if self.model.teacher_cache is not None:
            run = SimpleNamespace(hooks=[], cfg=None, train_loop=self.loop)
            self.model.teacher_cache.attach(self.model.teacher, self.model.data_preprocessor, run)
            self.model.begin_epoch(1, 1)
            for _ in range(BATCHES if method == KEPT else 0):
                self.step()

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.loader
            self.loop.epoch += 1

    def step(self) -> tuple[float, float]:
        """One training step with its batch: seconds on the clock, and of this process."""
        return _timed(lambda: self.model.train_step(next(self.batches), self.optimizer))


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    clock, own = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - own


def measure(seconds: float, device: torch.device) -> Iterator[Row]:
    """Rows of the CSV file."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: Training(name, folder, device).step for name in METHODS}
        times = in_turn(steps, seconds, least=LEAST_ROUNDS)
    clock = {name: [one for one, _ in values] for name, values in times.items()}
    own = {name: [other for _, other in values] for name, values in times.items()}
    for name in METHODS:
        yield {
            "kind": "time",
            "networks": "resnet56 to resnet8",
            "classes": CLASSES,
            "batch": BATCH,
            "method": name,
            "seconds": f"{statistics.median(clock[name]):.6g}",
            "rounds": len(clock[name]),
            "faster": f"{1 / median_ratio(clock[name], clock[PLAIN]):.4f}",
            "faster_by_processor": f"{1 / median_ratio(own[name], own[PLAIN]):.4f}",
        }


def render(rows: list[Row]) -> str:
    """The table from the rows of the CSV file."""
    cells = [
        [row["method"], f"{1e3 * float(row['seconds']):.1f} ms"]
        + [f"{float(row[key]):.2f}" for key in ("faster", "faster_by_processor")]
        for row in rows
    ]
    origin = bench.describe(rows[0]).replace("make bench", "tools/bench.py teacher")
    what = "{networks}, batch {batch}, {rounds} rounds".format(**rows[0])
    return "\n\n".join(
        [
            f"{origin}; {what}.",
            narrow_table(["", "step with its batch", "times as fast", "by the processor's time"], cells),
        ]
    )
