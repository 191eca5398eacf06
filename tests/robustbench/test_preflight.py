"""Preflight: sound models pass every check; each broken one is caught, by its check alone where that is possible."""

from __future__ import annotations

import json
import random
import re
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.data import Images, content_sha256
from ikl_plugins.robustbench.loading import HostClassifier, Normalised
from ikl_plugins.robustbench.preflight import CHECKS, Check, preflight

N, CLASSES = 40, 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
PIXELS = tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)


def column(values):
    return torch.tensor(values).view(1, -1, 1, 1)


class Brightness(nn.Module):
    """A classifier that is right on the images below, and only on them: class c is a brightness of (c + 0.5) / 10."""

    def __init__(self, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__()
        levels = (torch.arange(CLASSES) + 0.5) / CLASSES
        # As training on inputs with this mean and std would have it.
        self.templates = nn.Parameter((levels.view(-1, 1) - torch.tensor(mean)) / torch.tensor(std))

    def forward(self, x):
        distance = (x.mean(dim=(2, 3))[:, None] - self.templates).square().sum(dim=2)
        return -3 * (1e-3 + distance).log()  # far from all classes too, a gradient is left


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


# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture
def labels():
    return torch.arange(N) % CLASSES


@pytest.fixture
def images(labels):
    noise = 0.02 * torch.randn(N, 3, 8, 8)
    return (((labels + 0.5) / CLASSES).view(-1, 1, 1, 1) + noise).clamp(0, 1)


def run(model, images, labels, **options):
    options = {"eps": "8/255", "claimed": 50.0, "measured": 50.0, **options}
    return preflight(model, images, labels, **options)


def sound(report):
    assert tuple(found.name for found in report.checks) == CHECKS
    assert all(found.passed is True for found in report.checks), report.markdown()
    return report


# --- sound models ----------------------------------------------------------------------------------------------------


def log_probabilities(logits, x=None):
    return logits.log_softmax(dim=1)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(
    ("architecture", "after"),
    [
        ("WideResNet-10-1", None),
        ("WideResNet-10-1", lambda logits, x: 100 * logits),
        ("DMWideResNet-10-1-SiLU", lambda logits, x: 20 * logits),
        ("DMWideResNet-10-1-SiLU", log_probabilities),
        pytest.param("PreActResNet-18", lambda logits, x: 20 * logits, marks=pytest.mark.slow),
        pytest.param("PreActResNet-18", lambda logits, x: 100 * logits, marks=pytest.mark.slow),
    ],
)
def test_networks_of_robustbench_pass_every_check(architecture, after, grid):
    model = Around(after=after, net=robustbench_network(architecture)).eval()
    images = torch.rand(4, 3, 32, 32)
    images = (images * 255).round() / 255 if grid else images
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    sound(run(model, images, labels, batch_size=2))


class Preprocessor(nn.Module):
    """As MMPretrain's: pixels in a dictionary, to normalised inputs."""

    def forward(self, data, training):
        return {"inputs": (data["inputs"] - 255 * column(MEAN)) / (255 * column(STD))}


class Host(Brightness):
    def __init__(self):
        super().__init__(MEAN, STD)
        self.data_preprocessor = Preprocessor()


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(Normalise(), Brightness(MEAN, STD)) for _ in range(2))

    def forward(self, x):
        return sum(member(x) for member in self.members)


def to_pixels():
    return Inline(lambda x: x * 255)


SHARED = nn.Identity()
SOUND = {
    "bare": Brightness(),
    "normalised": nn.Sequential(Normalise(), Brightness(MEAN, STD)),
    "normalised inline": nn.Sequential(Inline(), Brightness(MEAN, STD)),
    "log-probabilities": Around(after=log_probabilities),
    "Normalised": Normalised(Brightness(MEAN, STD), MEAN, STD),
    "HostClassifier": HostClassifier(Host(), 255.0, False),
    "each member normalises": Ensemble(),
    # As a data preprocessor for bytes does; and back to [0, 1], and then normalised.
    "scaled to pixels": nn.Sequential(to_pixels(), Normalise(*PIXELS), Brightness(MEAN, STD)),
    "and back": nn.Sequential(to_pixels(), Normalise((0.0,) * 3, (255.0,) * 3), Normalise(), Brightness(MEAN, STD)),
    "constants in float64": Around(before=lambda x: x + torch.zeros(1, dtype=torch.float64).float()),
    "random numbers without effect": Around(before=lambda x: x + 0 * torch.rand(())),
    "a layer without parameters again": nn.Sequential(SHARED, SHARED, Brightness()),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_classifiers_pass_every_check(name, images, labels):
    report = sound(run(SOUND[name].eval(), images, labels))
    assert (report.passed, report.unchecked) == (True, ())
    assert ("log-probabilities" in report["logits"].why) == (name == "log-probabilities")
    assert ("draws random numbers" in report["deterministic"].why) == name.startswith("random")
    layers = {"bare": "No normalising", "normalised": "One normalising", "each member normalises": "2 normalising"}
    assert report["normalisation"].why.startswith(layers.get(name, ""))


def test_a_robust_network_whose_gradients_are_small_passes(images, labels):
    # Far from its boundary: the margin changes by a thousandth of the logits over the whole ball.
    model = Around(after=lambda logits, x: 0.01 * logits + 10 * logits.detach().sign() + 10.0)
    assert "gradients" not in run(model.eval(), images, labels).failed


# --- what is left as it was ------------------------------------------------------------------------------------------


class Counting(Brightness):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        self.calls += 1
        torch.rand(1), np.random.rand(), random.random()
        return super().forward(self.norm(x))


def test_leaves_model_images_and_random_numbers_as_they_were(images, labels):
    model = Counting()  # in training mode, but for one module
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), repr(np.random.get_state()), repr(random.getstate())
    profile = sys.getprofile()
    run(model, images, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.norm.training) == (True, False)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (repr(np.random.get_state()), repr(random.getstate())) == states[1:]
    assert sys.getprofile() is profile
    kept = images.clone()
    run(Around(before=lambda x: x.mul_(0.5)).eval(), images, labels)
    assert torch.equal(images, kept)


class Halved(Around):
    def forward(self, x):
        return self.net.half()(x.half()).float()


class HalvedBuffer(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x):
        self.half()
        return self.net(x.half() + self.shift).float()


class Remembering(Brightness):
    """Normalises by the mean of the first batch that it sees."""

    first = None

    def forward(self, x):
        if self.first is None:
            self.first = x.detach().mean()
        return super().forward(x - 0.05 * self.first)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("cls", [Halved, HalvedBuffer])
def test_leaves_the_dtypes_as_they_were(cls, copied, images, labels):
    model = cls().eval()
    if not copied:
        model.lock = threading.Lock()  # which has no copy
    before = dict(model.state_dict(keep_vars=True))
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    why = run(model, images, labels)["output"].why
    assert why.startswith("The forward converts net.templates to float16")
    assert "`net` gives float16" in why
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and tensor.dtype == torch.float32 for name, tensor in before.items())
    assert all(torch.equal(tensor, values[name]) for name, tensor in before.items())


def test_compares_steps_without_tf32_and_leaves_it_as_it_was(images, labels):
    convolutions = torch.backends.cudnn.allow_tf32
    seen = set()

    def before(x):
        seen.add(torch.backends.cudnn.allow_tf32)
        return x

    assert run(Around(before=before).eval(), images, labels).passed
    assert seen == {False, convolutions}
    assert torch.backends.cudnn.allow_tf32 is convolutions


def test_works_without_the_callers_autocast_and_leaves_it_on(images, labels):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 10)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        report = run(model, images, None)
        assert torch.is_autocast_enabled("cpu")
    assert report.passed, report.markdown()


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


class PartlyDead(Brightness):
    """Without a gradient on the darkest of 40 images."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        logits = super().forward(x)
        # The 4 images of a class have a brightness of their own; a fifth is told by its own.
        dark = x.detach().mean(dim=(1, 2, 3)) < self.count
        return torch.where(dark[:, None], logits.detach() + 0 * logits, logits)


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


def in_half():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 10)).eval().half()


def double_leaf():
    return Around(Inline(lambda x: x.double()), lambda logits, x: logits.float())


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
        "double": (lambda: Around(lambda x: x.double()).double(), "net.templates is float64; .*The logits are float64"),
        "half": (in_half, "0.weight is float16, 0.bias is float16, 2.weight is .*; .*The forward fails: "),
        "one parameter in half": (one_parameter_in_half, "scale is bfloat16; .*Call model.float\\(\\).$"),
        "autocast left on": (AutocastLeftOn, "The forward leaves autocast on \\(cpu\\)."),
        "cut to half": (before(lambda x: x.bfloat16().float()), "The forward .* precision: bfloat16 gives bfloat16."),
        "double leaf": (double_leaf, "The forward computes in another precision: `before` gives float64"),
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
    if name in ("half", "shape", "tuple", "nan", "rows"):
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
    report = run(PartlyDead(limit).eval(), images, labels)
    assert report.failed == (() if passed else ("gradients",))
    assert f"{count} of 40" in report["gradients"].why
    if passed:
        assert "Zero: 4 of 40 for the cross entropy at the images; 4 of 40 for the margin" in report["gradients"].why


def misled(x):
    signs = torch.randint(0, 2, x.shape[1:], generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return x.detach() + signs * (x - x.detach())


def straight_through(levels, rounded=torch.round):
    return lambda x: x + (rounded(x * levels) / levels - x).detach()


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.detach() + 1e-12 * (x - x.detach()), "e+1"),
        (misled, "attacks would follow another function"),
        (straight_through(255, torch.floor), "attacks would follow another function"),
        (straight_through(255), "changes nothing for "),
        (straight_through(100), "changes nothing for "),
        (straight_through(15), "changes nothing for "),
    ],
    ids=["masked", "misled", "floor", "255 levels", "100 levels", "15 levels"],
)
def test_catches_gradients_of_another_function(function, words, grid):
    images = torch.rand(8, 3, 32, 32)
    images = (images * 255).round() / 255 if grid else images
    report = run(Around(before=function, net=robustbench_network("WideResNet-10-1")).eval(), images, None)
    assert report.failed == ("gradients",)
    assert words in report["gradients"].why
    assert report["gradients"].why.startswith("At the images, ")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x * 255, "Divide by 255."),
        (lambda x: (x - 0.5) / 0.25, "Leave the normalisation to the model."),
        (lambda x: x / 255, "reach 0.0039 at most. Divide 8-bit images by 255 only once."),
    ],
)
def test_catches_images_outside_0_to_1(change, why, images):
    report = run(Brightness().eval(), change(images), None)
    assert report.failed == ("inputs",)
    assert report["inputs"].why.endswith(why)


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "best"),
    [
        (Around(before=lambda x: x / 255), "Multiplying by 255"),
        (Brightness(MEAN, STD), "Normalising by the given mean and std before the model"),
        (nn.Sequential(Inline(), Inline(), Brightness(MEAN, STD)), "Undoing a normalisation by the given mean and std"),
    ],
    ids=["pixels", "not normalised", "normalised twice"],
)
def test_catches_inputs_that_the_model_was_not_trained_with(model, best, images, labels):
    report = run(model.eval(), images, labels, mean=MEAN, std=STD)
    assert report.failed == ("normalisation",)
    assert report["normalisation"].why.startswith(f"{best} gives 100.0 % accuracy and the images in [0, 1] ")


def test_tries_the_normalisations_in_common_use(images, labels):
    imagenet = Brightness((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    why = run(imagenet.eval(), images, labels)["normalisation"].why
    assert why.startswith("Normalising by ImageNet's mean and std before the model gives 100.0 % accuracy")


@pytest.mark.parametrize(
    ("channels", "mean", "std", "given", "words"),
    [
        (1, 0.1307, 0.3081, {}, "MNIST's"),
        (1, 0.5, 0.5, {}, "0.5 and 0.5"),
        (2, 0.5, 0.5, {}, "0.5 and 0.5"),
        (4, 0.3, 0.2, {"mean": (0.3,), "std": (0.2,)}, "the given"),
    ],
)
def test_any_number_of_channels_may_be_normalised(channels, mean, std, given, words, images, labels):
    images = images[:, :1].repeat(1, channels, 1, 1)
    classifier = Brightness((mean,) * channels, (std,) * channels)
    sound(run(Normalised(classifier, (mean,), (std,)).eval(), images, labels, **given))
    why = run(classifier.eval(), images, labels, **given)["normalisation"].why
    assert why.startswith(f"Normalising by {words} mean and std before the model gives 100.0 %")


def test_catches_a_swapped_channel_order(images, labels):
    class Red(Brightness):
        def forward(self, x):
            return -60 * (x[:, :1].mean(dim=(2, 3)) - self.templates[:, 0]).square()

    images[:, 1:] = torch.rand(N, 2, 1, 1)
    assert run(Red().eval(), images, labels).passed
    report = run(Red().eval(), images.flip(1), labels)
    assert report.failed == ("normalisation",)
    assert report["normalisation"].why.startswith("Turning RGB into BGR gives 100.0 % accuracy")


@pytest.mark.parametrize(
    ("count", "wrong", "failed"),
    [
        (40, 8, ("normalisation",)),  # 20 points, 3 standard errors
        (40, 3, ()),  # 7.5 points, less than 2 standard errors
        (200, 8, ()),  # nearly 3 standard errors, but 4 points
    ],
)
def test_only_a_clear_difference_in_accuracy_is_a_failure(count, wrong, failed):
    class NearlyRight(Brightness):
        """Right on all images times 255, and wrong on some of those in [0, 1]."""

        def forward(self, x):
            if x.max() > 2:
                return super().forward(x / 255)
            some = torch.isin(x.detach()[:, 0, 0, 0], marked)
            return torch.where(some[:, None], -1, 1) * super().forward(x)

    labels = torch.arange(count) % CLASSES
    images = ((labels + 0.5) / CLASSES).view(-1, 1, 1, 1) + 0.01 * torch.rand(count, 3, 8, 8)
    marked = images[:wrong, 0, 0, 0].clone()
    report = run(NearlyRight().eval(), images, labels)
    assert report.failed == failed, report.markdown()


OTHER = (0.5,) * 3


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Sequential(Normalise(), Normalise(), Brightness(MEAN, STD)), "`1` normalises what `0`"),
        (
            lambda: nn.Sequential(Normalise(), nn.Identity(), Normalise(OTHER, OTHER), Brightness()),
            "`2` normalises what `0`",
        ),
        (lambda: nn.Sequential(to_pixels(), Normalise(*PIXELS), Normalise(), Brightness()), "`2` normalises what `1`"),
        (lambda: nn.Sequential(Normalise(), robustbench_network("DMWideResNet-10-1-SiLU")), "`1` normalises what `0`"),
    ],
)
def test_catches_two_normalising_layers_without_labels(build, names):
    report = run(build().eval(), torch.rand(4, 3, 32, 32), None)
    assert report.failed == ("normalisation",)
    assert report["normalisation"].why.startswith(names)


# --- optimisation, radius and claim ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("passes", "passed"), [(2, False), (3, True)])
def test_a_search_is_no_failure_if_its_passes_are_stated(passes, passed, images, labels):
    assert run(Searching().eval(), images, labels, number_forward_passes=passes).passed is passed


def test_a_network_in_torchscript_cannot_be_looked_into(images, labels):
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        traced = torch.jit.trace(Brightness().eval(), images[:2])
    report = run(traced, images, labels)
    assert report["optimisation"].passed is None
    assert "TorchScript" in report["optimisation"].why


@pytest.mark.parametrize(
    ("eps", "norm", "passed", "why"),
    [
        ("8/255", "Linf", True, "8/255 is exact."),
        ("0.031", "Linf", False, "0.031 is 7.905/255"),
        ("1", "Linf", True, "1 is exactly 255/255"),
        ("2", "L2", True, "2 is exact"),
        ("7.9/255", "Linf", True, "7.9/255 is exact, but"),
        ("256/255", "Linf", False, "256/255 is above 1"),
        (None, "Linf", None, "No radius"),
    ],
)
def test_wants_a_radius_that_is_exact(eps, norm, passed, why, images, labels):
    report = run(Brightness().eval(), images, labels, eps=eps, norm=norm)
    assert report["eps"].passed is passed
    assert report["eps"].why.startswith(why)
    assert report.failed == (() if passed is not False else ("eps",))


@pytest.mark.parametrize(
    ("claimed", "measured", "passed", "why"),
    [
        (57.10, 57.09, False, "The claim of 57.10 % is above"),
        (57.09, 57.086, True, "The claim of 57.09 % is not above"),
        (None, 57.09, None, "No accuracy was given as claimed."),
    ],
)
def test_wants_a_claim_that_is_not_above_what_was_measured(claimed, measured, passed, why, images, labels):
    report = run(Brightness().eval(), images, labels, claimed=claimed, measured=measured)
    assert report["claim"].passed is passed
    assert report["claim"].why.startswith(why)
    assert report.failed == (() if passed is not False else ("claim",))


# --- the report, and bad input ---------------------------------------------------------------------------------------


def test_says_by_which_images_it_judged_and_warns_of_chance(images, labels):
    model, made = Brightness().eval(), []
    data = Images(images, labels, None, "brightnesses", "not read")
    report = run(model, images, labels, data=data, progress=made.append)
    digest = content_sha256(images, labels)
    assert report.data == {
        "name": "brightnesses",
        "sha256": digest,
        "n_examples": N,
        "preprocessing": None,
        "natural_accuracy": 100.0,
    }
    line = f"Judged by {N} images of brightnesses (sha256 {digest[:12]}): natural accuracy 100.00 %."
    assert line in report.markdown().splitlines()
    assert (report.warnings, tuple(made)) == ((), report.checks)
    found = json.loads(report.to_json())
    assert (found["data"], found["warnings"], found["obstacle"]) == (dict(report.data), [], report.obstacle)
    assert report.obstacle.startswith("`model` must be of one of RobustBench's architectures, got Brightness.")
    assert f"It cannot be submitted to RobustBench: {report.obstacle}" in str(report)
    assert run(robustbench_network("WideResNet-10-1").eval(), images, labels).obstacle is None
    with pytest.warns(UserWarning, match=r"^preflight: 0 of \d+ natural images are right, no more than by chance"):
        report = run(model, images, labels.roll(5))
    (warning,) = report.warnings
    assert f"**Warning: {warning}**" in report.markdown()
    unlabelled = run(model, images, None)
    assert (unlabelled.data["natural_accuracy"], unlabelled.warnings) == (None, ())
    assert "not named" in unlabelled.judged_by


@pytest.mark.parametrize(
    ("change", "error", "fragment"),
    [
        ({"model": len}, TypeError, "`model` .* got builtin_function_or_method"),
        ({"images": torch.zeros(4, 3, 8, 8).byte()}, TypeError, "`images` .* got torch.uint8"),
        ({"images": torch.zeros(1, 3, 8, 8)}, ValueError, r"`images` .* got \(1, 3, 8, 8\)"),
        ({"images": torch.zeros(4, 3, 8)}, ValueError, r"`images` .* got \(4, 3, 8\)"),
        ({"images": torch.full((4, 3, 8, 8), torch.nan)}, ValueError, "`images` must be finite"),
        ({"images": torch.zeros(4, 3, 8, 8, device="meta")}, ValueError, "`images` must be on .* cpu, got meta"),
        ({"labels": torch.zeros(40)}, TypeError, "`labels` .* got torch.float32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"`labels` .* got shape \(3,\) with 0"),
        ({"labels": torch.full((40,), 10)}, ValueError, "`labels` must be below 10, .* got 10"),
        ({"mean": MEAN}, ValueError, "`mean` and `std` must be given both"),
        ({"mean": MEAN, "std": (0.5, 0.5)}, ValueError, "`mean` and `std` .* each of 3 channels"),
        ({"mean": MEAN, "std": (0.0,)}, ValueError, r"`std` must be finite numbers above 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` .* got 0"),
        ({"number_forward_passes": 0}, ValueError, "`number_forward_passes` .* got 0"),
        ({"number_forward_passes": True}, TypeError, "`number_forward_passes` .* got True"),
        ({"claimed": 101.0}, ValueError, "`claimed` .* got 101.0"),
        ({"measured": -1}, ValueError, "`measured` .* got -1"),
    ],
)
def test_refuses_bad_input(change, error, fragment, images, labels):
    arguments = {"model": Brightness().eval(), "images": images, "labels": labels, **change}
    with pytest.raises(error, match=f"^preflight: {fragment}"):
        preflight(arguments.pop("model"), arguments.pop("images"), arguments.pop("labels"), **arguments)
