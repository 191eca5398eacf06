"""The first part of tools/demo.py: a teacher, and from it one student per loss and seed.

Each student is trained exactly as `ikl train torchdistill/digits/LOSS.yaml --seed SEED` would.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence.cache import TOOLS, sha256
from evidence.report import binomial_margin, draw_with_range, drawn, listed, text_table
from evidence.timing import in_turn, median_ratio, timed

from demo.parts import Parts, Progress
from ikl_plugins import IKLLoss, models
from ikl_plugins.presets import find_preset
from ikl_plugins.torchdistill import training

CONFIGS = TOOLS.parent / "configs" / "torchdistill" / "digits"
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
# Both terms are measured at the temperature of the configs, with alpha = beta = 1, for all losses alike.
MEASURED_AT = 4.0
TIMED_EPOCHS = 3  # in which the losses take turns after the training, for their step times alone


# --- runs ------------------------------------------------------------------------------------------------------------


def count(seeds: int) -> int:
    """How many parts there are: the teacher, the students, the step times."""
    return 2 + seeds * len(METHODS)


class Distillation:
    """Trains the teacher and its students.

    Args:
        parts: does and keeps each run.
        common: whatever decides the outcome of all runs.
        epochs: instead of those of the configs; None for theirs.
    """

    def __init__(self, parts: Parts, common: dict[str, Any], epochs: int | None) -> None:
        self.parts = parts
        self.common = common
        self.epochs = epochs

    def run(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What the report tells: 'teacher', 'networks', 'runs' by '<method>/<seed>', 'step_seconds' and the like."""
        config, config_sha256 = self._config("teacher", self.parts.output / "teacher")
        place = Path(config["models"]["model"]["dst_ckpt"])

        def train_teacher(folder: Path, progress: Progress) -> dict[str, Any]:
            report = training.run(config, seed=0, progress=progress)
            kept = {key: report[key] for key in ("test_accuracy", "history")}
            return {"config_sha256": config_sha256, "seed": 0, **kept}

        teacher = self.parts(
            "teacher",
            {**self.common, "config": config_sha256},
            train_teacher,
            title="teacher",
            line=lambda found: f"{found['test_accuracy']:6.2f} %",
            valid=lambda found: place.is_file(),
        )
        measure = Measure(config["datasets"]["digits/val"], config["models"]["model"], place)
        asked = {**self.common, "teacher": sha256({**self.common, "config": config_sha256})}
        runs = {f"{method}/{seed}": self._student(method, seed, asked, measure) for seed in seeds for method in METHODS}
        times = self._step_times(asked)
        student = training.load_config(CONFIGS / "ikl.yaml")["models"]["student_model"]
        networks = {"teacher": config["models"]["model"], "student": student}
        return {
            "teacher": {**teacher, "soft_entropy": measure.soft_entropy},
            "networks": {role: network["key"].removeprefix("ikl_plugins.") for role, network in networks.items()},
            "runs": runs,
            "prior_temperature": next(run["prior_temperature"] for run in runs.values() if "class_prior" in run),
            **times,
        }

    def _config(self, method: str, folder: Path) -> tuple[dict[str, Any], str]:
        """The shipped config with its checkpoints in the demo's folders, and the hash of the file."""
        path = CONFIGS / f"{method}.yaml"
        config = training.load_config(path)
        networks = config["models"]
        _student(config)["dst_ckpt"] = str(folder / f"{method}.pt")
        if "teacher_model" in networks:
            networks["teacher_model"]["src_ckpt"] = str(self.parts.output / "teacher" / "teacher.pt")
        if self.epochs is not None:
            config["train"]["num_epochs"] = self.epochs
        return config, hashlib.sha256(path.read_bytes()).hexdigest()

    def _student(self, method: str, seed: int, common: dict[str, Any], measure: Measure) -> dict[str, Any]:
        """Distils one student; returns what is kept of its run."""
        name = f"students/{method}-{seed}"
        config, config_sha256 = self._config(method, self.parts.output / name)

        def train(folder: Path, progress: Progress) -> dict[str, Any]:
            measured: list[dict[str, float]] = []

            def act() -> None:
                measured.append(measure(_student(config), training.last_path(folder / f"{method}.pt")))

            begin = time.perf_counter()
            stepped = at_epoch_ends(progress, config["train"]["num_epochs"], act)
            report = training.run(config, seed=seed, progress=stepped)
            act()
            history = report["history"]
            run = {
                "config_sha256": config_sha256,
                "seed": seed,
                "test_accuracy": report["test_accuracy"],
                "best_val_accuracy": report["best_val_accuracy"],
                **{key: [row[key] for row in history] for key in ("val_accuracy", "train_loss", "seconds_per_step")},
                "terms": {
                    term: [row[f"{method}/{term}"] for row in history]
                    for term in ("weighted_mse", "soft_cross_entropy")
                    if f"{method}/{term}" in history[0]
                },
                "measured": measured,
                "seconds": time.perf_counter() - begin,
            }
            if method in report["class_prior"]:
                criterion = config["train"]["criterion"]["kwargs"]["sub_terms"][method]["criterion"]
                run["class_prior"] = report["class_prior"][method].tolist()
                preset = find_preset(criterion["kwargs"]["preset"], criterion["key"])
                run["prior_temperature"] = preset.keywords["weight_temperature"]
            return run

        return self.parts(
            name,
            {**common, "config": config_sha256, "seed": seed},
            train,
            title=f"{METHODS[method]:4} seed {seed}",
            line=lambda run: f"{run['test_accuracy']:6.2f} %",
        )

    def _step_times(self, common: dict[str, Any]) -> dict[str, Any]:
        """Seconds of a step of each loss, in turn on the same batches: what else the machine does meets all alike."""
        folder = self.parts.output / "step_times"
        configs = {method: self._config(method, folder) for method in METHODS}
        epochs = self.epochs or TIMED_EPOCHS

        def measure(_: Path, progress: Progress) -> dict[str, Any]:
            boxes = {
                method: training.Trainer(config, torch.device("cpu"), seed=0).box
                for method, (config, _) in configs.items()
            }
            batches = list(boxes[BASELINE].train_data_loader)
            rounds = epochs * len(batches)

            def steps(method: str) -> Iterator[float]:
                box = boxes[method]

                def step(images: Any, targets: Any, extra: Any) -> None:
                    loss = box.forward_process(images, targets, extra)
                    loss.item()
                    box.post_forward_process(loss=loss)

                for index, batch in enumerate(itertools.cycle(batches)):
                    if index % len(batches) == 0:
                        box.pre_epoch_process(epoch=index // len(batches))
                    if method == BASELINE:
                        progress(min(index, rounds), rounds, f"round {index + 1}")
                    yield timed(lambda batch=batch: step(*batch))()

            found = in_turn({method: steps(method).__next__ for method in METHODS}, 0.0, least=rounds)
            for box in boxes.values():
                box.clean_modules()
            return {"batch_size": boxes[BASELINE].train_data_loader.batch_size, "step_seconds": found}

        asked = {**common, "configs": {method: config_sha256 for method, (_, config_sha256) in configs.items()}}
        return self.parts("step_times", asked, measure, title="step times", line=lambda found: "")


def _student(config: dict[str, Any]) -> dict[str, Any]:
    """The block of the network that a config trains."""
    networks: dict[str, Any] = config["models"]
    return networks["student_model"] if "student_model" in networks else networks["model"]


class Measure:
    """Both terms of IKL between a checkpoint's student and the teacher on the validation images, alpha = beta = 1."""

    def __init__(self, images: Any, teacher_config: dict[str, Any], teacher: Path) -> None:
        self.images = torch.stack([image for image, _ in images])
        self.teacher_logits = self._logits(teacher_config, teacher)
        log_labels = torch.log_softmax(self.teacher_logits / MEASURED_AT, 1)
        self.soft_entropy = -(log_labels.exp() * log_labels).sum(1).mean().item()

    def __call__(self, model_config: dict[str, Any], checkpoint: Path) -> dict[str, float]:
        criterion = IKLLoss(temperature=MEASURED_AT, weight_temperature=MEASURED_AT)
        criterion(self._logits(model_config, checkpoint), self.teacher_logits)
        if criterion.last_terms is None:
            raise RuntimeError("IKLLoss kept no terms")
        return {term: value.item() for term, value in criterion.last_terms._asdict().items()}

    def _logits(self, model_config: dict[str, Any], checkpoint: Path) -> torch.Tensor:
        network = getattr(models, model_config["key"].removeprefix("ikl_plugins."))(**model_config["kwargs"])
        network.load_state_dict(training.load_checkpoint(checkpoint)["model"])
        network.eval()
        with torch.inference_mode():
            logits: torch.Tensor = network(self.images)
        return logits


def at_epoch_ends(progress: Progress, epochs: int, act: Callable[[], None]) -> Progress:
    """``progress``, and ``act`` once an epoch is over and its checkpoint written: at the first step of the next."""

    def both(step: float, total: int, text: str) -> None:
        if step > 1 and step % (total // epochs) == 1:
            act()
        progress(step, total, text)

    return both


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
    """The table's rows, one for each method that has runs."""
    rows = []
    seconds = results["step_seconds"]
    for method in METHODS:
        accuracies = [run["test_accuracy"] for run in _runs_of(results, method)]
        if not accuracies:
            continue
        rows.append(
            Row(
                method,
                accuracies,
                statistics.fmean(accuracies),
                statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                median_ratio(seconds[method], seconds[BASELINE]),
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
            f"{listed(environment['versions'])}; {environment['threads']} thread on {environment['machine']}.",
            "",
        ]
    )


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw_curve(axes: Any, method: str, curves: list[list[float]]) -> None:
    """Mean over the seeds as a line, their range as a band."""
    if curves:
        dashed = (0, (4, 3)) if method == "dkl" else "-"  # DKL lies on KL
        draw_with_range(axes, curves, color=COLOURS[method], linestyle=dashed, label=METHODS[method], zorder=3)


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Both terms of the loss over the epochs: measured alike for all losses, and as IKL and GKL trained on them."""
    with drawn(path, 2, 2, figsize=(10.5, 7.2), layout="constrained") as (figure, panels):
        _draw_panels(figure, panels, results)


def _draw_panels(figure: Any, panels: Any, results: dict[str, Any]) -> None:
    epochs = max(len(run["measured"]) for run in results["runs"].values())
    style = {"loc": "left", "fontsize": 10}
    names = {"weighted_mse": "weighted MSE [logits²]", "soft_cross_entropy": "soft-label cross entropy [nats]"}
    # The cross entropy cannot fall below the entropy of the teacher's labels; what is above it is the KL divergence.
    floors = {"weighted_mse": 0.0, "soft_cross_entropy": results["teacher"]["soft_entropy"]}
    for column, (term, name) in enumerate(names.items()):
        measured, trained = panels[0][column], panels[1][column]
        for method in METHODS:
            curves = [[row[term] - floors[term] for row in run["measured"]] for run in _runs_of(results, method)]
            _draw_curve(measured, method, curves)
        for method in ("ikl", "gkl"):
            _draw_curve(trained, method, [run["terms"][term] for run in _runs_of(results, method)])
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


def draw_class_prior(results: dict[str, Any], path: Path) -> None:
    """The class prior of the first IKL run as a heat map."""
    from matplotlib.colors import LogNorm

    run = _runs_of(results, "ikl")[0]
    matrix = [[100 * value for value in row] for row in run["class_prior"]]
    size = range(len(matrix))
    positive = [value for row in matrix for value in row if value > 0]
    with drawn(path, figsize=(7.2, 6), layout="constrained") as (figure, axes):
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


def draw_table(results: dict[str, Any], path: Path) -> None:
    """The table, and each seed's accuracy as a dot."""
    rows = summarise(results)
    header, cells = _cells(rows)
    size = (10.5, 1.2 + 0.75 * len(rows))
    with drawn(path, 2, 1, figsize=size, height_ratios=[1, 1], layout="constrained") as (_, (top, bottom)):
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
