"""Time and memory of the losses, of training steps and of adversarial training: `make bench`.

    python tools/bench.py                       # losses, training, adversarial, each in a process of its own
    python tools/bench.py losses --seconds 30   # one of them
    python tools/bench.py losses --device cuda  # the same on a device
    python tools/bench.py teacher               # what a teacher costs in MMPretrain, and what its options save
    python tools/bench.py device                # launches and waits of training steps on a CUDA device
    python tools/bench.py docs                  # what was measured, into docs/benchmarks.md and docs/results
    python tools/bench.py docs --check          # the page's tables are those of docs/results

A benchmark writes NAME.csv, which holds every figure, and NAME.md, the tables made of it, to --output.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from evidence import device as devices
from evidence.cache import TOOLS, processor
from evidence.report import settle
from ikl_plugins import native

CALLER = "bench"
NAMES = ("losses", "training", "adversarial")
ROOT = TOOLS.parent
Row = dict[str, Any]
Table = dict[str, dict[str, Row]]
_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->\n)", re.DOTALL)


# --- what the benchmarks share ---------------------------------------------------------------------------------------


def by_kind(rows: Iterable[Row], label: Callable[[Row], str]) -> dict[str, Table]:
    """Rows by their kind, the label of their line and the method of their column."""
    found: dict[str, Table] = {}
    for row in rows:
        found.setdefault(row["kind"], {}).setdefault(label(row), {})[row["method"]] = row
    return found


def describe(row: Row) -> str:
    """What the figures depend on, in words."""
    versions = f"torch {row['torch']}, Python {row['python']}"
    if row.get("device"):
        return f"Measured on {row['device']}, driver {row.get('driver', 'none')}, {versions}"
    return f"Measured with `make bench`: {versions}, {row['threads']} threads, {row['processor']}, float32, CPU"


def can_build() -> bool:
    """Builds the C++ operator; says so where that is not possible."""
    try:
        native.build()
        native.enable()
    except RuntimeError as error:
        print(f"Measured without the C++ operator: {error}", flush=True)
        return False
    native.disable()
    return True


def runnable(methods: Iterable[str], *, built: bool) -> list[str]:
    """The methods that can run here."""
    return [name for name in methods if built or "C++ operator" not in name]


def status(key: str) -> int:
    """A figure of /proc/self/status, in kibibytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak_of(benchmark: str, method: str, *, runs: int = 1, env: dict[str, str] | None = None) -> float:
    """Median of a benchmark's ``peak(method)`` over fresh processes."""
    command = [sys.executable, str(TOOLS / "bench.py"), benchmark, "--memory-of", method]
    command += ["--threads", str(torch.get_num_threads())]
    found = (subprocess.check_output(command, env=env, text=True) for _ in range(runs))
    return statistics.median(float(text.split()[-1]) for text in found)


# --- files -----------------------------------------------------------------------------------------------------------


def as_csv(rows: Sequence[Row], device: torch.device) -> str:
    """The rows, and what all of them depend on."""
    origin = {
        **({} if device.type == "cpu" else devices.facts(device)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    text = io.StringIO(newline="")
    fields = dict.fromkeys([*(key for row in rows for key in row), *origin])
    writer = csv.DictWriter(text, list(fields), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **origin} for row in rows)
    return text.getvalue()


def rendered(name: str, table: str) -> str:
    """The Markdown of a benchmark from the text of its CSV file."""
    text: str = importlib.import_module(f"evidence.bench_{name}").render(list(csv.DictReader(io.StringIO(table))))
    return text


def measure(name: str, output: Path, seconds: float | None, threads: int, device: torch.device) -> None:
    """Runs one benchmark in this process and writes its files."""
    module = importlib.import_module(f"evidence.bench_{name}")
    torch.set_num_threads(threads)
    native.disable()  # but where a method has it in its name
    rows = []
    with devices.without_judgement():
        for row in module.measure(module.SECONDS if seconds is None else seconds, device):
            rows.append(row)
            print(", ".join(f"{value}" for value in row.values()), flush=True)
    table = as_csv(rows, device)
    text = rendered(name, table)
    written = settle({output / f"{name}.csv": table, output / f"{name}.md": text + "\n"})
    print(f"\n{text}\nWritten: {', '.join(map(str, written))}")


def filled(page: str, texts: dict[str, str]) -> str:
    """The page, its blocks between `<!-- bench: NAME -->` and `<!-- /bench -->` filled with the texts."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{texts[found[2]]}\n\n{found[3]}", page)


def names(page: str) -> list[str]:
    """The names of the page's blocks, in order."""
    return [found[2] for found in _BLOCK.finditer(page)]


def document(page: Path, results: Path, measured: Path | None) -> dict[Path, str]:
    """The page and the CSV files beside it, as they should be: all of them, or a ValueError where one is missing.

    The CSV files of ``measured``, a folder of NAME.csv, take the place of bench_NAME.csv in ``results``.
    """
    text = page.read_text(encoding="utf-8")
    kept = {name: results / f"bench_{name}.csv" for name in names(text)}
    sources = dict(kept)
    for name in kept if measured is not None else ():
        fresh = measured / f"{name}.csv"
        if name in NAMES or fresh.is_file():  # `make bench` does not run the others
            sources[name] = fresh
    if missing := [str(path) for path in sources.values() if not path.is_file()]:
        raise ValueError(f"{CALLER}: {', '.join(missing)} must be there, for the page's tables. Run `make bench`.")
    tables = {name: path.read_text(encoding="utf-8") for name, path in sources.items()}
    files = {kept[name]: table for name, table in tables.items()}
    return {**files, page: filled(text, {name: rendered(name, table) for name, table in tables.items()})}


# --- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "what", nargs="?", choices=(*NAMES, "teacher", "device", "docs"), help="default: the three benchmarks"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default: runs/bench)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, help="least time spent on each shape, pair of networks or case")
    parser.add_argument("--device", help="default: cpu, and cuda for `device`")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    docs = parser.add_argument_group("docs")
    docs.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    docs.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    docs.add_argument("--check", action="store_true", help="write nothing; fail where the page is not what the CSV say")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(arguments)
    try:
        if args.what == "docs":
            files = document(args.page, args.results, None if args.check else args.output)
            print(f"Written: {', '.join(map(str, settle(files, check=args.check))) or 'nothing, all is up to date'}")
        elif args.memory_of:
            torch.set_num_threads(args.threads)
            native.disable()
            print(importlib.import_module(f"evidence.bench_{args.what}").peak(args.memory_of))
        elif args.what:
            device = torch.device(args.device or ("cuda" if args.what == "device" else "cpu"))
            if device.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"{CALLER}: `--device` must be there, but torch finds no CUDA device. Choose cpu.")
            measure(args.what, args.output, args.seconds, args.threads, device)
        else:
            given = sys.argv[1:] if arguments is None else arguments
            for name in NAMES:
                subprocess.run([sys.executable, str(TOOLS / "bench.py"), name, *given], check=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
