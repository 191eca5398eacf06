"""What the checks found."""

from __future__ import annotations

import json
from dataclasses import dataclass

__all__ = ["Check", "Preflight"]

WORDS = {True: "pass", False: "FAIL", None: "not checked"}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: one of :data:`~ikl_plugins.robustbench.preflight.CHECKS`.
        passed: None where the check could not be made.
        why: what was found, or what was missing, as sentences.
    """

    name: str
    passed: bool | None
    why: str


@dataclass(frozen=True)
class Preflight:
    """The checks, in the order of :data:`~ikl_plugins.robustbench.preflight.CHECKS`."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; those that could not be made are in :attr:`unchecked`."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(found.name for found in self.checks if found.passed is False)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Names of the checks that could not be made."""
        return tuple(found.name for found in self.checks if found.passed is None)

    def __getitem__(self, name: str) -> Check:
        return next(found for found in self.checks if found.name == name)

    def markdown(self) -> str:
        """The checks as a Markdown page."""
        verdict = "passed" if self.passed else f"FAILED: {', '.join(self.failed)}"
        lines = [f"# Preflight: {verdict}", ""]
        if self.unchecked:
            lines += [f"Not checked: {', '.join(self.unchecked)}.", ""]
        lines += ["| check | result | why |", "| --- | --- | --- |"]
        for found in self.checks:
            why = " ".join(found.why.replace("|", "\\|").split())
            lines.append(f"| {found.name} | {WORDS[found.passed]} | {why} |")
        return "\n".join([*lines, ""])

    def to_json(self) -> str:
        """The checks as JSON text: ``passed`` and ``checks``, a list of ``name``, ``passed`` (null) and ``why``."""
        checks = [{"name": found.name, "passed": found.passed, "why": found.why} for found in self.checks]
        return json.dumps({"passed": self.passed, "checks": checks}, indent=2)
