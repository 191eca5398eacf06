"""What a run was started with, as a checkpoint keeps it, and what is said of a run that goes on with something else."""

import logging
import subprocess
import sys

import pytest
import torch

from ikl_plugins import losses
from ikl_plugins._run_record import check_resumed, differences, settings_of
from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation

# A value for each keyword of the losses that has an effect, other than its default.
OTHER = {
    "alpha": 2.5,
    "beta": 2.5,
    "temperature": 2.5,
    "weight_temperature": 2.5,
    "gamma": 2.5,
    "reduction": "sum",
    "global_info": True,
    "num_classes": 7,
}


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_setting_of_each_loss_is_recorded_and_told_apart(name):
    kind = losses.LOSSES[name]
    keywords = kind.__init__.__kwdefaults__
    assert keywords.keys() - OTHER.keys() == {"check_finite"}
    base = {"num_classes": 3}
    was = settings_of(kind(**base))
    assert was == {"type": name, **{key: keywords[key] for key in keywords if key != "check_finite"}, **base}
    for key in keywords.keys() - {"check_finite"}:
        if (name, key) == ("DKLLoss", "global_info"):
            continue  # always False
        found = differences({"losses": {"a": was}}, {"losses": {"a": settings_of(kind(**{**base, key: OTHER[key]}))}})
        assert found == {f"losses.a.{key}": f"was {was[key]!r}, is {OTHER[key]!r}"}
    assert settings_of(kind(**base, check_finite=True)) == was


def test_a_preset_is_its_numbers():
    by_name = losses.IKLLoss.preset("start")
    assert settings_of(by_name) == settings_of(
        losses.IKLLoss(alpha=4.0, beta=0.5, temperature=4.0, weight_temperature=4.0)
    )


PGD_20 = {"eps": 0.25, "steps": 20, "step_size": 0.0625, "random_start": "uniform", "objective": "cross_entropy"}


@pytest.mark.parametrize(
    ("kind", "keywords", "changed", "fields"),
    [
        (PGD, PGD_20, {"eps": 0.5, "step_size": 0.125}, ["eps"]),
        (PGD, PGD_20, {"steps": 10}, ["budget.0.steps"]),
        (PGD, PGD_20, {"step_size": 0.125}, ["budget.0.relative_step"]),
        (PGD, PGD_20, {"random_start": "none"}, ["random_start"]),
        (PGD, PGD_20, {"objective": "margin"}, ["objective"]),
        (PGD, PGD_20, {"model_mode": "train"}, ["model_mode"]),
        (PGD, PGD_20, {"norm": "l2"}, ["norm"]),
        (AdversarialWeightPerturbation, {}, {"gamma": 0.5}, ["gamma"]),
        (AdversarialWeightPerturbation, {}, {"undo": "after_step"}, ["undo"]),
    ],
)
def test_attacks_are_told_apart(kind, keywords, changed, fields):
    was, now = settings_of(kind(**keywords)), settings_of(kind(**{**keywords, **changed}))
    assert list(differences({"attack": was}, {"attack": now})) == [f"attack.{field}" for field in fields]


class Owner:
    """Keeps its keywords as classifiers do: as they are, with an underscore, and as a default of the class."""

    _part = None

    def __init__(self, a=1, part=None, gone=2):
        self.a = a
        if part is not None:
            self._part = part

    @property
    def part(self):
        raise ValueError


Owner.__module__ = losses.__name__


def test_a_part_that_is_new_is_told_apart():
    was, now = settings_of(Owner()), settings_of(Owner(part=Owner(a=3)))
    assert was == {"type": "Owner", "a": 1, "part": None}
    assert now == {**was, "part": {"type": "Owner", "a": 3, "part": None}}
    assert differences({"model": was}, {"model": now}) == {"model.part": "was None, is 'Owner'"}


def optimizer(kind, **keywords):
    return settings_of(kind([torch.nn.Parameter(torch.zeros(1))], **keywords))


# The record of the checkpoint, that of the run, and what is said.
CASES = {
    "the same": ({"losses": {}, "batch_size": 8}, {"losses": {}, "batch_size": 8}, {}),
    "a whole number": ({"batch_size": 8}, {"batch_size": 8.0}, {}),
    "a field that an older release has not known": ({"a": 1}, {"a": 1, "b": 2}, {}),
    "a keyword that an older release has not known": ({"x": {"type": "A"}}, {"x": {"type": "A", "k": 1}}, {}),
    "another type": ({"x": {"type": "A", "k": 1}}, {"x": {"type": "B", "k": 1}}, {"x.type": "was 'A', is 'B'"}),
    "one more": ({"losses": {}}, {"losses": {"b": {"type": "B"}}}, {"losses.b": "was None, is 'B'"}),
    "one less": ({"losses": {"b": {"type": "B"}}}, {"losses": {}}, {"losses.b": "was 'B', is None"}),
    "none before": ({"attack": None}, {"attack": {"type": "PGD"}}, {"attack": "was None, is 'PGD'"}),
    "a list": ({"x": [1, 2]}, {"x": [1, 3]}, {"x": "was [1, 2], is [1, 3]"}),
    "another learning rate": (
        {"optimizer": optimizer(torch.optim.SGD, lr=0.5)},
        {"optimizer": optimizer(torch.optim.SGD, lr=0.25, foreach=True)},
        {"optimizer.lr": "was 0.5, is 0.25"},
    ),
    "text of a file": ({"x": "a\x1b[2J\nb"}, {"x": "a"}, {"x": r"was 'a\x1b[2J\nb', is 'a'"}),
    "names of a file": ({"l": {"a\n\x1bb": 1}}, {"l": {}}, {r"l.a\n\x1bb": "was 1, is None"}),
    "a tensor of a file": ({"x": torch.zeros(2)}, {"x": 1}, {"x": "was tensor([0., 0.]), is 1"}),
}


@pytest.mark.parametrize("case", CASES)
def test_differences(case):
    was, now, expected = CASES[case]
    assert differences(was, now) == expected


def test_a_record_that_is_nested_without_end_is_bounded():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(differences({"x": deep, "losses": deep}, {"x": [1], "losses": {}})["x"]) < 100


WAS = {"losses": {"ikl": {"type": "IKLLoss", "temperature": 4.0}}, "batch_size": 64, "epochs": 2, "schedule": None}
WAS["optimizer"] = {"type": "SGD", "lr": 0.5}


def go_on(caplog, was, allowed=False, **changes):
    """The warnings, and the refusal."""
    refusal = ""
    caplog.clear()
    try:
        check_resumed(
            "host",
            "a.pt",
            was,
            {**WAS, **changes},
            allowed=allowed,
            way_out="Allow it.",
            logger=logging.getLogger("host"),
        )
    except ValueError as error:
        refusal = str(error)
    return [record.message for record in caplog.records], refusal


def test_each_field_is_said_and_the_run_refused_unless_asked_for(caplog):
    changes = {"losses": {"ikl": {"type": "IKLLoss", "temperature": 2.0}}, "batch_size": 32}
    lines = ["host: losses.ikl.temperature: was 4.0, is 2.0", "host: batch_size: was 64, is 32"]
    said, refusal = go_on(caplog, WAS, **changes)
    assert said == lines
    assert refusal == (
        "host: a run that goes on from a.pt must keep its settings, but others are losses.ikl.temperature (was 4.0, "
        "is 2.0), batch_size (was 64, is 32). Allow it."
    )
    assert go_on(caplog, WAS, allowed=True, **changes) == (lines, "")
    assert go_on(caplog, WAS) == ([], "")


def test_a_longer_run_is_said_and_not_refused(caplog):
    said, refusal = go_on(caplog, WAS, epochs=4, schedule={"type": "StepLR"})
    assert not refusal
    lines = ["host: epochs: was 2, is 4", "host: schedule: was None, is 'StepLR' (the checkpoint's goes on)"]
    assert said == lines


def test_the_optimizer_is_the_checkpoints(caplog):
    said, refusal = go_on(caplog, WAS, allowed=True, optimizer={"type": "SGD", "lr": 0.1})
    assert (said, refusal) == (["host: optimizer.lr: was 0.5, is 0.1 (the checkpoint's goes on)"], "")
    _, refusal = go_on(caplog, WAS, allowed=True, optimizer={"type": "Adam", "lr": 0.5})
    assert refusal.endswith("others are optimizer.type (was 'SGD', is 'Adam'). Start a new one from its weights.")


@pytest.mark.parametrize("record", [None, {}, "text", [1], {"seed": 0}])
def test_a_checkpoint_without_a_record_is_said_once(caplog, record):
    line = "host: a.pt has no record of its run's settings; they are not compared"
    assert go_on(caplog, record, batch_size=2) == ([line], "")


RANK = """
import logging, sys
import torch.distributed as dist
from ikl_plugins._run_record import check_resumed
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
logging.basicConfig(format="%(message)s", stream=sys.stdout)
for was, now in (({"x": rank}, {"x": 0}), ({"x": 1 - rank}, {"x": 0})):  # rank 0 sees none, and then one
    try:
        check_resumed("host", "a.pt", {"losses": {}, **was}, now, allowed=False, way_out="", logger=logging.getLogger())
        print("goes on")
    except ValueError as error:
        print("refused", "x (was 1, is 0)" in str(error))
dist.barrier()
dist.destroy_process_group()
"""


def test_all_ranks_stop_alike(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=200)[0].splitlines() for rank in ranks]
    assert said == [["goes on", "host: x: was 1, is 0", "refused True"], ["goes on", "refused True"]]
