"""Kill -9 at seeded random times, and resumption: does a run end as the uninterrupted one, bit for bit?

A run may be killed several times. Most points are at a random time of what is left of the run; the others are aimed at
a write: the process tells which file it opens for writing, and is killed within the time that such a write takes, or
kills itself before it renames a file. Commands that write at once are killed before each rename. Other runs are stopped
by Ctrl-C. A second process that is started on the same folder is refused, and the first one ends as if it were alone.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from campaign import runs
from campaign.comparison import differences
from campaign.record import Outcomes, is_quick
from campaign.runs import Command, Life, live, where_it_fell
from campaign.writers import WRITERS

AIMED = 0.4  # share of the points that are aimed at a write
RENAMED = 0.5  # of these the share at its end
CTRL_C = 2  # runs of each command
EARLY = 0.15  # share of the others that may fall before the first step; the rest is drawn from the training itself
LONGEST_WRITE = 0.006  # in seconds: so long after its beginning a process that is aimed at is killed
MOST_KILLS = 4  # of one run
START = 0.5  # seconds that a command takes from its first line to where it hears of Ctrl-C
ENDS, REFUSED = "runs that end as the uninterrupted one", "second writers refused"
AT_ONCE = ("ikl submit", "ikl data", "ikl adopt", "ikl rank")

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
    shutil.rmtree(folder, ignore_errors=True)  # of the same command in another test
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
    for life, place, how in lives(whole, folder, rng, points):
        if not life.stopped:
            continue
        outcomes.count(command.name, [place, how])
        kills.append({"after_seconds": round(life.seconds, 2), "place": place, "how": how})
    assert life is not None
    if life.code != 0:
        outcomes.count(command.name, ["did not go on"])
        outcomes.fail(command.name, run=folder.name, kills=kills, what="did not go on", output=life.output[-3000:])
        return len(kills)
    found = differences(command.result(folder), whole.result)
    outcomes.count(command.name, ["other result" if found else ENDS])
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


def lives(whole: Whole, folder: Path, rng: random.Random, kills: int) -> Iterator[tuple[Life, str, str]]:
    """Processes of one run, each stopped but for the one that finishes it; with the place, and how it was stopped."""
    command, _, life_of_whole, _ = whole
    seconds = life_of_whole.seconds
    told = [(at, text) for at, text in life_of_whole.events if command.writes.search(text)]
    begun = told[0][0] if told else seconds
    writes, renames = (sum(text.startswith(kind) for _, text in told) for kind in ("open ", "rename "))
    # About when the training begins, from the time between its writes: reading the output would need a terminal.
    steps = max(0.0, begun - (seconds - begun) / command.parts)
    for number in range(kills):
        safe = command.safe(folder)
        # Random numbers are drawn alike in each case, so that the machine's speed does not decide the later ones.
        aimed, early, share = rng.random() < AIMED, rng.random() < EARLY, rng.random()
        left, delay = rng.random(), rng.uniform(0, LONGEST_WRITE)
        which, renamed = (int(left * max(1, round(count * (1 - safe)))) for count in (writes, renames))
        at_rename, _ = rng.random() < RENAMED, rng.random()
        how = "aimed at a write" if aimed else "at a random time"
        if aimed and at_rename:
            life = live(command, folder, again=number > 0, kill_at_rename=renamed)
        elif aimed:
            life = live(command, folder, again=number > 0, kill_in_write=(which, delay))
        else:
            first = 0.0 if early else steps
            expected = begun + (seconds - begun) * (1 - safe)
            after = max(0.05, first + share * (expected - first))
            life = live(command, folder, again=number > 0, kill_after=after)
        yield life, where_it_fell(command, life, safe > 0) if life.stopped else "", how
        if not life.stopped:
            return
    yield live(command, folder, again=kills > 0), "", ""


@pytest.mark.campaign
@pytest.mark.parametrize("whole", COMMANDS, indirect=True, scope="module")
def test_kills_ctrl_c(whole: Whole, outcomes: Outcomes) -> None:
    """Ctrl-C at a random time ends a command with the exit code 130 and one line, and it goes on."""
    command = whole.command
    begin = next(at for at, text in whole.life.events if text == "begin") + START
    for number in range(1 if outcomes.quick else CTRL_C):
        rng = random.Random(f"{outcomes.seed} {command.name} Ctrl-C {number}")
        folder = whole.folder.with_name(f"ctrl_c{number}")
        folder.mkdir()
        life = live(command, folder, again=False, kill_after=rng.uniform(begin, whole.life.seconds), interrupt=True)
        # Once all is written Python takes itself down, and dies of SIGINT as of old.
        ended = not life.interrupted or (life.code == -signal.SIGINT and command.safe(folder) == 1)
        unclear = None if ended else runs.judge_interrupt(life)
        last = live(command, folder, again=True)
        found = [f"ended with {last.code}"] if last.code else differences(command.result(folder), whole.result)
        outcomes.count(command.name, [] if ended else ["by Ctrl-C"])
        outcomes.count(command.name, ["other result" if found else ENDS])
        if unclear or found:
            what = f"Ctrl-C: {unclear}, {found[:20]}"
            outcomes.fail(command.name, number=number, what=what, output=life.output[-2000:], last=last.output[-1000:])
    assert not outcomes.failures


@pytest.mark.campaign
@pytest.mark.parametrize("whole", COMMANDS, indirect=True, scope="module")
def test_kills_second_writer(whole: Whole, outcomes: Outcomes) -> None:
    """A second process on the folder of a run ends with one line that names the folder and the first process."""
    command, folder = whole.command, whole.folder.with_name("two")
    folder.mkdir()
    others: list[Life] = []
    life = live(
        command,
        folder,
        again=False,
        meanwhile=lambda: others.append(live(command, folder, again=False, log="second")),
    )
    (second,) = others
    what, found = judge_second(second, folder), differences(command.result(folder), whole.result)
    outcomes.count(command.name, [what])
    if what != REFUSED or life.code or found:
        outcomes.fail(command.name, what=what, code=life.code, differences=found[:20], output=second.output[-2000:])
    assert not outcomes.failures


def judge_second(life: Life, folder: Path) -> str:
    lines = [line for line in life.output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    clear = life.code == 1 and last.startswith("error: ") and "Traceback" not in life.output
    return REFUSED if clear and folder.name in last and "process " in last else "second writer: not refused"


@pytest.mark.campaign
@pytest.mark.parametrize("name", AT_ONCE)
def test_kills_at_renames(name: str, tmp_path: Path, outcomes: Outcomes) -> None:
    """A command that replaces what it wrote before, killed before each of its renames and started again."""
    command, folder = WRITERS[name](tmp_path), tmp_path / "run"
    command.writes = re.compile(re.escape(str(tmp_path)))

    def run(*, number: int = -1) -> Life:
        return live(command, folder, again=True, kill_at_rename=number)

    folder.mkdir()
    lives = [run(), run()]
    assert not any(life.code for life in lives), f"{name} does not run:\n{lives[-1].output[-3000:]}"
    renames = sum(text.startswith(f"rename {tmp_path}") for _, text in lives[-1].events)
    result = command.result(folder)
    for number in range(1 if outcomes.quick else renames):
        shutil.rmtree(folder)
        folder.mkdir()
        run()
        killed, last = run(number=number), run()
        found = [] if last.code else differences(command.result(folder), result)
        found += [f"{path.name} is left" for path in tmp_path.rglob("*partial*")]
        right = killed.killed and not last.code and not found
        outcomes.count(name, ["before a rename", ENDS if right else "other result"])
        if not right:
            what = "did not go on" if last.code else "other result"
            outcomes.fail(name, number=number, what=what, differences=found[:20], output=last.output[-2000:])
    assert not outcomes.failures
