"""Preflight: what it leaves as it was, its claims and its report."""

from __future__ import annotations

import json
import random
import sys
import threading

import numpy as np
import pytest
import torch
from preflight_models import CLASSES, MEAN, Around, Brightness, brightnesses, run
from torch import nn

from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.data import Images, content_sha256
from ikl_plugins.robustbench.preflight import preflight

N = 40


# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture
def labels():
    return torch.arange(N) % CLASSES


@pytest.fixture
def images():
    return brightnesses(N)[0]


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


# --- radius and claim ----------------------------------------------------------------------------------


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


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("options", "last"), [({"claimed": 90.0}, "claim"), ({"eps": "0.031"}, "eps"), ({"change": 255.0}, "inputs")]
)
def test_what_needs_no_forward_is_said_before_any(options, last, images, labels):
    def progress(found):
        if found.passed is False:
            assert found.name == last
            raise StoppedError

    def before(x):
        raise AssertionError("a forward")

    images = options.pop("change", 1.0) * images
    with pytest.raises(StoppedError):
        run(Around(before=before).eval(), images, labels, progress=progress, **options)


def test_classes_in_another_order_are_refused(images, labels):
    model = Brightness().eval()
    names = tuple("abcdefghij")
    model.classes = names
    run(model, images, labels, data=Images(images, labels, names, "brightnesses", "not read"))
    swapped = ("b", "a", *names[2:])
    with pytest.raises(
        ValueError, match=r"^preflight: classes must be in the checkpoint's order, but have 'b' where it"
    ):
        run(model, images, labels, data=Images(images, labels, swapped, "brightnesses", "not read"))


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
        "source": None,
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
