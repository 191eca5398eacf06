"""What tests of evaluations share: AutoAttack with fewer steps, a network and images for it, and how logs compare."""

import re

import pytest
import torch
from torch import nn

from ikl_plugins._robustbench_import import import_robustbench

robustbench = import_robustbench()


class Quick(robustbench.eval.AutoAttack):
    """The same attacks; some images fall to the first, some to a later one, some stand."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter, attack.n_iter_2, attack.n_iter_min = 8, 3, 1
            attack.eot_iter = min(attack.eot_iter, 3)
        self.fab.n_iter = 6
        self.square.n_queries = 60


def network(classes=10, seed=0):
    """A small network for images of 8x8."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, classes)
    return nn.Sequential(*layers).eval()


def batch(model, count=14, wrong=2, seed=0):
    """Images that the model gets right, but for the first ones."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % logits.shape[1]
    return images, labels


def without_times(log):
    """A log without what differs from run to run."""
    kept = {key: value for key, value in log.items() if key != "date"}
    for key in ("progress", "corruptions"):
        if key in log:
            kept[key] = [{name: value for name, value in entry.items() if name != "seconds"} for entry in log[key]]
    return kept


def message(text, kind=ValueError):
    """Expects a refusal that has this text."""
    return pytest.raises(kind, match=re.escape(text))


class Interruption(Exception):  # noqa: N818
    """What stops a run in the tests."""
