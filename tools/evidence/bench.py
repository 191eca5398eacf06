"""Time and memory of the losses against the KL divergence they replace: `make bench`.

Each shape's methods run in turn, round after round, in one process; a figure is the median over the rounds, and ratios
are taken between medians of the same run. The pairwise form alone has rounds of its own: what it leaves in the caches
would treble the time of the next one. Peak memory is measured in a process of its own for each method.

The C++ operator takes part where it can be built, as `ikl build` does it.
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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ikl_plugins._fused
from ikl_plugins import dkl_loss, gkl_loss, ikl_loss, native
from ikl_plugins.functional import ikl_settings

Loss = Callable[[Tensor, Tensor], Tensor]

SHAPES = [
    (128, 100), (512, 100), (64, 1000), (512, 1000), (64, 10000), (128, 21841), (64, 32000), (16, 128256),
    (128, 128256),
]  # fmt: skip
PAIRWISE_SHAPE = (64, 1000)
LINEAR_ROWS = 64
LINEAR_CLASSES = [1000, 4008, 16032, 64128, 128256]
MEMORY_SHAPE = (256, 32000)
STEP_SHAPES = [(128, 100), (512, 1000), (64, 32000)]


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


def composed(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """IKL in the linear form as ordinary tensor code, the path that torch.compile gets."""
    from ikl_plugins._composed import composed_loss

    settings = ikl_settings(
        alpha=1.0, beta=1.0, temperature=temperature, weight_temperature=temperature, reduction="batchmean"
    )
    return composed_loss(student, teacher, None, settings)[0]


def by_operator(loss: Loss) -> Loss:
    """The loss with the C++ operator switched on for it; its backward only hands out what forward has left."""

    def loss_by_operator(student: Tensor, teacher: Tensor) -> Tensor:
        native.enable()
        try:
            return loss(student, teacher)
        finally:
            native.disable()

    return loss_by_operator


METHODS: dict[str, Loss] = {
    "KL": kl,
    "IKL composed": composed,
    "IKL": ikl_loss,
    "IKL temperature 4": partial(ikl_loss, temperature=4.0),
    "DKL": dkl_loss,
    "GKL gamma 1": gkl_loss,
    "GKL gamma 0.5": partial(gkl_loss, gamma=0.5),
    "IKL, C++ operator": by_operator(ikl_loss),
    "GKL gamma 0.5, C++ operator": by_operator(partial(gkl_loss, gamma=0.5)),
}


def of_operator(name: str) -> bool:
    return "C++ operator" in name


# --- what each step towards the shipped losses gave; all at temperature 4, in both terms ---

STEP_TEMPERATURE = 4.0


def in_one_block(loss: Loss) -> Loss:
    """The walk over all rows at once, whatever their number."""

    def loss_in_one_block(student: Tensor, teacher: Tensor) -> Tensor:
        shipped = ikl_plugins._fused._BLOCK_ELEMENTS_CPU
        ikl_plugins._fused._BLOCK_ELEMENTS_CPU = 2**62
        try:
            return loss(student, teacher)
        finally:
            ikl_plugins._fused._BLOCK_ELEMENTS_CPU = shipped

    return loss_in_one_block


_shipped = partial(ikl_loss, temperature=STEP_TEMPERATURE, weight_temperature=STEP_TEMPERATURE)
# A temperature that differs in its last digit keeps the walk from taking the soft labels for the weights.
_weights_apart = partial(
    ikl_loss, temperature=STEP_TEMPERATURE, weight_temperature=STEP_TEMPERATURE * (1 + sys.float_info.epsilon)
)

STEPS: dict[str, Loss] = {
    "KL": lambda student, teacher: kl(student / STEP_TEMPERATURE, teacher / STEP_TEMPERATURE),
    "linear form, plain code": partial(composed, temperature=STEP_TEMPERATURE),
    "plain code through torch.compile": torch.compile(
        partial(composed, temperature=STEP_TEMPERATURE), dynamic=False, fullgraph=True
    ),
    "analytic gradient, in place": in_one_block(_weights_apart),
    "in blocks that fit the cache": _weights_apart,
    "one softmax less (shipped)": _shipped,
    "C++ operator": by_operator(_shipped),
}


WEIGHTS_GAMMA = 0.5


def shipped_weights(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """GKL's weights and their mass as the walk makes them, from one log-softmax."""
    from ikl_plugins._fused import Operands, class_weights
    from ikl_plugins.functional import gkl_settings

    settings = gkl_settings(
        alpha=1.0, beta=1.0, temperature=1.0, weight_temperature=STEP_TEMPERATURE, gamma=WEIGHTS_GAMMA,
        reduction="batchmean",
    )  # fmt: skip
    weights, work = torch.empty_like(teacher), torch.empty_like(teacher)
    mass = class_weights(Operands(teacher, teacher, None, weights, work, work), settings, out=weights)
    if mass is None:
        raise RuntimeError("GKL's weights have lost their mass")
    return weights, mass


def two_softmax_weights(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same from two softmaxes, whose largest entries give the mass."""
    weights, work = torch.empty_like(teacher), torch.empty_like(teacher)
    torch.mul(teacher, 1.0 / STEP_TEMPERATURE, out=work)
    torch.softmax(work, 1, out=weights)
    largest = weights.amax(1, keepdim=True).pow_(WEIGHTS_GAMMA)
    work.mul_(WEIGHTS_GAMMA)
    torch.softmax(work, 1, out=weights)
    return weights, largest.div_(weights.amax(1, keepdim=True))


WEIGHTS = {"two softmaxes": two_softmax_weights, "one log-softmax, raised (shipped)": shipped_weights}


HEAP_BYTES = 31 * 2**20


def warm_heap() -> None:
    """Leaves the C library's heap as that of a process that trains.

    glibc takes memory from the system page by page, and hands it back, until a large tensor has been freed once; then
    it keeps as much for later (mallopt(3), M_MMAP_THRESHOLD, at most 32 MiB). Until then plain tensor code pays for it.
    """
    torch.zeros(HEAP_BYTES, dtype=torch.uint8)


def logits(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    student, teacher = (3.0 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    return student, teacher


def interleaved_medians(methods: dict[str, Loss], rows: int, classes: int, seconds: float) -> dict[str, float]:
    """Median seconds of forward and backward for each method, the student alone with a gradient."""
    student, teacher = logits(rows, classes)

    def timed(method: Loss) -> float:
        leaf = student.clone().requires_grad_()
        start = time.perf_counter()
        method(leaf, teacher).backward()
        return time.perf_counter() - start

    return medians_of({name: partial(timed, method) for name, method in methods.items()}, seconds)


def medians_of(methods: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Median of what the methods return, called in turn for at least ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 7 or (time.perf_counter() < end and rounds < 2000):
        # What a method leaves in caches and heap must not always meet the same next one.
        for name in order.sample(list(methods), len(methods)):
            spent = methods[name]()
            if rounds >= 2:  # the first rounds warm caches and threads up
                times[name].append(spent)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def weights_medians(rows: int, classes: int, seconds: float) -> dict[str, float]:
    """Median seconds of GKL's weights, made in two ways."""
    _, teacher = logits(rows, classes)

    def timed(weights: Callable[[Tensor], object]) -> float:
        start = time.perf_counter()
        weights(teacher)
        return time.perf_counter() - start

    return medians_of({name: partial(timed, way) for name, way in WEIGHTS.items()}, seconds)


def can_build(what: str) -> bool:
    """Builds the C++ operator; says so where that is not possible."""
    try:
        native.build()
        native.enable()
    except RuntimeError as error:
        print(f"{what} without the C++ operator: {error}", flush=True)
        return False
    native.disable()
    return True


def without_operator(methods: Iterable[str], *, built: bool) -> list[str]:
    """The methods that can run here."""
    return [name for name in methods if built or not of_operator(name)]


def peak_memory(name: str) -> float:
    """Peak resident memory of one forward and backward above the inputs, in logits tensors. Run in a fresh process."""
    torch.set_num_threads(2)
    loss = METHODS[name]
    small = torch.randn(64, 64, requires_grad=True)
    native.disable()
    loss(small, torch.randn(64, 64)).backward()
    student, teacher = logits(*MEMORY_SHAPE)
    student.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the kernel keeps
    before = status("VmRSS")
    loss(student, teacher).backward()
    return (status("VmHWM") - before) * 1024 / (student.numel() * student.element_size())


def peak_memory_of(name: str) -> float:
    """Median of :func:`peak_memory` over three fresh processes."""
    command = [sys.executable, __file__, "--memory-of", name]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(3))


def status(key: str) -> int:
    """A figure of /proc/self/status, in kibibytes."""
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
    warm_heap()
    native.disable()  # but where a method has it in its name
    built = can_build("Measured")
    methods = {name: METHODS[name] for name in without_operator(METHODS, built=built)}
    rows: list[dict[str, object]] = []
    lines = [f"Measured with `make bench`: {describe(args.threads)}.", ""]

    lines += ["Forward and backward, relative to KL (its time in brackets):", ""]
    names = [name for name in methods if name != "KL"]
    lines += [f"| shape | KL | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for shape in SHAPES:
        medians = interleaved_medians(methods, *shape, args.seconds)
        ratios = [f"{medians[name] / medians['KL']:.2f}" for name in names]
        lines.append(f"| {shape} | 1 ({1e3 * medians['KL']:.2f} ms) | {' | '.join(ratios)} |")
        rows += [_row("time", shape, name, value, medians["KL"]) for name, value in medians.items()]
        print(lines[-1], flush=True)

    alone = ({"IKL": ikl_loss}, {"pairwise": pairwise})
    medians = {}
    for method in alone:
        medians |= interleaved_medians(method, *PAIRWISE_SHAPE, args.seconds / 2)
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
        lines += [f"| {' | '.join(methods)} |", "|---" * len(methods) + "|"]
        peaks = []
        for name in methods:
            peak = peak_memory_of(name)
            peaks.append(f"{peak:.2f}")
            rows.append({"kind": "memory", "rows": MEMORY_SHAPE[0], "classes": MEMORY_SHAPE[1], "method": name,
                         "logits_tensors": f"{peak:.3f}"})  # fmt: skip
        lines.append(f"| {' | '.join(peaks)} |")
        print(lines[-1], flush=True)

    lines += ["", *steps_table(rows, args.seconds, built=built)]

    lines += ["", f"`import ikl_plugins` after `import torch`: {import_milliseconds():.0f} ms."]
    print(lines[-1])

    fields = ["kind", "rows", "classes", "method", "seconds", "ratio", "logits_tensors"]
    write_results(args.output, "losses", fields, rows, lines)


def steps_table(rows: list[dict[str, object]], seconds: float, *, built: bool) -> list[str]:
    """What each step gave, as lines; the figures are appended to ``rows``."""
    names = without_operator(STEPS, built=built)  # torch.compile needs the compiler that the operator needs
    if not built:
        names.remove("plain code through torch.compile")
    lines = [f"Steps towards the shipped IKL, temperature {STEP_TEMPERATURE:g} in both terms, relative to KL:", ""]
    lines += [f"| shape | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for shape in STEP_SHAPES:
        medians = interleaved_medians({name: STEPS[name] for name in names}, *shape, seconds)
        rows += [_row("step", shape, name, value, medians["KL"]) for name, value in medians.items()]
        ratios = [f"{medians[name] / medians['KL']:.2f}" for name in names]
        lines.append(f"| {shape} | {' | '.join(ratios)} |")
        print(lines[-1], flush=True)

    lines += ["", f"GKL's weights and their mass, gamma {WEIGHTS_GAMMA}, relative to the first way:", ""]
    lines += [f"| shape | {' | '.join(WEIGHTS)} |", "|---" * (len(WEIGHTS) + 1) + "|"]
    for shape in STEP_SHAPES:
        medians = weights_medians(*shape, seconds / 5)
        base = medians["two softmaxes"]
        rows += [_row("weights", shape, name, value, base) for name, value in medians.items()]
        lines.append(f"| {shape} | {' | '.join(f'{value / base:.2f}' for value in medians.values())} |")
        print(lines[-1], flush=True)
    return lines


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
