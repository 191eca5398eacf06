"""Accuracy under common corruptions, from RobustBench's own loaders, with a log to go on from."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import _validation as check
from ..._archives import check_npy
from ..._progress import Shown, teller
from ..._robustbench_import import import_robustbench
from ..conditions import own_conditions, trainable_copy
from ..data import Images, check_pixels, content_sha256
from .attacks import random_state_kept
from .checks import check_class_order, check_data, check_model, check_seed, natural_predictions, warn_of_chance
from .evidence import mean_corruption_error
from .log import Evaluation, class_names, data_facts, identity
from .record import Record
from .run import Progress
from .shards import check_shard

__all__ = ["corruption_source", "evaluate_corruptions"]

_SEVERITIES = range(1, 6)

_robustbench = import_robustbench()


@own_conditions()
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
    progress: bool | Callable[[Progress], None] | None = True,
) -> Evaluation:
    """Accuracy under common corruptions (Hendrycks and Dietterich, ICLR 2019), read by RobustBench's own loaders.

    Args:
        model: this, ``checkpoint`` and ``model_name`` as in :func:`~ikl_plugins.robustbench.evaluation.evaluate`.
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
        checkpoint: see ``model``.
        model_name: see ``model``.
        progress: True for a bar on a terminal and lines elsewhere, on standard error; False for neither; or a function
            that is called after every severity of a corruption.

    Returns:
        The evaluation. Its log has in ``corruptions`` the accuracy of each corruption and severity, their mean in
        ``robust_accuracy``, and in ``corruptions_mce`` the mean corruption error in percent, None if there is no row
        'AlexNet' (``corruptions_mce_note`` says so).

    Raises:
        TypeError: as :func:`~ikl_plugins.robustbench.evaluation.evaluate`.
        ValueError: an unknown data set or threat model, missing files, too few images, or as there.
    """
    caller = "evaluate_corruptions"
    shown = Shown("severities")

    def show(made: Progress) -> None:
        note = f"{made.attack}, {made.standing} of {made.n_examples} right"
        shown("corruptions", made.batch, made.batches, note)

    tell = teller(caller, progress, show)
    source = corruption_source(caller, dataset, threat_model, Path(data_dir))
    check_model(caller, model, "standard")
    n_examples = (5000 if dataset == "imagenet" else 10000) if n_examples is None else n_examples
    check.check_integer(caller, "n_examples", n_examples)
    check.check_integer(caller, "batch_size", batch_size)
    check_seed(caller, seed)
    device = torch.device(device)
    model = trainable_copy(caller, model).to(device)
    pairs = [(corruption, severity) for corruption in source.corruptions for severity in _SEVERITIES]
    source.check_files(offline)

    check_class_order(caller, model, natural)
    natural_log: dict[str, Any] = {"labels": None, "natural_predictions": None, "natural_correct": None}
    path = None if log is None else Path(log)
    with check_shard(caller, None, None, log, progress).alone(path), random_state_kept(device), torch.no_grad():
        torch.manual_seed(seed)
        classes = None
        if natural is not None:
            predictions, classes = natural_predictions(
                caller, model, *check_data(caller, natural.images, natural.labels), batch_size, device
            )
            natural_log = {
                "labels": natural.labels.tolist(),
                "natural_predictions": predictions.tolist(),
                "natural_correct": predictions.eq(natural.labels).int().tolist(),
            }
        fresh = {
            **identity(model, model_name, checkpoint, device),
            "seed": seed,
            "threat_model": threat_model,
            "dataset": dataset,
            "eps": None,
            "eps_value": None,
            "version": None,
            "standard": False,
            "attacks": [],
            "parameters": {},
            "precision": "float32",
            "autoattack": None,
            "dropped": [],
            "n_target_classes": None,
            "n_classes": classes,
            "n_examples": n_examples,
            "batch_size": batch_size,
            "data": None if natural is None else data_facts(natural, natural.images, natural.labels),
            "classes": class_names(natural, classes),
            **natural_log,
            "predictions": None,
            "fell_to": None,
            "progress": [],
            "warnings": [],
            "unreliable": False,
            "corruptions": [],
            "corruptions_mce": None,
            "corruptions_mce_baseline": None,
            "corruptions_mce_note": None,
        }
        record = Record(caller, fresh, path)
        if natural is not None and classes is not None:
            warn_of_chance(caller, predictions, natural.labels, classes)
        done = record.log["corruptions"]
        for number, (corruption, severity) in enumerate(pairs):
            if 0 < number < len(done):
                continue
            started = time.perf_counter()
            images, labels = source.load(corruption, severity, n_examples)
            digest = content_sha256(images, labels)
            if number < len(done):  # the first one stands for the data of an interrupted run
                if done[number]["sha256"] != digest:
                    raise record.refusal(f"data ({corruption}, severity {severity})")
                continue
            accuracy = source.accuracy(model, images, labels, batch_size, device, seed)
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
            name, correct = f"{corruption}/{severity}", round(accuracy * len(images))
            tell(Progress(name, number + 1, len(pairs), correct, len(images), done[-1]["seconds"]))
        errors, note = _baseline_errors(dataset, threat_model, baseline)
        mce = None if errors is None else mean_corruption_error(done, errors)
        said = {"corruptions_mce": mce, "corruptions_mce_baseline": errors, "corruptions_mce_note": note}
        record.log.update(said, finished=True)
        record.save()
    return Evaluation(record.log)


@dataclass(frozen=True)
class _Source:
    """The corrupted images of a data set, as RobustBench finds and reads them."""

    caller: str
    dataset: Any  # RobustBench's enumeration, as the next
    threat_model: Any
    corruptions: tuple[str, ...]
    data_dir: Path

    def check_files(self, offline: bool) -> None:
        """Refuses a folder that lacks one of the files, unless the loader fetches them all."""
        root = self.data_dir / _robustbench.data.CORRUPTIONS_DIR_NAMES[self.dataset][self.threat_model]
        name = self.dataset.value
        if name == "imagenet":
            wanted = [root / corruption / str(severity) for corruption in self.corruptions for severity in _SEVERITIES]
        elif not root.exists() and not offline:
            return
        else:
            wanted = [root / "labels.npy", *(root / f"{corruption}.npy" for corruption in self.corruptions)]
        missing = [str(path) for path in wanted if not path.exists()]
        if missing:
            link = _robustbench.data.ZENODO_CORRUPTIONS_LINKS.get(self.dataset)
            source = f" ({', '.join(link[1])} of https://zenodo.org/records/{link[0]})" if link else ""
            raise ValueError(
                f"{self.caller}: the corrupted images of {name} must lie in {root}, but "
                f"{check.first_names(missing)} missing. Unpack them there{source}."
            )
        for path in wanted:
            if path.suffix == ".npy":
                check_npy(self.caller, path)

    def load(self, corruption: str, severity: int, n_examples: int) -> tuple[Tensor, Tensor]:
        """The first images of one corruption and severity, and their labels."""
        loader = _robustbench.data.CORRUPTION_DATASET_LOADERS[self.dataset][self.threat_model]
        geometry = _robustbench.data.PREPROCESSINGS["Res224"]  # what RobustBench gives corrupted images of ImageNet
        # By position: RobustBench calls its CIFAR loaders with a keyword that they do not have.
        images, labels = loader(n_examples, severity, str(self.data_dir), False, [corruption], geometry)
        if len(images) != n_examples:
            raise ValueError(
                f"{self.caller}: `n_examples` must be at most {len(images)}, the images of "
                f"{corruption}/{severity}, got {n_examples}."
            )
        check_pixels(self.caller, images)
        return images, labels

    @staticmethod
    def accuracy(
        model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, device: torch.device, seed: int
    ) -> float:
        """RobustBench's, from 0 to 1."""
        torch.manual_seed(seed)
        found: float = _robustbench.utils.clean_accuracy(model, images, labels, batch_size=batch_size, device=device)
        return found


def corruption_source(caller: str, dataset: str, threat_model: str, data_dir: Path) -> _Source:
    """The corrupted images of a data set, in a folder; unknown names are refused."""
    kinds = {kind.value: kind for kind in _robustbench.data.CORRUPTIONS_DICT}
    if dataset not in kinds:
        raise ValueError(check.unknown_name_message(caller, "data set", dataset, kinds))
    kind = kinds[dataset]
    threats = {threat.value: threat for threat in _robustbench.data.CORRUPTIONS_DICT[kind]}
    if threat_model not in threats:
        raise ValueError(check.unknown_name_message(caller, f"threat model of {dataset}", threat_model, threats))
    threat = threats[threat_model]
    return _Source(caller, kind, threat, tuple(_robustbench.data.CORRUPTIONS_DICT[kind][threat]), data_dir)


def _baseline_errors(
    dataset: str, threat_model: str, baseline: str | Path | None
) -> tuple[dict[str, float] | None, str | None]:
    """AlexNet's mean error by corruption, from 0 to 1; or None, and why."""
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
    corruptions = dict.fromkeys(corruption for corruption, _ in alexnet)
    return {
        corruption: float(np.mean([1 - alexnet[corruption, severity] for severity in _SEVERITIES]))
        for corruption in corruptions
    }, None
