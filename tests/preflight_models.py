"""Small classifiers for the tests of preflight, and ways to spoil them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from ikl_plugins.robustbench.preflight import CHECKS, preflight

CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def column(values):
    return torch.tensor(values).view(1, -1, 1, 1)


class Brightness(nn.Module):
    """A classifier that is right on `brightnesses`, and only on them: class c is a brightness of (c + 0.5) / 10."""

    def __init__(self, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__()
        levels = (torch.arange(CLASSES) + 0.5) / CLASSES
        # As training on inputs with this mean and std would have it.
        self.templates = nn.Parameter((levels.view(-1, 1) - torch.tensor(mean)) / torch.tensor(std))

    def forward(self, x):
        distance = (x.mean(dim=(2, 3))[:, None] - self.templates).square().sum(dim=2)
        return -3 * (1e-3 + distance).log()  # far from all classes too, a gradient is left


def brightnesses(count=40):
    labels = torch.arange(count) % CLASSES
    noise = 0.02 * torch.randn(count, 3, 8, 8)
    return (((labels + 0.5) / CLASSES).view(-1, 1, 1, 1) + noise).clamp(0, 1), labels


class Normalise(nn.Module):
    def __init__(self, mean=MEAN, std=STD):
        super().__init__()
        self.register_buffer("mean", column(mean))
        self.register_buffer("std", column(std))

    def forward(self, x):
        return (x - self.mean) / self.std


class Inline(nn.Module):
    """Any function of the inputs, with nothing in its attributes that tells."""

    def __init__(self, function=lambda x: (x - column(MEAN)) / column(STD)):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def to_pixels():
    return Inline(lambda x: x * 255)


class Around(nn.Module):
    """Does something to the inputs or the logits of a sound classifier."""

    def __init__(self, before=None, after=None, net=None):
        super().__init__()
        self.net = Brightness() if net is None else net
        self.before, self.after = before, after

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        logits = self.net(x)
        return logits if self.after is None else self.after(logits, x)


def run(model, images, labels, **options):
    options = {"eps": "8/255", "claimed": 50.0, "measured": 50.0, **options}
    return preflight(model, images, labels, **options)


def sound(report):
    assert tuple(found.name for found in report.checks) == CHECKS
    assert all(found.passed is True for found in report.checks), report.markdown()
    return report


@functools.cache
def digits(size):
    """256 of scikit-learn's digits as 8-bit RGB images of another size, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = F.interpolate(torch.tensor(found.images[:256]).float()[:, None] / 16, size=(size, size), mode="bilinear")
    return (images.expand(-1, 3, -1, -1) * 255).round() / 255, torch.tensor(found.target[:256])


def train(model, size, steps):
    """In eval mode, after some steps on `digits`."""
    images, labels = digits(size)
    optimiser = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randint(0, len(images), (32,))
        optimiser.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    return model.eval()


def convolutions(norm=nn.BatchNorm2d, act=nn.ReLU, pool=nn.MaxPool2d, layer=lambda module: module, head=nn.Linear):
    """A network for images of 16 x 16."""
    first, second = (layer(nn.Conv2d(*channels, 3, padding=1)) for channels in ((3, 16), (16, 32)))
    features = first, norm(16), act(), pool(2), second, norm(32), act(), pool(2)
    return nn.Sequential(*features, nn.Flatten(), nn.Dropout(0.3), head(512, CLASSES))
