"""Mutated configs: a clear error before the first training step, or the config trains to its end.

The shipped digits/ikl.yaml of torchdistill and digits/distill_ikl.py of MMPretrain are changed in one random place
each: a misspelt or missing key, a value of another type or out of range, an unknown name, two exchanged values. What
comes of it is read as the host reads it, and trained on a few images in a process forked for it: all epochs, with
validation, checkpoint and test, so that what is only looked up at the end is found as well.

Besides, a run of each host is stopped and resumed with another setting: refused by its name, before the first step.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from campaign.digits import (
    TORCHDISTILL,
    few_digits,
    mmpretrain_config,
    mmpretrain_teacher,
    quiet,
    replaced,
    torchdistill_teacher,
)
from campaign.in_child_process import Answer, Tell, in_child_process, value_of
from campaign.mutations import Mutation, mutate, python_text, yaml_text, yaml_tree
from campaign.record import SOURCES, Outcomes, is_quick

MUTANTS = 200
QUICK_MUTANTS = 12
TIMEOUT = 120.0
EPOCHS = 2
MOST_STEPS = 60  # a mutant that goes on longer has shown that it trains
# Before the first step a host may say in its own words, or in none, what it does not like: that is not ours to word,
# and is counted. What this package says must name the place, and behind the first step nothing may stop the training.
FAILURES = {
    "refused by us without a name",
    "refused by us without a message",
    "the misspelt key is ours and ignored",
    "error after training started",
    "hung",
    "died",
}
UNREMARKABLE = {"trains", "refused by us", "refused by the host"}
RESUMES, REFUSED = "goes on", "another setting is refused by name"
# By host what a resumed run gets in place of what it was started with, by the path in its config.
_LOSS = ("train", "criterion", "kwargs", "sub_terms", "ikl")
OTHERS: dict[str, dict[tuple[Any, ...], Any]] = {
    "torchdistill": {
        (*_LOSS, "criterion", "key"): "GKLLoss",
        (*_LOSS, "criterion", "kwargs", "beta"): 0.123,
        (*_LOSS, "criterion", "kwargs", "temperature"): 3.0,
        (*_LOSS, "criterion", "kwargs", "weight_temperature"): 3.0,
        (*_LOSS, "criterion", "kwargs", "warmup_epochs"): 5,
        (*_LOSS, "weight"): 0.5,
        ("train", "train_data_loader", "kwargs", "batch_size"): 16,
    },
    "mmpretrain": {
        ("model", "distill_loss", "type"): "GKLLoss",
        ("model", "distill_loss", "beta"): 0.123,
        ("model", "distill_loss", "temperature"): 3.0,
        ("model", "distill_loss", "weight_temperature"): 3.0,
        ("model", "warmup_epochs"): 5,
        ("model", "distill_weight"): 0.5,
        ("model", "ce_weight"): 0.123,
        ("train_dataloader", "batch_size"): 16,
    },
}
# Intermediate names of the shipped MMPretrain configs, which the host does not read.
UNREAD = ("pipeline", "loader", "data_root")


class EnoughError(Exception):
    """A mutant has shown that it trains."""


class Host(NamedTuple):
    """How a host trains a config."""

    tree: dict[str, Any]  # the shipped config, shortened
    text: Callable[[Any], str]  # of a tree, as the host's file has it
    ending: str  # of that file
    train: Callable[[Path, Tell, bool], None]  # reports the number of each step and its loss; True: the run goes on
    ours: Callable[[tuple[Any, ...]], bool]  # whether a key at a path is read by this package


def torchdistill(work: Path) -> Host:
    from ikl_plugins.torchdistill import training

    teacher = work / "teacher.pt"
    torchdistill_teacher(teacher)
    text = replaced(
        (TORCHDISTILL / "ikl.yaml").read_text(),
        ("num_epochs: 10", f"num_epochs: {EPOCHS}"),
        ("T_max: 10", f"T_max: {EPOCHS}"),
        ("runs/torchdistill/digits/teacher/teacher.pt", str(teacher)),
    )

    def train(path: Path, tell: Tell, again: bool) -> None:
        def progress(step: int, steps: int, where: str) -> None:
            tell((step, 0.0))  # a loss that is not finite has been refused before
            if step >= MOST_STEPS:
                raise EnoughError

        training.run(training.load_config(path), start_epoch=int(again), progress=progress)

    def ours(path: tuple[Any, ...]) -> bool:
        """Keys of the loss, and those that the driver looks up itself."""
        loss = ("train", "criterion", "kwargs", "sub_terms", "ikl", "criterion", "kwargs")
        return path[:-1] == loss or (path[0] == "models" and path[-1] in ("src_ckpt", "dst_ckpt"))

    return Host(yaml_tree(text), yaml_text, ".yaml", train, ours)


def mmpretrain(work: Path) -> Host:
    import mmpretrain.models  # noqa: F401  # what the forked processes share; this package they import themselves
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    teacher = mmpretrain_teacher(work / "teacher.pth")
    shorter = {"train_cfg.max_epochs": EPOCHS, "param_scheduler.T_max": EPOCHS}
    config = mmpretrain_config("distill_ikl", **{"model.teacher_ckpt": str(teacher)}, **shorter)
    tree = {key: value for key, value in config.to_dict().items() if key not in UNREAD}

    class Watch(Hook):  # type: ignore[misc]
        def __init__(self, tell: Tell) -> None:
            self.tell = tell

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            loss = float(outputs["loss"])
            self.tell((runner.iter + 1, loss))
            if not math.isfinite(loss) or runner.iter + 1 >= MOST_STEPS:
                raise EnoughError

    def train(path: Path, tell: Tell, again: bool) -> None:
        # As mmpretrain's tools/train.py does it.
        found = Config.fromfile(str(path))
        if found.get("work_dir") is None:
            found.work_dir = "work_dirs"
        found.resume = again or found.get("resume", False)
        runner = Runner.from_cfg(found)
        runner.register_hook(Watch(tell), priority="LOWEST")
        runner.train()

    def ours(path: tuple[Any, ...]) -> bool:
        known = ("teacher", "teacher_ckpt", "teacher_val_batches", "ce_weight", "distill_loss", "distill_weight")
        of_model = path[0] == "model" and len(path) > 1 and path[1] in (*known, "warmup_epochs")
        return of_model or path[:2] == ("custom_hooks", 0)

    return Host(tree, python_text, ".py", train, ours)


HOSTS = {"torchdistill": torchdistill, "mmpretrain": mmpretrain}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("host", HOSTS, indirect=True, scope="module")
        metafunc.parametrize("number", range(QUICK_MUTANTS if is_quick(metafunc.config) else MUTANTS))


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    work = tmp_path_factory.mktemp("configs")
    with pytest.MonkeyPatch.context() as patch:
        with quiet():
            patch.setenv("IKL_PLUGINS_DATA", str(few_digits(work / "data")))
            found = HOSTS[request.param](work)
        value_of(training_of(found, found.tree, work / "sound"), TIMEOUT)  # the config itself trains
        yield found


@pytest.mark.campaign
def test_configs(host: Host, number: int, tmp_path: Path, outcomes: Outcomes) -> None:
    name = "torchdistill" if host.ending == ".yaml" else "mmpretrain"
    tree, mutation = mutate(host.tree, np.random.default_rng([outcomes.seed, len(name), number]))
    # A process for each: what a mutant has registered or imported must not help the next.
    answer = in_child_process(training_of(host, tree, tmp_path / "mutant"), TIMEOUT)
    outcome, said = judge(mutation, answer, ours=host.ours(mutation.path))
    outcomes.count(name, [outcome])
    if outcome in FAILURES:
        outcomes.fail(name, number=number, input=str(mutation), what=outcome, detail=said[-2000:])
    elif outcome not in UNREMARKABLE:
        outcomes.remark(name, f"{outcome}: {mutation}"[:300], said[:300])
    assert not outcomes.failures


@pytest.mark.campaign
@pytest.mark.parametrize("host", HOSTS, indirect=True, scope="module")
def test_configs_resumed(host: Host, tmp_path: Path, outcomes: Outcomes) -> None:
    name = "torchdistill" if host.ending == ".yaml" else "mmpretrain"
    begun, again = tmp_path / "begun", tmp_path / "again"
    value_of(training_of(host, shorter(host.tree), begun, keep=True), TIMEOUT)
    for path, value in [((), None), *OTHERS[name].items()]:
        shutil.copytree(begun, again)
        tree = changed(host.tree, path, value)
        answer = in_child_process(training_of(host, tree, again, again=True), TIMEOUT)
        outcome, said = judge_resumed(answer, path)
        outcomes.count(f"{name}, resumed", [outcome])
        if outcome not in (RESUMES, REFUSED):
            what = f"{'.'.join(map(str, path))}: {value!r}"
            outcomes.fail(f"{name}, resumed", input=what, what=outcome, detail=said[-2000:])
    assert not outcomes.failures


def shorter(tree: Any) -> Any:
    """The config of a run that ends after its first epoch, from which one of EPOCHS goes on."""
    path = ("train", "num_epochs") if "train" in tree else ("train_cfg", "max_epochs")
    return changed(tree, path, 1)


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    found = parent = copy.deepcopy(tree)
    for key in path[:-1]:
        parent = parent.setdefault(key, {})
    if path:
        parent[path[-1]] = value
    return found


def judge_resumed(answer: Answer, path: tuple[Any, ...]) -> tuple[str, str]:
    """The outcome of a resumed run and what was said; ``path`` leads to what has changed, if anything has."""
    if answer.how in ("hung", "died"):
        return answer.how, ""
    said = f"{answer.value[0]}: {answer.value[1]}" if answer.how == "raised" else ""
    if not path:
        return (RESUMES if answer.how == "returned" else "does not go on"), said
    if answer.how == "returned":
        return "another setting is not seen", ""
    name = "type" if path[-1] in ("type", "key") else str(path[-1])
    refused = answer.value[0] == "ValueError" and not answer.told and re.search(rf"\b{name}\b", answer.value[1])
    return (REFUSED if refused else "another error"), said


def training_of(
    host: Host, tree: Any, folder: Path, *, again: bool = False, keep: bool = False
) -> Callable[[Tell], None]:
    def case(tell: Tell) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / f"config{host.ending}"
        path.write_text(host.text(tree))
        os.chdir(folder)
        try:
            host.train(path, tell, again)
        finally:
            os.chdir(folder.parent)
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    return case


def judge(mutation: Mutation, answer: Answer, *, ours: bool) -> tuple[str, str]:
    """The outcome of a mutant and what was said; ``ours``: whether the changed key is read by this package."""
    steps = len(answer.told)
    if answer.how in ("hung", "died"):
        return answer.how, f"after {steps} steps"
    kind, message, trace = answer.value if answer.how == "raised" else ("", "", "")
    # The torchdistill driver stops at such a loss and says so, MMPretrain goes on with it.
    stopped = "the loss must stay finite" in message
    if stopped or (steps and not math.isfinite(answer.told[-1][1])):
        finite = steps if stopped else steps - 1
        return "trains until the loss is not finite" if finite else "the first loss is not finite", message
    if answer.how == "returned" or kind == "EnoughError":
        if mutation.kind != "misspelt key":
            return "trains", ""
        return ("the misspelt key is ours and ignored" if ours else "trains; the host ignores the key"), ""
    said = f"{kind}: {message}"
    if steps:
        return "error after training started", f"{said}\n{trace}"
    files = re.findall(r'File "([^"]+)"', trace)
    who = "us" if files and SOURCES in Path(files[-1]).parents else "the host"
    if not message.strip():
        return f"refused by {who} without a message", f"{said}\n{trace}"
    named = any(name in said.lower() for name in names_of(mutation))
    return f"refused by {who}{'' if named else ' without a name'}", said


def names_of(mutation: Mutation) -> set[str]:
    """What a message may call the changed place by: its key, the block around it, the old or the new value."""
    strings = [str(key) for key in mutation.path[-2:] if isinstance(key, str)]
    strings += [value for value in (mutation.old, mutation.new) if isinstance(value, str)]
    if isinstance(mutation.new, (int, float)) and not isinstance(mutation.new, bool):
        strings.append(str(mutation.new))
    if mutation.kind == "exchanged values":
        strings += [part.strip("'") for value in (mutation.old, mutation.new) for part in str(value).split("=", 1)]
    found = {string.lower() for string in strings if len(string) > 1}
    return found | {part for string in found for part in string.rsplit(".", 1) if len(part) > 2}
