"""The commands whose disks are filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign import runs
from campaign.digits import TORCHDISTILL
from campaign.record import ROOT
from campaign.runs import IKL, Command


def files_of(folder: Path) -> dict[str, bytes]:
    """What a command has written, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _at_once(*arguments: str, at: str, **more: Any) -> Command:
    """A command with the place for its output, ``at`` below the folder, last."""
    return Command(arguments[0], lambda folder, _: [*arguments, f"{folder}{at}"], **{"result": files_of, **more})


def _adopt(work: Path) -> Command:
    return _at_once(*IKL, "adopt", str(TORCHDISTILL / "kd.yaml"), "--force", "--output", at="/adopted.yaml")


def _rank(work: Path) -> Command:
    numbers = ("--dataset", "cifar10", "--robust", "57.09", "--natural", "85.36", "--additional-data", "no")
    return _at_once(*IKL, "rank", *numbers, "--threat-model", "Linf", "--plot", at="/rank.png")


def _digits(work: Path) -> Command:
    return _at_once(*IKL, "data", "digits", "--force", "--data", at="", whole=True)


def _make_configs(work: Path) -> Command:
    return _at_once(str(ROOT / "tools" / "make_configs.py"), "--configs", at="")


def _submission(work: Path) -> Command:
    from quick_autoattack import write_network_and_images

    from ikl_plugins.robustbench.evaluation import evaluate

    folder = work / "submission"
    log = folder / "evaluation.json"
    if not log.exists():
        folder.mkdir(exist_ok=True)
        net, images, labels = write_network_and_images(folder, 8)
        evaluate(net, images, labels, eps="1/255", attacks=["apgd-ce"], log=log, data="images.npz")

    def result(out: Path) -> Any:
        # Seconds of the checks, and the checksums of the files that hold them, differ from run to run.
        return {name: text for name, text in files_of(out).items() if "preflight" not in name and "SUMS" not in name}

    model = ("--checkpoint", str(folder / "net.pt"), "--architecture", "WideResNet-10-1", "--name", "Doe2025Better_WRN")
    data = ("--data", str(folder / "images.npz"), "--n-examples", "8", "--evaluation", str(log))
    paper = ("--title", "Better Networks", "--link", "https://example.org/paper", "--authors", "Jane Doe, John Roe")
    said = ("--venue", "arXiv, Jan 2025", "--licence", "MIT", "--additional-data", "no", "--generated-data", "no")
    arguments = (*IKL, "submit", *model, *data, *paper, *said, "--demonstration", "--force", "--output")
    return _at_once(*arguments, at="/submission", whole=True, result=result)


WRITERS: dict[str, Callable[[Path], Command]] = {
    "ikl train, torchdistill": lambda work: runs.torchdistill(work, 3),
    "ikl train, MMPretrain": lambda work: runs.mmpretrain(work, "distill_ikl", 4),
    "ikl evaluate": lambda work: runs.evaluation(work, 12),
    "ikl submit": _submission,
    "ikl rank": _rank,
    "ikl data": _digits,
    "ikl adopt": _adopt,
    "tools/make_configs.py": _make_configs,
}
