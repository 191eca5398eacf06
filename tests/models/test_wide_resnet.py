"""The CIFAR wide residual networks against the published table of the mdistiller zoo."""

import pytest
import torch
from torch import nn

from ikl_plugins import models
from ikl_plugins.models import resnet, wide_resnet
from ikl_plugins.models.wide_resnet import WideResNet

# name: (parameters with 100 classes, with 10, state-dict entries, parameter tensors, blocks a stage, stem and stages)
ZOO = {
    "wrn_16_1": (180_916, 175_066, 82, 43, 2, (16, 16, 32, 64)),
    "wrn_16_2": (703_284, 691_674, 83, 44, 2, (16, 32, 64, 128)),
    "wrn_40_1": (569_780, 563_930, 226, 115, 6, (16, 16, 32, 64)),
    "wrn_40_2": (2_255_156, 2_243_546, 227, 116, 6, (16, 32, 64, 128)),
}


def published_entries(blocks, channels, num_classes):
    """State-dict names and shapes of the zoo's checkpoints, in their order, from the description of its structure."""

    def norm(name, width):
        shapes = {f"{name}.{entry}": (width,) for entry in ("weight", "bias", "running_mean", "running_var")}
        return {**shapes, f"{name}.num_batches_tracked": ()}

    entries = {"conv1.weight": (channels[0], 3, 3, 3)}
    before = channels[0]
    for stage, width in enumerate(channels[1:], start=1):
        for block in range(blocks):
            name = f"block{stage}.layer.{block}"
            entries.update(norm(f"{name}.bn1", before))
            entries[f"{name}.conv1.weight"] = (width, before, 3, 3)
            entries.update(norm(f"{name}.bn2", width))
            entries[f"{name}.conv2.weight"] = (width, width, 3, 3)
            if before != width:
                entries[f"{name}.convShortcut.weight"] = (width, before, 1, 1)
            before = width
    entries.update(norm("bn1", channels[-1]))
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
    assert set(wide_resnet.__all__) == set(ZOO)
    assert set(models.__all__) == {*resnet.__all__, *wide_resnet.__all__}


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
    assert list(model.state_dict()) == list(published)
    model.load_state_dict(torch.load(tmp_path / "ckpt_epoch_240.pth", weights_only=True)["model"], strict=True)
    assert all(torch.equal(model.state_dict()[entry], tensor) for entry, tensor in weights.items())


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_2"])
def test_features_have_the_published_shapes_and_lead_to_the_logits(name):
    *_, channels = ZOO[name]
    torch.manual_seed(0)
    model = randomised(getattr(models, name)(num_classes=10))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
        stem, first, second, third = features["feats"]
        expected = [stem, model.block2.layer[0].bn1(first), model.block3.layer[0].bn1(second), model.bn1(third)]
    shapes = [(2, width, size, size) for width, size in zip(channels, (32, 32, 16, 8), strict=True)]
    assert [tuple(feature.shape) for feature in features["feats"]] == shapes
    assert [tuple(feature.shape) for feature in features["preact_feats"]] == shapes
    for feature, wanted in zip(features["preact_feats"], expected, strict=True):
        assert torch.equal(feature, wanted)
    torch.testing.assert_close(features["pooled_feat"], features["preact_feats"][-1].clamp(min=0).mean((2, 3)))
    torch.testing.assert_close(model.fc(features["pooled_feat"]), logits)


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_2"])
def test_forward_is_the_published_computation(name):
    """The network written out with functions from the state dict alone."""
    torch.manual_seed(0)
    model = randomised(getattr(models, name)(num_classes=5))
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
    x = conv(images, "conv1")
    for stage in (1, 2, 3):
        for block in (0, 1):
            name = f"block{stage}.layer.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            activation = norm(x, f"{name}.bn1").relu()
            inner = norm(conv(activation, f"{name}.conv1", stride), f"{name}.bn2").relu()
            shortcut = f"{name}.convShortcut"
            x = conv(activation, shortcut, stride) if f"{shortcut}.weight" in weights else x
            x = x + conv(inner, f"{name}.conv2")
    pooled = torch.nn.functional.avg_pool2d(norm(x, "bn1").relu(), 8).flatten(1)
    expected = pooled @ weights["fc.weight"].T + weights["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_move_once_a_training_pass():
    torch.manual_seed(0)
    model = models.wrn_16_1(num_classes=10)
    images = torch.rand(4, 3, 32, 32)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 13
    model(images)
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    model.forward_features(images)
    assert all(norm.num_batches_tracked == 2 for norm in norms)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    model = models.wrn_16_2(num_classes=10)
    for name in ("block3.layer.0.conv1", "block3.layer.0.convShortcut", "block2.layer.1.conv2"):
        weight = model.get_parameter(f"{name}.weight")
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert not model.fc.bias.any()


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (64, 64)])
def test_other_image_sizes_pass(size):
    model = models.wrn_16_1(num_classes=7)
    assert model(torch.rand(2, 3, *size)).shape == (2, 7)


def test_every_parameter_receives_gradient():
    model = WideResNet(10, 2, 4)
    model(torch.rand(2, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3)])
def test_what_is_no_batch_of_rgb_images_is_refused(shape):
    model = models.wrn_16_1(num_classes=10)
    for call in (model, model.forward_features):
        with pytest.raises(ValueError, match=r"wrn_16_1: `images` must have shape \(N, 3, H, W\), got .*unsqueeze"):
            call(torch.zeros(shape))


def test_wrong_class_counts_are_refused_by_the_network_s_name():
    with pytest.raises(ValueError, match="wrn_40_1: `num_classes` must be an integer of at least 1, got 0"):
        models.wrn_40_1(num_classes=0)
    with pytest.raises(TypeError, match=r"wrn_16_2: `num_classes` must be an integer of at least 1, got '10'"):
        models.wrn_16_2(num_classes="10")


@pytest.mark.parametrize("depth", [4, 18, 7])
def test_an_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"WideResNet: `depth` must be 6n \+ 4 with n >= 1, got {depth}\. Use 10, 16"):
        WideResNet(depth, 1, 10)


def test_an_impossible_width_is_refused():
    with pytest.raises(ValueError, match=r"WideResNet: `width` must be at least 1, got 0\. It multiplies"):
        WideResNet(16, 0, 10)
