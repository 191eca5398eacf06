"""Time and memory of the losses against the KL divergence they replace.

Each shape's methods run in turn, round after round, in one process; a figure is the median over the rounds, and ratios
are taken between medians of the same run. The pairwise form alone has rounds of its own: what it leaves in the caches
would treble the time of the next one. Peak memory is measured in a process of its own for each method.

On a device (`--device cuda`) time is that between two events of the stream, for each dtype, and peak memory that of
torch's allocator.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evidence import bench
from evidence import device as on
from evidence.bench import Row
from evidence.report import narrow_table
from evidence.timing import in_turn, timed
from ikl_plugins import _fused, dkl_loss, gkl_loss, ikl_loss, native
from ikl_plugins._composed import composed_loss
from ikl_plugins.functional import gkl_settings, ikl_settings

Loss = Callable[[Tensor, Tensor], Tensor]

SECONDS = 10.0
SHAPES = [
    (128, 100),
    (512, 100),
    (64, 1000),
    (512, 1000),
    (64, 10000),
    (128, 21841),
    (64, 32000),
    (16, 128256),
    (128, 128256),
]
PAIRWISE_SHAPE = (64, 1000)
LINEAR_ROWS = 64
LINEAR_CLASSES = [1000, 4008, 16032, 64128, 128256]
MEMORY_SHAPE = (256, 32000)
STEP_SHAPES = [(128, 100), (512, 1000), (64, 32000)]


# --- what is compared ------------------------------------------------------------------------------------------------


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

# What each step towards the shipped losses gave; all at temperature 4, in both terms.
STEP_TEMPERATURE = 4.0
COMPILED = "plain code through torch.compile"


def in_one_block(loss: Loss) -> Loss:
    """The fused rows all at once, whatever their number."""

    def loss_in_one_block(student: Tensor, teacher: Tensor) -> Tensor:
        shipped = _fused._BLOCK_ELEMENTS_CPU
        _fused._BLOCK_ELEMENTS_CPU = 2**62
        try:
            return loss(student, teacher)
        finally:
            _fused._BLOCK_ELEMENTS_CPU = shipped

    return loss_in_one_block


_shipped = partial(ikl_loss, temperature=STEP_TEMPERATURE, weight_temperature=STEP_TEMPERATURE)
# A temperature that differs in its last digit keeps the soft labels from serving as weights.
_weights_apart = partial(
    ikl_loss, temperature=STEP_TEMPERATURE, weight_temperature=STEP_TEMPERATURE * (1 + sys.float_info.epsilon)
)
_linear_form = partial(composed, temperature=STEP_TEMPERATURE)

STEPS: dict[str, Loss] = {
    "KL": lambda student, teacher: kl(student / STEP_TEMPERATURE, teacher / STEP_TEMPERATURE),
    "linear form, plain code": _linear_form,
    COMPILED: torch.compile(_linear_form, dynamic=False, fullgraph=True),
    "analytic gradient, in place": in_one_block(_weights_apart),
    "in blocks that fit the cache": _weights_apart,
    "one softmax less (shipped)": _shipped,
    "C++ operator": by_operator(_shipped),
}

WEIGHTS_GAMMA = 0.5


def shipped_weights(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """GKL's weights and their mass as the fused rows make them, from one log-softmax."""
    settings = gkl_settings(
        alpha=1.0,
        beta=1.0,
        temperature=1.0,
        weight_temperature=STEP_TEMPERATURE,
        gamma=WEIGHTS_GAMMA,
        reduction="batchmean",
    )
    weights, work = torch.empty_like(teacher), torch.empty_like(teacher)
    operands = _fused.Operands(
        student=teacher, teacher=teacher, class_prior=None, weights=weights, work=work, spare=work
    )
    mass = _fused.class_weights(operands, settings, out=weights)
    if mass is None:
        raise RuntimeError("GKL's weights have lost their mass")
    return weights, mass.exp_()


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


# --- measuring -------------------------------------------------------------------------------------------------------

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


def medians(methods: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    found = in_turn(methods, seconds, least=5, most=2000)
    return {name: statistics.median(values) for name, values in found.items()}


def loss_seconds(methods: Mapping[str, Loss], shape: tuple[int, int], seconds: float) -> dict[str, float]:
    """Median seconds of forward and backward for each method, the student alone with a gradient."""
    student, teacher = logits(*shape)

    def stepped(loss: Loss) -> float:
        leaf = student.clone().requires_grad_()
        return timed(lambda: loss(leaf, teacher).backward())()

    return medians({name: partial(stepped, loss) for name, loss in methods.items()}, seconds)


def weights_seconds(shape: tuple[int, int], seconds: float) -> dict[str, float]:
    """Median seconds of GKL's weights, made in two ways."""
    _, teacher = logits(*shape)
    return medians({name: timed(partial(way, teacher)) for name, way in WEIGHTS.items()}, seconds)


def peak(name: str) -> float:
    """Peak resident memory of one forward and backward above the inputs, in logits tensors. Run in a fresh process."""
    torch.set_num_threads(2)
    loss = METHODS[name]
    small = torch.randn(64, 64, requires_grad=True)
    loss(small, torch.randn(64, 64)).backward()
    student, teacher = logits(*MEMORY_SHAPE)
    student.requires_grad_()
    # Pages that the C library has got back and keeps would hide what the loss takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the kernel keeps
    before = bench.status("VmRSS")
    loss(student, teacher).backward()
    return (bench.status("VmHWM") - before) * 1024 / (student.numel() * student.element_size())


def import_seconds() -> float:
    """Median time that `import ikl_plugins` adds to a process that has imported torch."""
    code = "import time, torch; s = time.perf_counter(); import ikl_plugins; print(time.perf_counter() - s)"
    return statistics.median(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(7))


# --- on a device -----------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kl_under_autocast(student: Tensor, teacher: Tensor) -> Tensor:
    """KL with both softmaxes in float32, as autocast has them."""
    wide = torch.float32
    predictions, labels = torch.log_softmax(student, 1, dtype=wide), torch.softmax(teacher, 1, dtype=wide)
    return F.kl_div(predictions, labels, reduction="batchmean")


def device_methods(device: torch.device, prior: Tensor) -> dict[str, tuple[str, Loss]]:
    """The losses by their names in the table, and the way that each goes."""
    found: dict[str, tuple[str, Loss]] = {"KL": (on.WALK, kl_under_autocast)}
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        print("Without Liger-Kernel, which is not installed", flush=True)
    else:
        liger = LigerKLDIVLoss(reduction="batchmean")
        found["KL, Liger-Kernel"] = (
            on.WALK,
            lambda student, teacher: liger(
                torch.log_softmax(student, 1, dtype=torch.float32), torch.softmax(teacher, 1, dtype=torch.float32)
            ),
        )
    found["IKL composed"] = on.WALK, composed
    for way in on.ways(device):
        for name in ("IKL", "IKL temperature 4", "DKL", "GKL gamma 0.5"):
            found[f"{name}, {way}"] = way, METHODS[name]
        found[f"IKL class prior, {way}"] = way, partial(ikl_loss, class_prior=prior)
    return found


def measure_on(seconds: float, device: torch.device) -> Iterator[Row]:
    """Time and peak memory of forward and backward on a device, the student alone with a gradient."""
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        student, teacher = (side.to(device, dtype) for side in logits(*shape))
        methods = device_methods(device, torch.softmax(teacher.float(), 1))

        def step(loss: Loss, student: Tensor = student, teacher: Tensor = teacher) -> None:
            loss(student.clone().requires_grad_(), teacher).backward()

        def stepped(way: str, loss: Loss, step: Callable[[Loss], None] = step) -> float:
            with on.going(way):
                return on.timed_on(device, partial(step, loss))()

        found = medians({name: partial(stepped, *method) for name, method in methods.items()}, seconds)
        for name, (way, loss) in methods.items():
            row: Row = {"kind": "device", "dtype": str(dtype).removeprefix("torch."), "rows": shape[0]}
            row |= {"classes": shape[1], "method": name, "seconds": f"{found[name]:.6g}"}
            row |= {"ratio": f"{found[name] / found['KL']:.4f}"}
            if device.type == "cuda":
                with on.going(way):
                    peak_bytes = on.peak_bytes(device, partial(step, loss))
                row["logits_tensors"] = f"{peak_bytes / (student.numel() * student.element_size()):.3f}"
            yield row


def render_device(rows: list[Row]) -> str:
    """The tables of a device from the rows of the CSV file."""
    found = bench.by_kind(rows, lambda row: f"{row['dtype']} ({row['rows']}, {row['classes']})")["device"]
    names = list(next(iter(found.values())))

    def table(cell: Callable[[Row], str]) -> str:
        return narrow_table(["logits", *names], [[key, *map(cell, line.values())] for key, line in found.items()])

    parts = [
        f"{bench.describe(rows[0])}.",
        "Forward and backward, relative to KL (milliseconds in brackets):",
        table(lambda row: f"{float(row['ratio']):.2f} ({1e3 * float(row['seconds']):.3f})"),
    ]
    if "logits_tensors" in rows[0]:
        parts += [
            "Peak memory above the inputs, in logits tensors (the copied student and its gradient are 2):",
            table(lambda row: f"{float(row['logits_tensors']):.2f}"),
        ]
    return "\n\n".join(parts)


def measure(seconds: float, device: torch.device) -> Iterator[Row]:
    """Rows of the CSV file."""
    if device.type != "cpu":
        yield from measure_on(seconds, device)
        return
    warm_heap()
    built = bench.can_build()
    methods = {name: METHODS[name] for name in bench.runnable(METHODS, built=built)}
    # torch.compile needs the compiler that the operator needs
    steps = {name: STEPS[name] for name in bench.runnable(STEPS, built=built) if built or name != COMPILED}

    def rows(kind: str, shape: tuple[int, int], found: dict[str, float], base: str | None) -> Iterator[Row]:
        for name, value in found.items():
            row: Row = {"kind": kind, "rows": shape[0], "classes": shape[1], "method": name, "seconds": f"{value:.6g}"}
            yield row if base is None else {**row, "ratio": f"{value / found[base]:.4f}"}

    for shape in SHAPES:
        yield from rows("time", shape, loss_seconds(methods, shape, seconds), "KL")
    apart: dict[str, float] = {}
    for method in ({"IKL": ikl_loss}, {"pairwise": pairwise}):
        apart |= loss_seconds(method, PAIRWISE_SHAPE, seconds / 2)
    yield from rows("pairwise", PAIRWISE_SHAPE, apart, "IKL")
    for classes in LINEAR_CLASSES:
        shape = (LINEAR_ROWS, classes)
        yield from rows("linear", shape, loss_seconds({"IKL": ikl_loss}, shape, seconds / 5), None)
    if Path("/proc/self/clear_refs").exists():
        for name in methods:
            tensors = f"{bench.peak_of('losses', name, runs=3):.3f}"
            place = {"rows": MEMORY_SHAPE[0], "classes": MEMORY_SHAPE[1]}
            yield {"kind": "memory", **place, "method": name, "logits_tensors": tensors}
    for shape in STEP_SHAPES:
        yield from rows("step", shape, loss_seconds(steps, shape, seconds), "KL")
    for shape in STEP_SHAPES:
        yield from rows("weights", shape, weights_seconds(shape, seconds / 5), next(iter(WEIGHTS)))
    yield {"kind": "import", "method": "import ikl_plugins", "seconds": f"{import_seconds():.6g}"}


# --- telling ---------------------------------------------------------------------------------------------------------


def render(rows: list[Row]) -> str:
    """The tables from the rows of the CSV file."""
    if rows[0]["kind"] == "device":
        return render_device(rows)
    kinds = bench.by_kind(rows, lambda row: f"({row['rows']}, {row['classes']})")

    def ratios(kind: str) -> str:
        table = kinds[kind]
        names = list(next(iter(table.values())))
        cells = [[shape, *(f"{float(line[name]['ratio']):.2f}" for name in names)] for shape, line in table.items()]
        if kind == "time":
            for line in cells:
                line[1] = f"1 ({1e3 * float(table[line[0]]['KL']['seconds']):.2f} ms)"
        return narrow_table(["shape", *names], cells)

    ((pairwise_shape, compared),) = kinds["pairwise"].items()
    linear = [line["IKL"] for line in kinds["linear"].values()]
    nanoseconds = [1e9 * float(row["seconds"]) / (int(row["rows"]) * int(row["classes"])) for row in linear]
    (imported,) = (line["import ikl_plugins"] for line in kinds["import"].values())
    parts = [
        f"{bench.describe(rows[0])}.",
        "Forward and backward, relative to KL (its time in brackets):",
        ratios("time"),
        f"Pairwise form against IKL at {pairwise_shape}: {float(compared['pairwise']['ratio']):.0f} times.",
        f"IKL at {linear[0]['rows']} rows, nanoseconds an element:",
        narrow_table([f"C = {row['classes']}" for row in linear], [[f"{value:.2f}" for value in nanoseconds]]),
    ]
    for shape, line in kinds.get("memory", {}).items():
        parts += [
            f"Peak memory above the inputs at {shape}, in logits tensors (the gradient is 1):",
            narrow_table(list(line), [[f"{float(row['logits_tensors']):.2f}" for row in line.values()]]),
        ]
    parts += [
        f"Steps towards the shipped IKL, temperature {STEP_TEMPERATURE:g} in both terms, relative to KL:",
        ratios("step"),
        f"GKL's weights and their mass, gamma {WEIGHTS_GAMMA}, relative to the first way:",
        ratios("weights"),
        f"`import ikl_plugins` after `import torch`: {1e3 * float(imported['seconds']):.0f} ms.",
    ]
    return "\n\n".join(parts)
