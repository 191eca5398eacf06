"""Adversarial weight perturbation against w + gamma ||w|| g / ||g|| summed by hand, and what it must leave alone."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikl_plugins.adversarial import AdversarialWeightPerturbation

GAMMA = 0.05


class Net(nn.Module):
    """Weights of 4, 3 and 2 dimensions; biases, affine parameters, and a table that is not called a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.line = nn.Conv1d(3, 3, 1)
        self.head = nn.Linear(3, 4)
        self.position = nn.Parameter(torch.randn(3, 9))
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).flatten(2) + self.position
        return self.head(torch.tanh(self.line(features)).mean(2))


MOVED = ("conv.weight", "line.weight", "head.weight")
IMAGES = torch.rand(6, 2, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def loss_of(model: nn.Module, images: Tensor = IMAGES, labels: Tensor = LABELS) -> Tensor:
    return F.cross_entropy(model(images), labels)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def bits(tensor: Tensor) -> Tensor:
    """Tells 0 from -0 and one NaN from another."""
    return tensor.detach().contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(bits(tensor), bits(other[name])), name


def length(tensor: Tensor) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for x in tensor.detach().double().reshape(-1)))


def perturbed_by_hand(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """w + gamma ||w|| g / ||g||, in float64."""
    return weight.detach().double() + gamma * length(weight) / length(gradient) * gradient.double()


def gradients_of(model: nn.Module, images: Tensor = IMAGES, labels: Tensor = LABELS) -> dict[str, Tensor]:
    """From a copy, so that the model under test sees nothing of it."""
    twin = copy.deepcopy(model)
    loss_of(twin, images, labels).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}


# --- the perturbation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("frozen", [(), ("conv.weight",)], ids=str)
def test_weights_move_up_the_gradient_by_gamma_of_their_length(
    dtype: torch.dtype, memory_format: torch.memory_format, frozen: tuple[str, ...]
) -> None:
    model, images = Net().to(dtype).to(memory_format=memory_format), IMAGES.to(dtype)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before, gradients = values(model), gradients_of(model, images)
    awp = AdversarialWeightPerturbation(gamma=GAMMA)
    loss = loss_of(model, images)
    awp.perturb(model, loss * 1e-3)  # the direction counts, not the size

    for name, value in values(model).items():
        if name in MOVED and name not in frozen:
            expected = perturbed_by_hand(before[name], gradients[name], GAMMA)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(bits(value), bits(before[name])), f"{name} is no weight that the perturbation moves"
    assert loss_of(model, images) > loss + 1e-3, "the perturbation is the direction in which the loss rises"
    awp.restore()
    assert_same_bits(values(model), before)
    assert all(one.is_contiguous(memory_format=memory_format) for one in model.parameters() if one.dim() == 4)


def test_restored_to_the_bit() -> None:
    """A copy, not the difference taken back: large weights swallow what is added to them, and -0 + v - v is +0."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([1e8, -0.0, 1e-30, -1e-8])
    before = values(model)
    awp = AdversarialWeightPerturbation(gamma=0.3)
    for _ in range(3):
        awp.perturb(model, model(torch.randn(5, 4)).square().sum())
        assert not torch.equal(model[0].weight, before["0.weight"])
        awp.restore()
        assert_same_bits(values(model), before)
    awp.restore()  # nothing is perturbed, nothing happens
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    awp.restore()
    assert bool((model[0].weight == 2.0).all()), "an old copy is not kept"


def test_parameters_stay_the_objects_that_the_optimizer_holds() -> None:
    model = Net()
    held = dict(model.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in held.items()}
    awp = AdversarialWeightPerturbation(gamma=GAMMA)
    awp.perturb(model, loss_of(model))
    once = values(model)
    with pytest.raises(ValueError, match="weights must be restored first"):
        awp.perturb(model, loss_of(model))
    assert_same_bits(values(model), once)
    awp.restore()
    for name, parameter in model.named_parameters():
        assert parameter is held[name]
        assert parameter.data_ptr() == places[name]


def test_grad_and_requires_grad_are_not_touched() -> None:
    model = Net()
    model.conv.weight.grad = torch.full_like(model.conv.weight, 7.0)
    model.line.bias.requires_grad_(False)
    kept, before = model.conv.weight.grad, {name: p.requires_grad for name, p in model.named_parameters()}
    awp = AdversarialWeightPerturbation(gamma=GAMMA)
    with torch.no_grad():
        loss = torch.enable_grad()(loss_of)(model)
        awp.perturb(model, loss)
    awp.restore()
    assert model.conv.weight.grad is kept
    assert bool((kept == 7.0).all())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["conv.weight"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_weight_shared_by_two_layers_moves_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    before = model[0].weight.detach().clone()
    inputs = torch.rand(4, 3)
    (gradient,) = torch.autograd.grad(model(inputs).square().sum(), model[0].weight)
    AdversarialWeightPerturbation(gamma=GAMMA).perturb(model, model(inputs).square().sum())
    expected = perturbed_by_hand(before, gradient, GAMMA)
    torch.testing.assert_close(model[0].weight.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_zeros_move_nothing_and_make_no_nan() -> None:
    """A gradient of 0 (a dead layer) and a weight of 0 (a fresh residual branch)."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)  # so the first layer's gradient is 0, and this one has no length
    before = values(model)
    awp = AdversarialWeightPerturbation(gamma=GAMMA)
    awp.perturb(model, model(torch.rand(5, 3)).square().sum())
    after = values(model)
    assert [name for name in before if not torch.equal(after[name], before[name])] == ["2.weight"]
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


# --- the training step -----------------------------------------------------------------------------------------------


def test_the_context_restores_on_an_exception() -> None:
    model = Net()
    before = values(model)
    awp = AdversarialWeightPerturbation(gamma=GAMMA)
    seen: list[Tensor] = []

    def fail() -> None:
        seen.append(model.head.weight.detach().clone())
        raise KeyError("from the block")

    with pytest.raises(KeyError, match="from the block"), awp.perturbed(model, loss_of(model)):
        fail()
    assert not torch.equal(seen[0], before["head.weight"])
    assert_same_bits(values(model), before)
    awp.perturb(model, loss_of(model))  # not refused
    awp.restore()


@pytest.mark.parametrize("undo", ["before_step", "after_step"])
def test_the_step_is_made_at_the_weights_or_as_in_the_authors_code_at_the_perturbed(undo: str) -> None:
    """Theirs: add the perturbation, step with momentum and decay, subtract the perturbation."""
    model = Net().double()
    images = IMAGES.double()
    twin, decay = copy.deepcopy(model), 0.2
    awp = AdversarialWeightPerturbation(gamma=GAMMA, undo=undo)
    optimizer, other = (torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=decay) for net in (model, twin))
    for _ in range(3):
        with awp.perturbed(model, loss_of(model, images)):
            optimizer.zero_grad()
            loss_of(model, images).backward()
            if undo == "after_step":
                optimizer.step()
        if undo == "before_step":
            optimizer.step()

        moves = {
            name: perturbed_by_hand(twin.get_parameter(name), gradient, GAMMA) - twin.get_parameter(name).detach()
            for name, gradient in gradients_of(twin, images).items()
            if name in MOVED
        }
        for name, move in moves.items():
            twin.get_parameter(name).data += move
        other.zero_grad()
        loss_of(twin, images).backward()
        if undo == "after_step":
            other.step()
        for name, move in moves.items():
            twin.get_parameter(name).data -= move
        if undo == "before_step":
            other.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-10, atol=1e-12)


def test_a_step_that_the_loss_scaler_skips_leaves_the_weights_as_they_were() -> None:
    model = Net()
    before = values(model)
    awp = AdversarialWeightPerturbation(gamma=0.3, undo="after_step")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, skipped in ((math.inf, True), (1.0, False)):
        with awp.perturbed(model, loss_of(model)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(torch.equal(value, before[name]) for name, value in values(model).items()) is skipped


def test_autocast_sees_the_perturbed_weights_and_the_restored_ones() -> None:
    """A host may open one autocast region around the whole training step."""
    model = Net()
    model.eval()
    awp = AdversarialWeightPerturbation(gamma=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        natural = loss_of(model)
        before = natural.item()
        awp.perturb(model, natural)
        perturbed = loss_of(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            expected = loss_of(model).item()
        perturbed.backward()
        awp.restore()
        restored = loss_of(model).item()
    assert expected > before + 0.05
    assert perturbed.item() == pytest.approx(expected, rel=1e-6)
    assert restored == pytest.approx(before, rel=1e-6)
    assert model.conv.weight.grad is not None


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_epochs_with_a_perturbation() -> None:
    assert AdversarialWeightPerturbation().gamma == 5e-3
    assert [epoch for epoch in range(1, 13) if AdversarialWeightPerturbation().active(epoch)] == [10, 11, 12]
    for warmup in (0, 1):
        assert AdversarialWeightPerturbation(warmup_epochs=warmup).active(1)
    awp = AdversarialWeightPerturbation(warmup_epochs=3)
    assert [awp.active(epoch) for epoch in (1, 2, 3, 4)] == [False, False, True, True]


# --- copies and ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda awp: pickle.loads(pickle.dumps(awp))])  # noqa: S301
def test_copies_have_the_settings_and_no_weights_of_the_original(duplicate: Any) -> None:
    awp = AdversarialWeightPerturbation(gamma=0.25, warmup_epochs=3)
    twin = duplicate(awp)
    assert (twin.gamma, twin.warmup_epochs) == (0.25, 3)
    model, before = (net := Net()), values(net)
    awp.perturb(model, loss_of(model))
    other = Net()
    twin.perturb(other, loss_of(other))  # on its own, not refused as perturbed already
    twin.restore()
    assert not torch.equal(model.head.weight, before["head.weight"])
    awp.restore()
    assert_same_bits(values(model), before)


RANK = """
import sys
import torch, torch.distributed as dist
from torch import nn
from ikl_plugins.adversarial import AdversarialWeightPerturbation
rank, store, data, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
given = torch.load(data, weights_only=True)
images, labels = given["images"][rank], given["labels"][rank]
ends = []
for memory_format, undo in ((torch.contiguous_format, "before_step"), (torch.channels_last, "after_step")):
    awp = AdversarialWeightPerturbation(gamma=given["gamma"], undo=undo)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Linear(4, 4))
    model.load_state_dict(given["model"])
    model = model.to(memory_format=memory_format)
    # Only rank 1 passes through the last layer: on rank 0 its gradient is None, and the mean is half of rank 1's.
    logits = model(images) if rank else model[:4](images)
    loss = nn.functional.cross_entropy(logits, labels)
    with awp.perturbed(model, loss):
        perturbed = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    ends.append({"perturbed": perturbed, "restored": model.state_dict(), "grads": grads})
torch.save(ends, f"{out}{rank}")
dist.destroy_process_group()
"""


def test_two_ranks_take_one_perturbation_that_of_the_averaged_gradients(tmp_path: Path) -> None:
    """Batches of different size: each rank's mean counts alike, as in data-parallel training."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Linear(4, 4))
    images, labels = [IMAGES[:4], IMAGES[4:]], [LABELS[:4], LABELS[4:]]
    torch.save(
        {"model": model.state_dict(), "images": images, "labels": labels, "gamma": GAMMA},
        tmp_path / "data",
    )
    command = [sys.executable, "-c", RANK]
    paths = [str(tmp_path / name) for name in ("store", "data", "rank")]
    ranks = [
        subprocess.Popen([*command, str(rank), *paths], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs

    F.cross_entropy(model[:4](images[0]), labels[0]).backward()
    F.cross_entropy(model(images[1]), labels[1]).backward()  # .grad is now the sum over the ranks
    both = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2)]
    for zero, one in zip(*both, strict=True):  # contiguous, then channels_last
        assert zero["grads"] == one["grads"] == []
        for name, parameter in model.named_parameters():
            moved = zero["perturbed"][name]
            assert torch.equal(bits(moved), bits(one["perturbed"][name])), f"ranks part at {name}"
            for rank in (zero, one):
                assert torch.equal(bits(rank["restored"][name]), bits(parameter)), name
            if name.endswith("weight"):
                expected = perturbed_by_hand(parameter, parameter.grad / 2, GAMMA)
                torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=1e-6)
                assert not torch.equal(moved, parameter)
            else:
                assert torch.equal(bits(moved), bits(parameter)), name
