"""The published settings against the tables, and that every one builds and computes."""

from __future__ import annotations

import pytest
import torch
from published_values import DISTILLED, FAMILIES

from ikl_plugins import DKLLoss, GKLLoss, IKLLoss
from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import FAMILIES as NAMED
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
    short, _, suffix = name.rpartition("-")
    if suffix in ("ikl", "gkl", "dkl"):
        assert repr(loss_class.preset(short)) == repr(loss)


# Typed from the paper's tables 2, 4 and 5 and the authors' files: alpha, beta, temperature, weight temperature, prior.
PUBLISHED = {
    ("cifar100_distillation", "IKL"): (1.0, 4.0, 4.0, 100.0, False),
    ("cifar100_distillation", "GKL"): (1.0, 4.0, 4.0, 4.0, True),
    ("imagenet_distillation", "IKL"): (1.0, 0.5, 1.0, 1.0, True),
    ("imagenet_distillation", "GKL"): (1.0, 0.5, 1.0, 1.0, True),
    ("imagenet_lt_distillation", "IKL"): (3.0, 4.0, 1.0, 100.0, False),
    ("imagenet_lt_distillation", "GKL"): (3.0, 4.0, 1.0, 1.0, True),
    ("cifar10_adversarial", "IKL"): (4.0, 20.0, 1.0, 4.0, True),
    ("cifar10_adversarial", "GKL"): (4.0, 20.0, 1.0, 4.0, True),
    ("cifar10_adversarial", "DKL"): (6.0, 6.0, 1.0, 1.0, False),  # TRADES
    ("cifar100_adversarial", "IKL"): (5.0, 20.0, 1.0, 4.0, True),
    ("cifar100_adversarial", "GKL"): (4.0, 20.0, 1.0, 1.0, True),
    ("cifar100_adversarial", "DKL"): (9.0, 9.0, 1.0, 1.0, False),
    ("cifar10_generated", "IKL"): (3.0, 10.0, 1.0, 4.0, True),
    ("cifar100_generated", "IKL"): (5.0, 12.0, 1.0, 4.0, True),
}


@pytest.mark.parametrize(("family", "loss"), PUBLISHED)
def test_a_family_stands_for_a_published_experiment(family: str, loss: str) -> None:
    found = LOSSES[f"{loss}Loss"].preset(family, num_classes=7)
    settings = found.settings()
    got = (found.alpha, found.beta, found.temperature, settings.weight_temperature, found.global_info)
    assert got == PUBLISHED[family, loss]
    assert found.num_classes == 7


def test_every_family_is_typed_above() -> None:
    assert {family for family, _ in PUBLISHED} == set(NAMED)
    assert {f"{family}-{loss.lower()}" for family, loss in PUBLISHED} < set(PRESETS)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_start_is_for_any_data(loss: str) -> None:
    found = LOSSES[loss].preset("start")
    assert found.num_classes is None
    assert found.class_prior is None
    assert found(torch.randn(3, 5), torch.randn(3, 5)).isfinite()


def test_overrides_replace_and_another_class_count_is_possible() -> None:
    loss = GKLLoss.preset("cifar100/resnet20_from_resnet56", 7, alpha=2.5, reduction="sum")
    assert (loss.alpha, loss.beta, loss.gamma, loss.reduction, loss.num_classes) == (2.5, 4.0, 0.2, "sum", 7)
    assert loss.class_prior is not None
    loss(torch.randn(3, 7), torch.randn(3, 7), torch.tensor([0, 6, 1]))
    assert DKLLoss.preset("cifar10_adversarial/wrn_34_10-trades").alpha == 6.0


def test_unknown_presets_and_those_of_another_loss() -> None:
    with pytest.raises(ValueError, match=r"IKLLoss\.preset: unknown preset `cifar100/resnet20`"):
        IKLLoss.preset("cifar100/resnet20")
    with pytest.raises(ValueError, match=r"unknown preset `strat`\. Did you mean `start`\?"):
        IKLLoss.preset("strat")
    with pytest.raises(ValueError, match=r"must be of a preset for IKLLoss, .*Use GKLLoss"):
        IKLLoss.preset("cifar100/resnet20_from_resnet56-gkl")
    with pytest.raises(TypeError, match="assignment"):
        PRESETS["mine"] = PRESETS["cifar100/resnet20_from_resnet56-ikl"]  # type: ignore[index]
