"""Mutated configs: a clear error before the first training step, or the config trains to its end.

The shipped digits/ikl.yaml of torchdistill and digits/distill_ikl.py of MMPretrain are changed in one random place
each: a misspelt or missing key, a value of another type or out of range, an unknown name, two exchanged values. What
comes of it is read as the host reads it, and trained on a few images in a process forked for it: all epochs, with
validation, checkpoint and test, so that what is only looked up at the end is found as well.
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
import yaml
from campaign.digits import TORCHDISTILL, few_digits, mmpretrain_config, mmpretrain_teacher, quiet
from campaign.isolated import Answer, each
from campaign.kills import replaced
from campaign.record import Record, anonymous

__all__ = ["HOSTS", "Mutation", "judge", "mutate", "python_text", "run", "yaml_text", "yaml_tree"]

MUTANTS = 200
QUICK_MUTANTS = 12
CHUNK = 10
TIMEOUT = 120.0
EPOCHS = 2
MOST_STEPS = 60  # a mutant that goes on longer has shown that it trains
KINDS = ("misspelt key", "missing key", "other type", "out of range", "unknown name", "exchanged values")
# Before the first step a host may say in its own words, or in none, what it does not like: that is not ours to word,
# and is counted. What this package says must name the place, and behind the first step nothing may stop the training.
FAILURES = (
    "refused by us without a name", "refused by us without a message", "the misspelt key is ours and ignored",
    "error after training started", "hung", "died",
)  # fmt: skip
# Intermediate names of the shipped MMPretrain configs, which the host does not read.
UNREAD = ("pipeline", "loader", "data_root")
OUT_OF_RANGE = (-1, 0, 3.5, 1e30, math.nan, math.inf, -math.inf)
OURS = re.compile(r"/(ikl_plugins/|tools/train_torchdistill\.py)")


class EnoughError(Exception):
    """A mutant has shown that it trains."""


class Mutation(NamedTuple):
    """What was changed.

    Attributes:
        kind: one of :data:`KINDS`.
        path: keys and indices down to the place.
        old: key or value that was there.
        new: what is there now; None where nothing is.
    """

    kind: str
    path: tuple[Any, ...]
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.kind}: {'.'.join(map(str, self.path))}: {self.old!r:.100} -> {self.new!r:.100}"


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(tree: dict[Any, Any], rng: np.random.Generator) -> tuple[dict[Any, Any], Mutation]:
    """A copy of the config with one change."""
    tree = copy.deepcopy(tree)
    while True:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        places = list(_places(tree))
        path, parent, key = places[int(rng.integers(len(places)))]
        value = parent[key]
        if kind == "misspelt key" and isinstance(parent, dict) and len(str(key)) > 2:
            new = _misspelt(str(key), rng)
            items = [(new if name == key else name, item) for name, item in parent.items()]
            parent.clear()
            parent.update(items)
            return tree, Mutation(kind, path, key, new)
        if kind == "missing key" and isinstance(parent, dict):
            del parent[key]
            return tree, Mutation(kind, path, key, None)
        if kind == "other type":
            parent[key] = _other_type(value, rng)
            return tree, Mutation(kind, path, value, parent[key])
        if kind == "out of range" and isinstance(value, (int, float)) and not isinstance(value, bool):
            parent[key] = OUT_OF_RANGE[int(rng.integers(len(OUT_OF_RANGE)))]
            return tree, Mutation(kind, path, value, parent[key])
        if kind == "unknown name" and isinstance(value, str) and len(value) > 2:
            parent[key] = _misspelt(value, rng)
            return tree, Mutation(kind, path, value, parent[key])
        if kind == "exchanged values" and isinstance(parent, dict):
            others = [
                name for name, item in parent.items()
                if name != key and not isinstance(item, (dict, list, tuple)) and item != value
            ]  # fmt: skip
            if others and not isinstance(value, (dict, list, tuple)):
                other = others[int(rng.integers(len(others)))]
                parent[key], parent[other] = parent[other], value
                return tree, Mutation(kind, path, f"{key}={value!r}", f"{other}={parent[key]!r}")


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Every entry of every mapping and list, with its path and its holder."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield (*path, key), tree, key
        yield from _places(value, (*path, key))


def _misspelt(word: str, rng: np.random.Generator) -> str:
    """The word with a letter dropped, doubled or exchanged with its neighbour."""
    while True:
        at = int(rng.integers(1, len(word)))
        way = int(rng.integers(3))
        new = (
            word[:at] + word[at + 1 :]
            if way == 0
            else word[:at] + word[at] + word[at:]
            if way == 1
            else word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
        )
        if new != word and new:
            return new


def _other_type(value: Any, rng: np.random.Generator) -> Any:
    """A value of another type than this one."""
    options: list[Any] = ["several words", 3, 0.5, None, [1, 2], {"some": "thing"}, True, "False"]
    options = [option for option in options if type(option) is not type(value)]
    return options[int(rng.integers(len(options)))]


# --- configs as trees ------------------------------------------------------------------------------------------------


class Tagged(dict[Any, Any]):
    """A mapping of YAML with a tag."""

    tag = ""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct(loader: Any, suffix: str, node: Any) -> Tagged:
    found = Tagged(loader.construct_mapping(node, deep=True))
    found.tag = f"!{suffix}"
    return found


_Loader.add_multi_constructor("!", _construct)
_Dumper.add_representer(Tagged, lambda dumper, data: dumper.represent_mapping(data.tag, dict(data)))


def yaml_tree(text: str) -> Any:
    """A torchdistill config as mappings and lists, its tags kept and nothing run."""
    return copy.deepcopy(yaml.load(text, _Loader))  # noqa: S506  # a safe loader


def yaml_text(tree: Any) -> str:
    """The text of such a tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def python_text(tree: dict[str, Any]) -> str:
    """An MMEngine config file: one assignment a key."""
    return "".join(f"{key} = {_literal(value)}\n" for key, value in tree.items())


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = "".join(f"{_literal(item)}, " for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return f"float({str(value)!r})" if isinstance(value, float) and not math.isfinite(value) else repr(value)


# --- hosts -----------------------------------------------------------------------------------------------------------


class Host(NamedTuple):
    """How a host trains a config.

    Attributes:
        tree: the shipped config, shortened.
        text: of a tree, as the host's file has it.
        ending: of the file.
        train: reads and trains a file; reports ('step', number, loss) after each step.
        ours: whether a key at a path is read by this package.
    """

    tree: dict[str, Any]
    text: Callable[[Any], str]
    ending: str
    train: Callable[[Path, Callable[[Any], None]], None]
    ours: Callable[[tuple[Any, ...]], bool]


def _torchdistill(work: Path) -> Host:
    import torch
    from ikl_plugins.torchdistill import training as driver
    from torchdistill.models.registry import get_model

    import ikl_plugins.torchdistill  # noqa: F401  # registers the networks; the driver itself imports it

    teacher = work / "teacher.pt"
    torch.manual_seed(0)
    torch.save({"model": get_model("ikl_plugins.resnet14", num_classes=10).state_dict()}, teacher)
    text = replaced(
        (TORCHDISTILL / "ikl.yaml").read_text(),
        ("num_epochs: 10", f"num_epochs: {EPOCHS}"),
        ("T_max: 10", f"T_max: {EPOCHS}"),
        ("runs/torchdistill/digits/teacher/teacher.pt", str(teacher)),
    )

    def train(path: Path, tell: Callable[[Any], None]) -> None:
        def progress(step: int, steps: int, where: str) -> None:
            tell(("step", step, 0.0))  # a loss that is not finite has been refused before
            if step >= MOST_STEPS:
                raise EnoughError

        driver.run(driver.load_config(path), progress=progress)

    def ours(path: tuple[Any, ...]) -> bool:
        """Keys of the loss, and those that the driver looks up itself."""
        loss = ("train", "criterion", "kwargs", "sub_terms", "ikl", "criterion", "kwargs")
        return path[:-1] == loss or (path[0] == "models" and path[-1] in ("src_ckpt", "dst_ckpt"))

    return Host(yaml_tree(text), yaml_text, ".yaml", train, ours)


def _mmpretrain(work: Path) -> Host:
    import mmpretrain.models  # noqa: F401  # what the forked processes share; this package they import themselves
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    teacher = mmpretrain_teacher(work / "teacher.pth")
    config = mmpretrain_config(
        "distill_ikl",
        **{"model.teacher_ckpt": str(teacher), "train_cfg.max_epochs": EPOCHS, "param_scheduler.T_max": EPOCHS},
    )
    tree = {key: value for key, value in config.to_dict().items() if key not in UNREAD}

    class Watch(Hook):  # type: ignore[misc]
        def __init__(self, tell: Callable[[Any], None]) -> None:
            self.tell = tell

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            loss = float(outputs["loss"])
            self.tell(("step", runner.iter + 1, loss))
            if not math.isfinite(loss) or runner.iter + 1 >= MOST_STEPS:
                raise EnoughError

    def train(path: Path, tell: Callable[[Any], None]) -> None:
        # As mmpretrain's tools/train.py does it.
        found = Config.fromfile(str(path))
        if found.get("work_dir") is None:
            found.work_dir = "work_dirs"
        runner = Runner.from_cfg(found)
        runner.register_hook(Watch(tell), priority="LOWEST")
        runner.train()

    def ours(path: tuple[Any, ...]) -> bool:
        known = ("teacher", "teacher_ckpt", "teacher_val_batches", "ce_weight", "distill_loss", "distill_weight")
        known += ("warmup_epochs",)
        return (path[0] == "model" and len(path) > 1 and path[1] in known) or path[:2] == ("custom_hooks", 0)

    return Host(tree, python_text, ".py", train, ours)


HOSTS = {"torchdistill": _torchdistill, "mmpretrain": _mmpretrain}


# --- the campaign ----------------------------------------------------------------------------------------------------


def judge(mutation: Mutation, answer: Answer, *, ours: bool) -> tuple[str, str]:
    """The outcome of a mutant and what was said.

    Args:
        mutation: what was changed.
        answer: of the process.
        ours: whether the changed key is read by this package.
    """
    steps = [told for told in answer.told if told[0] == "step"]
    if answer.how in ("hung", "died"):
        return answer.how, f"after {len(steps)} steps"
    kind, message, trace = answer.value if answer.how == "raised" else ("", "", "")
    # The torchdistill driver stops at such a loss and says so, MMPretrain goes on with it.
    stopped = "the loss must stay finite" in message
    if stopped or (steps and not math.isfinite(steps[-1][2])):
        finite = len(steps) if stopped else len(steps) - 1
        return "trains until the loss is not finite" if finite else "the first loss is not finite", message
    if answer.how == "returned" or kind == "EnoughError":
        if mutation.kind != "misspelt key":
            return "trains", ""
        return ("the misspelt key is ours and ignored" if ours else "trains; the host ignores the key"), ""
    said = f"{kind}: {message}"
    if steps:
        return "error after training started", f"{said}\n{trace}"
    files = re.findall(r'File "([^"]+)"', trace)
    who = "us" if files and OURS.search(files[-1]) else "the host"
    if not message.strip():
        return f"refused by {who} without a message", f"{said}\n{trace}"
    named = any(name in said.lower() for name in _names(mutation))
    return f"refused by {who}{'' if named else ' without a name'}", said


def _names(mutation: Mutation) -> set[str]:
    """What a message may call the changed place by: its key, the block around it, the old or the new value."""
    strings = [str(key) for key in mutation.path[-2:] if isinstance(key, str)]
    strings += [value for value in (mutation.old, mutation.new) if isinstance(value, str)]
    if isinstance(mutation.new, (int, float)) and not isinstance(mutation.new, bool):
        strings.append(str(mutation.new))
    if mutation.kind == "exchanged values":
        strings += [part.strip("'") for value in (mutation.old, mutation.new) for part in str(value).split("=", 1)]
    found = {string.lower() for string in strings if len(string) > 1}
    return found | {part for string in found for part in string.rsplit(".", 1) if len(part) > 2}


def run(record: Record, work: Path, *, seed: int, quick: bool, hosts: tuple[str, ...] = tuple(HOSTS)) -> None:
    """Mutates and trains.

    Args:
        record: of the part.
        work: folder for data, teachers and mutants.
        seed: of the mutations.
        quick: few mutants.
        hosts: keys of :data:`HOSTS`.
    """
    quiet()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["IKL_PLUGINS_DATA"] = str(few_digits(work / "data"))
    mutants = QUICK_MUTANTS if quick else MUTANTS
    record.fact("mutants of each host", mutants)
    for name in hosts:
        if record.done(f"{name} from {mutants - 1 - (mutants - 1) % CHUNK}"):
            continue
        host = HOSTS[name](work)
        (sound,) = each([_case(host, host.tree, work / "sound")], TIMEOUT)
        if sound.how != "returned":
            raise RuntimeError(f"{name}: the config itself does not train: {sound.value}")
        for first in range(0, mutants, CHUNK):
            if record.done(f"{name} from {first}"):
                continue
            numbers = range(first, min(mutants, first + CHUNK))
            pairs = [mutate(host.tree, np.random.default_rng([seed, len(name), number])) for number in numbers]
            for number, (tree, mutation) in zip(numbers, pairs, strict=True):
                # A process for each: what a mutant has registered or imported must not help the next.
                (answer,) = each([_case(host, tree, work / f"mutant{number}")], TIMEOUT)
                outcome, said = judge(mutation, answer, ours=host.ours(mutation.path))
                record.add(name, [outcome])
                if outcome in FAILURES:
                    record.fail(name, number=number, input=str(mutation), what=outcome, detail=said[-2000:])
                elif outcome not in ("trains", "refused by us", "refused by the host"):
                    record.remark(name, f"{outcome}: {mutation}"[:300], anonymous(said)[:300])
            record.save(f"{name} from {first}")
            print(f"configs, {name}: {numbers[-1] + 1} of {mutants}", flush=True)
    record.finish()


def _case(host: Host, tree: Any, folder: Path) -> Callable[[Callable[[Any], None]], None]:
    def case(tell: Callable[[Any], None]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / f"config{host.ending}"
        path.write_text(host.text(tree))
        os.chdir(folder)
        try:
            host.train(path, tell)
        finally:
            os.chdir(folder.parent)
            shutil.rmtree(folder, ignore_errors=True)

    return case
