"""Each trick that keeps attacks from succeeding without making a model robust is caught by preflight."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from preflight_models import Around, convolutions, digits, run, sound, train
from torch import nn

N = 27
# Of networks whose predictions a trick turns round.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return train(convolutions(act=nn.SiLU), 16, 100)


def judged(model, **options):
    images, labels = digits(16)
    return run(model.eval(), images[:N], labels[:N], **options)


# --- gradients that are not those of the function -------------------------------------------------------------------


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bend):
        ctx.save_for_backward(x)
        ctx.bend = bend
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.bend(gradient, *ctx.saved_tensors), None


def of_input(bend):
    """The gradient with respect to the image, changed."""
    return lambda net: Around(before=lambda x: _Bent.apply(x, bend), net=net)


def of_logits(bend):
    """The gradient with respect to the logits, changed."""
    return lambda net: Around(after=lambda logits, x: _Bent.apply(logits, bend), net=net)


def scaled(where, by):
    """The gradient times a number in a part of the image."""

    def bend(gradient, x):
        part = torch.zeros_like(gradient, dtype=torch.bool)
        part[where] = True
        return torch.where(part, by * gradient, gradient)

    return of_input(bend)


def on_images(chosen):
    """No gradient on the images that a function of them and the gradient chooses."""
    return of_input(lambda g, x: torch.where(chosen(x, g).view(-1, 1, 1, 1), 0 * g, g))


BORDER = torch.ones(16, 16, dtype=torch.bool)
BORDER[2:-2, 2:-2] = False
BOARD = (torch.arange(16)[:, None] + torch.arange(16)) % 2 == 0
EVERYTHING = (slice(None),) * 2


def low(g):
    return F.interpolate(F.avg_pool2d(g, 8), scale_factor=8)


def off_the_grid(x):
    return ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(dim=1)


def noisy(g, x):
    return g + g.std() * torch.randn_like(g)


def dense(g):
    """Whether it comes from a cross entropy, and not from two logits."""
    return (g != 0).sum(dim=1, keepdim=True) > 2


class _LeakyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, gradient, 0.3 * gradient)


class _GuidedBackward(_LeakyBackward):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (x > 0)


def another_relu(function):
    def build(net):
        net = copy.deepcopy(net)
        net[2] = type("Relu", (nn.Module,), {"forward": lambda self, x: function.apply(x)})()
        return net

    return build


class Pair(nn.Module):
    """Two networks whose logits are added, one of them spoiled."""

    def __init__(self, net, spoiled):
        super().__init__()
        self.first, self.second, self.spoiled = net, copy.deepcopy(net), spoiled

    def forward(self, x):
        return self.first(x) + self.spoiled(self.second, x)


def without_recording(net, x):
    with torch.no_grad():
        return 0.5 * net(x.flip(3))


def partly_without_recording(x):
    with torch.no_grad():
        smooth = F.avg_pool2d(x, 3, 1, 1)
    return 0.5 * x + 0.5 * smooth


def of_a_surrogate(net):
    other = convolutions().eval()

    def after(logits, x):
        return logits.detach() + other(x) - other(x).detach()

    return Around(after=after, net=net)


def hooked_tensor(x):
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda g: torch.cat([0 * g[..., :8], g[..., 8:]], dim=-1))
    return x


class HookedModule(nn.Module):
    def __init__(self, net, pre):
        super().__init__()
        self.net = copy.deepcopy(net)
        self.pre = pre
        if pre:
            self.net[4].register_full_backward_pre_hook(lambda module, gradients: (gradients[0].clamp(0, 1),))
        else:
            self.net[0].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].flip(2),))

    def forward(self, x):
        return self.net(x.clone())


def straight_through(levels, rounded=torch.round):
    return lambda net: Around(before=lambda x: x + (rounded(x * levels) / levels - x).detach(), net=net)


def in_float32_alone(net):
    half = scaled((..., slice(8)), 0.0)(net)
    plain = copy.deepcopy(net)
    return Around(before=lambda x: x, net=Choice(half, plain))


class Choice(nn.Module):
    def __init__(self, masked, plain):
        super().__init__()
        self.masked, self.plain = masked, plain

    def forward(self, x):
        return (self.masked if x.dtype == torch.float32 else self.plain)(x)


def uncopied(trick):
    def build(net):
        model = trick(net)
        model.lock = threading.Lock()  # which has no copy, so that nothing is computed in float64
        return model

    return build


def in_bfloat16(trick):
    def build(net):
        return Around(lambda x: x.bfloat16(), lambda logits, x: logits.float(), trick(copy.deepcopy(net).bfloat16()))

    return build


class InSmallBatches(nn.Module):
    """Another model where a batch is small."""

    def __init__(self, net, spoiled, below):
        super().__init__()
        self.net, self.spoiled, self.below = net, spoiled(net), below

    def forward(self, x):
        return (self.spoiled if len(x) < self.below else self.net)(x)


LEFT, SIGNS = (..., slice(8)), torch.randint(0, 2, (3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
GRADIENTS = {
    # On a part of the image.
    "zero on a half": scaled(LEFT, 0.0),
    "mirrored on a half": scaled(LEFT, -1.0),
    "a tenth on a half": scaled(LEFT, 0.1),
    "twice on a quarter": scaled((..., slice(8), slice(8)), 2.0),
    "zero on the border": scaled((*EVERYTHING, BORDER), 0.0),
    "zero in one channel": scaled((slice(None), 1), 0.0),
    "zero on a checkerboard": scaled((*EVERYTHING, BOARD), 0.0),
    "zero in a row": scaled((*EVERYTHING, 7), 0.0),
    "zero in every fourth column": scaled((..., slice(None, None, 4)), 0.0),
    "zero on a patch": scaled((..., slice(6, 10), slice(6, 10)), 0.0),
    "zero where it is small": of_input(lambda g, x: torch.where(g.abs() < g.abs().median(), 0 * g, g)),
    "zero on dark pixels": of_input(lambda g, x: torch.where(x < 0.2, 0 * g, g)),
    # Of a part of its content.
    "no low frequencies": of_input(lambda g, x: g - low(g)),
    "low frequencies alone": of_input(lambda g, x: low(g)),
    "sign": of_input(lambda g, x: g.sign()),
    "clipped": of_input(lambda g, x: g.clamp(-1e-3, 1e-3)),
    "of unit length": of_input(lambda g, x: F.normalize(g, dim=(1, 2, 3))),
    "noise": of_input(noisy),
    # Of another place.
    "moved by a pixel": of_input(lambda g, x: g.roll(1, 3)),
    "mirrored image": of_input(lambda g, x: g.flip(3)),
    "channels shuffled": of_input(lambda g, x: g.roll(1, 1) * torch.tensor([1.0, 0.5, 2.0]).view(3, 1, 1)),
    "pixels shuffled": of_input(lambda g, x: g.flatten(2)[..., torch.randperm(256)].view_as(g)),
    "signs shuffled": of_input(lambda g, x: g * SIGNS.to(g)),
    "everywhere too small": of_input(lambda g, x: 1e-12 * g),
    "everywhere opposite": of_input(lambda g, x: -g),
    # On some images, for some classes, for some losses.
    "some images": on_images(lambda x, g: x.mean(dim=(1, 2, 3)) > x.mean(dim=(1, 2, 3)).quantile(0.8)),
    "within the ball": on_images(lambda x, g: off_the_grid(x)),
    "one label": of_logits(lambda g, z: torch.where((z.argmax(dim=1) == 3)[:, None], 0 * g, g)),
    "one logit": of_logits(lambda g, z: g * (torch.arange(10) != 3)),
    "the largest logit": of_logits(lambda g, z: g * (torch.arange(10) != z.argmax(dim=1)[:, None])),
    "batches of one": lambda net: InSmallBatches(net, scaled(LEFT, 0.0), 2),
    "small batches": lambda net: InSmallBatches(net, scaled(EVERYTHING, 0.9), 20),
    "cross entropy alone": of_logits(lambda g, z: torch.where(dense(g), g.roll(1, 1), g)),
    "all but cross entropy": of_logits(lambda g, z: torch.where(dense(g), g, 0.5 * g.roll(1, 1))),
    # In a part of the network.
    "leaky backward": another_relu(_LeakyBackward),
    "guided backward": another_relu(_GuidedBackward),
    "hook of a tensor": lambda net: Around(before=hooked_tensor, net=net),
    "hook of a module": lambda net: HookedModule(net, False),
    "hook before a module": lambda net: HookedModule(net, True),
    "detached member": lambda net: Pair(net, lambda other, x: other(x.detach().flip(3))),
    "member not recorded": lambda net: Pair(net, without_recording),
    "smoothing not recorded": lambda net: Around(before=partly_without_recording, net=net),
    "gradient of a surrogate": of_a_surrogate,
    # Steps.
    "255 levels": straight_through(255),
    "100 levels": straight_through(100),
    "15 levels": straight_through(15),
    "255 levels, floor": straight_through(255, torch.floor),
    "rounded": lambda net: Around(before=lambda x: (x * 100).round() / 100, net=net),
    "saturated": lambda net: Around(after=lambda logits, x: (50 * logits).tanh(), net=net),
    # Where there is no copy in float64, or another function is in it.
    "float32 alone": in_float32_alone,
    "no copy, zero on a half": uncopied(scaled(LEFT, 0.0)),
    "no copy, zero in one channel": uncopied(scaled((slice(None), 1), 0.0)),
    "no copy, mirrored on a half": uncopied(scaled(LEFT, -1.0)),
    "no copy, some images": uncopied(on_images(lambda x, g: x.mean(dim=(1, 2, 3)) > 0.33)),
    "bfloat16, zero on a half": in_bfloat16(scaled(LEFT, 0.0)),
    "bfloat16, opposite": in_bfloat16(scaled(LEFT, -1.0)),
    "compiled, zero on a half": lambda net: torch.compile(Around(before=hooked_tensor, net=net), backend="eager"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_another_function_are_caught(name, trained):
    report = judged(GRADIENTS[name](copy.deepcopy(trained)))
    assert "gradients" in report.failed, report.markdown()
    assert report.failed == ("gradients",) or name == "saturated"


@pytest.mark.parametrize("name", ["everywhere too small", "signs shuffled", *(n for n in GRADIENTS if "levels" in n)])
def test_they_are_caught_off_the_levels_of_grey_too(name, trained):
    images, labels = digits(16)
    images = (images[:N] + 0.01 * torch.rand(N, 3, 16, 16)).clamp(0, 1)
    assert run(GRADIENTS[name](trained).eval(), images, labels[:N]).failed == ("gradients",)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_network_that_they_spoil_is_sound(trained, norm):
    sound(judged(trained, norm=norm, eps="8/255" if norm == "Linf" else "0.5"))
    assert "gradients" in judged(scaled(LEFT, 0.0)(trained), norm=norm, eps="0.5").failed


def test_says_how_wrong_the_gradient_is_and_on_how_many_images(trained):
    why = judged(scaled(LEFT, 0.0)(trained))["gradients"].why
    assert why.startswith("The gradient is not that of the function: random steps change the logits otherwise than it ")
    assert " of its size on 27 of 27 images." in why


# --- probabilities ---------------------------------------------------------------------------------------------------


def shifted(z):
    """By a number of its own in each row."""
    return z.detach().sum(dim=1, keepdim=True).cos()


FACTOR, SHIFT = torch.linspace(1, 3, 10), torch.linspace(1, 0, 10)  # a number of its own for each class

PROBABILITIES = {
    "softmax": lambda z: z.softmax(dim=1),
    "percent": lambda z: 100 * z.softmax(dim=1),
    "softmax + 0.1": lambda z: z.softmax(dim=1) + 0.1,
    "softmax - 1/C": lambda z: z.softmax(dim=1) - 0.1,
    "a softmax + b": lambda z: 7 * z.softmax(dim=1) - 3,
    "- softmax": lambda z: -4 * (-z).softmax(dim=1),
    "softmax, sharp": lambda z: 3 * (5 * z).softmax(dim=1) - 1,
    "softmax, soft": lambda z: 10 * (z / 2).softmax(dim=1) - 5,
    "softmax, rows shifted": lambda z: 7 * z.softmax(dim=1) + shifted(z),
    "sigmoid": lambda z: z.sigmoid(),
    "sigmoid, normalised": lambda z: F.normalize(z.sigmoid(), p=1, dim=1),
    "sigmoid, normalised, rows shifted": lambda z: 5 * F.normalize(z.sigmoid(), p=1, dim=1) + shifted(z),
    "a sigmoid + b": lambda z: 4 * z.sigmoid() - 1,
    "tanh": lambda z: z.tanh(),
    "scaled tanh": lambda z: 8 * (0.7 * z).tanh() + 1,
    "softmax, classes scaled and shifted": lambda z: FACTOR * z.softmax(dim=1) - SHIFT,
    "sigmoid, classes scaled and shifted": lambda z: FACTOR * z.sigmoid() + SHIFT,
    "tanh, classes scaled": lambda z: FACTOR * z.tanh(),
}
LOGITS = {
    "logits": lambda z: z,
    "logarithms of probabilities": lambda z: z.log_softmax(dim=1),
    "the same, centred": lambda z: 5 * (z.log_softmax(dim=1) - z.log_softmax(dim=1).mean(dim=1, keepdim=True)),
    "centred": lambda z: z - z.mean(dim=1, keepdim=True),
    "rows shifted": lambda z: z + shifted(z),
    "without the largest, not recorded": lambda z: z - z.detach().amax(dim=1, keepdim=True),
    "scaled": lambda z: 10 * z - 40,
    "classes scaled and shifted": lambda z: FACTOR * z + SHIFT,
    "capped softly": lambda z: 30 * (z / 30).tanh(),
    "clipped widely": lambda z: z.clamp(-1e3, 1e3),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_are_caught(name, trained):
    report = judged(Around(after=lambda logits, x: PROBABILITIES[name](logits), net=trained))
    assert "logits" in report.failed, report.markdown()
    assert "Return what goes into " in report["logits"].why


@pytest.mark.parametrize("name", LOGITS)
def test_logits_in_any_form_pass(name, trained):
    sound(judged(Around(after=lambda logits, x: LOGITS[name](logits), net=trained)))
