"""Time and memory of a training step of torchdistill with IKLLoss against its own KDLoss.

The boxes, criteria and processes are torchdistill's, their settings those of the shipped configs; images and labels are
random. What is compared runs in one process with the same networks, weights and batches, in turn, round after round in
shuffled order. A figure is the median over the rounds; a ratio is the median of the rounds' ratios. One more method is
KDLoss a second time: how far its ratio is from 1 says what the figures are worth.

Beside the whole step stands the criterion alone, forward and backward on logits of the step's shape. Peak memory is
that of a process which trains for two steps, one process for each method.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.data import SequentialSampler, TensorDataset
from torchdistill.common.main_util import set_seed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import register_mid_level_loss
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

import ikl_plugins.torchdistill  # noqa: F401 - registers losses, networks and processes
from evidence import bench
from evidence.bench import Row
from evidence.device import timed_on
from evidence.report import narrow_table
from evidence.timing import in_turn, median_ratio
from ikl_plugins import native

SECONDS = 120.0
CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "torchdistill"
EPOCH = 16  # batches; the class prior is rolled behind the last of them
MEMORY_STEPS = 2
LEAST_ROUNDS = 5


class Case(NamedTuple):
    """A pair of networks with its two shipped configs, and the images that it gets here."""

    name: str
    kd: str
    ikl: str
    classes: int
    batch: int
    size: int


_CIFAR, _IMAGENET = "cifar100/resnet20_from_resnet56", "imagenet/resnet18_from_resnet34"
CASES = [
    Case("resnet56 to resnet20", f"{_CIFAR}-kd", f"{_CIFAR}-ikl", 100, 64, 32),
    Case("resnet34 to resnet18", f"{_IMAGENET}-kd", f"{_IMAGENET}-ikl", 1000, 64, 64),
]
MEMORY_CASE = CASES[1]._replace(size=224)

KD, AGAIN, IKL, OPERATOR = "KDLoss", "KDLoss again", "IKLLoss", "IKLLoss, C++ operator"
NOTHING, PAIRWISE = "labels alone", "IKL by pairs"
TIMED = [KD, AGAIN, IKL, OPERATOR]
MEASURED = [NOTHING, KD, IKL, OPERATOR, PAIRWISE]


@register_mid_level_loss(key="ikl_plugins_bench.PairwiseIKL")
class PairwiseIKL(nn.Module):
    """IKL as the paper writes it, over (N, C, C) pairs, with a class prior and the cross entropy to the labels."""

    def __init__(self, *, classes: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.register_buffer("prior", torch.full((classes, classes), 1.0 / classes))

    def forward(self, student_io: Any, teacher_io: Any, targets: Tensor, *_: Any, **__: Any) -> Tensor:
        student, teacher = student_io["."]["output"], teacher_io["."]["output"]
        rows = self.prior[targets]
        gaps = (teacher[:, :, None] - teacher[:, None, :]) - (student[:, :, None] - student[:, None, :])
        mse = 0.25 * (torch.pow(gaps, 2) * (rows[:, :, None] @ rows[:, None, :])).sum() / len(student)
        soft = -(F.softmax(teacher, 1) * F.log_softmax(student, 1)).sum(1).mean()
        return F.cross_entropy(student, targets) + self.beta * mse + self.alpha * soft


# --- boxes -----------------------------------------------------------------------------------------------------------


class _Plain(yaml.SafeLoader):
    """Reads a config's mappings; what its tags would call, data sets for one, is left out."""


_Plain.add_multi_constructor("!import_", lambda loader, suffix, node: None)


def shipped(name: str) -> dict[str, Any]:
    """A shipped config without its data."""
    config: dict[str, Any] = yaml.load((CONFIGS / f"{name}.yaml").read_text(), _Plain)  # noqa: S506 - a SafeLoader
    return config


def configured(case: Case, method: str) -> dict[str, Any]:
    """The config of a method: a shipped one, its criterion exchanged where none is shipped."""
    config = shipped(case.kd if method in (KD, AGAIN, NOTHING) else case.ikl)
    if method == NOTHING:
        recorded = {"is_from_teacher": False, "module_path": ".", "io": "output"}
        wrapper = {"key": "SimpleLossWrapper", "kwargs": {"input": recorded, "target": {"uses_label": True}}}
        term = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "criterion_wrapper": wrapper, "weight": 1.0}
        config["train"]["criterion"] = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": term}}}
    if method == PAIRWISE:
        own = config["train"]["criterion"]["kwargs"]["sub_terms"]["ikl"]["criterion"]
        given = own["kwargs"]
        own["key"] = "ikl_plugins_bench.PairwiseIKL"
        own["kwargs"] = {"classes": case.classes, "alpha": given["alpha"], "beta": given["beta"]}
    return config


def network(config: dict[str, Any]) -> nn.Module:
    """The network of a config with random weights."""
    kwargs = {key: value for key, value in config["kwargs"].items() if key != "weights"}
    model = get_image_classification_model({**config, "kwargs": kwargs}, False)
    return get_model(config["key"], None, **kwargs) if model is None else model


class Training:
    """torchdistill's box for a method, one batch after the other, epoch after epoch."""

    def __init__(self, case: Case, method: str, batches: int = EPOCH, device: torch.device = CPU) -> None:
        self.method = method
        self.device = device
        config = configured(case, method)
        set_seed(0)
        teacher, student = (network(config["models"][f"{role}_model"]).to(device) for role in ("teacher", "student"))
        images = torch.randn(batches * case.batch, 3, case.size, case.size)
        labels = torch.arange(len(images)) % case.classes
        train = config["train"]
        train["train_data_loader"] = {
            "dataset_id": "train",
            "sampler": {"class_or_func": SequentialSampler},
            "kwargs": {"batch_size": case.batch, "num_workers": 0},
        }
        train.pop("val_data_loader")
        # Low: random labels are not to be learnt, and no figure depends on it.
        train["optimizer"]["kwargs"]["lr"] = 0.001
        datasets = {"train": TensorDataset(images, labels)}
        self.box = get_distillation_box(teacher, student, datasets, train, device, None, False, 1)
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        epoch = 0
        while True:
            self.box.pre_epoch_process(epoch=epoch)
            yield from self.box.train_data_loader
            self.box.post_epoch_process()
            epoch += 1

    def step(self) -> float:
        """One training step; its seconds, those of loading the batch not among them."""
        images, labels, extra = next(self.batches)
        images, labels = images.to(self.device), labels.to(self.device)
        with switched(self.method):
            return timed_on(self.device, lambda: self._step(images, labels, extra))()

    def _step(self, images: Tensor, labels: Tensor, extra: Any) -> None:
        loss = self.box.forward_process(images, labels, extra)
        self.box.post_forward_process(loss=loss)


@contextlib.contextmanager
def switched(method: str) -> Iterator[None]:
    """The C++ operator on for its method and off for the others."""
    native.enable() if method == OPERATOR else native.disable()
    try:
        yield
    finally:
        native.disable()


# --- measuring -------------------------------------------------------------------------------------------------------

Times = dict[str, list[float]]


def time_steps(case: Case, names: list[str], seconds: float, device: torch.device) -> Times:
    return in_turn({name: Training(case, name, device=device).step for name in names}, seconds, least=LEAST_ROUNDS)


def _descend(criterion: nn.Module, io_dict: dict[str, Any], labels: Tensor) -> None:
    criterion(io_dict, {}, labels).backward()


def time_criteria(case: Case, names: list[str], seconds: float, device: torch.device) -> Times:
    """The criteria alone, forward and backward on the same logits and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(case.batch, case.classes, generator=generator).to(device) for _ in range(2))
    labels = torch.arange(case.batch, device=device) % case.classes

    def calls(training: Training) -> Iterator[float]:
        for number in itertools.count():
            if number % EPOCH == 0:
                training.box.pre_epoch_process(epoch=0)  # out of the time; the roll of the class prior is in it
            leaf = student.clone().requires_grad_()
            io_dict = {"student": {".": {"output": leaf}}, "teacher": {".": {"output": teacher}}}
            with switched(training.method):
                yield timed_on(device, partial(_descend, training.box.criterion, io_dict, labels))()

    methods = {name: calls(Training(case, name, device=device)).__next__ for name in names}
    return in_turn(methods, seconds, least=20)


def peak(method: str) -> float:
    """Peak resident memory of this process in MiB after it has trained. Run in a fresh one."""
    training = Training(MEMORY_CASE, method, MEMORY_STEPS)
    for _ in range(MEMORY_STEPS):
        training.step()
    # Of this process alone; what getrusage() tells may be the parent's.
    return bench.status("VmHWM") / 2**10


def peak_of(method: str) -> float:
    """:func:`peak` in a process of its own.

    Its C library gives each tensor of more than a mebibyte back when it is freed. It would otherwise keep some for
    later, and what it keeps differs by more from run to run than most losses take.
    """
    return bench.peak_of("training", method, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)})


def measure(seconds: float, device: torch.device) -> Iterator[Row]:
    """Rows of the CSV file."""
    built = device.type == "cpu" and bench.can_build()

    def row(kind: str, case: Case, part: str, method: str) -> Row:
        place = {"networks": case.name, "classes": case.classes, "batch": case.batch, "pixels": case.size}
        return {"kind": kind, **place, "part": part, "method": method}

    for case in CASES:
        for part, time_part, share in (("step", time_steps, 1.0), ("criterion alone", time_criteria, 0.1)):
            times = time_part(case, bench.runnable(TIMED, built=built), share * seconds, device)
            for name, values in times.items():
                figures = {"seconds": f"{statistics.median(values):.6g}", "rounds": len(values)}
                yield {**row("time", case, part, name), **figures, "ratio": f"{median_ratio(values, times[KD]):.4f}"}
            gc.collect()
    if device.type == "cpu" and Path("/proc/self/status").exists():
        peaks: dict[str, float] = {}
        for name in bench.runnable(MEASURED, built=built):
            peaks[name] = peak_of(name)
            share = (peaks[name] - peaks[NOTHING]) / peaks[name]
            figures = {"mebibytes": f"{peaks[name]:.1f}", "share": f"{share:.4f}"}
            yield {**row("memory", MEMORY_CASE, "step", name), **figures}


# --- telling ---------------------------------------------------------------------------------------------------------


def render(rows: list[Row]) -> str:
    """The tables from the rows of the CSV file."""
    kinds = bench.by_kind(
        rows, lambda row: "{networks}, {classes} classes, {pixels}x{pixels} pixels: {part}".format(**row)
    )

    def cell(row: Row) -> str:
        return f"{float(row['ratio']):.3f} ({1e3 * float(row['seconds']):.2f} ms)"

    times = kinds["time"]
    parts = [
        f"{bench.describe(rows[0])}; batch {rows[0]['batch']}.",
        "A training step of torchdistill, relative to KDLoss (its median time in brackets):",
        narrow_table(
            ["networks, part", *next(iter(times.values()))],
            [[label, *map(cell, line.values())] for label, line in times.items()],
        ),
    ]
    for line in kinds.get("memory", {}).values():
        case = line[NOTHING]
        peaks = {name: float(row["mebibytes"]) for name, row in line.items()}
        pairs = int(case["batch"]) * int(case["classes"]) ** 2 * 4 / 2**20
        cells = [
            [name, f"{one:.0f}", f"{one - peaks[NOTHING]:.0f}", f"{100 * float(line[name]['share']):.1f} %"]
            for name, one in peaks.items()
        ]
        parts += [
            "Peak memory of a process that trains {networks}, {classes} classes, batch {batch}, {pixels}x{pixels} "
            "pixels. What it has above ".format(**case)
            + f"`{NOTHING}`, where the teacher runs for nothing, is the loss's share. One tensor over all pairs of "
            f"classes takes {pairs:.0f} MiB.",
            narrow_table(["method", "peak, MiB", "the loss's share, MiB", "of the peak"], cells),
        ]
    return "\n\n".join(parts)
