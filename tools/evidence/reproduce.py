"""The paper's tables in miniature, on real CIFAR-10 images: trains, evaluates, writes tables and plots.

    ikl data cifar10-folder --from ZIP...
    python tools/reproduce.py distill --teacher-weights resnet56-4bfd9763.th
    python tools/reproduce.py adversarial
    python tools/reproduce.py distill --check      # the tables in docs are those of the recorded results

Each run is a process of its own that keeps its result: after an interruption the same command goes on. `--quick` does
all of it with a few images and steps, in minutes: that checks the machinery and says nothing about the losses.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from evidence.cache import CALLER, TOOLS, ended_by_signals, exclusive, read_json, write_json
from evidence.report import settle

EXPERIMENTS = ("distill", "adversarial")
DOCS = TOOLS.parent / "docs"


def reproduce(args: argparse.Namespace) -> list[Path]:
    """Runs what has no result yet, and writes JSON, tables and plots; returns their paths."""
    name = f"{args.experiment}-quick" if args.quick else args.experiment
    folder = args.output or Path("runs", "reproduce", name)
    results = args.results or (folder / "results" if args.quick else DOCS / "results")
    with ended_by_signals(), exclusive(folder):
        experiment = importlib.import_module(f"evidence.reproduce_{args.experiment}_plan")
        report = importlib.import_module(f"evidence.reproduce_{args.experiment}_report")
        options: dict[str, Any] = {"quick": args.quick, "processes": args.processes, "threads": args.threads}
        if args.experiment == "distill":
            options["weights"] = args.teacher_weights
        content = experiment.run_plan(folder, **options, report=lambda line: print(line, flush=True))
        record, table = (results / f"{args.experiment}{suffix}" for suffix in (".json", ".md"))
        write_json(record, content)
        settle({table: report.render(read_json(record))})
        report.draw(content, results)
    return [record, table, *(results / figure for figure in report.FIGURES)]


def check(experiment: str, results: Path) -> None:
    """Compares the tables with the recorded results.

    Raises:
        ValueError: the experiment's page is not what its JSON says, or docs/results.md shows another table of it.
    """
    report = importlib.import_module(f"evidence.reproduce_{experiment}_report")
    text = report.render(read_json(results / f"{experiment}.json"))
    settle({results / f"{experiment}.md": text}, check=True)
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    heading = {"distill": "## Distillation", "adversarial": "## Adversarial training"}[experiment]
    section = page[page.index(heading) :]
    table = section[section.index("\n| loss ") + 1 :].split("\n\n")[0]
    if not set(table.splitlines()) <= set(text.splitlines()):
        raise ValueError(f"{CALLER}: the table of docs/results.md below '{heading}' is not that of {experiment}.md.")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="a few images and steps: checks the machinery")
    parser.add_argument("--check", action="store_true", help="run nothing; fail where a table in docs is another one")
    parser.add_argument("--output", type=Path, help="the runs (default: runs/reproduce/EXPERIMENT, or ...-quick)")
    parser.add_argument(
        "--results", type=Path, help="tables, plots, JSON (default: docs/results; quick: in the output)"
    )
    parser.add_argument("--processes", type=_at_least_one, default=2, help="runs at once (default: 2)")
    parser.add_argument("--threads", type=_at_least_one, default=1, help="of each run (default: 1)")
    distill = parser.add_argument_group("distill")
    distill.add_argument(
        "--teacher-weights",
        type=Path,
        metavar="FILE",
        help="resnet56-4bfd9763.th (default: weights/ in the folder that IKL_PLUGINS_DOWNLOADS names)",
    )
    distill.add_argument(
        "--teacher-only",
        action="store_true",
        help="write the teacher's weights to where its config reads them, no more",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend end it with one line."""
    args = _parser().parse_args(arguments)
    try:
        if args.check:
            check(args.experiment, args.results or DOCS / "results")
            return
        if args.teacher_only:
            from evidence.reproduce_distill import write_public_teacher

            written = [write_public_teacher(args.teacher_weights)]
        else:
            written = reproduce(args)
    except ImportError as error:
        sys.exit(f"error: {CALLER}: {error}. Run: python -m pip install 'ikl_plugins[demo,test]'")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    print("Written: " + ", ".join(map(str, written)))
