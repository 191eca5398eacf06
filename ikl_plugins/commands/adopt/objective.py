"""What a loss of torchdistill computes, and the keywords of ours that compute the same."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from ikl_plugins import _validation
from ikl_plugins.losses import LOSSES

from .messages import CALLER
from .terms import SOURCES, Term, num_classes_of
from .yaml_text import Entry, Tree, is_empty, number_text

__all__ = ["ORDER", "Objective", "Value", "has_weights_of_kl", "loss_keywords", "objective_of", "values_of"]

# The order in a file; a keyword that is not among them comes last.
ORDER = ["ce_weight", "alpha", "beta", "gamma", "temperature", "weight_temperature"]
ORDER += ["global_info", "num_classes", "warmup_epochs", "reduction", "check_finite"]
_ADAPTERS = ("ce_weight", "warmup_epochs")


class Objective(NamedTuple):
    """``ce_weight`` * cross entropy to the labels + ``kl_weight`` * KL at ``temperature``."""

    kl_weight: float
    temperature: float
    source: str  # the whole in words
    why: str  # the weight of KL in words
    ce_weight: float | None = None
    reduction: str | None = None  # of ours, where it must be written


class Value(NamedTuple):
    """A keyword of ours: its value, what the comment beside it says, and whether --set gives it."""

    value: Any
    why: str = ""
    given: bool = False


def loss_keywords(loss: str) -> list[str]:
    """The keywords that ``--set`` may give to a loss ('DKL', 'IKL', ...): its own, then those of the adapter."""
    return [*inspect.signature(LOSSES[f"{loss}Loss"]).parameters, *_ADAPTERS]


def has_weights_of_kl(loss: str) -> bool:
    """Whether a loss takes the weights of KL itself, as DKL does, and has its gradients for both inputs."""
    return "weight_temperature" not in loss_keywords(loss)


def _number(tree: Tree, entry: Entry) -> float:
    keyword = entry.key.value
    value = None
    with contextlib.suppress(yaml.YAMLError):
        value = tree.value(entry.value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        shown = tree.text[entry.start : entry.end] or "nothing"
        hint = "Write it out as a number."
        with contextlib.suppress(TypeError, ValueError):
            if isinstance(value, str) and math.isfinite(float(value)):
                hint = f"YAML takes this for a string: write {number_text(float(value))}."
        raise tree.refusal(entry, f"`{keyword}` must be a plain number, got {shown}. {hint}")
    if value < 0 or (keyword == "temperature" and value == 0):
        rule = "above 0" if keyword == "temperature" else "at least 0"
        raise tree.refusal(entry, f"`{keyword}` must be {rule}, got {value}. Correct it.")
    return value


def objective_of(tree: Tree, term: Term, given: Mapping[str, Entry], num_classes: int | None) -> Objective:
    """Reads the numbers of a loss.

    Args:
        tree: the config.
        term: the loss.
        given: its keywords.
        num_classes: by which torchdistill's reduction 'mean' divides.

    Raises:
        ValueError: a number that cannot be mapped, or a keyword that has no counterpart.
    """
    kind = term.kind
    _check_keywords(tree, kind, given)
    reduction, factor, per_class = _reduction(tree, term, given, num_classes)
    if kind == "KLDivLoss":
        source = f"1{per_class} * KL of log-probabilities that the models give"
        why = f"soft-label cross entropy: KLDivLoss has the weight 1{per_class}"
        return Objective(factor, 1.0, source, why, reduction=reduction)
    numbers = {
        name: _number(tree, given[name])
        for name in ("alpha", "beta")
        if name in given and not is_empty(given[name].value)
    }
    alpha, beta = numbers.get("alpha"), numbers.get("beta")
    temperature = float(_number(tree, given["temperature"]))
    if alpha is None and beta is None:
        rule = f"{kind} must have `alpha` or `beta`, got neither. torchdistill itself needs one."
        raise tree.refusal(given["temperature"], rule)
    if not alpha:
        # Without a weight for the labels torchdistill returns the bare KL, whatever beta is.
        source = f"KL at temperature {temperature:g}{per_class}, as without alpha it has no beta and no temperature**2"
        why = f"soft-label cross entropy: without alpha {kind} has neither beta nor temperature**2{per_class}"
        return Objective(factor, temperature, source, why, reduction=reduction)
    if beta is None:
        beta = 1 - alpha
        if beta < 0:
            rule = f"`alpha` must be at most 1 without a `beta`, which is then 1 - alpha, got {alpha}. Give `beta`."
            raise tree.refusal(given["alpha"], rule)
    weight = f"{beta:.12g} * {temperature:g}**2{per_class}"
    source = f"{alpha:g} * cross entropy to the labels + {weight} * KL at temperature {temperature:g}"
    why = f"soft-label cross entropy: {kind}'s beta {beta:.12g} * temperature**2{per_class}"
    return Objective(beta * temperature**2 * factor, temperature, source, why, alpha, reduction)


def _check_keywords(tree: Tree, kind: str, given: Mapping[str, Entry]) -> None:
    for keyword, entry in given.items():
        if keyword in SOURCES[kind]:
            continue
        if kind == "KLDivLoss":
            known = ", ".join(SOURCES[kind])
            raise tree.refusal(entry, f"`kwargs` of {kind} must be among {known}, got `{keyword}`. Take it out.")
        raise tree.refusal(
            entry,
            f"`kwargs` of {kind} must be its own, got `{keyword}`, which it hands to CrossEntropyLoss. Give the labels "
            f"a term with that loss, set alpha: 0 here, and beta * temperature**2 as this term's `weight`.",
        )


def _reduction(
    tree: Tree, term: Term, given: Mapping[str, Entry], num_classes: int | None
) -> tuple[str | None, float, str]:
    """Our reduction where it has to be written, the factor that goes with it, and that factor in words."""
    entry = given.get("reduction")
    default = "mean" if term.kind == "KLDivLoss" else "batchmean"
    reduction = default if entry is None else str(entry.value.value)
    if reduction in ("batchmean", "sum"):
        return None, 1.0, ""
    if reduction != "mean":
        rule = f"`reduction` must be 'batchmean', 'sum' or 'mean', got '{reduction}'. A training needs one number."
        raise tree.refusal(entry, rule)
    if num_classes is None:
        rule = f"`reduction` of {term.kind} must not be 'mean' where the number of classes is unknown."
        raise tree.refusal(entry or term.mapping, f"{rule} Give it: --set num_classes=100.")
    return "batchmean", 1.0 / num_classes, f" / {num_classes} classes"


def values_of(tree: Tree, term: Term, objective: Objective, loss: str, settings: Mapping[str, Any]) -> dict[str, Value]:
    """The keywords of a loss of ours, in the order of the file.

    Args:
        tree: the config.
        term: the loss of torchdistill.
        objective: what it computes.
        loss: 'DKL', 'IKL', ...: one of ours without its last word.
        settings: those of --set, which go first.

    Raises:
        ValueError: the loss refuses them.
        TypeError: the same.
    """
    known = loss_keywords(loss)
    strength, temperature = objective.kl_weight, objective.temperature
    values = {"alpha": Value(strength, objective.why), "temperature": Value(temperature)}
    if objective.ce_weight is not None:
        values["ce_weight"] = Value(objective.ce_weight, f"cross entropy to the labels: {term.kind}'s alpha")
    if has_weights_of_kl(loss):
        values["beta"] = Value(strength, "weighted MSE: equal to alpha, which gives the gradients of KL")
    else:
        formula = "equal to alpha" if temperature == 1 else "alpha / temperature**2"
        values["beta"] = Value(strength / temperature**2, f"new: weighted MSE, drives the student; {formula}")
        if temperature != 1:
            values["weight_temperature"] = Value(temperature, "new: of the weights; that of DKL")
    if "gamma" in known:
        values["gamma"] = Value(1.0, "new: power of the weights; 1 is IKL, 0 is uniform")
    if objective.reduction is not None:
        values["reduction"] = Value(objective.reduction, "mean over samples")
    given = dict(settings)
    if not given.get("global_info"):
        given.pop("num_classes", None)  # it served the reduction 'mean'
    elif "num_classes" not in given:
        classes = num_classes_of(tree)
        if classes is None:
            rule = "`num_classes` must be given with global_info=True, as `models: student_model:` has none."
            raise tree.refusal(None, f"{rule} Add --set num_classes=100.")
        values["num_classes"] = Value(classes, "of the student")
    values.update({name: Value(value, "given by --set", given=True) for name, value in given.items()})
    _build(tree, term, loss, {name: value.value for name, value in values.items()})
    place = {name: number for number, name in enumerate(ORDER)}
    return dict(sorted(values.items(), key=lambda item: place.get(item[0], len(place))))


def _build(tree: Tree, term: Term, loss: str, keywords: dict[str, Any]) -> None:
    """Builds the loss, for its own refusals."""
    try:
        for name in _ADAPTERS:
            _validation.check_number(f"{loss}Loss", name, keywords.pop(name, 0))
        LOSSES[f"{loss}Loss"](**keywords)
    except (TypeError, ValueError) as error:
        place = f"{CALLER}: {tree.name}, line {term.line}"
        raise type(error)(f"{place}: for the new loss: {error}") from error
