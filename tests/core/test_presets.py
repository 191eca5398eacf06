"""The published settings: a sample typed from the authors' files, and that every one builds and computes."""

from __future__ import annotations

import pytest
import torch

from ikl_plugins import DKLLoss, GKLLoss, IKLLoss
from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import PRESETS

# alpha, beta, gamma, temperature, weight temperature, class prior, classes, epochs of the ramp
TYPED = {
    "cifar100/resnet20_from_resnet56-ikl": (1, 4, None, 4, 100, False, 100, 20),
    "cifar100/wrn_16_2_from_wrn_40_2-ikl": (3, 12, None, 4, 100, False, 100, 20),
    "cifar100/MobileNetV2_from_vgg13-gkl": (4, 12, 0.1, 4, 4, True, 100, 20),
    "cifar100/ShuffleV1_from_wrn_40_2-gkl": (1, 8, 0.0, 4, 4, False, 100, 20),
    "imagenet/resnet18_from_resnet34-ikl": (1, 0.5, None, 1, 1, True, 1000, 1),
    "imagenet/MobileNetV1_from_resnet50-gkl": (4, 1, 0.5, 1, 1, True, 1000, 5),
    "imagenet_lt/resnet50_from_resnext101_32x4d-ikl": (3, 4, None, 1, 100, False, 1000, 0),
    "imagenet_lt/resnet50_from_resnext101_32x4d-gkl": (3, 4, 0.3, 1, 1, True, 1000, 0),
    "cifar10_adversarial/wrn_34_10-gkl": (4, 20, 0.2, 1, 4, True, 10, 0),
    "cifar100_adversarial/wrn_34_10-ikl": (5, 20, None, 1, 4, True, 100, 0),
    "cifar100_adversarial/wrn_34_10-gkl": (4, 20, 0.4, 1, 1, True, 100, 0),
    "cifar100_generated/wrn_28_10_50m-ikl": (5, 12, None, 1, 4, True, 100, 0),
}
NAMES = ("alpha", "beta", "gamma", "temperature", "weight_temperature", "global_info", "num_classes")


@pytest.mark.parametrize("name", TYPED)
def test_settings_of_the_authors_files(name: str) -> None:
    preset = PRESETS[name]
    assert (*(preset.keywords.get(key) for key in NAMES), preset.warmup_epochs) == TYPED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_each_builds_by_its_name_and_by_the_pair(name: str) -> None:
    loss_class = LOSSES[PRESETS[name].loss]
    loss = loss_class.preset(name)
    assert {key: getattr(loss, key) for key in PRESETS[name].keywords} == dict(PRESETS[name].keywords)
    short, _, suffix = name.partition("-")
    if suffix in ("ikl", "gkl"):
        assert repr(loss_class.preset(short)) == repr(loss)


def test_overrides_replace_and_another_class_count_is_possible() -> None:
    loss = GKLLoss.preset("cifar100/resnet20_from_resnet56", 7, alpha=2.5, reduction="sum")
    assert (loss.alpha, loss.beta, loss.gamma, loss.reduction, loss.num_classes) == (2.5, 4.0, 0.2, "sum", 7)
    assert loss.class_prior is not None
    loss(torch.randn(3, 7), torch.randn(3, 7), torch.tensor([0, 6, 1]))
    assert DKLLoss.preset("cifar10_adversarial/wrn_34_10-trades").alpha == 6.0


def test_unknown_presets_and_those_of_another_loss() -> None:
    with pytest.raises(ValueError, match=r"IKLLoss\.preset: unknown preset `cifar100/resnet20`"):
        IKLLoss.preset("cifar100/resnet20")
    with pytest.raises(ValueError, match=r"must be of a preset for IKLLoss, .*Use GKLLoss"):
        IKLLoss.preset("cifar100/resnet20_from_resnet56-gkl")
    with pytest.raises(TypeError, match="assignment"):
        PRESETS["mine"] = PRESETS["cifar100/resnet20_from_resnet56-ikl"]  # type: ignore[index]
