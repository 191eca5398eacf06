"""The distillation table of tools/reproduce.py: six losses, one pair of networks, the same budget for each.

The teacher is a ResNet-56 with public weights for CIFAR-10, adapted to the JPEG images; the student a ResNet-8. Images
are only flipped, so that the teacher's predictions are computed once for all runs. What each loss is told is chosen on
the validation images by as many trials for each; the test images are looked at once, by the runs of the table. Here is
how much is computed, and by which jobs; reproduce_distill does them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from evidence.cache import CALLER, TOOLS, Job, all_versions, data_checksum, run_jobs, sha256

CONFIGS = TOOLS.parent / "configs" / "torchdistill" / "cifar10_miniature"
WEIGHTS_NAME = "resnet56-4bfd9763.th"
WEIGHTS_FROM = "https://github.com/akamaster/pytorch_resnet_cifar10"
WEIGHTS_VARIABLE = "IKL_PLUGINS_TEACHER_WEIGHTS"  # in which a job finds their place
SEEDS = (0, 1, 2)
SEARCH_SEED = 3  # none of the table's: what is chosen has no luck in common with what is shown


class Method(NamedTuple):
    """A row of the table."""

    key: str  # of its config
    label: str
    trials: tuple[dict[str, float], ...]  # keywords of the loss to choose from; none to choose: the config's own


_DECOUPLED: tuple[dict[str, float], ...] = (
    {"alpha": 1.0, "beta": 4.0},  # the authors' for ResNet-56 -> ResNet-20 on CIFAR-100
    {"alpha": 1.0, "beta": 1.0},
    {"alpha": 4.0, "beta": 1.0},
    {"ce_weight": 0.1, "alpha": 14.4, "beta": 1.0},  # labels and teacher as in KD's third trial
)
METHODS = (
    Method("ce", "cross entropy", ()),
    # alpha weighs the labels here and beta the teacher: torchdistill's names.
    Method("kd", "KD", tuple({"alpha": a, "beta": b} for a, b in ((0.9, 0.1), (0.5, 0.5), (0.1, 0.9), (0.1, 2.7)))),
    Method("dkl", "DKL", ()),  # what was chosen for KD, see dkl_of
    Method("ikl_no_prior", "IKL without global information", _DECOUPLED),
    Method("ikl", "IKL", _DECOUPLED),
    Method("gkl", "GKL", _DECOUPLED),
)
TEMPERATURE = 4.0


def dkl_of(kd: dict[str, float]) -> dict[str, float]:
    """The keywords with which DKLLoss has the gradients of KDLoss, which multiplies its KL with temperature**2."""
    weight = kd["beta"] * TEMPERATURE**2
    return {"ce_weight": kd["alpha"], "alpha": weight, "beta": weight}


class Budget(NamedTuple):
    """How much is trained on."""

    images_per_class: int | None  # of the training images; None for all
    held_out_per_class: int | None  # of validation and of test images
    teacher_epochs: int
    epochs: int  # of a student, in a trial as in the table
    probes: int | None  # of each question; None for all
    equality_steps: int
    timing_rounds: int


FULL = Budget(
    images_per_class=None,
    held_out_per_class=None,
    teacher_epochs=3,
    epochs=4,
    probes=None,
    equality_steps=200,
    timing_rounds=40,
)
QUICK = Budget(
    images_per_class=64,
    held_out_per_class=20,
    teacher_epochs=1,
    epochs=2,
    probes=1,
    equality_steps=10,
    timing_rounds=3,
)


class Probe(NamedTuple):
    """A training that asks why the table is what it is: with the first seed, on the validation images."""

    question: str
    method: str
    keywords: dict[str, float]


def probes(budget: Budget, chosen: dict[str, dict[str, float]]) -> list[Probe]:
    """What besides the trials tells where the decoupled losses stand; ``chosen`` has keywords by the method."""
    heavy = dkl_of(chosen["kd"])  # its beta, the weight of the MSE, is that of the cross entropy
    alone = {"alpha": 0.0, "beta": 1.0}
    asked = {
        "an MSE as heavy as the cross entropy": [(key, heavy) for key in ("ikl_no_prior", "ikl")],
        "labels and the MSE alone": [(key, alone) for key in ("ikl_no_prior", "ikl")],
    }
    return [Probe(question, *one) for question, some in asked.items() for one in some[: budget.probes]]


def run_plan(
    folder: Path,
    weights: Path | None,
    *,
    quick: bool,
    processes: int,
    threads: int,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything the table needs, from what is there already; what distill.json holds.

    The public weights of the teacher are by default those in the folder that IKL_PLUGINS_DOWNLOADS names. Raises
    ValueError where weights or images are missing, or the folder holds jobs of other settings or files; RuntimeError
    where a job failed.
    """
    budget = QUICK if quick else FULL
    weights = public_weights(weights)
    images = {"images_per_class": budget.images_per_class, "held_out_per_class": budget.held_out_per_class}

    # All for each job: they are one, but for the loss.
    configs = {file.name: _without_comments(file.read_text()) for file in CONFIGS.glob("*.yaml")}
    files = {"configs": sha256(configs), "data": data_checksum()}
    everything: list[dict[str, Any]] = []

    def jobs(*asked: Job, at_once: int = processes) -> list[dict[str, Any]]:
        found = run_jobs(asked, folder, processes=at_once, threads=threads, sources=lambda job: files, report=report)
        everything.extend(found.values())
        return [found[job.name] for job in asked]

    teacher = {**images, "weights_sha256": _sha256(weights), "epochs": budget.teacher_epochs, "seed": 0}
    # The place of the weights is no setting: the same weights elsewhere are the same job.
    os.environ[WEIGHTS_VARIABLE] = os.fspath(weights.resolve())
    (teacher_result,) = jobs(Job("teacher", "reproduce_distill:teacher", teacher))
    jobs(Job("predictions", "reproduce_distill:predictions", images))

    def student(
        name: str, method: str, keywords: dict[str, float], seed: int, *, tested: bool = False, kind: str = "student"
    ) -> Job:
        settings = {"method": method, "keywords": keywords, "epochs": budget.epochs, "seed": seed, "tested": tested}
        return Job(name, f"reproduce_distill:{kind}", {**images, **settings})

    trials = [
        student(f"search-{method.key}-{index}", method.key, trial, SEARCH_SEED)
        for method in METHODS
        for index, trial in enumerate(method.trials)
    ]
    search: dict[str, list[dict[str, Any]]] = {method.key: [] for method in METHODS}
    for trial in jobs(*trials):
        found = {"keywords": trial["settings"]["keywords"], "val_accuracy": trial["result"]["val_accuracy"]}
        search[trial["settings"]["method"]].append(found)
    chosen = {
        key: max(found, key=lambda one: one["val_accuracy"])["keywords"] if found else {}
        for key, found in search.items()
    }
    chosen["dkl"] = dkl_of(chosen["kd"])

    finals = [
        student(f"{method.key}-{seed}", method.key, chosen[method.key], seed, tested=True)
        for seed in SEEDS
        for method in METHODS
    ]
    runs: dict[str, list[dict[str, Any]]] = {method.key: [] for method in METHODS}
    for one in jobs(*finals):
        kept = {"seed": one["settings"]["seed"], "seconds": one["seconds"], **one["result"]}
        runs[one["settings"]["method"]].append(kept)
    asked = probes(budget, chosen)
    probed = jobs(
        *(
            student(f"probe-{index}", one.method, one.keywords, SEEDS[0], kind="probe")
            for index, one in enumerate(asked)
        )
    )
    (weights_result,) = jobs(Job("weights", "reproduce_distill:pair_weights", images))
    pair = {**images, "kd": chosen["kd"], "dkl": chosen["dkl"], "steps": budget.equality_steps}
    (equality,) = jobs(Job("equality", "reproduce_distill:equality", pair))
    # Alone on the machine, whatever runs beside the others.
    times = {**images, "chosen": chosen, "rounds": budget.timing_rounds}
    (timing,) = jobs(Job("timing", "reproduce_distill:timing", times), at_once=1)
    return {
        "quick": quick,
        "budget": budget._asdict(),
        "threads": threads,
        "teacher": teacher_result["result"],
        "search": search,
        "chosen": chosen,
        "runs": runs,
        "probes": [{**one._asdict(), **found["result"]} for one, found in zip(asked, probed, strict=True)],
        "weights": weights_result["result"],
        "equality": equality["result"],
        "timing": timing["result"],
        "versions": all_versions(everything),
    }


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def public_weights(path: Path | None) -> Path:
    downloads = os.environ.get("IKL_PLUGINS_DOWNLOADS")
    if path is None and downloads:
        path = Path(downloads, "weights", WEIGHTS_NAME)
    if path is None or not path.is_file():
        raise ValueError(
            f"{CALLER}: `teacher_weights` must be the file {WEIGHTS_NAME}, got {path}. Download it from {WEIGHTS_FROM} "
            f"(pretrained_models) and name it with --teacher-weights."
        )
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
