"""Distils a small student on real digits with five losses, trains it against attacks, and shows what came of it.

    python tools/demo.py

prepares scikit-learn's digits if need be, trains the teacher of configs/torchdistill/digits and from it one student per
loss (CE, KL, DKL, IKL, GKL) and seed, each exactly as `tools/train_torchdistill.py CONFIG --seed SEED` would. Then it
trains the configs natural, adversarial_trades and adversarial_ikl of configs/mmpretrain/digits, each exactly as
`tools/train_mmpretrain.py CONFIG` would, and attacks what came of them. Last, the network of adversarial_ikl meets
AutoAttack on a few images, and RobustBench's submission is written for it, as tools/robustbench_eval.py and
tools/robustbench_submit.py do.

It prints what it found and writes to runs/demo: the tables (table.md; the first as table.png), both terms of the loss
over the epochs (curves.png), the class prior (class_prior.png), natural and adversarial images
(adversarial_images.png), accuracy against the strength of the attack (robust_accuracy.png), evaluation and submission
folder (robustbench), and results.json with every number, seed, version and config hash.

Each finished run is kept in results.json, so an interrupted demo goes on where it stopped; --fresh starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from demo import adversarial as demo_adversarial
from demo import robustbench as demo_robustbench
from ikl_plugins.commands import data as prepare_data
from demo.report import binomial_margin, pyplot, save_figure, sha256, text_table, write_text

__all__ = ["METHODS", "Row", "markdown", "summarise"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "torchdistill" / "digits"
# The configs in the order of the table, and what the table calls them.
METHODS = {"ce": "CE", "kd": "KL", "dkl": "DKL", "ikl": "IKL", "gkl": "GKL"}
BASELINE = "kd"  # its step time is the unit
TITLES = {
    "ce": "labels only",
    "kd": "torchdistill's KDLoss",
    "dkl": "KL's gradient, decoupled",
    "ikl": "class prior, both terms",
    "gkl": "IKL with smoothed weights",
}
COLOURS = {"ce": "#7f7f7f", "kd": "#1f77b4", "dkl": "#17becf", "ikl": "#d62728", "gkl": "#2ca02c"}
# One thread: the same numbers whatever the machine's cores, and step times that a busy neighbour disturbs least.
THREADS = 1
# Both terms are measured at the temperature of the configs, with alpha = beta = 1, for all losses alike.
MEASURED_AT = 4.0
TIMED_EPOCHS = 3  # in which the losses take turns after the training, for their step times alone
FORMAT = 1


# --- what was found, and how it is told ------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the table."""

    method: str
    accuracies: list[float]  # percent, one per seed
    mean: float
    deviation: float | None  # sample standard deviation; None for a single seed
    relative_step: float  # to the baseline's
    step_ms: float


def summarise(results: dict[str, Any]) -> list[Row]:
    """The table's rows.

    Args:
        results: 'runs' by '<method>/<seed>', each with its 'test_accuracy', and 'step_seconds': for each method the
            seconds of its step in every round of :meth:`Demo._time_steps`.

    Returns:
        A row for each method that has runs. Its relative step time is the median over the rounds of the ratio to the
        baseline's step in the same round.
    """
    rows = []
    seconds = results["step_seconds"]
    for method in METHODS:
        accuracies = [run["test_accuracy"] for run in _runs_of(results, method)]
        if not accuracies:
            continue
        ratios = [own / baseline for own, baseline in zip(seconds[method], seconds[BASELINE], strict=True)]
        rows.append(
            Row(
                method,
                accuracies,
                statistics.fmean(accuracies),
                statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                statistics.median(ratios),
                1000 * statistics.median(seconds[method]),
            )
        )
    return rows


def _runs_of(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [run for key, run in results["runs"].items() if key.split("/")[0] == method]


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, as text."""
    header = ["loss", "", "test top-1 [%]", "each seed [%]", "step time / KL", "step [ms]"]
    cells = []
    for row in rows:
        deviation = "" if row.deviation is None else f" ± {row.deviation:.2f}"
        each = ", ".join(f"{accuracy:.2f}" for accuracy in row.accuracies)
        if len(row.accuracies) > 5:
            each = f"{min(row.accuracies):.2f} to {max(row.accuracies):.2f}"
        accuracy, relative, step = f"{row.mean:.2f}{deviation}", f"{row.relative_step:.2f}", f"{row.step_ms:.1f}"
        cells.append([METHODS[row.method], TITLES[row.method], accuracy, each, relative, step])
    return header, cells


def _ordering(rows: Sequence[Row]) -> str:
    """The losses by mean accuracy; equal means share a place."""
    places: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: -row.mean):
        places.setdefault(f"{row.mean:.2f}", []).append(METHODS[row.method])
    return "By mean: " + ", ".join(f"{' = '.join(names)} {mean}" for mean, names in places.items()) + "."


def _reading(rows: Sequence[Row], test_images: int) -> str:
    """One sentence on what these numbers can and cannot show."""
    seeds = max(len(row.accuracies) for row in rows)
    margin = binomial_margin([row.mean for row in rows], test_images)
    return (
        f"What {seeds} seed{'s' * (seeds > 1)} on {test_images} test images can show: whether each loss trains a "
        f"working student, and what its step costs; what they cannot: which loss is better, as one image is "
        f"{100 / test_images:.2f} points and the choice of the test images, the same for all seeds, leaves about "
        f"±{margin:.1f} points (95 %) on every accuracy."
    )


def markdown(results: dict[str, Any]) -> str:
    """The whole report on the results as Markdown."""
    rows = summarise(results)
    teacher, environment = results["teacher"], results["environment"]
    data = results["data"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    seeds = sorted({run["seed"] for run in results["runs"].values()})
    return "\n".join(
        [
            f"# Digits: one student, {len(rows)} losses",
            "",
            f"Teacher {results['networks']['teacher']}, {teacher['test_accuracy']:.2f} % on the test images; student "
            f"{results['networks']['student']}; {data['train']:,} training, {data['val']:,} validation and "
            f"{data['test']:,} test images. Accuracy of the checkpoint with the best validation accuracy, mean and "
            f"sample standard deviation over seeds {', '.join(map(str, seeds))}. A step is forward, loss, backward and "
            f"update of a batch of {results['batch_size']}; the losses take turns step by step, and the median of "
            f"{len(results['step_seconds'][BASELINE])} rounds is given.",
            "",
            text_table(*_cells(rows)),
            "",
            _ordering(rows),
            "",
            _reading(rows, data["test"]),
            "",
            f"{versions}; {environment['threads']} thread on {environment['machine']}.",
            "",
        ]
    )


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw_curve(axes: Any, method: str, curves: list[list[float]], start: int) -> None:
    """Mean over the seeds as a line, their range as a band."""
    columns = list(zip(*curves, strict=True))
    epochs = range(start, start + len(columns))
    dashed = (0, (4, 3)) if method == "dkl" else "-"  # DKL lies on KL
    means = [statistics.fmean(column) for column in columns]
    axes.plot(epochs, means, color=COLOURS[method], linestyle=dashed, marker=".", label=METHODS[method], zorder=3)
    axes.fill_between(epochs, [*map(min, columns)], [*map(max, columns)], color=COLOURS[method], alpha=0.15, lw=0)


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Both terms of the loss over the epochs: measured alike for all losses, and as IKL and GKL trained on them."""
    plots = pyplot()
    figure, panels = plots.subplots(2, 2, figsize=(10.5, 7.2), layout="constrained")
    epochs = max(len(run["measured"]) for run in results["runs"].values())
    style = {"loc": "left", "fontsize": 10}
    names = {"weighted_mse": "weighted MSE [logits²]", "soft_cross_entropy": "soft-label cross entropy [nats]"}
    # The cross entropy cannot fall below the entropy of the teacher's labels; what is above it is the KL divergence.
    floors = {"weighted_mse": 0.0, "soft_cross_entropy": results["teacher"]["soft_entropy"]}
    for column, (term, name) in enumerate(names.items()):
        measured, trained = panels[0][column], panels[1][column]
        for method in METHODS:
            curves = [[row[term] - floors[term] for row in run["measured"]] for run in _runs_of(results, method)]
            if curves:
                _draw_curve(measured, method, curves, start=1)
        for method in ("ikl", "gkl"):
            curves = [run["terms"][term] for run in _runs_of(results, method)]
            if curves:
                _draw_curve(trained, method, curves, start=1)
        measured.set_title(
            "All students measured alike, validation images\n"
            f"$\\alpha = \\beta = 1$, T = {MEASURED_AT:g}, weights from the teacher",
            **style,
        )
        trained.set_title(
            "What IKL and GKL trained on, training images\n$\\alpha$, $\\beta$, $\\gamma$ and prior of the configs",
            **style,
        )
        for axes in (measured, trained):
            axes.set_xlabel("epoch")
            axes.set_ylabel(name)
            axes.set_xlim(0.5, epochs + 0.5)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.25)
        measured.set_yscale("log")
    panels[1][0].set_yscale("log")
    panels[0][1].set_ylabel("soft-label cross entropy\nabove the teacher's entropy [nats]")
    panels[0][1].legend(frameon=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    panels[1][1].legend(frameon=False)
    seeds = len({run["seed"] for run in results["runs"].values()})
    figure.suptitle(
        f"Both terms of the decoupled loss over the epochs: mean over {seeds} seeds, band from least to largest"
        if seeds > 1
        else "Both terms of the decoupled loss over the epochs, one seed"
    )
    save_figure(figure, path)
    plots.close(figure)


def draw_class_prior(results: dict[str, Any], path: Path) -> None:
    """The class prior of the first IKL run as a heat map."""
    plots = pyplot()
    from matplotlib.colors import LogNorm

    run = _runs_of(results, "ikl")[0]
    matrix = [[100 * value for value in row] for row in run["class_prior"]]
    size = range(len(matrix))
    positive = [value for row in matrix for value in row if value > 0]
    figure, axes = plots.subplots(figsize=(7.2, 6), layout="constrained")
    norm = LogNorm(vmin=max(min(positive), 1e-3), vmax=100)
    image = axes.imshow(matrix, cmap="Blues", norm=norm)
    for row in size:
        for column in size:
            value = matrix[row][column]
            dark = norm(max(value, 1e-3)) > 0.55
            text = f"{value:.1f}" if value >= 0.05 else "<0.1"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(size)
    axes.set_yticks(size)
    axes.set_xlabel("predicted digit")
    axes.set_ylabel("label")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label("mean prediction of the teacher [%], logarithmic")
    axes.set_title(
        f"Class prior of IKL: the teacher's mean softmax (T = {results['prior_temperature']:g}) for each label\n"
        f"seed {run['seed']}, over the {results['data']['train']:,} training images of the last epoch",
        loc="left",
        fontsize=10,
    )
    save_figure(figure, path)
    plots.close(figure)


def draw_table(results: dict[str, Any], path: Path) -> None:
    """The table, and each seed's accuracy as a dot."""
    plots = pyplot()
    rows = summarise(results)
    header, cells = _cells(rows)
    figure, (top, bottom) = plots.subplots(
        2, 1, figsize=(10.5, 1.2 + 0.75 * len(rows)), height_ratios=[1, 1], layout="constrained"
    )
    top.axis("off")
    table = top.table(cells, colLabels=header, cellLoc="left", colLoc="left", bbox=(0, 0, 1, 1), edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.auto_set_column_width(range(len(header)))
    for (line, _), cell in table.get_celld().items():
        if line == 0:
            cell.set_text_props(weight="bold")
    teacher = results["teacher"]["test_accuracy"]
    means = [row.mean for row in rows]
    middle, margin = statistics.fmean(means), binomial_margin(means, results["data"]["test"])
    label = f"mean of all ± {margin:.1f}: what the choice of the test images leaves open (95 %)"
    bottom.axvspan(middle - margin, min(middle + margin, 100), color="black", alpha=0.06, lw=0, label=label)
    bottom.axvline(teacher, color="black", lw=1, ls=":", label="teacher")
    for place, row in enumerate(rows):
        colour = COLOURS[row.method]
        bottom.plot(row.accuracies, [place] * len(row.accuracies), "o", color=colour, alpha=0.6, ms=6)
        bottom.plot([row.mean], [place], "|", color=colour, ms=18, mew=2.5)
    bottom.set_yticks(range(len(rows)), [METHODS[row.method] for row in rows])
    bottom.set_ylim(len(rows) - 0.5, -0.5)
    bottom.set_xlabel(f"test top-1 [%] on {results['data']['test']} images: a dot per seed, a bar at their mean")
    bottom.grid(alpha=0.25, axis="x")
    bottom.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    save_figure(figure, path)
    plots.close(figure)


# --- runs ------------------------------------------------------------------------------------------------------------


class _Results:
    """results.json: what is known so far, written after each run."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": FORMAT, "runs": {}}
        if fresh or not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            known = content["format"] == FORMAT and isinstance(content["runs"], dict)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"demo: {path} must be a results file, but is damaged ({error}). Pass --fresh.") from error
        if known:
            self.content = content

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


class Demo:
    """One demo: its folder, its settings and its results."""

    def __init__(self, output: Path, *, seeds: int, epochs: int | None, fresh: bool) -> None:
        import torch
        from ikl_plugins.torchdistill import training as train_torchdistill

        self.driver = train_torchdistill
        self.torch = torch
        self.output = output
        self.seeds = range(seeds)
        self.epochs = epochs
        self.results = _Results(output / "results.json", fresh=fresh)
        self.kept = 0
        self.trained = 0

    def run(self) -> dict[str, Any]:
        """Does whatever is not there yet; returns the results to report on."""
        self.torch.set_num_threads(THREADS)
        data = prepare_data.prepare_digits()
        splits = json.loads((data / "manifest.json").read_text())["splits"]
        packages = ("ikl_plugins", "torch", "torchvision", "torchdistill", "numpy")
        content = self.results.content
        content["environment"] = {
            "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
            "threads": THREADS,
            "cores": os.cpu_count(),
            "machine": f"{platform.machine()} with {os.cpu_count()} cores",
        }
        content["data"] = {split: facts["images"] for split, facts in splits.items()}
        self.results.write()  # so that a folder that cannot be written is found before the training
        # Whatever decides a run's outcome; a kept run counts only while it is the same.
        common = {
            "data": {split: facts["sha256"] for split, facts in splits.items()},
            "versions": content["environment"]["versions"],
            "threads": THREADS,
            "epochs": self.epochs,
        }
        adversarial = demo_adversarial.AdversarialRuns(
            self.output / "adversarial", data, common, epochs=self.epochs, threads=THREADS
        )
        wanted = [(method, seed) for seed in self.seeds for method in _rotated(list(METHODS), seed)]
        with _Bar(2 + len(wanted) + demo_adversarial.PARTS + demo_robustbench.PARTS) as bar:
            teacher = self._teacher(common, bar)
            finished = {}
            for method, seed in wanted:
                finished[f"{method}/{seed}"] = self._student(method, seed, {**common, "teacher": teacher}, bar)
            self._time_steps({**common, "teacher": teacher}, bar)

            def finish(line: str, kept: bool) -> None:
                self.results.write()
                self._done(bar, line, kept=kept)

            adversarial.run(content.setdefault("adversarial", {}), bar.steps, finish)
            robustbench = demo_robustbench.RobustBenchRun(
                self.output / "robustbench", data, *adversarial.trained(demo_adversarial.IKL)
            )
            robustbench.run(content.setdefault("robustbench", {}), bar.steps, finish)
        # The file keeps runs of other seeds for a later call; the report is on those of this one.
        content["reported"] = [f"{method}/{seed}" for seed in self.seeds for method in METHODS]
        self.results.write()
        return {**content, "runs": {key: finished[key] for key in content["reported"]}}

    def _config(self, method: str, checkpoint: Path) -> tuple[dict[str, Any], str]:
        """The shipped config with its checkpoints under the demo's folder, and the hash of the file."""
        path = CONFIGS / f"{method}.yaml"
        config = self.driver.load_config(path)
        models = config["models"]
        models.get("student_model", models.get("model"))["dst_ckpt"] = str(checkpoint)
        if "teacher_model" in models:
            models["teacher_model"]["src_ckpt"] = str(self._checkpoint("teacher"))
        if self.epochs is not None:
            config["train"]["num_epochs"] = self.epochs
        return config, hashlib.sha256(path.read_bytes()).hexdigest()

    def _checkpoint(self, name: str) -> Path:
        return self.output / "checkpoints" / f"{name}.pt"

    def _teacher(self, common: dict[str, Any], bar: _Bar) -> str:
        """Trains the teacher, or finds it; returns the fingerprint of its run."""
        content = self.results.content
        checkpoint = self._checkpoint("teacher")
        config, config_sha256 = self._config("teacher", checkpoint)
        fingerprint = sha256({**common, "config": config_sha256})
        teacher_config, student_config = config["models"]["model"], self._config("ikl", checkpoint)[0]["models"]
        content["networks"] = {
            "teacher": teacher_config["key"].removeprefix("ikl_plugins."),
            "student": student_config["student_model"]["key"].removeprefix("ikl_plugins."),
        }
        kept = content.get("teacher", {}).get("fingerprint") == fingerprint and checkpoint.is_file()
        if not kept:
            report = self.driver.run(config, seed=0, progress=bar.steps("teacher"))
            content["teacher"] = {
                "fingerprint": fingerprint,
                "config_sha256": config_sha256,
                "seed": 0,
                "test_accuracy": report["test_accuracy"],
                "history": report["history"],
            }
        self._measure = _Measure(self.torch, self.driver, config["datasets"]["digits/val"], teacher_config, checkpoint)
        content["teacher"]["soft_entropy"] = self._measure.soft_entropy
        self.results.write()
        self._done(bar, f"teacher            {content['teacher']['test_accuracy']:6.2f} %", kept=kept)
        return fingerprint

    def _student(self, method: str, seed: int, common: dict[str, Any], bar: _Bar) -> dict[str, Any]:
        """Distils one student, or finds it; returns what is kept of its run."""
        key = f"{method}/{seed}"
        checkpoint = self._checkpoint(f"{method}_seed{seed}")
        config, config_sha256 = self._config(method, checkpoint)
        fingerprint = sha256({**common, "config": config_sha256, "seed": seed})
        run = self.results.content["runs"].get(key)
        kept = run is not None and run["fingerprint"] == fingerprint
        if run is None or not kept:
            measured: list[dict[str, float]] = []
            models = config["models"]
            student_config = models.get("student_model", models.get("model"))

            def measure() -> None:
                measured.append(self._measure(student_config, self.driver.last_path(checkpoint)))

            begin = time.perf_counter()
            progress = _at_epoch_ends(
                bar.steps(f"{METHODS[method]}, seed {seed}"), config["train"]["num_epochs"], measure
            )
            report = self.driver.run(config, seed=seed, progress=progress)
            measure()
            history = report["history"]
            terms = {
                term: [row[f"{method}/{term}"] for row in history]
                for term in ("weighted_mse", "soft_cross_entropy")
                if f"{method}/{term}" in history[0]
            }
            run = {
                "fingerprint": fingerprint,
                "config_sha256": config_sha256,
                "seed": seed,
                "test_accuracy": report["test_accuracy"],
                "best_val_accuracy": report["best_val_accuracy"],
                "val_accuracy": [row["val_accuracy"] for row in history],
                "train_loss": [row["train_loss"] for row in history],
                "seconds_per_step": [row["seconds_per_step"] for row in history],
                "terms": terms,
                "measured": measured,
                "seconds": time.perf_counter() - begin,
            }
            if method in report["class_prior"]:
                run["class_prior"] = report["class_prior"][method].tolist()
                criterion = config["train"]["criterion"]["kwargs"]["sub_terms"][method]["criterion"]
                self.results.content["prior_temperature"] = criterion["kwargs"]["weight_temperature"]
            self.results.content["runs"][key] = run
            self.results.write()
        self._done(bar, f"{METHODS[method]:4} seed {seed}  {run['test_accuracy']:13.2f} %", kept=kept)
        return run

    def _time_steps(self, common: dict[str, Any], bar: _Bar) -> None:
        """Times one step of each loss in turn on the same batch, round after round.

        What else the machine does meets all losses alike this way; run after run it would not.
        """
        content = self.results.content
        configs = {method: self._config(method, self._checkpoint("timing")) for method in METHODS}
        fingerprint = sha256({**common, "configs": {method: of_file for method, (_, of_file) in configs.items()}})
        kept = content.get("timing_fingerprint") == fingerprint
        if not kept:
            trainers = {
                method: self.driver.Trainer(config, self.torch.device("cpu"), seed=0)
                for method, (config, _) in configs.items()
            }
            boxes = {method: trainer.box for method, trainer in trainers.items()}
            loader = boxes[BASELINE].train_data_loader
            epochs = self.epochs or TIMED_EPOCHS
            rounds = epochs * len(loader)
            seconds: dict[str, list[float]] = {method: [] for method in METHODS}
            progress = bar.steps("step times")
            for epoch in range(epochs):
                for box in boxes.values():
                    box.pre_epoch_process(epoch=epoch)
                for index, (images, targets, extra) in enumerate(loader, start=epoch * len(loader)):
                    for method in _rotated(list(METHODS), index):
                        begin = time.perf_counter()
                        loss = boxes[method].forward_process(images, targets, extra)
                        loss.item()
                        boxes[method].post_forward_process(loss=loss)
                        seconds[method].append(time.perf_counter() - begin)
                    progress(index + 1, rounds, f"round {index + 1}/{rounds}")
            for box in boxes.values():
                box.clean_modules()
            content["timing_fingerprint"] = fingerprint
            content["batch_size"] = loader.batch_size
            # The first rounds warm the caches.
            content["step_seconds"] = {method: found[min(3, rounds - 1) :] for method, found in seconds.items()}
            self.results.write()
        self._done(bar, "step times", kept=kept)

    def _done(self, bar: _Bar, line: str, *, kept: bool) -> None:
        self.kept += kept
        self.trained += not kept
        bar.done(line, kept=kept)


def _rotated(methods: list[str], by: int) -> list[str]:
    """Another order for each seed, so that no loss always runs first or behind the same one."""
    by %= len(methods)
    return methods[by:] + methods[:by]


class _Measure:
    """Both terms of IKL between a checkpoint's student and the teacher on the validation images, alpha = beta = 1."""

    def __init__(self, torch: Any, driver: Any, images: Any, teacher_config: dict[str, Any], teacher: Path) -> None:
        self.torch = torch
        self.driver = driver
        self.images = torch.stack([image for image, _ in images])
        self.teacher_logits = self._logits(teacher_config, teacher)
        log_labels = torch.log_softmax(self.teacher_logits / MEASURED_AT, 1)
        self.soft_entropy = -(log_labels.exp() * log_labels).sum(1).mean().item()

    def __call__(self, model_config: dict[str, Any], checkpoint: Path) -> dict[str, float]:
        from ikl_plugins import IKLLoss

        criterion = IKLLoss(temperature=MEASURED_AT, weight_temperature=MEASURED_AT)
        criterion(self._logits(model_config, checkpoint), self.teacher_logits)
        return {term: value.item() for term, value in criterion.last_terms._asdict().items()}

    def _logits(self, model_config: dict[str, Any], checkpoint: Path) -> Any:
        from ikl_plugins import models

        network = getattr(models, model_config["key"].removeprefix("ikl_plugins."))(**model_config["kwargs"])
        network.load_state_dict(self.driver.load_checkpoint(checkpoint)["model"])
        network.eval()
        with self.torch.inference_mode():
            return network(self.images)


def _at_epoch_ends(
    progress: Callable[[int, int, str], None], epochs: int, act: Callable[[], None]
) -> Callable[[int, int, str], None]:
    """``progress``, and ``act`` once an epoch is over and its checkpoint written: at the first step of the next."""

    def both(step: int, total: int, text: str) -> None:
        if step > 1 and step % (total // epochs) == 1:
            act()
        progress(step, total, text)

    return both


class _Bar:
    """The bar over all runs; a finished run leaves a line. Without a terminal only the lines remain."""

    def __init__(self, runs: int) -> None:
        from tqdm import tqdm

        form = "{desc:<34} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=runs, bar_format=form, disable=None, leave=False)
        self._runs = runs
        self._finished = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def steps(self, name: str) -> Callable[[float, int, str], None]:
        """The callback for the steps of the running run."""

        def progress(step: float, total: int, text: str) -> None:
            self._bar.n = self._finished + step / total
            self._bar.set_description_str(f"[{self._finished + 1}/{self._runs}] {name}, {text}", refresh=False)
            self._bar.update(0)

        return progress

    def done(self, line: str, *, kept: bool) -> None:
        self._finished += 1
        self._bar.n = self._finished
        self._bar.write(
            f"[{self._finished:2}/{self._runs}] {line}" + ("   (kept from an earlier call)" if kept else "")
        )
        self._bar.refresh()


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=3, help="students per loss (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch: shows that it runs, no more")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of an earlier call")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend end it with one line."""
    args = _parser().parse_args(arguments)
    if args.seeds < 1:
        sys.exit(f"error: demo: --seeds must be at least 1, got {args.seeds}.")
    begin = time.perf_counter()
    demo = None
    try:
        demo = Demo(
            args.output,
            seeds=1 if args.quick else args.seeds,
            epochs=1 if args.quick else None,
            fresh=args.fresh,
        )
        results = demo.run()
        report = "\n".join(
            [
                markdown(results),
                demo_adversarial.markdown(results["adversarial"], THREADS),
                demo_robustbench.markdown(results["robustbench"], args.output / "robustbench"),
            ]
        )
        write_text(args.output / "table.md", report)
        draw_table(results, args.output / "table.png")
        draw_curves(results, args.output / "curves.png")
        draw_class_prior(results, args.output / "class_prior.png")
        demo_adversarial.draw_images(results["adversarial"], args.output / "adversarial_images.png")
        demo_adversarial.draw_robust_accuracy(results["adversarial"], args.output / "robust_accuracy.png")
    except ImportError as error:
        reason = f"`{error.name}` is missing" if error.name else f"{error}"
        sys.exit(f"error: demo: {reason}. Run: python -m pip install --editable '.[demo]'")
    except OSError as error:
        sys.exit(f"error: {error.strerror if error.filename is None else error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        kept = demo.kept + demo.trained if demo is not None else 0
        sys.exit(f"interrupted; {kept} finished parts are kept in {args.output}, call again to go on")
    print(f"\n{report}")
    pictures = ("table", "curves", "class_prior", "adversarial_images", "robust_accuracy")
    print(f"{args.output}: table.md, {', '.join(f'{name}.png' for name in pictures)}, robustbench, results.json")
    print(f"{demo.trained} parts done, {demo.kept} kept from an earlier call, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
