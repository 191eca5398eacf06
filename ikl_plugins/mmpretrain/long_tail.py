"""Accuracy on classes with many, some and few training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from mmengine.evaluator import BaseMetric
from mmpretrain.registry import DATASETS

from .. import _validation as check
from .._limits import read_text

__all__ = ["ManyMediumFew"]

_CALLER = "ManyMediumFew"


class ManyMediumFew(BaseMetric):  # type: ignore[misc]
    """Class-balanced accuracy of all classes and of those with many, some and few training images, in percent.

    The accuracy of a group is the mean over its classes of the share of their images that is recognised, so that a
    class counts the same whatever number of test images it has. A class is of the group

    - ``many`` with more than ``many`` training images,
    - ``few`` with fewer than ``few``,
    - ``medium`` otherwise.

    Args:
        train_counts: how many training images each class has, a list by class index; or the path of the list file of
            the training images, with lines "path label". Either this or ``train_dataset``.
        train_dataset: config of the training data set, which is asked for its labels.
        many: the bound above which a class is of the group ``many``.
        few: the bound below which a class is of the group ``few``.
        **kwargs: ``collect_device``, ``prefix`` and ``collect_dir`` of MMEngine's metrics.

    Raises:
        TypeError: counts that are none.
        ValueError: no counts, or both kinds; a line of the file that is not "path label"; bounds that are not in order;
            in evaluation a label that the counts do not have.

    Note:
        The results are ``long_tail/all``, ``long_tail/many``, ``long_tail/medium`` and ``long_tail/few``. A class
        without test images takes no part, and a group without such a class is left out.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, for the groups.

    Example:
        In a config::

            val_evaluator = [
                dict(type='Accuracy', topk=(1,)),
                dict(type='ManyMediumFew', train_counts='data/imagenet/ImageNet_LT_train.txt')]
    """

    default_prefix = "long_tail"

    def __init__(
        self,
        train_counts: Sequence[int] | str | Path | None = None,
        *,
        train_dataset: Mapping[str, Any] | None = None,
        many: int = 100,
        few: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (train_counts is None) == (train_dataset is None):
            raise ValueError(
                f"{_CALLER}: one of `train_counts` and `train_dataset` must be given, got "
                f"{'neither' if train_counts is None else 'both'}. Write train_counts='ImageNet_LT_train.txt'."
            )
        check.check_number(_CALLER, "few", few)
        if check.check_number(_CALLER, "many", many) < few - 1:
            raise ValueError(f"{_CALLER}: `many` must be at least `few` - 1, got {many} and {few}. Use 100 and 20.")
        self.many = many
        self.few = few
        if train_dataset is not None:
            dataset = DATASETS.build(dict(train_dataset))
            self.train_counts = _tally(dataset.get_gt_labels(), len(dataset.metainfo.get("classes") or ()))
        elif isinstance(train_counts, (str, Path)):
            self.train_counts = _tally(_listed_labels(Path(train_counts).expanduser()))
        else:
            self.train_counts = _given(train_counts)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Collects one batch of predictions, with 'pred_score' or 'pred_label', and 'gt_label'."""
        for sample in data_samples:
            predicted = sample["pred_score"].argmax() if "pred_score" in sample else sample["pred_label"]
            self.results.append((int(predicted), int(sample["gt_label"])))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """'all', 'many', 'medium' and 'few' in percent, of the pairs (predicted class, class) of all ranks."""
        predicted, labels = numpy.array(results, dtype=numpy.int64).reshape(-1, 2).T
        counts = self.train_counts
        if labels.size and labels.max() >= len(counts):
            raise ValueError(
                f"{_CALLER}: `train_counts` must have every class of the test images, got {len(counts)} counts and "
                f"label {labels.max()}. Name another list file."
            )
        images = numpy.bincount(labels, minlength=len(counts))
        right = numpy.bincount(labels[predicted == labels], minlength=len(counts))
        groups = {
            "all": counts >= 0,
            "many": counts > self.many,
            "medium": (counts <= self.many) & (counts >= self.few),
            "few": (counts < self.few) & (counts <= self.many),
        }
        accuracies = {}
        for name, members in groups.items():
            tested = members & (images > 0)
            if tested.any():
                accuracies[name] = float(100 * (right[tested] / images[tested]).mean())
        return accuracies


def _tally(labels: Any, classes: int = 0) -> numpy.ndarray[Any, Any]:
    return numpy.bincount(numpy.asarray(labels, dtype=numpy.int64), minlength=classes)


def _listed_labels(path: Path) -> list[int]:
    if not path.is_file():
        raise ValueError(
            f"{_CALLER}: `train_counts` must be a list file, but there is none at {path} (seen from {Path.cwd()}). "
            f"Correct the path."
        )
    labels = []
    for number, line in enumerate(read_text(_CALLER, path).splitlines(), 1):
        _, _, label = line.rstrip().rpartition(" ")
        if not label.isdecimal():
            raise ValueError(
                f'{_CALLER}: `train_counts` must hold lines "path label", but line {number} of {path} is {line!r}. '
                f"Correct it."
            )
        labels.append(int(label))
    return labels


def _given(counts: Any) -> numpy.ndarray[Any, Any]:
    whole = isinstance(counts, (Sequence, numpy.ndarray)) and all(
        isinstance(count, (int, numpy.integer)) and count >= 0 for count in counts
    )
    if not whole or not len(counts):
        raise TypeError(
            f"{_CALLER}: `train_counts` must be a list of image counts or a path, got {counts!r}. "
            f"Write train_counts=[500, 480, ...]."
        )
    return numpy.array(counts, dtype=numpy.int64)
