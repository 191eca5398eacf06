"""Time of a step of adversarial training against the authors' way of doing it: `make bench`.

A step is five attack steps, with or without adversarial weight perturbation (AWP), the training pass and the
optimizer's step. The authors' step is re-enacted from their scripts: natural logits computed again, with a graph, in
every attack step; the weighted MSE over all pairs of classes; AWP through a copy of the network; default memory format.
The package's step does the same with its own parts, once in the default memory format and once in channels_last.

All methods see the same network, images, labels, class prior and random start, and run in turn, round after round in
shuffled order, in one process. A figure is the median over the rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from evidence import bench
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikl_plugins import IKLLoss
from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation, frozen_statistics, model_mode
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


def problem(classes: int, dtype: torch.dtype = torch.float32, batch: int | None = None) -> Problem:
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
    return Problem(model.to(dtype), images.to(dtype), labels, prior.to(dtype))


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
        marks = [time.perf_counter()]
        images, labels = self.begin(images, labels)
        adversarial = self.attack(images, labels)
        marks.append(time.perf_counter())
        self.perturb(images, adversarial, labels)
        marks.append(time.perf_counter())
        self.backward(images, adversarial, labels)
        marks.append(time.perf_counter())
        self.update()
        marks.append(time.perf_counter())
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
        adversarial = images.detach() + 0.001 * torch.randn(images.shape, dtype=images.dtype)
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
        self.pgd = PGD(
            eps=EPS, steps=STEPS, step_size=STEP_SIZE, random_start="normal", objective=case.objective
        )  # fmt: skip
        self.criterion = IKLLoss(
            alpha=ALPHA, beta=BETA, weight_temperature=PRIOR_TEMPERATURE, global_info=True, num_classes=case.classes
        ).to(start.prior.dtype)
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
            with frozen_statistics(self.model), model_mode(self.criterion, "eval"):
                loss = self._loss(self.model(adversarial), self.model(images), labels)
            self.awp.perturb(self.model, loss)

    def backward(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        loss = self._loss(self.model(adversarial), self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()

    def update(self) -> None:
        if self.awp is not None:
            self.awp.restore()
        self.optimizer.step()

    def _loss(self, adversarial: Tensor, natural: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(natural, labels) + self.criterion(adversarial, natural, labels)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


METHODS: dict[str, Callable[[Problem, Case], Step]] = {
    OFFICIAL: OfficialStep,
    DEFAULT_FORMAT: OurStep,
    CHANNELS_LAST: lambda start, case: OurStep(start, case, torch.channels_last),
}


Times = dict[str, list[dict[str, float]]]  # seconds of each method's parts, round after round


def interleaved(case: Case, start: Problem, seconds: float) -> Times:
    """Steps of all methods in turn, in shuffled order; the first two rounds warm up and do not count."""
    steps = {name: method(start, case) for name, method in METHODS.items()}
    times: Times = {name: [] for name in steps}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS + 2 or time.perf_counter() < end:
        for name in order.sample(list(steps), len(steps)):
            parts = steps[name](start.images, start.labels)
            if rounds >= 2:
                times[name].append(parts)
        rounds += 1
    return times


def median_seconds(times: Times, method: str, part: str) -> float:
    return statistics.median(parts[part] for parts in times[method])


def speed_up(times: Times, method: str, part: str) -> float:
    """How many times faster than the authors' a part is: the median of the rounds' ratios."""
    rounds = zip(times[OFFICIAL], times[method], strict=True)
    return statistics.median(official[part] / ours[part] for official, ours in rounds)


class Deviation(NamedTuple):
    """How far a step's parameter gradients lie from the authors' step's, as norm of the difference / norm."""

    double: float  # whole steps in float64
    rounding: float  # training pass in float32 against the authors' in float64, on the same adversarial images
    single: float  # whole steps in float32, each on its own adversarial images
    pixels: float  # share of the pixels in which the two attacks in float32 end more than half a step apart


def deviations(case: Case) -> dict[str, Deviation]:
    """Compares the gradients that one step of each method hands to the optimizer with those of the authors' step.

    The authors' own row says what the rounding of float32 does to them.
    """
    double, single = (problem(case.classes, dtype, GRADIENT_BATCH) for dtype in (torch.float64, torch.float32))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder for adversarial.csv and adversarial.md"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="least time spent on each case")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    network = f"WRN-{DEPTH}-{WIDTH}, batch {BATCH}, {SIZE}x{SIZE} pixels"
    rows: list[dict[str, object]] = []
    lines = [f"Measured with `make bench`: {bench.describe(args.threads)}; {network}.", ""]
    lines += [f"A training step with {STEPS} attack steps, times faster than the authors' (its time in brackets):", ""]
    lines += [f"| case | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for case in CASES:
        start = problem(case.classes)
        times = interleaved(case, start, args.seconds)
        cells = []
        for name in METHODS:
            cells.append(f"{speed_up(times, name, 'step'):.2f} ({1e3 * median_seconds(times, name, 'step'):.0f} ms)")
            for part in PARTS:
                seconds = median_seconds(times, name, part)
                row = _row("time", case, name) | {"part": part, "seconds": f"{seconds:.6g}"}
                if part != "awp" or case.awp:
                    rows.append(row | {"faster": f"{speed_up(times, name, part):.4f}"})
        lines.append(f"| {case.label} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)

    lines += [
        "",
        "How far parameter gradients lie from those of the authors' step, norm of the difference / norm, at batch "
        f"{GRADIENT_BATCH}.",
        "The attacks follow the signs of gradients from the same random start. Close to the natural images these are",
        "so small that rounding decides some signs in float32, and with them the adversarial images. What rounding",
        "does, to the authors' own step as well, is in the column 'float32, same images', against float64. With",
        "channels last it does more: there PyTorch's batch normalisation in training mode rounds more on a CPU.",
        "",
        "| case | method | float64 | float32, same images | float32 | pixels that end apart in float32 |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for name, (double, rounding, single, pixels) in deviations(case).items():
            cells = [f"{double:.1e}", f"{rounding:.1e}", f"{single:.1e}", f"{100 * pixels:.1f} %"]
            lines.append(f"| {case.label} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            values = zip(Deviation._fields, (double, rounding, single, pixels), strict=True)
            rows.append(_row("gradients", case, name) | {field: f"{value:.3g}" for field, value in values})

    fields = ["kind", "classes", "objective", "awp", "method", "part", "seconds", "faster", *Deviation._fields]
    bench.write_results(args.output, "adversarial", fields, rows, lines)


def _row(kind: str, case: Case, method: str) -> dict[str, object]:
    return {"kind": kind, **case._asdict(), "method": method}


if __name__ == "__main__":
    main()
