"""Which settings of the losses to begin with: weak students of four data sets, teachers of three confidences.

    ikl data cifar10-folder --from ZIP...      # CIFAR-10 as JPEG files, see docs/results.md
    pip install plotnine                       # for its file of 53,940 diamonds
    python tools/choosing.py                   # trains, half an hour of one core; tables into docs/choosing.md
    python tools/choosing.py --check           # tables and presets are those of docs/results/choosing.json

Settings are compared on validation data with one seed; what the page shows are other seeds and the test data. A run
that was interrupted goes on where it was. `--quick` trains a few students on digits, which checks the machinery.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.cache import data_folder, ended_by_signals, exclusive, read_json, remembered, versions, write_json
from evidence.choosing_report import PAGE, RECORD, check, chosen, page, start_setting, tables
from evidence.report import settle
from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import PRESETS

Rows = dict[str, tuple[Tensor, Tensor]]
Result = dict[str, Any]
Setting = dict[str, Any]  # loss (None: cross entropy alone), its keywords, ce_weight of the labels (1 by default)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {  # and rates to choose from
    "SGD": (functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4), (0.03, 0.1, 0.3)),
    "Adam": (torch.optim.Adam, (0.003, 0.01, 0.03)),
}
CONFIDENCES = {"soft": 1 / 3, "calibrated": 1.0, "overconfident": 3.0}  # factor of the calibrated logits
SEARCH_SEED = 0
TEST_SEEDS = (1, 2, 3)
EARLY = 100  # batches, of which the ratio of the two terms is recorded


class Task(NamedTuple):
    """A data set, a network that teaches and one that is too small."""

    rows: Callable[[], Rows]
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    classes: int
    epochs: int
    teacher_epochs: int
    batch: int


# --- data: inputs and labels of 'teacher', 'train', 'validation' and 'test' -------------------------------------------


def _parts(inputs: Tensor, labels: Tensor, sizes: dict[str, int]) -> Rows:
    """Disjoint rows, but for those of 'train', which the teacher has seen as well."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled, found, begin = (inputs[order], labels[order]), {}, 0
    for name, size in sizes.items():
        found[name] = (shuffled[0][begin : begin + size], shuffled[1][begin : begin + size])
        begin += size
    found["teacher"] = tuple(torch.cat(both) for both in zip(found["train"], found.pop("more"), strict=True))
    mean, deviation = found["teacher"][0].mean(0), found["teacher"][0].std(0) + 1e-3
    return {name: ((rows - mean) / deviation, targets) for name, (rows, targets) in found.items()}


def _digits() -> Rows:
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    sizes = {"train": 900, "more": 0, "validation": 300, "test": 597}
    return _parts(torch.tensor(inputs).float(), torch.tensor(labels), sizes)


def _numbers() -> Rows:
    """Two digits side by side: a hundred classes."""
    found = {}
    for seed, (name, (inputs, labels)) in enumerate(_digits().items()):
        size = {"train": 3000, "validation": 2000, "test": 5000, "teacher": 9000}[name]
        left, right = torch.randint(len(labels), (2, size), generator=torch.Generator().manual_seed(seed))
        found[name] = torch.cat([inputs[left], inputs[right]], 1), 10 * labels[left] + labels[right]
    return found


def _diamonds() -> Rows:
    """The clarity of a diamond, of eight grades, from its price, size, cut and colour."""
    spec = importlib.util.find_spec("plotnine")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "choosing: plotnine must be installed, whose package has the diamonds. Run: pip install plotnine"
        )
    path = Path(spec.submodule_search_locations[0], "data", "diamonds.csv")
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    columns = [torch.tensor([float(row[name]) for row in records]) for name in ("carat", "price")]
    columns = [column.log() for column in columns]
    columns += [torch.tensor([float(row[name]) for row in records]) for name in ("depth", "table", "x", "y", "z")]
    for name in ("cut", "color"):
        kinds = sorted({row[name] for row in records})
        columns += [torch.tensor([float(row[name] == kind) for row in records]) for kind in kinds]
    kinds = sorted({row["clarity"] for row in records})
    labels = torch.tensor([kinds.index(row["clarity"]) for row in records])
    return _parts(torch.stack(columns, 1), labels, {"train": 6000, "more": 24000, "validation": 4000, "test": 10000})


def _cifar10() -> Rows:
    """CIFAR-10 at half its resolution."""
    import numpy as np
    from PIL import Image

    inputs, labels = [], []
    for label, folder in enumerate(sorted(path for path in (data_folder() / "train").iterdir() if path.is_dir())):
        for path in sorted(folder.iterdir())[:3000]:
            with Image.open(path) as image:
                inputs.append(torch.from_numpy(np.array(image.convert("RGB").reduce(2))))
            labels.append(label)
    sizes = {"train": 4000, "more": 16000, "validation": 3000, "test": 7000}
    return _parts(torch.stack(inputs).permute(0, 3, 1, 2).float(), torch.tensor(labels), sizes)


def _perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _wide() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def _narrow() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


TASKS = {
    "digits": Task(_digits, lambda: _perceptron(64, 256, 10), lambda: _perceptron(64, 6, 10), 10, 6, 40, 50),
    "numbers": Task(_numbers, lambda: _perceptron(128, 256, 100), lambda: _perceptron(128, 24, 100), 100, 6, 15, 100),
    "diamonds": Task(_diamonds, lambda: _perceptron(19, 256, 256, 8), lambda: _perceptron(19, 12, 8), 8, 6, 15, 128),
    "cifar10": Task(_cifar10, _wide, _narrow, 10, 6, 8, 128),
}


# --- training --------------------------------------------------------------------------------------------------------


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


def fit(
    model: nn.Module,
    rows: tuple[Tensor, Tensor],
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch: int,
    optimizer: torch.optim.Optimizer,
    end_epoch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Trains with a cosine schedule; ``objective`` takes logits and the indices of the batch's rows."""
    inputs, labels = rows
    steps = len(labels) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for index in torch.randperm(len(labels))[: steps * batch].split(batch):
            loss = objective(model(inputs[index]), index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        end_epoch()
    return model.eval()


def teacher_logits(task: Task, rows: Rows) -> tuple[Tensor, dict[str, float]]:
    """Calibrated logits of the student's training rows, and accuracies of the teacher."""
    torch.manual_seed(SEARCH_SEED)
    labels = rows["teacher"][1]

    def objective(logits: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels[index])

    model = task.teacher()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    fit(model, rows["teacher"], objective, epochs=task.teacher_epochs, batch=128, optimizer=optimizer)
    with torch.no_grad():
        logits = {name: model(rows[name][0]) for name in ("train", "validation", "test")}
    candidates = [10 ** (step / 20) for step in range(-20, 21)]
    losses = [F.cross_entropy(logits["validation"] / t, rows["validation"][1]).item() for t in candidates]
    temperature = candidates[losses.index(min(losses))]
    found = {name: accuracy(logits[name], rows[name][1]) for name in logits}
    return logits["train"] / temperature, {**found, "temperature": temperature}


class Condition(NamedTuple):
    """Where a setting is tried."""

    task: str
    optimizer: str
    confidence: str  # of the teacher


def student_result(
    task: Task, rows: Rows, teacher: Tensor, setting: Setting, *, optimizer: str, rate: float, seed: int, part: str
) -> Result:
    """Accuracy of a student on a part of the rows, and the weighted MSE in parts of the soft cross entropy."""
    torch.manual_seed(seed)
    model, labels = task.student(), rows["train"][1]
    keywords = {name: value for name, value in setting.items() if name not in ("loss", "ce_weight")}
    weight = setting.get("ce_weight", 1.0)
    criterion = setting["loss"] and LOSSES[setting["loss"]](**{**keywords, "num_classes": task.classes})
    terms: list[tuple[Tensor, Tensor]] = []

    def objective(logits: Tensor, index: Tensor) -> Tensor:
        loss = weight * F.cross_entropy(logits, labels[index])
        if criterion:
            loss = loss + criterion(logits, teacher[index], labels[index])
            if len(terms) < EARLY:
                terms.append(criterion.last_terms)
        return loss

    end_epoch = criterion.end_epoch if criterion else lambda: None
    steps = OPTIMIZERS[optimizer][0](model.parameters(), lr=rate)
    fit(model, rows["train"], objective, epochs=task.epochs, batch=task.batch, optimizer=steps, end_epoch=end_epoch)
    with torch.no_grad():
        found = {"accuracy": accuracy(model(rows[part][0]), rows[part][1])}
    if terms:
        mse, cross_entropy = (float(sum(column)) for column in zip(*terms, strict=True))
        ratio = mse / cross_entropy if cross_entropy else math.inf
        found["ratio"] = ratio if math.isfinite(ratio) else None  # it diverged
    return found


# --- settings --------------------------------------------------------------------------------------------------------

_WEIGHTS = ((1.0, False), (4.0, False), (100.0, False), (1.0, True), (4.0, True))  # weight_temperature, global_info


def searched() -> dict[str, list[Setting]]:
    """What is compared on validation data, by the name of the loss."""
    weights = [{"weight_temperature": t, "global_info": prior} for t, prior in _WEIGHTS]
    powers = [{"gamma": gamma, **weights[index]} for gamma in (0.2, 0.5) for index in (0, 4)]
    common = [
        {"alpha": alpha, "beta": beta, "temperature": 4.0} for alpha, beta in product((1.0, 4.0, 16.0), (0.1, 0.5, 2.0))
    ]
    kl = [(share * temperature**2, temperature) for share, temperature in product((0.25, 1.0, 4.0), (1.0, 2.0, 4.0))]
    found = {
        "DKLLoss": [{"alpha": weight, "beta": weight, "temperature": temperature} for weight, temperature in kl],
        "IKLLoss": [{**one, **two} for one, two in product(common, weights)],
        "GKLLoss": [{**one, **two} for one, two in product(common, [{"gamma": 0.0}, *powers])],
    }
    return {loss: [{"loss": loss, **setting} for setting in settings] for loss, settings in found.items()}


def shown(starts: dict[str, Setting]) -> dict[str, Setting]:
    """What is tried on test data, by its name in the table: the starts, and each of their knobs set otherwise."""
    ikl, gkl = starts["IKLLoss"], starts["GKLLoss"]
    alpha, beta = ikl["alpha"], ikl["beta"]
    published = {"loss": "IKLLoss", **PRESETS["cifar100_distillation-ikl"].keywords}
    return {
        "labels alone": {"loss": None},
        "KD: DKL, alpha and beta 16, temperature 4": {
            "loss": "DKLLoss",
            "alpha": 16.0,
            "beta": 16.0,
            "temperature": 4.0,
        },
        "**DKL, start**": starts["DKLLoss"],
        "**IKL, start**": ikl,
        f"alpha {alpha / 4:g}": {**ikl, "alpha": alpha / 4},
        f"alpha {4 * alpha:g}": {**ikl, "alpha": 4 * alpha},
        "beta 0": {**ikl, "beta": 0.0},
        f"beta {beta / 5:g}": {**ikl, "beta": beta / 5},
        f"beta {8 * beta:g}": {**ikl, "beta": 8 * beta},
        "temperature 1": {**ikl, "temperature": 1.0},
        "weight_temperature 1": {**ikl, "weight_temperature": 1.0},
        "weight_temperature 100": {**ikl, "weight_temperature": 100.0},
        "global_info=True": {**ikl, "global_info": True},
        "without the labels' cross entropy": {**ikl, "ce_weight": 0.0},
        "cifar100_distillation": published,
        "**GKL, start**": gkl,
        "gamma 0": {**gkl, "gamma": 0.0},
        "gamma 1": {**gkl, "gamma": 1.0},
    }


# --- all of it -------------------------------------------------------------------------------------------------------


class Trials:
    """Trains students under some conditions; what has a result in the folder is not trained again."""

    def __init__(self, folder: Path, names: Iterable[str], say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.rows = {name: TASKS[name].rows() for name in names}
        self.logits: dict[str, Tensor] = {}
        self.facts: dict[str, dict[str, float]] = {}
        self.rates: dict[str, dict[str, float]] = {}
        for name in self.rows:
            asked = [name, TASKS[name].teacher_epochs]
            self.facts[name] = remembered(folder / name / "teacher", asked, functools.partial(self._teach, name))[0]
            self.logits[name] = torch.load(folder / name / "logits.pt", weights_only=True)
            self.rates[name] = {kind: self._rate(name, kind) for kind in OPTIMIZERS}
        self.conditions = [Condition(*some) for some in product(self.rows, OPTIMIZERS, CONFIDENCES)]

    def _asked(self, name: str, optimizer: str) -> list[Any]:
        return [name, optimizer, OPTIMIZERS[optimizer][1], TASKS[name].epochs, TASKS[name].batch]

    def _teach(self, name: str) -> dict[str, float]:
        logits, facts = teacher_logits(TASKS[name], self.rows[name])
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        torch.save(logits, self.folder / name / "logits.pt")
        return facts

    def _rate(self, name: str, optimizer: str) -> float:
        """A third of the rate that is best for the labels alone: not at the edge of what these bear."""
        rates = OPTIMIZERS[optimizer][1]

        def best() -> float:
            means = []
            for rate in rates:
                given = {"optimizer": optimizer, "rate": rate, "part": "validation"}
                args = TASKS[name], self.rows[name], self.logits[name], {"loss": None}
                means.append(
                    statistics.fmean(student_result(*args, seed=seed, **given)["accuracy"] for seed in (0, 1, 2))
                )
            return rates[means.index(max(means))] / 3

        return float(remembered(self.folder / name / f"{optimizer}-rate", self._asked(name, optimizer), best)[0])

    def results(
        self, where: Condition, name: str, settings: list[Setting], part: str, seeds: Iterable[int]
    ) -> list[Any]:
        """The results of some settings under a condition, a list of one per seed for each; ``name`` is theirs."""
        task, rate = TASKS[where.task], self.rates[where.task][where.optimizer]
        teacher = CONFIDENCES[where.confidence] * self.logits[where.task]
        seeds = list(seeds)

        def run(setting: Setting) -> list[Result]:
            given = {"optimizer": where.optimizer, "rate": rate, "part": part}
            return [student_result(task, self.rows[where.task], teacher, setting, seed=seed, **given) for seed in seeds]

        place = self.folder / where.task / f"{where.optimizer}-{where.confidence}-{part}-{name}"
        asked = [*self._asked(where.task, where.optimizer), CONFIDENCES[where.confidence], rate, settings, seeds]
        done, known = remembered(place, asked, lambda: [run(setting) for setting in settings])
        self.say(f"{where.task}, {place.name}: {'known' if known else 'done'}")
        return list(done)

    def search(self) -> dict[str, list[dict[str, Any]]]:
        """The gains of all settings over the labels alone, on validation data."""
        found: dict[str, list[dict[str, Any]]] = {}
        seeds = (SEARCH_SEED,)
        alone = [self.results(where, "alone", [{"loss": None}], "validation", seeds)[0] for where in self.conditions]
        for loss, settings in searched().items():
            columns = [self.results(where, loss, settings, "validation", seeds) for where in self.conditions]
            found[loss] = []
            for setting, *row in zip(settings, *columns, strict=True):
                gains = [ours[0]["accuracy"] - base[0]["accuracy"] for ours, base in zip(row, alone, strict=True)]
                ratios = [ours[0]["ratio"] for ours in row]
                ratio = None if None in ratios else min(ratios)
                line = {"mean": round(statistics.fmean(gains), 2), "worst": round(min(gains), 1), "ratio": ratio}
                found[loss].append({"setting": setting, **line})
        return found

    def test(self, settings: dict[str, Setting], seeds: Iterable[int]) -> list[dict[str, Any]]:
        """For each condition the mean accuracy on test data and the ratio of the terms, by name of the setting."""
        found = []
        for where in self.conditions:
            results = self.results(where, "settings", list(settings.values()), "test", seeds)
            means = {
                name: {key: _mean([one[key] for one in some]) for key in some[0]}
                for name, some in zip(settings, results, strict=True)
            }
            found.append({**where._asdict(), "results": means})
        return found


def _mean(values: list[Any]) -> float | None:
    return None if None in values else round(statistics.fmean(values), 5)


def measure(folder: Path, *, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that the page shows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IKLLoss: the weighted MSE was|GKLLoss: the weighted MSE was")
        trials = Trials(folder, ["digits"] if quick else TASKS, say)
        search = {} if quick else trials.search()
        starts = {f"{name}Loss": start_setting(name) for name in ("DKL", "IKL", "GKL")} if quick else chosen(search)
        tested = trials.test(shown(starts), TEST_SEEDS[: 1 if quick else None])
    return {
        "teachers": trials.facts,
        "rates": trials.rates,
        "search": search,
        "tested": tested,
        "seeds": len(TEST_SEEDS),
        "versions": versions(),
    }


# --- the command ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("runs", "choosing"), help="default: runs/choosing")
    parser.add_argument("--quick", action="store_true", help="digits alone, one seed, no search; prints the table")
    parser.add_argument("--check", action="store_true", help="train nothing; fail where page or presets differ")
    args = parser.parse_args(arguments)
    try:
        if args.check:
            check(read_json(RECORD))
            return
        torch.set_num_threads(1)
        with ended_by_signals(), exclusive(args.output):
            content = measure(args.output, quick=args.quick, say=lambda line: print(line, flush=True))
        if args.quick:
            print(tables(content)["test"])
            return
        write_json(RECORD, content)
        settle({PAGE: page(PAGE.read_text(encoding="utf-8"), read_json(RECORD))})
        print(chosen(content["search"]))
    except ValueError as error:
        sys.exit(f"error: {error}")
