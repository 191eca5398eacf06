"""Time and memory of a training step of torchdistill with IKLLoss against its own KDLoss: `make bench`.

The boxes, criteria and processes are torchdistill's, their settings those of the shipped configs; images and labels are
random. What is compared runs in one process with the same networks, weights and batches, in turn, round after round in
shuffled order. A figure is the median over the rounds; a ratio is the median of the rounds' ratios. One more method is
KDLoss a second time: how far its ratio is from 1 says what the figures are worth.

Beside the whole step stands the criterion alone, forward and backward on logits of the step's shape. Peak memory is
that of a process which trains for two steps, one process for each method.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evidence import bench
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
from ikl_plugins import native

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

    def __init__(self, case: Case, method: str, batches: int = EPOCH) -> None:
        self.method = method
        config = configured(case, method)
        set_seed(0)
        teacher, student = (network(config["models"][f"{role}_model"]) for role in ("teacher", "student"))
        images = torch.randn(batches * case.batch, 3, case.size, case.size)
        labels = torch.arange(len(images)) % case.classes
        train = config["train"]
        train["train_data_loader"] = {
            "dataset_id": "train", "sampler": {"class_or_func": SequentialSampler},
            "kwargs": {"batch_size": case.batch, "num_workers": 0},
        }  # fmt: skip
        train.pop("val_data_loader")
        # Low: random labels are not to be learnt, and no figure depends on it.
        train["optimizer"]["kwargs"]["lr"] = 0.001
        datasets = {"train": TensorDataset(images, labels)}
        self.box = get_distillation_box(teacher, student, datasets, train, torch.device("cpu"), None, False, 1)
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
        with switched(self.method):
            start = time.perf_counter()
            loss = self.box.forward_process(images, labels, extra)
            self.box.post_forward_process(loss=loss)
            return time.perf_counter() - start


class switched:  # noqa: N801 - used like a function
    """The C++ operator on for its method and off for the others."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __enter__(self) -> None:
        native.enable() if self.method == OPERATOR else native.disable()

    def __exit__(self, *_: object) -> None:
        native.disable()


# --- time ------------------------------------------------------------------------------------------------------------


Times = dict[str, list[float]]


def in_turn(methods: dict[str, Any], seconds: float, least: int) -> Times:
    """Seconds of each method, round after round in shuffled order; the first two rounds warm up and do not count."""
    times: Times = {name: [] for name in methods}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least + 2 or time.perf_counter() < end:
        for name in order.sample(list(methods), len(methods)):
            spent = methods[name]()
            if rounds >= 2:
                times[name].append(spent)
        rounds += 1
    return times


def ratio(times: Times, name: str) -> float:
    """How long a method takes relative to KDLoss: the median of the rounds' ratios."""
    return statistics.median(own / kd for own, kd in zip(times[name], times[KD], strict=True))


def time_steps(case: Case, names: list[str], seconds: float) -> Times:
    return in_turn({name: Training(case, name).step for name in names}, seconds, LEAST_ROUNDS)


def time_criteria(case: Case, names: list[str], seconds: float) -> Times:
    """The criteria alone, forward and backward on the same logits and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(case.batch, case.classes, generator=generator) for _ in range(2))
    labels = torch.arange(case.batch) % case.classes

    def timed(training: Training) -> float:
        if next(counters[training.method]) % EPOCH == 0:
            training.box.pre_epoch_process(epoch=0)  # out of the time; the roll of the class prior is in it
        leaf = student.clone().requires_grad_()
        io_dict = {"student": {".": {"output": leaf}}, "teacher": {".": {"output": teacher}}}
        with switched(training.method):
            start = time.perf_counter()
            training.box.criterion(io_dict, {}, labels).backward()
            return time.perf_counter() - start

    trainings = {name: Training(case, name) for name in names}
    counters = {name: iter(range(sys.maxsize)) for name in names}
    return in_turn({name: lambda one=one: timed(one) for name, one in trainings.items()}, seconds, 20)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_mebibytes(method: str) -> float:
    """Peak resident memory of this process after it has trained. Run in a fresh one."""
    training = Training(MEMORY_CASE, method, MEMORY_STEPS)
    for _ in range(MEMORY_STEPS):
        training.step()
    # Of this process alone; what getrusage() tells may be the parent's.
    return bench.status("VmHWM") / 2**10


def peak_of(method: str, threads: int) -> float:
    """:func:`peak_mebibytes` in a process of its own.

    Its C library gives each tensor of more than a mebibyte back when it is freed. It would otherwise keep some for
    later, and what it keeps differs by more from run to run than most losses take.
    """
    command = [sys.executable, __file__, "--memory-of", method, "--threads", str(threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


def pairs_mebibytes(case: Case) -> float:
    """One float32 tensor over all pairs of classes of a batch."""
    return case.batch * case.classes**2 * 4 / 2**20


def memory_table(rows: list[dict[str, object]], methods: list[str], threads: int) -> list[str]:
    """Peak memory of each method, as lines; the figures are appended to ``rows``."""
    case = MEMORY_CASE
    peaks = {name: peak_of(name, threads) for name in methods}
    lines = [
        f"Peak memory of a process that trains {case.name}, {case.classes} classes, batch {case.batch}, "
        f"{case.size}x{case.size} pixels. What it has above `{NOTHING}`, where the teacher runs for nothing, is the "
        f"loss's share. One tensor over all pairs of classes takes {pairs_mebibytes(case):.0f} MiB.",
        "",
        "| method | peak, MiB | the loss's share, MiB | of the peak |",
        "|---|---|---|---|",
    ]
    for name, peak in peaks.items():
        share = peak - peaks[NOTHING]
        rows.append({"kind": "memory", "networks": case.name, "classes": case.classes, "batch": case.batch,
                     "pixels": case.size, "part": "step", "method": name, "mebibytes": f"{peak:.1f}",
                     "share": f"{share / peak:.4f}"})  # fmt: skip
        lines.append(f"| {name} | {peak:.0f} | {share:.0f} | {100 * share / peak:.1f} % |")
        print(lines[-1], flush=True)
    return lines


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder for training.csv and training.md"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="least time spent on each pair of networks")
    parser.add_argument("--memory-of", choices=MEASURED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native.disable()  # but where a method has it in its name
    if args.memory_of:
        print(peak_mebibytes(args.memory_of))
        return

    built = bench.can_build("Measured")
    timed, measured = ([name for name in names if built or name != OPERATOR] for names in (TIMED, MEASURED))
    rows: list[dict[str, object]] = []
    lines = [f"Measured with `make bench`: {bench.describe(args.threads)}; batch {CASES[0].batch}.", ""]
    lines += ["A training step of torchdistill, relative to KDLoss (its median time in brackets):", ""]
    lines += [f"| networks, part | {' | '.join(timed)} |", "|---" * (len(timed) + 1) + "|"]
    for case in CASES:
        label = f"{case.name}, {case.classes} classes, {case.size}x{case.size} pixels"
        for part, measure, share in (("step", time_steps, 1.0), ("criterion alone", time_criteria, 0.1)):
            times = measure(case, timed, share * args.seconds)
            cells = []
            for name in timed:
                seconds, relative = statistics.median(times[name]), ratio(times, name)
                rows.append({"kind": "time", "networks": case.name, "classes": case.classes, "batch": case.batch,
                             "pixels": case.size, "part": part, "method": name, "seconds": f"{seconds:.6g}",
                             "ratio": f"{relative:.4f}", "rounds": len(times[name])})  # fmt: skip
                cells.append(f"{relative:.3f} ({1e3 * seconds:.2f} ms)")
            lines.append(f"| {label}: {part} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            gc.collect()

    if Path("/proc/self/status").exists():
        lines += ["", *memory_table(rows, measured, args.threads)]

    fields = ["kind", "networks", "classes", "batch", "pixels", "part", "method", "seconds", "ratio", "rounds",
              "mebibytes", "share"]  # fmt: skip
    bench.write_results(args.output, "training", fields, rows, lines)


if __name__ == "__main__":
    main()
