"""Kill -9 at seeded random times, and resumption: does a run end as the uninterrupted one, bit for bit?

Three commands are killed, each as a user starts it: tools/train_torchdistill.py, tools/train_mmpretrain.py with two
configs, and tools/robustbench_eval.py. A run may be killed several times. Most points are at a random time of what is
left of the run; the others are aimed at a write: the process tells which file it opens for writing, and is killed
within the time that such a write takes.
"""

from __future__ import annotations

import json
import os
import random
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ikl_plugins.commands.data import prepare_digits
from campaign.digits import few_digits
from campaign.record import TOOLS, Record, child_environment
from torch import Tensor

from ikl_plugins.checkpoints import load_content

__all__ = ["HOSTS", "Host", "differences", "half_written", "run", "where_it_fell"]

CONFIGS = TOOLS.parent / "configs"
EPOCHS = 6
ADVERSARIAL_EPOCHS = 3
LESS_DATA = {"train": 32, "val": 10, "test": 10}  # digits of each class, for the adversarial training
POINTS = 20
QUICK_POINTS = 2
TIMEOUT = 900.0  # of one process, in seconds
AIMED = 0.4  # share of the points that are aimed at a write
EARLY = 0.15  # share of the others that may fall before the first step; the rest is drawn from the training itself
LONGEST_WRITE = 0.006  # in seconds: so long after its beginning a process that is aimed at is killed
MOST_KILLS = 4  # of one run
PLACES = ("start-up", "before the first checkpoint", "inside an epoch", "inside a write")


class StuckError(RuntimeError):
    """A process that neither ended nor was killed in time."""


@dataclass
class Life:
    """What became of one process."""

    seconds: float
    code: int
    events: list[tuple[float, str]]  # seconds since the start, 'open PATH' or 'rename PATH'
    output: str
    killed: bool


@dataclass
class Host:
    """A command that may be killed and started again in a folder of its own.

    Attributes:
        name: for the result.
        command: from the folder of the run and whether it has been started before, to the arguments of Python.
        writes: which files it writes that a resumed run depends on.
        begun: a line of its output that says that the first step of this process has been done.
        finished: from the folder, how much of the run is safe on the disk, from 0 to 1.
        result: from the folder, what must be equal.
        parts: about how many pieces of equal length the run has, each with a write behind it.
        beside: from the folder, what the host itself does not promise, compared apart.
    """

    name: str
    command: Callable[[Path, bool], list[str]]
    writes: re.Pattern[str]
    begun: re.Pattern[str]
    finished: Callable[[Path], float]
    result: Callable[[Path], Any]
    parts: int
    beside: Callable[[Path], Any] | None = None
    data: Path | None = None  # else all digits
    environment: dict[str, str] = field(default_factory=dict)


# --- processes -------------------------------------------------------------------------------------------------------


def live(
    host: Host,
    folder: Path,
    *,
    again: bool,
    kill_after: float | None = None,
    kill_in_write: tuple[int, float] | None = None,
) -> Life:
    """Starts the command and waits for its end, or kills it.

    Args:
        host: whose command.
        folder: of the run.
        again: whether it goes on from an earlier process.
        kill_after: so many seconds after the start.
        kill_in_write: the number of the write, 0 for the first, and the seconds after its beginning.
    """
    reader, writer = os.pipe()
    log = folder.with_name(f"{folder.name}.log")
    command = [sys.executable, str(TOOLS / "reliability_watched.py"), str(writer), *host.command(folder, again)]
    events: list[tuple[float, str]] = []
    writes = 0
    rest = b""
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, pass_fds=(writer,), cwd=folder.parent,
            env=child_environment(**host.environment), start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        deadline = start + (TIMEOUT if kill_after is None else kill_after)
        killed = False
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    killed = True
                    break
                if not selector.select(min(left, 1.0)):
                    if process.poll() is not None:
                        break
                    continue
                chunk = os.read(reader, 65536)
                if not chunk:
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    text = line.decode()
                    events.append((time.monotonic() - start, text))
                    if text.startswith("open ") and host.writes.search(text):
                        if kill_in_write is not None and writes == kill_in_write[0]:
                            deadline = time.monotonic() + kill_in_write[1]
                        writes += 1
        if killed and process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    os.close(reader)
    text = log.read_text(errors="replace")
    planned = kill_after is not None or kill_in_write is not None
    if killed and process.returncode == -signal.SIGKILL and not planned:
        raise StuckError(f"{host.name} did not end within {TIMEOUT:.0f} seconds:\n{text[-2000:]}")
    return Life(time.monotonic() - start, process.returncode, events, text, process.returncode == -signal.SIGKILL)


def where_it_fell(host: Host, folder: Path, life: Life, safe_before: bool) -> str:
    """In what a process was killed, one of :data:`PLACES`."""
    opened = [text for _, text in life.events if text.startswith(("open ", "rename ")) and host.writes.search(text)]
    if opened and opened[-1].startswith("open ") and half_written(Path(opened[-1].split(" ", 1)[1])):
        return "inside a write"
    if not host.begun.search(life.output):
        return "start-up"
    renamed_or_written = any(host.writes.search(text) for _, text in life.events)
    if not safe_before and not renamed_or_written:
        return "before the first checkpoint"
    return "inside an epoch"


def half_written(path: Path) -> bool:
    """Whether a file that a process has begun to write is not whole.

    Archives have checksums, JSON a last bracket, a PNG a last chunk, and texts of our writers a last newline. Of other
    files only an empty one is known to be half-written.
    """
    if not path.is_file():
        return False  # renamed since, or removed
    if path.name.startswith(".") or path.suffix == ".partial":
        return True  # written aside, and not renamed
    try:
        return not _WHOLE.get(path.suffix, _has_content)(path)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
        return True


def _has_content(path: Path) -> bool:
    return path.stat().st_size > 0


def _is_archive(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _is_json(path: Path) -> bool:
    json.loads(path.read_bytes())
    return True


def _is_png(path: Path) -> bool:
    return path.read_bytes().endswith(b"\0\0\0\0IEND\xaeB`\x82")


def _is_text(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")


_WHOLE: dict[str, Callable[[Path], bool]] = {
    **dict.fromkeys((".pth", ".pt", ".npz", ".zip"), _is_archive),
    **dict.fromkeys((".md", ".csv", ".py", ".yaml"), _is_text),
    ".json": _is_json,
    ".png": _is_png,
}


# --- what must be equal ----------------------------------------------------------------------------------------------


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two results differ, by the path inside them; NaN equals NaN, tensors are compared bit for bit."""
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        same = (
            isinstance(ours, Tensor)
            and isinstance(theirs, Tensor)
            and ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and _bits(ours) == _bits(theirs)
        )
        return [] if same else [path or "(whole)"]
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
        return [] if same else [path]
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = [f"{path}.{key} (one side alone)" for key in ours.keys() ^ theirs.keys()]
        for key in ours.keys() & theirs.keys():
            found += differences(ours[key], theirs[key], f"{path}.{key}")
        return sorted(found)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{path} (lengths {len(ours)} and {len(theirs)})"]
        return [
            line for i, pair in enumerate(zip(ours, theirs, strict=True)) for line in differences(*pair, f"{path}[{i}]")
        ]
    if type(ours) is type(theirs) and type(ours).__eq__ is object.__eq__ and hasattr(ours, "__dict__"):
        return differences(vars(ours), vars(theirs), path)  # such as MMEngine's log buffers
    same = type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))
    return [] if same else [path]


def _bits(tensor: Tensor) -> bytes:
    bits: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return bits


# --- the three commands ----------------------------------------------------------------------------------------------


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """Replaces parts of a shipped config, each of which must be there once."""
    for old, new in pairs:
        if text.count(old) != 1:
            raise ValueError(f"reliability: the config must have {old!r} once, got {text.count(old)}. Adapt this tool.")
        text = text.replace(old, new)
    return text


def torchdistill_host(work: Path, epochs: int) -> Host:
    """tools/train_torchdistill.py with the shipped digits/ikl.yaml: IKL with the class prior."""
    teacher = work / "teacher" / "teacher.pt"
    shipped = (CONFIGS / "torchdistill" / "digits" / "ikl.yaml").read_text()

    def command(folder: Path, again: bool) -> list[str]:
        config = work / f"{folder.parent.name}_{folder.name}.yaml"  # not on the disk that the run writes to
        config.write_text(
            replaced(
                shipped,
                ("num_epochs: 10", f"num_epochs: {epochs}"),
                ("T_max: 10", f"T_max: {epochs}"),
                ("runs/torchdistill/digits/teacher/teacher.pt", str(teacher)),
                ("runs/torchdistill/digits/ikl/ikl.pt", str(folder / "ikl.pt")),
            )
        )
        last = folder / "ikl_last.pt"
        done = load_content(last)["epoch"] if again and last.exists() else 0
        return [str(TOOLS / "train_torchdistill.py"), str(config), "--device", "cpu", "--start_epoch", str(done)]

    def finished(folder: Path) -> float:
        last = folder / "ikl_last.pt"
        return load_content(last)["epoch"] / epochs if last.exists() else 0.0

    def result(folder: Path) -> Any:
        found = {name: load_content(folder / name) for name in ("ikl.pt", "ikl_last.pt")}
        for row in found["ikl_last.pt"]["history"]:
            del row["seconds_per_step"]
        for content in found.values():
            content["args"] = vars(content["args"])
        return found

    if not teacher.exists():
        config = work / "teacher.yaml"
        config.write_text(
            replaced(
                (CONFIGS / "torchdistill" / "digits" / "teacher.yaml").read_text(),
                ("num_epochs: 12", "num_epochs: 2"),
                ("T_max: 12", "T_max: 2"),
                ("dst_ckpt: 'runs/torchdistill/digits/teacher/teacher.pt'", f"dst_ckpt: '{teacher}'"),
            )
        )
        _do(work, str(TOOLS / "train_torchdistill.py"), str(config), "--device", "cpu")
    writes = re.compile(r"ikl(_last)?\.pt")
    return Host("torchdistill", command, writes, re.compile(r"Loss = "), finished, result, epochs)


def mmpretrain_host(work: Path, name: str, epochs: int) -> Host:
    """MMPretrain's own tools/train.py with a shipped config of the digits."""
    teacher = work / "mm_teacher" / "epoch_2.pth"
    shipped = CONFIGS / "mmpretrain" / "digits"
    more = {"distill_ikl": f"model = dict(teacher_ckpt={str(teacher)!r})", "adversarial_ikl": ""}[name]
    awp = "model = dict(awp=dict(warmup_epochs=1))" if name == "adversarial_ikl" else ""

    def command(folder: Path, again: bool) -> list[str]:
        config = work / f"{folder.parent.name}_{folder.name}.py"  # not on the disk that the run writes to
        config.write_text(
            f"_base_ = {str(shipped / f'{name}.py')!r}\ntrain_cfg = dict(max_epochs={epochs})\n"
            f"param_scheduler = dict(T_max={epochs})\n{more}\n{awp}\n"
            "default_hooks = dict(logger=dict(interval=1))\n"
        )
        resume = ["--resume"] if again else []
        return [str(TOOLS / "train_mmpretrain.py"), str(config), "--work-dir", str(folder), *resume]

    def finished(folder: Path) -> float:
        last = folder / "last_checkpoint"
        found = re.search(r"epoch_(\d+)\.pth$", last.read_text().strip()) if last.exists() else None
        return int(found[1]) / epochs if found else 0.0

    def result(folder: Path) -> Any:
        content = load_content(folder / f"epoch_{epochs}.pth")
        kept = {key: content[key] for key in ("state_dict", "optimizer", "param_schedulers")}
        kept["history"] = history(content, "train/")
        return kept

    def history(content: Any, kind: str) -> Any:
        scalars = content["message_hub"]["log_scalars"].items()
        return {key: buffer._log_history for key, buffer in scalars if key.startswith(kind) and "time" not in key}

    def beside(folder: Path) -> Any:
        best = folder.glob("best_*.pth")
        found = {path.name: None if half_written(path) else load_content(path)["state_dict"] for path in best}
        return {**found, "history": history(load_content(folder / f"epoch_{epochs}.pth"), "val/")}

    if name == "distill_ikl" and not teacher.exists():
        options = ("train_cfg.max_epochs=2", "param_scheduler.T_max=2")
        _do(work, str(TOOLS / "train_mmpretrain.py"), str(shipped / "teacher.py"), "--work-dir", str(teacher.parent),
            "--cfg-options", *options)  # fmt: skip
    writes = re.compile(r"(epoch_\d+\.pth|last_checkpoint)$")
    begun = re.compile(r"Epoch\(train\)")
    data = few_digits(work / "less", LESS_DATA) if name == "adversarial_ikl" else None
    return Host(f"mmpretrain {name}", command, writes, begun, finished, result, epochs, beside, data)


def evaluation_host(work: Path, images: int) -> Host:
    """tools/robustbench_eval.py on the smallest WideResNet and real digits."""
    checkpoint = work / "mm_natural" / "epoch_2.pth"
    config = CONFIGS / "mmpretrain" / "digits" / "natural.py"

    def command(folder: Path, again: bool) -> list[str]:
        return [
            str(TOOLS / "robustbench_eval.py"), "--mmpretrain", str(config), "--checkpoint", str(checkpoint),
            "--data", str(work / "data" / "digits" / "test"), "--eps", "8/255", "--attacks", "apgd-ce,apgd-t",
            "--n-examples", str(images), "--batch-size", "4", "--output", str(folder),
        ]  # fmt: skip

    def log_of(folder: Path) -> Any:
        path = folder / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finished(folder: Path) -> float:
        log = log_of(folder)
        if log is None:
            return 0.0
        shares = [entry["batches_done"] / max(1, entry["batches"]) for entry in log["progress"]]
        return sum(shares) / len(log["attacks"])

    def result(folder: Path) -> Any:
        log = log_of(folder)
        del log["date"]
        for entry in log["progress"]:
            del entry["seconds"]
        images_of = {}
        for path in sorted((folder / "evaluation_adversarial").glob("[!.]*.npz")):
            with np.load(path) as content:
                images_of[path.name] = dict(content)
        return {"log": log, "adversarial": images_of}

    if not checkpoint.exists():
        options = ("train_cfg.max_epochs=2", "param_scheduler.T_max=2")
        _do(work, str(TOOLS / "train_mmpretrain.py"), str(config), "--work-dir", str(checkpoint.parent),
            "--cfg-options", *options)  # fmt: skip
    writes = re.compile(r"evaluation\.(\d+\.partial\.)?json$|\.npz$")
    return Host("evaluation", command, writes, re.compile(r" images of "), finished, result, 2 * images // 4)


def _do(work: Path, *command: str) -> None:
    """Runs a preparation, which must succeed."""
    environment = child_environment(IKL_PLUGINS_DATA=str(work / "data"))
    done = subprocess.run(
        [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


HOSTS: dict[str, Callable[[Path, bool], Host]] = {
    "torchdistill": lambda work, quick: torchdistill_host(work, 2 if quick else EPOCHS),
    "mmpretrain distill_ikl": lambda work, quick: mmpretrain_host(work, "distill_ikl", 2 if quick else EPOCHS),
    "mmpretrain adversarial_ikl": lambda work, quick: mmpretrain_host(
        work, "adversarial_ikl", 2 if quick else ADVERSARIAL_EPOCHS
    ),
    "evaluation": lambda work, quick: evaluation_host(work, 8 if quick else 48),
}
# MMPretrain's points are shared by its two configs.
SHARE = {"mmpretrain distill_ikl": 0.6, "mmpretrain adversarial_ikl": 0.4}


# --- the campaign ----------------------------------------------------------------------------------------------------


def _lives(host: Host, folder: Path, whole: Life, rng: random.Random, kills: int) -> Iterator[tuple[Life, str, bool]]:
    """Processes of one run, each killed but for those that finish it; with the place and whether it was aimed."""
    begun = next((seconds for seconds, text in whole.events if host.writes.search(text)), whole.seconds)
    writes = [text for _, text in whole.events if text.startswith("open ") and host.writes.search(text)]
    # About when the training begins, from the time between its writes: reading the output would need a terminal.
    steps = max(0.0, begun - (whole.seconds - begun) / host.parts)
    again = False
    for number in range(kills + 1):
        safe = host.finished(folder)
        left = max(1, round(len(writes) * (1 - safe)))
        aimed = rng.random() < AIMED
        # Random numbers are drawn alike in each case, so that the machine's speed does not decide the later ones.
        share, which, delay = rng.random(), rng.randrange(left), rng.uniform(0, LONGEST_WRITE)
        early = rng.random() < EARLY
        if number == kills:
            yield live(host, folder, again=again), "", False
            return
        if aimed:
            life = live(host, folder, again=again, kill_in_write=(which, delay))
        else:
            first = 0.0 if early else steps
            expected = begun + (whole.seconds - begun) * (1 - safe)
            life = live(host, folder, again=again, kill_after=max(0.05, first + share * (expected - first)))
        yield life, where_it_fell(host, folder, life, safe > 0) if life.killed else "", aimed
        if not life.killed:
            return
        again = True


def _one_run(
    record: Record, host: Host, folder: Path, whole: Life, reference: Any, rng: random.Random, points: int
) -> int:
    """One run from its start to its end; returns how often it was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kills = 0
    story = []
    life = None
    for life, place, aimed in _lives(host, folder, whole, rng, min(points, rng.randint(1, MOST_KILLS))):
        if life.killed:
            kills += 1
            record.add(host.name, [place, "aimed at a write" if aimed else "at a random time"])
            story.append({"after_seconds": round(life.seconds, 2), "place": place, "aimed": aimed})
    if life is None or life.code != 0:
        tail = "" if life is None else life.output[-3000:]
        record.add(host.name, ["did not go on"])
        record.fail(host.name, run=folder.name, kills=story, what="did not go on", output=tail)
        return kills
    found = differences(host.result(folder), reference)
    if found:
        record.add(host.name, ["other result"])
        record.fail(host.name, run=folder.name, kills=story, what="other result", differences=found[:50])
    else:
        record.add(host.name, ["runs that end as the uninterrupted one"])
    if host.beside is not None:
        other = differences(host.beside(folder), host.beside(folder.parent / "whole"))
        if other:
            record.remark(
                host.name,
                "the killed validation is not repeated: its entry, or the best checkpoint, is missing or half-written",
                {"kills": story, "differences": other[:5]},
            )
    shutil.rmtree(folder)
    return kills


def run(record: Record, work: Path, *, seed: int, quick: bool, hosts: tuple[str, ...] = tuple(HOSTS)) -> None:
    """Kills and resumes until every host has had its points.

    Args:
        record: of the part.
        work: folder for data, teachers and runs.
        seed: of the times.
        quick: two points a host.
        hosts: keys of :data:`HOSTS`.
    """
    work.mkdir(parents=True, exist_ok=True)
    prepare_digits(work / "data")
    for name in hosts:
        if record.done(name):
            continue
        share = SHARE.get(name, 1.0)
        points = QUICK_POINTS if quick else max(1, round(POINTS * share))
        host = HOSTS[name](work, quick)
        host.environment["IKL_PLUGINS_DATA"] = str(host.data or work / "data")
        folder = work / name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "whole").mkdir(parents=True)
        whole = live(host, folder / "whole", again=False)
        if whole.code != 0:
            raise RuntimeError(f"{name} does not run:\n{whole.output[-3000:]}")
        reference = host.result(folder / "whole")
        kills = record.content["facts"].get(f"{name}: kills", 0)
        number = record.content["facts"].get(f"{name}: runs", 0)
        while kills < points:
            rng = random.Random(f"{seed} {name} {number}")  # noqa: S311  # times, no secrets
            kills += _one_run(record, host, folder / f"run{number}", whole, reference, rng, points - kills)
            number += 1
            record.fact(f"{name}: kills", kills)
            record.fact(f"{name}: runs", number)
            record.save()
            print(f"kills, {name}: {kills} of {points} points, {number} runs", flush=True)
        record.fact(f"{name}: seconds of the uninterrupted run", round(whole.seconds, 1))
        record.save(name)
        shutil.rmtree(folder)
    record.finish()
