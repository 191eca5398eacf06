"""The machinery of tools/reliability.py: a broken package, host or disk is found, and the record says what it was."""

import contextlib
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from campaign import reliability
from campaign import inputs as reliability_inputs
from campaign import inputs_native as reliability_inputs_native
from campaign import kills as reliability_kills
from campaign import oracle as reliability_oracle
from campaign import record as reliability_record
from campaign import tables as reliability_tables
import torch
from oracles import decoupled_loops
from PIL import Image
from campaign.isolated import Answer, each, one
from campaign.record import Record, child_environment, merge, table
from campaign.tables import render, tables

import ikl_plugins
from ikl_plugins import ClassPrior, native
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
    with pytest.raises(ValueError, match=r"some\.json must be of the same settings, versions and .* settings differ"):
        record(path, quick=True)
    path.write_text('{"format": ')
    with pytest.raises(ValueError, match=r"some\.json must be a result of this tool, but is damaged"):
        record(path)


def write_package(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


PACKAGE = {"a.py": "1", "sub/b.py": "2", "csrc/c.cpp": "3", "py.typed": ""}


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({**PACKAGE, "py.typed": "other", "csrc/notes.md": "new"}, False),
        ({**PACKAGE, "sub/b.py": "4"}, True),
        ({**PACKAGE, "csrc/c.cpp": "4"}, True),
        ({**PACKAGE, "sub/d.py": ""}, True),
        ({name.replace("b.py", "d.py"): text for name, text in PACKAGE.items()}, True),
    ],
)
def test_a_record_of_other_sources_is_refused_finished_or_not(files, refused, tmp_path, monkeypatch):
    package, path = tmp_path / "package", tmp_path / "some.json"
    monkeypatch.setattr(reliability_record, "_PACKAGE", package, raising=False)
    write_package(package, PACKAGE)
    record(path).finish()
    assert record(path).finished
    write_package(package, files)
    if refused:
        with pytest.raises(ValueError, match=r"its sources differ\. Name another --output, or remove it\."):
            record(path)
    else:
        assert record(path).finished


def test_a_record_from_before_its_sources_were_kept_is_refused(tmp_path):
    path = tmp_path / "some.json"
    record(path).finish()
    content = json.loads(path.read_text())
    del content["origin"]["sources"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its sources differ"):
        record(path)


def test_only_finished_parts_are_shown(tmp_path):
    record(tmp_path / "some.json").save("from 0")
    with pytest.raises(ValueError, match=r"some\.json must be finished to be shown"):
        merge(tmp_path, ["some", "absent"])
    record(tmp_path / "some.json").finish()
    assert list(merge(tmp_path, ["some", "absent"])["parts"]) == ["some"]


# --- the C++ operator ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked_for(monkeypatch):
    """An environment that asks for an operator, which is there; and a process in which no loss has been called yet."""

    def found(*_):
        raise AssertionError("only asked for")

    monkeypatch.setenv(native.VARIABLE, "1")
    monkeypatch.setattr(native, "_loaded", lambda: found)
    monkeypatch.setattr(native, "_operator", None)
    monkeypatch.setattr(native, "_ask_environment", True)
    return found


@pytest.mark.parametrize("part", [*reliability.PARTS, *reliability.WITH_COMPILER])
def test_a_part_measures_the_losses_own_way_whatever_the_environment_says(part, asked_for, tmp_path, monkeypatch):
    used = []

    def run(found, work, **_):
        used.append(native.operator())
        found.finish()

    monkeypatch.setattr(importlib.import_module(f"reliability_{part}"), "run", run)
    monkeypatch.setattr(reliability_tables, "render", lambda merged: "")
    with pytest.raises(SystemExit) as ended:
        reliability.main([part, "--quick", "--output", str(tmp_path)])
    assert ended.value.code == 0
    assert used == [asked_for if part == "inputs_native" else None]


def test_processes_measure_the_losses_own_way_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "1")
    assert child_environment()[native.VARIABLE] == "0"


@pytest.fixture
def few_cases(monkeypatch):
    """Three chunks of two cases that call a pretended operator, as often as the function that it returns says."""
    calls = [0]

    @contextlib.contextmanager
    def switched_on():
        calls[0] = 0
        yield calls

    def called(times):
        def judge(case):
            calls[0] += next(times)
            return "right number", None

        monkeypatch.setattr(reliability_inputs, "judge", judge)

    monkeypatch.setattr(reliability_inputs_native, "switched_on", switched_on)
    monkeypatch.setattr(reliability_inputs, "QUICK_CASES", 6)
    monkeypatch.setattr(reliability_inputs, "CHUNK", 2)
    return called


def run_native(tmp_path):
    found = reliability.run_part("inputs_native", tmp_path, seed=0, quick=True)
    return found["facts"]["calls of the operator"]


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_an_operator_that_is_not_called_is_found_by_each_command(chunks, few_cases, tmp_path):
    few_cases(iter([1] * 2 * chunks + [0] * 6))
    for _ in range(2):
        with pytest.raises(ValueError, match="the part inputs_native must call the operator, but has not"):
            run_native(tmp_path)
        assert not Record(tmp_path / "inputs_native.json", "inputs_native", {"seed": 0, "quick": True}).finished
        few_cases(iter([0] * 6))


def test_calls_of_the_operator_are_those_of_all_processes(few_cases, tmp_path):
    def interrupted():
        yield from (1, 2, 4)  # the second chunk is judged again
        raise KeyboardInterrupt

    few_cases(interrupted())
    with pytest.raises(KeyboardInterrupt):
        run_native(tmp_path)
    few_cases(iter([8, 16, 32, 64]))
    assert run_native(tmp_path) == 1 + 2 + 8 + 16 + 32 + 64
    assert run_native(tmp_path) == 1 + 2 + 8 + 16 + 32 + 64


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


RIGHT = {
    "right number", "not finite, as the formula", "beyond float32", "no sample", "ValueError that names the argument",
    "TypeError that names the argument",
}  # fmt: skip


def test_the_package_as_it_is_passes():
    found = outcomes()
    assert found.keys() == RIGHT
    assert found["right number"] >= 50


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
    from campaign.checkpoints import guises

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
    from campaign.checkpoints import judge

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
    from campaign.configs import KINDS, mutate

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
    from campaign.configs import yaml_text, yaml_tree
    from campaign.digits import TORCHDISTILL

    tree = yaml_tree((TORCHDISTILL / "ikl.yaml").read_text())
    assert yaml_tree(yaml_text(tree)) == tree
    assert tree["datasets"]["digits/train"].tag == "!import_call"
    assert yaml_text(tree).count("!import_call") >= 3


def test_the_verdicts_on_mutants():
    from campaign.configs import FAILURES, Mutation, judge

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
    from campaign.kills import Host

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

    from campaign.kills import PLACES, _one_run, live

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
    from campaign.kills import live, where_it_fell

    host = host_of("right")
    (tmp_path / "run").mkdir()
    life = live(host, tmp_path / "run", again=False, kill_in_write=(2, 0.005))
    assert life.killed
    assert (tmp_path / "run" / "state.txt").read_text() == "2"
    assert where_it_fell(host, tmp_path / "run", life, False) == "inside a write"


def test_results_are_compared_to_the_bit():
    from campaign.kills import differences

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
    from campaign.kills import differences

    assert differences({"a": Buffer([1])}, {"a": Buffer([1])}) == []
    assert differences({"a": Buffer([1])}, {"a": Buffer([2])}) == [".a.values[0]"]


def test_what_is_half_written(tmp_path):
    from campaign.kills import half_written

    torch.save({"a": torch.ones(100)}, tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-30])
    (tmp_path / "empty.json").touch()
    (tmp_path / ".log.3.partial.json").write_text("{}")
    (tmp_path / "log.json").write_text("{}")
    found = {path.name for path in tmp_path.iterdir() if half_written(path)}
    assert found == {"cut.pt", "empty.json", ".log.3.partial.json"}
    assert not half_written(tmp_path / "gone.pt")


def write_whole(path, number=1):
    """A file as our writers leave it."""
    if path.suffix == ".json":
        path.write_text(json.dumps({"values": [number] * 20}, indent=1) + "\n")
    elif path.suffix == ".npz":
        np.savez(path, image=np.full((4, 8), number), index=np.arange(4))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", str(number) * 50)
    elif path.suffix == ".pt":
        torch.save({"a": torch.full((9,), number)}, path)
    elif path.name == "figure.png":
        from matplotlib.figure import Figure

        figure = Figure()
        figure.gca().plot([0, number])
        figure.savefig(path)
    elif path.suffix == ".png":
        Image.fromarray(np.full((8, 8, 3), number, "uint8")).save(path)
    else:
        path.write_text(f"a: {number}, and what else there is\n")


WHOLE = ("a.json", "a.npz", "a.zip", "a.pt", "figure.png", "a.png", "a.md", "a.csv", "a.py", "a.yaml")


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_is_half_written_until_its_last_byte(name, tmp_path):
    path = tmp_path / name
    write_whole(path)
    assert not reliability_kills.half_written(path)
    content = path.read_bytes()
    last = content.rstrip(b"\n") if name == "a.json" else content  # its last bracket closes it
    for size in {0, 1, len(content) // 2, len(last) - 2, len(last) - 1}:
        path.write_bytes(content[:size])
        assert reliability_kills.half_written(path), size


@pytest.mark.parametrize("name", ["a.npz", "a.zip", "a.pt"])
def test_an_archive_that_has_kept_its_length_is_half_written(name, tmp_path):
    path = tmp_path / name
    write_whole(path)
    content = path.read_bytes()
    middle = len(content) // 3
    for damaged in (content[:middle] + bytes(len(content) - middle), bytes(middle) + content[middle:]):
        path.write_bytes(damaged)
        assert reliability_kills.half_written(path)


# --- disks -----------------------------------------------------------------------------------------------------------


def test_the_verdicts_on_errors():
    from campaign.disk import judge_error

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
    from campaign.disk import FINE, Writer, _Case

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


ANEW = """
    import os, sys
    from pathlib import Path
    file, other, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    content = other.read_bytes()
    file.write_bytes(content[:-2] if mode == "in place" else content)
    sys.exit(f"error: no space: {file}")
"""


@pytest.mark.parametrize(("mode", "found"), [("anew", False), ("in place", True)])
@pytest.mark.parametrize("name", ["a.json", "a.npz", "a.png", "figure.png", "a.md", "a.pt"])
def test_a_run_that_cuts_a_file_in_place_is_found(mode, found, name, tmp_path):
    from campaign.disk import FINE, Writer, _Case

    script = tmp_path / "anew.py"
    script.write_text(textwrap.dedent(ANEW))
    for folder in ("disk/run", "cwd", "other"):
        (tmp_path / folder).mkdir(parents=True)
    write_whole(tmp_path / "disk" / "run" / name)
    write_whole(tmp_path / "other" / name, 2)

    def command(folder, again):
        return [str(script), str(folder / name), str(tmp_path / "other" / name), mode]

    # What is safe does not become less: the file that is cut may be one that nothing goes on from.
    writer = Writer(command, lambda folder: None, re.compile("."), {}, finished=lambda folder: 1.0)
    case = _Case(writer, tmp_path, None, {})
    case.fails_well("full", again=True)
    assert case.outcomes == [f"full: {'files' if found else FINE}"]
    assert [line for failure in case.failures for line in failure["files"]] == [f"{name} has changed"] * found


def test_a_writer_whose_whole_files_count_as_half_written_is_refused(tmp_path):
    from campaign.disk import Writer, blind_to

    for name in ("a.json", "b.md", "c.md", ".lock"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "b.md").write_text("no newline")
    (tmp_path / ".digits.lock").touch()
    writer = Writer(lambda folder, again: [], lambda folder: None, re.compile(r"\.(json|md|lock)$"), {})
    assert blind_to(tmp_path, writer) == ["b.md"]


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
    content["origin"]["versions"]["ikl_plugins"] = "1.0"
    content["origin"]["sources"] = "0123456789abcdef" * 4
    text = render({"parts": {"inputs": content}})
    assert "failures: 1. some, 1 thread, torch 2, ikl_plugins 1.0 (sources 01234567).\n" in text


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
    from campaign.disk import namespace

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
