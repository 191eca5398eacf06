"""Generated inputs: the right number within the dtype's tolerance, or a refusal that names the argument.

A refusal is a ValueError or a TypeError.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from campaign.inputs import SHARES, SUBJECTS, Case
from campaign.record import Outcomes
from ikl_plugins import native

COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=400, **COMMON)
settings.register_profile("campaign", max_examples=10_000, **COMMON)


def judge(case: Case) -> str:
    """The outcome of a case; a failure is an AssertionError, or the package's own where that is no refusal."""
    try:
        found = case.call()
    except (ValueError, TypeError) as error:
        if not case.names:
            raise AssertionError("refused what is right") from error
        if not any(re.search(rf"\b{name}\b", str(error)) for name in case.names):
            raise AssertionError(f"refused without a name: it must name {' or '.join(case.names)}") from error
        return f"{type(error).__name__} that names the argument"
    assert not case.names, f"accepted what is wrong: {' or '.join(case.names)} must be refused"
    assert found is not None
    return found


def examine(subject: str, profile: str, *, start: int = 0, shrink: bool = True) -> Counter[str]:
    """Judges a subject's share of a profile's examples; returns their outcomes."""
    found: Counter[str] = Counter()
    chosen = settings.get_profile(profile)
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(start)
    @settings(chosen, max_examples=round(chosen.max_examples * SHARES[subject]), phases=phases)
    @given(case=SUBJECTS[subject])
    def examples(case: Case) -> None:
        note(case.what)
        found[judge(case)] += 1

    examples()
    return found


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_few_inputs(subject: str) -> None:
    found = examine(subject, "few")
    # What Hypothesis draws depends on the modules that are loaded, and a subject has as few as 16 examples here.
    assert found["right number"] >= 4
    assert any("that names the argument" in outcome for outcome in found)


@pytest.mark.campaign
@pytest.mark.parametrize("subject", SUBJECTS)
def test_inputs(subject: str, outcomes: Outcomes) -> None:
    native.disable()  # whatever the environment says: what is tried is the losses' own way
    outcomes.count(subject, examine(subject, outcomes.profile, start=outcomes.seed))


@pytest.mark.campaign
@pytest.mark.parametrize("subject", SUBJECTS)
def test_inputs_native(subject: str, outcomes: Outcomes, operator_calls: list[int]) -> None:
    """The same with the losses' C++ operator; what it does not serve goes the usual way."""
    outcomes.count(subject, examine(subject, outcomes.profile, start=outcomes.seed))
    outcomes.fact("calls of the operator", {subject: operator_calls[0]})
    assert operator_calls[0] or subject in ("DKLLoss", "ClassPrior", "PGD"), "the operator was not called"


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Losses with the operator, which is built if need be; the only entry of the list counts its calls."""
    try:
        native.build()
    except RuntimeError as error:
        pytest.skip(f"no C++ operator here: {error}")
    native.enable()
    operator = native.operator()
    calls = [0]

    def counted(*arguments: object, **more: object) -> object:
        calls[0] += 1
        return operator(*arguments, **more)

    monkeypatch.setattr(native, "_operator", counted)
    yield calls
    native.disable()
