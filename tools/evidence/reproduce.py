"""The paper's tables in miniature, on real CIFAR-10 images: trains, evaluates, writes tables and plots.

    python tools/prepare_data.py cifar10-folder --from ZIP...
    python tools/reproduce.py distill --teacher-weights resnet56-4bfd9763.th
    python tools/reproduce.py adversarial

Each run is a process of its own that keeps its result: after an interruption the same command goes on. `--quick` does
all of it with a few images and steps, in minutes: that checks the machinery and says nothing about the losses.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evidence.reproduce_jobs import CALLER, ended_by_signals, exclusive, write_json

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]


def _distill(args: argparse.Namespace, folder: Path, results: Path) -> list[Path]:
    from demo.report import write_text
    from evidence.reproduce_distill import run_plan
    from evidence.reproduce_distill_report import FIGURES, draw, render

    content = run_plan(
        folder, args.teacher_weights, quick=args.quick, processes=args.processes, threads=args.threads, report=_report
    )
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "distill.json", content)
    write_text(results / "distill.md", render(content))
    draw(content, results)
    return [results / name for name in ("distill.json", "distill.md", *FIGURES)]


def _adversarial(args: argparse.Namespace, folder: Path, results: Path) -> list[Path]:
    from evidence.reproduce_adversarial import reproduce

    return reproduce(folder, results, quick=args.quick, processes=args.processes, threads=args.threads, report=_report)


EXPERIMENTS = {"distill": _distill, "adversarial": _adversarial}


def _report(line: str) -> None:
    print(line, flush=True)


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'. Use 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="a few images and steps: checks the machinery")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="the runs (default: runs/reproduce/EXPERIMENT, or ...-quick)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="tables, plots, JSON (default: docs/results; quick: in the output)",
    )
    parser.add_argument("--processes", type=_at_least_one, default=2, help="runs at once (default: 2)")
    parser.add_argument("--threads", type=_at_least_one, default=1, help="of each run (default: 1)")
    parser.add_argument(
        "--teacher-weights", type=Path, metavar="FILE", help="distill: public weights of the teacher, "
        "resnet56-4bfd9763.th (default: weights/ in the folder that IKL_PLUGINS_DOWNLOADS names)"
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend end it with one line."""
    args = _parser().parse_args(arguments)
    name = f"{args.experiment}-quick" if args.quick else args.experiment
    folder = args.output or Path("runs", "reproduce", name)
    results = args.results or (folder / "results" if args.quick else ROOT / "docs" / "results")
    try:
        with ended_by_signals(), exclusive(folder):
            written = EXPERIMENTS[args.experiment](args, folder, results)
    except ImportError as error:
        sys.exit(f"error: {CALLER}: {error}. Run: python -m pip install 'ikl_plugins[demo,test]'")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    print("Written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
