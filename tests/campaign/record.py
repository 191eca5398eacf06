"""The record of the campaign, made from the outcomes that its tests report: counts, failures, remarks and facts.

A test reports through the fixture ``outcomes``. With ``--campaign-record FOLDER`` the folder gets

- outcomes.jsonl, a line for each test that has ended: tests that have passed are not run again in that folder, so that
  an interrupted campaign goes on where it stopped;
- reliability.json and reliability.md, the record and its tables, which docs/results and docs/reliability.md show.

A part is called as its test functions begin: ``test_kills`` makes the part ``kills``.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence.cache import processor, sha256

import ikl_plugins
from campaign.tables import NAMES, render
from ikl_plugins import __version__
from ikl_plugins._files import written_aside

FORMAT = "ikl_plugins.reliability/1"
PARTS = tuple(NAMES)
PACKAGES = ("numpy", "torchvision", "torchdistill", "mmengine", "mmpretrain", "robustbench", "pyautoattack")
ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(ikl_plugins.__file__).resolve().parent
_ENTRY = "campaign"  # name of the property that carries an outcome from a test to the record


class Outcomes:
    """What one test reports.

    Attributes:
        seed: of everything that is drawn.
        quick: few cases.
        failures: those that the test has reported; it must end with ``assert not outcomes.failures``.
    """

    def __init__(self, item: pytest.Item) -> None:
        self._properties = item.user_properties
        self.seed: int = item.config.getoption("campaign_seed", 0)
        self.quick = is_quick(item.config)
        self.failures: list[dict[str, Any]] = []

    @property
    def profile(self) -> str:
        """Of Hypothesis."""
        return "few" if self.quick else "campaign"

    def count(self, group: str, found: Iterable[str] | Mapping[str, int]) -> None:
        """Counts outcomes of cases of a group, such as a host or a reader."""
        self._properties.append((_ENTRY, {"kind": "counts", "group": group, "counts": dict(Counter(found))}))

    def fail(self, group: str, **what: Any) -> None:
        """Keeps a failure in full; its outcome is counted beside."""
        self.failures.append({"group": group, **what})
        self._properties.append((_ENTRY, {"kind": "failure", "failure": self.failures[-1]}))

    def remark(self, group: str, text: str, example: Any = None) -> None:
        """Something that is no failure but should be known; counted, with the first example of it."""
        self._properties.append((_ENTRY, {"kind": "remark", "group": group, "text": text, "example": example}))

    def fact(self, name: str, value: Any) -> None:
        self._properties.append((_ENTRY, {"kind": "fact", "name": name, "value": value}))


def is_quick(config: pytest.Config) -> bool:
    return bool(config.getoption("campaign_size", "full") == "quick")


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that the campaign starts: one thread, no GPU, no warnings beside the output."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    operator = {"IKL_PLUGINS_KERNEL": "walk"}  # the C++ operator rounds otherwise, and has a part of its own
    return {**os.environ, **quiet, **operator, **more}


def part_of(nodeid: str) -> str:
    """The part whose name the test function's begins with, the longest one."""
    found = re.search(r"::test_(\w+)", nodeid)
    parts = [part for part in PARTS if found and found[1].startswith(part)]
    return max(parts, key=len, default=nodeid)


class Recorder:
    """The plugin behind ``--campaign-record``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "outcomes.jsonl"
        self.header = {"format": FORMAT, "settings": dict(settings), "origin": origin()}
        self.expected: dict[str, int] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._append(self.header)

    def _read(self) -> None:
        try:
            header, *lines = map(json.loads, self.path.read_text().splitlines())
        except ValueError as error:
            raise pytest.UsageError(f"--campaign-record: {self.path} is damaged ({error}). Remove it.") from error
        differing = [key for key in self.header if header.get(key) != self.header[key]]
        if differing:
            what = " and ".join(differing)
            raise pytest.UsageError(f"--campaign-record: {self.path} is of another {what}. Name another folder.")
        for line in lines:
            self.expected.update(line.get("expected", {}))
            if "test" in line:
                self.ended[line["test"]] = line

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what has passed before."""
        expected = Counter(part_of(item.nodeid) for item in items if item.get_closest_marker("campaign"))
        self.expected.update({part: max(count, self.expected.get(part, 0)) for part, count in expected.items()})
        self._append({"expected": self.expected})
        passed = [item for item in items if self.ended.get(item.nodeid, {}).get("outcome") == "passed"]
        if passed:
            config.hook.pytest_deselected(items=passed)
            items[:] = [item for item in items if item not in passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if part_of(report.nodeid) not in PARTS or not (report.when == "call" or report.failed):
            return
        entries = [value for name, value in report.user_properties if name == _ENTRY]
        if report.failed and not any(entry["kind"] == "failure" for entry in entries):
            failure = {"group": part_of(report.nodeid), "test": report.nodeid, "detail": report.longreprtext}
            entries.append({"kind": "failure", "failure": failure})
        seconds = round(report.duration, 1)
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds, "entries": entries}
        self.ended[report.nodeid] = line
        self._append(line)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        merged = self.merged()
        with written_aside(self.folder / "reliability.json") as aside:
            aside.write_text(json.dumps(merged, indent=1) + "\n")
        with written_aside(self.folder / "reliability.md") as aside:
            aside.write_text(render(merged))
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.ended:
            session.exitstatus = pytest.ExitCode.OK  # all of them had passed before

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"written: {self.folder / 'reliability.json'} and reliability.md")

    def merged(self) -> dict[str, Any]:
        """All parts, in their order."""
        found = {}
        for part in PARTS:
            lines = [line for test, line in self.ended.items() if part_of(test) == part]
            lines = [line for line in lines if line["outcome"] != "skipped"]
            if lines:
                finished = len(lines) == self.expected.get(part)
                seconds = round(sum(line["seconds"] for line in lines))
                found[part] = {**self.header, "part": part, "finished": finished, "seconds": seconds, **gathered(lines)}
        text = json.dumps({"format": FORMAT, "parts": found})
        merged: dict[str, Any] = json.loads(
            text.replace(f"{ROOT}/", "")
        )  # where this checkout lies is nobody's business
        return merged


def gathered(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of the tests of a part, put together."""
    facts: dict[str, Any] = {}
    counts: dict[str, Counter[str]] = {}
    failures: list[Any] = []
    remarks: dict[str, dict[str, Any]] = {}
    for entry in (entry for line in lines for entry in line["entries"]):
        if entry["kind"] == "counts":
            counts.setdefault(entry["group"], Counter()).update(entry["counts"])
        elif entry["kind"] == "failure":
            failures.append(entry["failure"])
        elif entry["kind"] == "fact":
            name, value = entry["name"], entry["value"]
            facts[name] = {**facts.get(name, {}), **value} if isinstance(value, dict) else value
        else:
            of_group = remarks.setdefault(entry["group"], {})
            of_group.setdefault(entry["text"], {"count": 0, "example": entry["example"]})["count"] += 1
    sorted_counts = {group: dict(sorted(found.items())) for group, found in counts.items()}
    return {"facts": facts, "counts": sorted_counts, "failures": failures, "remarks": remarks}


def origin() -> dict[str, Any]:
    """Versions, processor, threads and the checksum of the package: what the outcomes depend on."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "ikl_plugins": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    files = [*SOURCES.rglob("*.py"), *(SOURCES / "csrc").glob("*.cpp")]
    sources = sha256({path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8") for path in files})
    return {"versions": versions, "processor": processor(), "threads": torch.get_num_threads(), "sources": sources}
