"""Preflight: sound models pass every check."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from preflight_models import (
    MEAN,
    STD,
    Around,
    Brightness,
    Inline,
    Normalise,
    brightnesses,
    column,
    convolutions,
    digits,
    run,
    sound,
    to_pixels,
    train,
)
from torch import nn

from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.loading import HostClassifier, Normalised

N = 40
PIXELS = tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)


# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture
def labels():
    return torch.arange(N) % 10


@pytest.fixture
def images():
    return brightnesses(N)[0]


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


# --- networks as people build them, with the weights they begin with and after some training -----------------------


class Cosine(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.templates = nn.Parameter(torch.randn(classes, features))

    def forward(self, x):
        return 16 * F.linear(F.normalize(x, dim=1), F.normalize(self.templates, dim=1))


class Average(nn.Module):
    def __init__(self, *members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return sum(member(x) for member in self.members) / len(self.members)


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def median(x):
    """Of the nine pixels around each; black ones are equal."""
    around = F.unfold(F.pad(x, (1, 1, 1, 1)), 3).view(len(x), x.shape[1], 9, -1)
    return around.median(dim=2).values.view_as(x)


def groups(number):
    return lambda channels: nn.GroupNorm(number, channels)


NETWORKS = {
    "ReLU, BatchNorm, max pooling": convolutions,
    "frozen BatchNorm": lambda: convolutions(norm=Frozen),
    "GroupNorm, SiLU": lambda: convolutions(norm=groups(4), act=nn.SiLU),
    "InstanceNorm, GELU": lambda: convolutions(
        norm=lambda channels: nn.InstanceNorm2d(channels, affine=True), act=nn.GELU
    ),
    "LayerNorm, hardswish": lambda: convolutions(norm=groups(1), act=nn.Hardswish),
    "ELU, average pooling": lambda: convolutions(act=nn.ELU, pool=nn.AvgPool2d),
    "LeakyReLU": lambda: convolutions(act=nn.LeakyReLU),
    "weight norm, old": lambda: convolutions(layer=nn.utils.weight_norm),
    "weight norm": lambda: convolutions(layer=nn.utils.parametrizations.weight_norm),
    "spectral norm, old": lambda: convolutions(layer=nn.utils.spectral_norm),
    "spectral norm": lambda: convolutions(layer=nn.utils.parametrizations.spectral_norm),
    "cosine head": lambda: convolutions(head=Cosine),
    "centred head": lambda: Around(after=lambda z, x: z - z.mean(dim=1, keepdim=True), net=convolutions()),
    "log_softmax": lambda: Around(after=lambda z, x: z.log_softmax(dim=1), net=convolutions()),
    "ensemble": lambda: Average(convolutions(), convolutions(act=nn.SiLU)),
    "average of log-probabilities": lambda: Average(nn.Sequential(convolutions(), nn.LogSoftmax(1)), convolutions()),
    "DataParallel": lambda: nn.DataParallel(convolutions()),
    "clamps its input": lambda: Around(before=lambda x: x.clamp(0, 1), net=convolutions()),
    "median of pixels": lambda: Around(before=median, net=convolutions()),
    "float32 inside": lambda: Around(before=lambda x: x.float(), net=convolutions()),
    "no copy": lambda: uncopied(convolutions()),
    "float64 inside": lambda: Around(before=lambda x: x.double().mul(2).float(), net=convolutions()),
}


def uncopied(model):
    model.lock = threading.Lock()
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*weight_norm:DeprecationWarning")
@pytest.mark.parametrize("steps", [0, 30])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_pass_every_check(name, steps):
    images, labels = digits(16)
    report = run(train(NETWORKS[name](), 16, steps), images[:24], labels[:24])
    assert all(found.passed is True for found in report.checks if found.name != "normalisation"), report.markdown()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 4}),
        ("convnext_atto", 32, {}),
        ("mobilenetv3_small_050", 32, {}),
        # Smaller images leave these one place in the end, where a digit has nothing.
        *(
            pytest.param(name, 64, {}, marks=pytest.mark.slow)
            for name in ("resnet18", "regnetx_002", "convnextv2_atto")
        ),
        *(pytest.param(name, 64, {}, marks=pytest.mark.slow) for name in ("efficientnet_b0", "mobilenetv3_large_100")),
        pytest.param("vit_tiny_patch16_224", 64, {"img_size": 64}, marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm_pass_every_check(name, size, options, steps):
    timm = pytest.importorskip("timm")
    images, labels = digits(size)
    network = train(timm.create_model(name, num_classes=10, **options), size, steps)
    report = run(network, images[:6], labels[:6])
    assert all(found.passed is True for found in report.checks if found.name != "normalisation"), report.markdown()


# --- other precisions, and compiled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_a_declared_precision_passes_with_a_statement(dtype, inside):
    images, labels = digits(16)
    model = train(convolutions(act=nn.SiLU), 16, 30).to(dtype)
    if inside:
        model = Around(lambda x: x.to(dtype), lambda logits, x: logits.float(), model)
    report = sound(run(model.eval(), images[:24], labels[:24]))
    word = str(dtype).removeprefix("torch.")
    assert f"{word} parameters, which RobustBench evaluates as they are; AutoAttack" in report["output"].why
    assert (f"converts images to {word} and logits to float32" in report["output"].why) is not inside
    assert next(model.parameters()).dtype == dtype
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


class Compiled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.clamp = torch.compile(lambda x: x.clamp(0, 1), backend="eager")

    def forward(self, x):
        return self.net(self.clamp(x))


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


COMPILED = {
    "whole": lambda net: torch.compile(net, backend="eager"),
    "whole, traced backward": lambda net: torch.compile(net, backend="aot_eager"),
    "in place": compiled_in_place,
    "a module": lambda net: nn.Sequential(torch.compile(net, backend="eager"), nn.Identity()),
    "a function": Compiled,
    "in DataParallel": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_passes(name):
    images, labels = digits(16)
    model = COMPILED[name](train(convolutions(), 16, 30)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = run(model, images[:24], labels[:24])
    assert report.failed == ("eval mode",), report.markdown()
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ("It is compiled, and gives the same as before." in report["output"].why) is (name != "a function")


@pytest.mark.parametrize(
    ("changed", "why"),
    [(lambda x: 1.1 * x, "gives other logits"), (lambda x: 2 * x - x.detach(), "gives other gradients")],
)
def test_a_model_that_changes_when_it_is_compiled_is_caught(changed, why):
    def before(x):
        return changed(x) if torch.compiler.is_compiling() else x

    images, labels = digits(16)
    model = torch.compile(Around(before=before, net=train(convolutions(), 16, 30)).eval(), backend="eager")
    report = run(model, images[:24], labels[:24])
    assert report.failed == ("output",)
    assert why in report["output"].why
