"""The log of an evaluation: what ran, on what, and what became of each image.

It is JSON, one entry a line, with the files of the batches, and in them the adversarial images, in a folder beside it.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import __version__
from ... import _validation as check
from ..._files import written_aside
from ..._limits import check_limit, printable, read_text
from ...checkpoints import plain_name
from ...models.weights import state_sha256
from ..conditions import precision
from ..data import Images, content_sha256, file_sha256
from ..export import export
from ..known_sets import recorded_name
from ..tables import aligned
from .evidence import check_log, read_batches
from .seal import broken, parsed, seal
from .verdict import attacks_in_words, is_standard, warnings_of

__all__ = ["FORMAT", "Evaluation", "batch_folder", "class_names", "data_facts", "identity", "percent", "read_log"]
__all__ += ["is_standard", "logged_batch_size", "versions_text", "weights_sha256", "write_log"]

FORMAT = "ikl_plugins.robustbench.evaluation/2"
# What every log has, read by reports, submissions and ranks.
_KEYS = (
    "versions",
    "weights_sha256",
    "threat_model",
    "dataset",
    "eps",
    "version",
    "standard",
    "attacks",
    "parameters",
    "precision",
    "autoattack",
    "dropped",
    "n_examples",
    "data",
    "labels",
    "natural_correct",
    "fell_to",
    "robust",
    "adversarial",
    "progress",
    "unreliable",
    "finished",
    "natural_accuracy",
    "robust_accuracy",
    "seal",
)
_COMPILED = frozenset(("_orig_mod",))  # what torch.compile puts into the names of weights


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        log: everything there is to say, as JSON has it.
        adversarial: the adversarial image of each image that fell, by its index; None if it was not kept.
    """

    log: dict[str, Any]
    adversarial: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"<Evaluation, {str(self).splitlines()[0]}>"

    def __str__(self) -> str:
        """What was evaluated, and how many images stood after each attack."""
        log, count = self.log, self.log["n_examples"]
        corrupted = log["fell_to"] is None
        data = (log["data"] or {}).get("name") or log["dataset"] or "data without a name"
        what = log["threat_model"] if corrupted else f"{log['threat_model']}, eps {log['eps']}, {attacks_in_words(log)}"
        rows = [["", "images", "accuracy (%)"]]
        if log["natural_correct"] is not None:
            rows.append(["natural images", f"{sum(log['natural_correct']):,}", f"{log['natural_accuracy']:.2f}"])
        if corrupted:
            robust = "-" if log["robust_accuracy"] is None else f"{log['robust_accuracy']:.2f}"
            rows.append([f"mean of {len(log['corruptions'])} corruptions and severities", "", robust])
        for entry in () if corrupted else log["progress"] or ():
            standing = entry["standing"]
            rows.append([f"after {entry['attack']}", f"{standing:,}", f"{100 * standing / count:.2f}"])
        end = "" if log["finished"] else "\nNot finished: the robust accuracy will fall further."
        end += "".join(f"\nAutoAttack warns: {warning}" for warning in warnings_of(log))
        end += "\nAutoAttack's own checks say that this evaluation may be unreliable." if log["unreliable"] else ""
        return f"{log['model']}: {count:,} images of {data}, {what}\n{aligned(rows)}{end}"

    @property
    def natural_accuracy(self) -> float | None:
        """In percent; None where no natural images were given."""
        value: float | None = self.log["natural_accuracy"]
        return value

    @property
    def robust_accuracy(self) -> float:
        """In percent: of images classified right after all attacks (mean over all corruptions and severities)."""
        value: float = self.log["robust_accuracy"]
        return value

    @property
    def finished(self) -> bool:
        """Whether all attacks have run."""
        return bool(self.log["finished"])

    @property
    def standard(self) -> bool:
        """Whether this is standard AutoAttack."""
        return bool(self.log["standard"])

    def adversarial_images(self, images: Tensor) -> Tensor:
        """What AutoAttack returns: a copy of the images, (N, C, H, W), those that fell as their adversarial ones.

        Raises:
            ValueError: the adversarial images were not kept.
        """
        if self.adversarial is None:
            raise ValueError(
                "Evaluation.adversarial_images: the images must be beside the log, but were not kept. Evaluate again."
            )
        found = images.clone()
        for index, image in self.adversarial.items():
            found[index] = image
        return found

    def export(self, path: str | Path, images: Images | Tensor) -> Path:
        """Writes the images as the attacks have left them, for other programs and for attacks on other models.

        Args:
            path: ends with .npz, which :func:`~ikl_plugins.robustbench.load_images` reads, or with .pt, which
                ``torch.load(path, weights_only=True)`` reads. It is written whole or not at all.
            images: those that were evaluated, (N, C, H, W).

        Returns:
            The path. The file holds ``image`` (float32, (N, C, H, W), those that stood unchanged; in .pt also under
            AutoAttack's name ``adv_complete``), ``label``, ``prediction`` and ``natural_prediction`` (int64, (N,)),
            ``fell_to`` (per image the attack, or ''), ``classes``, ``data`` and what the log says of model and attacks.

        Raises:
            ValueError: another ending; the evaluation is unfinished; its adversarial images were not kept; other images
                than those of the log, by their checksum.
        """
        return export(self, path, images)

    def save(self, path: str | Path) -> None:
        """Writes the log as JSON; a file that cannot be written whole is left as it was."""
        write_log(self.log, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Reads a log, and the adversarial images if they lie beside it.

        Raises:
            ValueError: the file is missing or damaged, is no such log, was edited, does not agree with itself or with
                the batch files beside it, or lacks some of these.
        """
        path = Path(path)
        log = read_log("Evaluation.load", path)
        if log["adversarial"] is None:
            return cls(log)
        folder = path.with_name(log["adversarial"])
        if folder.is_dir():
            return cls(log, read_batches(f"Evaluation.load: {path}", log, folder))
        return cls(log, None if any(log["fell_to"]) else {})


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """The checksum of a state dict: of its names, dtypes, shapes and values, in the order of the names.

    It has 64 hexadecimal digits, the same for a network, its state dict and what torch.compile makes of it, on any
    device.
    """
    state = _unwrapped(weights).state_dict() if isinstance(weights, nn.Module) else weights
    return state_sha256({plain_name(name, _COMPILED): value for name, value in state.items()})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network that was compiled, or wrapped for several devices."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


# --- what ran ---------------------------------------------------------------------------------------------------------


def identity(
    model: nn.Module, name: str | None, checkpoint: str | Path | Mapping[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """What ran, on what, with which weights."""
    if isinstance(checkpoint, (str, Path)):
        checkpoint = {"name": Path(checkpoint).name, "sha256": file_sha256(checkpoint)}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "ikl_plugins": __version__}
    for package in ("torchvision", "robustbench"):
        versions[package] = metadata.version(package)
    return {
        "format": FORMAT,
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "model": printable(type(_unwrapped(model)).__name__ if name is None else name, None),
        "checkpoint": checkpoint and {"name": printable(checkpoint["name"], None), "sha256": checkpoint["sha256"]},
        "weights_sha256": weights_sha256(model),
        "dtype": precision(model),
    }


def versions_text(log: Mapping[str, Any]) -> str:
    """Names and versions of what ran, behind commas."""
    ran = log["autoattack"]
    versions = log["versions"] if ran is None else {**log["versions"], ran["package"] or ran["module"]: ran["version"]}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def data_facts(data: str | Images | None, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
    name, source = (data.name, data.source) if isinstance(data, Images) else (data, None)
    if isinstance(data, Images) and source is not None:
        first = data.images[: len(images)], data.labels[: len(images)]
        source = source if torch.equal(first[0], images) and labels is not None and first[1].equal(labels) else None
    name = recorded_name(name, source)
    return {
        "name": None if name is None else printable(name, None),
        "source": source,
        "sha256": content_sha256(images, torch.empty(0) if labels is None else labels),
        "n_examples": len(images),
        "preprocessing": data.preprocessing if isinstance(data, Images) else None,
    }


def class_names(data: str | Images | None, classes: int | None) -> list[str] | None:
    names = data.classes if isinstance(data, Images) else None
    return [printable(name, None) for name in names] if names is not None and len(names) == classes else None


# --- files ------------------------------------------------------------------------------------------------------------


def percent(flags: Sequence[int]) -> float:
    return 100 * sum(flags) / len(flags)


def batch_folder(path: Path) -> Path:
    """Where the batch files of a log lie."""
    return path.with_name(f"{path.stem}_adversarial")


def logged_batch_size(caller: str, path: str | Path | None) -> int | None:
    """That of a log from which a run goes on; None where there is none."""
    if path is None or not Path(path).exists():
        return None
    size: int = read_log(caller, Path(path))["batch_size"]
    return size


def write_log(log: Mapping[str, Any], path: Path) -> None:
    """Writes a log with its seal."""
    sealed = {**log, "seal": seal(log)}
    lines = (f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in sealed.items())
    with written_aside(path) as aside:
        aside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_log(caller: str, path: Path) -> dict[str, Any]:
    """A log without its seal; refused unless it is whole, as it was written, and agrees with itself."""
    if not path.is_file():
        raise ValueError(f"{caller}: the log must be a file, but there is none at {path}.")
    check_limit(caller, path, "TEXT_BYTES", path.stat().st_size)
    try:
        log = parsed(read_text(caller, path))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{caller}: {path} must be a log, but is damaged, or none ({error}).") from error
    if not isinstance(log, dict) or log.get("format") != FORMAT:
        found = log.get("format") if isinstance(log, dict) else type(log).__name__
        raise ValueError(f"{caller}: {path} must be a log of the format {FORMAT}, got {printable(found)}.")
    missing = [key for key in _KEYS if key not in log]
    if missing:
        raise ValueError(
            f"{caller}: {path} must be a whole log, but lacks {check.first_names(missing)}. Remove it, evaluate again."
        )
    edited = broken(log)
    if edited:
        raise ValueError(
            f"{caller}: {path} must be as it was written, but was edited in {check.first_names(edited)}. Bring the "
            "original back, or evaluate again."
        )
    log.pop("seal")
    check_log(f"{caller}: {path}", log)
    return log
