"""Time and memory of the losses against the KL divergence they replace: `make bench`.

Each shape's methods run in turn, round after round, in one process; a figure is the median over the rounds, and ratios
are taken between medians of the same run. Peak memory is measured in a process of its own for each method.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ikl_plugins import dkl_loss, gkl_loss, ikl_loss
from ikl_plugins.functional import ikl_settings

Loss = Callable[[Tensor, Tensor], Tensor]

SHAPES = [(512, 100), (512, 1000), (128, 21841), (128, 128256)]
PAIRWISE_SHAPE = (64, 1000)
LINEAR_ROWS = 64
LINEAR_CLASSES = [1000, 4008, 16032, 64128, 128256]
MEMORY_SHAPE = (256, 32000)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """What the losses replace, as pipelines write it."""
    return F.kl_div(torch.log_softmax(student, 1), torch.softmax(teacher, 1), reduction="batchmean")


def pairwise(student: Tensor, teacher: Tensor) -> Tensor:
    """IKL as the paper writes it, with its (N, C, C) tensors."""
    weights = torch.softmax(teacher, 1)
    difference = teacher - student
    pairs = weights[:, :, None] * weights[:, None, :]
    gaps = difference[:, :, None] - difference[:, None, :]
    mse = 0.25 * (pairs * gaps**2).sum() / len(student)
    return mse - (weights * torch.log_softmax(student, 1)).sum() / len(student)


def composed(student: Tensor, teacher: Tensor) -> Tensor:
    """IKL in the linear form as ordinary tensor code, the path that torch.compile gets."""
    from ikl_plugins.functional import _composed

    settings = ikl_settings(alpha=1.0, beta=1.0, temperature=1.0, weight_temperature=1.0, reduction="batchmean")
    return _composed(student, teacher, None, settings)[0]


METHODS: dict[str, Loss] = {
    "KL": kl,
    "IKL composed": composed,
    "IKL": ikl_loss,
    "IKL temperature 4": partial(ikl_loss, temperature=4.0),
    "DKL": dkl_loss,
    "GKL gamma 1": gkl_loss,
    "GKL gamma 0.5": partial(gkl_loss, gamma=0.5),
}


def logits(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    student, teacher = (3.0 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    return student, teacher


def interleaved_medians(methods: dict[str, Loss], rows: int, classes: int, seconds: float) -> dict[str, float]:
    """Median seconds of forward and backward for each method, the student alone with a gradient."""
    student, teacher = logits(rows, classes)
    times: dict[str, list[float]] = {name: [] for name in methods}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 7 or (time.perf_counter() < end and rounds < 2000):
        # What a method leaves in caches and heap must not always meet the same next one.
        for name in order.sample(list(methods), len(methods)):
            leaf = student.clone().requires_grad_()
            start = time.perf_counter()
            methods[name](leaf, teacher).backward()
            if rounds >= 2:  # the first rounds warm caches and threads up
                times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(name: str) -> float:
    """Peak resident memory of one forward and backward above the inputs, in logits tensors. Run in a fresh process."""
    torch.set_num_threads(2)
    loss = METHODS[name]
    small = torch.randn(64, 64, requires_grad=True)
    loss(small, torch.randn(64, 64)).backward()
    student, teacher = logits(*MEMORY_SHAPE)
    student.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the kernel keeps
    before = _status("VmRSS")
    loss(student, teacher).backward()
    return (_status("VmHWM") - before) * 1024 / (student.numel() * student.element_size())


def peak_memory_of(name: str) -> float:
    """Median of :func:`peak_memory` over three fresh processes."""
    command = [sys.executable, __file__, "--memory-of", name]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(3))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def import_milliseconds() -> float:
    """Median time that `import ikl_plugins` adds to a process that has imported torch."""
    code = "import time, torch; s = time.perf_counter(); import ikl_plugins; print(time.perf_counter() - s)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) for _ in range(7)
    ]
    return 1e3 * statistics.median(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for losses.csv and losses.md")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="least time spent on each shape")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_memory(args.memory_of))
        return

    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    lines = [f"Measured with `make bench`: {describe(args.threads)}.", ""]

    lines += ["Forward and backward, relative to KL (its time in brackets):", ""]
    names = [name for name in METHODS if name != "KL"]
    lines += [f"| shape | KL | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for shape in SHAPES:
        medians = interleaved_medians(METHODS, *shape, args.seconds)
        ratios = [f"{medians[name] / medians['KL']:.2f}" for name in names]
        lines.append(f"| {shape} | 1 ({1e3 * medians['KL']:.2f} ms) | {' | '.join(ratios)} |")
        rows += [_row("time", shape, name, value, medians["KL"]) for name, value in medians.items()]
        print(lines[-1], flush=True)

    medians = interleaved_medians({"IKL": ikl_loss, "pairwise": pairwise}, *PAIRWISE_SHAPE, args.seconds)
    rows += [_row("pairwise", PAIRWISE_SHAPE, name, value, medians["IKL"]) for name, value in medians.items()]
    lines += ["", f"Pairwise form against IKL at {PAIRWISE_SHAPE}: {medians['pairwise'] / medians['IKL']:.0f} times."]
    print(lines[-1], flush=True)

    lines += ["", f"IKL at {LINEAR_ROWS} rows, nanoseconds an element:", ""]
    lines += [f"| {' | '.join(f'C = {c}' for c in LINEAR_CLASSES)} |", "|---" * len(LINEAR_CLASSES) + "|"]
    cells = []
    for classes in LINEAR_CLASSES:
        seconds = interleaved_medians({"IKL": ikl_loss}, LINEAR_ROWS, classes, args.seconds / 5)["IKL"]
        cells.append(f"{1e9 * seconds / (LINEAR_ROWS * classes):.2f}")
        rows.append(_row("linear", (LINEAR_ROWS, classes), "IKL", seconds, None))
    lines.append(f"| {' | '.join(cells)} |")
    print(lines[-1], flush=True)

    if Path("/proc/self/clear_refs").exists():
        lines += ["", f"Peak memory above the inputs at {MEMORY_SHAPE}, in logits tensors (the gradient is 1):", ""]
        lines += [f"| {' | '.join(METHODS)} |", "|---" * len(METHODS) + "|"]
        peaks = []
        for name in METHODS:
            peak = peak_memory_of(name)
            peaks.append(f"{peak:.2f}")
            rows.append({"kind": "memory", "rows": MEMORY_SHAPE[0], "classes": MEMORY_SHAPE[1], "method": name,
                         "logits_tensors": f"{peak:.3f}"})  # fmt: skip
        lines.append(f"| {' | '.join(peaks)} |")
        print(lines[-1], flush=True)

    lines += ["", f"`import ikl_plugins` after `import torch`: {import_milliseconds():.0f} ms."]
    print(lines[-1])

    fields = ["kind", "rows", "classes", "method", "seconds", "ratio", "logits_tensors"]
    write_results(args.output, "losses", fields, rows, lines)


def describe(threads: int) -> str:
    """What the figures depend on, in words."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {threads} threads, {processor()}, float32, CPU"


def write_results(
    folder: Path, name: str, fields: Sequence[str], rows: Sequence[dict[str, object]], lines: Sequence[str]
) -> None:
    """``<name>.csv`` with the rows and what they depend on, and ``<name>.md`` with the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor()}
    table, text = folder / f"{name}.csv", folder / f"{name}.md"
    temporary = folder / f"{table.name}.{os.getpid()}"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *origin], restval="")
        writer.writeheader()
        writer.writerows({**row, **origin} for row in rows)
    temporary.replace(table)
    temporary = folder / f"{text.name}.{os.getpid()}"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(text)
    print(f"Written: {table} and {text}")


def _row(kind: str, shape: tuple[int, int], method: str, seconds: float, base: float | None) -> dict[str, object]:
    row: dict[str, object] = {"kind": kind, "rows": shape[0], "classes": shape[1], "method": method}
    row["seconds"] = f"{seconds:.6g}"
    if base is not None:
        row["ratio"] = f"{seconds / base:.4f}"
    return row


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
