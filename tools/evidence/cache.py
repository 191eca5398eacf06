"""What is done already: each piece of work keeps its result in a folder, and is not done again.

The folder holds `job.json` (what was asked), whatever the work keeps there to go on from after an interruption, and at
last `result.json`. :func:`run_jobs` starts a process for each job and refuses a folder that was asked for something
else; :func:`remembered` works in this process and makes such a folder anew.

    python -m evidence.cache FOLDER    # what run_jobs starts, with tools/ on PYTHONPATH
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from ikl_plugins._files import written_aside

CALLER = "reproduce"
TOOLS = Path(__file__).resolve().parents[1]
PACKAGES = (
    "ikl_plugins",
    "torch",
    "torchvision",
    "numpy",
    "torchdistill",
    "mmengine",
    "mmpretrain",
    "robustbench",
    "pyautoattack",
)


class Job(NamedTuple):
    """Something to compute once, in a process of its own."""

    name: str  # of its folder too
    function: (
        str  # 'module:function', called with settings and folder; a module of this folder goes without `evidence.`
    )
    settings: dict[str, Any]  # all that the result depends on but for files, as JSON can hold it


Sources = Callable[[Job], dict[str, str]]


# --- in this process -------------------------------------------------------------------------------------------------


def remembered(
    folder: Path, asked: Any, make: Callable[[], Any], *, valid: Callable[[Any], bool] = bool
) -> tuple[Any, bool]:
    """What a folder keeps of an earlier call, or what ``make`` returns now.

    Args:
        folder: of this piece of work alone. It is emptied first where it was asked for something else.
        asked: all that the result depends on, as JSON can hold it.
        make: works in the folder and goes on from what an interrupted call has left there.
        valid: says of a kept result whether what it speaks of is still there.

    Returns:
        The result, and whether it was there.
    """
    asked = json.loads(json.dumps(asked))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: made anew
        if read_json(folder / "job.json") != asked:
            shutil.rmtree(folder)
        elif valid(kept := read_json(folder / "result.json")["result"]):
            return kept, True
    write_json(folder / "job.json", asked)
    result = make()
    write_json(folder / "result.json", {"result": result})
    return result, False


# --- in processes of their own ---------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    processes: int = 1,
    threads: int = 1,
    sources: Sources = lambda job: {},
    report: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Runs the jobs that have no result yet.

    Args:
        jobs: the jobs, their names all different.
        folder: holds a folder for each.
        processes: how many run at once, at least 1.
        threads: of each process, at least 1. A result's last digits can depend on it, so it is part of what is asked.
        sources: gives the checksums of the files that a job depends on, configs and data, by what they are.
        report: told in a line what begins, ends and fails.

    Returns:
        The results by the names of the jobs, in their order: 'settings', 'result', 'seconds' (of the last process),
        'versions'.

    Raises:
        ValueError: the folder of a job was made with other settings or files.
        RuntimeError: a job failed. The others were finished first.
    """
    waiting = [job for job in jobs if not _finished(job, folder, threads, sources(job))]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    done = len(jobs) - len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running[job.name] = _start(folder / job.name, threads)
                report(f"{job.name}: begins")
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                done += process.returncode == 0
                if process.returncode:
                    failed.append(name)
                end = f"failed, see {folder / name / 'log.txt'}" if process.returncode else "done"
                report(f"{name}: {end} ({done} of {len(jobs)})")
            time.sleep(0.1)
    finally:
        for process in running.values():  # only where this process is being interrupted
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise RuntimeError(
            f"{CALLER}: {', '.join(failed)} failed; {folder / failed[0] / 'log.txt'} says why. Run it again to go on."
        )
    return {job.name: read_json(folder / job.name / "result.json") for job in jobs}


def _finished(job: Job, folder: Path, threads: int, sources: dict[str, str]) -> bool:
    """Whether the result is there; else makes the job's folder."""
    content = {"function": job.function, "settings": job.settings, "threads": threads, "sources": sources}
    asked = json.loads(json.dumps(content))
    file = folder / job.name / "job.json"
    if file.is_file() and (known := read_json(file)) != asked:
        differing = [key for key in ("function", "settings", "threads") if known.get(key) != asked[key]]
        before = known.get("sources", {})
        differing += [key for key in {**before, **sources} if before.get(key) != sources.get(key)]
        raise ValueError(
            f"{CALLER}: {file} was made with other {', '.join(differing)}. Choose another --output, or delete "
            f"{file.parent}."
        )
    write_json(file, asked)
    return (folder / job.name / "result.json").is_file()


def _start(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    path = [str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "IKL_PLUGINS_KERNEL": "walk",  # the C++ operator rounds otherwise, and results go on from one another
    }
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "evidence.cache", str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _work(folder: Path) -> None:
    """The job of a folder, in this process. It must hold the folder: an earlier one may have outlived its starter."""
    import torch

    asked = read_json(folder / "job.json")
    torch.set_num_threads(asked["threads"])
    module, function = asked["function"].split(":")
    own = f"evidence.{module}"
    begin = time.perf_counter()
    work = getattr(importlib.import_module(own if importlib.util.find_spec(own) else module), function)
    result = work(asked["settings"], folder)
    seconds = time.perf_counter() - begin
    content = {**asked, "result": result, "seconds": round(seconds, 1), "versions": versions()}
    write_json(folder / "result.json", content)


# --- what a result depends on ----------------------------------------------------------------------------------------


def sha256(content: Any) -> str:
    """The checksum of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def data_folder() -> Path:
    """CIFAR-10 in class folders, where the configs look for it."""
    return Path(os.environ.get("IKL_PLUGINS_DATA", "data")) / "cifar10"


def data_checksum() -> str:
    """Of the images, by what `ikl data` wrote about them; a ValueError where there are none."""
    manifest = data_folder() / "manifest.json"
    if not manifest.is_file():
        raise ValueError(
            f"{CALLER}: CIFAR-10 must be in {manifest.parent}, but there is no manifest.json. Run: ikl data "
            f"cifar10-folder --from ZIP..., or set IKL_PLUGINS_DATA to the folder above it."
        )
    content = read_json(manifest)
    return sha256(content.get("splits", content))


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python, the processor and the installed packages that results depend on."""
    found = {"python": platform.python_version(), "processor": processor(), "system": platform.system()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def all_versions(results: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Those of all jobs; what differs among them, as when a run goes on on another machine, is listed."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for key, value in result["versions"].items():
            found.setdefault(key, {})[value] = None
    return {key: " and ".join(values) for key, values in found.items()}


# --- files and processes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone; a ValueError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{CALLER}: another process works in {folder}. Wait for it, or choose another --output."
            ) from error
        yield


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Writes a file that appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM end the block as an exception does, so that the jobs it has started end with it."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with exclusive(place):
        _work(place)
