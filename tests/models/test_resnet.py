"""The CIFAR ResNets against the published table of the mdistiller zoo."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from ikl_plugins import models
from ikl_plugins.models import resnet
from ikl_plugins.models.resnet import ResNet

# name: (parameters with 100 classes, with 10, state-dict entries, parameter tensors, blocks a stage, stem and stages)
THIN, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
ZOO = {
    "resnet8": (83_892, 78_042, 56, 29, 1, THIN),
    "resnet14": (181_108, 175_258, 92, 47, 2, THIN),
    "resnet20": (278_324, 272_474, 128, 65, 3, THIN),
    "resnet32": (472_756, 466_906, 200, 101, 5, THIN),
    "resnet44": (667_188, 661_338, 272, 137, 7, THIN),
    "resnet56": (861_620, 855_770, 344, 173, 9, THIN),
    "resnet110": (1_736_564, 1_730_714, 668, 335, 18, THIN),
    "resnet8x4": (1_233_540, 1_210_410, 62, 32, 1, WIDE),
    "resnet32x4": (7_433_860, 7_410_730, 206, 104, 5, WIDE),
}


def published_entries(blocks, channels, num_classes):
    """State-dict names and shapes of the zoo's checkpoints, written out from the description of its structure."""

    def norm(name, width):
        shapes = {f"{name}.{entry}": (width,) for entry in ("weight", "bias", "running_mean", "running_var")}
        return {**shapes, f"{name}.num_batches_tracked": ()}

    entries = {"conv1.weight": (channels[0], 3, 3, 3), **norm("bn1", channels[0])}
    before = channels[0]
    for stage, width in enumerate(channels[1:], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            entries[f"{name}.conv1.weight"] = (width, before, 3, 3)
            entries.update(norm(f"{name}.bn1", width))
            entries[f"{name}.conv2.weight"] = (width, width, 3, 3)
            entries.update(norm(f"{name}.bn2", width))
            if block == 0 and (before != width or stage > 1):
                entries[f"{name}.downsample.0.weight"] = (width, before, 1, 1)
                entries.update(norm(f"{name}.downsample.1", width))
            before = width
    entries["fc.weight"] = (num_classes, channels[-1])
    entries["fc.bias"] = (num_classes,)
    return entries


def randomised(model):
    """The model with batch-normalisation statistics that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def test_the_public_names_are_the_networks():
    assert set(resnet.__all__) == set(ZOO)
    assert set(resnet.__all__) < set(models.__all__)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("num_classes", [100, 10])
def test_sizes_are_the_published_ones(name, num_classes):
    params_100, params_10, entries, tensors, _, _ = ZOO[name]
    model = getattr(models, name)(num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == (
        params_100 if num_classes == 100 else params_10
    )
    assert len(model.state_dict()) == entries
    assert len(list(model.parameters())) == tensors


@pytest.mark.parametrize("name", ZOO)
def test_a_published_checkpoint_loads_strictly(name, tmp_path):
    *_, blocks, channels = ZOO[name]
    published = published_entries(blocks, channels, 100)
    weights = {
        entry: torch.zeros(shape, dtype=torch.int64) if entry.endswith("tracked") else torch.rand(shape)
        for entry, shape in published.items()
    }
    torch.save({"model": weights}, tmp_path / "ckpt_epoch_240.pth")
    model = getattr(models, name)()
    model.load_state_dict(torch.load(tmp_path / "ckpt_epoch_240.pth", weights_only=True)["model"], strict=True)
    assert all(torch.equal(model.state_dict()[entry], tensor) for entry, tensor in weights.items())


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet8x4"])
def test_features_have_the_published_shapes_and_lead_to_the_logits(name):
    *_, channels = ZOO[name]
    torch.manual_seed(0)
    model = randomised(getattr(models, name)(num_classes=10))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
    expected = [(2, width, size, size) for width, size in zip(channels, (32, 32, 16, 8), strict=True)]
    assert [tuple(feature.shape) for feature in features["feats"]] == expected
    assert [tuple(feature.shape) for feature in features["preact_feats"]] == expected
    for feature, before in zip(features["feats"], features["preact_feats"], strict=True):
        assert torch.equal(feature, before.clamp(min=0))
    assert all((before < 0).any() for before in features["preact_feats"][1:])
    torch.testing.assert_close(features["pooled_feat"], features["feats"][-1].mean((2, 3)))
    torch.testing.assert_close(model.fc(features["pooled_feat"]), logits)


def test_forward_is_the_published_computation():
    """resnet8 written out with functions from the state dict alone."""
    torch.manual_seed(0)
    model = randomised(models.resnet8(num_classes=5))
    weights = model.state_dict()

    def conv(x, name, stride=1):
        weight = weights[f"{name}.weight"]
        return torch.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        mean, variance, scale, shift = (
            weights[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    images = torch.rand(3, 3, 32, 32)
    x = norm(conv(images, "conv1"), "bn1").relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        name = f"layer{stage}.0"
        inner = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
        shortcut = x if stage == 1 else norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        x = (norm(conv(inner, f"{name}.conv2"), f"{name}.bn2") + shortcut).relu()
    expected = torch.nn.functional.avg_pool2d(x, 8).flatten(1) @ weights["fc.weight"].T + weights["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_hooks_on_a_stage_see_its_activated_output():
    model = models.resnet8(num_classes=10).eval()
    seen = []
    model.layer3.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        model(images)
        torch.testing.assert_close(seen[0], model.forward_features(images)["feats"][-1])


def test_convolutions_start_from_he_fan_out():
    torch.manual_seed(0)
    model = models.resnet8x4(num_classes=10)
    for name in ("layer3.0.conv1", "layer3.0.downsample.0", "layer1.0.conv2"):
        weight = model.get_parameter(f"{name}.weight")
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (64, 64)])
def test_other_image_sizes_pass(size):
    model = models.resnet8(num_classes=7)
    assert model(torch.rand(2, 3, *size)).shape == (2, 7)


def test_every_parameter_receives_gradient():
    model = models.resnet8x4(num_classes=4)
    model(torch.rand(2, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3)])
def test_what_is_no_batch_of_rgb_images_is_refused(shape):
    model = models.resnet20(num_classes=10)
    for call in (model, model.forward_features):
        with pytest.raises(ValueError, match=r"resnet20: `images` must have shape \(N, 3, H, W\), got .*unsqueeze"):
            call(torch.zeros(shape))


def test_wrong_class_counts_are_refused_by_the_network_s_name():
    with pytest.raises(ValueError, match="resnet56: `num_classes` must be an integer of at least 1, got 0"):
        models.resnet56(num_classes=0)
    with pytest.raises(TypeError, match=r"resnet8x4: `num_classes` must be an integer of at least 1, got '10'"):
        models.resnet8x4(num_classes="10")


@pytest.mark.parametrize("depth", [2, 18, 7])
def test_an_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"ResNet: `depth` must be 6n \+ 2 with n >= 1, got {depth}\. Use 8, 14"):
        ResNet(depth, THIN, 10)


def test_the_networks_need_torch_alone():
    code = (
        "import sys, ikl_plugins.models\n"
        "print(*sorted({'torchvision', 'torchdistill', 'mmengine', 'robustbench', 'yaml', 'PIL'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
