"""The published settings against the tables, and that every one builds and computes."""

from __future__ import annotations

import pytest
import torch
from published_values import DISTILLED, FAMILIES

from ikl_plugins import DKLLoss, GKLLoss, IKLLoss
from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import PRESETS

TYPED = {name: recipe for name, recipe in DISTILLED.items() if recipe.loss in ("IKL", "GKL")}


@pytest.mark.parametrize("name", TYPED)
def test_settings_of_the_authors_files(name: str) -> None:
    preset, recipe = PRESETS[name], TYPED[name]
    assert preset.loss == f"{recipe.loss}Loss"
    settings = {**recipe.settings, "num_classes": FAMILIES[name.split("/")[0]].classes}
    assert {key: preset.keywords.get(key) for key in settings} == settings
    assert preset.warmup_epochs == recipe.ramp


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
