"""Kill -9 at seeded random times, and resumption: does a run end as the uninterrupted one, bit for bit?

A run may be killed several times. Most points are at a random time of what is left of the run; the others are aimed at
a write: the process tells which file it opens for writing, and is killed within the time that such a write takes.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from campaign import runs
from campaign.comparison import differences
from campaign.record import Outcomes, is_quick
from campaign.runs import Command, Life, live, where_it_fell

AIMED = 0.4  # share of the points that are aimed at a write
EARLY = 0.15  # share of the others that may fall before the first step; the rest is drawn from the training itself
LONGEST_WRITE = 0.006  # in seconds: so long after its beginning a process that is aimed at is killed
MOST_KILLS = 4  # of one run

# name -> the command, long or short, and its points, of which MMPretrain's two configs share 20
COMMANDS: dict[str, tuple[Callable[[Path, bool], Command], int]] = {
    "torchdistill": (lambda work, quick: runs.torchdistill(work, 2 if quick else 6), 20),
    "mmpretrain distill_ikl": (lambda work, quick: runs.mmpretrain(work, "distill_ikl", 2 if quick else 6), 12),
    "mmpretrain adversarial_ikl": (lambda work, quick: runs.mmpretrain(work, "adversarial_ikl", 2 if quick else 3), 8),
    "evaluation": (lambda work, quick: runs.evaluation(work, 8 if quick else 48), 20),
}


class Whole(NamedTuple):
    """A command and its uninterrupted run."""

    command: Command
    folder: Path
    life: Life
    result: Any


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "points" not in metafunc.fixturenames:
        return
    quick = is_quick(metafunc.config)
    cases = []
    for name, (_, wanted) in COMMANDS.items():
        rng = random.Random(f"{metafunc.config.getoption('campaign_seed', 0)} {name}")
        left, number = 2 if quick else wanted, 0
        while left:
            points = min(left, rng.randint(1, MOST_KILLS))
            cases.append(pytest.param(name, number, points, id=f"{name}-{number}".replace(" ", "-")))
            left, number = left - points, number + 1
    metafunc.parametrize(("whole", "number", "points"), cases, indirect=["whole"], scope="module")


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    work = tmp_path_factory.getbasetemp() / "runs"
    work.mkdir(exist_ok=True)
    command = COMMANDS[request.param][0](work, is_quick(request.config))
    folder = work / request.param.replace(" ", "_") / "whole"
    folder.mkdir(parents=True)
    life = live(command, folder, again=False)
    assert life.code == 0, f"{command.name} does not run:\n{life.output[-3000:]}"
    return Whole(command, folder, life, command.result(folder))


@pytest.mark.campaign
def test_kills(whole: Whole, number: int, points: int, outcomes: Outcomes) -> None:
    name = whole.command.name
    outcomes.fact("seconds of the uninterrupted run", {name: round(whole.life.seconds, 1)})
    kills = attempt = 0
    while kills < points and not outcomes.failures:
        rng = random.Random(f"{outcomes.seed} {name} {number} {attempt}")
        folder = whole.folder.with_name(f"run{number}_{attempt}")
        kills += one_run(outcomes, whole, folder, rng, points - kills)
        attempt += 1
    assert not outcomes.failures


def one_run(outcomes: Outcomes, whole: Whole, folder: Path, rng: random.Random, points: int) -> int:
    """One run from its start to its end, held against the uninterrupted one; returns how often it was killed."""
    command = whole.command
    folder.mkdir(parents=True)
    kills = []
    life = None
    for life, place, aimed in lives(whole, folder, rng, points):
        if life.killed:
            outcomes.count(command.name, [place, "aimed at a write" if aimed else "at a random time"])
            kills.append({"after_seconds": round(life.seconds, 2), "place": place, "aimed": aimed})
    assert life is not None
    if life.code != 0:
        outcomes.count(command.name, ["did not go on"])
        outcomes.fail(command.name, run=folder.name, kills=kills, what="did not go on", output=life.output[-3000:])
        return len(kills)
    found = differences(command.result(folder), whole.result)
    outcomes.count(command.name, ["other result" if found else "runs that end as the uninterrupted one"])
    if found:
        outcomes.fail(command.name, run=folder.name, kills=kills, what="other result", differences=found[:50])
    if command.beside is not None and (other := differences(command.beside(folder), command.beside(whole.folder))):
        outcomes.remark(
            command.name,
            "the killed validation is not repeated: its entry, or the best checkpoint, is missing or half-written",
            {"kills": kills, "differences": other[:5]},
        )
    shutil.rmtree(folder)
    return len(kills)


def lives(whole: Whole, folder: Path, rng: random.Random, kills: int) -> Iterator[tuple[Life, str, bool]]:
    """Processes of one run, each killed but for the one that finishes it; with the place and whether it was aimed."""
    command, _, life_of_whole, _ = whole
    seconds = life_of_whole.seconds
    told = [(at, text) for at, text in life_of_whole.events if command.writes.search(text)]
    begun = told[0][0] if told else seconds
    writes = sum(text.startswith("open ") for _, text in told)
    # About when the training begins, from the time between its writes: reading the output would need a terminal.
    steps = max(0.0, begun - (seconds - begun) / command.parts)
    for number in range(kills):
        safe = command.safe(folder)
        # Random numbers are drawn alike in each case, so that the machine's speed does not decide the later ones.
        aimed, early, share = rng.random() < AIMED, rng.random() < EARLY, rng.random()
        which, delay = rng.randrange(max(1, round(writes * (1 - safe)))), rng.uniform(0, LONGEST_WRITE)
        if aimed:
            life = live(command, folder, again=number > 0, kill_in_write=(which, delay))
        else:
            first = 0.0 if early else steps
            expected = begun + (seconds - begun) * (1 - safe)
            life = live(command, folder, again=number > 0, kill_after=max(0.05, first + share * (expected - first)))
        yield life, where_it_fell(command, life, safe > 0) if life.killed else "", aimed
        if not life.killed:
            return
    yield live(command, folder, again=kills > 0), "", False
