"""Time of a step of adversarial training against the authors' way of doing it.

A step is five attack steps, with or without adversarial weight perturbation (AWP), the training pass and the
optimizer's step. The authors' step is re-enacted from their scripts: natural logits computed again, with a graph, in
every attack step; the weighted MSE over all pairs of classes; AWP through a copy of the network; default memory format.
The package's step does the same with its own parts, once in the default memory format and once in channels_last.

All methods see the same network, images, labels, class prior and random start, and run in turn, round after round in
shuffled order, in one process. A figure is the median over the rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence import bench
from evidence.bench import Row
from evidence.device import wait
from evidence.report import narrow_table
from evidence.timing import in_turn, median_ratio
from ikl_plugins import IKLLoss
from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation, frozen_statistics
from ikl_plugins.models.wide_resnet import WideResNet

EPS, STEPS = 8 / 255, 5
STEP_SIZE = EPS / 2
ALPHA, BETA, PRIOR_TEMPERATURE = 4.0, 20.0, 4.0
GAMMA = 0.005
# Low, so that a network that sees one batch of noise a thousand times stays finite; no figure depends on it.
LEARNING_RATE = 0.01

OFFICIAL = "official"
DEFAULT_FORMAT = "ours"
CHANNELS_LAST = "ours, channels_last"


SECONDS = 60.0
CPU = torch.device("cpu")


class Case(NamedTuple):
    """One of the authors' two scripts, with or without AWP."""

    classes: int
    objective: str
    awp: bool

    @property
    def label(self) -> str:
        return f"{self.classes} classes, {self.objective}, AWP {'on' if self.awp else 'off'}"


CASES = [
    Case(classes, objective, awp)
    for classes, objective in ((10, "soft_cross_entropy"), (100, "ikl"))
    for awp in (False, True)
]
DEPTH, WIDTH, BATCH, SIZE = 10, 2, 128, 32
LEAST_ROUNDS = 7
GRADIENT_BATCH = 32  # where gradients are compared; convolutions in float64 are slow


class Problem(NamedTuple):
    """What all methods start from."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    prior: Tensor  # (C, C), one row a class


def problem(
    classes: int, dtype: torch.dtype = torch.float32, batch: int | None = None, device: torch.device = CPU
) -> Problem:
    """A network whose normalisation has seen data, a batch, a class prior that is not uniform."""
    torch.manual_seed(classes)
    batch = BATCH if batch is None else batch
    model = WideResNet(DEPTH, WIDTH, classes)
    images = torch.rand(batch, 3, SIZE, SIZE)
    with torch.no_grad():
        for _ in range(20):
            model(images)
    labels = torch.arange(batch) % classes
    prior = torch.softmax(torch.randn(classes, classes) + 3 * torch.eye(classes), 1)
    return Problem(model.to(device, dtype), images.to(device, dtype), labels.to(device), prior.to(device, dtype))


PARTS = ("step", "attack", "awp", "training", "update")


class Step:
    """A step of adversarial training in its parts; a subclass says how each is done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def begin(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as this method wants it."""
        return images, labels

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """The adversarial images."""
        raise NotImplementedError

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """AWP, where it is on."""
        raise NotImplementedError

    def backward(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Forward and backward of the training loss, adversarial images first: leaves the gradients."""
        raise NotImplementedError

    def update(self) -> None:
        """The optimizer's step, and the perturbation's end."""
        raise NotImplementedError

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One step; the seconds that its parts took."""
        marks: list[float] = []

        def mark() -> None:
            wait(images.device)
            marks.append(time.perf_counter())

        mark()
        images, labels = self.begin(images, labels)
        adversarial = self.attack(images, labels)
        mark()
        self.perturb(images, adversarial, labels)
        mark()
        self.backward(images, adversarial, labels)
        mark()
        self.update()
        mark()
        spans = [end - start for start, end in itertools.pairwise(marks)]
        return dict(zip(PARTS, [sum(spans), *spans], strict=True))


class OfficialStep(Step):
    """The authors' step, re-enacted."""

    def __init__(self, start: Problem, case: Case) -> None:
        self.model = copy.deepcopy(start.model)
        self.optimizer = _optimizer(self.model)
        self.awp = case.awp
        self.proxy = copy.deepcopy(start.model)
        self.proxy_optimizer = torch.optim.SGD(self.proxy.parameters(), lr=LEARNING_RATE)
        self.attack_beta = 1.0 if case.objective == "ikl" else 0.0
        self.prior = start.prior
        self.collected = torch.zeros_like(start.prior)
        self.difference: dict[str, Tensor] = {}
        self.weights = torch.empty(0)
        self.onehot = torch.empty(0)

    def begin(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.onehot = F.one_hot(labels, self.prior.shape[0]).to(images.dtype)
            rows = self.onehot @ self.prior
            self.weights = rows[:, :, None] @ rows[:, None, :]
        return images, labels

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        self.model.eval()
        adversarial = images.detach() + 0.001 * torch.randn(images.shape, dtype=images.dtype, device=images.device)
        for _ in range(STEPS):
            adversarial.requires_grad_()
            loss = self._robust(self.model(images), self.model(adversarial), 1.0, self.attack_beta)
            (gradient,) = torch.autograd.grad(loss, [adversarial])
            adversarial = adversarial.detach() + STEP_SIZE * torch.sign(gradient.detach())
            adversarial = torch.min(torch.max(adversarial, images - EPS), images + EPS)
            adversarial = torch.clamp(adversarial, 0.0, 1.0)
        self.model.train()
        return adversarial

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        if not self.awp:
            return
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        natural_logits, adversarial_logits = self.proxy(images), self.proxy(adversarial)
        robust = self._robust(natural_logits, adversarial_logits, ALPHA, BETA)
        loss = -1.0 * (F.cross_entropy(natural_logits, labels) + robust)
        self.proxy_optimizer.zero_grad()
        loss.backward()
        self.proxy_optimizer.step()
        moved = self.proxy.state_dict()
        self.difference = {}
        for name, weight in self.model.state_dict().items():
            if weight.dim() > 1 and "weight" in name:
                change = moved[name] - weight
                self.difference[name] = weight.norm() / (change.norm() + 1e-20) * change
        self._move(GAMMA)

    def backward(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        adversarial_logits, natural_logits = self.model(adversarial), self.model(images)
        with torch.no_grad():
            self.collected = self.collected + self.onehot.t() @ F.softmax(natural_logits / PRIOR_TEMPERATURE, 1)
        robust = self._robust(natural_logits, adversarial_logits, ALPHA, BETA)
        loss = F.cross_entropy(natural_logits, labels) + robust
        self.optimizer.zero_grad()
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        if self.awp:
            self._move(-GAMMA)

    def _robust(self, natural: Tensor, adversarial: Tensor, alpha: float, beta: float) -> Tensor:
        """IKL as the paper writes it, over (N, C, C) pairs; formed whatever its weight."""
        natural_gaps = natural[:, :, None] - natural[:, None, :]
        adversarial_gaps = adversarial[:, :, None] - adversarial[:, None, :]
        mse = 0.25 * (torch.pow(natural_gaps - adversarial_gaps, 2) * self.weights).sum() / len(natural)
        soft = -(F.softmax(natural, 1).detach() * F.log_softmax(adversarial, 1)).sum(1).mean()
        return beta * mse + alpha * soft

    @torch.no_grad()
    def _move(self, factor: float) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.difference:
                parameter.add_(factor * self.difference[name])


class OurStep(Step):
    """The same step with the parts of the package."""

    def __init__(
        self, start: Problem, case: Case, memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.memory_format = memory_format
        self.model = copy.deepcopy(start.model).to(memory_format=memory_format)
        self.optimizer = _optimizer(self.model)
        self.pgd = PGD(eps=EPS, steps=STEPS, step_size=STEP_SIZE, random_start="normal", objective=case.objective)
        self.criterion = IKLLoss(
            alpha=ALPHA, beta=BETA, weight_temperature=PRIOR_TEMPERATURE, global_info=True, num_classes=case.classes
        ).to(start.prior)
        self.prior = self.criterion.class_prior
        if self.prior is None:
            raise RuntimeError("IKLLoss made no class prior")
        self.prior.matrix.copy_(start.prior)
        self.awp = AdversarialWeightPerturbation(gamma=GAMMA) if case.awp else None

    def begin(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.contiguous(memory_format=self.memory_format), labels

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.pgd(self.model, images, labels=labels, class_prior=self.prior.prior(labels))

    def perturb(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        if self.awp is not None:
            # Neither the running statistics nor the class prior may count this pass.
            with frozen_statistics(self.model):
                loss = self._loss(self.model(adversarial), self.model(images), labels, observe=False)
            self.awp.perturb(self.model, loss)

    def backward(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        loss = self._loss(self.model(adversarial), self.model(images), labels, observe=True)
        self.optimizer.zero_grad()
        loss.backward()

    def update(self) -> None:
        if self.awp is not None:
            self.awp.restore()
        self.optimizer.step()

    def _loss(self, adversarial: Tensor, natural: Tensor, labels: Tensor, *, observe: bool) -> Tensor:
        return F.cross_entropy(natural, labels) + self.criterion(adversarial, natural, labels, observe=observe)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


METHODS: dict[str, Callable[[Problem, Case], Step]] = {
    OFFICIAL: OfficialStep,
    DEFAULT_FORMAT: OurStep,
    CHANNELS_LAST: lambda start, case: OurStep(start, case, torch.channels_last),
}


Times = dict[str, list[dict[str, float]]]  # seconds of each method's parts, round after round


def interleaved(case: Case, start: Problem, seconds: float) -> Times:
    """Steps of all methods in turn."""
    steps = {name: partial(method(start, case), start.images, start.labels) for name, method in METHODS.items()}
    return in_turn(steps, seconds, least=LEAST_ROUNDS)


def part_of(times: Times, method: str, part: str) -> tuple[float, float]:
    """Median seconds of a part, and how many times faster than the authors' it is."""
    official, ours = ([parts[part] for parts in times[name]] for name in (OFFICIAL, method))
    return statistics.median(ours), median_ratio(official, ours)


class Deviation(NamedTuple):
    """How far a step's parameter gradients lie from the authors' step's, as norm of the difference / norm."""

    double: float  # whole steps in float64
    rounding: float  # training pass in float32 against the authors' in float64, on the same adversarial images
    single: float  # whole steps in float32, each on its own adversarial images
    pixels: float  # share of the pixels in which the two attacks in float32 end more than half a step apart


def deviations(case: Case, device: torch.device = CPU) -> dict[str, Deviation]:
    """Compares the gradients that one step of each method hands to the optimizer with those of the authors' step.

    The authors' own row says what the rounding of float32 does to them.
    """
    double, single = (problem(case.classes, dtype, GRADIENT_BATCH, device) for dtype in (torch.float64, torch.float32))
    exact, exact_images = gradients(METHODS[OFFICIAL](double, case), double)
    rounded, rounded_images = gradients(METHODS[OFFICIAL](single, case), single)
    found = {}
    for name, method in METHODS.items():
        own, images = gradients(method(single, case), single)
        found[name] = Deviation(
            relative(gradients(method(double, case), double)[0], exact),
            relative(gradients(method(single, case), single, exact_images.float())[0].double(), exact),
            relative(own, rounded),
            ((images - rounded_images).abs() > STEP_SIZE / 2).double().mean().item(),
        )
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradients(step: Step, start: Problem, adversarial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The parameter gradients of a new step's training pass, in one vector, and the adversarial images that it saw."""
    torch.manual_seed(0)  # of the random start
    images, labels = step.begin(start.images, start.labels)
    if adversarial is None:
        adversarial = step.attack(images, labels)
    step.perturb(images, adversarial, labels)
    step.backward(images, adversarial, labels)
    found = [parameter.grad for parameter in step.model.parameters()]
    return torch.cat([gradient.reshape(-1) for gradient in found if gradient is not None]), adversarial


def measure(seconds: float, device: torch.device) -> Iterator[Row]:
    """Rows of the CSV file."""
    for case in CASES:
        times = interleaved(case, problem(case.classes, device=device), seconds)
        for name in METHODS:
            for part in PARTS:
                if part != "awp" or case.awp:
                    spent, faster = part_of(times, name, part)
                    figures = {"seconds": f"{spent:.6g}", "faster": f"{faster:.4f}"}
                    yield {"kind": "time", **case._asdict(), "method": name, "part": part, **figures}
    for case in CASES:
        for name, deviation in deviations(case, device).items():
            figures = {field: f"{value:.3g}" for field, value in deviation._asdict().items()}
            yield {"kind": "gradients", **case._asdict(), "method": name, **figures}


def render(rows: list[Row]) -> str:
    """The tables from the rows of the CSV file."""

    def label(row: Row) -> str:
        return Case(int(row["classes"]), row["objective"], row["awp"] == "True").label

    def cell(row: Row) -> str:
        return f"{float(row['faster']):.2f} ({1e3 * float(row['seconds']):.0f} ms)"

    steps = bench.by_kind([row for row in rows if row["part"] == "step"], label)["time"]
    names = list(next(iter(steps.values())))
    apart = [
        [
            case,
            name,
            *(f"{float(row[field]):.1e}" for field in ("double", "rounding", "single")),
            f"{100 * float(row['pixels']):.1f} %",
        ]
        for case, line in bench.by_kind(rows, label)["gradients"].items()
        for name, row in line.items()
    ]
    header = ["case", "method", "float64", "float32, same images", "float32", "pixels that end apart in float32"]
    return "\n\n".join(
        [
            f"{bench.describe(rows[0])}; WRN-{DEPTH}-{WIDTH}, batch {BATCH}, {SIZE}x{SIZE} pixels.",
            f"A training step with {STEPS} attack steps, times faster than the authors' (its time in brackets):",
            narrow_table(["case", *names], [[case, *map(cell, line.values())] for case, line in steps.items()]),
            _READING.format(batch=GRADIENT_BATCH),
            narrow_table(header, apart),
        ]
    )


_READING = """\
How far parameter gradients lie from those of the authors' step, norm of the difference / norm, at batch {batch}.
The attacks follow the signs of gradients from the same random start. Close to the natural images these are
so small that rounding decides some signs in float32, and with them the adversarial images. What rounding
does, to the authors' own step as well, is in the column 'float32, same images', against float64. With
channels last it does more: there PyTorch's batch normalisation in training mode rounds more on a CPU."""
