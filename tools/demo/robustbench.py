"""The last part of tools/demo.py: the IKL model goes through AutoAttack, the checks and a submission folder.

The same as `ikl evaluate` and `ikl submit` do with a checkpoint, on a few of the digits. What comes of it is marked as
a demonstration, as RobustBench has no leaderboard of digits.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from evidence.report import listed

from demo.parts import Parts, Progress

PARTS = 1  # of the demo's bar
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


def evaluate_and_submit(parts: Parts, data: Path, config: Any, checkpoint: Path) -> dict[str, Any]:
    """Evaluates the checkpoint of a training and writes its submission folder, both in the folder robustbench.

    Raises ImportError where RobustBench is missing, ValueError where a check fails.
    """
    from ikl_plugins import robustbench as room

    architecture, eps = config.model.backbone.architecture, str(config.model.attack.eps)
    model = room.load_checkpoint(checkpoint, architecture)
    images = room.load_images(data / "test", n_examples=EXAMPLES)
    weights = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    options = {"seed": SEED, "data": images, "checkpoint": checkpoint, "model_name": architecture}

    def attack(folder: Path, progress: Progress) -> Any:
        attacks = {"apgd-ce": 0, "apgd-t": 1, "fab-t": 2, "square": 3}
        steps = len(attacks) + 2  # the curve and the submission are one each

        def attacked(made: Any) -> None:
            share = attacks[made.attack] + made.batch / made.batches
            progress(share, steps, f"{made.attack}, {made.standing} of {made.n_examples} standing")

        progress(0, steps, "starts")
        log = folder / "evaluation" / "evaluation.json"
        pixels, labels = images.images, images.labels
        evaluation = room.evaluate(model, pixels, labels, eps=eps, log=log, progress=attacked, **options)
        numerator, _, denominator = eps.partition("/")
        radii = [f"{float(numerator) * share:g}/{denominator}" for share in CURVE]

        def at_radius(radius: Any, made: Any) -> None:
            progress(len(attacks), steps, f"eps {radius}")

        evaluation.log["curve"] = room.curve(
            model, pixels, labels, radii, attacks=[CURVE_ATTACK], progress=at_radius, **options
        )
        evaluation.save(log)
        room.write_report(evaluation, log.parent, images=images)
        progress(len(attacks) + 1, steps, "submission")
        return evaluation

    def submit(folder: Path, evaluation: Any) -> dict[str, bool]:
        all_images, measured = room.load_images(data / "test"), evaluation.robust_accuracy
        pixels, labels = all_images.images, all_images.labels
        report = room.preflight(
            model, pixels, labels, eps=eps, claimed=measured, measured=measured, data=all_images, progress=False
        )
        room.write_submission(
            folder / "submission",
            model=model,
            architecture=architecture,
            dataset="cifar10",
            evaluation=evaluation,
            images=images,
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

    def make(folder: Path, progress: Progress) -> dict[str, Any]:
        begin = time.perf_counter()
        evaluation = attack(folder, progress)
        seconds = time.perf_counter() - begin
        return {
            "architecture": architecture,
            "eps": eps,
            "images": len(images),
            "natural_accuracy": evaluation.natural_accuracy,
            "robust_accuracy": evaluation.robust_accuracy,
            "attacks": evaluation.log["attacks"],
            "seconds": seconds,
            "versions": evaluation.log["versions"],
            "checks": submit(folder, evaluation),
        }

    return parts(
        "robustbench",
        [weights, images.sha256, eps, CURVE, CURVE_ATTACK, SEED, PAPER, FOOTNOTE],
        make,
        title="AutoAttack",
        line=lambda found: f"{found['robust_accuracy']:6.2f} %, submission",
        valid=lambda found: (parts.output / "robustbench" / "submission").is_dir(),
    )


def markdown(results: dict[str, Any], folder: Path) -> str:
    """The report of :func:`evaluate_and_submit` as Markdown."""
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
            f"{listed(results['versions'])}.",
            "",
        ]
    )
