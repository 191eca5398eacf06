"""The files of every host are read without that host, and none of them runs what it holds."""

import argparse
import os
import subprocess
import sys
import threading

import pytest
import torch

from ikl_plugins.checkpoints import load_content, load_weights, weights_in

READ = """
import sys
from ikl_plugins.checkpoints import load_content, load_weights
content = load_content(sys.argv[1])
history = content['message_hub']['log_scalars']['train/loss']
print(type(history).__module__, history._log_history.tolist(), load_weights(sys.argv[1])['a'].tolist())
assert not {name.split('.')[0] for name in sys.modules} & {'mmengine', 'mmpretrain', 'torchdistill', 'robustbench'}
"""


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_of_mmengine_is_read_with_and_without_mmengine(tmp_path):
    logging = pytest.importorskip("mmengine.logging", reason="it writes the checkpoint")
    hub = logging.MessageHub.get_instance("test_checkpoint_formats")
    hub.update_scalar("train/loss", 0.5)
    hub.update_scalar("train/loss", 1.5)
    path = tmp_path / "epoch_1.pth"
    content = {"meta": {"mmengine_version": "0"}, "state_dict": {"a": torch.ones(2)}, "message_hub": hub.state_dict()}
    torch.save(content, path)
    history = load_content(path)["message_hub"]["log_scalars"]["train/loss"]
    assert type(history) is logging.HistoryBuffer
    assert history.mean() == 1.0
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ikl_plugins.checkpoints [0.5, 1.5] [1.0, 1.0]\n"


def test_a_checkpoint_of_torchdistill_is_read(tmp_path):
    args = argparse.Namespace(device="cpu", seed=3, config="a.yaml", nested=argparse.Namespace(x=[1.5, None]))
    torch.save({"model": {"a": torch.ones(2)}, "best_value": 0.5, "args": args}, tmp_path / "a.pt")
    content = load_content(tmp_path / "a.pt")
    assert content["args"] == args
    assert type(content["args"]) is argparse.Namespace
    assert list(load_weights(tmp_path / "a.pt")) == ["a"]


@pytest.mark.parametrize("hidden", ["args", "model"])
def test_a_namespace_opens_the_door_to_nothing_else(hidden, tmp_path):
    bomb = Bomb(tmp_path / "exploded")
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(x=1)}
    content |= {"args": argparse.Namespace(x=bomb)} if hidden == "args" else {"model": {"a": bomb}}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"load_content: .*a\.pt .* would run code: .*mkdir"):
        load_content(tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_thread_that_is_done_takes_nothing_from_one_that_reads(monkeypatch, tmp_path):
    """The list of names is the process's own; whoever was there first may not end another one's permission."""
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    second_reads, first_is_done, found = threading.Event(), threading.Event(), {}
    load, order = torch.load, []

    def meeting(*arguments, **keywords):
        order.append(threading.current_thread().name)
        if len(order) == 1:
            second.start()
            second_reads.wait(0.5)  # until it has seen that all names are there, or waits for its turn
        else:
            second_reads.set()
            first_is_done.wait(30)
        return load(*arguments, **keywords)

    def read():
        try:
            found["second"] = load_content(tmp_path / "a.pt")
        except ValueError as error:
            found["second"] = error

    second = threading.Thread(target=read)
    monkeypatch.setattr(torch, "load", meeting)
    found["first"] = load_content(tmp_path / "a.pt")
    first_is_done.set()
    second.join(30)
    assert found["first"] == found["second"] == {"args": argparse.Namespace(a=1)}
    assert len(order) == 2
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# --- averaged weights ------------------------------------------------------------------------------------------------


def test_of_two_sets_of_weights_either_is_found(tmp_path):
    average, last = {"module.0.a": torch.ones(1)}, {"module.0.a": torch.zeros(1)}
    torch.save({"model_state_dict": average, "unaveraged_model_state_dict": last}, tmp_path / "dm.pt")
    assert load_weights(tmp_path / "dm.pt") == {"0.a": torch.ones(1)}
    assert load_weights(tmp_path / "dm.pt", averaged=False) == {"0.a": torch.zeros(1)}


@pytest.mark.parametrize("update_buffers", [True, False])
def test_mmengine_s_average_is_under_state_dict(update_buffers, tmp_path):
    """Written by the EMAHook itself."""
    mmengine = pytest.importorskip("mmengine")
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    live = torch.nn.BatchNorm1d(2)
    hook = EMAHook(update_buffers=update_buffers)
    hook.src_model, hook.ema_model = live, ExponentialMovingAverage(live, update_buffers=update_buffers)
    with torch.no_grad():
        live.weight.fill_(5.0)
        live.running_mean.fill_(7.0)
        hook.ema_model.module.weight.fill_(3.0)
    content = {"meta": {"mmengine_version": mmengine.__version__}, "state_dict": live.state_dict()}
    hook.before_save_checkpoint(None, content)
    torch.save(content, tmp_path / "ema.pth")
    averaged, last = load_weights(tmp_path / "ema.pth"), load_weights(tmp_path / "ema.pth", averaged=False)
    assert list(averaged) == list(last) == list(live.state_dict())
    assert averaged["weight"].tolist() == [3.0, 3.0]
    assert last["weight"].tolist() == [5.0, 5.0]
    assert last["running_mean"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": torch.ones(1)}},
        {"a": torch.ones(1)},
        [torch.ones(1)],
    ],
)
def test_without_a_second_set_there_is_no_unaveraged_one(content):
    with pytest.raises(ValueError, match=r"load_weights: .*some\.pt must have weights beside their average"):
        weights_in(content, "some.pt", averaged=False)


# What a config inside a checkpoint may have in place of numbers; its images then say nothing.
CONFIGS = (
    *("model=dict(data_preprocessor=[1])", "model=dict(data_preprocessor=dict(mean='abc'))", "x={[]}", "a\0b"),
    *("model=dict(data_preprocessor=dict(mean=5, std=5))", "x=" + "[" * 150 + "]" * 150, "x=1" + "+1" * 10_000),
    f"model=dict(data_preprocessor=dict(mean=[{10**400}, 1, 1], std=[1, 1, 1]))",
)
# Of a whole content, what is said of it.
ODD_CONTENTS = [
    ([1], "must hold weights by name, got a list"),
    ({5: torch.ones(1)}, "must name weights by texts"),
    ({"": torch.ones(1)}, "must fit resnet8, but it does not; .*unexpected: ''"),
    ({"...": torch.ones(0, 2)}, r"must fit resnet8, but it does not; .*unexpected: \.\.\."),
]


def test_a_checkpoint_of_odd_values_is_read_or_refused_in_one_line(tmp_path):
    from ikl_plugins.models import resnet8
    from ikl_plugins.robustbench import load_checkpoint

    path = tmp_path / "odd.pt"
    weights = resnet8(num_classes=100).state_dict()
    for meta in (5, [1], {"dataset_meta": {"classes": 5}}, {"dataset_meta": [1]}, *({"cfg": text} for text in CONFIGS)):
        torch.save({"state_dict": weights, "meta": meta}, path)
        load_checkpoint(path, "resnet8", "cifar100")
    for content, message in ODD_CONTENTS:
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"odd\.pt {message}") as refused:
            load_checkpoint(path, "resnet8", "cifar100")
        assert str(refused.value).isprintable()
