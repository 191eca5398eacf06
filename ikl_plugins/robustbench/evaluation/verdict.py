"""What an evaluation may be called: standard AutoAttack or not, and reliable or not as far as AutoAttack can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._limits import one_line
from .checks import ATTACKS
from .plan import parameters_in_words

__all__ = ["STANDARD", "attacks_in_words", "autoattack_accuracies", "is_standard", "is_unreliable"]
__all__ += ["not_standard_in_words", "warnings_of"]

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# The five flags of AutoAttack's flags_doc.md, by what their warnings say. Its check of the classes is no flag.
_FLAGS = (
    "randomized defense",
    "output is a probability distribution",
    "with zero gradient",
    "Square Attack has decreased the robust accuracy",
    "dynamic defense",
)
_SQUARE = 0.002  # of all images: what Square may find behind the others, in AutoAttack's check


def is_standard(log: Mapping[str, Any]) -> bool:
    """Whether this is standard AutoAttack: its four attacks and no other, all with its parameters, in float32."""
    return bool(
        log["version"] == "standard"
        and tuple(log["attacks"]) == STANDARD
        and not log["dropped"]
        and not log["parameters"]
        and log["precision"] == "float32"
    )


def is_unreliable(log: Mapping[str, Any]) -> bool:
    """Whether AutoAttack's checks say that the evaluation may be unreliable.

    True for each flag of its flags_doc.md: a model that draws random numbers, gives probabilities, computes gradients
    in its forward, or has zero gradients, and a Square that lowers the accuracy that the attacks by gradients left by
    more than 0.2 points. The last follows from the progress too, whether the warning is there or not. RobustBench marks
    entries with such flags as `unreliable`.
    """
    accuracies = autoattack_accuracies(log)
    square = accuracies.pop("square", 1.0)
    found = len(accuracies) > 1 and square < min(accuracies.values()) - _SQUARE
    return found or any(flag in warning for flag in _FLAGS for warning in log["warnings"])


def warnings_of(log: Mapping[str, Any]) -> list[str]:
    """What AutoAttack has warned of, a line each."""
    return [one_line(warning) for warning in log["warnings"]]


def autoattack_accuracies(log: Mapping[str, Any]) -> dict[str, float]:
    """Shares of images that stood: 'clean', and behind each attack of AutoAttack itself that had any to attack."""
    count, progress = log["n_examples"], log["progress"] or ()
    correct = log["natural_correct"]
    if correct is None:
        return {}
    done = [entry for entry in progress if entry["attack"] in ATTACKS and entry["batches"] == entry["batches_done"] > 0]
    return {"clean": sum(correct) / count, **{entry["attack"]: entry["standing"] / count for entry in done}}


def attacks_in_words(log: Mapping[str, Any]) -> str:
    """What ran, such as 'standard AutoAttack' or 'not standard: apgd-ce, square, with square.n_queries=20000'."""
    if log["standard"]:
        return "standard AutoAttack"
    return f"not standard: {not_standard_in_words(log)}"


def not_standard_in_words(log: Mapping[str, Any]) -> str:
    """What ran instead of standard AutoAttack."""
    words = [] if log["version"] in (None, "standard", "custom") else [f"AutoAttack {log['version']}"]
    words += log["attacks"]
    if log["parameters"]:
        words.append(f"with {parameters_in_words(log['parameters'])}")
    if log["precision"] != "float32":
        words.append(f"in {log['precision']}")
    return ", ".join(words)
