"""The adversarial part of tools/demo.py: natural training, TRADES and IKL on the digits, attacked with PGD.

Each config of configs/mmpretrain/digits is trained as `ikl train CONFIG --work-dir FOLDER` does it, in a process of its
own; its checkpoint with the best validation score is attacked on the test images.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from evidence.cache import TOOLS, sha256
from evidence.report import binomial_margin, draw_with_margin, drawn, listed, text_table

from demo.parts import Parts, Progress

CONFIGS = TOOLS.parent / "configs" / "mmpretrain" / "digits"
# The configs in the order of the table, and what the table calls them.
NATURAL = "natural"
IKL = "adversarial_ikl"
METHODS = {NATURAL: "natural", "adversarial_trades": "TRADES", IKL: "IKL"}
TITLES = {
    NATURAL: "cross entropy, natural images",
    "adversarial_trades": "KL between natural and adversarial",
    IKL: "IKL between natural and adversarial",
}
COLOURS = {NATURAL: "#7f7f7f", "adversarial_trades": "#1f77b4", IKL: "#d62728"}
MARKERS = {NATURAL: "s", "adversarial_trades": "^", IKL: "o"}
SHOWN = (NATURAL, IKL)  # whose adversarial images are drawn
PACKAGES = ("mmengine", "mmpretrain", "mmcv")  # by the names under which they are imported
PARTS = len(METHODS) + 1  # of the demo's bar
# The attack of table and curve. The radii are fractions of the one that TRADES and IKL were trained with.
STEPS = 20
RELATIVE_STEP = 0.25
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
ATTACK_SEED = 0
EXAMPLES = 6
# A line of MMEngine's log: epoch, batch and batches per epoch.
LOGGED = re.compile(r"Epoch\((train|val)\)\s*\[(\d+)\]\[\s*(\d+)/(\d+)\]")


# --- runs ------------------------------------------------------------------------------------------------------------


class AdversarialRuns:
    """Trains the three configs and attacks what came of them.

    Args:
        parts: does and keeps each training, and the attacks.
        data: the digits, as `ikl data digits` leaves them.
        common: whatever else decides an outcome.
        epochs: instead of those of the configs; None for theirs.
        threads: of each training.

    Raises:
        ImportError: one of :data:`PACKAGES` is missing.
        ValueError: the configs attack with different radii.
    """

    def __init__(
        self, parts: Parts, data: Path, common: dict[str, Any], *, epochs: int | None = None, threads: int = 1
    ) -> None:
        self.versions = package_versions()
        with _quiet():
            from mmengine.config import Config

            # Without their imports: a demo that finds everything done has no need of mmpretrain.
            self.configs = {
                method: Config.fromfile(CONFIGS / f"{method}.py", import_custom_modules=False) for method in METHODS
            }
        self.parts = parts
        self.data = data.resolve()
        self.epochs = epochs
        self.threads = threads
        self._checkpoints: dict[str, Path] = {}
        self._common = {**common, "versions": {**common.get("versions", {}), **self.versions}}
        radii = {str(config.model.attack.eps) for config in self.configs.values() if "attack" in config.model}
        if len(radii) != 1:
            raise ValueError(
                f"demo: the configs of {CONFIGS} must attack with the same eps, got {', '.join(sorted(radii))}. "
                f"Make them equal."
            )
        (self.eps,) = radii

    def run(self) -> dict[str, Any]:
        """What the report tells: 'versions', 'runs' by method, 'evaluation'.

        Raises:
            ValueError: a training fails, or leaves no best checkpoint; the message names its log.
        """
        runs, asked = {}, {}
        for method, config in self.configs.items():
            asked[method] = self._asked(config)
            place = self.parts.output / "adversarial" / method
            runs[method] = self.parts(
                f"adversarial/{method}",
                asked[method],
                lambda folder, progress, method=method: self._train(method, folder, progress),
                title=METHODS[method],
                line=lambda run: f"{run['best_score']:6.2f} %  ({run['score']} on validation images)",
                valid=lambda run, place=place: (place / run["checkpoint"]).is_file(),
            )
            self._checkpoints[method] = place / runs[method]["checkpoint"]
        evaluation = self.parts(
            "adversarial/attacks",
            [sha256(asked), STEPS, RELATIVE_STEP, FRACTIONS, ATTACK_SEED, EXAMPLES],
            lambda folder, progress: evaluate(self.configs, self._checkpoints, self.data, self.eps, progress),
            title=f"PGD-{STEPS}",
            line=lambda found: "robust accuracy",
        )
        return {"versions": self.versions, "runs": runs, "evaluation": evaluation}

    def trained(self, method: str) -> tuple[Any, Path]:
        """The config of a training, and its checkpoint with the best validation score."""
        return self.configs[method], self._checkpoints[method]

    def _asked(self, config: Any) -> dict[str, Any]:
        # All settings, those of the bases included. Where the data lies decides nothing, what it is `common` tells.
        settings = json.dumps(config.to_dict(), sort_keys=True, default=str).replace(config.data_root, "digits")
        return {**self._common, "config": sha256(settings), "epochs": self.epochs, "threads": self.threads}

    def _train(self, method: str, folder: Path, progress: Progress) -> dict[str, Any]:
        """Trains one config in a process of its own; returns what is kept of it."""
        config = self.configs[method]
        work, log = folder / "work", folder / "log.txt"
        shutil.rmtree(work, ignore_errors=True)  # of a call that was interrupted
        command = [sys.executable, "-m", "ikl_plugins", "train", str(CONFIGS / f"{method}.py"), "--work-dir", str(work)]
        epochs = config.train_cfg.max_epochs if self.epochs is None else self.epochs
        if self.epochs is not None:
            command += ["--cfg-options", f"train_cfg.max_epochs={self.epochs}"]
        begin = time.perf_counter()
        code = _follow(command, self._environment(), log, epochs, progress)
        seconds = time.perf_counter() - begin
        best = sorted(work.glob("best_*.pth"))
        if code != 0 or len(best) != 1:
            reason = f"its process ended with {code}" if code else f"it left {len(best)} best checkpoints"
            raise ValueError(f"demo: the training of {METHODS[method]} failed: {reason}. Its log is {log}.")
        from ikl_plugins.checkpoints import load_content

        content = load_content(best[0])
        return {
            "checkpoint": str(best[0].relative_to(folder)),
            "best_epoch": content["meta"]["epoch"],
            "best_score": content["message_hub"]["runtime_info"]["best_score"],
            "score": config.default_hooks.checkpoint.save_best,
            "epochs": epochs,
            "seed": config.randomness.seed,
            "seconds": seconds,
        }

    def _environment(self) -> dict[str, str]:
        """The environment of a training: this data, so many threads, and the CPU as for the rest of the demo."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return {**os.environ, **threads, "IKL_PLUGINS_DATA": str(self.data.parent), "CUDA_VISIBLE_DEVICES": ""}


def package_versions() -> dict[str, str]:
    """The installed versions of :data:`PACKAGES`, under the names of whichever packages bring them."""
    distributions = metadata.packages_distributions()
    versions = {}
    for package in PACKAGES:
        if package not in distributions:
            raise ImportError(f"demo: {package} is missing", name=package)
        name = distributions[package][0]
        versions[name] = metadata.version(name)
    return versions


def _follow(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    epochs: int,
    progress: Progress,
) -> int:
    """Runs a training, writes what it says to a log and tells its progress; returns the exit code."""
    progress(0.0, epochs, "starts")
    pipe = subprocess.PIPE
    with (
        log.open("w") as written,
        subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            for line in process.stdout:
                written.write(line)
                written.flush()
                if found := LOGGED.search(line):
                    loop, epoch, batch, batches = found[1], *map(int, found.groups()[1:])
                    share = epoch - 1 + batch / batches if loop == "train" else epoch
                    progress(share, epochs, f"epoch {epoch}/{epochs}")
        except BaseException:  # the training ends with the demo
            process.kill()
            raise
    return process.returncode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of what the OpenMMLab libraries lack, and without what they log on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmengine.logging import MMLogger

        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel("WARNING")
        try:
            yield
        finally:
            logger.setLevel(level)


_Seen = tuple[Any, Any]  # predictions (N,) and pixels (N, C, H, W) in [0, 1]


# --- attack ----------------------------------------------------------------------------------------------------------


def evaluate(
    configs: dict[str, Any], checkpoints: dict[str, Path], data: Path, eps: str, progress: Progress
) -> dict[str, Any]:
    """Accuracy on the test images, natural and under PGD of growing strength, and some of its images.

    Returns 'training_eps' and 'eps', a list, in [0, 1]; 'accuracy', in percent for each of them, by method, the first
    without an attack; 'images', how many there were, 'steps' and 'relative_step'; 'examples'.
    """
    import torch

    with _quiet():
        from ikl_plugins.adversarial import PGD
        from ikl_plugins.robustbench import from_mmpretrain, load_images

    training_eps = PGD(eps=eps, steps=1, step_size=0.1).eps
    radii = [fraction * training_eps for fraction in FRACTIONS]
    found = load_images(data / "test")
    images, labels = found.images, found.labels
    accuracy: dict[str, list[float]] = {method: [] for method in METHODS}
    seen: dict[str, _Seen] = {}
    for place, method in enumerate(METHODS):
        with _quiet():
            model = from_mmpretrain(configs[method], checkpoints[method])
        for index, radius in enumerate(radii):
            attacked = images
            if radius > 0:
                pgd = PGD(eps=radius, steps=STEPS, step_size=RELATIVE_STEP * radius, random_start="uniform")
                # The same start for all models and radii, but for its scale.
                generator = torch.Generator().manual_seed(ATTACK_SEED)
                attacked = pgd(model, images, labels=labels, generator=generator)
            with torch.no_grad():
                predicted = model(attacked).argmax(1)
            accuracy[method].append(100 * (predicted == labels).double().mean().item())
            if FRACTIONS[index] in (0.0, 1.0):
                seen[f"{method}/{FRACTIONS[index]:g}"] = predicted, attacked
            progress(place * len(radii) + index + 1, len(METHODS) * len(radii), f"{METHODS[method]}, eps {radius:.3f}")
    return {
        "training_eps": training_eps,
        "eps": radii,
        "accuracy": accuracy,
        "images": len(labels),
        "steps": STEPS,
        "relative_step": RELATIVE_STEP,
        "examples": _examples(labels, seen),
    }


def _examples(labels: Any, seen: dict[str, _Seen]) -> dict[str, Any]:
    """Some test images, what the attacks made of them, and what the models see in them.

    Those come first which the naturally trained model gets right and loses under attack, each of another class.
    """
    natural, fallen = seen[f"{NATURAL}/0"][0], seen[f"{NATURAL}/1"][0]
    falls = ((natural == labels) & (fallen != labels)).tolist()
    taken: set[int] = set()
    ranks = []
    for index, label in enumerate(labels.tolist()):
        first = falls[index] and label not in taken
        if first:
            taken.add(label)
        ranks.append((not first, not falls[index], index))
    chosen = [index for *_, index in sorted(ranks)[:EXAMPLES]]
    return {
        "shape": list(seen[f"{NATURAL}/0"][1].shape[1:]),
        "fall": sum(falls[index] for index in chosen),
        "digits": [
            {
                "label": labels[index].item(),
                "natural": _to_hex(seen[f"{NATURAL}/0"][1][index]),
                "models": {
                    method: {
                        "natural_prediction": seen[f"{method}/0"][0][index].item(),
                        "prediction": seen[f"{method}/1"][0][index].item(),
                        "adversarial": _to_hex(seen[f"{method}/1"][1][index]),
                    }
                    for method in SHOWN
                },
            }
            for index in chosen
        ],
    }


def _to_hex(pixels: Any) -> str:
    """An image in [0, 1] as two hexadecimal digits per value."""
    return bytes((255 * pixels).round().byte().flatten().tolist()).hex()


def _from_hex(text: str, shape: list[int]) -> Any:
    """The values in [0, 1], with the channels last."""
    import numpy

    return numpy.frombuffer(bytes.fromhex(text), dtype=numpy.uint8).reshape(shape).transpose(1, 2, 0) / 255


# --- what was found, and how it is told ------------------------------------------------------------------------------


def _in_255(eps: float) -> str:
    return f"{255 * eps:.4g}/255"


def _cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, as text."""
    evaluation = results["evaluation"]
    header = ["training", "", "natural [%]", f"PGD-{evaluation['steps']} [%]", "training [s]"]
    cells = []
    for method, name in METHODS.items():
        natural, robust = _accuracies(evaluation, method)
        seconds = results["runs"][method]["seconds"]
        cells.append([name, TITLES[method], f"{natural:.2f}", f"{robust:.2f}", f"{seconds:.0f}"])
    return header, cells


def _accuracies(evaluation: dict[str, Any], method: str) -> tuple[float, float]:
    """Natural accuracy, and that under the attack of the training's strength."""
    by_eps = dict(zip(evaluation["eps"], evaluation["accuracy"][method], strict=True))
    return by_eps[0.0], by_eps[evaluation["training_eps"]]


def markdown(results: dict[str, Any], threads: int) -> str:
    """The report on the results of :meth:`AdversarialRuns.run` as Markdown."""
    evaluation, runs = results["evaluation"], results["runs"]
    eps, steps, images = evaluation["training_eps"], evaluation["steps"], evaluation["images"]
    scores: dict[str, list[str]] = {}
    for method, name in METHODS.items():
        scores.setdefault(runs[method]["score"], []).append(name)
    chosen = ", ".join(f"{score} for {' and '.join(names)}" for score, names in scores.items())
    widest = max(binomial_margin([value], images) for method in METHODS for value in _accuracies(evaluation, method))
    epochs = sorted({run["epochs"] for run in runs.values()})
    seeds = sorted({run["seed"] for run in runs.values()})
    return "\n".join(
        [
            "# Digits: the same network under attack",
            "",
            f"Natural training, TRADES and IKL by mmpretrain's own train script, {_listed(epochs, 'epoch')}, "
            f"{_listed(seeds, 'seed', after=False)}, the checkpoint with the best score on the validation images "
            f"({chosen}). PGD-{steps}: {steps} steps of {evaluation['relative_step']:g} eps up the cross entropy, "
            f"L-infinity, from a uniform random start; eps = {_in_255(eps)}, that of the training, on {images} test "
            f"images. Training time is that of the whole process, validation included, on {threads} "
            f"thread{'s' * (threads > 1)}.",
            "",
            text_table(*_cells(results)),
            "",
            f"PGD accuracy is an upper bound of the robust accuracy: a stronger attack can only lower it, and this is "
            f"no AutoAttack. One seed on {images} test images orders nothing that lies closer than about "
            f"±{widest:.1f} points, which the choice of the test images alone leaves open (95 %).",
            "",
            f"{listed(results['versions'])}.",
            "",
        ]
    )


def _listed(numbers: list[int], unit: str, *, after: bool = True) -> str:
    several = "s" * (numbers != [1] if after else len(numbers) > 1)
    listed = ", ".join(map(str, numbers))
    return f"{listed} {unit}{several}" if after else f"{unit}{several} {listed}"


# --- plots -----------------------------------------------------------------------------------------------------------


def draw_robust_accuracy(results: dict[str, Any], path: Path) -> None:
    """Accuracy under attack against its strength, a curve for each method."""
    evaluation = results["evaluation"]
    images = evaluation["images"]
    eps = [255 * radius for radius in evaluation["eps"]]
    trained = 255 * evaluation["training_eps"]
    with drawn(path, figsize=(8, 5), layout="constrained") as (_, axes):
        for method, name in METHODS.items():
            values, colour = evaluation["accuracy"][method], COLOURS[method]
            style = {
                "color": colour,
                "marker": MARKERS[method],
                "label": name,
                "lw": 1.8,
                "zorder": 3,
                "clip_on": False,
            }
            draw_with_margin(axes, eps, values, images, **style)
        axes.axvline(trained, color="black", lw=1, ls=":", label=f"eps of the training, {trained:g}/255")
        axes.set_xlabel("eps of the attack, L-infinity [1/255 of the range from black to white]")
        axes.set_ylabel(f"accuracy under PGD-{evaluation['steps']} [%]")
        axes.set_xticks(eps)
        axes.set_xlim(0, max(eps))
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.set_title(
            f"Robust accuracy on {images} test digits, an upper bound; one seed\n"
            "band: what the choice of the test images leaves open (95 %)",
            loc="left",
            fontsize=10,
        )


def draw_images(results: dict[str, Any], path: Path) -> None:
    """Natural images, adversarial images and their difference, with what the models see in them."""
    evaluation = results["evaluation"]
    examples, eps = evaluation["examples"], evaluation["training_eps"]
    digits = examples["digits"]
    rows = ["natural\nimage"]
    for method in SHOWN:
        rows += [f"attack on\n{METHODS[method]}\ntraining", "difference"]
    size = (1.6 * len(digits) + 2.2, 1.75 * len(rows) + 0.9)
    with drawn(path, len(rows), len(digits), figsize=size, squeeze=False, layout="constrained") as (figure, panels):
        for column, digit in enumerate(digits):
            natural = _from_hex(digit["natural"], examples["shape"])
            pictures = [natural]
            titles = [[(METHODS[method], digit["models"][method]["natural_prediction"]) for method in SHOWN]]
            for method in SHOWN:
                seen = digit["models"][method]
                adversarial = _from_hex(seen["adversarial"], examples["shape"])
                difference = 255 * (adversarial - natural).mean(2)
                pictures += [adversarial, difference]
                titles += [[(METHODS[method], seen["prediction"])], []]
            for row, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
                axes = panels[row][column]
                shown = axes.imshow(picture, cmap="RdBu_r", vmin=-255 * eps, vmax=255 * eps, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                for place, (name, prediction) in enumerate(title):
                    right = prediction == digit["label"]
                    x = (2 * place + 1) / (2 * len(title))
                    axes.text(
                        x,
                        1.03,
                        f"{name}: {prediction}",
                        transform=axes.transAxes,
                        ha="center",
                        va="bottom",
                        fontsize=9,
                        color="#2a7d2a" if right else "#c62828",
                        weight="normal" if right else "bold",
                    )
                if column == 0:
                    axes.set_ylabel(rows[row], rotation=0, ha="right", va="center", labelpad=8)
        # The last picture is a difference; all of them have its scale.
        bar = figure.colorbar(
            shown,
            ax=panels[2::2].ravel().tolist(),
            ticks=[-255 * eps, 0, 255 * eps],
            shrink=0.6,
            fraction=0.05,
            aspect=30,
        )
        bar.set_label("difference [1/255 of the range from black to white]", labelpad=8)
        bar.outline.set_visible(False)
        which = (
            "that natural training gets right and loses under attack"
            if examples["fall"] == len(digits)
            else f"{examples['fall']} of which natural training gets right and loses under attack"
        )
        figure.suptitle(
            f"Test digits {which}: PGD-{evaluation['steps']}, eps = {_in_255(eps)}\n"
            "Above each image: what the network trained so takes it for (green: right, red: wrong)\n"
            "Difference: mean over the three colours, on the scale on the right and not that of the images",
            x=0.01,
            ha="left",
            fontsize=10,
        )
