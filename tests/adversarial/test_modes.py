"""The scopes of modes and running statistics: what a block sees, and that afterwards all is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ikl_plugins.adversarial import frozen_statistics, model_mode


class Block(nn.Module):
    """A network with children of several kinds, at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.outer = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5))

    def forward(self, images: Tensor) -> Tensor:
        return self.outer(self.inner(images))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- model_mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_module_is_in_the_mode_and_gets_its_own_back(mode: str) -> None:
    """Also when the block raises, and inside a block of the other mode."""
    model = Block()
    model.inner[1].eval()  # frozen by its owner, inside a model in training mode
    model.outer.eval()
    model.outer[2].train()  # and the other way round
    before = flags(model)
    assert set(before.values()) == {True, False}
    with model_mode(model, "train" if mode == "eval" else "eval"):
        with pytest.raises(KeyError) as caught, model_mode(model, mode):
            raise KeyError(set(flags(model).values()))
        assert set(flags(model).values()) == {mode != "train"}
    assert caught.value.args[0] == {mode == "train"}
    assert flags(model) == before


def test_the_model_itself_is_told_as_its_train_may_do_more() -> None:
    """Networks that keep their own batch normalisation in eval do so in train()."""

    class Stubborn(Block):
        def train(self, mode: bool = True) -> Stubborn:
            super().train(mode)
            self.inner[1].eval()
            return self

    model = Stubborn()
    with model_mode(model, "train"):
        assert model.inner[2].training
        assert not model.inner[1].training


# --- frozen_statistics -----------------------------------------------------------------------------------------------

Maker = Callable[[], nn.Module]
LAYERS: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
    "BatchNorm2d, not affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "SyncBatchNorm without a group": (lambda: nn.SyncBatchNorm(3), (4, 3, 5, 5)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 5, 5)),
}


def of_batch(inputs: Tensor, layer: nn.Module) -> Tensor:
    """(x - mean) / sqrt(var + eps) with the statistics of the batch, or of each sample, channel by channel."""
    inputs = inputs.double()
    outputs = torch.empty_like(inputs)
    each = range(len(inputs)) if isinstance(layer, (nn.InstanceNorm1d, nn.InstanceNorm2d)) else [slice(None)]
    for samples in each:
        for channel in range(inputs.shape[1]):
            values = inputs[samples, channel]
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            outputs[samples, channel] = (values - mean) / torch.sqrt(variance + layer.eps)
    return outputs


def with_history(make: Maker, shape: tuple[int, ...]) -> nn.Module:
    """A layer that has seen a batch, so that its running statistics are neither the initial ones nor a batch's."""
    layer = make()
    layer(torch.randn(shape) * 3 + 5)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_training_mode_normalise_with_the_batch_and_keep_their_statistics(name: str) -> None:
    make, shape = LAYERS[name]
    layer = with_history(make, shape)
    twin = copy.deepcopy(layer)
    before = buffers(layer)
    assert before.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    inputs = torch.rand(shape) * 2 - 7
    with frozen_statistics(layer):
        outputs = layer(inputs)
        layer(inputs)
    torch.testing.assert_close(outputs.double(), of_batch(inputs, layer), rtol=1e-5, atol=1e-5)
    assert_same(buffers(layer), before)

    layer(inputs), twin(inputs)  # afterwards the layer tracks as if nothing had been
    assert layer.track_running_stats is True
    assert_same(buffers(layer), buffers(twin))
    assert not torch.equal(layer.running_mean, before["running_mean"])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_eval_mode_are_left_alone(name: str) -> None:
    make, shape = LAYERS[name]
    layer = with_history(make, shape).eval()
    before = buffers(layer)
    inputs = torch.rand(shape)
    with frozen_statistics(layer):
        assert layer.track_running_stats is True
        outputs = layer(inputs)
    places = (1, 3, *[1] * (inputs.dim() - 2))
    mean, variance = layer.running_mean.reshape(places), layer.running_var.reshape(places)
    expected = (inputs - mean) / torch.sqrt(variance + layer.eps)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_same(buffers(layer), before)


def test_layers_that_never_tracked_do_not_begin_to() -> None:
    layers = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.GroupNorm(1, 3))
    with frozen_statistics(layers):
        layers[0](torch.rand(4, 3))
    assert [layers[0].track_running_stats, layers[1].track_running_stats] == [False, False]
    assert not hasattr(layers[2], "track_running_stats")


def test_statistics_thaw_when_the_block_raises() -> None:
    model = Block()
    with pytest.raises(KeyError, match="from the block"), frozen_statistics(model):
        raise KeyError("from the block")
    assert model.inner[1].track_running_stats is True
    assert model.outer[2].track_running_stats is True
    before = buffers(model)
    model(torch.rand(4, 3, 5, 5))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in buffers(model).items())


def test_only_the_layers_in_training_mode_are_frozen_in_a_network() -> None:
    model = Block()
    model.inner[1].eval()
    before = buffers(model)
    with frozen_statistics(model):
        assert model.inner[1].track_running_stats is True
        assert model.outer[2].track_running_stats is False
        model(torch.rand(4, 3, 5, 5) + 3)
        with frozen_statistics(model):  # an attack inside a frozen scope
            model(torch.rand(4, 3, 5, 5) + 3)
        assert model.outer[2].track_running_stats is False
        model(torch.rand(4, 3, 5, 5) + 3)
    assert_same(buffers(model), before)
    assert model.outer[2].track_running_stats is True
