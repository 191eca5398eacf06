"""All networks: names, sizes, outputs, features, gradients and statistics against the published ones.

Counts and feature shapes are typed from the published table; ``network_oracles`` writes entries and forward passes out.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from network_oracles import NETWORKS, Pass
from torch import nn

from ikl_plugins import models
from ikl_plugins.models.resnet import ResNet
from ikl_plugins.models.wide_resnet import WideResNet

# name: (classes of the checkpoints, parameters with as many, with 10, state-dict entries, parameter tensors, channels x
# size of the features). The published table lacks MobileNetV1's parameter tensors and features: they are those of 27
# convolutions, as many normalisations with two each, a linear layer with two; and the sizes of the paper's table 1.
TABLE = {
    "resnet8": (100, 83_892, 78_042, 56, 29, "16x32 16x32 32x16 64x8"),
    "resnet14": (100, 181_108, 175_258, 92, 47, "16x32 16x32 32x16 64x8"),
    "resnet20": (100, 278_324, 272_474, 128, 65, "16x32 16x32 32x16 64x8"),
    "resnet32": (100, 472_756, 466_906, 200, 101, "16x32 16x32 32x16 64x8"),
    "resnet44": (100, 667_188, 661_338, 272, 137, "16x32 16x32 32x16 64x8"),
    "resnet56": (100, 861_620, 855_770, 344, 173, "16x32 16x32 32x16 64x8"),
    "resnet110": (100, 1_736_564, 1_730_714, 668, 335, "16x32 16x32 32x16 64x8"),
    "resnet8x4": (100, 1_233_540, 1_210_410, 62, 32, "32x32 64x32 128x16 256x8"),
    "resnet32x4": (100, 7_433_860, 7_410_730, 206, 104, "32x32 64x32 128x16 256x8"),
    "ResNet18": (100, 11_220_132, 11_173_962, 122, 62, "64x32 64x32 128x16 256x8 512x4"),
    "ResNet50": (100, 23_705_252, 23_520_842, 320, 161, "64x32 256x32 512x16 1024x8 2048x4"),
    "wrn_16_1": (100, 180_916, 175_066, 82, 43, "16x32 16x32 32x16 64x8"),
    "wrn_16_2": (100, 703_284, 691_674, 83, 44, "16x32 32x32 64x16 128x8"),
    "wrn_40_1": (100, 569_780, 563_930, 226, 115, "16x32 16x32 32x16 64x8"),
    "wrn_40_2": (100, 2_255_156, 2_243_546, 227, 116, "16x32 32x32 64x16 128x8"),
    "vgg8": (100, 3_965_028, 3_918_858, 37, 22, "64x32 128x16 256x8 512x4 512x4"),
    "vgg11": (100, 9_277_284, 9_231_114, 58, 34, "64x32 128x16 256x8 512x4 512x4"),
    "vgg13": (100, 9_462_180, 9_416_010, 72, 42, "64x32 128x16 256x8 512x4 512x4"),
    "vgg16": (100, 14_774_436, 14_728_266, 93, 54, "64x32 128x16 256x8 512x4 512x4"),
    "vgg19": (100, 20_086_692, 20_040_522, 114, 66, "64x32 128x16 256x8 512x4 512x4"),
    "MobileNetV2": (100, 812_836, 697_546, 320, 161, "16x16 12x16 16x8 48x4 160x2"),
    "ShuffleV1": (100, 949_258, 862_768, 296, 149, "24x32 240x16 480x8 960x4"),
    "ShuffleV2": (100, 1_355_528, 1_263_278, 338, 170, "24x32 116x16 232x8 464x4"),
    "MobileNetV1": (1000, 4_231_976, 4_231_976 - 990 * 1025, 164, 83, "128x56 256x28 512x14 1024x7"),
}

# one of each class, the cheapest
FAMILIES = ["resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV1", "MobileNetV2", "ShuffleV1", "ShuffleV2"]
# and of bottlenecks, shortcuts in the first stage, several convolutions in a block; others differ in entries alone
COMPUTED = [*FAMILIES, "ResNet50", "resnet8x4", "wrn_16_2", "vgg11"]


def build(name, num_classes=10):
    return getattr(models, name)(num_classes=num_classes)


@pytest.fixture(scope="module")
def weights_of():
    """Random weights of a network with 10 classes, in double precision."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = {entry: tensor.double() for entry, tensor in NETWORKS[name].weights(10).items()}
        return made[name]

    return make


def loaded(name, weights):
    model = build(name).double()
    model.load_state_dict(weights, strict=True)
    return model


def images_for(name, size=None):
    side = {"MobileNetV1": 64, "ResNet50": 16}.get(name, 32)
    return torch.rand(2, 3, *(size or (side, side)), dtype=torch.float64) - 0.5


def assert_close(actual, expected):
    """Equal up to the rounding of double precision, relative to the largest entry."""
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9 * scale)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# --- names and sizes -------------------------------------------------------------------------------------------------


def test_the_public_names_are_the_published_networks():
    assert sorted(models.__all__) == sorted(TABLE) == sorted(NETWORKS)


@pytest.mark.parametrize("name", models.__all__)
def test_sizes_and_entries_are_the_published_ones(name):
    classes, params, params_10, entries, tensors, features = TABLE[name]
    with torch.device("meta"):
        model, small = getattr(models, name)(), build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert sum(parameter.numel() for parameter in small.parameters()) == params_10
    assert len(list(model.parameters())) == tensors
    shapes = {entry: tuple(tensor.shape) for entry, tensor in model.state_dict().items()}
    published = NETWORKS[name].entries(classes)
    assert list(shapes.items()) == list(published.items())
    assert len(shapes) == entries

    side = 224 if name == "MobileNetV1" else 32
    with torch.device("meta"):
        found = small.forward_features(torch.empty(2, 3, side, side))
    wanted = [(2, int(channels), int(size), int(size)) for channels, size in (f.split("x") for f in features.split())]
    assert [tuple(feature.shape) for feature in found["feats"]] == wanted
    assert [tuple(feature.shape) for feature in found.get("preact_feats", [])] in (wanted, [])


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPUTED)
def test_outputs_features_and_gradients_are_those_of_the_published_computation(name, weights_of):
    model = loaded(name, weights_of(name)).eval()
    leaves = {
        entry: tensor.clone().requires_grad_(entry.rpartition(".")[2] in ("weight", "bias"))
        for entry, tensor in weights_of(name).items()
    }
    images = images_for(name)
    expected = NETWORKS[name].forward(Pass(leaves), images)
    logits = model(images)
    assert_close(logits, expected.logits)

    with torch.no_grad():
        features = model.forward_features(images)
        assert_close(model.head(features["pooled_feat"]), expected.logits)
    assert set(features) == {"feats", "pooled_feat"} | ({"preact_feats"} if expected.preact_feats else set())
    assert_close(features["pooled_feat"], expected.pooled_feat)
    for key, wanted in (("feats", expected.feats), ("preact_feats", expected.preact_feats or [])):
        for feature, tensor in zip(features.get(key, []), wanted, strict=True):
            assert_close(feature, tensor)

    labels = torch.tensor([3, 8])
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected.logits, labels).backward()
    for entry, parameter in model.named_parameters():
        assert_close(parameter.grad, leaves[entry].grad)  # of which none is zero throughout


@pytest.mark.parametrize("name", COMPUTED)
def test_a_training_pass_uses_batch_statistics_and_moves_each_running_one_once(name, weights_of):
    """Of the wide ResNets too, three of whose normalisations the published code applies twice."""
    model = loaded(name, weights_of(name))
    images = images_for(name)
    oracle = Pass(weights_of(name), training=True)
    with torch.no_grad():
        expected = NETWORKS[name].forward(oracle, images)
        assert_close(model.train()(images), expected.logits)
    state = model.state_dict()
    assert len(oracle.moved) == 2 * len(norms_of(model))
    for entry, tensor in oracle.moved.items():
        assert_close(state[entry], tensor)
    assert all(norm.num_batches_tracked == 8 for norm in norms_of(model))
    # the features' pass counts as one more, and as no more than one
    with torch.no_grad():
        features = model.forward_features(images)
    assert_close(features["pooled_feat"], expected.pooled_feat)
    assert all(norm.num_batches_tracked == 9 for norm in norms_of(model))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 31)])
def test_other_image_sizes_pass_through_the_same_layers(name, size, weights_of):
    model = loaded(name, weights_of(name)).eval()
    images = images_for(name, size)
    with torch.no_grad():
        expected = NETWORKS[name].forward(Pass(weights_of(name)), images)
        assert_close(model(images), expected.logits)
        assert_close(model.forward_features(images)["pooled_feat"], expected.pooled_feat)


STAGES = {
    "resnet8": ["layer1", "layer2", "layer3"],
    "ResNet18": ["layer1", "layer2", "layer3", "layer4"],
    "wrn_16_1": ["conv1", "block1", "block2", "block3"],
    "MobileNetV1": ["model.3", "model.5", "model.11", "model.13"],
    "MobileNetV2": ["conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    "ShuffleV1": ["layer1", "layer2", "layer3"],
    "ShuffleV2": ["layer1", "layer2", "layer3"],
    "vgg8": ["block1", "block2", "block3", "block4"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_on_the_stages_see_the_features(name):
    model = build(name).eval()
    seen = []
    for stage in STAGES[name]:
        # a copy: the ReLU behind a VGG's block is not to reach it
        model.get_submodule(stage).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    images = images_for(name).float()
    with torch.no_grad():
        model(images)
        at_hooks = list(seen)
        features = model.forward_features(images)
    wanted = features["preact_feats" if name == "vgg8" else "feats"][-len(at_hooks) :]
    assert len(at_hooks) == len(STAGES[name])
    for tensor, feature in zip(at_hooks, wanted, strict=True):
        torch.testing.assert_close(tensor, feature)


# --- first weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_first_weights_are_the_published_ones(name):
    torch.manual_seed(0)
    model = build(name)
    for norm in norms_of(model):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
        assert (norm.momentum, norm.eps) == (0.1, 1e-5)
    he = name not in ("MobileNetV1", "ShuffleV1", "ShuffleV2")
    large = 0
    for entry, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs, *size = module.weight.shape
            if module.weight.numel() > 1000:
                large += 1
                # a normal distribution by the fan out, or torch's uniform one, whose variance is bound ** 2 / 3
                fan = torch.Size(size).numel() * (outputs if he else inputs)
                std = (2 / fan) ** 0.5 if he else (1 / 3 / fan) ** 0.5
                assert module.weight.std().item() == pytest.approx(std, rel=0.1), entry
                assert (module.weight.abs().max() > 2.5 * std) == he, entry
            assert module.bias is None or not module.bias.any()
    assert large >= 5
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    if name in ("vgg8", "MobileNetV2"):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    else:
        bound = linear.in_features**-0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
    assert linear.bias.any() == (name not in ("vgg8", "MobileNetV2", "wrn_16_1"))


# --- refusals --------------------------------------------------------------------------------------------------------

THIN = (16, 16, 32, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_do_not_fit_are_refused_by_name(name):
    least = 8 if name.startswith("vgg") else 1
    small = [(0, 32), (32, 0), *([(7, 32), (32, 7)] if least == 8 else [])]
    cases = {shape: f"must have shape .N, 3, H, W., got .{shape[0]}" for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3))}
    cases |= {(2, 3, *size): f"at least {least} pixels .* got {size[0]} x {size[1]}" for size in small}
    if least == 8:
        cases[2, 3, 64, 15] = "at least 16 pixels"
    with torch.device("meta"):
        model = build(name).eval()
        for shape, message in cases.items():
            for call in (model, model.forward_features):
                with pytest.raises(ValueError, match=f"^{name}: `images` .*{message}"):
                    call(torch.empty(shape))
        for size in [(8, 8), (64, 16)] if least == 8 else [(1, 1)]:
            assert model(torch.empty(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        *((lambda name=name: build(name, 0), ValueError, rf"^{name}: `num_classes` .* got 0") for name in FAMILIES),
        (lambda: build("resnet20", 10.0), TypeError, r"^resnet20: `num_classes` .*got 10\.0 of type float"),
        *(
            (
                lambda depth=depth: ResNet(depth, THIN, 10),
                ValueError,
                rf"^ResNet: `depth` must be 6n \+ 2.* got {depth}",
            )
            for depth in (2, 18, 7)
        ),
        *(
            (lambda depth=depth: WideResNet(depth, 1, 10), ValueError, rf"^Wide.*: `depth` must be 6n \+ 4.* {depth}\.")
            for depth in (4, 18, 7)
        ),
        (lambda: WideResNet(16, 0, 10), ValueError, r"^WideResNet: `width` must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_depths_between_the_published_ones_are_built():
    assert len(ResNet(26, THIN, 10).layer2) == 4


def test_networks_names_and_checkpoints_need_torch_alone():
    code = (
        "import sys, ikl_plugins.models, ikl_plugins.checkpoints\n"
        "from ikl_plugins.models.robustbench_zoo import parse_architecture\n"
        "parse_architecture('WideResNet-34-10').expression()\n"
        "hosts = {'torchvision', 'torchdistill', 'mmengine', 'mmpretrain', 'robustbench', 'pyautoattack', 'timm'}\n"
        "print(*sorted(hosts & {name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
