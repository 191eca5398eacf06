"""Distils a small student on real digits with five losses, trains it against attacks, and shows what came of it.

    python tools/demo.py

prepares scikit-learn's digits if need be, trains the teacher of configs/torchdistill/digits and from it one student per
loss (CE, KL, DKL, IKL, GKL) and seed, each exactly as `ikl train CONFIG --seed SEED` would. Then it trains the configs
natural, adversarial_trades and adversarial_ikl of configs/mmpretrain/digits, each exactly as `ikl train CONFIG` would,
and attacks what came of them. Last, the network of adversarial_ikl meets AutoAttack on a few images, and RobustBench's
submission is written for it, as `ikl evaluate` and `ikl submit` do.

It prints what it found and writes to runs/demo: the tables (table.md; the first as table.png), both terms of the loss
over the epochs (curves.png), the class prior (class_prior.png), natural and adversarial images
(adversarial_images.png), accuracy against the strength of the attack (robust_accuracy.png), evaluation and submission
folder (robustbench), and results.json with every number, seed, version and config hash.

Each part keeps its result in a folder, so an interrupted demo goes on where it stopped; --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from evidence.cache import write_json, write_text

from demo.parts import Parts

# One thread: the same numbers whatever the machine's cores, and step times that a busy neighbour disturbs least.
THREADS = 1
PACKAGES = ("ikl_plugins", "torch", "torchvision", "torchdistill", "numpy")


def run(output: Path, *, seeds: int, epochs: int | None, fresh: bool) -> dict[str, Any]:
    """Does whatever is not there yet, and writes results.json.

    Returns what it holds, and how many parts were 'done' now and 'kept'.
    """
    import torch

    from demo import adversarial, distill, robustbench
    from ikl_plugins.commands.data import prepare_digits

    torch.set_num_threads(THREADS)
    with Parts(output, distill.count(seeds) + adversarial.PARTS + robustbench.PARTS, fresh=fresh) as parts:
        try:
            data = prepare_digits()
            splits = json.loads((data / "manifest.json").read_text())["splits"]
            versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
            # Whatever decides a run's outcome; a kept run counts only while it is the same.
            common = {
                "data": {split: facts["sha256"] for split, facts in splits.items()},
                "versions": versions,
                "threads": THREADS,
                "epochs": epochs,
            }
            attacked = adversarial.AdversarialRuns(parts, data, common, epochs=epochs, threads=THREADS)
            content = {
                "environment": {
                    "versions": versions,
                    "threads": THREADS,
                    "cores": os.cpu_count(),
                    "machine": f"{platform.machine()} with {os.cpu_count()} cores",
                },
                "data": {split: facts["images"] for split, facts in splits.items()},
                **distill.Distillation(parts, common, epochs).run(range(seeds)),
                "adversarial": attacked.run(),
                "robustbench": robustbench.evaluate_and_submit(parts, data, *attacked.trained(adversarial.IKL)),
            }
        except KeyboardInterrupt:
            sys.exit(f"interrupted; {parts.done} finished parts are kept in {output}, call again to go on")
    write_json(output / "results.json", content)
    return {**content, "done": parts.done - parts.kept, "kept": parts.kept}


def tell(results: dict[str, Any], output: Path) -> str:
    """Writes tables and plots; returns the tables as Markdown."""
    from demo import adversarial, distill, robustbench

    report = "\n".join(
        [
            distill.markdown(results),
            adversarial.markdown(results["adversarial"], THREADS),
            robustbench.markdown(results["robustbench"], output / "robustbench"),
        ]
    )
    write_text(output / "table.md", report)
    distill.draw_table(results, output / "table.png")
    distill.draw_curves(results, output / "curves.png")
    distill.draw_class_prior(results, output / "class_prior.png")
    adversarial.draw_images(results["adversarial"], output / "adversarial_images.png")
    adversarial.draw_robust_accuracy(results["adversarial"], output / "robust_accuracy.png")
    return report


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
    seeds, epochs = (1, 1) if args.quick else (args.seeds, None)
    try:
        results = run(args.output, seeds=seeds, epochs=epochs, fresh=args.fresh)
        report = tell(results, args.output)
    except ImportError as error:
        reason = f"`{error.name}` is missing" if error.name else f"{error}"
        sys.exit(f"error: demo: {reason}. Run: python -m pip install --editable '.[demo]'")
    except OSError as error:
        sys.exit(f"error: {error.strerror if error.filename is None else error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    from ikl_plugins import native
    from ikl_plugins._way import BUILD_ADVICE

    print(f"\n{report}")
    pictures = ("table", "curves", "class_prior", "adversarial_images", "robust_accuracy")
    print(f"{args.output}: table.md, {', '.join(f'{name}.png' for name in pictures)}, robustbench, results.json")
    spent = time.perf_counter() - begin
    print(f"{results['done']} parts done, {results['kept']} kept from an earlier call, {spent:.0f} s")
    if not native.library_path().is_file():
        print(f"C++ operator: not built; {BUILD_ADVICE}")
