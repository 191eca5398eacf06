"""evidence.evaluation_cost: its passes are AutoAttack's, and its table is that of the docs."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from evidence.evaluation_cost import PASSES, STANDING, busiest, efficiency, measure, sequence, table
from torch import nn

DOCS = Path(__file__).parents[2] / "docs" / "robustbench.md"


class Standing(nn.Module):
    """Always right, and counts the images of its forward and backward passes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 10)
        self.forwards = self.backwards = 0

    def forward(self, images):
        self.forwards += len(images)
        logits = 1e-3 * self.layer(images.flatten(1)) + torch.arange(10.0)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient):
        self.backwards += len(gradient)


@pytest.mark.skipif(find_spec("pyautoattack") is None, reason="needs robustbench")
def test_the_passes_are_those_of_autoattack():
    from ikl_plugins._robustbench_import import import_robustbench

    torch.manual_seed(0)
    model = Standing().eval()
    images, labels = torch.rand(2, 3, 2, 2), torch.full((2,), 9)
    adversary = import_robustbench().eval.AutoAttack(model, norm="Linf", eps=0.01, seed=0, verbose=False, device="cpu")
    assert adversary.attacks_to_run == list(PASSES)
    left_out = adversary.square.n_queries - 50  # one forward pass each
    adversary.square.n_queries = 50

    def passes(attacks):
        model.forwards = model.backwards = 0
        adversary.attacks_to_run = attacks
        adversary.run_standard_evaluation(images, labels, bs=2)
        return model.forwards, model.backwards

    before = passes([])  # its checks, and the accuracy
    for attack, (forwards, backwards) in PASSES.items():
        found = passes([attack])
        forwards -= left_out if attack == "square" else 0
        assert (found[0] - before[0], found[1] - before[1]) == (2 * forwards, 2 * backwards), attack


@pytest.mark.parametrize(("standing", "size", "devices"), [(8500, 128, 64), (11, 5, 2), (5, 5, 2), (0, 5, 3)])
def test_the_busiest_device_has_the_most_images(standing, size, devices):
    images = [0] * devices
    for image in range(standing):
        images[(image // size) % devices] += 1
    assert busiest(standing, size, devices) == max(images)


def test_the_table_is_that_of_the_docs_and_adds_up():
    assert table() in DOCS.read_text()
    pairs = zip(STANDING, PASSES.values(), strict=True)
    work = sum(count * (forward + 2 * backward) for count, (forward, backward) in pairs)
    assert sequence(128, 1) == work + 2 * 10000
    assert efficiency(128, 1) == 1
    assert efficiency(128, 64) < efficiency(32, 64) < 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyautoattack") is None, reason="needs robustbench")
def test_one_and_two_processes_are_measured():
    found = measure(rounds=1, images=2, attacks="apgd-ce")
    assert list(found) == [1, 2]
    assert all(used > 0 for pair in found.values() for used in pair)
