"""A log is evidence only if it agrees with itself: everything in it that follows from something else is made again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..._robustbench_import import import_robustbench
from ..eps import parse_eps
from ..known_sets import KNOWN, recorded_name
from .attacks import TRANSFER, possible_attacks, square_warnings
from .batches import Batches, batch_path, each_kind_once, natural_facts, natural_path, read_batch, read_natural
from .checks import ATTACKS, NORMS
from .fields import check_curve, check_fields, refuse, refuse_other
from .plan import check_parameters
from .seal import canonical
from .verdict import STANDARD, autoattack_accuracies, is_standard, is_unreliable

__all__ = ["check_log", "expected_batches", "mean_corruption_error", "read_batches"]

# AutoAttack's versions.
_VERSIONS = {
    "standard": list(STANDARD),
    "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    "rand": ["apgd-ce", "apgd-dlr"],
}
_TARGETS = 9  # of AutoAttack's targeted attacks, where there are as many other classes
_READER = "Evaluation"  # of the files
_SEVERITIES = range(1, 6)
_ROUNDING = 1e-9  # points: a mean may be summed in another order

_robustbench = import_robustbench()


def check_log(caller: str, log: Mapping[str, Any]) -> None:
    """Refuses a log that does not agree with itself, by the name of the field.

    Made again are: the natural flags from labels and predictions, the robust ones from these and from what each image
    fell to, the percentages from the flags, the progress from the flags and the batch size, the attacks and those left
    out from version and classes, the radius, ``standard`` and ``unreliable``, a curve (whose flags only fall), and the
    mean over corruptions. What follows from the batch files or the model is compared where these are.

    Args:
        caller: whom a refusal names.
        log: as JSON has it.

    Raises:
        ValueError: a field of another type or length, or one that does not follow from the others.
    """
    corrupted = "corruptions" in log
    check_fields(caller, log)
    _check_data(caller, log)
    if log["natural_predictions"] is not None:
        _check_natural(caller, log)
    if corrupted:
        _check_corruptions(caller, log)
        return
    _check_attacks(caller, log)
    _check_flags(caller, log)
    _check_progress(caller, log)
    _check_warnings(caller, log)
    for key, made in (("standard", is_standard), ("unreliable", is_unreliable)):
        _same(caller, log, key, made(log), "version", "attacks", "parameters", "precision", "warnings", "progress")
    if "curve" in log:
        _check_curve(caller, log)


def read_batches(caller: str, log: Mapping[str, Any], folder: Path) -> dict[int, Tensor]:
    """The adversarial images of all that fell, by index, from batch files that say what the log says.

    Raises:
        ValueError: a file is missing or damaged, or the log is not what follows from the files; the message names it.
    """
    path = natural_path(folder, log)
    if not path.exists():
        _refuse_facts(caller, natural_facts(log), folder)
    natural = read_natural(_READER, path)
    _same(caller, log, "natural_predictions", natural.predictions.tolist(), path.name)
    batches = Batches(caller, None, log, natural.digests)
    found: dict[int, Tensor] = {}
    warnings = natural.warnings
    for place, entry in enumerate(log["progress"]):
        attack, name, seconds = entry["attack"], f"progress[{place}]", 0.0
        for number, index in enumerate(expected_batches(log, attack)):
            stated = entry["keys"][number]
            if stated is None:
                continue
            refuse_other(caller, f"{name}.keys[{number}]", stated, batches.key(attack, index), path.name, "fell_to")
            file = batch_path(folder, place, attack, number, stated)
            if not file.exists():
                raise ValueError(f"{caller}: {folder} must hold all batches of the log, but lacks {file.name}.")
            batch = read_batch(_READER, file, stated, index)
            fell = [at for at in index if log["fell_to"][at] == attack]
            refuse_other(caller, "fell_to", fell, batch.fell, file.name)
            refuse_other(caller, "predictions", [log["predictions"][at] for at in fell], batch.prediction, file.name)
            found.update(zip(batch.fell, batch.image, strict=True))
            seconds += batch.seconds
            warnings = each_kind_once([*warnings, *batch.warnings])
        if not math.isclose(entry["seconds"], seconds):  # Python 3.12 sums otherwise than 3.11
            refuse_other(caller, f"{name}.seconds", entry["seconds"], seconds, "its batch files")
    # The last one may be that of the check of Square, which follows from the progress.
    said = log["warnings"][: len(warnings)] if len(log["warnings"]) - len(warnings) == len(_square(log)) else None
    refuse_other(caller, "warnings", log["warnings"] if said is None else said, warnings, path.name, "the batch files")
    return dict(sorted(found.items()))


def _refuse_facts(caller: str, said: Mapping[str, Any], folder: Path) -> None:
    """Names what the log has otherwise than the evaluation that the folder is of."""
    there = [read_natural(_READER, path).facts for path in sorted(folder.glob("natural-*.npz"))]
    if not there:
        raise ValueError(f"{caller}: {folder} must hold the file natural-... of the evaluation, but has none.")
    differing = [
        [key for key in {**said, **facts} if canonical(said.get(key)) != canonical(facts.get(key))] for facts in there
    ]
    nearest = min(range(len(there)), key=lambda place: len(differing[place]))
    key = differing[nearest][0]
    field = key.replace("version of ", "versions.").replace("data", "data.sha256")
    refuse_other(caller, field, said.get(key), there[nearest].get(key), folder.name)


# --- what follows from what -------------------------------------------------------------------------------------------


def _same(caller: str, log: Mapping[str, Any], field: str, expected: Any, *sources: str) -> None:
    """Refuses a field unless it is what follows from others."""
    refuse_other(caller, field, log[field], expected, *sources)


def _radius(caller: str, field: str, text: str) -> float:
    try:
        return float(parse_eps(caller, text, norm="L2"))  # without the warning of Linf
    except ValueError:
        refuse(caller, field, "a radius above 0", text)


def _percent(flags: Sequence[int]) -> float:
    return 100 * sum(flags) / len(flags)


def _check_data(caller: str, log: Mapping[str, Any]) -> None:
    data, classes = log["data"], log["n_classes"]
    if log["classes"] is not None and len(log["classes"]) != classes:
        refuse(caller, "classes", f"a name for each of `n_classes` {classes}", log["classes"])
    if data is None:
        return
    if log["fell_to"] is not None:
        refuse_other(caller, "data.n_examples", data["n_examples"], log["n_examples"], "n_examples")
    name, source = data["name"], data["source"]
    if recorded_name(name, source) != name or (
        source is not None and (name not in KNOWN or source != KNOWN[name].source)
    ):
        refuse(caller, "data", "of a test set's name only with the `source` that it is known by", (name, source))


def _check_natural(caller: str, log: Mapping[str, Any]) -> None:
    labels, predictions, classes = log["labels"], log["natural_predictions"], log["n_classes"]
    for key in ("labels", "natural_predictions", "predictions"):
        bad = [value for value in log[key] or () if value >= classes]
        if bad:
            refuse(caller, key, f"below `n_classes` {classes}", bad[0])
    correct = [int(label == made) for label, made in zip(labels, predictions, strict=True)]
    _same(caller, log, "natural_correct", correct, "labels", "natural_predictions")
    _same(caller, log, "natural_accuracy", _percent(correct), "natural_correct")


def _check_attacks(caller: str, log: Mapping[str, Any]) -> None:
    if log["threat_model"] not in NORMS:
        refuse(caller, "threat_model", f"one of {', '.join(NORMS)}", log["threat_model"])
    _same(caller, log, "eps_value", _radius(caller, "eps", log["eps"]), "eps")
    version, attacks, classes = log["version"], log["attacks"], log["n_classes"]
    try:
        parameters = check_parameters(caller, log["parameters"], attacks, log["threat_model"], classes)
    except (TypeError, ValueError) as error:
        refuse(caller, "parameters", f"such as AutoAttack's attacks take ({error})", log["parameters"])
    _same(caller, log, "parameters", parameters, "attacks")
    dropped = [entry["attack"] for entry in log["dropped"]]
    if not attacks or len({*attacks, *dropped}) != len(attacks) + len(dropped):
        refuse(caller, "attacks", "of different names, none of them in `dropped`", attacks)
    run, left_out = possible_attacks(caller, [*attacks, *dropped], classes)
    _same(caller, log, "attacks", run, "n_classes", "dropped")
    _same(caller, log, "dropped", left_out, "n_classes", "attacks")
    if version in _VERSIONS:
        known = _VERSIONS[version]
        wanted = [attack for attack in known if attack not in dropped]
        behind = [attack for attack in attacks[len(wanted) :] if attack not in ATTACKS]
        _same(caller, log, "attacks", [*wanted, *behind], "version", "dropped")
    elif version != "custom":
        refuse(caller, "version", f"{', '.join(_VERSIONS)} or custom", version)
    targeted = any(attack.removeprefix(TRANSFER) in ("apgd-t", "fab-t") for attack in attacks)
    most = min(_TARGETS, classes - 1)
    if not (log["n_target_classes"] in range(1, most + 1) if targeted else log["n_target_classes"] is None):
        refuse(caller, "n_target_classes", f"1 to {most} for targeted `attacks`, else None", log["n_target_classes"])


def _check_flags(caller: str, log: Mapping[str, Any]) -> None:
    rows = zip(log["fell_to"], log["natural_correct"], log["labels"], log["natural_predictions"], strict=True)
    for at, (attack, correct, label, natural) in enumerate(rows):
        prediction = log["predictions"][at]
        if attack is None:
            refuse_other(caller, f"predictions[{at}]", prediction, natural, "natural_predictions", "fell_to")
        elif attack not in log["attacks"] or not correct:
            refuse(caller, f"fell_to[{at}]", "one of `attacks`, and None without `natural_correct`", attack)
        elif prediction == label:
            refuse(caller, f"predictions[{at}]", "other than `labels`, as the image has `fell_to`", prediction)
    robust = [int(ok and attack is None) for ok, attack in zip(log["natural_correct"], log["fell_to"], strict=True)]
    _same(caller, log, "robust", robust, "natural_correct", "fell_to")
    _same(caller, log, "robust_accuracy", _percent(robust), "robust")


def expected_batches(log: Mapping[str, Any], attack: str) -> list[list[int]]:
    """The images of each batch of an attack: those that stood when it began."""
    earlier = {None, *log["attacks"][: log["attacks"].index(attack)]}
    standing = [
        at
        for at, (correct, fell_to) in enumerate(zip(log["natural_correct"], log["fell_to"], strict=True))
        if correct and (fell_to is None or fell_to not in earlier)
    ]
    size = log["batch_size"]
    return [standing[start : start + size] for start in range(0, len(standing), size)]


def _check_progress(caller: str, log: Mapping[str, Any]) -> None:
    progress, attacks = log["progress"], log["attacks"]
    names = [entry["attack"] for entry in progress]
    refuse_other(caller, "progress", names, attacks[: len(progress)], "attacks")
    begun = {None, *names}
    early = [at for at, attack in enumerate(log["fell_to"]) if attack not in begun]
    if early:
        refuse(caller, f"fell_to[{early[0]}]", "an attack of `progress`", log["fell_to"][early[0]])
    for place, entry in enumerate(progress):
        attack, batches = entry["attack"], expected_batches(log, entry["attack"])
        name = f"progress[{place}]"
        refuse_other(
            caller, f"{name}.batches", entry["batches"], len(batches), "fell_to", "natural_correct", "batch_size"
        )
        refuse_other(caller, f"{name}.keys", len(entry["keys"]), len(batches), f"{name}.batches")
        done = [batch for batch, key in zip(batches, entry["keys"], strict=True) if key is not None]
        refuse_other(caller, f"{name}.batches_done", entry["batches_done"], len(done), f"{name}.keys")
        if len(done) < len(batches) and (log["finished"] or place < len(progress) - 1):
            refuse(caller, f"{name}.batches_done", "`batches`, as later attacks began or `finished` is true", len(done))
        fell = [at for at, fell_to in enumerate(log["fell_to"]) if fell_to == attack]
        undone = set(fell).difference(itertools.chain.from_iterable(done))
        if undone:
            refuse(caller, f"fell_to[{min(undone)}]", f"of a batch that is done in `{name}.keys`", attack)
        standing = sum(map(len, batches)) - len(fell)
        refuse_other(caller, f"{name}.standing", entry["standing"], standing, "fell_to", "natural_correct")
    if log["finished"]:
        _same(caller, log, "finished", len(progress) == len(attacks), "progress", "attacks")


def _square(log: Mapping[str, Any]) -> list[str]:
    """How the warnings of AutoAttack's check of Square begin, up to the percentage: its versions word the rest."""
    said = square_warnings(autoattack_accuracies(log)) if log["finished"] else []
    return [text.partition("%")[0] for text in said]


def _check_warnings(caller: str, log: Mapping[str, Any]) -> None:
    stated = [text.partition("%")[0] for text in log["warnings"]]
    kinds = [text for text in stated if text.startswith("Square Attack has decreased")]
    refuse_other(caller, "warnings", kinds, _square(log), "progress")


def _check_curve(caller: str, log: Mapping[str, Any]) -> None:
    points = log["curve"]
    check_curve(caller, log)
    before, radius = log["natural_correct"], 0.0
    for place, point in enumerate(points):
        name = f"curve[{place}]"
        eps = _radius(caller, f"{name}.eps", point["eps"])
        refuse_other(caller, f"{name}.eps_value", point["eps_value"], eps, f"{name}.eps")
        if eps <= radius:
            refuse(caller, f"{name}.eps", "above the radius before it", point["eps"])
        nested = [min(flag, earlier) for flag, earlier in zip(point["robust"], before, strict=True)]
        refuse_other(caller, f"{name}.robust", point["robust"], nested, "natural_correct", "smaller radii")
        refuse_other(caller, f"{name}.robust_accuracy", point["robust_accuracy"], _percent(nested), f"{name}.robust")
        # The first radius is tried on all images, a later one only if any stood. Some attacks alone are allowed.
        attacks = points[0]["attacks"] if place == 0 or any(before) else []
        refuse_other(caller, f"{name}.attacks", point["attacks"], attacks, "the first radius", "robust")
        before, radius = nested, eps


def _check_corruptions(caller: str, log: Mapping[str, Any]) -> None:
    entries = log["corruptions"]
    kinds = _robustbench.data.CORRUPTIONS_DICT
    known = {kind.value: {threat.value: names for threat, names in kinds[kind].items()} for kind in kinds}
    if log["dataset"] not in known:
        refuse(caller, "dataset", f"one of {', '.join(known)}", log["dataset"])
    if log["threat_model"] not in known[log["dataset"]]:
        refuse(caller, "threat_model", f"one that `dataset` {log['dataset']} has", log["threat_model"])
    pairs = [[name, severity] for name in known[log["dataset"]][log["threat_model"]] for severity in _SEVERITIES]
    if log["finished"] or len(entries) < len(pairs):
        pairs = pairs if log["finished"] else pairs[: len(entries)]
    found = [[entry["corruption"], entry["severity"]] for entry in entries]
    refuse_other(caller, "corruptions", found, pairs, "dataset", "threat_model", "finished")
    for place, entry in enumerate(entries):
        name, count = f"corruptions[{place}]", log["n_examples"]
        refuse_other(caller, f"{name}.n_examples", entry["n_examples"], count, "n_examples")
        right = entry["accuracy"] / 100 * count
        if abs(right - round(right)) > 1e-6:
            refuse(
                caller, f"{name}.accuracy", f"a number of `n_examples` {count} images, in percent", entry["accuracy"]
            )
    mean, stated = float(np.mean([entry["accuracy"] for entry in entries])) if entries else None, log["robust_accuracy"]
    if mean is None or stated is None or abs(mean - stated) > _ROUNDING:
        _same(caller, log, "robust_accuracy", mean, "corruptions")
    baseline = log["corruptions_mce_baseline"]
    if baseline is not None and {entry["corruption"] for entry in entries} - baseline.keys():
        refuse(caller, "corruptions_mce_baseline", "of all `corruptions`", baseline)
    error = None if baseline is None else mean_corruption_error(entries, baseline)
    if error is None or log["corruptions_mce"] is None or abs(error - log["corruptions_mce"]) > _ROUNDING:
        _same(caller, log, "corruptions_mce", error, "corruptions", "corruptions_mce_baseline")
    said = [log["corruptions_mce"], log["corruptions_mce_note"]]
    if said.count(None) != (1 if log["finished"] else 2):
        refuse(caller, "corruptions_mce", "there when `finished`, unless `corruptions_mce_note` says why not", said)


def mean_corruption_error(entries: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> float:
    """In percent, as RobustBench measures it: error over the baseline's mean error, averaged over the corruptions."""
    ratios = []
    for corruption in dict.fromkeys(entry["corruption"] for entry in entries):
        own = [1 - entry["accuracy"] / 100 for entry in entries if entry["corruption"] == corruption]
        ratios.append(np.mean(own) / baseline[corruption])
    return 100 * float(np.mean(ratios))
