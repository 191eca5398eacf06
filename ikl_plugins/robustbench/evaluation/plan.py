"""Which attacks an evaluation runs, in which order, and with which parameters."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from ... import _validation as check
from .checks import ATTACKS, VERSIONS

__all__ = ["GROUP", "TRANSFER", "Plan", "check_parameters", "defined", "parameters_in_words", "plan_attacks"]

GROUP = "ikl_plugins.attacks"  # of entry points
TRANSFER = "transfer-"

# What AutoAttack's attacks have. A pair is a range, its lower end excluded; None is a count.
_APGD = {"n_iter": None, "n_restarts": None, "eot_iter": None, "rho": (0.0, 1.0)}
_FAB = {"n_iter": None, "n_restarts": None, "alpha_max": (0.0, 1.0), "eta": (1.0, 2.0), "beta": (0.0, 1.0)}
_PARAMETERS: dict[str, dict[str, tuple[float, float] | None]] = {
    "apgd-ce": _APGD,
    "apgd-dlr": _APGD,
    "apgd-t": {**_APGD, "n_target_classes": None},
    "fab": _FAB,
    "fab-t": {**_FAB, "n_target_classes": None},
    "square": {"n_queries": None, "n_restarts": None, "p_init": (0.0, 1.0)},
}


class Plan(NamedTuple):
    """The attacks of an evaluation.

    Attributes:
        version: of AutoAttack, whose parameters its attacks have: 'custom' for attacks that were named.
        named: names of all attacks; None for those of the version.
        behind: names of further ones, behind those of the version.
        own: by name, those that are neither AutoAttack's nor transferred.
    """

    version: str
    named: tuple[str, ...] | None
    behind: tuple[str, ...]
    own: Mapping[str, Callable[..., Any]]


def plan_attacks(
    caller: str, version: str, attacks: Sequence[str | Callable[..., Any]] | None, *, surrogate: bool = False
) -> Plan:
    """Reads ``version`` and ``attacks`` of an evaluation, and imports attacks of others."""
    if version not in VERSIONS:
        raise ValueError(check.unknown_name_message(caller, "version", version, VERSIONS))
    if isinstance(attacks, str):
        raise TypeError(f"{caller}: `attacks` must be a sequence of names, got {attacks!r}. Write [{attacks!r}].")
    if attacks is not None and version != "standard":
        raise ValueError(f"{caller}: `attacks` must be None with version={version!r}, got {list(attacks)}.")
    given: list[Any] = list(attacks or ())
    of_version = attacks is None
    if given and given[0] in VERSIONS:
        version, of_version = given.pop(0), True
    own: dict[str, Callable[..., Any]] = {}
    names = []
    for attack in given:
        name, called = _resolved(caller, attack)
        names.append(name)
        if called is not None:
            own[name] = called
    if len(set(names)) != len(names) or not (names or of_version):
        raise ValueError(f"{caller}: `attacks` must name one at least, each once, got {names}.")
    twice = [name for name in names if of_version and name in ATTACKS]
    if twice:
        raise ValueError(
            f"{caller}: `attacks` may have attacks of others behind {version!r}, got {twice[0]!r}. Leave it out."
        )
    transferred = [name for name in names if name.startswith(TRANSFER) and name not in own]
    if bool(transferred) != surrogate:
        got = f"{transferred[0]} without one" if transferred else f"one, but no attack named {TRANSFER}..."
        raise ValueError(f"{caller}: `surrogate` is what transfer attacks are computed on, got {got}.")
    if of_version:
        return Plan(version, None, tuple(names), own)
    return Plan("custom", tuple(names), (), own)


def defined(attack: Any) -> Any:
    """The function or class that a callable is made of."""
    while isinstance(attack, functools.partial):
        attack = attack.func
    return attack if hasattr(attack, "__qualname__") else type(attack)


def _resolved(caller: str, attack: object) -> tuple[str, Callable[..., Any] | None]:
    """The name of an attack, and what to call if it is not AutoAttack's."""
    if not isinstance(attack, str):
        if not callable(attack):
            raise TypeError(f"{caller}: `attacks` must hold names and callables, got {attack!r}.")
        named = defined(attack)
        return f"{named.__module__}:{named.__qualname__}", attack
    if attack.removeprefix(TRANSFER) in ATTACKS:
        return attack, None
    if ":" in attack:
        module, _, path = attack.partition(":")
        try:
            called = functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{caller}: attack `{attack}` must be a module and a callable in it, but is not ({error})."
            ) from error
    else:
        known = {point.name: point for point in metadata.entry_points(group=GROUP)}
        if attack not in known:
            message = check.unknown_name_message(caller, "attack", attack, (*ATTACKS, *known))
            raise ValueError(f"{message} Own ones are module:callable.")
        called = known[attack].load()
    if not callable(called):
        raise TypeError(f"{caller}: attack `{attack}` must be callable, got {type(called).__name__}.")
    return attack, called


def check_parameters(
    caller: str,
    parameters: Mapping[str, Mapping[str, Any]] | None,
    attacks: Sequence[str],
    norm: str,
    classes: int,
) -> dict[str, dict[str, Any]]:
    """The parameters by attack, refused unless the attacks run and have them, each in its range."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping) or not all(isinstance(values, Mapping) for values in parameters.values()):
        raise TypeError(
            f"{caller}: `parameters` must map attacks to mappings, got {parameters!r}. Write "
            "{'square': {'n_queries': 20000}}."
        )
    found: dict[str, dict[str, Any]] = {}
    for attack, values in parameters.items():
        known = _PARAMETERS.get(attack.removeprefix(TRANSFER))
        if attack not in attacks or known is None:
            theirs = [name for name in attacks if name.removeprefix(TRANSFER) in _PARAMETERS]
            raise ValueError(
                f"{caller}: `parameters` must be of AutoAttack's attacks that run ({', '.join(theirs)}), got {attack}."
            )
        for name, value in values.items():
            if name not in known:
                raise ValueError(check.unknown_name_message(caller, f"parameter of {attack}", name, known))
            number = _parameter(caller, f"{attack}.{name}", value, known[name], norm, classes)
            found.setdefault(attack, {})[name] = number
    return found


def _parameter(
    caller: str, name: str, value: object, limits: tuple[float, float] | None, norm: str, classes: int
) -> float:
    if limits is None:
        # AutoAttack spreads the iterations over three radii for L1, which a single one does not survive.
        count = check.check_integer(caller, name, value, least=2 if norm == "L1" and name.endswith("n_iter") else 1)
        if name.endswith("n_target_classes") and count >= classes:
            raise ValueError(f"{caller}: `{name}` must be at most {classes - 1}, the other classes, got {count}.")
        return count
    number = check.check_number(caller, name, value)
    if not limits[0] < number <= limits[1]:
        raise ValueError(f"{caller}: `{name}` must be above {limits[0]:g} and at most {limits[1]:g}, got {value}.")
    return number


def parameters_in_words(parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """As ``ikl evaluate --set`` takes them: 'square.n_queries=20000'."""
    return ", ".join(
        f"{attack}.{name}={json.dumps(value)}"
        for attack, values in parameters.items()
        for name, value in values.items()
    )
