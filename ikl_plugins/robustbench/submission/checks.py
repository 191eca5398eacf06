"""What makes a submission one that RobustBench would take. Each check raises with the way out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import _validation as check
from ..._limits import printable
from ..eps import as_fraction
from ..evaluation.evidence import check_log
from ..evaluation.log import Evaluation, weights_sha256
from ..evaluation.verdict import warnings_of
from ..leaderboard import entries, table_origin
from ..preflight import Preflight
from ..submittable import CALLER, against_benchmark

__all__ = [
    "CALLER",
    "check_always",
    "check_benchmark",
    "check_claim",
    "check_flag",
    "check_paper",
    "check_place",
    "check_preflight",
]
__all__ += ["check_weights", "read_evaluation", "warn_of_taken_name"]

OUR_FILES = ("SHA256SUMS", "zoo_entry.py", "new_models_form.md")
_ROUNDING = 0.005  # points: accuracies are stated with two decimals
_FORCE = "allow_failed_preflight=True"


def check_paper(
    *,
    authors: str | Sequence[str],
    link: str,
    licence: str,
    footnote: str | None,
    additional_data: object,
    generated_data: object,
    number_forward_passes: object,
    checkpoint_link: str | None = None,
    code_link: str | None = None,
    **texts: str,
) -> list[str]:
    """The authors, one by one, after every rule on what is said of the paper, the data and the model."""
    texts.update(link=link, licence=licence)
    if footnote is not None:
        texts["footnote"] = footnote
    for argument, text in texts.items():
        _check_line(argument, text)
    for argument, value in (("additional_data", additional_data), ("generated_data", generated_data)):
        if not isinstance(value, bool):
            raise TypeError(f"{CALLER}: `{argument}` must be declared with True or False, got {value!r}.")
    if generated_data and footnote is None:
        raise ValueError(
            f"{CALLER}: `footnote` must say what generated images were trained on, got None. Write 'It uses 1M "
            "synthetic images.'"
        )
    people = authors.split(",") if isinstance(authors, str) else [*authors]
    if not people or not all(isinstance(one, str) and one.strip() and printable(one, None) == one for one in people):
        raise ValueError(f"{CALLER}: `authors` must name at least one person, got {authors!r}. Write them out.")
    _check_addresses(link=link, licence=None if licence == "MIT" else licence, code_link=code_link)
    _check_addresses(checkpoint_link=checkpoint_link)
    check.check_integer(CALLER, "number_forward_passes", number_forward_passes)
    return [person.strip() for person in people]


def _check_addresses(**links: str | None) -> None:
    """Refuses an address that is none, or has what Markdown takes for something else."""
    for argument, link in links.items():
        if link is None:
            continue
        _check_line(argument, link)
        if not re.fullmatch(r"https?://[^\s\\`|<>]+", link):
            what = "'MIT' or the http(s) address of another one" if argument == "licence" else "an http(s) address"
            raise ValueError(f"{CALLER}: `{argument}` must be {what}, got {link!r}. Write https://arxiv.org/abs/...")


def _check_line(argument: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{CALLER}: `{argument}` must be text, got {type(text).__name__}. Write it out.")
    if not text.strip() or printable(text, None) != text:
        raise ValueError(f"{CALLER}: `{argument}` must be one line of text, got {text!r}. Write it out.")


def read_evaluation(evaluation: object) -> Evaluation:
    """An evaluation, which may be given as the file of its log, and whose log agrees with itself."""
    if isinstance(evaluation, (str, Path)):
        if not Path(evaluation).is_file():
            raise ValueError(
                f"{CALLER}: `evaluation` must be a log, but there is none at {evaluation}. Run ikl evaluate."
            )
        evaluation = Evaluation.load(evaluation)
    if not isinstance(evaluation, Evaluation):
        raise TypeError(f"{CALLER}: `evaluation` must be an Evaluation or its file, got {type(evaluation).__name__}.")
    check_log(CALLER, evaluation.log)
    return evaluation


def check_benchmark(log: Mapping[str, Any], dataset: str) -> None:
    """Refuses an evaluation that is not the benchmark's."""
    wrong = against_benchmark(log, dataset)
    if wrong is not None:
        raise ValueError(f"{CALLER}: `evaluation` must {wrong}. Evaluate again, or pass demonstration=True.")


def check_always(log: Mapping[str, Any], reported: float | None, allow_failed: bool) -> None:
    """Refuses what not even a demonstration may be."""
    if not log["finished"]:
        raise ValueError(f"{CALLER}: `evaluation` must be finished, but was interrupted. Run it again to go on.")
    natural, robust = log["natural_accuracy"], log["robust_accuracy"]
    if natural is None or robust is None:
        raise ValueError(
            f"{CALLER}: `evaluation` must have natural and robust accuracy, got {natural} and {robust}. Evaluate both."
        )
    if log["threat_model"] == "Linf" and (as_fraction(log["eps"]) * 255).denominator != 1:
        raise ValueError(f"{CALLER}: `evaluation` must be at whole grey levels, got eps {log['eps']}. Use --eps 8/255.")
    check_claim(reported, robust, allow_failed)


def check_claim(reported: float | None, robust: float, allow_failed: bool) -> None:
    """Refuses a claim above ``robust``, the lowest that was measured."""
    if reported is None:
        return
    claimed = check.check_number(CALLER, "reported", reported)
    if claimed > 100:
        raise ValueError(f"{CALLER}: `reported` must be in percent, 0 to 100, got {reported}. Pass 57.09.")
    if claimed > robust + _ROUNDING and not allow_failed:
        raise ValueError(
            f"{CALLER}: `reported` must not be above the measured {robust:.2f} %, got {claimed:.2f} %. Lower "
            f"it, or pass {_FORCE}."
        )


def check_flag(log: Mapping[str, Any], acknowledged: object, demonstration: bool) -> None:
    """Refuses a result that AutoAttack calls unreliable, unless somebody says why it stands."""
    if acknowledged is not None:
        _check_line("acknowledge_unreliable", acknowledged)
        if not log["unreliable"]:
            raise ValueError(f"{CALLER}: `acknowledge_unreliable` must be None, as AutoAttack has flagged nothing.")
    elif log["unreliable"] and not demonstration:
        raise ValueError(
            f"{CALLER}: `evaluation` may be unreliable: {' '.join(warnings_of(log))} Run an adaptive attack, then pass "
            "acknowledge_unreliable='which, and why the number stands'."
        )


def check_preflight(preflight: object, allow_failed: bool) -> None:
    """Refuses a preflight that failed or left something unchecked, unless that is allowed."""
    if not isinstance(preflight, Preflight):
        raise TypeError(
            f"{CALLER}: `preflight` must be the result of preflight, got {type(preflight).__name__}. Run it first."
        )
    if allow_failed:
        return
    if preflight.failed:
        reasons = " ".join(f"{name}: {preflight[name].why}" for name in preflight.failed)
        raise ValueError(f"{CALLER}: `preflight` must have passed, but failed. {reasons} Mend it, or pass {_FORCE}.")
    unchecked = [name for name in preflight.unchecked if name not in ("eps", "claim")]  # the log tells these
    if unchecked:
        raise ValueError(
            f"{CALLER}: `preflight` must have made its checks, but not: {', '.join(unchecked)}. Mend them, or "
            f"pass {_FORCE}."
        )


def warn_of_taken_name(name: str, dataset: str, threat_model: str) -> None:
    if any(entry.id == name for entry in entries(dataset, threat_model)):
        warnings.warn(
            f"{CALLER}: `name` {name} is that of an entry for {dataset} and {threat_model} (table of "
            f"{table_origin()['date']}). Unless this replaces it, add _ and what tells the models apart.",
            UserWarning,
            stacklevel=3,
        )


def check_weights(state: Mapping[str, Tensor], log: Mapping[str, Any]) -> None:
    """Refuses other weights than those that were evaluated."""
    found = weights_sha256(state)
    if found != log["weights_sha256"]:
        raise ValueError(
            f"{CALLER}: `model` must have the weights of the evaluation, {log['weights_sha256'][:12]}, got "
            f"{found[:12]}. Evaluate this one."
        )


def check_place(folder: Path, force: bool) -> None:
    """Refuses a folder that is there; one that is no submission also with ``force``."""
    if not os.path.lexists(folder):
        return
    if not force:
        raise ValueError(f"{CALLER}: `folder` must be new, but {folder} is there. Name another, or pass force=True.")
    if folder.is_symlink() or not all((folder / file).is_file() for file in OUR_FILES):
        raise ValueError(f"{CALLER}: `folder` must be new or a submission, but {folder} is something else.")
