"""The entry of a result as RobustBench keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.log import Evaluation
from ..leaderboard import board_eps
from ..submittable import same_eps

__all__ = ["model_info"]


def model_info(
    evaluation: Evaluation | Mapping[str, Any],
    *,
    architecture: str,
    dataset: str,
    title: str,
    link: str,
    authors: str | Sequence[str],
    venue: str,
    additional_data: bool,
    footnote: str | None = None,
    reported: float | None = None,
    number_forward_passes: int = 1,
    external: float | None = None,
) -> dict[str, Any]:
    """The entry of a result as RobustBench keeps it in ``model_info/<dataset>/<threat model>/<name>.json``.

    Args:
        evaluation: of :func:`~ikl_plugins.robustbench.evaluation.evaluate` or ``evaluate_corruptions``, or its log.
        architecture: as the leaderboard words it, such as 'WideResNet-28-10'.
        dataset: 'cifar10' or 'cifar100'.
        title, link, authors, venue: of the paper; authors as one text with commas or one each, the venue such as
            'NeurIPS 2024' or 'arXiv, May 2023'.
        additional_data: whether more images than the data set's own were trained on. Generated images do not count;
            the footnote names them.
        footnote: what a reader of the leaderboard must know; left out if None.
        reported: robust accuracy that the paper states, in percent; None for the lowest measured one.
        number_forward_passes: of networks per prediction.
        external: the lowest robust accuracy of external evaluations, in percent; left out if not below AutoAttack's.

    Returns:
        The fields in the order of RobustBench's own files; accuracies are text, in percent with two decimals.
    """
    log = evaluation.log if isinstance(evaluation, Evaluation) else evaluation
    robust = f"{log['robust_accuracy']:.2f}"
    lower = external is not None and external < log["robust_accuracy"]
    lowest = f"{external:.2f}" if lower else robust
    entry = {
        "link": link,
        "name": title,
        "authors": authors if isinstance(authors, str) else ", ".join(authors),
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": board_eps(dataset, log["threat_model"]) if same_eps(log, dataset) else log["eps"],
        "clean_acc": f"{log['natural_accuracy']:.2f}",
        "reported": lowest if reported is None else f"{reported:.2f}",
    }
    if log["threat_model"] == "corruptions":
        entry["corruptions_acc"] = robust
        if log.get("corruptions_mce") is not None:
            entry["corruptions_mce"] = f"{log['corruptions_mce']:.2f}"
    else:
        entry["autoattack_acc"] = robust
        if lower:
            entry["external"] = lowest
        entry["unreliable"] = log["unreliable"]
    if footnote is not None:
        entry["footnote"] = footnote
    return entry
