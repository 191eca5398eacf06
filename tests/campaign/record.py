"""What the parts of tools/reliability.py share: the file of a part, which grows case by case, and tables made of it."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from evidence.bench import processor
from demo.report import sha256

import ikl_plugins
from ikl_plugins import __version__, native
from ikl_plugins._files import written_aside

__all__ = ["FORMAT", "Record", "anonymous", "child_environment", "merge", "table"]

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = Path(ikl_plugins.__file__).resolve().parent

FORMAT = "ikl_plugins.reliability/1"
TOOLS = Path(__file__).resolve().parents[2] / "tools"
PACKAGES = ("numpy", "torchvision", "torchdistill", "mmengine", "mmpretrain", "robustbench", "pyautoattack")


class Record:
    """The JSON file of one part: what it depends on, how many cases had which outcome, every failure in full.

    Args:
        path: of the file; what lies there is gone on from if it was made with the same settings, versions and sources
            of the package.
        part: name of the part.
        settings: whatever decides the cases, the seed first.

    Raises:
        ValueError: the file is damaged, or of other settings, versions or sources.
    """

    def __init__(self, path: Path, part: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        fresh = {
            "format": FORMAT, "part": part, "settings": dict(settings), "origin": _origin(), "finished": False,
            "facts": {}, "done": [], "counts": {}, "failures": [], "remarks": {},
        }  # fmt: skip
        self.content: dict[str, Any] = fresh
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            differing = [key for key in ("format", "part", "settings") if found[key] != fresh[key]]
            differing += [key for key, value in fresh["origin"].items() if found["origin"].get(key) != value]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"reliability: {path} must be a result of this tool, but is damaged ({error}). Remove it."
            ) from error
        if differing:
            raise ValueError(
                f"reliability: {path} must be of the same settings, versions and sources of ikl_plugins to be gone on "
                f"from, but its {' and '.join(differing)} differ. Name another --output, or remove it."
            )
        self.content = found

    @property
    def finished(self) -> bool:
        return bool(self.content["finished"])

    def done(self, key: str) -> bool:
        """Whether a piece of the work has been done, by this run or an earlier one."""
        return key in self.content["done"]

    def add(self, group: str, outcomes: Iterable[str]) -> None:
        """Counts outcomes of cases of a group, such as a host or a reader."""
        counts = Counter(self.content["counts"].get(group, {}))
        counts.update(outcomes)
        self.content["counts"][group] = dict(sorted(counts.items()))

    def fail(self, group: str, **what: Any) -> None:
        """Keeps a failure in full; it is counted as well."""
        self.content["failures"].append({"group": group, **what})

    def remark(self, group: str, text: str, example: Any = None) -> None:
        """Counts something that is no failure but should be known, with the first example of it."""
        remarks = self.content["remarks"].setdefault(group, {})
        entry = remarks.setdefault(text, {"count": 0, "example": example})
        entry["count"] += 1

    def fact(self, name: str, value: Any) -> None:
        self.content["facts"][name] = value

    def save(self, done: str | None = None) -> None:
        """Writes the file aside and renames it; a piece of work that is named counts as done."""
        if done is not None:
            self.content["done"].append(done)
        with written_aside(self.path) as aside:
            aside.write_text(json.dumps(self.content, indent=1) + "\n")

    def finish(self) -> None:
        self.content["finished"] = True
        self.save()


def _origin() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "ikl_plugins": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"versions": versions, "processor": processor(), "threads": torch.get_num_threads(), "sources": _sources()}


def _sources() -> str:
    """The checksum of the package that is tried: between two releases the version says nothing about its code."""
    files = [*_PACKAGE.rglob("*.py"), *(_PACKAGE / "csrc").glob("*.cpp")]
    return sha256({path.relative_to(_PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in files})


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that this tool starts: one thread, no GPU, no warnings beside the output."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
        native.VARIABLE: "0",  # the C++ operator rounds otherwise, and has a part of its own
        **more,
    }  # fmt: skip


def anonymous(text: str) -> str:
    """The text without the place of this checkout, which is nobody's business; files of it are named from its root."""
    return text.replace(f"{_ROOT}/", "")


def merge(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """The results of all parts that a folder has.

    Raises:
        ValueError: one is not finished.
    """
    found = {}
    for part in parts:
        path = folder / f"{part}.json"
        if path.exists():
            content = json.loads(anonymous(path.read_text()))
            if not content["finished"]:
                raise ValueError(f"reliability: {path} must be finished to be shown. Run the part {part} again.")
            content.pop("done")
            found[part] = content
    return {"format": FORMAT, "parts": found}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
