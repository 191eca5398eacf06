"""What the distillation runs of tools/reproduce.py say: tables and plots from the JSON alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from scipy import stats

from evidence.report import binomial_margin, draw_with_range, drawn, listed, spread, text_table, with_margin
from evidence.reproduce_distill_plan import METHODS, SEARCH_SEED

FIGURES = ("distill_validation.png", "distill_test.png")
TEST_IMAGES = 5000
# Cui et al., NeurIPS 2024: table 13 (means of 3 runs) and table 1. None where the paper has no such row.
PUBLISHED = {
    "ce": (69.06, None),
    "kd": (70.66, 71.03),
    "dkl": (None, 71.03),
    "ikl_no_prior": (None, 71.80),
    "ikl": (71.44, 71.91),
}
# The order that the paper's table 1 shows, from worst to best.
ORDER = ("kd", "ikl_no_prior", "ikl")
_LABELS = {method.key: method.label for method in METHODS}


def render(content: dict[str, Any]) -> str:
    """The tables as Markdown, from what distill.json holds."""
    budget, versions = content["budget"], content["versions"]
    seeds = [run["seed"] for run in content["runs"]["kd"]]
    images = "all" if budget["images_per_class"] is None else f"{budget['images_per_class']} per class of the"
    lines = [
        "# Distillation: measured",
        "",
        f"`python tools/reproduce.py distill{' --quick' if content['quick'] else ''}`: ResNet-56 -> ResNet-8, {images} "
        f"45,000 training images, {budget['epochs']} epochs, seeds {', '.join(map(str, seeds))}, {content['threads']} "
        f"thread(s) a run. Teacher: {content['teacher']['public_val_accuracy']:.2f} % of the validation images with "
        f"the public weights, {content['teacher']['val_accuracy']:.2f} % after {budget['teacher_epochs']} epochs, "
        f"{content['teacher']['test_accuracy']:.2f} % of the test images.",
        "",
        f"{listed(versions)}.",
        "",
        "## Accuracy",
        "",
        _accuracy_table(content),
        "",
        "Mean and standard deviation over the seeds, in percent. The number of test images alone leaves a 95 % "
        f"interval of ±{_margin(content):.2f} points to one accuracy. A step is a whole training step, teacher "
        "included, all losses in turn in one process.",
        "",
        "## The paper's order",
        "",
        *_order_lines(content),
        "",
        "## Why this order",
        "",
        f"Further trainings that ask what the losses are sensitive to, beside the trials below. Seed {seeds[0]}, best "
        "accuracy on the validation images in percent, beside that of the same loss and seed in the first table; "
        "nothing there was chosen by them.",
        "",
        _probe_table(content),
        "",
        "The weights of the pairs of classes in the MSE have a sum of 1; a pair of a class with itself has no "
        "difference, and its weight is lost. How much of the weight the other pairs have, and how much of it those "
        "without the class that is most likely for the teacher, with weights of each image and with those of its class "
        "(global information); means over the training images:",
        "",
        _weights_table(content),
        "",
        "## What was chosen, and from what",
        "",
        f"One run for each trial, as many epochs as in the first table, seed {SEARCH_SEED}; best validation "
        "accuracy in percent.",
        "",
        _search_table(content),
        "",
        "DKL takes what was chosen for KD: its alpha is KD's weight of the teacher times 4**2.",
        "",
        "## DKL is KL",
        "",
        "Students of KDLoss and of DKLLoss, the same start, batches and steps: norm of the difference of their "
        "weights, divided by the norm of the weights.",
        "",
        _equality_table(content),
    ]
    return "\n".join(lines) + "\n"


def _tested(content: dict[str, Any], key: str) -> list[float]:
    return [run["test_accuracy"] for run in content["runs"][key]]


def _validated(content: dict[str, Any], key: str) -> list[float]:
    return [run["val_accuracy"] for run in content["runs"][key]]


def _margin(content: dict[str, Any]) -> float:
    held_out = content["budget"]["held_out_per_class"]
    return binomial_margin(_tested(content, "kd"), TEST_IMAGES if held_out is None else 10 * held_out)


def _keywords(keywords: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in keywords.items()) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _accuracy_table(content: dict[str, Any]) -> str:
    header = ["loss", "keywords", "validation", "test", "test of each seed", "step / KD's", "paper, R56>R20", "R34>R18"]
    rows = []
    for method in METHODS:
        tested = _tested(content, method.key)
        rows.append(
            [
                method.label,
                _keywords(content["chosen"][method.key]),
                spread(_validated(content, method.key)),
                spread(tested),
                " / ".join(f"{value:.2f}" for value in tested),
                f"{content['timing'][method.key]['relative_to_kd']:.2f}",
                *map(_number, PUBLISHED.get(method.key, (None, None))),
            ]
        )
    return text_table(header, rows)


def difference(content: dict[str, Any], better: str, worse: str) -> tuple[float, float]:
    """By how much one loss is ahead of another on the test images, seed by seed: the mean and half its 95 % interval.

    The interval is Student's, of as many pairs as there are seeds.
    """
    pairs = zip(_tested(content, better), _tested(content, worse), strict=True)
    differences = [one - other for one, other in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error * float(stats.t.ppf(0.975, len(differences) - 1))


def _order_lines(content: dict[str, Any]) -> list[str]:
    """Whether each step of the order shows here: the interval of the difference lies on one side of 0, or around it."""
    lines = []
    for worse, better in ((ORDER[0], ORDER[1]), (ORDER[1], ORDER[2]), (ORDER[0], ORDER[2]), ("ikl", "gkl")):
        mean, half = difference(content, better, worse)
        found = "not decided" if abs(mean) <= half else "shows" if mean > 0 else "is reversed"
        published = "" if better == "gkl" else " (the paper's order)"
        lines.append(
            f"- {_LABELS[better]} above {_LABELS[worse]}{published}: {found}; {with_margin(mean, half)} points, mean "
            f"and 95 % interval over the seeds."
        )
    return lines


def _probe_table(content: dict[str, Any]) -> str:
    rows = []
    for probe in content["probes"]:
        accuracy = "diverges" if probe["val_accuracy"] is None else f"{probe['val_accuracy']:.2f}"
        label = _LABELS[probe["method"]]
        first = f"{content['runs'][probe['method']][0]['val_accuracy']:.2f}"
        rows.append([probe["question"], label, _keywords(probe["keywords"]), accuracy, first])
    return text_table(["question", "loss", "keywords", "validation", "in the first table"], rows)


def _weights_table(content: dict[str, Any]) -> str:
    rows = [
        [
            f"of the {row['weights']}",
            f"{row['temperature']:g}",
            f"{row['between_classes']:.3f} ± {row['deviation']:.3f}",
            f"{row['without_the_largest']:.4f}",
        ]
        for row in content["weights"]["rows"]
    ]
    return text_table(["weights", "temperature", "between classes (deviation)", "without the most likely"], rows)


def _search_table(content: dict[str, Any]) -> str:
    rows = [
        [
            method.label,
            _keywords(trial["keywords"]),
            f"{trial['val_accuracy']:.2f}",
            "chosen" if trial["keywords"] == content["chosen"][method.key] else "",
        ]
        for method in METHODS
        for trial in content["search"][method.key]
    ]
    return text_table(["loss", "keywords", "validation", ""], rows)


def _equality_table(content: dict[str, Any]) -> str:
    steps = len(content["equality"]["float64"])
    shown = sorted({1, min(10, steps), min(100, steps), steps})
    rows = [
        [dtype, *(f"{apart[step - 1]:.1e}" for step in shown)]
        for dtype, apart in sorted(content["equality"].items(), reverse=True)
    ]
    return text_table(["precision", *(f"after {step} steps" for step in shown)], rows)


def draw(content: dict[str, Any], folder: Path) -> None:
    """Writes the plots: validation accuracy over the epochs, and the test accuracy of each run."""
    with drawn(folder / FIGURES[0], figsize=(6.4, 4.0)) as (_, axes):
        for method in METHODS:
            curves = [[row["val_accuracy"] for row in run["history"]] for run in content["runs"][method.key]]
            draw_with_range(axes, curves, label=method.label)
        axes.set(xlabel="epoch", ylabel="validation accuracy (%)", xticks=range(1, len(curves[0]) + 1))
        axes.legend(frameon=False)
    with drawn(folder / FIGURES[1], figsize=(6.4, 3.2)) as (_, axes):
        for place, method in enumerate(METHODS):
            tested = _tested(content, method.key)
            axes.plot(tested, [place] * len(tested), "o", alpha=0.6)
            axes.plot([statistics.fmean(tested)], [place], "k|", markersize=14)
        axes.set(xlabel="test accuracy (%), each seed and the mean", yticks=range(len(METHODS)))
        axes.set_yticklabels([method.label for method in METHODS])
        axes.invert_yaxis()
