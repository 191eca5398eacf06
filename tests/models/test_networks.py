"""All networks: names, sizes, checkpoints, outputs, features, gradients and statistics against the published ones.

Counts and feature shapes are typed from the published table; ``network_oracles`` writes entries and forward passes out.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from network_oracles import NETWORKS, Pass
from torch import nn

from ikl_plugins import models

# name: (parameters with 100 classes, with 10, state-dict entries, parameter tensors, channels x size of the features)
TABLE = {
    "resnet8": (83_892, 78_042, 56, 29, "16x32 16x32 32x16 64x8"),
    "resnet14": (181_108, 175_258, 92, 47, "16x32 16x32 32x16 64x8"),
    "resnet20": (278_324, 272_474, 128, 65, "16x32 16x32 32x16 64x8"),
    "resnet32": (472_756, 466_906, 200, 101, "16x32 16x32 32x16 64x8"),
    "resnet44": (667_188, 661_338, 272, 137, "16x32 16x32 32x16 64x8"),
    "resnet56": (861_620, 855_770, 344, 173, "16x32 16x32 32x16 64x8"),
    "resnet110": (1_736_564, 1_730_714, 668, 335, "16x32 16x32 32x16 64x8"),
    "resnet8x4": (1_233_540, 1_210_410, 62, 32, "32x32 64x32 128x16 256x8"),
    "resnet32x4": (7_433_860, 7_410_730, 206, 104, "32x32 64x32 128x16 256x8"),
    "ResNet18": (11_220_132, 11_173_962, 122, 62, "64x32 64x32 128x16 256x8 512x4"),
    "ResNet50": (23_705_252, 23_520_842, 320, 161, "64x32 256x32 512x16 1024x8 2048x4"),
    "wrn_16_1": (180_916, 175_066, 82, 43, "16x32 16x32 32x16 64x8"),
    "wrn_16_2": (703_284, 691_674, 83, 44, "16x32 32x32 64x16 128x8"),
    "wrn_40_1": (569_780, 563_930, 226, 115, "16x32 16x32 32x16 64x8"),
    "wrn_40_2": (2_255_156, 2_243_546, 227, 116, "16x32 32x32 64x16 128x8"),
    "vgg8": (3_965_028, 3_918_858, 37, 22, "64x32 128x16 256x8 512x4 512x4"),
    "vgg11": (9_277_284, 9_231_114, 58, 34, "64x32 128x16 256x8 512x4 512x4"),
    "vgg13": (9_462_180, 9_416_010, 72, 42, "64x32 128x16 256x8 512x4 512x4"),
    "vgg16": (14_774_436, 14_728_266, 93, 54, "64x32 128x16 256x8 512x4 512x4"),
    "vgg19": (20_086_692, 20_040_522, 114, 66, "64x32 128x16 256x8 512x4 512x4"),
    "MobileNetV2": (812_836, 697_546, 320, 161, "16x16 12x16 16x8 48x4 160x2"),
    "ShuffleV1": (949_258, 862_768, 296, 149, "24x32 240x16 480x8 960x4"),
    "ShuffleV2": (1_355_528, 1_263_278, 338, 170, "24x32 116x16 232x8 464x4"),
}
# The published table has MobileNetV1 for 1000 classes, without parameter tensors and features: those here are
# 27 convolutions, as many normalisations with two each, a linear layer with two; and the sizes of the paper's table 1.
IMAGENET = {"MobileNetV1": (4_231_976, 164, 27 + 2 * 27 + 2, "128x56 256x28 512x14 1024x7")}

# one of each family, the cheapest
FAMILIES = ["resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV1", "MobileNetV2", "ShuffleV1", "ShuffleV2"]


def build(name, num_classes=10):
    return getattr(models, name)(num_classes=num_classes)


def loaded(name, num_classes=10):
    """The network in double precision, with the random weights that are returned beside it."""
    weights = NETWORKS[name].weights(num_classes)
    model = build(name, num_classes)
    model.load_state_dict(weights, strict=True)
    return model.double(), {entry: tensor.double() for entry, tensor in weights.items()}


def parameters_of(weights):
    """The weights that are trained, as leaves of a graph; the rest as it is."""
    return {
        entry: tensor.clone().requires_grad_(entry.rpartition(".")[2] in ("weight", "bias"))
        for entry, tensor in weights.items()
    }


def images_for(name, size=None):
    side = 64 if name == "MobileNetV1" else 32
    return torch.rand(2, 3, *(size or (side, side)), dtype=torch.float64) - 0.5


def assert_close(actual, expected):
    """Equal up to the rounding of double precision, relative to the largest entry."""
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9 * scale)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# --- names, sizes, checkpoints ---------------------------------------------------------------------------------------


def test_the_public_names_are_the_published_networks():
    assert sorted(models.__all__) == sorted([*TABLE, *IMAGENET]) == sorted(NETWORKS)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("num_classes", [100, 10])
def test_sizes_are_the_published_ones(name, num_classes):
    params_100, params_10, entries, tensors, _ = TABLE[name]
    with torch.device("meta"):
        model = build(name, num_classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == (params_100 if num_classes == 100 else params_10)
    assert len(model.state_dict()) == entries
    assert len(list(model.parameters())) == tensors


@pytest.mark.parametrize("name", IMAGENET)
def test_sizes_for_imagenet_are_the_published_ones(name):
    params, entries, tensors, _ = IMAGENET[name]
    with torch.device("meta"):
        model = build(name, 1000)
        small = build(name, 10)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == params
    assert sum(parameter.numel() for parameter in small.parameters()) == params - 990 * (1024 + 1)
    assert len(model.state_dict()) == entries
    assert len(list(model.parameters())) == tensors


@pytest.mark.parametrize("name", models.__all__)
def test_the_default_is_the_number_of_classes_of_the_checkpoints(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert list(model.parameters())[-1].shape == (1000 if name in IMAGENET else 100,)


@pytest.mark.parametrize("name", models.__all__)
def test_entries_have_the_published_names_shapes_and_order(name):
    with torch.device("meta"):
        model = build(name, 100)
    shapes = {entry: tuple(tensor.shape) for entry, tensor in model.state_dict().items()}
    published = NETWORKS[name].entries(100)
    assert shapes == published
    assert list(shapes) == list(published)


@pytest.fixture
def checkpoint(request, tmp_path):
    """A file of the zoo's form with random weights, gone after the test: all of them together are 400 MB."""
    file = tmp_path / "ckpt_epoch_240.pth"
    weights = NETWORKS[request.param].weights(1000 if request.param in IMAGENET else 100)
    torch.save({"epoch": 240, "model": weights, "best_acc": 0.0}, file)
    yield request.param, file, weights
    file.unlink()


@pytest.mark.parametrize("checkpoint", models.__all__, indirect=True)
def test_a_published_checkpoint_loads_strictly(checkpoint):
    name, file, weights = checkpoint
    model = getattr(models, name)()
    model.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)
    state = model.state_dict()
    assert all(torch.equal(state[entry], tensor) for entry, tensor in weights.items())


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.__all__)
def test_outputs_features_and_gradients_are_those_of_the_published_computation(name):
    model, weights = loaded(name)
    model.eval()
    weights = parameters_of(weights)
    images = images_for(name)
    expected = NETWORKS[name].forward(Pass(weights), images)
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
        assert_close(parameter.grad, weights[entry].grad)  # of which none is zero throughout


@pytest.mark.parametrize("name", models.__all__)
def test_a_training_pass_uses_batch_statistics_and_moves_each_running_one_once(name):
    model, weights = loaded(name)
    images = images_for(name)
    oracle = Pass(weights, training=True)
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


@pytest.mark.parametrize("name", models.__all__)
def test_a_training_step_moves_weights_and_statistics(name):
    model = build(name).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images_for(name).float()), torch.tensor([3, 8])).backward()
    optimizer.step()
    still = [entry for entry, tensor in model.state_dict().items() if torch.equal(tensor, before[entry])]
    # A bias in front of a batch normalisation has no gradient but rounding. VGG alone has such biases.
    assert all(entry.startswith("block") and entry.endswith(".bias") for entry in still if name.startswith("vgg"))
    assert still == [] or name.startswith("vgg")
    assert all(norm.num_batches_tracked == 1 for norm in norms_of(model))


@pytest.mark.parametrize("name", models.__all__)
def test_features_have_the_published_shapes(name):
    *_, published = {**TABLE, **IMAGENET}[name]
    sizes = [tuple(int(number) for number in feature.split("x")) for feature in published.split()]
    side = 224 if name in IMAGENET else 32
    with torch.device("meta"):
        features = build(name).forward_features(torch.empty(2, 3, side, side))
    shapes = [(2, channels, size, size) for channels, size in sizes]
    assert [tuple(feature.shape) for feature in features["feats"]] == shapes
    if name == "MobileNetV2":
        assert "preact_feats" not in features
    else:
        assert [tuple(feature.shape) for feature in features["preact_feats"]] == shapes


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(16, 16), (48, 32), (64, 32), (32, 64), (33, 31)])
def test_other_image_sizes_pass_through_the_same_layers(name, size):
    model, weights = loaded(name)
    images = images_for(name, size)
    with torch.no_grad():
        expected = NETWORKS[name].forward(Pass(weights), images)
        assert_close(model.eval()(images), expected.logits)
        assert_close(model.forward_features(images)["pooled_feat"], expected.pooled_feat)


def test_vgg_halves_images_of_height_64_once_more():
    model = build("vgg8").eval()
    for size, last in (((64, 64), (4, 4)), ((64, 32), (4, 2)), ((32, 64), (4, 8)), ((128, 128), (16, 16))):
        assert model.forward_features(torch.zeros(1, 3, *size))["feats"][-1].shape[2:] == last


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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_is_a_network_of_its_own(name):
    model = build(name).eval()
    twin = copy.deepcopy(model)
    images = images_for(name).float()
    with torch.no_grad():
        logits = model(images)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(images), logits)
        assert not model(images).any()


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


@pytest.mark.parametrize("name", models.__all__)
def test_what_is_no_batch_of_rgb_images_is_refused(name):
    with torch.device("meta"):
        model = build(name)
        for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3), (2, 3, 32, 32, 32)):
            wanted = f"{name}: `images` must have shape (N, 3, H, W), got {shape}. Pass a batch of RGB images; a single"
            for call in (model, model.forward_features):
                with pytest.raises(ValueError, match="unsqueeze") as caught:
                    call(torch.empty(shape))
                assert str(caught.value).startswith(wanted)


@pytest.mark.parametrize("name", models.__all__)
def test_images_too_small_for_the_network_are_refused(name):
    cases = {(0, 32): 1, (32, 0): 1}
    if name.startswith("vgg"):
        cases |= {(7, 32): 8, (32, 7): 8, (64, 15): 16}
    with torch.device("meta"):
        model = build(name)
        for (height, width), least in cases.items():
            for call in (model, model.forward_features):
                with pytest.raises(ValueError, match="Resize them first") as caught:
                    call(torch.empty(2, 3, height, width))
                assert f"{name}: `images` must be at least {least} pixels high and wide" in str(caught.value)
                assert f"got {height} x {width}. " in str(caught.value)


@pytest.mark.parametrize("name", models.__all__)
def test_the_smallest_images_pass(name):
    with torch.device("meta"):
        model = build(name).eval()
        for size in [(8, 8), (64, 16)] if name.startswith("vgg") else [(1, 1)]:
            assert model(torch.empty(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize("name", models.__all__)
def test_wrong_class_counts_are_refused_by_the_network_s_name(name):
    network = getattr(models, name)
    for value in (0, -3):
        with pytest.raises(
            ValueError, match=f"^{name}: `num_classes` must be an integer of at least 1, got {value}\\. "
        ):
            network(num_classes=value)
    for value in ("10", 10.0, True):
        with pytest.raises(
            TypeError, match=f"^{name}: `num_classes` must be an integer of at least 1, got {value!r} of"
        ):
            network(num_classes=value)


# --- page and imports ------------------------------------------------------------------------------------------------


def test_the_page_has_the_published_table():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| (\d+) \| ([\dx ]+) \|$", page, re.MULTILINE)
    table = {name: (*(int(cell.replace(",", "")) for cell in cells), features) for name, *cells, features in rows}
    assert table == {name: (*row[:3], row[4]) for name, row in TABLE.items()}
    params, entries, _, features = IMAGENET["MobileNetV1"]
    assert f"{params:,} parameters with its" in page
    assert f"{entries} entries, features {features} of 224x224" in page


def test_the_networks_need_torch_alone():
    code = (
        "import sys, ikl_plugins.models\n"
        "print(*sorted({'torchvision', 'torchdistill', 'mmengine', 'robustbench', 'yaml', 'PIL'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
