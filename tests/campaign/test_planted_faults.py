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
from campaign import test_checkpoints as checkpoints
from campaign import test_configs as configs
from campaign import test_disk as disk
from campaign import test_kills as kills
from campaign.comparison import differences, half_written
from campaign.in_child_process import Answer, in_child_process
from campaign.mutations import KINDS, Mutation, mutate, yaml_text, yaml_tree
from campaign.readers import Reader
from campaign.record import PARTS, ROOT, SOURCES, Outcomes, Recorder
from campaign.runs import Command, live
from campaign.tables import tables
from campaign.test_inputs import examine
from campaign.writers import Writer
from ikl_plugins import ClassPrior
from ikl_plugins.adversarial import PGD

Loss = Callable[..., Any]


# --- inputs ----------------------------------------------------------------------------------------------------------


def detached(loss: Loss) -> Loss:
    """The value, with half of its gradient."""

    def broken(*args: Any, **keys: Any) -> Any:
        found = loss(*args, **keys)
        return 0.5 * found + 0.5 * found.detach()

    return broken


def on_error(loss: Loss, answer: Callable[[Exception], Any]) -> Loss:
    def broken(*args: Any, **keys: Any) -> Any:
        try:
            return loss(*args, **keys)
        except (ValueError, TypeError) as error:
            return answer(error)

    return broken


def raising(error: Exception) -> Any:
    raise error


BROKEN: dict[str, tuple[Callable[[Loss], Loss], type[Exception], str]] = {
    "value off by 1e-3": (lambda f: lambda *a, **k: f(*a, **k) * (1 + 1e-3), AssertionError, "loss: error"),
    "half a gradient": (detached, AssertionError, "gradient: error"),
    "dtype": (lambda f: lambda *a, **k: f(*a, **k).double(), AssertionError, "loss of torch.float64"),
    "shape": (lambda f: lambda *a, **k: f(*a, **k).reshape(-1), AssertionError, r"loss of \S+ \(1,\)"),
    "hides NaN": (lambda f: lambda *a, **k: f(*a, **k).nan_to_num(), AssertionError, "is finite where"),
    "accepts": (lambda f: on_error(f, lambda _: torch.zeros(())), AssertionError, "accepted what is wrong"),
    "nameless": (lambda f: on_error(f, lambda e: raising(type(e)("no name"))), AssertionError, "without a name"),
    "crashes": (lambda f: on_error(f, lambda e: raising(KeyError(str(e)))), KeyError, "must"),
    "refuses": (lambda f: lambda *a, **k: raising(ValueError("no")), AssertionError, "refused what is right|without a"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_loss_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, error, message = BROKEN[name]
    monkeypatch.setattr(ikl_plugins, "ikl_loss", change(ikl_plugins.ikl_loss))
    with pytest.raises(error, match=message):
        examine("ikl_loss", "campaign", shrink=False)


def forgets(prior: ClassPrior) -> None:
    prior.matrix.fill_(1.0 / prior.num_classes)
    prior.sums.zero_()
    prior.counts.zero_()


def test_a_class_prior_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassPrior, "end_epoch", forgets)
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


def read_by(read: Callable[[Path], Any], changed: str, folder: Path, outcomes: Outcomes) -> list[str]:
    """What the campaign says of a reader."""
    cases, sound = folder / "cases", folder / "sound.pth"
    cases.mkdir()
    torch.save({"weight": torch.ones(300)}, sound)
    with pytest.raises(AssertionError):
        checkpoints.test_checkpoints(
            checkpoints.Sound("it", Reader(sound, read), read(sound), cases), changed, outcomes
        )
    return [failure["what"] for failure in outcomes.failures]


def test_a_reader_that_runs_code_is_found(tmp_path: Path, outcomes: Outcomes) -> None:
    said = read_by(lambda path: torch.load(path, weights_only=False), "code", tmp_path, outcomes)
    # Not by members that torch does not read, nor by archives of NumPy.
    assert said.count("the code ran") >= 35


def test_a_reader_without_checksums_is_found(
    tmp_path: Path, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkpoints.FEW, "flipped", 12)
    said = read_by(lambda path: torch.load(path, weights_only=True), "flipped", tmp_path, outcomes)
    assert "read, with other content" in said


def test_a_reader_that_names_nothing_is_found(tmp_path: Path, outcomes: Outcomes) -> None:
    def read(path: Path) -> Any:
        if path.name == "sound.pth":
            return {}
        raise ValueError("damaged") if path.exists() else KeyError(str(path))

    said = read_by(read, "other file", tmp_path, outcomes)
    assert set(said) == {"refused without the file's name", "another error"}


def test_what_becomes_of_a_child_process() -> None:
    def told(tell: Callable[[Any], None]) -> Any:
        tell(("step", 1))
        return torch.ones(2)

    answer = in_child_process(told, 5.0)
    assert (answer.how, answer.told) == ("returned", [("step", 1)])
    assert torch.equal(answer.value, torch.ones(2))
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
        time.sleep(0.02)
        total += number
        print("step", number, flush=True)
        aside = state.with_name("state.partial")
        with open(aside, "w") as file:
            file.write(str(number + 1))
            time.sleep(0.02)
        os.replace(aside, state)
    (folder / "result.txt").write_text(str(total))
"""


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> kills.Whole:
    """The uninterrupted run of a worker that resumes right, or forgets what it had."""
    (tmp_path / "resuming_worker.py").write_text(textwrap.dedent(WORKER))
    command = Command(
        "worker",
        lambda folder, again: ["resuming_worker", str(folder), request.param],
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


@pytest.mark.parametrize("whole", ["right", "forgets"], indirect=True)
def test_a_run_that_resumes_wrong_is_found(
    whole: kills.Whole, request: pytest.FixtureRequest, outcomes: Outcomes
) -> None:
    assert whole.result == "15"
    counted = 0
    for number in range(4):
        folder = whole.folder.with_name(f"run{number}")
        counted += kills.one_run(outcomes, whole, folder, random.Random(number), 3)
    assert counted >= 4
    wrong = "forgets" in request.node.name
    assert {failure["what"] for failure in outcomes.failures} == ({"other result"} if wrong else set())


@pytest.mark.parametrize("whole", ["right"], indirect=True)
def test_a_process_is_killed_inside_a_write(whole: kills.Whole, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    life = live(whole.command, tmp_path / "run", again=False, kill_in_write=(2, 0.005))
    assert life.killed
    assert (tmp_path / "run" / "state.txt").read_text() == "2"
    assert kills.where_it_fell(whole.command, life, False) == "inside a write"


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


def write_whole(path: Path) -> None:
    """A file as our writers leave it."""
    if path.suffix == ".json":
        path.write_text(json.dumps({"values": [1] * 20}, indent=1) + "\n")
    elif path.suffix == ".npz":
        np.savez(path, image=np.ones((4, 8)), index=np.arange(4))
    elif path.suffix == ".pt":
        torch.save({"a": torch.ones(9)}, path)
    elif path.suffix == ".png":
        from PIL import Image

        Image.fromarray(np.ones((8, 8, 3), "uint8")).save(path)
    else:
        path.write_text("a: 1, and what else there is\n")


@pytest.mark.parametrize("name", ["a.json", "a.npz", "a.pt", "a.png", "a.md", "a.yaml"])
def test_a_file_is_half_written_until_its_last_byte(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_whole(path)
    assert not half_written(path)
    content = path.read_bytes()
    last = len(content) - 1 - (name == "a.json")  # whose last bracket closes it
    for size in (0, 1, len(content) // 2, last):
        path.write_bytes(content[:size])
        assert half_written(path), size
    if name in ("a.npz", "a.pt"):
        path.write_bytes(bytes(len(content) // 3) + content[len(content) // 3 :])
        assert half_written(path)


WRITES = """
    import os, sys
    from pathlib import Path
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    file = folder / "result.txt"
    if mode == "in place":
        file.write_text("ha")
    elif mode == "leaves":
        (folder / ".result.7.partial.txt").write_text("ha")
    elif mode == "removes":
        file.unlink()
    elif mode == "anew":
        file.write_text("whole as well")
    sys.exit(f"error: no space: {file}")
"""
# mode -> what is wrong with it; a run, which may go on until the disk is full, may write a whole file anew
WRONG = {
    "careful": [],
    "in place": ["result.txt has changed"],
    "leaves": [".result.7.partial.txt is left"],
    "removes": ["result.txt is lost"],
    "anew": ["result.txt has changed"],
}


@pytest.mark.parametrize("mode", WRONG)
@pytest.mark.parametrize("step", ["full", "read-only"])
def test_a_writer_that_loses_files_is_found(mode: str, step: str, tmp_path: Path) -> None:
    script = tmp_path / "writes.py"
    script.write_text(textwrap.dedent(WRITES))
    folder = tmp_path / "disk" / "run"
    folder.mkdir(parents=True)
    (folder / "result.txt").write_text("whole")
    writer = Writer(lambda folder, again: [str(script), str(folder), mode], lambda folder: None)
    outcome, failure = disk.Story(writer, folder, tmp_path).fails_well(step, disk.Ended(None, 0, {}))
    assert outcome == f"{step}: {'files' if WRONG[mode] else disk.FINE}"
    found = [] if failure is None else failure["files"]
    assert found == [line.replace("is left", "is new") if step == "read-only" else line for line in WRONG[mode]]


def test_a_run_may_write_a_file_anew_but_not_cut_it(tmp_path: Path) -> None:
    folder = tmp_path / "disk" / "run"
    folder.mkdir(parents=True)
    for content, wrong in (("'{}\\n'", []), ("'{'", ["a.json has changed"])):
        (folder / "a.json").write_text("{}")
        script = tmp_path / "anew.py"
        script.write_text(f"open({str(folder / 'a.json')!r}, 'w').write({content})\nexit('error: {folder}')")
        writer = Writer(lambda folder, again: [str(script)], lambda folder: None, finished=lambda folder: 1.0)  # noqa: B023
        _, failure = disk.Story(writer, folder, tmp_path).fails_well("full", disk.Ended(None, 0, {}))
        assert ([] if failure is None else failure["files"]) == wrong


LOGGED = "--- Logging error ---\nTraceback (most recent call last):\n  x\nMessage: 'm'\nArguments: ()\n"


@pytest.mark.parametrize(
    ("code", "output", "why"),
    [
        (1, "some lines\nerror: No space left on device: '/disk/a.pt'\n", None),
        (1, f"{LOGGED}error: no space: '/disk/a'\n", None),
        (0, "done\n", "it ran to its end"),
        (-9, "", "ended by signal 9"),
        (1, "Traceback (most recent call last):\nOSError: 28 /disk\n", "no clear line at the end"),
        (1, "error: No space left on device\n", "the line names no path on the disk"),
        (1, f"{LOGGED}Traceback (most recent call last):\nerror: '/disk/a'\n", "a traceback"),
    ],
)
def test_an_error_that_is_not_clear_is_found(code: int, output: str, why: str | None) -> None:
    assert disk.judge_error(code, output, Path("/disk")) == why


def test_a_writer_whose_loss_would_not_be_seen_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}\n")
    (tmp_path / "b.md").write_text("no newline")
    assert disk.blind_to(tmp_path, Writer(lambda folder, again: [], lambda folder: None)) == ["b.md"]


# --- configs ---------------------------------------------------------------------------------------------------------


def test_a_mutant_differs_in_one_place_and_is_drawn_again_the_same() -> None:
    text = (ROOT / "configs" / "torchdistill" / "digits" / "ikl.yaml").read_text()
    tree = yaml_tree(text)
    assert yaml_tree(yaml_text(tree)) == tree
    assert yaml_text(tree).count("!import_call") >= 3
    kinds = set()
    for number in range(60):
        (changed, mutation), (again, same) = (mutate(tree, np.random.default_rng([0, number])) for _ in range(2))
        assert str(mutation) == str(same)
        assert repr(changed) == repr(again) != repr(tree)
        kinds.add(mutation.kind)
    assert kinds == set(KINDS)
    assert tree == yaml_tree(text)


OUT_OF_RANGE = Mutation("out of range", ("train", "num_epochs"), 3, -1)
MISSPELT = Mutation("misspelt key", ("model", "depth"), "depth", "dpeth")
STEPS = [(1, 0.5), (2, 0.4)]


def raised(message: str, by: Path) -> tuple[str, str, str]:
    return "ValueError", message, f'  File "{by}", line 3, in run\n'


HOST, US = Path("/lib/ikl_plugins/torchdistill.py"), SOURCES / "losses.py"
VERDICTS = [
    ("trains", OUT_OF_RANGE, Answer("returned", None, STEPS)),
    ("trains; the host ignores the key", MISSPELT, Answer("returned", None, STEPS)),
    ("refused by us", OUT_OF_RANGE, Answer("raised", raised("`num_epochs` must be", US), [])),
    ("refused by us without a name", OUT_OF_RANGE, Answer("raised", raised("bad", US), [])),
    ("refused by us without a message", OUT_OF_RANGE, Answer("raised", raised(" ", US), [])),
    ("refused by the host without a name", OUT_OF_RANGE, Answer("raised", raised("bad", HOST), [])),
    ("refused by the host without a message", OUT_OF_RANGE, Answer("raised", raised("", HOST), [])),
    ("error after training started", OUT_OF_RANGE, Answer("raised", raised("`num_epochs` must be", US), STEPS)),
    ("the first loss is not finite", OUT_OF_RANGE, Answer("raised", raised("the loss must stay finite", US), [])),
    ("the first loss is not finite", OUT_OF_RANGE, Answer("returned", None, [(1, float("nan"))])),
    ("trains until the loss is not finite", OUT_OF_RANGE, Answer("returned", None, [*STEPS, (3, float("inf"))])),
    ("hung", OUT_OF_RANGE, Answer("hung", None, [])),
    ("died", OUT_OF_RANGE, Answer("died", None, STEPS)),
]


@pytest.mark.parametrize(("outcome", "mutation", "answer"), VERDICTS)
def test_what_is_said_of_a_mutant(outcome: str, mutation: Mutation, answer: Answer) -> None:
    assert configs.judge(mutation, answer, ours=False)[0] == outcome


def test_a_misspelt_key_of_ours_that_is_ignored_is_found() -> None:
    outcome, _ = configs.judge(MISSPELT, Answer("returned", None, STEPS), ours=True)
    assert outcome in configs.FAILURES


# --- the record ------------------------------------------------------------------------------------------------------


def report(test: str, outcome: str, entries: list[dict[str, Any]]) -> Any:
    properties = [("campaign", entry) for entry in entries]
    failed = outcome == "failed"
    return SimpleNamespace(
        nodeid=f"tests/campaign/{test}",
        when="call",
        outcome=outcome,
        failed=failed,
        user_properties=properties,
        longreprtext="what went wrong",
    )


def test_the_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    one, other = "test_kills.py::test_kills[a-0]", "test_kills.py::test_kills[a-1]"
    counts = {"kind": "counts", "group": "a", "counts": {"inside a write": 2}}
    first = Recorder(tmp_path, {"seed": 0, "quick": False})
    first.pytest_runtest_logreport(report(one, "passed", [counts, {"kind": "fact", "name": "n", "value": 1}]))
    first.pytest_runtest_logreport(report(other, "failed", []))
    failed = first.merged()["parts"]["kills"]
    assert [failure["detail"] for failure in failed["failures"]] == ["what went wrong"]

    second = Recorder(tmp_path, {"seed": 0, "quick": False})
    items: list[Any] = [
        SimpleNamespace(nodeid=f"tests/campaign/{test}", get_closest_marker=lambda _: True) for test in (one, other)
    ]
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    second.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == [f"tests/campaign/{other}"]  # what failed is tried again
    second.pytest_runtest_logreport(report(other, "passed", [counts]))
    part = second.merged()["parts"]["kills"]
    assert (part["finished"], part["failures"], part["facts"]) == (True, [], {"n": 1})
    assert part["counts"] == {"a": {"inside a write": 4}}
    with pytest.raises(pytest.UsageError, match="settings"):
        Recorder(tmp_path, {"seed": 1, "quick": False})


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    return found


def test_the_docs_show_the_record(kept: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert [part for part, shown in tables(kept).items() if shown not in text] == []


def test_the_record_in_docs_has_what_was_asked_and_no_failures(kept: dict[str, Any]) -> None:
    assert set(kept["parts"]) == set(PARTS)
    for content in kept["parts"].values():
        assert (content["failures"], content["finished"]) == ([], True)
        assert content["settings"] == {"seed": 0, "quick": False}
    cases = {part: [sum(found.values()) for found in kept["parts"][part]["counts"].values()] for part in PARTS}
    assert sum(cases["inputs"]) == sum(cases["inputs_native"]) == 10_000
    assert (cases["configs"], sum(cases["disk"])) == ([200, 200], 96)
    assert (
        sum(of["aimed at a write"] + of["at a random time"] for of in kept["parts"]["kills"]["counts"].values()) >= 60
    )
