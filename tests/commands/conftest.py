"""Command lines of ``ikl``, run in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from ikl_plugins.commands.main import main


class Done(NamedTuple):
    """What a command has printed, and what it ended with: None, a number or the line of its error."""

    out: str
    err: str
    status: int | str | None


@pytest.fixture
def ikl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``ikl("adopt", path, "--check")`` runs the command and returns what came of it."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "path", list(sys.path))
        status = None
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return Done(*capsys.readouterr(), status)

    return run
