"""The machinery of tools/reliability.py: a broken package, host or disk is found, and the record says what it was."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import reliability
import reliability_inputs
import reliability_oracle
import torch
from oracles import decoupled_loops
from reliability_isolated import Answer, each, one
from reliability_record import Record, merge, table
from reliability_tables import render, tables

import ikl_plugins
from ikl_plugins import ClassPrior
from ikl_plugins.adversarial import PGD

TOOL = Path(reliability.__file__)
DOCS = TOOL.parent.parent / "docs"


# --- the record ------------------------------------------------------------------------------------------------------


def record(path, **settings):
    return Record(path, "some", {"seed": 0, **settings})


def test_a_record_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "some.json"
    first = record(path)
    first.add("a", ["right", "right", "wrong"])
    first.fail("a", number=3, what="wrong")
    first.remark("a", "odd", "an example")
    first.remark("a", "odd", "another")
    first.save("from 0")
    second = record(path)
    assert (second.done("from 0"), second.done("from 5"), second.finished) == (True, False, False)
    second.add("a", ["right"])
    second.finish()
    content = json.loads(path.read_text())
    assert content["counts"] == {"a": {"right": 3, "wrong": 1}}
    assert content["failures"] == [{"group": "a", "number": 3, "what": "wrong"}]
    assert content["remarks"] == {"a": {"odd": {"count": 2, "example": "an example"}}}
    assert content["origin"]["versions"]["torch"] == torch.__version__
    assert record(path).finished


def test_a_record_of_other_settings_or_damaged_is_refused(tmp_path):
    path = tmp_path / "some.json"
    record(path).save()
    with pytest.raises(ValueError, match=r"some\.json must be of the same settings and versions .* settings differ"):
        record(path, quick=True)
    path.write_text('{"format": ')
    with pytest.raises(ValueError, match=r"some\.json must be a result of this tool, but is damaged"):
        record(path)


def test_only_finished_parts_are_shown(tmp_path):
    record(tmp_path / "some.json").save("from 0")
    with pytest.raises(ValueError, match=r"some\.json must be finished to be shown"):
        merge(tmp_path, ["some", "absent"])
    record(tmp_path / "some.json").finish()
    assert list(merge(tmp_path, ["some", "absent"])["parts"]) == ["some"]


# --- processes -------------------------------------------------------------------------------------------------------


def test_what_becomes_of_a_case_in_its_process():
    def told(tell):
        tell(("step", 1))
        return torch.ones(2)

    def raises(_):
        raise KeyError("no such key")

    def dies(tell):
        tell("last words")
        os.kill(os.getpid(), 9)

    def hangs(_):
        time.sleep(60)

    answers = list(each([told, raises, dies, lambda _: sys.exit("gone"), hangs, told], timeout=2.0))
    assert [answer.how for answer in answers] == ["returned", "raised", "died", "raised", "hung", "returned"]
    assert answers[0].told == [("step", 1)]
    assert torch.equal(answers[0].value, torch.ones(2))
    assert answers[1].value[:2] == ("KeyError", "'no such key'")
    assert answers[2].told == ["last words"]
    assert answers[3].value[:2] == ("SystemExit", "gone")
    assert one(told, 5.0).how == "returned"


# --- generated inputs ------------------------------------------------------------------------------------------------


def outcomes(numbers=range(120)):
    return Counter(reliability_inputs.judge(reliability_inputs.draw(seed=1, number=number))[0] for number in numbers)


RIGHT = {"right number", "ValueError that names the argument", "TypeError that names the argument"}


def test_the_package_as_it_is_passes():
    found = outcomes()
    assert found.keys() == RIGHT
    assert min(found.values()) >= 5


def test_a_case_is_the_same_whenever_it_is_drawn():
    for number in (3, 17, 58):
        first, second = (reliability_inputs.draw(seed=2, number=number) for _ in range(2))
        assert first[:3] == second[:3]
        assert reliability_inputs.judge(first) == reliability_inputs.judge(second)


def broken(change):
    """The three losses with something wrong."""

    def of(inner):
        return lambda *args, **keys: change(inner, args, keys)

    return {name: of(getattr(ikl_plugins, name)) for name in ("dkl_loss", "ikl_loss", "gkl_loss")}


def detached(inner, args, keys):
    """The value, with half of its gradient."""
    loss = inner(*args, **keys)
    return 0.5 * loss + 0.5 * loss.detach()


def accepting(inner, args, keys):
    """Takes whatever is passed."""
    try:
        return inner(*args, **keys)
    except (ValueError, TypeError):
        return torch.zeros(())


def nameless(inner, args, keys):
    try:
        return inner(*args, **keys)
    except (ValueError, TypeError) as error:
        raise type(error)("something is not as it must be") from error


def crashing(inner, args, keys):
    try:
        return inner(*args, **keys)
    except TypeError as error:
        raise AttributeError(str(error)) from error


BREAKS = {
    "value": (lambda inner, args, keys: inner(*args, **keys) * (1 + 1e-3), "wrong number"),
    "gradient": (detached, "wrong number"),
    "dtype": (lambda inner, args, keys: inner(*args, **keys).double(), "wrong number"),
    "shape": (lambda inner, args, keys: inner(*args, **keys).reshape(-1), "wrong number"),
    "hidden NaN": (lambda inner, args, keys: inner(*args, **keys).nan_to_num(), "wrong number"),
    "accepts": (accepting, "accepted what is wrong"),
    "nameless": (nameless, "refused without a name"),
    "crash": (crashing, "another error"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_loss_is_found(name, monkeypatch):
    change, outcome = BREAKS[name]
    for function, wrong in broken(change).items():
        monkeypatch.setattr(ikl_plugins, function, wrong)
    assert outcomes(range(250) if name == "hidden NaN" else range(120))[outcome] >= 2


def test_a_loss_that_refuses_what_is_right_is_found(monkeypatch):
    def refuses(*_, **__):
        raise ValueError("ikl_loss: `alpha` must be another one")

    monkeypatch.setattr(ikl_plugins, "ikl_loss", refuses)
    assert outcomes()["refused what is right"] >= 5


def test_a_broken_class_prior_is_found(monkeypatch):
    def forgets(self):
        self.matrix.fill_(1.0 / self.num_classes)
        self.sums.zero_()
        self.counts.zero_()

    monkeypatch.setattr(ClassPrior, "end_epoch", forgets)
    assert outcomes(range(200))["wrong number"] >= 3


def test_a_broken_attack_is_found(monkeypatch):
    inner = PGD.__call__
    monkeypatch.setattr(PGD, "__call__", lambda self, model, images, **keys: inner(self, model, images, **keys) + 0.5)
    assert outcomes(range(200))["wrong number"] >= 1


def test_the_oracle_agrees_with_loops_and_with_numbers_by_hand():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    settings = {"alpha": 0.7, "beta": 2.0, "temperature": 3.0, "weight_temperature": 2.0}
    for kind, more in (("ikl", {}), ("gkl", {"gamma": 0.3})):
        theirs = decoupled_loops(kind, student, teacher, **settings, **more)
        ours = reliability_oracle.pairwise(kind, student, teacher, **settings, **more)
        for one_of_ours, one_of_theirs in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one_of_ours, one_of_theirs)
    # Two classes: w = (3/4, 1/4), d = ln 3, so that 1/4 * 2 * 3/16 * d^2; H = ln 2 as q is uniform.
    two = reliability_oracle.pairwise(
        "ikl", torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float64)
    )
    assert two.weighted_mse.item() == pytest.approx(3 / 32 * np.log(3.0) ** 2)
    assert two.cross_entropy.item() == pytest.approx(np.log(2.0))


def test_the_oracles_ascent_ascends():
    generator = torch.Generator().manual_seed(0)
    weight, images = (torch.rand(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3])
    for norm in ("linf", "l2"):
        found = reliability_oracle.ascend(
            weight, torch.zeros(4, dtype=torch.float64), images, images, norm=norm, eps=0.1, steps=3, step_size=0.05,
            objective="cross_entropy", labels=labels,
        )  # fmt: skip
        before, after = (torch.nn.functional.cross_entropy(x @ weight.T, labels) for x in (images, found))
        assert after > before


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_hostile_files_would_run(tmp_path):
    from reliability_checkpoints import guises

    marker = tmp_path / "exploded"
    found = guises(marker)
    ran = 0
    for name, content in found.items():
        path = tmp_path / "hostile"
        path.write_bytes(content)

        def read(_, path=path, name=name):
            if "pickle of protocol" in name or "opcodes" in name:
                return pickle.loads(path.read_bytes())  # noqa: S301  # to see that it would run
            return torch.load(path, weights_only=False)

        one(lambda tell: read(tell) and None, 20.0)
        ran += marker.exists()
        shutil.rmtree(marker, ignore_errors=True)
    # Not those that only a reader of another kind would run: members that torch does not read, archives of NumPy.
    assert ran >= 35


def verdict(answer, changed="flipped", *, sound=None, checksums=True, exploded=False):
    from reliability_checkpoints import judge

    return judge(answer, "case0001.pth", sound, changed=changed, checksums=checksums, exploded=exploded)[0]


def test_the_verdicts_on_files():
    sound = {"weight": torch.ones(3)}
    other = {"weight": torch.tensor([1.0, 1.0, 2.0])}
    named = Answer("raised", ("ValueError", "the checkpoint /a/case0001.pth is damaged", ""), [])
    nameless = Answer("raised", ("ValueError", "it is damaged", ""), [])
    crash = Answer("raised", ("KeyError", "case0001.pth", ""), [])
    assert verdict(named) == "refused by name"
    assert verdict(named, "code", exploded=True) == "the code ran"
    assert verdict(nameless) == "refused without the file's name"
    assert verdict(crash) == "another error"
    assert verdict(Answer("died", None, [])) == "the process died"
    assert verdict(Answer("returned", sound, []), sound=sound) == "read, with the same content"
    assert verdict(Answer("returned", other, []), sound=sound) == "read, with other content"
    assert "no checksums" in verdict(Answer("returned", other, []), sound=sound, checksums=False)


# --- configs ---------------------------------------------------------------------------------------------------------

TREE = {
    "model": {"type": "Some", "depth": 8, "rates": [0.5, 0.25]},
    "epochs": 3,
    "names": {"a": "first", "b": "second"},
}


def test_a_mutant_differs_in_one_place_and_is_drawn_again_the_same():
    from reliability_configs import KINDS, mutate

    kinds = Counter()
    for number in range(200):
        tree, mutation = mutate(TREE, np.random.default_rng([0, number]))
        again, same = mutate(TREE, np.random.default_rng([0, number]))
        assert str(mutation) == str(same)
        assert repr(tree) == repr(again)
        assert repr(tree) != repr(TREE)
        kinds[mutation.kind] += 1
    assert set(kinds) == set(KINDS)
    assert TREE["epochs"] == 3


def test_a_config_of_torchdistill_survives_its_way_through_a_tree():
    from reliability_configs import yaml_text, yaml_tree
    from reliability_digits import TORCHDISTILL

    tree = yaml_tree((TORCHDISTILL / "ikl.yaml").read_text())
    assert yaml_tree(yaml_text(tree)) == tree
    assert tree["datasets"]["digits/train"].tag == "!import_call"
    assert yaml_text(tree).count("!import_call") >= 3


def test_the_verdicts_on_mutants():
    from reliability_configs import FAILURES, Mutation, judge

    wrong = Mutation("out of range", ("train", "num_epochs"), 3, -1)
    misspelt = Mutation("misspelt key", ("model", "depth"), "depth", "dpeth")
    steps = [("step", 1, 0.5), ("step", 2, 0.4)]

    def verdict(how, value=None, told=(), mutation=wrong, ours=False):
        return judge(mutation, Answer(how, value, list(told)), ours=ours)[0]

    def raised(message, file):
        return "ValueError", message, f'  File "{file}", line 3, in run\n'

    host, us = "/lib/torchdistill/core.py", "/x/ikl_plugins/losses.py"
    assert verdict("returned", told=steps) == "trains"
    assert verdict("returned", told=steps, mutation=misspelt) == "trains; the host ignores the key"
    assert verdict("raised", raised("`num_epochs` must be", us)) == "refused by us"
    assert verdict("raised", raised("bad", host)) == "refused by the host without a name"
    assert verdict("raised", raised("", host)) == "refused by the host without a message"
    assert verdict("raised", raised("the loss must stay finite, got nan", us), steps[:1]).startswith("trains until")
    assert verdict("raised", raised("the loss must stay finite, got nan", us)) == "the first loss is not finite"
    failing = {
        verdict("returned", told=steps, mutation=misspelt, ours=True),
        verdict("raised", raised("`num_epochs` must be", us), steps),
        verdict("raised", raised("bad", us)),
        verdict("raised", raised(" ", us)),
        verdict("hung"),
        verdict("died", told=steps),
    }
    assert failing == set(FAILURES)


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
            time.sleep(0.02)
        os.replace(aside, state)
    (folder / "result.txt").write_text(str(total))
"""


@pytest.fixture
def host_of(tmp_path):
    from reliability_kills import Host

    def make(mode):
        script = tmp_path / "worker.py"
        script.write_text(textwrap.dedent(WORKER))

        def finished(folder):
            state = folder / "state.txt"
            return int(state.read_text() or 0) / 6 if state.exists() else 0.0

        return Host(
            mode, lambda folder, again: [str(script), str(folder), mode], re.compile(r"state\.(partial|txt)"),
            re.compile("step"), finished, lambda folder: (folder / "result.txt").read_text(), 6,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(("mode", "ends"), [("right", "runs that end as the uninterrupted one"), ("forgets", "other")])
def test_a_host_that_resumes_wrong_is_found(mode, ends, host_of, tmp_path):
    import random

    from reliability_kills import PLACES, _one_run, live

    host = host_of(mode)
    (tmp_path / "whole").mkdir()
    whole = live(host, tmp_path / "whole", again=False)
    assert (whole.code, host.result(tmp_path / "whole")) == (0, "15")
    found = record(tmp_path / "some.json")
    kills = 0
    for number in range(6):
        kills += _one_run(found, host, tmp_path / f"run{number}", whole, "15", random.Random(number), 4)
    counts = found.content["counts"][mode]
    assert sum(counts.get(place, 0) for place in PLACES) == kills >= 6
    assert counts[next(name for name in counts if name.startswith(ends))] >= 2
    assert bool(found.content["failures"]) == (mode == "forgets")


def test_a_process_is_killed_inside_a_write(host_of, tmp_path):
    from reliability_kills import live, where_it_fell

    host = host_of("right")
    (tmp_path / "run").mkdir()
    life = live(host, tmp_path / "run", again=False, kill_in_write=(2, 0.005))
    assert life.killed
    assert (tmp_path / "run" / "state.txt").read_text() == "2"
    assert where_it_fell(host, tmp_path / "run", life, False) == "inside a write"


def test_results_are_compared_to_the_bit():
    from reliability_kills import differences

    sound = {"a": torch.tensor([1.0, float("nan")]), "b": [1, {"c": np.zeros(2)}], "d": float("nan")}
    assert differences(sound, pickle.loads(pickle.dumps(sound))) == []  # noqa: S301
    assert differences({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}) == [".a"]
    assert differences({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0).double()}) == [".a"]
    assert differences({"a": 1}, {"a": 1, "b": 2}) == [".b (one side alone)"]
    assert differences([1, 2], [1]) == [" (lengths 2 and 1)"]
    assert differences({"b": [1, {"c": np.zeros(2)}]}, {"b": [1, {"c": np.ones(2)}]}) == [".b[1].c"]
    assert differences(True, 1) == [""]
    one_buffer, same, other = (Answer("", None, []), Answer("", None, []), Answer("", 1, []))
    assert differences({"x": one_buffer}, {"x": same}) == []
    assert differences({"x": one_buffer}, {"x": other}) == [".x[1]"]


class Buffer:
    """An object that only its own attributes tell from another."""

    def __init__(self, values):
        self.values = values


def test_objects_are_compared_by_what_they_hold():
    from reliability_kills import differences

    assert differences({"a": Buffer([1])}, {"a": Buffer([1])}) == []
    assert differences({"a": Buffer([1])}, {"a": Buffer([2])}) == [".a.values[0]"]


def test_what_is_half_written(tmp_path):
    from reliability_kills import half_written

    torch.save({"a": torch.ones(100)}, tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-30])
    (tmp_path / "empty.json").touch()
    (tmp_path / ".log.3.partial.json").write_text("{}")
    (tmp_path / "log.json").write_text("{}")
    found = {path.name for path in tmp_path.iterdir() if half_written(path)}
    assert found == {"cut.pt", "empty.json", ".log.3.partial.json"}
    assert not half_written(tmp_path / "gone.pt")


# --- disks -----------------------------------------------------------------------------------------------------------


def test_the_verdicts_on_errors():
    from reliability_disk import judge_error

    disk = Path("/disk")
    assert judge_error(1, "some lines\nerror: No space left on device: '/disk/a.pt'\n", disk) is None
    assert judge_error(0, "done\n", disk) == "it ran to its end"
    assert judge_error(-9, "", disk) == "ended by signal 9"
    assert judge_error(1, "Traceback (most recent call last):\nOSError: 28 /disk\n", disk) == "no clear line at the end"
    assert judge_error(1, "error: No space left on device\n", disk) == "the line names no path on the disk"
    logged = "--- Logging error ---\nTraceback (most recent call last):\n  x\nMessage: 'm'\nArguments: ()\n"
    assert judge_error(1, f"{logged}error: no space: '/disk/a'\n", disk) is None
    assert judge_error(1, f"{logged}Traceback (most recent call last):\nerror: '/disk/a'\n", disk) == "a traceback"


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
    sys.exit(f"error: no space: {file}")
"""


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("careful", []),
        ("in place", ["result.txt has changed"]),
        ("leaves", [".result.7.partial.txt is left"]),
        ("removes", ["result.txt is lost"]),
    ],
)
@pytest.mark.parametrize("step", ["full", "read-only"])
def test_a_tool_that_loses_files_is_found(mode, found, step, tmp_path):
    from reliability_disk import FINE, Writer, _Case

    script = tmp_path / "writes.py"
    script.write_text(textwrap.dedent(WRITES))
    for folder in ("disk/run", "cwd"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "disk" / "run" / "result.txt").write_text("whole")
    writer = Writer(lambda folder, again: [str(script), str(folder), mode], lambda folder: None, re.compile("txt$"), {})
    case = _Case(writer, tmp_path, None, {})
    case.fails_well(step, again=True)
    assert case.outcomes == [f"{step}: {'files' if found else FINE}"]
    wrong = [line for failure in case.failures for line in failure["files"]]
    assert wrong == ([line.replace("is left", "is new") for line in found] if step == "read-only" else found)


# --- tables and the record in the repository -------------------------------------------------------------------------


def test_tables_have_every_outcome():
    content = {
        "settings": {"seed": 5, "quick": True},
        "origin": {"versions": {"torch": "2", "numpy": "absent"}, "processor": "some", "threads": 1},
        "counts": {"a": {"right": 2}, "b": {"right": 1, "wrong": 3}},
        "failures": [{}],
    }
    text = render({"parts": {"inputs": content}})
    assert text == (
        "### Generated inputs\n\nSeed 5, quick; failures: 1. some, 1 thread, torch 2.\n\n"
        "| called | cases | right | wrong |\n| --- | --- | --- | --- |\n| a | 2 | 2 | 0 |\n| b | 4 | 1 | 3 |\n"
        "| all | 6 | 3 | 3 |\n"
    )
    assert table(["a"], [[1]]) == "| a |\n| --- |\n| 1 |"


def test_the_docs_show_the_record():
    merged = json.loads((DOCS / "results" / "reliability.json").read_text())
    text = (DOCS / "reliability.md").read_text()
    for part, shown in tables(merged).items():
        assert shown in text, part


def test_the_record_has_what_was_asked_and_no_failures():
    parts = json.loads((DOCS / "results" / "reliability.json").read_text())["parts"]
    assert set(parts) >= set(reliability.PARTS)
    for part, content in parts.items():
        assert content["failures"] == [], part
        assert content["settings"] == {"seed": 0, "quick": False}
    cases = {part: [sum(found.values()) for found in content["counts"].values()] for part, content in parts.items()}
    assert sum(cases["inputs"]) == 10_000
    assert cases["configs"] == [200, 200]
    facts = parts["kills"]["facts"]
    points = {name.removesuffix(": kills"): count for name, count in facts.items() if name.endswith(": kills")}
    assert points["torchdistill"] >= 20
    assert points["evaluation"] >= 20
    assert points["mmpretrain distill_ikl"] + points["mmpretrain adversarial_ikl"] >= 20


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_parts_run_to_their_end(tmp_path):
    from reliability_disk import namespace

    parts = [part for part in reliability.PARTS if part != "disk" or namespace() is not None]
    for part in ("all",) if parts == list(reliability.PARTS) else parts:
        done = subprocess.run(
            [sys.executable, str(TOOL), part, "--quick", "--output", str(tmp_path)],
            capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    merged = json.loads((tmp_path / "reliability.json").read_text())
    assert list(merged["parts"]) == parts
    assert all(content["failures"] == [] for content in merged["parts"].values())
    assert (tmp_path / "reliability.md").read_text() == render(merged)
