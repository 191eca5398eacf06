"""The seal of a log: what tells that somebody has edited it by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

__all__ = ["broken", "canonical", "parsed", "seal"]


def canonical(value: object) -> str:
    """The one JSON text of a value, in which 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def parsed(text: str) -> Any:
    """A value of JSON that every program reads alike.

    Raises:
        ValueError: no JSON; NaN or an infinity; a mapping with a name twice; too many levels.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("too many levels") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def seal(log: Mapping[str, Any]) -> dict[str, str]:
    """For each key but ``seal`` the first 16 digits of the SHA-256 of its canonical JSON.

    It tells edits and damage, and names their key. It is no signature: who knows this function renews it. What proves
    an accuracy is the model, which :func:`~ikl_plugins.robustbench.verify` runs again.
    """
    return {
        key: hashlib.sha256(f"{key}\n{canonical(value)}".encode()).hexdigest()[:16]
        for key, value in log.items()
        if key != "seal"
    }


def broken(log: Mapping[str, Any]) -> list[str]:
    """The keys of a log that its seal does not fit."""
    found, stated = seal(log), log.get("seal")
    if not isinstance(stated, dict):
        return ["seal"]
    return [key for key in {**found, **stated} if found.get(key) != stated.get(key)]
