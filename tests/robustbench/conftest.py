"""AutoAttack's check for dynamic defences ends the tracing of the thread, and with it the measuring of coverage."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _tracing_goes_on() -> Iterator[None]:
    tracer = sys.gettrace()
    yield
    sys.settrace(tracer)
