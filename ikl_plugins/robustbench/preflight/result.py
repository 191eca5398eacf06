"""What the checks found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..._limits import one_line
from ..tables import markdown_text

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
    """What all checks found.

    Attributes:
        checks: in the order of :data:`~ikl_plugins.robustbench.preflight.CHECKS`.
        data: what they judged by: ``name``, ``sha256``, ``n_examples``, ``preprocessing`` and ``natural_accuracy``, in
            percent; None where there were no labels or no logits.
        warnings: sentences on what is no failure, but rarely meant.
        obstacle: why RobustBench would not take a network of this class; None if nothing is known.
    """

    checks: tuple[Check, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    obstacle: str | None = None

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

    def __str__(self) -> str:
        return self.markdown()

    @property
    def judged_by(self) -> str:
        """The data and the natural accuracy on them, as a sentence."""
        if not self.data:
            return "Not said by which images."
        accuracy = self.data["natural_accuracy"]
        natural = "natural accuracy not known" if accuracy is None else f"natural accuracy {accuracy:.2f} %"
        of = f" of {self.data['name']}" if self.data["name"] else ", not named"
        return f"Judged by {self.data['n_examples']:,} images{of} (sha256 {self.data['sha256'][:12]}): {natural}."

    def markdown(self) -> str:
        """The checks as a Markdown page."""
        verdict = "passed" if self.passed else f"FAILED: {', '.join(self.failed)}"
        lines = [f"# Preflight: {verdict}", "", markdown_text(self.judged_by), ""]
        lines += [line for text in self.warnings for line in (f"**Warning: {markdown_text(text)}**", "")]
        if self.obstacle:
            lines += [f"It cannot be submitted to RobustBench: {self.obstacle}", ""]
        if self.unchecked:
            lines += [f"Not checked: {', '.join(self.unchecked)}.", ""]
        lines += ["| check | result | why |", "| --- | --- | --- |"]
        for found in self.checks:
            why = one_line(found.why).replace("|", "\\|")
            lines.append(f"| {found.name} | {WORDS[found.passed]} | {why} |")
        return "\n".join([*lines, ""])

    def to_json(self) -> str:
        """As JSON text: ``checks``, a list of ``name``, ``passed`` and ``why``, and the other attributes."""
        checks = [{"name": found.name, "passed": found.passed, "why": found.why} for found in self.checks]
        rest = {"data": dict(self.data), "warnings": list(self.warnings), "obstacle": self.obstacle}
        return json.dumps({"passed": self.passed, "checks": checks, **rest}, indent=2)
