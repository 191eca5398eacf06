"""The log of an evaluation: what ran, on what, and what became of each image.

It is JSON, one entry a line, with the adversarial images in a folder beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import __version__
from ... import _validation as check
from ..._files import written_aside
from ...checkpoints import plain_name
from ..conditions import precision
from ..data import Images, content_sha256, file_sha256
from ..known_sets import recorded_name
from ..tables import aligned

__all__ = ["FORMAT", "Evaluation", "Record", "class_names", "data_facts", "identity", "percent", "weights_sha256"]

FORMAT = "ikl_plugins.robustbench.evaluation/1"
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
    "dropped",
    "n_examples",
    "data",
    "labels",
    "natural_correct",
    "fell_to",
    "robust",
    "adversarial",
    "progress",
    "finished",
    "natural_accuracy",
    "robust_accuracy",
)
# Of the predictions on the natural images, which a GPU may give otherwise from run to run.
_MAY_DIFFER = 0.01
# What must be the same when a run goes on; the keys of the log.
_SETTINGS = (
    "threat_model",
    "dataset",
    "eps_value",
    "version",
    "attacks",
    "n_target_classes",
    "n_examples",
    "batch_size",
    "seed",
    "device",
)
_COMPILED = frozenset(("_orig_mod",))  # what torch.compile puts into the names of weights
_RESULTS_VERSIONS = ("torch", "robustbench", "autoattack", "pyautoattack")


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
        how = "standard AutoAttack" if log["standard"] else f"AutoAttack {log['version']}"
        data = (log["data"] or {}).get("name") or log["dataset"] or "data without a name"
        what = log["threat_model"] if corrupted else f"{log['threat_model']}, eps {log['eps']}, {how}"
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

    def save(self, path: str | Path) -> None:
        """Writes the log as JSON; a file that cannot be written whole is left as it was."""
        _write_log(self.log, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Reads a log, and the adversarial images if they lie beside it.

        Raises:
            ValueError: the file is missing or damaged, is no such log, or lacks some of its adversarial images.
        """
        path = Path(path)
        log = _read_log("Evaluation.load", path)
        folder = _folder(path)
        there = log["adversarial"] and (folder.is_dir() or not any(log["fell_to"]))
        return cls(log, _read_adversarial(log, folder) if there else None)


class Record:
    """The log of a run that may go on from an earlier one, with the adversarial images beside it."""

    def __init__(self, caller: str, fresh: dict[str, Any], path: Path | None) -> None:
        self._caller = caller
        self._path = path
        self.adversarial: dict[int, Tensor] = {}
        if path is None or not path.exists():
            self.log = {**fresh, "adversarial": None if path is None or fresh["eps"] is None else _folder(path).name}
            if path is not None:
                for left in _folder(path).glob("*.npz"):
                    left.unlink()  # of a log that somebody has removed
        else:
            self.log = self._resumed(fresh, _read_log(caller, path))
            if self.log["fell_to"] is not None:
                self.adversarial = _read_adversarial(self.log, _folder(path))
        self.log["finished"] = self.log.get("finished", False)
        self._count()

    def _resumed(self, fresh: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        differing = [
            f"{key} {json.dumps(old.get(key))} instead of {json.dumps(fresh[key])}"
            for key in _SETTINGS
            if old.get(key) != fresh[key]
        ]
        differing += [
            f"version of {name} {old['versions'].get(name)} instead of {fresh['versions'].get(name)}"
            for name in _RESULTS_VERSIONS
            if old["versions"].get(name) != fresh["versions"].get(name)
        ]
        if old["weights_sha256"] != fresh["weights_sha256"]:
            differing.append("weights")
        if (old["data"] or {}).get("sha256") != (fresh["data"] or {}).get("sha256"):
            differing.append("data")
        if not differing and fresh["version"] != "rand" and fresh["natural_predictions"] is not None:
            pairs = zip(old["natural_predictions"], fresh["natural_predictions"], strict=True)
            if sum(a != b for a, b in pairs) > _MAY_DIFFER * len(fresh["labels"]):
                differing.append("predictions on the natural images")
        if differing:
            raise self.refusal("; ".join(differing))
        return {**old, **{key: fresh[key] for key in ("checkpoint", "model", "data", "classes")}}

    def refusal(self, differing: str) -> ValueError:
        return ValueError(
            f"{self._caller}: `log` must be new or of the same evaluation, but {self._path} has other {differing}. "
            f"Name another file, or remove this one."
        )

    def entry(self, attack: str, batches: int, standing: int) -> dict[str, Any]:
        """The line of the progress for an attack."""
        for known in self.log["progress"]:
            if known["attack"] == attack:
                found: dict[str, Any] = known
                return found
        new = {"attack": attack, "standing": standing, "seconds": 0.0, "batches": batches, "batches_done": 0}
        self.log["progress"].append(new)
        return new

    def fall(self, attack: str, batch: int, indices: Tensor, images: Tensor, predictions: Tensor) -> None:
        """Notes the images of a batch that fell, after their adversarial images are on the disk."""
        if self._path is not None and len(indices):
            number = self.log["attacks"].index(attack)
            with written_aside(_folder(self._path) / f"{number}-{attack}-{batch:05d}.npz") as aside:
                np.savez(aside, index=indices.numpy(), image=images.numpy())
        for index, image, prediction in zip(indices.tolist(), images, predictions.tolist(), strict=True):
            self.adversarial[index] = image
            self.log["predictions"][index] = prediction
            self.log["fell_to"][index] = attack

    def save(self) -> None:
        self._count()
        if self._path is not None:
            _write_log(self.log, self._path)

    def _count(self) -> None:
        log = self.log
        correct = log["natural_correct"]
        log["natural_accuracy"] = None if correct is None else percent(correct)
        if log["fell_to"] is None:
            accuracies = [entry["accuracy"] for entry in log["corruptions"]]
            log["robust"] = None
            log["robust_accuracy"] = float(np.mean(accuracies)) if accuracies else None
        else:
            log["robust"] = [int(ok and name is None) for ok, name in zip(correct, log["fell_to"], strict=True)]
            log["robust_accuracy"] = percent(log["robust"])


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """The checksum of a state dict: of its names, dtypes, shapes and values, in the order of the names.

    It has 64 hexadecimal digits, the same for a network, its state dict and what torch.compile makes of it, on any
    device.
    """
    state = _unwrapped(weights).state_dict() if isinstance(weights, nn.Module) else weights
    state = {plain_name(name, _COMPILED): value for name, value in state.items()}
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    try:
        versions["autoattack"] = metadata.version("autoattack")
    except metadata.PackageNotFoundError:
        versions["pyautoattack"] = metadata.version("pyautoattack")
    return {
        "format": FORMAT,
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "model": type(_unwrapped(model)).__name__ if name is None else name,
        "checkpoint": None if checkpoint is None else {key: checkpoint[key] for key in ("name", "sha256")},
        "weights_sha256": weights_sha256(model),
        "dtype": precision(model),
    }


def data_facts(data: str | Images | None, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
    name, source = (data.name, data.source) if isinstance(data, Images) else (data, None)
    if isinstance(data, Images) and source is not None:
        first = data.images[: len(images)], data.labels[: len(images)]
        source = source if torch.equal(first[0], images) and labels is not None and first[1].equal(labels) else None
    return {
        "name": recorded_name(name, source),
        "source": source,
        "sha256": content_sha256(images, torch.empty(0) if labels is None else labels),
        "n_examples": len(images),
        "preprocessing": data.preprocessing if isinstance(data, Images) else None,
    }


def class_names(data: str | Images | None, classes: int | None) -> list[str] | None:
    names = data.classes if isinstance(data, Images) else None
    return list(names) if names is not None and len(names) == classes else None


# --- files ------------------------------------------------------------------------------------------------------------


def percent(flags: Sequence[int]) -> float:
    return 100 * sum(flags) / len(flags)


def _folder(path: Path) -> Path:
    """Where the adversarial images of a log lie."""
    return path.with_name(f"{path.stem}_adversarial")


def _write_log(log: Mapping[str, Any], path: Path) -> None:
    lines = (f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in log.items())
    with written_aside(path) as aside:
        aside.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _read_log(caller: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{caller}: the log must be a file, but there is none at {path}.")
    try:
        log = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{caller}: {path} must be a log, but is damaged ({error}). Remove it.") from error
    if not isinstance(log, dict) or log.get("format") != FORMAT:
        found = log.get("format") if isinstance(log, dict) else type(log).__name__
        raise ValueError(f"{caller}: {path} must be a log of the format {FORMAT}, got {found}.")
    missing = [key for key in _KEYS if key not in log]
    if missing:
        raise ValueError(
            f"{caller}: {path} must be a whole log, but lacks {check.first_names(missing)}. Remove it, evaluate again."
        )
    return log


def _read_adversarial(log: Mapping[str, Any], folder: Path) -> dict[int, Tensor]:
    """The adversarial images of all that fell."""
    fell = {index: attack for index, attack in enumerate(log["fell_to"]) if attack is not None}
    found = {}
    for number, attack in enumerate(log["attacks"]):
        for path in sorted(folder.glob(f"{number}-{attack}-*.npz")):
            try:
                with path.open("rb") as file:
                    part = np.load(file, allow_pickle=False)
                    pairs = list(zip(part["index"].tolist(), torch.from_numpy(part["image"]), strict=True))
            except Exception as error:  # a damaged file makes the readers raise nearly anything
                raise ValueError(
                    f"Evaluation: {path} must hold adversarial images, but is damaged ({error}). Evaluate again."
                ) from error
            # A run that was killed between its images and its log leaves some that the log knows nothing of.
            found.update({index: image for index, image in pairs if fell.get(index) == attack})
    if len(found) != len(fell):
        raise ValueError(
            f"Evaluation: {folder} must hold the adversarial images of all {len(fell)} that fell, but has "
            f"{len(found)}. Bring it back."
        )
    return dict(sorted(found.items()))
