"""Several processes that share an evaluation: what they find is what one run of AutoAttack finds."""

import contextlib
import functools
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from quick_autoattack import Quick, batch, message, network, without_times, write_network_and_images
from torch import nn

from ikl_plugins._files import locked
from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.commands.main import main as ikl
from ikl_plugins.robustbench.evaluation import Unfinished, curve, evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation
from ikl_plugins.robustbench.evaluation.shards import launched

robustbench = import_robustbench()
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
OPTIONS = {"eps": "4/255", "attacks": ["apgd-ce", "apgd-t"], "batch_size": 5, "progress": False}


class Quicker(Quick):
    """With fewer targets and steps still: what matters is who draws which numbers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter = 4
            attack.n_restarts = min(attack.n_restarts, 2)
        self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 3
        self.fab.n_iter, self.fab.n_restarts = 3, min(self.fab.n_restarts, 2)
        self.square.n_queries = 20


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quicker)


def sample(count=14, wrong=2):
    model = network()
    return model, *batch(model, count, wrong)


def in_turn(count, *given, log, **options):
    """Lets each shard do what it can, the last one first, until all are done; what each of them returns."""
    found = {}
    for _ in range(10):
        for number in range(count, 0, -1):
            with contextlib.suppress(Unfinished):
                found[number] = evaluate(*given, log=log, shard=(number, count), wait=0, **options)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("the shards do not come to an end")


def autoattack(model, images, labels, *, batch_size, eps, norm="Linf", version="standard", attacks=(), seed=0, **_):
    """One run of AutoAttack itself: adversarial images and predictions."""
    number = int(eps.split("/")[0]) / 255 if "/" in eps else float(eps)
    adversary = robustbench.eval.AutoAttack(
        model,
        norm=norm,
        eps=number,
        seed=seed,
        verbose=False,
        device="cpu",
        version="custom" if attacks else version,
        attacks_to_run=attacks,
    )
    return adversary.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)


EPS = {"Linf": "4/255", "L2": "0.1", "L1": "1"}
CASES = [
    (version, norm) for version in ("standard", "plus", "rand") for norm in EPS if (version, norm) != ("plus", "L1")
]


@pytest.mark.parametrize(("version", "norm"), CASES)
def test_shards_find_what_autoattack_finds(version, norm, tmp_path):
    given = sample()
    options = {"version": version, "norm": norm, "eps": EPS[norm], "batch_size": 5, "seed": 3}
    adversarial, predictions = autoattack(*given, **options)
    whole = evaluate(*given, log=tmp_path / "log.json", **options)
    assert 0 < whole.robust_accuracy < whole.natural_accuracy  # some fall, some stand
    for count in {"standard": (2,), "plus": (3,), "rand": (3,)}[version]:
        log = tmp_path / str(count) / "log.json"
        for found in (*in_turn(count, *given, log=log, **options), Evaluation.load(log), whole):
            assert torch.equal(found.adversarial_images(given[1]), adversarial)
            assert found.log["predictions"] == predictions.tolist()
            assert without_times(found.log) == without_times(whole.log)
            assert found.finished


def test_shards_of_a_curve_end_as_one(tmp_path):
    given = sample()
    options = {"attacks": ["apgd-ce"], "batch_size": 5, "progress": False}
    points = curve(*given, ["2/255", "6/255"], **options)
    for number in (2, 1, 2):
        with contextlib.suppress(Unfinished):
            found = curve(*given, ["2/255", "6/255"], folder=tmp_path, shard=(number, 2), wait=0, **options)
        with contextlib.suppress(Unfinished):
            found = curve(*given, ["2/255", "6/255"], folder=tmp_path, shard=(number, 2), wait=0, **options)
    assert found == points


# --- more images, other numbers of shards ----------------------------------------------------------------------------


def counted(model):
    """How many images the attacks have got since the last call."""
    seen = []
    model.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))

    def count():
        total = sum(seen)
        seen.clear()
        return total

    return count


@pytest.mark.parametrize("shards", [1, 2])
def test_more_images_later_end_as_all_at_once(shards, tmp_path):
    model, images, labels = sample(count=23)
    whole = evaluate(model, images, labels, log=tmp_path / "whole.json", **OPTIONS)
    log, count = tmp_path / "log.json", counted(model)
    evaluate(model, images[:13], labels[:13], log=log, **OPTIONS)  # of 11 right ones the last is alone in its batch
    first = count()
    before = {file: file.read_bytes() for file in (tmp_path / "log_adversarial").iterdir()}
    if shards == 1:
        found = evaluate(model, images, labels, log=log, **OPTIONS)
    else:
        found, *_ = in_turn(2, model, images, labels, log=log, **OPTIONS)
    later = count()
    for one in (found, Evaluation.load(log)):
        assert without_times(one.log) == {**without_times(whole.log), "adversarial": "log_adversarial"}
        assert torch.equal(one.adversarial_images(images), whole.adversarial_images(images))
    assert {file: file.read_bytes() for file in before} == before
    evaluate(model, images, labels, **OPTIONS)
    if shards == 1:
        assert later < count() - first / 2
    with message("has other n_examples 23 instead of 13"):
        evaluate(model, images[:13], labels[:13], log=log, **OPTIONS)
    with message("has other data in its 23 images"):
        more = torch.cat([images[:22], images])
        evaluate(model, more, model(more).argmax(1), log=log, **OPTIONS)


def test_the_number_of_shards_may_change_and_no_batch_runs_twice(tmp_path):
    model, images, labels = sample(count=23)
    whole = evaluate(model, images, labels, log=tmp_path / "whole.json", **OPTIONS)
    log, runs = tmp_path / "log.json", []
    for shard in ((2, 3), (4, 4), (1, 2), (2, 2), (1, 1)):
        with contextlib.suppress(Unfinished):
            evaluate(model, images, labels, log=log, shard=shard, wait=0, **{**OPTIONS, "progress": runs.append})
    found = Evaluation.load(log)
    assert without_times(found.log) == {**without_times(whole.log), "adversarial": "log_adversarial"}
    files = [file.name for file in (tmp_path / "log_adversarial").iterdir()]
    assert len(files) == 1 + sum(entry["batches"] for entry in found.log["progress"])


def forked(function):
    """Starts a process that has all that this one has imported and patched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it forks, and torch may have threads
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
    return process


def test_a_killed_shard_loses_its_unfinished_batch_only(tmp_path):
    model, images, labels = sample(count=23)
    whole = evaluate(model, images, labels, log=tmp_path / "whole.json", **OPTIONS)
    log, folder = tmp_path / "log.json", tmp_path / "log_adversarial"

    def run(number):
        model.register_forward_hook(lambda *_: time.sleep(0.01))
        evaluate(model, images, labels, log=log, shard=(number, 2), **OPTIONS)

    processes = [forked(functools.partial(run, number)) for number in (1, 2)]
    until = time.monotonic() + 60
    while not [*folder.glob("0-apgd-ce-00001-*")]:
        assert time.monotonic() < until
        time.sleep(0.01)
    for process in processes:  # the other in its second batch, the first one too or while it waits
        process.kill()
        process.join()
    assert not [*folder.glob("0-apgd-ce-00003-*")]
    before = {file: file.stat().st_mtime_ns for file in folder.glob("[0-9]*.npz")}
    found, *_ = in_turn(3, model, images, labels, log=log, **OPTIONS)
    assert without_times(found.log) == {**without_times(whole.log), "adversarial": "log_adversarial"}
    assert torch.equal(found.adversarial_images(images), whole.adversarial_images(images))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_model_of_a_process_group_waits_for_no_other_rank(tmp_path, monkeypatch):
    model, images, labels = sample()
    whole = evaluate(model, images, labels, **OPTIONS)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model).eval()
        monkeypatch.setattr(nn.parallel.DistributedDataParallel, "forward", None)  # where ranks wait for each other
        shard = (dist.get_rank() + 1, dist.get_world_size())
        found = evaluate(wrapped, images, labels, log=tmp_path / "log.json", shard=shard, **OPTIONS)
    finally:
        dist.destroy_process_group()
    assert without_times(found.log) == {**without_times(whole.log), "adversarial": "log_adversarial"}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """What `ikl evaluate` is called with."""
    folder = tmp_path_factory.mktemp("files")
    write_network_and_images(folder, 12, wrong=1)
    given = f"--checkpoint {folder}/net.pt --architecture WideResNet-10-1 --data {folder}/images.npz --device cpu"
    return [*given.split(), "--eps", "1/510", "--attacks", "apgd-ce,square", "--batch-size", "2"]


def status(*arguments):
    """The exit status of `ikl evaluate`, or the line with which it ends."""
    try:
        ikl(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def log_and_images(folder):
    found = Evaluation.load(folder / "evaluation.json")
    return without_times(found.log), {index: image.tolist() for index, image in found.adversarial.items()}


@pytest.fixture(scope="module")
def alone(line, tmp_path_factory):
    """The output of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quicker)
        assert status(*line, "--output", folder) == 0
    return folder


def test_ranks_share_the_work_and_the_first_one_speaks(line, alone, tmp_path, monkeypatch):
    def run(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with (tmp_path / f"{rank}.txt").open("w") as said:
            sys.stdout = sys.stderr = said
            code = status(*line, "--output", tmp_path / "out")
        sys.exit(code)

    processes = [forked(functools.partial(run, rank)) for rank in (0, 1)]
    for process in processes:
        process.join(60)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert [process.exitcode for process in processes] == [0, 0], first + second
    assert log_and_images(tmp_path / "out") == log_and_images(alone)
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("\n") == (alone / "report.md").read_text().count("\n")
    assert "robust accuracy" in first
    assert second == ""


def test_folders_that_are_not_shared_are_merged(line, alone, tmp_path, capsys):
    shards, merged = [tmp_path / "1", tmp_path / "2"], tmp_path / "merged"
    for _ in range(2):  # one round for each attack
        for number, folder in enumerate(shards, start=1):
            assert status(*line, "--output", folder, "--shard", f"{number}/2", "--wait", "0") == 75
        said = capsys.readouterr().err
        assert "shard 2 of 2 has done its part, but" in said
        assert "from folders that are not shared, bring them together with --merge" in said
        code = status("--merge", *reversed(shards), "--output", merged)
        for folder in shards:
            shutil.copytree(merged, folder, dirs_exist_ok=True)
    assert code == 0
    assert "robust accuracy" in capsys.readouterr().out
    assert log_and_images(merged) == log_and_images(alone)
    assert (merged / "report.md").is_file()
    (merged / "curve").mkdir()
    assert status("--merge", merged, "--output", merged) == 0
    assert "The curve is not merged. Run one process with --curve" in capsys.readouterr().out
    (shards[1] / "evaluation.json").unlink()
    assert status(*line, "--output", tmp_path / "3", "--shard", "2/2", "--wait", "0", "--seed", "1") == 75
    text = status("--merge", shards[0], tmp_path / "3", "--output", tmp_path / "no")
    assert f"merge: all folders must be of the evaluation of {shards[0]}/evaluation.json, but {tmp_path / '3'}" in text
    assert "has other seed 1 instead of 0" in text
    part = min((shards[1] / "evaluation_adversarial").glob("1-square-*"))
    part.unlink()
    assert status("--merge", shards[1], shards[1], "--output", tmp_path / "no").endswith("none has. Add its folder.")
    shutil.copy(merged / "evaluation.json", shards[1])
    assert status("--merge", shards[1], "--output", tmp_path / "part") == 75
    assert re.search(r"square: (\d) of (?!\1)\d batches are there. Run the shards again", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--eps 1/255 --shard 3", "--shard must be two numbers such as 3/8, got 3"),
        ("--eps 1/255 --shard a/b", "--shard must be two numbers such as 3/8, got a/b"),
        ("--merge x --eps 1/255", "--merge does not read --eps, as it runs no model"),
        ("--merge x", "one folder must have the log of shard 1, but none has"),
        ("--threat-model corruptions --shard 1/2", "--threat-model corruptions does not read --shard"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, text, tmp_path):
    assert text in status(*arguments.split(), "--output", tmp_path)


def test_a_shard_under_a_launcher_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--shard must be left out under torchrun" in status("--shard", "1/2", "--output", tmp_path)


@pytest.mark.slow
def test_torchrun(line, alone, tmp_path):
    attack = [word.replace("apgd-ce,square", "apgd-ce") for word in line]
    commands = [["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"], ["-m"]]
    logs = []
    for number, command in enumerate(commands):
        output = tmp_path / str(number)
        words = [sys.executable, *command, "ikl_plugins", "evaluate", *attack, "--output", str(output)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("robust accuracy") == 1
        logs.append(log_and_images(output))
    assert logs[0] == logs[1]


# --- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_with_the_holder_named(tmp_path):
    given, log = sample(), tmp_path / "log.json"
    here = r"process \d+ on \S+ does. Wait for it, or share the work with --shard."
    with locked("someone", log, ""):
        with pytest.raises(ValueError, match=f"^evaluate: {log} must have one process that writes it, but {here}$"):
            evaluate(*given, log=log, **OPTIONS)
        with pytest.raises(Unfinished):  # not the one that writes
            evaluate(*given, log=log, shard=(2, 2), wait=0, **OPTIONS)
    evaluate(*given, log=log, **OPTIONS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.json", "log_adversarial"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"shard": (0, 2)}, ValueError, "`shard` must be two numbers such as (3, 8), the third of eight, got (0, 2)"),
        ({"shard": (3, 2)}, ValueError, "got (3, 2)"),
        ({"shard": "1/2"}, ValueError, "got '1/2'"),
        ({"shard": (1, 2), "log": None}, ValueError, "`shard` needs a `log`"),
        ({"wait": -1}, ValueError, "`wait` must be a finite number of at least 0"),
    ],
)
def test_shards_that_are_none_are_refused(changes, kind, text, tmp_path):
    with message(text, kind):
        evaluate(*sample(), **{"log": tmp_path / "log.json", **OPTIONS, **changes})


def test_a_shard_of_another_evaluation_is_refused_when_the_log_is_there(tmp_path, capsys):
    given, log = sample(), tmp_path / "log.json"
    with pytest.raises(Unfinished, match=r"shard 2 of 2 has done its part, but 2 batches of apgd-ce from shard 1 are"):
        evaluate(*given, log=log, shard=(2, 2), wait=0, seed=1, **OPTIONS)

    def writes(_, __):
        if not log.exists():
            evaluate(*sample(), log=log, **OPTIONS)

    model = given[0]
    model.register_forward_pre_hook(writes)
    with message("has other seed 0 instead of 1"):
        evaluate(*given, log=log, shard=(2, 2), wait=0, seed=1, **OPTIONS)


def test_whom_a_shard_waits_for_is_said_once_a_minute(tmp_path, monkeypatch, capsys):
    from ikl_plugins.robustbench.evaluation import shards

    clock = iter(range(0, 10000, 20))
    monkeypatch.setattr(shards.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    with pytest.raises(Unfinished):
        evaluate(*sample(), log=tmp_path / "log.json", shard=(2, 3), wait=300, **{**OPTIONS, "progress": True})
    said = [line for line in capsys.readouterr().err.splitlines() if "waits" in line]
    assert said == ["shard 2 of 3 waits for 2 batches of apgd-ce from shard 1, shard 3"] * len(said)
    assert 4 <= len(said) <= 6


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1"}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (3, 4)),
    ],
)
def test_a_launcher_makes_shards_of_its_ranks(environment, shard):
    assert launched("ikl evaluate", environment) == shard


def test_variables_that_are_no_ranks_are_refused():
    with message("RANK must lie below WORLD_SIZE, got RANK=4, WORLD_SIZE=4"):
        launched("ikl evaluate", {"RANK": "4", "WORLD_SIZE": "4"})
