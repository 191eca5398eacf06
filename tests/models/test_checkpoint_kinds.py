"""Files with several sets of weights and with wrapped names, each made by its own writer, read as its host reads it."""

import argparse
import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ikl_plugins.checkpoints import load_weights, weights_in
from ikl_plugins.models import resnet8
from ikl_plugins.models.weights import load_strictly, without_normaliser

compiled = functools.partial(torch.compile, backend="eager")
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 0.75)


class Normalise(nn.Module):
    """What papers put in front of a network."""

    def __init__(self, mean=MEAN, std=STD, names=("mean", "std")):
        super().__init__()
        for name, values in zip(names, (mean, std), strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images):
        mean, std = self.buffers()
        return (images - mean) / std


class Lightning(nn.Module):
    """The names of a LightningModule."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def network(seed):
    torch.manual_seed(seed)
    made = resnet8(num_classes=10).train()
    made(torch.randn(8, 3, 32, 32))  # statistics of its own
    return made.eval()


@torch.no_grad()
def outputs(weights):
    """Of the network with these weights."""
    made = resnet8(num_classes=10).eval()
    load_strictly("test", made, weights, "a.pt", "the network")
    return made(images())


# --- several sets of weights -----------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """A network in training and torch's own average of it."""
    last = network(1)
    average = AveragedModel(network(2), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    average.update_parameters(network(3))
    average.update_parameters(last)
    return last, average.eval()


SETS = {
    "torchvision": lambda last, average: {"model": last, "model_ema": average, "args": argparse.Namespace(lr=1.0)},
    "data parallel": lambda last, average: {
        "state_dict": {f"module.{name}": value for name, value in last.items()},
        "state_dict_ema": average,
    },
    "FixMatch": lambda last, average: {"state_dict": last, "ema_state_dict": average, "acc": 1.0},
    "SWA": lambda last, average: {"epoch": 3, "state_dict": last, "swa_state_dict": average, "swa_n": 4},
    "BasicSR": lambda last, average: {"params": last, "params_ema": average},
    "DiT": lambda last, average: {"model": last, "ema": average, "opt": {"state": {}}},
    "inside": lambda last, average: {"net": last, "ema": {"decay": 0.9, "module": average}},
    "DM-Improves-AT": lambda last, average: {"model_state_dict": average, "unaveraged_model_state_dict": last},
    # As its WeightAveraging.on_save_checkpoint has it.
    "Lightning": lambda last, average: {
        "current_model_state": {f"model.{name}": value for name, value in last.items()},
        "state_dict": {f"model.{name[7:]}": value for name, value in average.items() if name.startswith("module.")},
        "averaging_state": {"n_averaged": average["n_averaged"]},
        "callbacks": {"WeightAveraging": {"latest_update_step": 3}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2, 2)}}}],
    },
}


@pytest.mark.parametrize("kind", SETS)
@torch.no_grad()
def test_the_average_is_taken_and_the_last_weights_on_demand(kind, pair, tmp_path):
    last, average = pair
    torch.save(SETS[kind](last.state_dict(), average.state_dict()), tmp_path / "a.pt")
    assert torch.equal(outputs(load_weights(tmp_path / "a.pt")), average(images()))
    assert torch.equal(outputs(load_weights(tmp_path / "a.pt", averaged=False)), last(images()))


@pytest.mark.parametrize("writer", ["train.py", "DeiT"])
@torch.no_grad()
def test_timm_reads_the_same(writer, tmp_path):
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3, get_state_dict

    last, ema = network(1), ModelEmaV3(network(2), decay=0.5)
    ema.update(last)
    optimizer = torch.optim.SGD(last.parameters(), 0.1)
    if writer == "train.py":
        args = argparse.Namespace(model="resnet8")
        saver = CheckpointSaver(last, optimizer, args, ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
        saver.save_checkpoint(3, 0.5)
        (path,) = tmp_path.glob("checkpoint*")
    else:
        path = tmp_path / "checkpoint.pth"
        torch.save({"model": last.state_dict(), "model_ema": get_state_dict(ema), "scaler": {"scale": 1.0}}, path)
    for averaged in (True, False):
        theirs = resnet8(num_classes=10).eval()
        timm.models.load_checkpoint(theirs, str(path), use_ema=averaged)
        assert torch.equal(outputs(load_weights(path, averaged=averaged)), theirs(images()))


def test_the_one_set_is_taken_whatever_its_key(tmp_path):
    last = network(1)
    for key in ("net", "model_ema", "network"):
        torch.save({key: last.state_dict(), "acc": 93.0, "rng": {"cpu": torch.get_rng_state()}}, tmp_path / "a.pt")
        assert torch.equal(outputs(load_weights(tmp_path / "a.pt")), last(images()))


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    last = network(1)
    save_file(last.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(outputs(load_weights(tmp_path / "model.safetensors")), last(images()))
    (tmp_path / "model.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"model\.safetensors must be one of safetensors"):
        load_weights(tmp_path / "model.safetensors")


def parameters(weights):
    return {name: value for name, value in weights.items() if "running" not in name}


# Of two sets that differ, with the average at the second place.
DOUBTFUL = {
    "without names": (lambda a, b: {"model": a, "ema": {"shadow_params": list(b.values())}}, "'ema.shadow_params'"),
    "without statistics": (lambda a, b: {"model": a, "ema": parameters(b)}, "'ema'"),
    "two averages": (lambda a, b: {"model": a, "ema": b, "swa": a}, "'ema', 'swa'"),
    "best": (lambda a, b: {"model": a, "best_model": b}, "'best_model'"),
    "two names": (lambda a, b: {"model": a, "state_dict": b}, "'state_dict'"),
    "DINO": (lambda a, b: {"student": a, "model": b}, "'student'"),
    "Lightning's SWA": (
        lambda a, b: {"model": a, "callbacks": {"StochasticWeightAveraging": {"average_model_state": b}}},
        "'callbacks.StochasticWeightAveraging.average_model_state'",
    ),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_sets_that_leave_a_doubt_are_named(case):
    content, named = DOUBTFUL[case]
    content = content(network(1).state_dict(), network(2).state_dict())
    with pytest.raises(ValueError, match=rf"a\.pt must leave no doubt .*'model'.*{named}|a\.pt.*{named}.*'model'"):
        weights_in(content, "a.pt")


def test_an_average_of_nothing_is_refused():
    last = network(1)
    for average in (AveragedModel(network(2)), nn.DataParallel(compiled(AveragedModel(network(2))))):
        with pytest.raises(ValueError, match=r"n_averaged is 0\. Take the last weights"):
            weights_in({"model": last.state_dict(), "model_ema": average.state_dict()}, "a.pt")


# --- names -----------------------------------------------------------------------------------------------------------

WRAPPED = {
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "both": lambda net: nn.DataParallel(compiled(net)),
    "both, turned": lambda net: compiled(nn.DataParallel(net)),
    "averaged": AveragedModel,
    "averaged, deep": lambda net: AveragedModel(nn.DataParallel(compiled(net))),
    "deep, averaged": lambda net: nn.DataParallel(compiled(AveragedModel(net))),
    "Lightning": lambda net: Lightning(model=net),
    "Lightning, compiled": lambda net: Lightning(net=compiled(net)),
    "student": lambda net: nn.DataParallel(Lightning(student=net)),
    "student model": lambda net: Lightning(student_model=net),
    "deeper": lambda net: nn.DataParallel(Lightning(model=Lightning(backbone=compiled(net)))),
    "sequential": lambda net: nn.Sequential(nn.Identity(), net),
    "in parts": lambda net: (setattr(net, "layer1", compiled(net.layer1)), net)[1],
}


def counted(weights):
    """As after an update of the average."""
    return {name: value + 1 if name.endswith("n_averaged") else value for name, value in weights.items()}


@pytest.mark.parametrize("wrapper", WRAPPED)
@torch.no_grad()
def test_wrapped_names_are_read_to_the_bit(wrapper):
    last = network(1)
    expected = last(images())
    weights = counted(WRAPPED[wrapper](last).state_dict())
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}  # of torch 0.3
    for found in (weights, old):
        assert torch.equal(outputs(weights_in({"state_dict": found}, "a.pt")), expected)


@torch.no_grad()
def test_a_wrapped_network_takes_plain_weights():
    target = compiled(nn.DataParallel(network(2)))
    load_strictly("test", target, network(1).state_dict(), "a.pt", "the network")
    assert torch.equal(target._orig_mod.module(images()), network(1)(images()))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: nn.Sequential(Normalise(), net),
        lambda net: nn.DataParallel(nn.Sequential(Normalise(names=("mu", "sigma")), net)),
        lambda net: Lightning(normalizer=Normalise(names=("new_mean", "new_std")), model=net),
        # MadryLab's robustness: the attacker has the network and the layer once more.
        lambda net: Lightning(normalizer=Normalise(), model=net, attacker=Lightning(normalize=Normalise(), model=net)),
    ],
)
@torch.no_grad()
def test_a_layer_that_normalises_is_handed_out_or_named(wrap):
    net = network(1)
    weights = wrap(net).state_dict()
    with pytest.raises(ValueError, match=r"a\.pt normalises images with mean \(0\.5, 0\.25, 0\.125\) and std"):
        outputs(weights)
    made = resnet8(num_classes=10).eval()
    load_strictly("test", made, weights, "a.pt", "the network", statistics=(MEAN, STD))
    assert torch.equal(made(images()), net(images()))
    rest, statistics = without_normaliser("test", weights, "a.pt")
    assert statistics == (MEAN, STD)
    assert not any(name.endswith(("mean", "mu")) and "running" not in name for name in rest)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([Normalise(mean=(125.0,) * 3, std=(60.0,) * 3)], r"got mean \(125\.0, 125\.0, 125\.0\), std"),
        ([Normalise(), Normalise(std=(1.0,) * 3)], r"in one way, got mean .* and mean .*1\.0"),
    ],
)
def test_a_layer_that_does_not_normalise_pixels_in_0_1_is_named(layers, found):
    with pytest.raises(ValueError, match=found):
        without_normaliser("test", nn.Sequential(*layers, network(1)).state_dict(), "a.pt")


def test_two_networks_in_one_set_are_named():
    weights = nn.DataParallel(Lightning(student=network(1), teacher=network(2))).state_dict()
    with pytest.raises(ValueError, match=r"It is under student\. and teacher\., beside each other: save it alone"):
        outputs(weights)
    other = nn.DataParallel(Lightning(student=network(1), teacher=nn.Linear(2, 2), bias=nn.Linear(1, 1))).state_dict()
    with pytest.raises(ValueError, match=r"It is under student\. and teacher\., beside each other: save it alone"):
        outputs(weights)
    other = nn.DataParallel(Lightning(student=network(1), teacher=nn.Linear(2, 2), bias=nn.Linear(1, 1))).state_dict()
    with pytest.raises(ValueError, match=r"It is under student\., beside teacher\., bias\.: save it alone"):
        outputs(other)


def test_what_a_network_itself_calls_like_a_wrapper_is_its_own():
    made = Lightning(module=nn.Linear(2, 2), part=Lightning(module=nn.Linear(2, 2)))
    made.part.weight, made.part.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    weights = {name: value + 1 for name, value in made.state_dict().items()}
    load_strictly("test", made, {f"x.{name}": value for name, value in weights.items()}, "a.pt", "it")
    assert all(torch.equal(value, weights[name]) for name, value in made.state_dict().items())
