"""What the examples of README and docs train in their tests: real digits, a teacher, and students that are too small.

An example must beat the cross entropy alone: the same student, seed, optimizer and number of epochs.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
EPOCHS, BATCH, CLASSES = 5, 50, 10


class Digits(NamedTuple):
    """Pixels in [0, 1], (N, 64), and labels."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def blocks(page: str, language: str = "python", after: str = "") -> list[str]:
    """The fenced blocks of a page in a language, in the section below a heading or in the whole page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if after:
        text = text.partition(f"\n## {after}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def added(diff: str) -> str:
    """What a diff leaves."""
    lines = [line for line in diff.splitlines() if not line.startswith("-") and line.strip() != "..."]
    return "\n".join(line[1:] for line in lines)


@lru_cache(maxsize=1)
def digits() -> Digits:
    load = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn").load_digits
    inputs, labels = (torch.from_numpy(array) for array in load(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, labels = inputs[order].float() / 16, labels[order]
    return Digits(inputs[:1200], labels[:1200], inputs[1200:], labels[1200:])


def accuracy(model: nn.Module) -> float:
    """On the test images, in percent."""
    with torch.no_grad():
        guesses = model.eval()(digits().test_inputs).argmax(1)
    return 100.0 * (guesses == digits().test_labels).double().mean().item()


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(digits().inputs, digits().labels), BATCH, shuffle=True)


def descend(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def student(seed: int) -> nn.Module:
    """Eight hidden units, and the seed set for what follows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def fit(model: nn.Module, epochs: int) -> nn.Module:
    optimizer = descend(model)
    for _ in range(epochs):
        for inputs, labels in loader():
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@lru_cache(maxsize=1)
def teacher() -> nn.Module:
    torch.manual_seed(100)
    return fit(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, CLASSES)), 30).requires_grad_(False)


@lru_cache(maxsize=len(SEEDS))
def alone(seed: int) -> float:
    """The accuracy of a student that sees the labels alone."""
    return accuracy(fit(student(seed), EPOCHS))


def gains(train: Callable[[int], float], baseline: Callable[[int], float] = alone) -> list[float]:
    """The accuracies of a training above those of its baseline, for each seed."""
    return [train(seed) - baseline(seed) for seed in SEEDS]


def assert_beats(found: list[float], margin: float) -> None:
    """Each seed gains, and their mean by the margin, in points."""
    assert min(found) > 0, found
    assert statistics.fmean(found) > margin, found
