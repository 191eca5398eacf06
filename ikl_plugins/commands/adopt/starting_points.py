"""The settings that a loss begins with in an MMPretrain config, which has no numbers that could be mapped.

Published ones where there are any, those of the nearest number of classes; else the loss's own defaults.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import PRESETS

from .objective import ORDER, has_weights_of_kl

__all__ = ["StartingPoint", "for_adversarial_training", "for_distillation"]

_MANY = 100  # classes, from which on the settings of CIFAR-100 are the nearest in adversarial training
_LARGE = 1000  # classes, from which on those of ImageNet are the nearest in distillation


class StartingPoint(NamedTuple):
    """Keywords of a loss, where they come from, and the objective of the attack that goes with them."""

    keywords: dict[str, Any]
    origin: str = "the defaults of the loss"
    objective: str = "soft_cross_entropy"


def for_distillation(loss: str, classes: int | None) -> StartingPoint:
    """Of a loss ('IKL', 'KL', ...) and a number of classes, None where it is unknown."""
    large = classes is not None and classes >= _LARGE
    if loss == "KL":
        keywords = {} if large else {"temperature": 4.0, "scale_by_temperature_squared": True}
        return StartingPoint(keywords, "the classic distillation loss")
    if has_weights_of_kl(loss):
        temperature = 1.0 if large else 4.0
        keywords = {"alpha": temperature**2, "beta": temperature**2, "temperature": temperature}
        origin = f"the gradients of KL with temperature {temperature}, times its square"
        return StartingPoint(_without_defaults(loss, keywords), origin)
    name = "imagenet/resnet18_from_resnet34" if large else "cifar100/resnet20_from_resnet56"
    origin = "ImageNet, ResNet-34 to ResNet-18" if large else "CIFAR-100, resnet56 to resnet20"
    return _published(loss, f"{name}-{loss.lower()}", f"published for {origin}")


def for_adversarial_training(loss: str, classes: int | None) -> StartingPoint:
    """As :func:`for_distillation`."""
    if loss == "KL":
        return StartingPoint({"loss_weight": 6.0}, "TRADES")
    if has_weights_of_kl(loss):
        return _published(loss, "cifar10_adversarial/wrn_34_10-trades", "the gradients of TRADES with 6")
    many = classes is not None and classes >= _MANY
    data = "cifar100" if many else "cifar10"
    name, origin = f"{data}_adversarial/wrn_34_10", f"published for CIFAR-{100 if many else 10}"
    if loss == "GKL":
        found = _published(loss, f"{name}-ikl", f"{origin}, where gamma 1 is IKL", gamma=1.0)
    else:
        found = _published(loss, f"{name}-{loss.lower()}", origin)
    return found._replace(objective="ikl") if many and found.keywords else found


def _published(loss: str, name: str, origin: str, **more: Any) -> StartingPoint:
    """The keywords of a preset, where there is one."""
    if name not in PRESETS:
        return StartingPoint({})
    return StartingPoint(_without_defaults(loss, {**PRESETS[name].keywords, **more}), origin)


def _without_defaults(loss: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """The weights, and what differs from the loss's defaults; the number of classes is that of the user's head."""
    known = inspect.signature(LOSSES[f"{loss}Loss"]).parameters
    kept = [name for name in ORDER if name in keywords and name in known and name != "num_classes"]
    weights = ("alpha", "beta", "gamma")
    return {name: keywords[name] for name in kept if name in weights or keywords[name] != known[name].default}
