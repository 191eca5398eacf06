"""The commands that are killed, and whose disks are filled: three trainings and an evaluation.

Each is started as a user starts it, and goes on from what an earlier process has left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from campaign.comparison import half_written
from campaign.digits import MMPRETRAIN, TORCHDISTILL, few_digits, replaced
from campaign.record import child_environment
from ikl_plugins.checkpoints import load_content
from ikl_plugins.commands.data import prepare_digits

TIMEOUT = 900.0  # of one process, in seconds
LESS_DATA = {"train": 32, "val": 10, "test": 10}  # digits of each class, for the adversarial training
IKL = ("-m", "ikl_plugins")


@dataclass
class Life:
    """What became of one process."""

    seconds: float
    code: int
    events: list[tuple[float, str]]  # seconds since the start, 'open PATH' or 'rename PATH'
    output: str
    killed: bool
    interrupted: bool = False  # by Ctrl-C

    @property
    def stopped(self) -> bool:
        return self.killed or self.interrupted


ANY, NONE = re.compile(""), re.compile("(?!)")


@dataclass
class Command:
    """A command that writes files into a folder of its own; a run goes on when it is started again."""

    name: str
    arguments: Callable[[Path, bool], list[str]]  # of Python, from the folder and whether it was started before
    result: Callable[[Path], Any]  # what must be equal at the end
    environment: dict[str, str] = field(default_factory=dict)
    kept: re.Pattern[str] = ANY  # files that must survive
    removes: re.Pattern[str] = NONE  # those of them that the host itself removes when it has newer ones
    whole: bool = False  # what writes at once writes a whole folder aside, and not file by file
    # Of a run; what writes at once has none of these.
    finished: Callable[[Path], float] | None = None  # how much of it is safe on the disk, from 0 to 1
    writes: re.Pattern[str] = NONE  # files that a resumed run depends on
    begun: re.Pattern[str] = NONE  # a line of the output which says that this process has done its first step
    parts: int = 1  # about how many pieces of equal length it has, each with a write behind it
    beside: Callable[[Path], Any] | None = None  # what the host itself does not promise, compared apart

    def safe(self, folder: Path) -> float:
        return 0.0 if self.finished is None else self.finished(folder)


def live(
    command: Command,
    folder: Path,
    *,
    again: bool,
    kill_after: float | None = None,
    kill_in_write: tuple[int, float] | None = None,
    kill_at_rename: int = -1,
    interrupt: bool = False,
    meanwhile: Callable[[], object] | None = None,
    log: str = "",
) -> Life:
    """Starts the command and waits for its end, or kills it.

    Args:
        command: what to start.
        folder: of the run.
        again: whether it goes on from an earlier process.
        kill_after: so many seconds after the start.
        kill_in_write: the number of the write, 0 for the first, and the seconds after its beginning.
        kill_at_rename: the number of the rename behind a write; it is killed before that.
        interrupt: send SIGINT to it and its children, as a terminal does for Ctrl-C, in place of killing it.
        meanwhile: called while it stands still, as soon as it has locked something.
        log: what the name of the file with its output ends with.

    Raises:
        RuntimeError: a process that neither ended nor was to be killed.
    """
    reader, writer = os.pipe()
    written = folder.with_name(f"{folder.name}{log}.log")
    recorder = Path(__file__).with_name("record_writes.py")
    pattern = command.writes.pattern
    start = time.monotonic()
    events: list[tuple[float, str]] = []
    with written.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                str(recorder),
                str(writer),
                pattern,
                str(kill_at_rename),
                *command.arguments(folder, again),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            cwd=folder.parent,
            env=child_environment(**command.environment),
            start_new_session=True,
        )
    os.close(writer)

    def follow() -> None:
        begun = 0
        with os.fdopen(reader) as lines:
            for line in lines:
                events.append((time.monotonic() - start, line.rstrip("\n")))
                if line.startswith("open ") and command.writes.search(line):
                    if kill_in_write is not None and begun == kill_in_write[0]:
                        threading.Timer(kill_in_write[1], process.kill).start()
                    begun += 1

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    signalled = False
    if meanwhile is not None:
        while process.poll() is None and not locks(folder):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGSTOP)
        try:
            meanwhile()
        finally:
            os.killpg(process.pid, signal.SIGCONT)
    try:
        process.wait(TIMEOUT if kill_after is None else kill_after)
    except subprocess.TimeoutExpired as error:
        if interrupt:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        if kill_after is None:
            raise RuntimeError(f"{command.name} did not end:\n{written.read_text(errors='replace')[-2000:]}") from error
        signalled = interrupt
    code = process.wait(TIMEOUT)
    follower.join(1.0)  # a child of the process may keep the pipe open
    text = written.read_text(errors="replace")
    return Life(time.monotonic() - start, code, events, text, code == -signal.SIGKILL, signalled and code != 0)


def locks(folder: Path) -> list[Path]:
    """What a run has locked in its folder, or the folder itself."""
    return [*folder.rglob("*.lock"), *folder.parent.glob(f"{folder.name}*.lock")]


def judge_interrupt(life: Life) -> str | None:
    """Why the end of a command after Ctrl-C is not clear; None if it is."""
    lines = [line for line in life.output.splitlines() if line.strip()]
    if life.code != 130:
        return f"ended with {life.code}"
    if "Traceback (most recent call last)" in life.output:
        return "a traceback"
    return None if lines and lines[-1].startswith("interrupted; ") else "no clear line at the end"


def where_it_fell(command: Command, life: Life, safe_before: bool) -> str:
    """In what a process was killed."""
    told = [text for _, text in life.events if command.writes.search(text)]
    if told and told[-1].startswith("open ") and half_written(Path(told[-1].split(" ", 1)[1])):
        return "inside a write"
    if not command.begun.search(life.output):
        return "start-up"
    return "inside an epoch" if safe_before or told else "before the first checkpoint"


def prepare(work: Path, *arguments: str) -> None:
    """Runs a command of ours that must succeed, on all digits."""
    done = subprocess.run(
        [sys.executable, *IKL, *arguments],
        cwd=work,
        env=child_environment(IKL_PLUGINS_DATA=str(digits(work))),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def digits(work: Path) -> Path:
    prepare_digits(work / "data")
    return work / "data"


def config_of(work: Path, folder: Path, ending: str) -> Path:
    """Where a run's config lies: not on the disk that the run writes to."""
    return work / f"{folder.parent.name}_{folder.name}{ending}"


def torchdistill(work: Path, epochs: int) -> Command:
    """The shipped digits/ikl.yaml: IKL with the class prior."""
    teacher = work / "teacher" / "teacher.pt"
    shipped = (TORCHDISTILL / "ikl.yaml").read_text()

    def done(folder: Path) -> int:
        last = folder / "ikl_last.pt"
        return int(load_content(last)["epoch"]) if last.exists() else 0

    def arguments(folder: Path, again: bool) -> list[str]:
        config = config_of(work, folder, ".yaml")
        config.write_text(
            replaced(
                shipped,
                ("num_epochs: 10", f"num_epochs: {epochs}"),
                ("T_max: 10", f"T_max: {epochs}"),
                ("runs/torchdistill/digits/teacher/teacher.pt", str(teacher)),
                ("runs/torchdistill/digits/ikl/ikl.pt", str(folder / "ikl.pt")),
            )
        )
        return [*IKL, "train", str(config), "--device", "cpu", "--start_epoch", str(done(folder) if again else 0)]

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
                (TORCHDISTILL / "teacher.yaml").read_text(),
                ("num_epochs: 12", "num_epochs: 2"),
                ("T_max: 12", "T_max: 2"),
                ("dst_ckpt: 'runs/torchdistill/digits/teacher/teacher.pt'", f"dst_ckpt: '{teacher}'"),
            )
        )
        prepare(work, "train", str(config), "--device", "cpu")
    return Command(
        "torchdistill",
        arguments,
        kept=re.compile(r"\.pt$"),
        writes=re.compile(r"ikl(_last)?\.pt"),
        begun=re.compile(r"Loss = "),
        finished=lambda folder: done(folder) / epochs,
        result=result,
        parts=epochs,
        environment={"IKL_PLUGINS_DATA": str(digits(work))},
    )


def _mmpretrain_net(work: Path, name: str) -> Path:
    """A shipped config of the digits, trained for two epochs."""
    checkpoint = work / f"mm_{name}" / "epoch_2.pth"
    if not checkpoint.exists():
        shorter = ("--cfg-options", "train_cfg.max_epochs=2", "param_scheduler.T_max=2")
        prepare(work, "train", str(MMPRETRAIN / f"{name}.py"), "--work-dir", str(checkpoint.parent), *shorter)
    return checkpoint


def mmpretrain(work: Path, name: str, epochs: int) -> Command:
    """A shipped config of the digits: 'distill_ikl' or 'adversarial_ikl', the latter with weight perturbation."""
    if name == "distill_ikl":
        data = digits(work)
        more = f"model = dict(teacher_ckpt={str(_mmpretrain_net(work, 'teacher'))!r})"
    else:
        data = few_digits(work / "less", LESS_DATA)
        more = "model = dict(awp=dict(warmup_epochs=1))"

    def arguments(folder: Path, again: bool) -> list[str]:
        config = config_of(work, folder, ".py")
        config.write_text(
            f"_base_ = {str(MMPRETRAIN / f'{name}.py')!r}\ntrain_cfg = dict(max_epochs={epochs})\n"
            f"param_scheduler = dict(T_max={epochs})\n{more}\ndefault_hooks = dict(logger=dict(interval=1))\n"
        )
        return [*IKL, "train", str(config), "--work-dir", str(folder), *(["--resume"] if again else [])]

    def finished(folder: Path) -> float:
        last = folder / "last_checkpoint"
        found = re.search(r"epoch_(\d+)\.pth$", last.read_text().strip()) if last.exists() else None
        return int(found[1]) / epochs if found else 0.0

    def history(content: Any, kind: str) -> Any:
        scalars = content["message_hub"]["log_scalars"].items()
        return {key: buffer._log_history for key, buffer in scalars if key.startswith(kind) and "time" not in key}

    def result(folder: Path) -> Any:
        content = load_content(folder / f"epoch_{epochs}.pth")
        kept = {key: content[key] for key in ("state_dict", "optimizer", "param_schedulers")}
        return {**kept, "history": history(content, "train/")}

    def beside(folder: Path) -> Any:
        best = folder.glob("best_*.pth")
        found = {path.name: None if half_written(path) else load_content(path)["state_dict"] for path in best}
        return {**found, "history": history(load_content(folder / f"epoch_{epochs}.pth"), "val/")}

    return Command(
        f"mmpretrain {name}",
        arguments,
        kept=re.compile(r"\.pth$|last_checkpoint$"),
        removes=re.compile(r"(epoch_\d+|best_.*)\.pth$"),
        writes=re.compile(r"(epoch_\d+\.pth|last_checkpoint)$"),
        begun=re.compile(r"Epoch\(train\)"),
        finished=finished,
        result=result,
        parts=epochs,
        beside=beside,
        environment={"IKL_PLUGINS_DATA": str(data)},
    )


def evaluation(work: Path, images: int) -> Command:
    """AutoAttack on a small network and real digits."""
    checkpoint = _mmpretrain_net(work, "natural")
    data = digits(work)

    def arguments(folder: Path, again: bool) -> list[str]:
        model = ("--mmpretrain", str(MMPRETRAIN / "natural.py"), "--checkpoint", str(checkpoint))
        on = ("--data", str(data / "digits" / "test"), "--n-examples", str(images), "--batch-size", "4")
        attack = ("--eps", "8/255", "--attacks", "apgd-ce,apgd-t")
        return [*IKL, "evaluate", *model, *on, *attack, "--output", str(folder)]

    def log_of(folder: Path) -> Any:
        path = folder / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finished(folder: Path) -> float:
        log = log_of(folder)
        if log is None:
            return 0.0
        shares = [entry["batches_done"] / max(1, entry["batches"]) for entry in log["progress"]]
        return float(sum(shares) / len(log["attacks"]))

    def result(folder: Path) -> Any:
        log = log_of(folder)
        for entries in (log, log["seal"]):  # and its checksums of what differs
            del entries["date"]
        del log["seal"]["progress"]
        for entry in log["progress"]:
            del entry["seconds"]
        images_of = {}
        for path in sorted((folder / "evaluation_adversarial").glob("[!.]*.npz")):
            with np.load(path) as content:
                images_of[path.name] = {name: content[name] for name in content if name != "seconds"}
        return {"log": log, "adversarial": images_of}

    return Command(
        "evaluation",
        arguments,
        kept=re.compile(r"\.(json|npz|md|png)$"),
        writes=re.compile(r"evaluation\.([\w-]+\.partial\.)?json$|\.npz$"),
        begun=re.compile(r" images of "),
        finished=finished,
        result=result,
        parts=2 * images // 4,
        environment={"IKL_PLUGINS_DATA": str(data)},
    )
