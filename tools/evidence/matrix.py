"""The fast tests of the core and of both adapters with other releases of torch and Python: `make test-matrix`.

    python tools/matrix.py                  # every row of ROWS whose Python is on the PATH
    python tools/matrix.py oldest newest

Each row has an environment of its own in `.venv-matrix`, some gigabytes each. The outcome of all rows goes to
docs/compatibility.md; a row that was not run keeps the line that it has there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ikl_plugins._files import written_aside

__all__ = ["ROWS", "Row", "main"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
ENVIRONMENTS = ROOT / ".venv-matrix"
CORE = ("tests/core", "tests/adversarial")
TORCHDISTILL = ("tests/torchdistill",)
MMPRETRAIN = ("tests/mmpretrain",)


class Row(NamedTuple):
    """One environment: an interpreter, the releases that it pins, the extras, and the tests that run in it."""

    python: str
    pins: tuple[str, ...]
    extras: str
    tests: tuple[str, ...]


ROWS = {
    "oldest": Row("3.10", ("torch==2.4.0", "numpy<2.3"), "data,test", CORE),
    "oldest for MMPretrain": Row(
        "3.10", ("torch==2.6.0", "torchvision==0.21.0"), "data,mmpretrain,robustbench,test", MMPRETRAIN
    ),
    "oldest for torchdistill": Row(
        "3.10", ("torch==2.12.0", "torchvision==0.27.0"), "data,test,torchdistill", TORCHDISTILL
    ),
    "pinned": Row("3.11", (), "demo,test", CORE + TORCHDISTILL + MMPRETRAIN),
    "newest": Row(
        "3.12",
        ("torch==2.15.0", "torchvision==0.29.2"),
        "data,mmpretrain,robustbench,test,torchdistill",
        CORE + TORCHDISTILL + MMPRETRAIN,
    ),
}
SHOWN = ("torch", "torchvision", "torchdistill", "mmengine", "mmpretrain", "numpy")
HEAD = """# Compatibility

What `make test-matrix` found: the tests of the core and of the adapters (without those marked slow) in environments of
their own. The first row of a library is the oldest release that setup.cfg admits; [constraints.txt](../constraints.txt)
has the releases that all tests run with.

| row | Python | versions | tests | outcome |
| --- | --- | --- | --- | --- |
"""


def main(words: list[str] | None = None) -> None:
    """Runs the rows that the command line names, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(ROWS)} (default: all)")
    names = parser.parse_args(words).rows or list(ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        sys.exit(f"error: matrix: unknown row `{unknown[0]}`. Known: {', '.join(ROWS)}.")
    lines = _lines()
    failed = []
    for name in names:
        interpreter = f"python{ROWS[name].python}"
        if shutil.which(interpreter) is None or subprocess.run([interpreter, "--version"], check=False).returncode:
            print(f"{name}: skipped, no {interpreter} on the PATH")
            continue
        lines[name] = _run(name, ROWS[name])
        if "failed" in lines[name] or "error" in lines[name]:
            failed.append(name)
        with written_aside(PAGE) as aside:
            aside.write_text(HEAD + "".join(f"{lines[row]}\n" for row in ROWS if row in lines))
    if failed:
        sys.exit(f"error: matrix: failed: {', '.join(failed)}. See the output above.")


def _lines() -> dict[str, str]:
    """The rows that the page has, by name."""
    text = PAGE.read_text() if PAGE.is_file() else ""
    return {row[1]: row[0] for row in re.findall(r"(?m)^(\| ([A-Za-z ]+) \| \d.*)$", text)}


def _run(name: str, row: Row) -> str:
    """Makes the environment, runs the tests in it; the row's line of the page."""
    folder = ENVIRONMENTS / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([f"python{row.python}", "-m", "venv", folder], check=True)
    constraint = ("--constraint", str(ROOT / "constraints.txt")) if not row.pins else ()
    package = f"{ROOT}[{row.extras}]"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *constraint, *row.pins, "--editable", package], check=True
    )
    show = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    found = json.loads(subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout)
    versions = ", ".join(f"{library} {found[library]}" for library in SHOWN if library in found)
    command = [python, "-m", "pytest", "-n", "2", "-m", "not slow and not campaign and not installed", "-q", *row.tests]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-6000:])
    outcome = re.sub(r" in [\d.:() s]+.*$", "", done.stdout.strip().splitlines()[-1].strip("= "))
    return f"| {name} | {row.python} | {versions} | {', '.join(Path(test).name for test in row.tests)} | {outcome} |"
