"""Preflight: each broken model is caught, by its check alone where that is possible."""

from __future__ import annotations

import random
import re
import threading

import numpy as np
import pytest
import torch
from preflight_models import CLASSES, Around, Brightness, brightnesses, run
from torch import nn

from ikl_plugins.robustbench.preflight import Check

N = 40


# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture
def labels():
    return torch.arange(N) % CLASSES


@pytest.fixture
def images():
    return brightnesses(N)[0]


class Remembering(Brightness):
    """Normalises by the mean of the first batch that it sees."""

    first = None

    def forward(self, x):
        if self.first is None:
            self.first = x.detach().mean()
        return super().forward(x - 0.05 * self.first)


class Drifting(Brightness):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + self.calls * torch.arange(CLASSES)


# --- broken models ---------------------------------------------------------------------------------------------------


class Tracking(Brightness):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen.copy_(x.detach().mean(dim=(0, 2, 3)))
        return super().forward(x)


class AutocastLeftOn(Around):
    def forward(self, x):
        torch.set_autocast_enabled("cpu", True)
        return self.net(x)


class Searching(nn.Module):
    """Takes the best of three neighbours, without a gradient."""

    def __init__(self, when=lambda x: True):
        super().__init__()
        self.net = nn.Sequential(nn.Identity(), Brightness())
        self.when = when

    def forward(self, x):
        if not self.when(x):
            return self.net(x)
        return torch.stack([self.net(x + step) for step in (0, 2 / 255, -2 / 255)]).amax(dim=0)


class PartlyFlat(Brightness):
    """The same logits for all images that are darker: no gradient, and no change."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        dark = x.mean(dim=(1, 2, 3)) < self.limit
        return torch.where(dark[:, None], torch.arange(10.0).flip(0), super().forward(x))


def one_parameter_in_half():
    model = Around(after=lambda logits, x: logits + 0)
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.bfloat16)))
    return model


def partly_training():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), Brightness()).eval()
    model[0].train()
    model[1].train()
    return model


def seeded(x):
    torch.manual_seed(0)
    return x + 1e-3 * torch.randn(x.shape[1:])


def purified(x):
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (step,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return x - 1e-4 * step


def purified_backward(x):
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        leaf.square().sum().backward()
    return x - 1e-4 * leaf.grad


def purified_by_the_engine(x):
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        loss = leaf.square().sum()
    engine = torch.autograd.Variable._execution_engine
    (step,) = engine.run_backward((loss,), (torch.ones(()),), False, False, (leaf,), False, accumulate_grad=False)
    return x - 1e-4 * step


def fitted(x):
    leaf = x.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([leaf], lr=1e-4)
    leaf.grad = torch.ones_like(leaf)
    optimiser.step()
    return x + (leaf.detach() - x.detach())


def nan_where_bright(logits, x):
    return logits.where(x.mean(dim=(1, 2, 3))[:, None] < 0.9, torch.nan)


def before(function):
    return lambda: Around(before=function).eval()


def after(function):
    return lambda: Around(after=function).eval()


def place(x):
    return torch.arange(len(x)).view(-1, 1, 1, 1)


def functional(x):
    return x - 1e-4 * torch.func.grad(lambda leaf: leaf.square().sum())(x.detach())


def other_under_attack(logits, x):
    return logits.roll(1, 1) if torch.is_grad_enabled() else logits


GRAD = "The forward calls .*torch.autograd"
NOISE = "The logits depend on random numbers"
SUM = "The outputs are not negative and each row sums to "
ALONE = "The logits of 16 images passed one at a time differ by up to "
ZERO = "The gradient of the cross entropy .* is zero for "
# What is wrong, the model, and the reason that is given, by the check that must fail.
BROKEN = {
    "eval mode": {
        "training": (partly_training, "In training mode: 0, 1. Call"),
    },
    "output": {
        "one parameter in half": (one_parameter_in_half, "scale is bfloat16; .*Call model.float\\(\\).$"),
        "autocast left on": (AutocastLeftOn, "The forward leaves autocast on \\(cpu\\)."),
        "cut to half": (before(lambda x: x.bfloat16().float()), "The forward .* precision: bfloat16 gives bfloat16."),
        "shape": (after(lambda logits, x: logits[..., None, None]), "The model .* shape \\(32, 10, 1, 1\\) and"),
        "tuple": (after(lambda logits, x: (logits,)), "The model returns a tuple, no tensor."),
        "nan": (after(nan_where_bright), "4 of 40 images gave inf or nan."),
        "rows": (after(lambda logits, x: logits[:1]), "40 images gave 2 rows of logits."),
    },
    "deterministic": {
        "noise of torch": (before(lambda x: x + 1e-3 * torch.randn_like(x)), NOISE),
        "noise of numpy": (before(lambda x: x + 1e-3 * np.random.randn()), NOISE),
        "noise of python": (before(lambda x: x + 1e-3 * random.gauss(0, 1)), NOISE),
        "drifting": (Drifting, "The same batch gave other logits the second time"),
        "remembering": (Remembering, "The logits depend on the batches that came before"),
        "changes a buffer": (Tracking, "The forward changes seen."),
        "sets the seed": (before(seeded), "The forward sets the seed of a global generator"),
        "another under attack": (after(other_under_attack), "The logits differ when gradients are recorded"),
        "writes into its input": (before(lambda x: x.mul_(2).div_(2).add_(1e-3)), "The forward writes into its input."),
    },
    "batch": {
        "mean of the batch": (before(lambda x: x - 0.01 * x.mean(dim=0, keepdim=True)), ALONE),
        "place in the batch": (before(lambda x: x + 0.01 * place(x) / len(x)), ALONE),
        "neighbour": (before(lambda x: x + 0.01 * x.roll(1, dims=0)), ALONE),
        "batch statistics": (before(nn.BatchNorm2d(3, affine=False, track_running_stats=False)), ALONE),
        "single images": (before(lambda x: x + 0.01 * (len(x) == 1)), ALONE),
        "batches of 16": (before(lambda x: x + 0.01 * (len(x) == 16)), "The logits in batches of 16 differ by up to "),
        # In the other views nothing stands at row 20 and beyond.
        "order": (before(lambda x: x + 0.01 * (place(x) >= 20)), "The logits in reversed order differ by up to "),
    },
    "gradients": {
        "detached": (before(lambda x: x.detach()), "No gradient reaches the images: "),
        "rounded": (before(lambda x: (x * 100).round() / 100), f"{ZERO}40 of 40: "),
        "sure": (after(lambda logits, x: 1e5 * logits), ZERO),
        "no number": (before(lambda x: x + (0 * x).sqrt()), "The gradient of .* is inf or nan for 40 of 40."),
    },
    "logits": {
        "softmax": (after(lambda logits, x: logits.softmax(1)), "The outputs lie in \\[0, 1\\]"),
        "percent": (after(lambda logits, x: 100 * logits.softmax(1)), f"{SUM}100: "),
        "softmax, shifted": (after(lambda logits, x: logits.softmax(1) + 0.1), f"{SUM}2: "),
    },
    "optimisation": {
        "grad": (before(purified), f"{GRAD}.grad"),
        "backward": (before(purified_backward), f"{GRAD}.backward"),
        "engine": (before(purified_by_the_engine), f"{GRAD}'s run_backward"),
        "func": (before(functional), "The forward calls .*a derivative of torch.func"),
        "optimiser": (before(fitted), "The forward calls .*the step of an optimiser"),
        "grad under attack": (before(lambda x: purified(x) if x.requires_grad else x - 2e-4 * x.detach()), GRAD),
        "search": (Searching, "3 passes of the network in one forward, counted at `net.1`; .*passes=3,"),
        "search under attack": (lambda: Searching(lambda x: x.requires_grad), "3 passes of the network"),
    },
}
# Which fail other checks too; all others must fail theirs alone.
MORE = {"cut to half", "batch statistics", "search under attack", "writes into its input", *BROKEN["logits"]}
MORE |= {"noise of torch", "noise of numpy", "noise of python"}


@pytest.mark.parametrize(("check", "name"), [(check, name) for check, rows in BROKEN.items() for name in rows])
def test_catches(check, name, images, labels):
    build, why = BROKEN[check][name]
    model = build()
    if check != "eval mode":
        model.eval()
    count = 32 if name == "batches of 16" else N
    report = run(model, images[:count], labels[:count])
    assert not report.passed
    assert check in report.failed
    assert name in MORE or report.failed == (check,), report.markdown()
    assert re.match(why, report[check].why), report[check].why
    assert not torch.is_autocast_enabled("cpu")
    if check == "deterministic":
        assert report["batch"].passed is None
    if name == "remembering":
        assert model.first is None
    if name in ("shape", "tuple", "nan", "rows"):
        missing = "The model gives no finite logits of shape (N, C)."
        assert report["deterministic"] == Check("deterministic", None, missing)
        assert {"deterministic", "batch", "gradients", "logits", "normalisation"} <= set(report.unchecked)


def test_says_that_a_model_without_a_copy_is_not_checked_for_memory(images, labels):
    model = Brightness().eval()
    model.lock = threading.Lock()
    report = run(model, images, labels)
    assert report.passed
    assert "cannot be copied" in report["deterministic"].why


def test_catches_a_gradient_that_vanishes_inside_the_ball_alone(images, labels):
    def masked(logits, x):
        # The images have a gradient; a step away, where 8-bit values end, there is none.
        on_grid = ((x * 255 - (x * 255).round()).abs() < 1e-3).flatten(1).all(dim=1)
        return torch.where(on_grid[:, None], logits, logits.detach() + 0 * logits)

    grid = (images * 255).round() / 255
    report = run(Around(after=masked).eval(), grid, labels)
    assert report.failed == ("gradients",)
    assert "at points inside the ball of 0.03137 is zero for 40 of 40" in report["gradients"].why


@pytest.mark.parametrize(("count", "passed"), [(4, True), (5, False)])
def test_at_most_a_tenth_may_be_without_gradient(count, passed, images, labels):
    limit = float(images.mean(dim=(1, 2, 3)).sort().values[count - 1]) + 1e-6
    report = run(PartlyFlat(limit).eval(), images, labels)
    assert report.failed == (() if passed else ("gradients",))
    assert f"{count} of 40" in report["gradients"].why
    if passed:
        assert "Zero: 4 of 40 for the cross entropy at the images; 4 of 40 for the margin" in report["gradients"].why


@pytest.mark.parametrize(("passes", "passed"), [(2, False), (3, True)])
def test_a_search_is_no_failure_if_its_passes_are_stated(passes, passed, images, labels):
    assert run(Searching().eval(), images, labels, number_forward_passes=passes).passed is passed


def test_a_network_in_torchscript_cannot_be_looked_into(images, labels):
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        traced = torch.jit.trace(Brightness().eval(), images[:2])
    report = run(traced, images, labels)
    assert report["optimisation"].passed is None
    assert "TorchScript" in report["optimisation"].why
