"""Options and fixtures of the campaign; see record.py for what is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from campaign.record import Outcomes, Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign")
    group.addoption("--campaign-record", metavar="FOLDER", help="write outcomes and tables there, and go on from them")
    group.addoption("--campaign-size", choices=("full", "quick"), default="full", help="quick: few cases of each part")
    group.addoption("--campaign-seed", type=int, default=0, help="of everything that is drawn (default: 0)")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("campaign_record", None)
    if folder is not None and not hasattr(config, "workerinput"):  # processes of pytest-xdist report to the first one
        size, seed = config.getoption("campaign_size"), config.getoption("campaign_seed")
        config.pluginmanager.register(Recorder(Path(folder), {"seed": seed, "quick": size == "quick"}))


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return Outcomes(request.node)
