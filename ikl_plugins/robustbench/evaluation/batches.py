"""Batch files: what became of each batch of each attack, so that any process can go on from what others have done.

Random numbers are those of a batch: each begins from the seed, and what is drawn then depends on its images alone. So a
batch can be computed by any process at any time. Its file is named by a key, a digest of everything that its content
follows from, and is read only where that key is wanted. No file is ever changed or removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..._archives import opened_npz
from ..._files import written_aside

__all__ = ["RESULTS_VERSIONS", "Batch", "Batches", "Natural", "batch_path", "each_kind_once", "image_digests"]
__all__ += ["natural", "natural_facts", "natural_path", "read_batch", "read_natural"]

# What the content of every batch follows from; keys of the log.
_FACTS = (
    "weights_sha256",
    "dtype",
    "precision",
    "device",
    "autoattack",
    "seed",
    "threat_model",
    "eps_value",
    "version",
    "n_target_classes",
    "parameters",
    "own_attacks",
    "surrogate",
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
T = TypeVar("T")
RESULTS_VERSIONS = ("torch", "robustbench")


@dataclass(frozen=True, eq=False)
class Batch:
    """What became of one batch.

    Attributes:
        index: of all images that were attacked.
        fell: of those that fell.
        image: their adversarial images, (fell, C, H, W).
        prediction: what the model takes these for.
        seconds: that it took.
        warnings: of AutoAttack.
    """

    index: list[int]
    fell: list[int]
    image: Tensor
    prediction: list[int]
    seconds: float
    warnings: list[str]


@dataclass(frozen=True, eq=False)
class Natural:
    """What an evaluation begins from.

    Attributes:
        predictions: on the natural images, (N,).
        digests: for each image one of the pixels, labels and predictions of all images up to it.
        warnings: of AutoAttack's checks.
        facts: what the evaluation follows from.
    """

    predictions: Tensor
    digests: list[str]
    warnings: list[str]
    facts: dict[str, Any]

    def write(self, path: Path) -> None:
        """Writes the file, unless another process was faster."""
        with written_aside(path, first=True) as aside:
            np.savez(
                aside,
                facts=json.dumps(self.facts),
                predictions=self.predictions.numpy(),
                digests=np.array(self.digests),
                warnings=np.array(self.warnings, dtype=str),
            )


class Batches:
    """The batch files of one evaluation.

    Args:
        caller: whom a refusal names.
        folder: where they lie; None keeps nothing.
        log: of the evaluation.
        digests: of its images, see :class:`Natural`.
    """

    def __init__(self, caller: str, folder: Path | None, log: Mapping[str, Any], digests: Sequence[str]) -> None:
        self._caller = caller
        self._folder = folder
        self._facts = _facts(log)
        self._attacks: list[str] = log["attacks"]
        self._digests = digests

    def key(self, attack: str, index: Sequence[int]) -> str:
        """Of a batch of these images. Earlier attacks are in it, as fab-t leaves fab with other restarts."""
        until = self._attacks[: self._attacks.index(attack) + 1]
        return _digest(self._facts, until, list(index), self._digests[index[-1]])

    def path(self, attack: str, number: int, index: Sequence[int]) -> Path | None:
        if self._folder is None:
            return None
        return batch_path(self._folder, self._attacks.index(attack), attack, number, self.key(attack, index))

    def read(self, attack: str, number: int, index: Sequence[int]) -> Batch | None:
        """What a file says of a batch; None where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(attack, number, index)
        if path is None or not path.exists():
            return None
        return read_batch(self._caller, path, self.key(attack, index), index)

    def write(self, attack: str, number: int, batch: Batch) -> None:
        path = self.path(attack, number, batch.index)
        if path is not None:
            content = {**vars(batch), "image": batch.image.numpy(), "warnings": np.array(batch.warnings, dtype=str)}
            with written_aside(path) as aside:
                np.savez(aside, key=self.key(attack, batch.index), **content)


def batch_path(folder: Path, place: int, attack: str, number: int, key: str | None) -> Path:
    """The file of a batch of the attack at this place in the order of attacks."""
    name = re.sub(r"[^\w.-]", "_", attack)  # of an attack of others, as 'module:callable'
    return folder / f"{place}-{name}-{number:05d}-{key}.npz"


def read_batch(caller: str, path: Path, key: str, index: Sequence[int]) -> Batch:
    """Reads a batch file.

    Raises:
        ValueError: it is damaged, or of another key or other images.
    """

    def content(part: Mapping[str, Any]) -> Batch:
        kinds = {"index": "i", "fell": "i", "prediction": "i", "warnings": "U"}
        lists = {name: _list(part, name, kind) for name, kind in kinds.items()}
        images, seconds = part["image"], part["seconds"]
        _fits("image", images.ndim > 1 and images.dtype == np.float32)
        _fits("seconds", seconds.shape == () and seconds.dtype.kind == "f" and 0 <= seconds < math.inf)
        batch = Batch(image=torch.from_numpy(images), seconds=seconds.item(), **lists)
        _fits("key", part["key"].shape == () and part["key"].item() == key)
        _fits("index", batch.index == [*index])
        _fits("fell", batch.fell == [at for at in index if at in {*batch.fell}])
        _fits("parts", len(batch.fell) == len(batch.image) == len(batch.prediction))
        return batch

    return _read(caller, path, content)


def each_kind_once(warnings: Iterable[str]) -> list[str]:
    """Of each kind, whose warnings differ in their numbers alone, the one with the largest, in order of the first."""
    kinds: dict[str, str] = {}
    for text in warnings:
        kind = _NUMBER.sub("", text)
        kinds[kind] = max(kinds.get(kind, text), text, key=_first_number)
    return list(kinds.values())


def _first_number(text: str) -> float:
    found = _NUMBER.search(text)
    return float(found[0]) if found else 0.0


def _facts(log: Mapping[str, Any]) -> dict[str, Any]:
    """What every batch of an evaluation follows from, beside its images."""
    versions = {name: log["versions"].get(name) for name in RESULTS_VERSIONS}
    return {**{name: log.get(name) for name in _FACTS}, **{f"version of {name}": versions[name] for name in versions}}


def natural(
    caller: str,
    folder: Path | None,
    log: Mapping[str, Any],
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    checks: Callable[[], list[str]],
) -> tuple[Natural, Path | None]:
    """What the evaluation begins from, as the first of its processes has found it, and the file that says so.

    Args:
        caller: whom a refusal names.
        folder: where the file lies; None keeps nothing.
        log: of the evaluation.
        images: pixels in [0, 1], (N, C, H, W).
        labels: class indices (N,).
        predictions: of this process (N,).
        checks: runs AutoAttack's checks and gives its warnings; called where no process has.
    """
    path = None if folder is None else natural_path(folder, log)
    if path is not None and path.exists():
        found = read_natural(caller, path)
        if found.digests != image_digests(images, labels, found.predictions):
            raise ValueError(f"{caller}: {path} must be of these images, but is damaged. Remove it, evaluate again.")
        return found, path
    found = Natural(predictions, image_digests(images, labels, predictions), checks(), natural_facts(log))
    if path is None:
        return found, None
    found.write(path)
    return natural(caller, folder, log, images, labels, predictions, checks)  # that of another process may be there


def natural_facts(log: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation follows from."""
    return {**_facts(log), "attacks": log["attacks"], "n_examples": log["n_examples"], "data": log["data"]["sha256"]}


def natural_path(folder: Path, log: Mapping[str, Any]) -> Path:
    """The file of :func:`natural`."""
    return folder / f"natural-{_digest(natural_facts(log))}.npz"


def read_natural(caller: str, path: Path) -> Natural:
    """Reads a file of :func:`natural`.

    Raises:
        ValueError: it is damaged.
    """

    def content(part: Mapping[str, Any]) -> Natural:
        found = json.loads(part["facts"].item())
        _fits("facts", isinstance(found, dict) and path.name == f"natural-{_digest(found)}.npz")
        lists = {name: _list(part, name, "U") for name in ("digests", "warnings")}
        predictions = _list(part, "predictions", "i")
        _fits("digests", len(predictions) == len(lists["digests"]) == found["n_examples"])
        return Natural(predictions=torch.tensor(predictions), facts=found, **lists)

    return _read(caller, path, content)


def _list(part: Mapping[str, Any], name: str, kind: str) -> list[Any]:
    """A row of numbers or texts; an empty one may be of any kind."""
    found = part[name]
    _fits(name, found.ndim == 1 and (found.dtype.kind == kind or not len(found)))
    values: list[Any] = found.tolist()
    return values


def _fits(name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"its {name} do not fit")


def _read(caller: str, path: Path, content: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        with opened_npz(caller, path) as file:
            return content(file)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise ValueError(
            f"{caller}: {path} must be the file of a batch, but is damaged ({error}). Remove it, evaluate again."
        ) from error


def image_digests(images: Tensor, labels: Tensor, predictions: Tensor) -> list[str]:
    """For each image one of the pixels, labels and predictions of all images up to it."""
    chain = hashlib.sha256(f"{tuple(images.shape[1:])}".encode())
    found = []
    for image, label, prediction in zip(images, labels.tolist(), predictions.tolist(), strict=True):
        chain.update(image.numpy().tobytes())
        chain.update(f" {label} {prediction}\n".encode())
        found.append(chain.hexdigest()[:16])
    return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
