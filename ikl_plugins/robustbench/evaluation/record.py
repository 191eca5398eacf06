"""The log of a run that may go on from an earlier one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data import content_sha256
from .attacks import square_warnings
from .batches import RESULTS_VERSIONS, Batch, each_kind_once
from .log import batch_folder, percent, read_log, write_log
from .verdict import autoattack_accuracies, is_unreliable

__all__ = ["Record", "differing"]

# Of the predictions on the natural images, which a GPU may give otherwise from run to run.
_MAY_DIFFER = 0.01
# What must be the same when a run goes on; the keys of the log.
_SETTINGS = (
    "threat_model",
    "dataset",
    "eps_value",
    "version",
    "attacks",
    "parameters",
    "own_attacks",
    "surrogate",
    "precision",
    "n_target_classes",
    "n_examples",
    "batch_size",
    "seed",
    "device",
    "autoattack",
)


class Record:
    """The log of a run, which goes on from the one that is there.

    Args:
        caller: whom a refusal names.
        fresh: the log before anything has run.
        path: of the log; None keeps nothing.
        images: that are attacked, (N, C, H, W); with them the log may be of the first images alone.
        labels: theirs (N,).
        writer: False where another process writes the log.

    Attributes:
        log: what is to be said.
        adversarial: the adversarial image of each image that fell, by its index.
        folder: of the batch files; None keeps nothing.

    Raises:
        ValueError: the log is damaged or of another evaluation.
    """

    def __init__(
        self,
        caller: str,
        fresh: dict[str, Any],
        path: Path | None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        writer: bool = True,
    ) -> None:
        self._caller, self._path, self._writer = caller, path, writer
        self._images, self._labels = images, labels
        self.adversarial: dict[int, Tensor] = {}
        self.folder = None if path is None or fresh["eps"] is None else batch_folder(path)
        self.log = {**fresh, "adversarial": None if self.folder is None else self.folder.name, "finished": False}
        self.found = path is not None and path.exists()
        if path is not None and self.found:
            old = read_log(caller, path)
            self.check(old)
            if old["n_examples"] == fresh["n_examples"]:
                kept = {"date": old["date"], "corruptions": old.get("corruptions")}
                self.log = {**old, **self.log, **{key: kept[key] for key in kept if key in old}}
            if old["natural_predictions"] is not None:
                self.adopt(old["natural_predictions"], path)
        self._count()

    def check(self, old: dict[str, Any]) -> None:
        """Refuses the log of another evaluation."""
        found = differing(old, self.log)
        count, data = old["n_examples"], (old["data"] or {}).get("sha256")
        if self._images is not None and self._labels is not None and count < len(self._images):
            found = [text for text in found if not text.startswith(("n_examples ", "data"))]
            if data != content_sha256(self._images[:count], self._labels[:count]):
                found.append(f"data in its {count} images")
        if found:
            raise self.refusal("; ".join(found))

    def check_other(self) -> None:
        """Refuses the log that the first shard has written meanwhile, if it is of another evaluation."""
        if self._path is not None and not self._writer and self._path.exists():
            self.check(read_log(self._caller, self._path))

    def adopt(self, predictions: list[int], path: Path) -> None:
        """Takes the predictions on the first natural images from an earlier run or another process."""
        own = self.log["natural_predictions"]
        if own is None:
            return
        differ = sum(a != b for a, b in zip(predictions, own, strict=False))
        if self.log["version"] != "rand" and differ > _MAY_DIFFER * len(predictions):
            raise self.refusal("predictions on the natural images", path)
        taken = [*predictions, *own[len(predictions) :]]
        correct = [int(a == b) for a, b in zip(taken, self.log["labels"], strict=True)]
        self.log.update(natural_predictions=taken, natural_correct=correct)
        if self.log["fell_to"] is not None:
            self.log["predictions"] = list(taken)

    def refusal(self, differing: str, path: Path | None = None) -> ValueError:
        return ValueError(
            f"{self._caller}: `log` must be new or of the same evaluation, but {path or self._path} has other "
            f"{differing}. Name another file, or remove this one."
        )

    def parts(self) -> list[list[int]]:
        """The batches of the images that stand."""
        log, size = self.log, self.log["batch_size"]
        pairs = enumerate(zip(log["natural_correct"], log["fell_to"], strict=True))
        standing = [index for index, (correct, fell_to) in pairs if correct and fell_to is None]
        return [standing[start : start + size] for start in range(0, len(standing), size)]

    def begin(self, attack: str, parts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The line of the progress for an attack on these batches."""
        self._standing, self._noted = sum(len(part) for part in parts), dict[int, Batch]()
        self._warnings = self.log["warnings"]
        self._entry: dict[str, Any] = {
            "attack": attack,
            "standing": self._standing,
            "seconds": 0.0,
            "batches": len(parts),
            "batches_done": 0,
            "keys": [None] * len(parts),
        }
        self.log["progress"].append(self._entry)
        return self._entry

    def note(self, number: int, key: str, batch: Batch) -> None:
        """Notes what became of a batch of the attack."""
        self._noted[number] = batch
        done = [self._noted[number] for number in sorted(self._noted)]
        self._entry["keys"][number] = key
        self._entry["batches_done"] = len(done)
        self._entry["standing"] = self._standing - sum(len(one.fell) for one in done)
        self._entry["seconds"] = sum(one.seconds for one in done)
        self.log["warnings"] = each_kind_once([*self._warnings, *(text for one in done for text in one.warnings)])
        for index, image, prediction in zip(batch.fell, batch.image, batch.prediction, strict=True):
            self.adversarial[index] = image
            self.log["predictions"][index] = prediction
            self.log["fell_to"][index] = self._entry["attack"]

    def finish(self) -> None:
        """All attacks have ended: AutoAttack checks what Square has found."""
        said = square_warnings(autoattack_accuracies(self.log))
        self.log["warnings"] = each_kind_once([*self.log["warnings"], *said])
        self.log["finished"] = True

    def save(self) -> None:
        self._count()
        if self._path is not None and self._writer:
            write_log(self.log, self._path)

    def _count(self) -> None:
        log = self.log
        correct = log["natural_correct"]
        log["unreliable"] = is_unreliable(log)
        log["natural_accuracy"] = None if correct is None else percent(correct)
        if log["fell_to"] is None:
            accuracies = [entry["accuracy"] for entry in log["corruptions"]]
            log["robust"] = None
            log["robust_accuracy"] = float(np.mean(accuracies)) if accuracies else None
        else:
            log["robust"] = [int(ok and name is None) for ok, name in zip(correct, log["fell_to"], strict=True)]
            log["robust_accuracy"] = percent(log["robust"])


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In what two logs are of different evaluations."""
    found = [
        f"{key} {json.dumps(old.get(key))} instead of {json.dumps(new.get(key))}"
        for key in _SETTINGS
        if old.get(key) != new.get(key)
    ]
    found += [
        f"version of {name} {old['versions'].get(name)} instead of {new['versions'].get(name)}"
        for name in RESULTS_VERSIONS
        if old["versions"].get(name) != new["versions"].get(name)
    ]
    if old["weights_sha256"] != new["weights_sha256"]:
        found.append("weights")
    if (old["data"] or {}).get("sha256") != (new["data"] or {}).get("sha256"):
        found.append("data")
    return found
