"""Preflight: sound models pass every check; each broken one is caught, by its check alone where that is possible."""

from __future__ import annotations

import json
import random
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.loading import HostClassifier, Normalised
from ikl_plugins.robustbench.preflight import CHECKS, Check, Preflight, preflight

N, CLASSES = 40, 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


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


class InlineNormalise(nn.Module):
    """The same, with nothing in its attributes that tells."""

    def forward(self, x):
        return (x - column(MEAN)) / column(STD)


class Around(nn.Module):
    """Does something to the inputs or the logits of a sound classifier."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.net = Brightness()
        self.before, self.after = before, after

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        logits = self.net(x)
        return logits if self.after is None else self.after(logits, x)


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


def caught(report, *names):
    """The checks that failed, which must be these and no others."""
    assert report.failed == names, [found for found in report.checks if found.passed is False]
    assert not report.passed
    return report[names[0]].why


# --- sound models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["WideResNet-10-1", "DMWideResNet-10-1-SiLU", "DMWideResNet-10-1-ReLU"])
def test_robustbench_networks_pass_every_check(architecture):
    model = robustbench_network(architecture).eval()
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    report = run(model, images, labels, batch_size=4)
    assert tuple(found.name for found in report.checks) == CHECKS
    assert all(found.passed is True for found in report.checks), report.markdown()


@pytest.mark.parametrize(
    "model",
    [
        Brightness(),
        nn.Sequential(Normalise(), Brightness(MEAN, STD)),
        nn.Sequential(InlineNormalise(), Brightness(MEAN, STD)),
        Around(after=lambda logits, x: logits.log_softmax(dim=1)),
    ],
    ids=["bare", "wrapped", "wrapped inline", "log-probabilities"],
)
def test_sound_classifiers_pass_every_check(model, images, labels):
    report = run(model.eval(), images, labels)
    assert all(found.passed is True for found in report.checks), report.markdown()
    assert report.passed
    assert report.unchecked == ()


class After(nn.Module):
    def __init__(self, net, after):
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x):
        return self.after(self.net(x))


@pytest.mark.parametrize("architecture", ["WideResNet-10-1", "DMWideResNet-10-1-SiLU", "PreActResNet-18"])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(
    "after",
    [lambda logits: 20 * logits, lambda logits: 100 * logits, lambda logits: logits.log_softmax(dim=1)],
    ids=["x20", "x100", "log-softmax"],
)
def test_scaled_logits_of_networks_pass_every_check(after, grid, architecture):
    model = After(robustbench_network(architecture), after).eval()
    images = torch.rand(4, 3, 32, 32)
    images = (images * 255).round() / 255 if grid else images
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    report = run(model, images, labels, batch_size=4)
    assert all(found.passed is True for found in report.checks), report.markdown()


class Preprocessor(nn.Module):
    """As MMPretrain's: pixels in a dictionary, to normalised inputs."""

    def forward(self, data, training):
        return {"inputs": (data["inputs"] - 255 * column(MEAN)) / (255 * column(STD))}


class Host(Brightness):
    def __init__(self):
        super().__init__(MEAN, STD)
        self.data_preprocessor = Preprocessor()


@pytest.mark.parametrize(
    "model",
    [Normalised(Brightness(MEAN, STD), MEAN, STD), HostClassifier(Host(), 255.0, False)],
    ids=["Normalised", "HostClassifier"],
)
def test_wrapped_classifiers_pass_every_check(model, images, labels):
    report = run(model.eval(), images, labels)
    assert all(found.passed is True for found in report.checks), report.markdown()


def test_a_robust_network_whose_gradients_are_small_passes(images, labels):
    # Far from its boundary: the margin changes by a thousandth of the logits over the whole ball.
    model = Around(after=lambda logits, x: 0.01 * logits + 10 * logits.detach().sign() + 10.0)
    assert "gradients" not in run(model.eval(), images, labels).failed


def test_says_that_log_probabilities_are_logits(images, labels):
    report = run(Around(after=lambda logits, x: logits.log_softmax(dim=1)).eval(), images, labels)
    assert report["logits"].why == "The outputs are log-probabilities, which are logits too."


def test_networks_side_by_side_may_each_normalise(images, labels):
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList(nn.Sequential(Normalise(), Brightness(MEAN, STD)) for _ in range(2))

        def forward(self, x):
            return sum(member(x) for member in self.members)

    report = run(Ensemble().eval(), images, labels)
    assert report.passed, report.markdown()
    assert report["normalisation"].why.startswith("2 normalising layers, none behind another.")


class ToPixels(nn.Module):
    def forward(self, x):
        return x * 255


PIXELS = tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)


@pytest.mark.parametrize(
    "layers",
    [
        (ToPixels(), Normalise(*PIXELS)),  # as a data preprocessor for bytes does
        (ToPixels(), Normalise((0.0,) * 3, (255.0,) * 3), Normalise()),  # back to [0, 1], and then normalised
    ],
)
def test_pixels_that_are_scaled_and_scaled_back_are_not_normalised_twice(layers, images, labels):
    report = run(nn.Sequential(*layers, Brightness(MEAN, STD)).eval(), images, labels)
    assert report.passed, report.markdown()


# --- what is left as it was ------------------------------------------------------------------------------------------


def test_leaves_model_and_random_numbers_as_they_were(images, labels):
    class Counting(Brightness):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            self.calls += 1
            torch.rand(1), np.random.rand(), random.random()
            return super().forward(self.norm(x))

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
    assert "output" in run(model, images, labels).failed
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


def test_leaves_no_memory_in_the_model(images, labels):
    model = Remembering().eval()
    run(model, images, labels)
    assert model.first is None


def test_works_without_the_callers_autocast_and_leaves_it_on(images, labels):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 10)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        report = run(model, images, None)
        assert torch.is_autocast_enabled("cpu")
    assert report.passed, report.markdown()


def test_leaves_the_images_as_they_were(images, labels):
    kept = images.clone()
    run(Around(before=lambda x: x.mul_(0.5)).eval(), images, labels)
    assert torch.equal(images, kept)


# --- one broken model per check --------------------------------------------------------------------------------------


def test_catches_training_mode_and_names_the_modules(images, labels):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), Brightness()).eval()
    model[0].train()
    model[1].train()
    assert caught(run(model, images, labels), "eval mode") == "In training mode: 0, 1. Call model.eval()."


def test_names_no_more_modules_than_one_can_read(images, labels):
    model = nn.Sequential(*(nn.Identity() for _ in range(6)), Brightness())
    why = caught(run(model, images, labels), "eval mode")
    assert why == "In training mode: Sequential, 0, 1, 2 and 4 more. Call model.eval()."


def test_catches_double_precision(images, labels):
    model = Around(before=lambda x: x.double()).eval().double()
    why = caught(run(model, images, labels), "output")
    assert why.startswith("net.templates is float64; RobustBench evaluates in float32. Call model.float().")
    assert why.endswith("The logits are float64 and not float32.")


def test_catches_half_precision_that_cannot_run(images, labels):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 10)).eval().half()
    report = run(model, images, labels)
    why = caught(report, "output")
    assert why.startswith("0.weight is float16, 0.bias is float16, 2.weight is float16, 2.bias is float16; ")
    assert "The forward fails: " in why
    assert report.unchecked == ("deterministic", "batch", "gradients", "logits", "normalisation", "optimisation")


def test_catches_parameters_of_another_dtype_whose_logits_are_float32(images, labels):
    model = Around(after=lambda logits, x: logits + 0)
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.bfloat16)))
    why = caught(run(model.eval(), images, labels), "output")
    assert why == "scale is bfloat16; RobustBench evaluates in float32. Call model.float()."


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = robustbench_network("WideResNet-10-1")

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class AutocastLeftOn(Around):
    def forward(self, x):
        torch.set_autocast_enabled("cpu", True)
        return self.net(x)


def test_catches_autocast_and_names_the_modules():
    report = run(Autocast().eval(), torch.rand(4, 3, 32, 32), None)
    assert "output" in report.failed
    why = report["output"].why
    assert why.startswith("The forward computes in another precision: `net.conv1` gives bfloat16, `net.block1.layer.0.")
    assert why.endswith(" more. Compute in float32.")


def test_catches_autocast_that_is_left_on_and_turns_it_off(images, labels):
    why = caught(run(AutocastLeftOn().eval(), images, labels), "output")
    assert why == "The forward leaves autocast on (cpu). Use it in a with statement, or not at all."
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("cls", [Halved, HalvedBuffer])
def test_catches_parameters_that_the_forward_converts(cls, images, labels):
    report = run(cls().eval(), images, labels)
    assert "output" in report.failed
    assert report["output"].why.startswith("The forward converts net.templates to float16")
    assert "`net` gives float16" in report["output"].why


def test_catches_inputs_that_are_cut_to_half_precision(images, labels):
    report = run(Around(before=lambda x: x.bfloat16().float()).eval(), images, labels)
    assert report["output"].why == (
        "The forward computes in another precision: bfloat16 gives bfloat16. Compute in float32."
    )
    assert "output" in report.failed


def test_constants_in_double_precision_are_no_other_precision(images, labels):
    def shifted(x):
        return x + torch.zeros(1, dtype=torch.float64).float()

    assert run(Around(before=shifted).eval(), images, labels).passed


def test_catches_a_leaf_in_double_precision(images, labels):
    class Double(nn.Module):
        def forward(self, x):
            return x.double()

    model = Around(before=Double(), after=lambda logits, x: logits.float())
    why = caught(run(model.eval(), images, labels), "output")
    assert why.startswith("The forward computes in another precision: `before` gives float64")


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (lambda logits, x: logits[:, :, None, None], "The model returns shape (32, 10, 1, 1) and not (N, C)."),
        (lambda logits, x: (logits,), "The model returns a tuple, no tensor."),
        (
            lambda logits, x: logits.where(x.mean(dim=(1, 2, 3))[:, None] < 0.9, torch.nan),
            "4 of 40 images gave inf or nan.",
        ),
        (lambda logits, x: logits[:1], "40 images gave 2 rows of logits."),
    ],
    ids=["shape", "tuple", "nan", "rows"],
)
def test_catches_what_is_no_batch_of_logits(after, why, images, labels):
    report = run(Around(after=after).eval(), images, labels)
    assert caught(report, "output") == why
    assert report["deterministic"] == Check("deterministic", None, "The model gives no finite logits of shape (N, C).")


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: torch.randn_like(x),
        lambda x: torch.from_numpy(np.random.randn(*x.shape)).to(x.dtype),
        lambda x: random.gauss(0, 1),
    ],
    ids=["torch", "numpy", "python"],
)
def test_catches_noise(noise, images, labels):
    report = run(Around(before=lambda x: x + 1e-3 * noise(x)).eval(), images, labels)
    why = caught(report, "deterministic")
    assert why.startswith("The logits depend on random numbers, by up to ")
    assert report["batch"].passed is None


def test_catches_logits_that_change_from_call_to_call(images, labels):
    class Drifting(Brightness):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls * torch.arange(CLASSES)

    why = caught(run(Drifting().eval(), images, labels), "deterministic")
    assert why.startswith("The same batch gave other logits the second time, by up to 9.")


def test_catches_a_model_that_remembers_its_first_batch(images, labels):
    report = run(Remembering().eval(), images, labels)
    why = caught(report, "deterministic")
    assert why.startswith("The logits depend on the batches that came before, by up to ")
    assert report["batch"].passed is None


def test_says_that_a_model_without_a_copy_is_not_checked_for_memory(images, labels):
    model = Brightness().eval()
    model.lock = threading.Lock()
    report = run(model, images, labels)
    assert report.passed
    assert report["deterministic"].why.endswith(
        " The model cannot be copied: not checked whether it remembers its first batch."
    )


def test_catches_a_forward_that_changes_a_buffer(images, labels):
    class Tracking(Brightness):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            self.seen.copy_(x.detach().mean(dim=(0, 2, 3)))
            return super().forward(x)

    why = caught(run(Tracking().eval(), images, labels), "deterministic")
    assert why == "The forward changes seen. Freeze what it keeps."


def test_catches_a_model_that_sets_the_seed_of_the_attacks(images, labels):
    def seeded(x):
        torch.manual_seed(0)
        return x + 1e-3 * torch.randn(x.shape[1:])

    why = caught(run(Around(before=seeded).eval(), images, labels), "deterministic")
    assert why.startswith("The forward sets the seed of a global generator, from which the attacks draw too.")


def test_random_numbers_that_change_nothing_are_noted(images, labels):
    report = run(Around(before=lambda x: x + 0 * torch.rand(())).eval(), images, labels)
    assert report.passed
    assert report["deterministic"].why.endswith("It draws random numbers, but they change nothing.")


def test_catches_a_model_that_is_another_one_under_attack(images, labels):
    def after(logits, x):
        return logits.roll(1, dims=1) if torch.is_grad_enabled() else logits

    why = caught(run(Around(after=after).eval(), images, labels), "deterministic")
    assert why.startswith("The logits differ when gradients are recorded, by up to ")


def test_catches_a_forward_that_writes_into_its_input(images, labels):
    report = run(Around(before=lambda x: x.mul_(2).div_(2).add_(1e-3)).eval(), images, labels)
    why = caught(report, "deterministic", "gradients")  # an image that wants a gradient cannot be written to
    assert why == "The forward writes into its input. Let it work on a new tensor."


@pytest.mark.parametrize(
    "before",
    [
        lambda x: x - 0.01 * x.mean(dim=0, keepdim=True),
        lambda x: x + 0.01 * (torch.arange(len(x)) / len(x)).view(-1, 1, 1, 1),
        lambda x: x + 0.01 * x.roll(1, dims=0),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    ],
    ids=["mean", "position", "neighbour", "batch statistics"],
)
def test_catches_logits_that_depend_on_the_batch(before, images, labels):
    report = run(Around(before=before).eval(), images, labels)
    assert "batch" in report.failed
    assert report["batch"].why.startswith("The logits of 16 images passed one at a time differ by up to ")
    if not isinstance(before, nn.Module):  # which makes the classifier wrong as well
        caught(report, "batch")


def test_catches_a_model_that_is_another_one_for_a_single_image(images, labels):
    report = run(Around(before=lambda x: x + 0.01 * (len(x) == 1)).eval(), images, labels)
    assert caught(report, "batch").startswith("The logits of 16 images passed one at a time differ by up to ")


def test_catches_a_model_that_is_another_one_in_small_batches(images, labels):
    report = run(Around(before=lambda x: x + 0.01 * (len(x) == 16)).eval(), images[:32], labels[:32])
    assert caught(report, "batch").startswith("The logits in batches of 16 differ by up to ")


def test_catches_logits_that_depend_on_the_order_alone(images, labels):
    def first_rows_differ(x):
        # One image, as in the other views, changes nothing; only who stands at row 20 and beyond does.
        return x + 0.01 * (torch.arange(len(x)) >= 20).view(-1, 1, 1, 1)

    report = run(Around(before=first_rows_differ).eval(), images, labels)
    assert report["batch"].why.startswith("The logits in reversed order differ by up to ")
    caught(report, "batch")


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (lambda x: x.detach(), "No gradient reaches the images: "),
        (
            lambda x: (x * 100).round() / 100,
            "The gradient of the cross entropy at the images is zero for 40 of 40: attacks have nothing to follow.",
        ),
    ],
    ids=["detached", "rounded"],
)
def test_catches_gradients_that_are_missing(before, why, images, labels):
    assert caught(run(Around(before=before).eval(), images, labels), "gradients").startswith(why)


def test_catches_a_gradient_that_vanishes_under_cross_entropy_alone(images, labels):
    why = caught(run(Around(after=lambda logits, x: 1e5 * logits).eval(), images, labels), "gradients")
    assert why.startswith("The gradient of the cross entropy at the images is zero for ")


def test_catches_a_gradient_that_vanishes_inside_the_ball_alone(images, labels):
    def masked(logits, x):
        # The images have a gradient; a step away, where 8-bit values end, there is none.
        on_grid = ((x * 255 - (x * 255).round()).abs() < 1e-3).flatten(1).all(dim=1)
        return torch.where(on_grid[:, None], logits, logits.detach() + 0 * logits)

    grid = (images * 255).round() / 255
    why = caught(run(Around(after=masked).eval(), grid, labels), "gradients")
    assert "at points inside the ball of 0.03137 is zero for 40 of 40" in why


def masked(x):
    return x.detach() + 1e-12 * (x - x.detach())


def misled(x):
    signs = torch.randint(0, 2, x.shape[1:], generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return x.detach() + signs * (x - x.detach())


def straight_through(levels, rounded=torch.round):
    return lambda x: x + (rounded(x * levels) / levels - x).detach()


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(
    ("before", "words"),
    [
        (masked, "e+1"),
        (misled, "attacks would follow another function"),
        (straight_through(255, torch.floor), "attacks would follow another function"),
        (straight_through(255), "changes nothing for "),
        (straight_through(100), "changes nothing for "),
        (straight_through(15), "changes nothing for "),
    ],
    ids=["masked", "misled", "floor", "255 levels", "100 levels", "15 levels"],
)
def test_catches_gradients_of_another_function(before, words, grid):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = robustbench_network("WideResNet-10-1")

        def forward(self, x):
            return self.net(before(x))

    images = torch.rand(8, 3, 32, 32)
    images = (images * 255).round() / 255 if grid else images
    why = caught(run(Inside().eval(), images, None), "gradients")
    assert words in why
    assert why.startswith("At the images, ")


def test_catches_a_gradient_that_is_no_number(images, labels):
    def rooted(x):
        return x + (0 * x).sqrt()  # 0 forward, 0 * inf backward

    why = caught(run(Around(before=rooted).eval(), images, labels), "gradients")
    assert why == "The gradient of the cross entropy at the images is inf or nan for 40 of 40."


class PartlyDead(Brightness):
    """Without a gradient on the darkest images."""

    def __init__(self, images, count):
        super().__init__()
        self.limit = float(images.mean(dim=(1, 2, 3)).sort().values[count - 1]) + 1e-6

    def forward(self, x):
        logits = super().forward(x)
        dark = x.detach().mean(dim=(1, 2, 3)) <= self.limit
        return torch.where(dark[:, None], logits.detach() + 0 * logits, logits)


def test_single_images_without_gradient_are_noted(images, labels):
    report = run(PartlyDead(images, 4).eval(), images, labels)
    assert report.passed
    assert "Zero: 4 of 40 for the cross entropy at the images; 4 of 40 for the margin" in report["gradients"].why


def test_more_than_a_tenth_without_gradient_fail(images, labels):
    why = caught(run(PartlyDead(images, 5).eval(), images, labels), "gradients")
    assert why.startswith("The gradient of the cross entropy at the images is zero for 5 of 40: ")


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (lambda logits, x: logits.softmax(dim=1), "The outputs lie in [0, 1]: they are probabilities"),
        (lambda logits, x: logits.sigmoid(), "The outputs lie in [0, 1]: they are probabilities"),
        (lambda logits, x: 100 * logits.softmax(dim=1), "The outputs are not negative and each row sums to 100: "),
        (lambda logits, x: logits.softmax(dim=1) + 1e-3, "The outputs "),
        (lambda logits, x: logits.softmax(dim=1) + 0.1, "The outputs are not negative and each row sums to 2: "),
    ],
    ids=["softmax", "sigmoid", "percent", "shifted", "shifted far"],
)
def test_catches_probabilities(after, why, images, labels):
    report = run(Around(after=after).eval(), images, labels)
    assert "logits" in report.failed
    assert report["logits"].why.startswith(why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x * 255, "Divide by 255."),
        (lambda x: (x - 0.5) / 0.25, "Leave the normalisation to the model."),
        (lambda x: x / 255, "The images reach 0.0039 at most. Divide 8-bit images by 255 only once."),
    ],
)
def test_catches_images_outside_0_to_1(change, why, images):
    report = run(Brightness().eval(), change(images), None)
    assert caught(report, "inputs").endswith(why)


@pytest.mark.parametrize(
    ("model", "best"),
    [
        (Around(before=lambda x: x / 255), "Multiplying by 255"),
        (Brightness(MEAN, STD), "Normalising by the given mean and std before the model"),
        (
            nn.Sequential(InlineNormalise(), InlineNormalise(), Brightness(MEAN, STD)),
            "Undoing a normalisation by the given mean and std",
        ),
    ],
    ids=["pixels", "not normalised", "normalised twice"],
)
def test_catches_inputs_that_the_model_was_not_trained_with(model, best, images, labels):
    why = caught(run(model.eval(), images, labels, mean=MEAN, std=STD), "normalisation")
    assert why.startswith(f"{best} gives 100.0 % accuracy and the images in [0, 1] ")


def test_tries_the_normalisations_in_common_use(images, labels):
    imagenet = Brightness((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    why = caught(run(imagenet.eval(), images, labels), "normalisation")
    assert why.startswith("Normalising by ImageNet's mean and std before the model gives 100.0 % accuracy")


def test_catches_a_swapped_channel_order(images, labels):
    class Red(Brightness):
        def forward(self, x):
            return -60 * (x[:, :1].mean(dim=(2, 3)) - self.templates[:, 0]).square()

    images[:, 1:] = torch.rand(N, 2, 1, 1)
    assert run(Red().eval(), images, labels).passed
    why = caught(run(Red().eval(), images.flip(1), labels), "normalisation")
    assert why.startswith("Turning RGB into BGR gives 100.0 % accuracy")


@pytest.mark.parametrize(
    ("count", "wrong", "passed"),
    [
        (40, 8, True),  # 20 points, 3 standard errors
        (40, 3, False),  # 7.5 points, less than 2 standard errors
        (200, 8, False),  # nearly 3 standard errors, but 4 points
    ],
)
def test_only_a_clear_difference_in_accuracy_is_a_failure(count, wrong, passed):
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
    assert report.failed == (("normalisation",) if passed else ()), report.markdown()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            nn.Sequential(Normalise(), Normalise(), Brightness(MEAN, STD)),
            "`1` normalises what `0` has normalised already.",
        ),
        (
            nn.Sequential(Normalise(), nn.Identity(), Normalise((0.5,) * 3, (0.5,) * 3), Brightness()),
            "`2` normalises what `0` has normalised already.",
        ),
    ],
)
def test_catches_two_normalising_layers_without_labels(model, why, images):
    assert caught(run(model.eval(), images, None), "normalisation") == f"{why} Remove one of them."


def test_catches_a_second_normalisation_of_pixels(images):
    model = nn.Sequential(ToPixels(), Normalise(*PIXELS), Normalise(), Brightness())
    why = caught(run(model.eval(), images, None), "normalisation")
    assert why == "`2` normalises what `1` has normalised already. Remove one of them."


def test_catches_a_normalised_input_of_a_network_that_normalises_itself(images):
    model = nn.Sequential(Normalise(), robustbench_network("DMWideResNet-10-1-SiLU")).eval()
    why = caught(run(model, torch.rand(4, 3, 32, 32), None), "normalisation")
    assert why == "`1` normalises what `0` has normalised already. Remove one of them."


def test_says_what_it_could_not_compare_without_labels(images):
    report = run(Brightness().eval(), images, None)
    assert report["normalisation"] == Check(
        "normalisation", True, "No normalising layer. Without labels the accuracy was not compared."
    )


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


def purified_functionally(x):
    return x - 1e-4 * torch.func.grad(lambda leaf: leaf.square().sum())(x.detach())


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


def purified_under_attack_alone(x):
    return purified(x) if x.requires_grad else x - 1e-4 * 2 * x.detach()


@pytest.mark.parametrize(
    ("before", "call"),
    [
        (purified, "torch.autograd.grad"),
        (purified_backward, "torch.autograd.backward"),
        (purified_functionally, "a derivative of torch.func"),
        (purified_by_the_engine, "torch.autograd's run_backward"),
        (fitted, "the step of an optimiser"),
        (purified_under_attack_alone, "torch.autograd.grad"),
    ],
)
def test_catches_optimisation_in_the_forward(before, call, images, labels):
    why = caught(run(Around(before=before).eval(), images, labels), "optimisation")
    assert why.startswith("The forward calls ")
    assert call in why


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


def test_catches_a_search_in_the_forward_unless_its_passes_are_stated(images, labels):
    why = caught(run(Searching().eval(), images, labels), "optimisation")
    assert why == (
        "3 passes of the network in one forward, counted at `net.1`; state number_forward_passes=3, also if layers "
        "share weights, and RobustBench takes no search in the forward."
    )
    caught(run(Searching().eval(), images, labels, number_forward_passes=2), "optimisation")
    assert run(Searching().eval(), images, labels, number_forward_passes=3).passed


def test_catches_a_search_under_attack_alone(images, labels):
    report = run(Searching(lambda x: x.requires_grad).eval(), images, labels)
    assert report["optimisation"].why.startswith("3 passes of the network")


def test_layers_without_parameters_may_be_called_again(images, labels):
    shared = nn.Identity()
    assert run(nn.Sequential(shared, shared, Brightness()).eval(), images, labels).passed


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
        (8 / 255, "Linf", True, "8/255 is exact."),
        ("0.031", "Linf", False, "0.031 is 7.905/255, no number of grey levels. Evaluate at a fraction such as 8/255."),
        (0.03, "Linf", False, "0.03 is 7.65/255, no number of grey levels. Evaluate at a fraction such as 8/255."),
        ("1", "Linf", True, "1 is exactly 255/255."),
        ("0.5", "L2", True, "0.5 is exact."),
        ("2", "L2", True, "2 is exact."),
        ("7.9/255", "Linf", True, "7.9/255 is exact, but no whole number of grey levels."),
        ("16/510", "Linf", True, "16/510 is exact."),
        ("8", "Linf", False, "8 is above 1, the range of a pixel in [0, 1]. Write grey levels as k/255."),
        ("256/255", "Linf", False, "256/255 is above 1, the range of a pixel in [0, 1]. Write grey levels as k/255."),
        (None, "Linf", None, "No radius was given."),
    ],
)
def test_wants_a_radius_that_is_exact(eps, norm, passed, why, images, labels):
    report = run(Brightness().eval(), images, labels, eps=eps, norm=norm)
    assert report["eps"] == Check("eps", passed, why)
    assert report.failed == (() if passed is not False else ("eps",))


@pytest.mark.parametrize(
    ("claimed", "measured", "passed", "why"),
    [
        (57.09, 57.09, True, "The claim of 57.09 % is not above the measured 57.09 %."),
        (57.13, 57.09, False, "The claim of 57.13 % is above the measured 57.09 %. Claim the measured one."),
        (57.09, 57.086, True, "The claim of 57.09 % is not above the measured 57.09 %."),
        (57.10, 57.09, False, "The claim of 57.10 % is above the measured 57.09 %. Claim the measured one."),
        (50.0, 57.09, True, "The claim of 50.00 % is not above the measured 57.09 %."),
        (None, 57.09, None, "No accuracy was given as claimed."),
        (None, None, None, "No accuracy was given as claimed and measured."),
    ],
)
def test_wants_a_claim_that_is_not_above_what_was_measured(claimed, measured, passed, why, images, labels):
    report = run(Brightness().eval(), images, labels, claimed=claimed, measured=measured)
    assert report["claim"] == Check("claim", passed, why)
    assert report.failed == (() if passed is not False else ("claim",))


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_as_markdown_and_json():
    report = Preflight(
        (Check("output", True, "Fine."), Check("eps", None, "a | b"), Check("claim", False, "Too high."))
    )
    assert report.markdown() == (
        "# Preflight: FAILED: claim\n\nNot checked: eps.\n\n| check | result | why |\n| --- | --- | --- |\n"
        "| output | pass | Fine. |\n| eps | not checked | a \\| b |\n| claim | FAIL | Too high. |\n"
    )
    assert json.loads(report.to_json()) == {
        "passed": False,
        "checks": [
            {"name": "output", "passed": True, "why": "Fine."},
            {"name": "eps", "passed": None, "why": "a | b"},
            {"name": "claim", "passed": False, "why": "Too high."},
        ],
    }
    assert Preflight(report.checks[:1]).markdown().startswith("# Preflight: passed\n\n| check ")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": len}, TypeError, r"`model` must be a torch.nn.Module, got builtin_function_or_method\. Wrap"),
        (
            {"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)},
            TypeError,
            r"`images` must be a tensor of floats in \[0, 1\], got dtype torch.uint8\. Divide 8-bit images by 255\.",
        ),
        ({"images": [1]}, TypeError, r"`images` must be a tensor of floats in \[0, 1\], got list\. Divide"),
        (
            {"images": torch.zeros(1, 3, 8, 8)},
            ValueError,
            r"`images` must be at least 2 images of shape \(N, channels, H, W\), got \(1, 3, 8, 8\)\. Pass a batch",
        ),
        (
            {"images": torch.full((4, 3, 8, 8), torch.nan)},
            ValueError,
            r"`images` must be finite, got inf or nan\. Pass",
        ),
        (
            {"labels": torch.zeros(40)},
            TypeError,
            r"`labels` must be a tensor of class indices, got dtype torch.float32",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"`labels` must be 40 class indices from 0, one per image, got shape \(3,\) with 0\. Pass the labels",
        ),
        (
            {"labels": torch.full((40,), -1)},
            ValueError,
            r"`labels` must be 40 class indices from 0, one per image, got shape \(40,\) with -1\. Pass",
        ),
        (
            {"labels": torch.full((40,), 10)},
            ValueError,
            r"`labels` must be below 10, the number of logits, got 10\. Pass images of the classes",
        ),
        ({"mean": MEAN}, ValueError, r"`mean` and `std` must be given together\. Pass both, or neither\."),
        (
            {"mean": (0.5,), "std": (0.5,)},
            ValueError,
            r"`mean` must have one value per channel, got \(0.5,\) for 3 channels\. Pass 3 values\.",
        ),
        ({"batch_size": 0}, ValueError, r"`batch_size` must be an integer of at least 1, got 0\. Pass 32\."),
        (
            {"number_forward_passes": 0},
            ValueError,
            r"`number_forward_passes` must be an integer of at least 1, got 0\. Pass 1, or the number that the entry",
        ),
        (
            {"number_forward_passes": True},
            ValueError,
            r"`number_forward_passes` must be an integer of at least 1, got T",
        ),
        (
            {"claimed": 101.0},
            ValueError,
            r"`claimed` must be in percent, 0 to 100, got 101.0\. Pass 57.09 for 57.09 %\.",
        ),
        ({"measured": -1}, ValueError, r"`measured` must be a finite number of at least 0, got -1\. Choose"),
        ({"eps": "eight"}, ValueError, r"`eps` must be a fraction or a number, got 'eight'\. Write"),
    ],
)
def test_refuses_bad_input(change, error, message, images, labels):
    arguments = {"model": Brightness().eval(), "images": images, "labels": labels, **change}
    model, images, labels = arguments.pop("model"), arguments.pop("images"), arguments.pop("labels")
    with pytest.raises(error, match=rf"^preflight: {message}"):
        preflight(model, images, labels, **arguments)
