"""What each field of a log may be, and how a log is refused."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..._limits import printable
from .seal import canonical

__all__ = ["check_curve", "check_fields", "refuse", "refuse_other"]

Rule = Callable[[Any], bool]
_LARGEST = 1e18  # beyond it JSON's integers are no longer those of other programs
_WRITTEN = "of the type and range that an evaluation writes"


def refuse(caller: str, field: str, rule: str, found: object) -> NoReturn:
    """Refuses a field, with the rule that it breaks."""
    raise ValueError(f"{caller}: `{field}` of the log must be {rule}, got {_shown(found)}. Evaluate again.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_other(caller: str, field: str, found: Any, expected: Any, *sources: str) -> None:
    """Refuses a field unless it is what follows from others, which are its sources."""
    if canonical(found) == canonical(expected):
        return
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        place = next(
            at for at, pair in enumerate(zip(found, expected, strict=True)) if len({*map(canonical, pair)}) > 1
        )
        found, expected, field = found[place], expected[place], f"{field}[{place}]"
    names = ", ".join(f"`{name}`" for name in sources)
    raise ValueError(
        f"{caller}: `{field}` of the log must follow from {names}, which give {_shown(expected)}, got {_shown(found)}. "
        "Evaluate again."
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and printable(value, None) == value


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**64


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _positive(value: Any) -> bool:
    return _count(value) and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LARGEST


def _share(value: Any) -> bool:
    return _number(value) and value <= 100


def _bit(value: Any) -> bool:
    return type(value) is int and value in (0, 1)


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _date(value: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _folder(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[^/\\]+_adversarial", value) is not None


def _none(value: Any) -> bool:
    return value is None


def _maybe(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _all(rule: Rule) -> Rule:
    return lambda value: isinstance(value, list) and all(map(rule, value))


def _each(rule: Rule) -> Rule:
    return lambda value: isinstance(value, dict) and all(map(rule, value.values()))


def _fields(**rules: Rule) -> Rule:
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == rules.keys()
        and all(rule(value[key]) for key, rule in rules.items())
    )


_DATA = _fields(
    name=_maybe(_text),
    source=_maybe(_each(_text)),
    sha256=_sha256,
    n_examples=_positive,
    preprocessing=_maybe(_text),
)
_EVERY: dict[str, Rule] = {
    "versions": _each(_text),
    "date": _date,
    "device": _text,
    "model": _text,
    "checkpoint": _maybe(_fields(name=_text, sha256=_sha256)),
    "weights_sha256": _sha256,
    "dtype": _text,
    "precision": _text,
    "autoattack": _maybe(_fields(module=_text, package=_maybe(_text), version=_maybe(_text))),
    "seed": _integer,
    "threat_model": _text,
    "n_examples": _positive,
    "batch_size": _positive,
    "data": _DATA,
    "classes": _maybe(_all(_text)),
    "natural_accuracy": _maybe(_share),
    "robust_accuracy": _maybe(_share),
    "warnings": _all(lambda value: isinstance(value, str) and _text(value.replace("\n", " "))),
    "standard": _flag,
    "unreliable": _flag,
    "finished": _flag,
}
_PREDICTED: dict[str, Rule] = dict.fromkeys(("labels", "natural_predictions"), _all(_count))
_ATTACKED: dict[str, Rule] = {
    **_PREDICTED,
    "predictions": _all(_count),
    "natural_correct": _all(_bit),
    "robust": _all(_bit),
    "fell_to": _all(_maybe(_text)),
    "dataset": _none,
    "n_classes": _positive,
    "eps": _text,
    "eps_value": _number,
    "version": _text,
    "attacks": _all(_text),
    "dropped": _all(_fields(attack=_text, reason=_text)),
    "parameters": _each(lambda value: isinstance(value, dict)),
    "own_attacks": _each(_maybe(_sha256)),
    "surrogate": _maybe(_fields(model=_text, weights_sha256=_sha256)),
    "n_target_classes": _maybe(_positive),
    "adversarial": _maybe(_folder),
    "progress": _all(
        _fields(
            attack=_text,
            standing=_count,
            seconds=_number,
            batches=_count,
            batches_done=_count,
            keys=_all(_maybe(_text)),
        )
    ),
}
_CORRUPTED: dict[str, Rule] = {
    **{key: _maybe(rule) for key, rule in _PREDICTED.items()},
    "natural_correct": _maybe(_all(_bit)),
    **dict.fromkeys(("predictions", "robust", "fell_to", "eps", "eps_value", "version", "n_target_classes"), _none),
    "adversarial": _none,
    "data": _maybe(_DATA),
    **dict.fromkeys(("attacks", "dropped", "progress", "warnings"), lambda value: value == []),
    **dict.fromkeys(("standard", "unreliable"), lambda value: value is False),
    "parameters": lambda value: value == {},
    "dataset": _text,
    "n_classes": _maybe(_positive),
    "corruptions": _all(
        _fields(
            corruption=_text, severity=_positive, accuracy=_share, n_examples=_positive, sha256=_sha256, seconds=_number
        )
    ),
    "corruptions_mce": _maybe(_number),
    "corruptions_mce_baseline": _maybe(_each(lambda value: _number(value) and 0 < value <= 1)),
    "corruptions_mce_note": _maybe(_text),
}
_PER_IMAGE = ("labels", "natural_predictions", "predictions", "natural_correct", "robust", "fell_to")
_CURVE = _all(_fields(eps=_text, eps_value=_number, robust_accuracy=_share, robust=_all(_bit), attacks=_all(_text)))


def check_fields(caller: str, log: Mapping[str, Any]) -> None:
    """Refuses a log with a field of another type or range, or without one, or a list of another length."""
    rules = {**_EVERY, **(_CORRUPTED if "corruptions" in log else _ATTACKED)}
    for key, rule in rules.items():
        if key not in log:
            raise ValueError(f"{caller}: the log must be whole, but lacks `{key}`. Evaluate again.")
        if not rule(log[key]):
            refuse(caller, key, _WRITTEN, log[key])
    # Beside corruptions natural images are those of the data, as many as these are.
    of_data = "corruptions" in log and log["data"] is not None
    count, name = (log["data"]["n_examples"], "data.n_examples") if of_data else (log["n_examples"], "n_examples")
    for key in _PER_IMAGE:
        if log[key] is not None and len(log[key]) != count:
            refuse(caller, key, f"as long as `{name}` says, {count}", f"{len(log[key])} entries")


def check_curve(caller: str, log: Mapping[str, Any]) -> None:
    """As :func:`check_fields`, for the points of a curve."""
    if not _CURVE(log["curve"]):
        refuse(caller, "curve", _WRITTEN, log["curve"])
    for place, point in enumerate(log["curve"]):
        if len(point["robust"]) != log["n_examples"]:
            refuse(caller, f"curve[{place}].robust", "as long as `n_examples` says", f"{len(point['robust'])} entries")
