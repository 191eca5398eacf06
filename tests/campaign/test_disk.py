"""A full disk and a read-only one under everything that writes files: a clear error, nothing lost, and it goes on.

The disks are real, of a drawn size. Each case is a story of one command:

1. it runs until the disk is full;
2. once more on the full disk;
3. on the same disk, read-only;
4. with space again, to its end.

In 1 to 3 it must end with one line, ``error: ...``, that names a path on that disk, and leave whole what was whole. In
4 it must end as if it had never been stopped. A command that writes at once has run before 1, so that it has files to
lose.
"""

from __future__ import annotations

import hashlib
import mmap
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from campaign.comparison import differences, half_written
from campaign.in_child_process import Tell, in_child_process
from campaign.own_mounts import mount, own_mounts, unmount, used
from campaign.record import Outcomes, child_environment
from campaign.runs import Command
from campaign.writers import WRITERS

CASES = 3
QUICK_CASES = 1
TIMEOUT = 300.0  # of one process, in seconds
AMPLE = "size=400000000"  # bytes
FINE = "one clear line, nothing lost"
DONE = "ends as the uninterrupted one"


class Ended(NamedTuple):
    """A run that was left alone on an empty disk."""

    result: Any
    used: int
    checksums: Mapping[str, str]


@pytest.mark.campaign
@pytest.mark.parametrize("name", WRITERS)
def test_disk(name: str, tmp_path_factory: pytest.TempPathFactory, outcomes: Outcomes) -> None:
    allowed = in_child_process(lambda _: own_mounts(), 10.0)
    if allowed.how != "returned":
        pytest.skip(f"mounts of its own are not allowed to a process here: {allowed.value}")
    work = tmp_path_factory.getbasetemp() / "runs"
    work.mkdir(exist_ok=True)
    cases = QUICK_CASES if outcomes.quick else CASES
    answer = in_child_process(lambda tell: stories(name, work, outcomes.seed, cases, tell), 20 * cases * TIMEOUT)
    for number, free, outcome, failure in answer.told:
        outcomes.count(name, [outcome])
        if failure is not None:
            outcomes.fail(name, number=number, input=f"{free} bytes free", what=outcome, **failure)
    assert answer.how == "returned", answer.value
    assert not outcomes.failures


def stories(name: str, work: Path, seed: int, cases: int, tell: Tell) -> None:
    """The cases of one writer; reports (number, bytes free, outcome, failure) of each step."""
    writer = WRITERS[name](work)
    own_mounts()
    torch.set_num_threads(1)
    disk = work / "disk"
    for folder in (disk, work / "cwd"):
        folder.mkdir(exist_ok=True)
    mount(disk, AMPLE)
    story = Story(writer, disk / "run", work / "cwd")
    story.folder.mkdir()
    code, output = story.execute(again=False)
    if code:
        raise RuntimeError(f"{name} does not run on an empty disk:\n{output[-3000:]}")
    if blind := blind_to(story.folder, writer):
        raise RuntimeError(f"{name} leaves whole files that count as half-written: {', '.join(blind)}")
    ended = Ended(writer.result(story.folder), used(disk), checksums(story.folder))
    unmount(disk)
    for number in range(cases):
        rng = random.Random(f"{seed} {name} {number}")
        mount(disk, AMPLE)
        try:
            free, steps = one_story(story, disk, ended, rng, first=number == 0)
        finally:
            unmount(disk)
        for outcome, failure in steps:
            tell((number, free, outcome, failure))


Step = tuple[str, dict[str, Any] | None]  # outcome, and why it is a failure


class Story(NamedTuple):
    """A command on a disk."""

    writer: Command
    folder: Path
    cwd: Path

    def execute(self, *, again: bool) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *self.writer.arguments(self.folder, again)],
            cwd=self.cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
            env=child_environment(**self.writer.environment),
        )
        return done.returncode, done.stdout + done.stderr

    def fails_well(self, step: str, ended: Ended, *, again: bool = True) -> Step:
        """A step that must end with an error; on the read-only disk not a byte may differ."""
        writer, folder, exactly = self.writer, self.folder, step == "read-only"
        before = checksums(folder) if exactly else whole_files(folder, writer)
        safe = writer.safe(folder)
        code, output = self.execute(again=again)
        why = judge_error(code, output, folder.parent)
        after = checksums(folder)
        # New versions that are as good: those of the uninterrupted run, and of a longer run whatever is whole.
        new = {} if exactly else ended.checksums if writer.finished is None else whole_files(folder, writer)
        wrong = judge_files(before, after, writer, exactly=exactly, new=new)
        wrong += [f"{name} is left" for name in after if not exactly and re.search(r"\.partial(\.|$|/)", name)]
        if writer.safe(folder) < safe:
            wrong.append(f"less of the run is safe than before: {writer.safe(folder)} instead of {safe}")
        if why is None and not wrong:
            return f"{step}: {FINE}", None
        return f"{step}: {why or 'files'}", {"files": wrong[:20], "output": output[-1500:]}

    def ends_well(self, ended: Ended) -> Step:
        """With space again."""
        code, output = self.execute(again=True)
        if code != 0:
            return "space again: did not go on", {"output": output[-1500:]}
        found = differences(self.writer.result(self.folder), ended.result)
        if found:
            return "space again: other result", {"differences": found[:20]}
        return f"space again: {DONE}", None


def one_story(story: Story, disk: Path, ended: Ended, rng: random.Random, *, first: bool) -> tuple[int, list[Step]]:
    """The four steps on an empty disk, and how many bytes were free at first."""
    runs = story.writer.finished is not None
    story.folder.mkdir()
    (disk / "filler").write_bytes(bytes(mmap.PAGESIZE))  # a size of 0 would be no limit
    if not runs:
        code, output = story.execute(again=False)
        if code:
            raise RuntimeError(f"the command does not run: {output[-2000:]}")
        for path in sorted(story.folder.rglob("*.yaml")):  # so that there is something to write anew
            path.write_text(path.read_text() + "# an earlier version\n")
    if first:
        pages = 0
    elif runs or story.writer.whole:
        pages = rng.randrange(1, max(2, _pages(ended.used)))
    else:
        pages = rng.randrange(_pages(max(path.stat().st_size for path in story.folder.rglob("*") if path.is_file())))
    mount(disk, f"remount,size={used(disk) + pages * mmap.PAGESIZE}")
    steps = [story.fails_well("full", ended, again=not runs), story.fails_well("full, once more", ended)]
    mount(disk, "remount,ro")
    steps.append(story.fails_well("read-only", ended))
    mount(disk, f"remount,rw,{AMPLE}")
    steps.append(story.ends_well(ended))
    return pages * mmap.PAGESIZE, steps


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE)


def judge_error(code: int, output: str, disk: Path) -> str | None:
    """Why the end of a command on such a disk is not clear; None if it is."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if code == 0:
        return "it ran to its end"
    if code < 0:
        return f"ended by signal {-code}"
    if not last.startswith("error: "):
        return "no clear line at the end"
    # Python's logging says with a traceback what it could not write to MMEngine's log file, and goes on.
    rest = re.sub(r"^--- Logging error ---$.*?^Arguments: .*?$", "", output, flags=re.MULTILINE | re.DOTALL)
    if re.search(r"^Traceback ", rest, re.MULTILINE):
        return "a traceback"
    return None if str(disk) in last else "the line names no path on the disk"


def judge_files(
    before: Mapping[str, str], after: Mapping[str, str], writer: Command, *, exactly: bool, new: Mapping[str, str]
) -> list[str]:
    """What is wrong with the files that were whole, by checksums of each path.

    ``exactly``: not one byte may differ, of whatever file. Else a file may be the whole new version in ``new``.
    """
    wrong = []
    for name, checksum in before.items():
        if exactly or writer.kept.search(name):
            removed = writer.removes.search(name) and not exactly
            if name not in after and not removed:
                wrong.append(f"{name} is lost")
            if name in after and after[name] not in (checksum, new.get(name)):
                wrong.append(f"{name} has changed")
    if exactly:
        wrong += [f"{name} is new" for name in after.keys() - before.keys()]
    return wrong


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def whole_files(folder: Path, writer: Command) -> dict[str, str]:
    """Checksums of the files that must survive."""
    found = checksums(folder).items()
    return {name: sum_ for name, sum_ in found if writer.kept.search(name) and not half_written(folder / name)}


def blind_to(folder: Path, writer: Command) -> list[str]:
    """Files of a run that was left alone whose loss would not be seen, as they count as half-written all the same."""
    kept = [name for name in checksums(folder) if writer.kept.search(name) and not name.endswith(".lock")]
    return [name for name in kept if half_written(folder / name)]
