"""The last part of tools/demo.py: the IKL model goes through AutoAttack, the checks and a submission folder.

The same as tools/robustbench_eval.py and tools/robustbench_submit.py do with a checkpoint, on a few of the digits. What
comes of it is marked as a demonstration, as RobustBench has no leaderboard of digits.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.report import sha256, write_text

__all__ = ["PARTS", "RobustBenchRun", "markdown"]

PARTS = 2  # of the demo's bar: the attacks, and what comes of them
EXAMPLES = 20  # two of each digit; Square takes most of the time, and as much more for each image that stands
CURVE = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the training's eps
CURVE_ATTACK = "apgd-ce"
SEED = 0
# There is no paper about this network.
PAPER = {
    "name": "Doe2026Demonstration_WRN-10-1",
    "title": "Demonstration on Handwritten Digits",
    "link": "https://example.org",
    "authors": "Jane Doe",
    "venue": "Unpublished",
}
FOOTNOTE = "A network for scikit-learn's digits, in the form of an entry for CIFAR-10."


class RobustBenchRun:
    """Evaluates a checkpoint and writes its submission folder, unless an earlier call has done so.

    Args:
        folder: for the evaluation and the submission.
        data: the digits, as prepare_data leaves them.
        config: of the training; it names the network and the radius.
        checkpoint: of the training.

    Raises:
        ImportError: RobustBench is missing.
    """

    def __init__(self, folder: Path, data: Path, config: Any, checkpoint: Path) -> None:
        import ikl_plugins.robustbench as robustbench

        self.robustbench = robustbench
        self.folder = folder
        self.images = data / "test"
        self.architecture = config.model.backbone.architecture
        self.eps = str(config.model.attack.eps)
        self.checkpoint = checkpoint

    def run(
        self,
        kept: dict[str, Any],
        steps: Callable[[str], Callable[[float, int, str], None]],
        done: Callable[[str, bool], None],
    ) -> None:
        """Does whatever ``kept`` does not hold yet.

        Args:
            kept: what earlier calls have found; filled here.
            steps: the progress of a part, by its name.
            done: is told the line of each finished part, and whether it was there already.

        Raises:
            ValueError: a check fails.
        """
        room = self.robustbench
        model = room.load_checkpoint(self.checkpoint, self.architecture)
        images = room.load_images(self.images, n_examples=EXAMPLES)
        weights = hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()
        fingerprint = sha256([weights, images.sha256, self.eps, CURVE, CURVE_ATTACK, SEED, PAPER, FOOTNOTE])
        finished = kept.get("fingerprint") == fingerprint and (self.folder / "submission").is_dir()
        if not finished:
            begin = time.perf_counter()
            evaluation = self._evaluate(model, images, fingerprint, steps("AutoAttack"))
            kept.update(
                fingerprint=fingerprint,
                architecture=self.architecture,
                eps=self.eps,
                images=len(images),
                natural_accuracy=evaluation.natural_accuracy,
                robust_accuracy=evaluation.robust_accuracy,
                attacks=evaluation.log["attacks"],
                seconds=time.perf_counter() - begin,
                versions=evaluation.log["versions"],
            )
        done(f"AutoAttack {kept['robust_accuracy']:13.2f} %", finished)
        if not finished:
            kept["checks"] = self._submit(model, evaluation, steps("submission"))
        done("submission", finished)

    def _evaluate(self, model: Any, images: Any, fingerprint: str, progress: Callable[[float, int, str], None]) -> Any:
        room = self.robustbench
        log = self.folder / "evaluation" / "evaluation.json"
        marker = log.with_name("fingerprint.txt")
        if not marker.is_file() or marker.read_text() != fingerprint:  # what lies there is of another network
            shutil.rmtree(log.parent, ignore_errors=True)
            log.parent.mkdir(parents=True)
            write_text(marker, fingerprint)
        options = {"seed": SEED, "data": images, "checkpoint": self.checkpoint, "model_name": self.architecture}
        pixels, labels = images.images, images.labels
        attacks = 4

        def attacked(made: Any) -> None:
            place = {"apgd-ce": 0, "apgd-t": 1, "fab-t": 2, "square": 3}[made.attack]
            share = place + made.batch / made.batches
            progress(share, attacks + 1, f"{made.attack}, {made.standing} of {made.n_examples} standing")

        progress(0, attacks + 1, "starts")
        evaluation = room.evaluate(model, pixels, labels, eps=self.eps, log=log, progress=attacked, **options)
        numerator, _, denominator = self.eps.partition("/")
        radii = [f"{float(numerator) * share:g}/{denominator}" for share in CURVE]
        evaluation.log["curve"] = room.curve(
            model,
            pixels,
            labels,
            radii,
            attacks=[CURVE_ATTACK],
            progress=lambda eps, made: progress(attacks, attacks + 1, f"eps {eps}"),
            **options,
        )
        evaluation.save(log)
        room.write_report(evaluation, log.parent, images=images)
        return evaluation

    def _submit(self, model: Any, evaluation: Any, progress: Callable[[float, int, str], None]) -> dict[str, bool]:
        room = self.robustbench
        progress(0, 2, "preflight")
        images = room.load_images(self.images)
        measured = evaluation.robust_accuracy
        report = room.preflight(model, images.images, images.labels, eps=self.eps, claimed=measured, measured=measured)
        progress(1, 2, "submission")
        room.write_submission(
            self.folder / "submission",
            model=model,
            architecture=self.architecture,
            dataset="cifar10",
            evaluation=evaluation,
            preflight=report,
            additional_data=False,
            generated_data=False,
            licence="MIT",
            footnote=FOOTNOTE,
            demonstration=True,
            force=True,
            **PAPER,
        )
        return {found.name: found.passed for found in report.checks}


def markdown(results: dict[str, Any], folder: Path) -> str:
    """The report on the results as Markdown.

    Args:
        results: as :meth:`RobustBenchRun.run` fills them.
        folder: where its files lie.
    """
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    passed = [name for name, outcome in results["checks"].items() if outcome]
    return "\n".join(
        [
            "# Digits: from checkpoint to submission",
            "",
            f"The network of IKL, RobustBench's own {results['architecture']}, under standard AutoAttack "
            f"({', '.join(results['attacks'])}), L-infinity, eps = {results['eps']}, on {results['images']} test "
            f"images: natural accuracy {results['natural_accuracy']:.2f} %, robust accuracy "
            f"{results['robust_accuracy']:.2f} %. One image is {100 / results['images']:g} points. Attacks and curve "
            f"took {results['seconds']:.0f} s.",
            "",
            f"Passed before the submission: {', '.join(passed)}.",
            "",
            f"{folder}: the evaluation with its report, and the submission folder, marked as a demonstration.",
            "",
            f"{versions}.",
            "",
        ]
    )
