"""The adversarial part of tools/reproduce.py: the paper's tables in miniature on real CIFAR-10 images.

Each training is one of configs/mmpretrain/cifar10_miniature, run by mmpretrain's own script. Here is how much is
computed, and by which jobs; reproduce_adversarial_jobs does them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence import cache
from evidence.cache import Job, sha256

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mmpretrain" / "cifar10_miniature"
EPS = "8/255"
WEIGHT = "model.robust_loss.loss_weight"

# The configs in the order of the table, and what the table calls them.
METHODS = {
    "adversarial_trades": "TRADES (KL)",
    "adversarial_dkl": "DKL",
    "adversarial_ikl_no_prior": "IKL without prior",
    "adversarial_ikl": "IKL",
    "adversarial_gkl": "GKL",
}
TRADES, DKL, IKL = "adversarial_trades", "adversarial_dkl", "adversarial_ikl"
SEVERAL = (TRADES, IKL)  # trained with several seeds, and drawn
# The paper's ablations, in the code's names: it writes alpha / 4 for beta / 4 and beta for alpha.
CENTRE = {"alpha": 5.0, "beta": 20.0, "weight_temperature": 4.0}
ABLATIONS = {
    "weight_temperature": (1.0, 2.0, 3.0, 4.0),
    "beta": (12.0, 16.0, 20.0, 24.0),
    "alpha": (2.0, 3.0, 4.0, 5.0),
}


class Budget(NamedTuple):
    """How much is computed; everything else is in the configs."""

    methods: tuple[str, ...]
    epochs: int  # of the main table's trainings
    short_epochs: int  # of those of search and ablations
    seeds: tuple[int, ...]  # of the methods in SEVERAL with weight perturbation; the first one of all others
    scales: tuple[float, ...]  # of the published weight of the robust loss, tried on the validation images
    test_images: int  # under PGD
    autoattack_images: int
    attacks: tuple[str, ...] | None  # None for standard AutoAttack
    ablations: dict[str, tuple[float, ...]]
    followed_epochs: int  # of the trainings whose robust accuracy is followed
    followed_every: int
    followed_images: int
    radii: tuple[str, ...]
    curve_images: int
    longer_epochs: int  # of the trainings that show what more of it does
    options: dict[str, Any]  # behind --cfg-options of every training
    few: dict[str, Any]  # likewise, of those on few images
    longer: dict[str, Any]  # likewise, of the longer ones


def _small(every: int) -> dict[str, Any]:
    """Options of a training on each ``every``-th image."""
    return {
        "train_dataloader.dataset.indices": list(range(0, 45_000, every)),
        "train_dataloader.batch_size": 50,
        "val_dataloader.dataset.indices": list(range(0, 5_000, 250)),
        "model.val_attack.steps": 2,
    }


FULL = Budget(
    methods=tuple(METHODS),
    epochs=6,
    short_epochs=3,
    seeds=(0, 1, 2),
    scales=(0.5, 1.0, 2.0),
    test_images=2000,
    autoattack_images=500,
    attacks=None,
    ablations=ABLATIONS,
    followed_epochs=120,
    followed_every=8,
    followed_images=500,
    radii=("2/255", "4/255", "6/255", "8/255", "10/255", "12/255"),
    curve_images=500,
    longer_epochs=5,
    options={},
    few={},
    longer={"train_dataloader.dataset.indices": None},  # all 45,000
)
QUICK = Budget(
    methods=(TRADES, DKL, IKL),
    epochs=2,
    short_epochs=2,
    seeds=(0, 1),
    scales=(1.0,),
    test_images=20,
    autoattack_images=10,
    attacks=("apgd-ce",),
    ablations={"weight_temperature": (1.0, 4.0)},
    followed_epochs=2,
    followed_every=1,
    followed_images=10,
    radii=("4/255", "8/255"),
    curve_images=10,
    longer_epochs=2,
    options=_small(450),
    few=_small(900),
    longer=_small(300),
)


def run_plan(
    folder: Path, *, quick: bool, processes: int, threads: int, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs what has no result yet; what adversarial.json holds.

    Raises ValueError where the data is missing or the folder holds jobs of other settings; RuntimeError where a job
    failed, the others being finished first.
    """
    data = cache.data_checksum()
    budget = QUICK if quick else FULL

    def sources(job: Job) -> dict[str, str]:
        return {"config": config_checksum(job.settings["config"]), "data": data}

    def run(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        return cache.run_jobs(jobs, folder, processes=processes, threads=threads, sources=sources, report=report)

    found = run(search_jobs(budget))
    scales = choose_scales(budget, found)
    for jobs in planned(budget, scales):
        found |= run(jobs)
    return {
        "quick": quick,
        "budget": budget._asdict(),
        "scales": scales,
        "threads": threads,
        "data": cache.read_json(cache.data_folder() / "manifest.json"),
        "jobs": found,
    }


# --- the jobs --------------------------------------------------------------------------------------------------------


def _training(name: str, config: str, seed: int, epochs: int, options: dict[str, Any]) -> Job:
    settings = {"config": config, "seed": seed, "epochs": epochs, "options": options}
    return Job(name, "reproduce_adversarial_jobs:train", settings)


def _measuring(name: str, function: str, training: Job, **settings: Any) -> Job:
    common = {"training": training.name, "config": training.settings["config"]}
    return Job(name, f"reproduce_adversarial_jobs:{function}", {**common, **settings})


def _attacking(name: str, training: Job, images: int, radii: Sequence[str]) -> Job:
    epoch = training.settings["epochs"]
    return _measuring(name, "attack", training, epoch=epoch, split="test", images=images, radii=list(radii))


@functools.cache
def _config(name: str) -> Any:
    from mmengine.config import Config

    return Config.fromfile(CONFIGS / f"{name}.py", import_custom_modules=False)


def published_weight(method: str) -> float:
    """The weight that the config of a method gives its robust loss."""
    return float(_config(method).model.robust_loss.get("loss_weight", 1.0))


def config_checksum(name: str) -> str:
    """Of a config with all that it inherits."""
    return sha256(json.loads(json.dumps(_config(name).to_dict(), default=str)))


def searched(budget: Budget) -> list[str]:
    """The methods whose weight is chosen; DKL has none of its own, as its gradients are those of TRADES."""
    return [method for method in budget.methods if method != DKL]


def search_jobs(budget: Budget) -> list[Job]:
    """Trainings that try weights of the robust loss, the same multiples of the published one for each method."""
    jobs = []
    for scale in budget.scales:
        for method in searched(budget):
            options = {**budget.options, "model.awp": None, WEIGHT: scale * published_weight(method)}
            jobs.append(_training(search_name(method, scale), method, 0, budget.short_epochs, options))
    return jobs


def search_name(method: str, scale: float) -> str:
    """Of the job of a trial."""
    return f"search-{method}-{scale:g}"


def choose_scales(budget: Budget, results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """For each method the multiple of the published weight with the best robust accuracy on the validation images.

    Of several such the one with the best natural accuracy, and of those the one next to the published weight.
    """

    def merit(method: str, scale: float) -> tuple[float, float, float]:
        scores = results[search_name(method, scale)]["result"]["validation"][-1]
        return scores["robust/top1"], scores["accuracy/top1"], -abs(scale - 1)

    chosen = {method: max(budget.scales, key=functools.partial(merit, method)) for method in searched(budget)}
    return {**chosen, DKL: chosen[TRADES]}


class Cell(NamedTuple):
    """A training of the main table."""

    method: str
    awp: bool
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method}-{'awp' if self.awp else 'plain'}-{self.seed}"


def cells(budget: Budget) -> list[Cell]:
    """The trainings of the main table, the first seed first."""
    first = [Cell(method, awp, budget.seeds[0]) for awp in (True, False) for method in budget.methods]
    others = [Cell(method, True, seed) for seed in budget.seeds[1:] for method in SEVERAL]
    return [*first, *others]


def main_jobs(budget: Budget, scales: dict[str, float]) -> dict[str, list[Job]]:
    """Trainings, PGD and AutoAttack of the main table, and PGD over the radii."""
    jobs: dict[str, list[Job]] = {"trainings": [], "pgd": [], "autoattack": [], "radii": []}
    for cell in cells(budget):
        options = {**budget.options, WEIGHT: scales[cell.method] * published_weight(cell.method)}
        if not cell.awp:
            options["model.awp"] = None
        training = _training(f"train-{cell.label}", cell.method, cell.seed, budget.epochs, options)
        jobs["trainings"].append(training)
        jobs["pgd"].append(_attacking(f"pgd-{cell.label}", training, budget.test_images, [EPS]))
        autoattack = {
            "epoch": budget.epochs,
            "images": budget.autoattack_images,
            "batch_size": budget.autoattack_images,
            "attacks": None if budget.attacks is None else list(budget.attacks),
        }
        jobs["autoattack"].append(_measuring(f"autoattack-{cell.label}", "autoattack", training, **autoattack))
        if cell.awp and cell.seed == budget.seeds[0] and cell.method in SEVERAL:
            jobs["radii"].append(_attacking(f"radii-{cell.label}", training, budget.curve_images, budget.radii))
    return jobs


def published_label(budget: Budget, scales: dict[str, float], method: str) -> str:
    """The training of a method with AWP and the published weight: that of the main table where it was chosen."""
    if scales[method] == 1.0:
        return Cell(method, True, budget.seeds[0]).label
    return f"{method}-published-{budget.seeds[0]}"


def further_jobs(budget: Budget, scales: dict[str, float]) -> dict[str, list[Job]]:
    """Trainings and PGD with the published weights where others were chosen, and with more images and steps.

    Under 'prior' what IKL's class prior holds after the longer training.
    """
    seed = budget.seeds[0]
    trainings = [
        _training(f"train-{published_label(budget, scales, method)}", method, seed, budget.epochs, budget.options)
        for method in searched(budget)
        if scales[method] != 1.0
    ]
    longer = {**budget.options, **budget.longer}
    trainings += [
        _training(f"train-{method}-longer-{seed}", method, seed, budget.longer_epochs, longer) for method in SEVERAL
    ]
    pgd = [
        _attacking(training.name.replace("train-", "pgd-", 1), training, budget.test_images, [EPS])
        for training in trainings
    ]
    prior = _measuring("prior", "class_prior", trainings[-1], epoch=budget.longer_epochs)
    return {"trainings": trainings, "pgd": pgd, "prior": [prior]}


def ablation_jobs(budget: Budget) -> list[Job]:
    """Short trainings of IKL around the paper's setting for its ablations."""
    jobs: dict[str, Job] = {}
    for knob, values in budget.ablations.items():
        for value in values:
            loss = {**CENTRE, knob: value}
            name = ablation_name(loss)
            options = {**budget.options, **{f"model.robust_loss.{key}": setting for key, setting in loss.items()}}
            jobs[name] = _training(name, IKL, 0, budget.short_epochs, options)
    return list(jobs.values())


def ablation_name(loss: dict[str, float]) -> str:
    """Of the job of an ablation."""
    return f"ablation-alpha{loss['alpha']:g}-beta{loss['beta']:g}-tau{loss['weight_temperature']:g}"


def followed_jobs(budget: Budget) -> dict[str, list[Job]]:
    """Trainings on few images, and what becomes of their robust accuracy."""
    trainings, followed = [], []
    for method in SEVERAL:
        training = _training(f"few-{method}", f"{method}_few_images", 0, budget.followed_epochs, budget.few)
        trainings.append(training)
        epochs = list(range(budget.followed_every, budget.followed_epochs + 1, budget.followed_every))
        settings = {"epochs": epochs, "images": budget.followed_images, "options": budget.few}
        followed.append(_measuring(f"followed-{method}", "follow", training, **settings))
    return {"trainings": trainings, "followed": followed}


def check_job(budget: Budget, scales: dict[str, float]) -> Job:
    """DKL against TRADES, and the attack in bfloat16 against that in float32."""

    def name(method: str, seed: int = budget.seeds[0]) -> str:
        return f"train-{Cell(method, True, seed).label}"

    settings = {
        "config": TRADES,
        "trainings": {method: name(method) for method in (TRADES, DKL, IKL)},
        "other_seed": name(TRADES, budget.seeds[1]),
        "epochs": budget.epochs,
        "weight": scales[TRADES] * published_weight(TRADES),
        "images": budget.curve_images,
        "options": budget.options,
    }
    return Job("checks", "reproduce_adversarial_jobs:check", settings)


def planned(budget: Budget, scales: dict[str, float]) -> list[list[Job]]:
    """All jobs behind the search, each list built on those before it."""
    main, further, followed = main_jobs(budget, scales), further_jobs(budget, scales), followed_jobs(budget)
    return [
        main["trainings"],
        [*main["pgd"], *main["radii"], check_job(budget, scales)],
        main["autoattack"],
        ablation_jobs(budget),
        followed["trainings"],
        followed["followed"],
        further["trainings"],
        [*further["pgd"], *further["prior"]],
    ]
