"""The one strict load of weights into a network."""

import pytest
import torch
from torch import nn

from ikl_plugins.models.weights import load_strictly


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def load(weights, **keywords):
    loaded = network()
    load_strictly("caller", loaded, weights, "a.pt", "the network", **keywords)
    return loaded


def test_what_fits_is_loaded():
    weights = network().state_dict()
    loaded = load(weights).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_a_hook_of_the_network_may_rename_what_it_gets():
    loaded = network()

    def rename(_, weights, *others):
        weights.update({name.removeprefix("old."): weights.pop(name) for name in list(weights)})

    loaded.register_load_state_dict_pre_hook(rename)
    weights = network().state_dict()
    load_strictly("caller", loaded, {f"old.{name}": tensor for name, tensor in weights.items()}, "a.pt", "it")
    assert torch.equal(loaded[0].weight, weights["0.weight"])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"0.bias": None}, r"missing: 0\.bias\."),
        ({"x": torch.ones(1)}, r"unexpected: x\."),
        ({"0.bias": torch.ones(3)}, r"other shapes: 0\.bias \(3,\) instead of \(4,\)\."),
        (
            {"0.bias": torch.ones(3), "1.bias": None, "x": torch.ones(1)},
            r"missing: 1\.bias; unexpected: x; other shapes: 0\.bias",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, found):
    weights = {**network().state_dict(), **changes}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(ValueError, match=rf"^caller: the checkpoint a\.pt must fit the network, but .*; {found}"):
        load(weights)


def test_the_way_out_is_the_caller_s():
    with pytest.raises(ValueError, match=r"\. Go away\.$"):
        load({}, way_out="Go away.")
    with pytest.raises(ValueError, match=r"\. \['x'\] 1$"):
        load(
            {**network().state_dict(), "x": torch.ones(1), "0.bias": torch.ones(1)},
            way_out=lambda misfit: f"{misfit.unexpected} {len(misfit.shapes)}",
        )
