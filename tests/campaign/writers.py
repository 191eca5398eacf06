"""The commands that write files, each as a :class:`Writer`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from campaign import runs
from campaign.digits import TORCHDISTILL
from campaign.record import ROOT
from campaign.runs import IKL, Command


class Writer(NamedTuple):
    """A command that writes files."""

    arguments: Callable[[Path, bool], list[str]]  # of Python, from the folder and whether it was started before
    result: Callable[[Path], Any]  # what must be equal at the end
    kept: re.Pattern[str] = re.compile(".")  # files that must survive
    environment: dict[str, str] = {}  # noqa: RUF012  # never changed
    finished: Callable[[Path], float] | None = None  # how much of a run is safe; None of a command that writes at once
    whole: bool = False  # such a command writes a whole folder aside, and not file by file
    removes: re.Pattern[str] | None = None  # files that the host itself removes when it has newer ones


def _run(command: Command, kept: str, removes: str | None = None) -> Writer:
    """A training or an evaluation, which goes on from what is there."""
    return Writer(
        lambda folder, again: ["-m", *command.arguments(folder, again)],
        command.result,
        kept=re.compile(kept),
        environment=command.environment,
        finished=command.finished,
        removes=None if removes is None else re.compile(removes),
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """What a command has written, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _at_once(*arguments: str, at: str, whole: bool = False, result: Callable[[Path], Any] = files_of) -> Writer:
    """A command with the place for its output, ``at`` below the folder, last."""
    return Writer(lambda folder, again: [*arguments, f"{folder}{at}"], result, whole=whole)


def _adopt(work: Path) -> Writer:
    return _at_once("-m", IKL, "adopt", str(TORCHDISTILL / "kd.yaml"), "--force", "--output", at="/adopted.yaml")


def _rank(work: Path) -> Writer:
    numbers = ("--dataset", "cifar10", "--robust", "57.09", "--natural", "85.36", "--additional-data", "no")
    return _at_once("-m", IKL, "rank", *numbers, "--threat-model", "Linf", "--plot", at="/rank.png")


def _digits(work: Path) -> Writer:
    return _at_once("-m", IKL, "data", "digits", "--force", "--data", at="", whole=True)


def _make_configs(work: Path) -> Writer:
    return _at_once(str(ROOT / "tools" / "make_configs.py"), "--configs", at="")


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
        return {name: text for name, text in files_of(out).items() if "preflight" not in name and "SUMS" not in name}

    model = ("--checkpoint", str(folder / "net.pt"), "--architecture", "WideResNet-10-1", "--name", "Doe2025Better_WRN")
    data = ("--data", str(folder / "images.npz"), "--n-examples", "8", "--evaluation", str(log))
    paper = ("--title", "Better Networks", "--link", "https://example.org/paper", "--authors", "Jane Doe, John Roe")
    said = ("--venue", "arXiv, Jan 2025", "--licence", "MIT", "--additional-data", "no", "--generated-data", "no")
    arguments = ("-m", IKL, "submit", *model, *data, *paper, *said, "--demonstration", "--force", "--output")
    return _at_once(*arguments, at="/submission", whole=True, result=result)


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "ikl train, torchdistill": lambda work: _run(runs.torchdistill(work, 3), r"\.pt$"),
    "ikl train, MMPretrain": lambda work: _run(
        runs.mmpretrain(work, "distill_ikl", 4), r"\.pth$|last_checkpoint$", r"(epoch_\d+|best_.*)\.pth$"
    ),
    "ikl evaluate": lambda work: _run(runs.evaluation(work, 12), r"\.(json|npz|md|png)$"),
    "ikl submit": _submission,
    "ikl rank": _rank,
    "ikl data": _digits,
    "ikl adopt": _adopt,
    "tools/make_configs.py": _make_configs,
}


def command_line(writer: Writer, folder: Path, again: bool) -> list[str]:
    return [sys.executable, *writer.arguments(folder, again)]
