"""Training steps on the device: no waits, CUDA graphs, checks that are read later, one rank of NCCL."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from evidence import bench_device
from evidence import device as on
from torch import Tensor, nn

from ikl_plugins import GKLLoss, IKLLoss, read_value_checks
from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", [on.WALK, on.KERNEL])
@pytest.mark.parametrize("part", ["loss", "criterion", "attack"])
def test_a_steady_step_does_not_wait(part: str, way: str) -> None:
    """Losses with and without prior, torchdistill's criterion, the attack, weight perturbation."""
    if part == "criterion":
        pytest.importorskip("torchdistill")
    with on.going(way):
        for _, name, step in getattr(bench_device, f"{part}_steps")(CUDA):
            for _ in range(3):
                step()
            try:
                with no_waits():
                    step()
            except RuntimeError as error:
                raise AssertionError(f"{name} waits for the device") from error
    read_value_checks()


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a step, and the tensors into which it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@pytest.mark.parametrize("way", [on.WALK, on.KERNEL])
@pytest.mark.parametrize("kind", [IKLLoss, GKLLoss])
def test_a_loss_with_prior_in_a_graph_gives_what_it_gives_outside(kind: Any, way: str) -> None:
    loss = kind(global_info=True, num_classes=10)
    student, teacher, labels = torch.randn(32, 10, requires_grad=True), torch.randn(32, 10), torch.randint(10, (32,))

    def step() -> tuple[Tensor, Tensor]:
        value = loss(student, teacher, labels)
        return value.detach(), torch.autograd.grad(value, student)[0]

    with on.going(way):
        graph, found = captured(step)
        with torch.no_grad():
            student.copy_(torch.randn(32, 10))
            teacher.copy_(torch.randn(32, 10))
            labels.copy_(torch.randint(10, (32,)))
        before = loss.class_prior.counts.clone()
        graph.replay()
        assert (loss.class_prior.counts - before).sum() == 32  # the replay observes, too
        torch.testing.assert_close(found, step())


@pytest.mark.parametrize("objective", ["cross_entropy", "ikl"])
def test_an_attack_in_a_graph_starts_anew_at_each_replay(objective: str) -> None:
    model, images, labels = bench_device.network(CUDA), torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)
    attack = PGD(eps=0.1, steps=2, step_size=0.01, objective=objective, random_start="uniform")
    graph, found = captured(lambda: attack(model, images, labels=labels))
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(found.clone())
        assert (found - images).abs().max() <= 0.1 + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
    assert not torch.equal(*seen)


# --- checks ----------------------------------------------------------------------------------------------------------

BAD_LABEL = """
import torch
from ikl_plugins import IKLLoss
loss = IKLLoss(global_info=True, num_classes=5).cuda()
for label in (0, 7, 1):
    logits = torch.zeros(4, 5, device="cuda", requires_grad=True)
    loss(logits, logits.detach(), torch.full((4,), label, device="cuda")).backward()
try:
    loss.end_epoch()
except ValueError as error:
    print(error)
torch.cuda.synchronize()
print("alive", int(torch.ones(3, device="cuda").sum()))
"""


def test_a_bad_label_is_refused_at_the_end_of_the_epoch_and_leaves_the_device_alive() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", BAD_LABEL], cwd=root, capture_output=True, text=True, check=False)
    assert "`targets` must lie in [0, 4], got values from 7 to 7" in done.stdout, done.stderr
    assert "alive 3" in done.stdout, done.stderr


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_one_rank_of_nccl_changes_nothing(tmp_path: Path) -> None:
    """Prior and weight perturbation reduce over the ranks; of one rank that is what it has."""
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.rand(4, 3, 2, 2)
    loss, labels = IKLLoss(global_info=True, num_classes=5), torch.tensor([0, 1, 1, 4])

    def run() -> tuple[Tensor, Tensor]:
        one, criterion = copy.deepcopy(model), copy.deepcopy(loss)
        logits = one(images)
        value = criterion(logits, logits.detach() + 1, labels) + logits.square().sum()
        with AdversarialWeightPerturbation(gamma=0.1).perturbed(one, value):
            moved = one[1].weight.detach().clone()
        criterion.end_epoch()
        return moved, criterion.class_prior.matrix

    alone = run()
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        torch.testing.assert_close(run(), alone)
    finally:
        dist.destroy_process_group()
