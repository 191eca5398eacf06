"""The campaign finds what it looks for: each test plants a fault, in a loss, a reader, a run, a writer or a message."""

from __future__ import annotations

import json
import os
import random
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ikl_plugins
from campaign import odd_files as odd
from campaign import test_checkpoints as checkpoints
from campaign import test_configs as configs
from campaign import test_disk as disk
from campaign import test_kills as kills
from campaign.comparison import differences
from campaign.in_child_process import Answer, in_child_process
from campaign.mutations import Mutation
from campaign.readers import Reader
from campaign.record import PARTS, ROOT, SOURCES, Outcomes, Recorder
from campaign.runs import Command, Life, judge_interrupt, live
from campaign.tables import tables
from campaign.test_inputs import examine
from ikl_plugins import ClassPrior, _validation
from ikl_plugins.adversarial import PGD

# --- inputs ----------------------------------------------------------------------------------------------------------

LOSS, GKL = ikl_plugins.ikl_loss, ikl_plugins.gkl_loss


def half_a_gradient(*args: Any, **keys: Any) -> Any:
    found = LOSS(*args, **keys)
    return 0.5 * found + 0.5 * found.detach()


def refusing_by(answer: Callable[[Exception], Any]) -> Callable[..., Any]:
    def loss(*args: Any, **keys: Any) -> Any:
        try:
            return LOSS(*args, **keys)
        except (ValueError, TypeError) as error:
            return answer(error)

    return loss


def raising(error: Exception) -> Any:
    raise error


BROKEN: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "value off by 1e-3": (lambda *a, **k: LOSS(*a, **k) * (1 + 1e-3), AssertionError, "loss: error"),
    "half a gradient": (half_a_gradient, AssertionError, "gradient: error"),
    "dtype": (lambda *a, **k: LOSS(*a, **k).double(), AssertionError, "loss of torch.float64"),
    "shape": (lambda *a, **k: LOSS(*a, **k).reshape(-1), AssertionError, r"loss of \S+ \(1,\)"),
    "hides NaN": (lambda *a, **k: LOSS(*a, **k).nan_to_num(), AssertionError, "is finite where"),
    "accepts": (refusing_by(lambda _: torch.zeros(())), AssertionError, "accepted what is wrong"),
    "nameless": (refusing_by(lambda e: raising(type(e)("no name"))), AssertionError, "refused without a name"),
    "crashes": (refusing_by(lambda e: raising(KeyError(str(e)))), KeyError, "must"),
    "refuses": (lambda *a, **k: raising(ValueError("no")), AssertionError, "refused"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_loss_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, error, message = BROKEN[name]
    monkeypatch.setattr(ikl_plugins, "ikl_loss", loss)
    with pytest.raises(error, match=message):
        examine("ikl_loss", "campaign", shrink=False)


def gkl_of_small_powers(student: Any, teacher: Any, *, gamma: float = 1.0, **keys: Any) -> Any:
    """As where the squared mass of the weights' powers underflows."""
    found = GKL(student, teacher, gamma=gamma, **keys)
    return found + torch.inf if gamma > 10 and found.dtype == torch.float32 else found


# what is broken, the subject that must find it, and in what words
UNDONE = {
    "GKL of a large gamma": (
        "gkl_loss",
        lambda patch: patch.setattr(ikl_plugins, "gkl_loss", gkl_of_small_powers),
        "loss",
    ),
    "odd tensors": ("ikl_loss", lambda patch: patch.setattr(_validation, "_check_dense", lambda *_: None), "."),
    "odd labels": ("IKLLoss", lambda patch: patch.setattr(_validation, "_check_dense", lambda *_: None), "."),
    "casts": ("ClassPrior", lambda patch: patch.setattr(ClassPrior, "_apply", torch.nn.Module._apply), "."),
}


@pytest.mark.parametrize("name", UNDONE)
def test_a_check_that_is_gone_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, plant, words = UNDONE[name]
    plant(monkeypatch)
    with pytest.raises(Exception, match=words):  # torch's own errors are of every kind
        examine(subject, "campaign", shrink=False)


def test_a_class_prior_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassPrior, "end_epoch", lambda prior: None)
    for subject, what in (("ClassPrior", "matrix"), ("IKLLoss", "class prior of epoch 1")):
        with pytest.raises(AssertionError, match=what):
            examine(subject, "few", shrink=False)


@pytest.mark.parametrize(("off", "what"), [(0.5, "outside"), (-1e-6, "not close|outside")])
def test_an_attack_that_is_off_is_found(off: float, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = PGD.__call__
    monkeypatch.setattr(PGD, "__call__", lambda self, model, images, **keys: attack(self, model, images, **keys) + off)
    with pytest.raises(AssertionError, match=what):
        examine("PGD", "campaign", shrink=False)


# --- files -----------------------------------------------------------------------------------------------------------


def nameless(path: Path) -> Any:
    if path.name == "sound.pth":
        return {}
    raise ValueError("damaged") if path.exists() else KeyError(str(path))


ODD = ("a FIFO", "zip: grows to 200 MB", "zip: encrypted", "a weight: sparse", "a key: 3", "a pickle: protocol 9")
# a reader, the kind of files that it fails on, what is said of it, and of how many files at least
BAD_READERS: dict[str, tuple[Callable[[Path], Any], str, dict[str, int]]] = {
    # Not by members that torch does not read, nor by archives of NumPy.
    "runs code": (lambda path: torch.load(path, weights_only=False), "code", {"the code ran": 35}),
    "no checksums": (lambda path: torch.load(path, weights_only=True), "flipped", {"read, with other content": 1}),
    "takes all": (
        lambda path: torch.load(path, weights_only=True),
        "odd",
        {
            "the process hung": 1,
            "the process grew": 1,
            "read, with other content": 2,
            "another error": 1,
        },
    ),
    **dict.fromkeys(
        ("nameless", "nameless config"),
        (nameless, "other file", {"refused without the file's name": 12, "another error": 1}),
    ),
}


@pytest.mark.parametrize("name", BAD_READERS)
def test_a_bad_reader_is_found(name: str, tmp_path: Path, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    read, changed, said = BAD_READERS[name]
    monkeypatch.setitem(checkpoints.FEW, "flipped", 12)
    monkeypatch.setattr(checkpoints, "TIMEOUT", 5.0)
    cases, path = tmp_path / "cases", tmp_path / "sound.pth"
    cases.mkdir()
    torch.save({"weight": torch.ones(3, 100)}, path)
    for module in (checkpoints, odd):
        monkeypatch.setattr(module, "TOO_LARGE", 40 * 2**20)
    every = odd.odd_files(path) if changed == "odd" else {}
    monkeypatch.setattr(checkpoints, "odd_files", lambda _: {name: every[name] for name in ODD})
    sound = checkpoints.Sound(name, Reader(path, read, fills=True, text="config" in name), read(path), cases)
    with pytest.raises(AssertionError):
        checkpoints.test_checkpoints(sound, changed, outcomes)
    found = [failure["what"] for failure in outcomes.failures]
    assert all(found.count(what) >= times for what, times in said.items()), found


def test_what_becomes_of_a_child_process() -> None:
    answer = in_child_process(lambda tell: tell(("step", 1)) or torch.ones(2), 5.0)
    assert (answer.how, answer.told, answer.value.tolist()) == ("returned", [("step", 1)], [1, 1])
    assert in_child_process(lambda _: {}["a"], 5.0).value[:2] == ("KeyError", "'a'")
    assert in_child_process(lambda tell: (tell(1), os.kill(os.getpid(), 9)), 5.0) == Answer("died", None, [1])
    assert in_child_process(lambda tell: (tell(1), time.sleep(60)), 0.5) == Answer("hung", None, [1])


# --- kills -----------------------------------------------------------------------------------------------------------

WORKER = """
    import os, sys, time
    from pathlib import Path
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    state = folder / "state.txt"
    done = int(state.read_text()) if state.exists() else 0
    total = 0 if mode == "forgets" else sum(range(done))
    for number in range(done, 6):
        time.sleep(0.05)
        total += number
        print("step", number, flush=True)
        aside = state.with_name("state.partial")
        with open(aside, "w") as file:
            file.write(str(number + 1))
            time.sleep(0.05)
        os.replace(aside, state)
    (folder / "result.txt").write_text(str(total))
"""


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> kills.Whole:
    """The uninterrupted run of a worker that resumes right, or forgets what it had."""
    (tmp_path / "resuming_worker.py").write_text(textwrap.dedent(WORKER))
    command = Command(
        "worker",
        lambda folder, again: ["-m", "resuming_worker", str(folder), request.param],
        writes=re.compile(r"state\.(partial|txt)"),
        begun=re.compile("step"),
        finished=lambda folder: int((folder / "state.txt").read_text()) / 6 if (folder / "state.txt").exists() else 0,
        result=lambda folder: (folder / "result.txt").read_text(),
        parts=6,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    (tmp_path / "whole").mkdir()
    life = live(command, tmp_path / "whole", again=False)
    return kills.Whole(command, tmp_path / "whole", life, command.result(tmp_path / "whole"))


@pytest.mark.parametrize(("whole", "said"), [("right", set()), ("forgets", {"other result"})], indirect=["whole"])
def test_a_run_that_resumes_wrong_is_found(
    whole: kills.Whole, said: set[str], outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills, "AIMED", 1.0)  # kills that fall into the run however busy the machine is
    of_runs = [whole.folder.with_name(f"run{number}") for number in range(3)]
    assert sum(kills.one_run(outcomes, whole, folder, random.Random(folder.name), 3) for folder in of_runs) >= 4
    assert whole.result == "15"
    assert {failure["what"] for failure in outcomes.failures} == said


# exit code and output of a process that got Ctrl-C, or that was the second one on a folder; what is said of it
STOPPED = [
    (130, "Epoch 1\ninterrupted; run it again\n", None),
    (1, "interrupted; run it again\n", "ended with 1"),
    (130, "Traceback (most recent call last):\nKeyboardInterrupt\ninterrupted; run it again\n", "a traceback"),
    (130, "\n", "no clear line at the end"),
]
HELD = "error: ikl train: /runs/two must have one process that writes it, but process 7 on host does. Wait for it.\n"
SECOND = [(1, HELD, True), (0, HELD, False), (1, "error: no\n", False), (1, f"Traceback\n{HELD}", False)]


def ended(code: int, output: str) -> Life:
    return Life(1.0, code, [], output, killed=False, interrupted=True)


def test_a_process_that_ends_badly_is_found() -> None:
    assert [judge_interrupt(ended(code, output)) for code, output, _ in STOPPED] == [why for *_, why in STOPPED]
    found = [kills.judge_second(ended(code, output), Path("/runs/two")) == kills.REFUSED for code, output, _ in SECOND]
    assert found == [right for *_, right in SECOND]


SAME = {"a": torch.tensor([1.0, float("nan")]), "b": [1, {"c": np.zeros(2)}], "d": SimpleNamespace(e=float("nan"))}
DIFFERENT = [
    ({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}, ".a"),
    ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0).double()}, ".a"),
    ({"a": 1}, {"a": 1, "b": 2}, ".b (one side alone)"),
    ([1, 2], [1], " (lengths 2 and 1)"),
    ({"b": [1, {"c": np.zeros(2)}]}, {"b": [1, {"c": np.ones(2)}]}, ".b[1].c"),
    (True, 1, "(whole)"),
]


@pytest.mark.parametrize(("ours", "theirs", "where"), DIFFERENT, ids=[where for _, _, where in DIFFERENT])
def test_results_that_differ_are_found(ours: Any, theirs: Any, where: str) -> None:
    assert differences(ours, theirs) == [where]
    assert differences(ours, ours) == differences(SAME, SAME) == []


# --- disks -----------------------------------------------------------------------------------------------------------


WRITES = """
    import sys
    from pathlib import Path
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    file = folder / "a.json"
    if mode == "cuts":
        file.write_text('{"whole"')
    elif mode == "leaves":
        (folder / ".a.7.partial.json").write_text("{}")
    elif mode == "removes":
        file.unlink()
    sys.exit(f"error: no space: {file}")
"""
# mode -> what is wrong with it
WRONG = {
    "careful": [],
    "cuts": ["a.json has changed"],
    "leaves": [".a.7.partial.json is left"],
    "removes": ["a.json is lost"],
}


@pytest.mark.parametrize("mode", WRONG)
@pytest.mark.parametrize(("step", "goes_on"), [("full", True), ("full", False), ("read-only", False)])
def test_a_writer_that_loses_files_is_found(mode: str, step: str, goes_on: bool, tmp_path: Path) -> None:
    script, folder = tmp_path / "writes.py", tmp_path / "disk" / "run"
    script.write_text(textwrap.dedent(WRITES))
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    finished = (lambda folder: 1.0) if goes_on else None
    writer = Command(mode, lambda folder, _: [str(script), str(folder), mode], lambda folder: None, finished=finished)
    outcome, failure = disk.Story(writer, folder, tmp_path).fails_well(step, disk.Ended(None, 0, {}))
    assert outcome == f"{step}: {'files' if WRONG[mode] else disk.FINE}"
    found = [] if failure is None else failure["files"]
    assert found == [line.replace("is left", "is new") if step == "read-only" else line for line in WRONG[mode]]


LOGGED = "--- Logging error ---\nTraceback (most recent call last):\n  x\nMessage: 'm'\nArguments: ()\n"
ENDS = [
    (1, "some lines\nerror: No space left on device: '/disk/a.pt'\n", None),
    (0, "done\n", "it ran to its end"),
    (-9, "", "ended by signal 9"),
    (1, "Traceback (most recent call last):\nOSError: 28 /disk\n", "no clear line at the end"),
    (1, "error: No space left on device\n", "the line names no path on the disk"),
    (1, f"{LOGGED}Traceback (most recent call last):\nerror: '/disk/a'\n", "a traceback"),
]


@pytest.mark.parametrize(("code", "output", "why"), ENDS, ids=[str(why) for _, _, why in ENDS])
def test_an_error_that_is_not_clear_is_found(code: int, output: str, why: str | None) -> None:
    assert disk.judge_error(code, output, Path("/disk")) == why


# --- configs ---------------------------------------------------------------------------------------------------------


OUT_OF_RANGE = Mutation("out of range", ("train", "num_epochs"), 3, -1)
MISSPELT = Mutation("misspelt key", ("model", "depth"), "depth", "dpeth")
STEPS = [(1, 0.5), (2, 0.4)]
HOST, US = "/lib/ikl_plugins/torchdistill.py", SOURCES / "losses.py"


def raised(message: str, by: Path | str, steps: Any = ()) -> Answer:
    return Answer("raised", ("ValueError", message, f'  File "{by}", line 3, in run\n'), list(steps))


# outcome, whether the key is ours, what was changed, what came of it
VERDICTS = [
    ("trains", True, OUT_OF_RANGE, Answer("returned", None, STEPS)),
    ("trains; the host ignores the key", False, MISSPELT, Answer("returned", None, STEPS)),
    ("the misspelt key is ours and ignored", True, MISSPELT, Answer("returned", None, STEPS)),
    ("refused by us", True, OUT_OF_RANGE, raised("`num_epochs` must be", US)),
    ("refused by us without a name", True, OUT_OF_RANGE, raised("bad", US)),
    ("refused by the host without a name", False, OUT_OF_RANGE, raised("bad", HOST)),
    ("the first loss is not finite", True, OUT_OF_RANGE, Answer("returned", None, [(1, float("nan"))])),
    ("trains until the loss is not finite", True, OUT_OF_RANGE, Answer("returned", None, [*STEPS, (3, float("inf"))])),
    ("hung", True, OUT_OF_RANGE, Answer("hung", None, [])),
]


@pytest.mark.parametrize(("outcome", "ours", "mutation", "answer"), VERDICTS)
def test_what_is_said_of_a_mutant(outcome: str, ours: bool, mutation: Mutation, answer: Answer) -> None:
    assert configs.judge(mutation, answer, ours=ours)[0] == outcome


CHANGED = ("model", "beta")
# outcome, the change, what came of it
RESUMED = [
    (configs.RESUMES, (), Answer("returned", None, STEPS)),
    ("does not go on", (), raised("`beta` must be", US)),
    (configs.REFUSED, CHANGED, raised("others are model.beta (was 1, is 2)", US)),
    ("another setting is not seen", CHANGED, Answer("returned", None, STEPS)),
    ("another error", CHANGED, raised("others", US)),
    ("another error", CHANGED, raised("model.beta", US, STEPS)),
]


@pytest.mark.parametrize(("outcome", "path", "answer"), RESUMED)
def test_what_is_said_of_a_resumed_run(outcome: str, path: tuple[str, ...], answer: Answer) -> None:
    assert configs.judge_resumed(answer, path)[0] == outcome


# --- the record ------------------------------------------------------------------------------------------------------

ONE, OTHER = (f"tests/campaign/test_kills.py::test_kills[a-{number}]" for number in range(2))


def test_the_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def report(test: str, outcome: str, *entries: dict[str, Any]) -> Any:
        found = {"nodeid": test, "when": "call", "outcome": outcome, "failed": outcome == "failed", "duration": 1.0}
        properties = [("campaign", entry) for entry in entries]
        return SimpleNamespace(**found, user_properties=properties, longreprtext="what went wrong")

    counts = {"kind": "counts", "group": "a", "counts": {"inside a write": 2}}
    first = Recorder(tmp_path, {"seed": 0, "quick": False})
    first.pytest_runtest_logreport(report(ONE, "passed", counts, {"kind": "fact", "name": "n", "value": 1}))
    first.pytest_runtest_logreport(report(OTHER, "failed"))
    assert [failure["detail"] for failure in first.merged()["parts"]["kills"]["failures"]] == ["what went wrong"]

    second = Recorder(tmp_path, {"seed": 0, "quick": False})
    items: Any = [SimpleNamespace(nodeid=test, get_closest_marker=lambda _: True) for test in (ONE, OTHER)]
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    second.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == [OTHER]  # what failed is tried again
    second.pytest_runtest_logreport(report(OTHER, "passed", counts))
    part = second.merged()["parts"]["kills"]
    assert (part["finished"], part["failures"], part["facts"]) == (True, [], {"n": 1})
    assert part["counts"] == {"a": {"inside a write": 4}}
    with pytest.raises(pytest.UsageError, match="settings"):
        Recorder(tmp_path, {"seed": 1, "quick": False})


def test_the_docs_show_the_record_which_has_what_was_asked_and_no_failures() -> None:
    kept = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert [part for part, shown in tables(kept).items() if shown not in text] == []
    assert set(kept["parts"]) == set(PARTS)
    for part, content in kept["parts"].items():
        assert content["failures"] == []
        assert content["finished"] or part == "kills"  # which takes longest; the page says it
        assert content["settings"] == {"seed": 0, "quick": False}
    cases = {
        part: {group: sum(found.values()) for group, found in kept["parts"][part]["counts"].items()} for part in PARTS
    }
    assert sum(cases["inputs"].values()) == sum(cases["inputs_native"].values()) == 10_000
    assert (cases["configs"]["torchdistill"], cases["configs"]["mmpretrain"]) == (200, 200)
    assert sum(cases["disk"].values()) == 96
    stops = ("aimed at a write", "at a random time", "by Ctrl-C", "before a rename")
    assert sum(found.get(how, 0) for found in kept["parts"]["kills"]["counts"].values() for how in stops) >= 40
