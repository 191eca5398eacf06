"""A full disk and a read-only one under everything that writes files: a clear error, nothing lost, and it goes on.

The disks are real: tmpfs file systems of a drawn size, in a mount namespace of their own (``unshare``, Linux), so that
nothing outside sees them and no right to mount is needed. Each case is a story of one command:

1. it runs until the disk is full;
2. once more on the full disk;
3. on the same disk, read-only;
4. with space again, to its end.

In 1 to 3 it must end with one line, ``error: ...``, that names a path on that disk, and leave whole what was whole. In
4 it must end as if it had never been stopped. A tool that writes at once has run before 1, so that it has files to
lose.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ikl_plugins.commands.data import prepare_digits
from campaign.kills import Host, differences, evaluation_host, half_written, mmpretrain_host, torchdistill_host
from campaign.record import TOOLS, Record, child_environment

__all__ = ["WRITERS", "Writer", "namespace", "run"]

CASES = 3
QUICK_CASES = 1
TIMEOUT = 300.0  # of one process, in seconds
AMPLE = 400_000_000  # bytes
STEPS = ("full", "full, once more", "read-only")
FINE = "one clear line, nothing lost"
DONE = "ends as the uninterrupted one"


class Writer(NamedTuple):
    """A command that writes files.

    Attributes:
        command: from the folder and whether it has been started before, to the arguments of Python.
        result: from the folder, what must be equal at the end.
        kept: names of the files that must survive.
        environment: of the process.
        finished: from the folder, how much of a run is safe on the disk; None of a tool that writes at once.
        whole: a tool that writes at once writes a whole folder aside, and not file by file.
        removes: names of the files that the host itself removes when it has newer ones.
    """

    command: Callable[[Path, bool], list[str]]
    result: Callable[[Path], Any]
    kept: re.Pattern[str]
    environment: dict[str, str]
    finished: Callable[[Path], float] | None = None
    whole: bool = False
    removes: re.Pattern[str] | None = None


# --- the writers -----------------------------------------------------------------------------------------------------


def _of_host(host: Host, work: Path, kept: str, removes: str | None = None) -> Writer:
    environment = {"IKL_PLUGINS_DATA": str(host.data or work / "data")}
    return Writer(
        host.command, host.result, re.compile(kept), environment, host.finished,
        removes=None if removes is None else re.compile(removes),
    )  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    """What a tool has written, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _at_once(*command: str, at: str, whole: bool = False, result: Callable[[Path], Any] = _files) -> Writer:
    """A tool with the place for its output last."""

    def of(folder: Path, again: bool) -> list[str]:
        return [str(TOOLS / command[0]), *command[1:], at.format(folder=folder)]

    return Writer(of, result, re.compile("."), {}, whole=whole)


def _configs(work: Path) -> Writer:
    return _at_once("make_configs.py", "--configs", at="{folder}")


def _adopt(work: Path) -> Writer:
    source = TOOLS.parent / "configs" / "torchdistill" / "digits" / "kd.yaml"
    return _at_once("adopt.py", str(source), "--force", "--output", at="{folder}/adopted.yaml")


def _rank(work: Path) -> Writer:
    numbers = ("--dataset", "cifar10", "--robust", "57.09", "--natural", "85.36", "--additional-data", "no")
    return _at_once("robustbench_rank.py", *numbers, "--threat-model", "Linf", "--plot", at="{folder}/rank.png")


def _digits(work: Path) -> Writer:
    return _at_once("prepare_data.py", "digits", "--force", "--data", at="{folder}", whole=True)


def _submission(work: Path) -> Writer:
    from ikl_plugins.models.robustbench_zoo import robustbench_network
    from ikl_plugins.robustbench.evaluation import evaluate

    folder = work / "submission"
    log = folder / "evaluation.json"
    if not log.exists():
        folder.mkdir(exist_ok=True)
        torch.manual_seed(2)
        net = robustbench_network("WideResNet-10-1").eval()
        torch.save({"state_dict": net.state_dict()}, folder / "net.pt")
        images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            labels = net(images / 255).argmax(dim=1)
        np.savez(folder / "images.npz", image=images.permute(0, 2, 3, 1).numpy(), label=labels.numpy())
        evaluate(net, images / 255, labels, eps="1/255", attacks=["apgd-ce"], log=log, data="images.npz")

    def result(out: Path) -> Any:
        # Seconds of the checks, and the checksums of the files that hold them, differ from run to run.
        return {name: text for name, text in _files(out).items() if "preflight" not in name and "SUMS" not in name}

    return _at_once(
        "robustbench_submit.py", "--checkpoint", str(folder / "net.pt"), "--architecture", "WideResNet-10-1",
        "--data", str(folder / "images.npz"), "--n-examples", "8", "--evaluation", str(log),
        "--name", "Doe2025Better_WRN-10-1", "--title", "Better Networks", "--link", "https://example.org/paper",
        "--authors", "Jane Doe, John Roe", "--venue", "arXiv, Jan 2025", "--licence", "MIT",
        "--additional-data", "no", "--generated-data", "no", "--demonstration", "--force",
        "--output", at="{folder}/submission", whole=True, result=result,
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "tools/train_torchdistill.py": lambda work: _of_host(torchdistill_host(work, 3), work, r"\.pt$"),
    "tools/train_mmpretrain.py": lambda work: _of_host(
        mmpretrain_host(work, "distill_ikl", 4), work, r"\.pth$|last_checkpoint$", r"(epoch_\d+|best_.*)\.pth$"
    ),
    "tools/robustbench_eval.py": lambda work: _of_host(evaluation_host(work, 12), work, r"\.(json|npz|md|png)$"),
    "tools/robustbench_submit.py": _submission,
    "tools/robustbench_rank.py": _rank,
    "tools/prepare_data.py": _digits,
    "tools/adopt.py": _adopt,
    "tools/make_configs.py": _configs,
}


# --- the disk --------------------------------------------------------------------------------------------------------


def namespace() -> list[str] | None:
    """The command that gives a process mounts of its own; None where there is none."""
    for command in (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        try:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
        except OSError:
            return None
    return None


def _mount(disk: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _unmount(disk: Path) -> None:
    command = ["umount", str(disk)]
    subprocess.run(command, check=True)


def _used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- one case --------------------------------------------------------------------------------------------------------


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
    before: dict[str, str], after: dict[str, str], writer: Writer, *, exactly: bool, new: dict[str, str]
) -> list[str]:
    """What became of the files that were whole.

    Args:
        before: checksums by path.
        after: the same, later.
        writer: whose files they are.
        exactly: not one byte may differ, of whatever file.
        new: checksums that a whole new version has; a file may be that one.

    Returns:
        What is wrong.
    """
    wrong = []
    for name, checksum in before.items():
        if exactly or writer.kept.search(name):
            removed = writer.removes is not None and writer.removes.search(name) and not exactly
            if name not in after and not removed:
                wrong.append(f"{name} is lost")
            if name in after and after[name] not in (checksum, new.get(name)):
                wrong.append(f"{name} has changed")
    if exactly:
        wrong += [f"{name} is new" for name in after.keys() - before.keys()]
    return wrong


def _whole_files(folder: Path, writer: Writer) -> dict[str, str]:
    found = _checksums(folder)
    return {
        name: checksum
        for name, checksum in found.items()
        if writer.kept.search(name) and not half_written(folder / name)
    }


def blind_to(folder: Path, writer: Writer) -> list[str]:
    """Files of a run that was left alone whose loss would not be seen, as they count as half-written all the same."""
    kept = [name for name in _checksums(folder) if writer.kept.search(name) and not name.endswith(".lock")]
    return [name for name in kept if half_written(folder / name)]


def _left(folder: Path, writer: Writer) -> list[str]:
    """Files aside that a failure has left."""
    return [f"{name} is left" for name in _checksums(folder) if re.search(r"\.partial(\.|$|/)", name)]


def _execute(writer: Writer, folder: Path, again: bool, cwd: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *writer.command(folder, again)], cwd=cwd, capture_output=True, text=True, check=False,
        timeout=TIMEOUT, env=child_environment(**writer.environment),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


class _Case:
    """The steps of one story, and what came of them."""

    def __init__(self, writer: Writer, work: Path, reference: Any, new: dict[str, str]) -> None:
        self.writer, self.disk, self.cwd = writer, work / "disk", work / "cwd"
        self.folder = self.disk / "run"
        self.reference, self.new = reference, new
        self.outcomes: list[str] = []
        self.failures: list[dict[str, Any]] = []

    def fails_well(self, step: str, again: bool) -> None:
        """A step that must end with an error."""
        exactly = step == "read-only"
        writer, folder = self.writer, self.folder
        before = _checksums(folder) if exactly else _whole_files(folder, writer)
        safe = 0.0 if writer.finished is None else writer.finished(folder)
        code, output = _execute(writer, folder, again, self.cwd)
        why = judge_error(code, output, self.disk)
        after = _checksums(folder)
        wrong = judge_files(before, after, writer, exactly=exactly, new={} if exactly else self._may_be(before, after))
        wrong += [] if exactly else _left(folder, writer)
        if writer.finished is not None and writer.finished(folder) < safe:
            wrong.append(f"less of the run is safe than before: {writer.finished(folder)} instead of {safe}")
        if why is None and not wrong:
            self.outcomes.append(f"{step}: {FINE}")
            return
        what = why or "files"
        self.outcomes.append(f"{step}: {what}")
        self.failures.append({"step": step, "what": what, "files": wrong[:20], "output": output[-1500:]})

    def _may_be(self, before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
        """New versions that are as good: those of a tool's reference, and of a run whatever is whole."""
        if self.writer.finished is None:
            return self.new
        whole = _whole_files(self.folder, self.writer)
        return {name: whole[name] for name in before if name in whole}

    def ends_well(self) -> None:
        """With space again."""
        code, output = _execute(self.writer, self.folder, True, self.cwd)
        if code != 0:
            self.outcomes.append("space again: did not go on")
            self.failures.append({"step": "space again", "what": "did not go on", "output": output[-1500:]})
            return
        found = differences(self.writer.result(self.folder), self.reference)
        self.outcomes.append(f"space again: {'other result' if found else DONE}")
        if found:
            self.failures.append({"step": "space again", "what": "other result", "differences": found[:20]})


def _free_pages(writer: Writer, folder: Path, used: int, rng: random.Random, first: bool) -> int:
    """So many pages that the command cannot do with them."""
    if first:
        return 0
    if writer.finished is not None or writer.whole:
        return rng.randrange(1, max(2, _pages(used)))
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return rng.randrange(_pages(largest))


def _one_case(writer: Writer, work: Path, rng: random.Random, reference: Any, used: int, new: dict[str, str],
              first: bool) -> dict[str, Any]:  # fmt: skip
    case = _Case(writer, work, reference, new)
    disk, folder = case.disk, case.folder
    _mount(disk, f"size={AMPLE}")
    try:
        folder.mkdir()
        (disk / "filler").write_bytes(bytes(mmap.PAGESIZE))  # a size of 0 would be no limit
        if writer.finished is None:
            code, output = _execute(writer, folder, False, case.cwd)
            if code:
                raise RuntimeError(f"the tool does not run: {output[-2000:]}")
            for path in sorted(folder.rglob("*.yaml")):  # so that there is something to write anew
                path.write_text(path.read_text() + "# an earlier version\n")
        pages = _free_pages(writer, folder, used, rng, first)
        _mount(disk, f"remount,size={_used(disk) + pages * mmap.PAGESIZE}")
        case.fails_well(STEPS[0], writer.finished is None)
        case.fails_well(STEPS[1], True)
        _mount(disk, "remount,ro")
        case.fails_well(STEPS[2], True)
        _mount(disk, f"remount,rw,size={AMPLE}")
        case.ends_well()
        return {"free": pages * mmap.PAGESIZE, "outcomes": case.outcomes, "failures": case.failures}
    finally:
        _unmount(disk)


def _inside(work: Path, name: str, seed: int, first: int, cases: int, answers: Path) -> None:
    """The cases of one writer; runs where it has mounts of its own."""
    torch.set_num_threads(1)
    writer = WRITERS[name](work)
    disk = work / "disk"
    for folder in (disk, work / "cwd"):
        folder.mkdir(exist_ok=True)
    _mount(disk, f"size={AMPLE}")
    folder = disk / "run"
    folder.mkdir()
    code, output = _execute(writer, folder, False, work / "cwd")
    if code:
        sys.exit(f"{name} does not run on an empty disk:\n{output[-3000:]}")
    if blind := blind_to(folder, writer):
        sys.exit(
            f"{name} must leave files that are whole, but {', '.join(blind)} count as half-written. Adapt this tool."
        )
    reference, used, new = writer.result(folder), _used(disk), _checksums(folder)
    _unmount(disk)
    with answers.open("w") as file:
        for number in range(first, cases):
            rng = random.Random(f"{seed} {name} {number}")  # noqa: S311  # sizes, no secrets
            answer = _one_case(writer, work, rng, reference, used, new, number == 0)
            file.write(json.dumps({"number": number, **answer}) + "\n")
            file.flush()


# --- the campaign ----------------------------------------------------------------------------------------------------


def run(record: Record, work: Path, *, seed: int, quick: bool, writers: tuple[str, ...] = tuple(WRITERS)) -> None:
    """Fills disks.

    Args:
        record: of the part.
        work: folder for data, teachers and the disk.
        seed: of the sizes.
        quick: few cases.
        writers: keys of :data:`WRITERS`.

    Raises:
        ValueError: this system gives no mounts to a process.
    """
    command = namespace()
    if command is None:
        raise ValueError(
            "reliability: the part disk must have mounts of its own, but `unshare --mount` does not work here. Run it "
            "on Linux where user namespaces are allowed, or as root, or run the other parts one by one."
        )
    work.mkdir(parents=True, exist_ok=True)
    prepare_digits(work / "data")
    cases = QUICK_CASES if quick else CASES
    record.fact("cases of each writer", cases)
    for name in writers:
        if record.done(name):
            continue
        answers = work / "answers.jsonl"
        answers.unlink(missing_ok=True)
        shutil.rmtree(work / "cwd", ignore_errors=True)
        done = subprocess.run(
            [*command, sys.executable, __file__, str(work), name, str(seed), "0", str(cases), str(answers)],
            capture_output=True, text=True, check=False, env=child_environment(),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
        for line in answers.read_text().splitlines():
            answer = json.loads(line)
            record.add(name, answer["outcomes"])
            for failure in answer["failures"]:
                record.fail(name, number=answer["number"], input=f"{answer['free']} bytes free", **failure)
        record.save(name)
        print(f"disk, {name}: {cases} cases", flush=True)
    record.finish()


if __name__ == "__main__":
    _inside(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), Path(sys.argv[6]))
