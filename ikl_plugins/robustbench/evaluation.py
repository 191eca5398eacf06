"""AutoAttack with a log: per-image results, written after every batch, from which an interrupted run goes on.

The attacks, their parameters and their order are AutoAttack's (Croce and Hein, ICML 2020), and so is what they find:
with one seed, the images that fell and the adversarial images equal those of one run of it.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import itertools
import json
import logging
import math
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from .. import _validation as check
from .._files import written_aside
from .._robustbench_import import import_robustbench
from .data import Images, check_pixels, content_sha256, file_sha256
from .eps import Eps, parse_eps

__all__ = [
    "ATTACKS",
    "VERSIONS",
    "Evaluation",
    "Progress",
    "curve",
    "evaluate",
    "evaluate_corruptions",
    "weights_sha256",
]

ATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
VERSIONS = ("standard", "plus", "rand")
FORMAT = "ikl_plugins.robustbench.evaluation/1"
_NORMS = ("Linf", "L2")
_SEVERITIES = range(1, 6)
_LEAST_CLASSES = {"apgd-dlr": 4, "apgd-t": 4}  # the margin is divided by the distance to the third or fourth logit
# Of the predictions on the natural images, which a GPU may give otherwise from run to run.
_MAY_DIFFER = 0.01
# What must be the same when a run goes on; the keys of the log.
_SETTINGS = (
    "threat_model", "dataset", "eps_value", "version", "attacks", "n_target_classes", "n_examples", "batch_size",
    "seed", "device",
)  # fmt: skip
_RESULTS_VERSIONS = ("torch", "robustbench", "autoattack", "pyautoattack")

_robustbench = import_robustbench()


@dataclass(frozen=True)
class Progress:
    """What an evaluation says after each batch.

    Attributes:
        attack: name of the attack, or corruption and severity.
        batch: number of the batch, from 1.
        batches: of this attack.
        standing: images that are classified right and have fallen to no attack yet.
        n_examples: images in all.
        seconds: that this attack has taken.
    """

    attack: str
    batch: int
    batches: int
    standing: int
    n_examples: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        log: everything there is to say, as JSON has it.
        adversarial: the adversarial image of each image that fell, by its index; None if it was not kept.
    """

    log: dict[str, Any]
    adversarial: Mapping[int, Tensor] | None = field(default=None, repr=False)

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
        """What AutoAttack returns.

        Args:
            images: those that were evaluated, shape (N, C, H, W).

        Returns:
            A copy in which the images that fell are their adversarial ones.

        Raises:
            ValueError: the adversarial images were not kept.
        """
        if self.adversarial is None:
            raise ValueError(
                "Evaluation.adversarial_images: the adversarial images must be beside the log, but were not kept. "
                "Evaluate again."
            )
        found = images.clone()
        for index, image in self.adversarial.items():
            found[index] = image
        return found

    def save(self, path: str | Path) -> None:
        """Writes the log as JSON; a file that cannot be written whole is left as it was.

        Args:
            path: of the file.
        """
        _write_log(self.log, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Reads a log, and the adversarial images if they lie beside it.

        Args:
            path: of the file.

        Raises:
            ValueError: the file is missing or damaged, is no such log, or lacks some of its adversarial images.
        """
        path = Path(path)
        log = _read_log("Evaluation.load", path)
        folder = _folder(path)
        there = log["adversarial"] and (folder.is_dir() or not any(log["fell_to"]))
        return cls(log, _read_adversarial(log, folder) if there else None)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: str | float | Eps,
    norm: str = "Linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
    log: str | Path | None = None,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    data: str | Images | None = None,
    model_name: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Runs AutoAttack.

    With fewer than 10 classes the targeted attacks take all other classes as targets; with fewer than 4 the attacks on
    the difference of logits ratio cannot be computed and are left out, and the result is not standard AutoAttack.

    Args:
        model: classifier of images in [0, 1] in eval mode, giving logits (N, C); it is moved to ``device``.
        images: pixels in [0, 1], shape (N, C, H, W).
        labels: class indices (N,).
        eps: radius; for L-infinity of pixels in [0, 1], as '8/255'.
        norm: 'Linf' or 'L2'.
        version: 'standard', 'plus' or, for models that draw random numbers, 'rand'.
        attacks: names of some of the attacks, which run with the parameters of AutoAttack's version 'custom' in the
            order given. Not beside another ``version`` than 'standard'.
        batch_size: images per batch. The images of a batch share random numbers, so that it is part of the result.
        device: where to compute.
        seed: of every attack, and of what the model itself draws. Random numbers of the caller are not touched.
        log: a JSON file, written after every batch. If it is there, the evaluation goes on where it stopped.
        checkpoint: path of the file that the weights are from, or a mapping with its 'name' and 'sha256'; for the log.
        data: name of the data, or the :class:`~ikl_plugins.robustbench.data.Images` they are from; for the log.
        model_name: for the log; None for the name of its class.
        progress: called after every batch.

    Returns:
        The evaluation. Its log says in ``fell_to`` for each image which attack it fell to.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown norm, version or attack; a model in training mode, or that gives something else than
            finite logits of at least two classes; pixels outside [0, 1]; labels the model has no logit for; a log of
            another evaluation (the message says what differs) or without its adversarial images.

    Warns:
        UserWarning: an L-infinity radius that is nearly a number of grey levels.
    """
    caller = "evaluate"
    eps = _check_threat(caller, norm, eps)
    version, chosen = _check_version(caller, version, attacks)
    _check_model(caller, model, version)
    images, labels = _check_data(caller, images, labels)
    _check_count(caller, "batch_size", batch_size)
    _check_seed(caller, seed)
    device = torch.device(device)
    model = model.to(device)

    with _quiet(device) as warned, torch.no_grad():
        torch.manual_seed(seed)
        predictions, classes = _natural_predictions(caller, model, images, labels, batch_size, device)
        adversary = _adversary(model, norm, eps, version, chosen, seed, device)
        run, dropped = _attacks(caller, chosen or adversary.attacks_to_run, classes)
        for targeted in (adversary.apgd_targeted, adversary.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)

        fresh = {
            **_identity(model, model_name, checkpoint, device),
            "seed": seed,
            "threat_model": norm,
            "dataset": None,
            "eps": eps.text,
            "eps_value": float(eps),
            "version": version,
            "standard": version == "standard" and not dropped,
            "attacks": run,
            "dropped": dropped,
            "n_target_classes": adversary.fab.n_target_classes if {"apgd-t", "fab-t"} & set(run) else None,
            "n_classes": classes,
            "n_examples": len(images),
            "batch_size": batch_size,
            "data": _data_facts(data, images, labels),
            "classes": _class_names(data, classes),
            "labels": labels.tolist(),
            "natural_predictions": predictions.tolist(),
            "predictions": predictions.tolist(),
            "natural_correct": predictions.eq(labels).int().tolist(),
            "fell_to": [None] * len(images),
            "progress": [],
            "warnings": [],
        }
        record = _Record(caller, fresh, None if log is None else Path(log))
        warned.extend(record.log["warnings"])
        if not record.log["progress"]:
            # AutoAttack's own checks of the model, and no attack.
            adversary.attacks_to_run = []
            tracer = sys.gettrace()  # its check for dynamic defences takes the place of a debugger's
            try:
                adversary.run_standard_evaluation(images[:batch_size], labels[:batch_size], bs=batch_size)
            finally:
                sys.settrace(tracer)
        record.log["warnings"] = warned
        record.save()
        for attack in run:
            # Also of an attack that has run already: some of its settings stay.
            perturb = _prepared(adversary, attack)
            _run_attack(record, attack, perturb, adversary.get_logits, images, labels, device, progress)
        record.log["finished"] = True
        record.save()
    return Evaluation(record.log, record.adversarial)


def curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[str | float | Eps],
    *,
    norm: str = "Linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    folder: str | Path | None = None,
    progress: Callable[[Eps, Progress], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Robust accuracy against eps.

    Each radius is attacked on the images that stand at the smaller ones: an adversarial image of a small ball lies in
    the larger ones too, so that the curve never rises.

    Args:
        model: see :func:`evaluate`.
        images: see :func:`evaluate`.
        labels: see :func:`evaluate`.
        radii: in any order; each once.
        norm: see :func:`evaluate`.
        version: see :func:`evaluate`.
        attacks: see :func:`evaluate`. Some attacks alone give a quicker, looser curve.
        folder: for a log per radius, from which an interrupted curve goes on.
        progress: called after every batch with the radius and the progress on the images that stood before it.
        **options: ``batch_size``, ``device``, ``seed``, ``checkpoint``, ``data`` and ``model_name`` of
            :func:`evaluate`.

    Returns:
        By rising radius, mappings of 'eps', 'eps_value', 'robust_accuracy' (percent), 'robust' (per image 0 or 1) and
        'attacks'.

    Raises:
        TypeError: as :func:`evaluate`, or no sequence of radii.
        ValueError: as :func:`evaluate`; no radius, or one that comes twice.
    """
    caller = "curve"
    if isinstance(radii, (str, bytes)) or not isinstance(radii, Sequence):
        raise TypeError(f"{caller}: `radii` must be a sequence of radii, got {radii!r}. Write ['2/255', '4/255'].")
    parsed = sorted((_check_threat(caller, norm, radius) for radius in radii), key=float)
    if not parsed:
        raise ValueError(f"{caller}: `radii` must hold at least one radius, got none. Write ['2/255', '4/255'].")
    for smaller, larger in itertools.pairwise(parsed):
        if float(smaller) == float(larger):
            raise ValueError(f"{caller}: `radii` must be different, but {smaller} and {larger} are one. Name it once.")
    images, labels = _check_data(caller, images, labels)
    standing = torch.arange(len(images))
    points = []
    for eps in parsed:
        run: list[str] = []
        if len(standing):
            result = evaluate(
                model,
                images[standing],
                labels[standing],
                eps=eps,
                norm=norm,
                version=version,
                attacks=attacks,
                log=None if folder is None else Path(folder) / f"eps_{eps.text.replace('/', '-')}.json",
                progress=None if progress is None else lambda made, eps=eps: progress(eps, made),  # type: ignore[misc]
                **options,
            )
            standing = standing[torch.tensor(result.log["robust"], dtype=torch.bool)]
            run = result.log["attacks"]
        robust = torch.zeros(len(images), dtype=torch.int64).index_fill(0, standing, 1).tolist()
        points.append(
            {
                "eps": eps.text,
                "eps_value": float(eps),
                "robust_accuracy": _percent(robust),
                "robust": robust,
                "attacks": run,
            }
        )
    return points


def evaluate_corruptions(
    model: nn.Module,
    dataset: str,
    *,
    data_dir: str | Path = "data",
    n_examples: int | None = None,
    threat_model: str = "corruptions",
    natural: Images | None = None,
    baseline: str | Path | None = None,
    offline: bool = False,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
    log: str | Path | None = None,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    model_name: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Accuracy under common corruptions (Hendrycks and Dietterich, ICLR 2019), read by RobustBench's own loaders.

    Args:
        model: see :func:`evaluate`.
        dataset: 'cifar10', 'cifar100' or 'imagenet'.
        data_dir: the folder that has ``CIFAR-10-C``, ``CIFAR-100-C``, ``ImageNet-C`` or ``ImageNet-3DCC``.
        n_examples: images per corruption and severity, the first ones; None for 10,000, of ImageNet 5,000.
        threat_model: 'corruptions', or 'corruptions_3d' for ImageNet.
        natural: uncorrupted images, for the natural accuracy.
        baseline: a table as RobustBench writes it, with a row 'AlexNet', against which the mean corruption error is
            measured. None for RobustBench's own place, ``model_info/<dataset>/corruptions``.
        offline: never download.
        batch_size: images per batch.
        device: where to compute.
        seed: of what the model itself draws.
        log: a JSON file, written after every severity of a corruption, from which an interrupted evaluation goes on.
        checkpoint: see :func:`evaluate`.
        model_name: see :func:`evaluate`.
        progress: called after every severity of a corruption.

    Returns:
        The evaluation. Its log has in ``corruptions`` the accuracy of each corruption and severity, their mean in
        ``robust_accuracy``, and in ``corruptions_mce`` the mean corruption error in percent, None if there is no row
        'AlexNet' (``corruptions_mce_note`` says so).

    Raises:
        TypeError: as :func:`evaluate`.
        ValueError: an unknown data set or threat model, missing files, too few images, or as :func:`evaluate`.
    """
    caller = "evaluate_corruptions"
    corruptions = _check_corruptions(caller, dataset, threat_model)
    _check_model(caller, model, "standard")
    n_examples = (5000 if dataset == "imagenet" else 10000) if n_examples is None else n_examples
    _check_count(caller, "n_examples", n_examples)
    _check_count(caller, "batch_size", batch_size)
    _check_seed(caller, seed)
    device = torch.device(device)
    model = model.to(device)
    pairs = [(corruption, severity) for corruption in corruptions for severity in _SEVERITIES]
    _check_corruption_files(caller, dataset, threat_model, Path(data_dir), corruptions, offline)

    natural_log: dict[str, Any] = {"labels": None, "natural_predictions": None, "natural_correct": None}
    with _quiet(device), torch.no_grad():
        torch.manual_seed(seed)
        classes = None
        if natural is not None:
            predictions, classes = _natural_predictions(
                caller, model, *_check_data(caller, natural.images, natural.labels), batch_size, device
            )
            natural_log = {
                "labels": natural.labels.tolist(),
                "natural_predictions": predictions.tolist(),
                "natural_correct": predictions.eq(natural.labels).int().tolist(),
            }
        fresh = {
            **_identity(model, model_name, checkpoint, device),
            "seed": seed,
            "threat_model": threat_model,
            "dataset": dataset,
            "eps": None,
            "eps_value": None,
            "version": None,
            "standard": False,
            "attacks": [],
            "dropped": [],
            "n_target_classes": None,
            "n_classes": classes,
            "n_examples": n_examples,
            "batch_size": batch_size,
            "data": None if natural is None else _data_facts(natural, natural.images, natural.labels),
            "classes": _class_names(natural, classes),
            **natural_log,
            "predictions": None,
            "fell_to": None,
            "progress": [],
            "warnings": [],
            "corruptions": [],
            "corruptions_mce": None,
            "corruptions_mce_note": None,
        }
        record = _Record(caller, fresh, None if log is None else Path(log))
        done = record.log["corruptions"]
        for number, (corruption, severity) in enumerate(pairs):
            if 0 < number < len(done):
                continue
            started = time.perf_counter()
            images, labels = _load_corruption(
                caller, dataset, threat_model, Path(data_dir), corruption, severity, n_examples
            )
            digest = content_sha256(images, labels)
            if number < len(done):  # the first one stands for the data of an interrupted run
                if done[number]["sha256"] != digest:
                    raise record.refusal(f"data ({corruption}, severity {severity})")
                continue
            torch.manual_seed(seed)
            accuracy = _robustbench.utils.clean_accuracy(model, images, labels, batch_size=batch_size, device=device)
            done.append(
                {
                    "corruption": corruption,
                    "severity": severity,
                    "accuracy": 100 * accuracy,
                    "n_examples": len(images),
                    "sha256": digest,
                    "seconds": time.perf_counter() - started,
                }
            )
            record.save()
            if progress is not None:
                name = f"{corruption}/{severity}"
                correct = round(accuracy * len(images))
                progress(Progress(name, number + 1, len(pairs), correct, len(images), done[-1]["seconds"]))
    mce, note = _mean_corruption_error(dataset, threat_model, done, baseline)
    record.log.update(corruptions_mce=mce, corruptions_mce_note=note, finished=True)
    record.save()
    return Evaluation(record.log)


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """The checksum of a state dict: of its names, dtypes, shapes and values, in the order of the names.

    Args:
        weights: a network or a state dict.

    Returns:
        64 hexadecimal digits; the same for a network and its state dict, on any device.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- AutoAttack ------------------------------------------------------------------------------------------------------


def _adversary(
    model: nn.Module, norm: str, eps: Eps, version: str, chosen: Sequence[str] | None, seed: int, device: torch.device
) -> Any:
    named = {} if chosen is None else {"attacks_to_run": list(chosen)}
    return _robustbench.eval.AutoAttack(
        model, norm=norm, eps=float(eps), seed=seed, verbose=False, version=version, device=device, **named
    )


def _attacks(caller: str, wanted: Sequence[str], classes: int) -> tuple[list[str], list[dict[str, str]]]:
    """The attacks that can run with so many classes, and why the others cannot."""
    run, dropped = [], []
    for attack in wanted:
        least = _LEAST_CLASSES.get(attack, 2)
        if classes >= least:
            run.append(attack)
        else:
            dropped.append({"attack": attack, "reason": f"its loss needs {least} classes, and the model has {classes}"})
    if not run:
        raise ValueError(
            f"{caller}: of the attacks named at least one must work with {classes} classes, got "
            f"{', '.join(wanted)}. Add apgd-ce, fab-t or square."
        )
    return run, dropped


def _prepared(adversary: Any, attack: str) -> Callable[[Tensor, Tensor], Tensor]:
    """One attack of AutoAttack, set up as AutoAttack does it before each batch.

    Its own loop is not used, since it looks at the natural images anew in each call: a model that draws random numbers
    would get another chance to be wrong with every batch.
    """
    if attack in ("apgd-ce", "apgd-dlr"):
        found = adversary.apgd
        found.loss = attack.removeprefix("apgd-")
    elif attack == "apgd-t":
        found = adversary.apgd_targeted
    elif attack == "square":
        found = adversary.square
    else:
        found = adversary.fab
        found.targeted = attack == "fab-t"
        if found.targeted:
            found.n_restarts = 1

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        found.seed = adversary.get_seed()
        result: Tensor = found.perturb(images, labels)
        return result

    return perturb


def _run_attack(
    record: _Record,
    attack: str,
    perturb: Callable[[Tensor, Tensor], Tensor],
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Runs one attack on the images that stood when it began, batch by batch, skipping the batches already done."""
    log = record.log
    standing = [
        index
        for index, (correct, fell_to) in enumerate(zip(log["natural_correct"], log["fell_to"], strict=True))
        if correct and fell_to in (None, attack)
    ]
    size = log["batch_size"]
    batches = math.ceil(len(standing) / size)
    entry = record.entry(attack, batches, len(standing))
    for number in range(entry["batches_done"], batches):
        started = time.perf_counter()
        batch = torch.tensor(standing[number * size : (number + 1) * size])
        natural, true = images[batch].clone().to(device), labels[batch].clone().to(device)
        adversarial = perturb(natural, true)
        predictions = model(adversarial).max(dim=1)[1]
        fell = predictions.ne(true).cpu()
        record.fall(attack, number, batch[fell], adversarial[fell.to(device)].cpu(), predictions.cpu()[fell])
        entry["batches_done"] = number + 1
        entry["standing"] -= int(fell.sum())
        entry["seconds"] += time.perf_counter() - started
        record.save()
        if progress is not None:
            progress(Progress(attack, number + 1, batches, entry["standing"], len(images), entry["seconds"]))


def _natural_predictions(
    caller: str, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, device: torch.device
) -> tuple[Tensor, int]:
    """Predictions on natural images and the number of classes, after every rule on what a model gives."""
    found, classes = [], None
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device)
        logits = model(batch)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch):
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"{caller}: `model` must give logits of shape ({len(batch)}, C) for {len(batch)} images, got {what}. "
                f"Wrap it so that its forward returns the logits alone."
            )
        if not torch.isfinite(logits).all():
            raise ValueError(
                f"{caller}: `model` must give finite logits, got {int((~torch.isfinite(logits)).sum())} of "
                f"{logits.numel()} that are not, in the batch from image {start}. Check its weights."
            )
        classes = logits.shape[1]
        found.append(logits.max(dim=1)[1].cpu())
    if classes is None or classes < 2:
        raise ValueError(f"{caller}: `model` must have at least 2 classes, got {classes}. A single one cannot fall.")
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(
            f"{caller}: `labels` must lie in [0, {classes - 1}], as the model has {classes} classes, got values from "
            f"{low} to {high}. Take the data that the model was trained for."
        )
    return torch.cat(found), classes


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[list[str]]:
    """Keeps the caller's random numbers, and collects what AutoAttack warns of, each kind once."""
    warned: list[str] = []
    handler = _Collector(warned)
    logger = logging.getLogger("auto-attack")
    logger.addHandler(handler)
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    try:
        with torch.random.fork_rng(devices=[index] if device.type == "cuda" else []):
            yield warned
    finally:
        logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        kinds = {re.sub(r"[\d.]+", "", known) for known in self._messages}
        if re.sub(r"[\d.]+", "", message) not in kinds:
            self._messages.append(message)


# --- the log ---------------------------------------------------------------------------------------------------------


class _Record:
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
            f"{self._caller}: `log` must be a new file or that of the same evaluation, but {self._path} has other "
            f"{differing}. Name another file, or remove this one."
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
        log["natural_accuracy"] = None if correct is None else _percent(correct)
        if log["fell_to"] is None:
            accuracies = [entry["accuracy"] for entry in log["corruptions"]]
            log["robust"] = None
            log["robust_accuracy"] = float(np.mean(accuracies)) if accuracies else None
        else:
            log["robust"] = [int(ok and name is None) for ok, name in zip(correct, log["fell_to"], strict=True)]
            log["robust_accuracy"] = _percent(log["robust"])


def _percent(flags: Sequence[int]) -> float:
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
        raise ValueError(f"{caller}: the log must be a file, but there is none at {path}. Check the path.")
    try:
        log = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(
            f"{caller}: {path} must be a log of this package, but is damaged ({error}). Remove it."
        ) from error
    if not isinstance(log, dict) or log.get("format") != FORMAT:
        found = log.get("format") if isinstance(log, dict) else type(log).__name__
        raise ValueError(f"{caller}: {path} must be a log of the format {FORMAT}, got {found}. Name another file.")
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
                    indices, images = part["index"].tolist(), torch.from_numpy(part["image"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"Evaluation: {path} must hold adversarial images, but is damaged ({error}). Evaluate again."
                ) from error
            # A run that was killed between its images and its log leaves some that the log knows nothing of.
            found.update(
                {index: image for index, image in zip(indices, images, strict=True) if fell.get(index) == attack}
            )
    if len(found) != len(fell):
        raise ValueError(
            f"Evaluation: {folder} must hold the adversarial images of all {len(fell)} images that fell, but has "
            f"{len(found)}. Bring the folder back, or remove it and the log and evaluate again."
        )
    return dict(sorted(found.items()))


def _identity(
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
        "model": type(model).__name__ if name is None else name,
        "checkpoint": None if checkpoint is None else {key: checkpoint[key] for key in ("name", "sha256")},
        "weights_sha256": weights_sha256(model),
    }


def _data_facts(data: str | Images | None, images: Tensor, labels: Tensor) -> dict[str, Any]:
    return {
        "name": data.name if isinstance(data, Images) else data,
        "sha256": content_sha256(images, labels),
        "n_examples": len(images),
        "preprocessing": data.preprocessing if isinstance(data, Images) else None,
    }


def _class_names(data: str | Images | None, classes: int | None) -> list[str] | None:
    names = data.classes if isinstance(data, Images) else None
    return list(names) if names is not None and len(names) == classes else None


# --- corruptions -----------------------------------------------------------------------------------------------------


def _check_corruptions(caller: str, dataset: str, threat_model: str) -> tuple[str, ...]:
    """The names of the corruptions."""
    kinds = {kind.value: table for kind, table in _robustbench.data.CORRUPTIONS_DICT.items()}
    if dataset not in kinds:
        raise ValueError(check.unknown_name_message(caller, "data set", dataset, kinds))
    threats = {threat.value: names for threat, names in kinds[dataset].items()}
    if threat_model not in threats:
        raise ValueError(check.unknown_name_message(caller, f"threat model of {dataset}", threat_model, threats))
    return tuple(threats[threat_model])


def _check_corruption_files(
    caller: str, dataset: str, threat_model: str, data_dir: Path, corruptions: Sequence[str], offline: bool
) -> None:
    kind, threat = _robustbench.data.BenchmarkDataset(dataset), _robustbench.data.ThreatModel(threat_model)
    root = data_dir / _robustbench.data.CORRUPTIONS_DIR_NAMES[kind][threat]
    if dataset == "imagenet":
        wanted = [root / corruption / str(severity) for corruption in corruptions for severity in _SEVERITIES]
    else:
        if not root.exists() and not offline:
            return  # the loader fetches it
        wanted = [root / "labels.npy", *(root / f"{corruption}.npy" for corruption in corruptions)]
    missing = [path for path in wanted if not path.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        link = _robustbench.data.ZENODO_CORRUPTIONS_LINKS.get(kind)
        source = f" ({', '.join(link[1])} of https://zenodo.org/records/{link[0]})" if link else ""
        raise ValueError(
            f"{caller}: the corrupted images of {dataset} must lie in {root}, but {', '.join(map(str, missing[:3]))}"
            f"{more} missing. Unpack them there{source}, or name the folder above with data_dir."
        )


def _load_corruption(
    caller: str, dataset: str, threat_model: str, data_dir: Path, corruption: str, severity: int, n_examples: int
) -> tuple[Tensor, Tensor]:
    kind, threat = _robustbench.data.BenchmarkDataset(dataset), _robustbench.data.ThreatModel(threat_model)
    loader = _robustbench.data.CORRUPTION_DATASET_LOADERS[kind][threat]
    geometry = _robustbench.data.PREPROCESSINGS["Res224"]  # what RobustBench gives corrupted images of ImageNet
    # By position: RobustBench calls its CIFAR loaders with a keyword that they do not have.
    images, labels = loader(n_examples, severity, str(data_dir), False, [corruption], geometry)
    if len(images) != n_examples:
        raise ValueError(
            f"{caller}: `n_examples` must be at most {len(images)}, as many images as {corruption} has with severity "
            f"{severity}, got {n_examples}. Lower it."
        )
    check_pixels(caller, images)
    return images, labels


def _mean_corruption_error(
    dataset: str, threat_model: str, entries: Sequence[Mapping[str, Any]], baseline: str | Path | None
) -> tuple[float | None, str | None]:
    """In percent, as RobustBench measures it: error over AlexNet's mean error, averaged over the corruptions."""
    if baseline is None:
        name = "unaggregated_results_3d.csv" if threat_model.endswith("_3d") else "unaggregated_results.csv"
        baseline = Path("model_info", dataset, "corruptions", name)
    if not Path(baseline).is_file():
        return None, f"not computed: there is no {baseline} with the accuracies of AlexNet"
    with Path(baseline).open(newline="") as file:
        names, severities, *rows = csv.reader(file)
    row = next((row for row in rows if row[:1] == ["AlexNet"]), None)
    if row is None:
        return None, f"not computed: {baseline} has no row AlexNet"
    columns = zip(names[1:], severities[1:], row[1:], strict=True)
    alexnet = {(corruption, int(severity)): float(value) for corruption, severity, value in columns}
    ratios = []
    for corruption in dict.fromkeys(entry["corruption"] for entry in entries):
        own = [1 - entry["accuracy"] / 100 for entry in entries if entry["corruption"] == corruption]
        theirs = [1 - alexnet[corruption, severity] for severity in _SEVERITIES]
        ratios.append(np.mean(own) / np.mean(theirs))
    return 100 * float(np.mean(ratios)), None


# --- checks of what comes in -----------------------------------------------------------------------------------------


def _check_threat(caller: str, norm: str, eps: str | float | Eps) -> Eps:
    if norm not in _NORMS:
        raise ValueError(check.unknown_name_message(caller, "norm", norm, _NORMS))
    return parse_eps(caller, eps, norm=norm)


def _check_version(caller: str, version: str, attacks: Sequence[str] | None) -> tuple[str, list[str] | None]:
    if version not in VERSIONS:
        raise ValueError(check.unknown_name_message(caller, "version", version, VERSIONS))
    if attacks is None:
        return version, None
    if isinstance(attacks, str):
        raise TypeError(f"{caller}: `attacks` must be a sequence of names, got {attacks!r}. Write [{attacks!r}].")
    if version != "standard":
        raise ValueError(
            f"{caller}: `attacks` must be None with version={version!r}, which brings its own, got {list(attacks)}. "
            f"Leave out one of the two."
        )
    for attack in attacks:
        if attack not in ATTACKS:
            raise ValueError(check.unknown_name_message(caller, "attack", attack, ATTACKS))
    if not attacks or len(set(attacks)) != len(attacks):
        raise ValueError(
            f"{caller}: `attacks` must name at least one attack, and each once, got {list(attacks)}. "
            f"Known: {', '.join(ATTACKS)}."
        )
    return "custom", list(attacks)


def _check_model(caller: str, model: nn.Module, version: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}: `model` must be a torch.nn.Module, got {type(model).__name__}. Wrap a function in one."
        )
    if model.training:
        raise ValueError(f"{caller}: `model` must be in eval mode, but it is in training mode. Call `model.eval()`.")
    training = [name for name, module in model.named_modules() if module.training]
    if training and version != "rand":
        raise ValueError(
            f"{caller}: `model` must be in eval mode, but these parts are in training mode: "
            f"{', '.join(training[:4])}. Call `model.eval()`, or take version='rand' if they draw random numbers."
        )


def _check_data(caller: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        what = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"{caller}: `images` must be a floating tensor of shape (N, C, H, W), got {what}. Divide uint8 by 255."
        )
    check_pixels(caller, images)
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        what = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{caller}: `labels` must be a tensor of class indices, got {what}. Pass a long tensor (N,).")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{caller}: `labels` must have shape ({len(images)},), one per image, got {tuple(labels.shape)}. "
            f"Pass the labels of these images."
        )
    # AutoAttack takes views of gradients, which have the layout of the images.
    return images.detach().cpu().float().contiguous(), labels.detach().cpu().long()


def _check_count(caller: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: `{name}` must be an integer of at least 1, got {value!r}. Pass a number.")
    if value < 1:
        raise ValueError(f"{caller}: `{name}` must be an integer of at least 1, got {value}. Pass a larger one.")


def _check_seed(caller: str, seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{caller}: `seed` must be an integer, got {seed!r}. A run without one cannot be repeated.")
