"""AutoAttack's check for dynamic defences ends the tracing of the thread, and with it the measuring of coverage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# Of RobustBench by its companion: the folder tests/robustbench would be found under its own name.
collect_ignore_glob = [] if find_spec("pyautoattack") and find_spec("matplotlib") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _tracing_goes_on() -> Iterator[None]:
    tracer = sys.gettrace()
    yield
    sys.settrace(tracer)
