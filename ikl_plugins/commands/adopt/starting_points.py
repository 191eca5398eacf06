"""The settings that a loss begins with in an MMPretrain config, which has no numbers that could be mapped.

They are presets: in adversarial training those of the nearest number of classes, in distillation those of ImageNet from
1000 classes on, below that the ones for data that nobody has published settings for.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from ikl_plugins.losses import LOSSES
from ikl_plugins.presets import PRESETS

from .objective import ORDER

__all__ = ["StartingPoint", "for_adversarial_training", "for_distillation"]

_MANY = 100  # classes, from which on the settings of CIFAR-100 are the nearest in adversarial training
_LARGE = 1000  # classes, from which on those of ImageNet are the nearest in distillation


class StartingPoint(NamedTuple):
    """Keywords of a loss, where they come from, and the objective of the attack that goes with them."""

    keywords: dict[str, Any]
    origin: str
    objective: str = "soft_cross_entropy"


def for_distillation(loss: str, classes: int | None) -> StartingPoint:
    """Of a loss ('IKL', 'KL', ...) and a number of classes, None where it is unknown."""
    large = classes is not None and classes >= _LARGE
    if loss == "KL":
        keywords = {} if large else {"temperature": 4.0, "scale_by_temperature_squared": True}
        return StartingPoint(keywords, "the classic distillation loss")
    name = "imagenet_distillation"
    return _preset(loss, name if large and f"{name}-{loss.lower()}" in PRESETS else "start")


def for_adversarial_training(loss: str, classes: int | None) -> StartingPoint:
    """As :func:`for_distillation`."""
    many = classes is not None and classes >= _MANY
    name = f"cifar{100 if many else 10}_adversarial"
    if loss == "KL":
        return StartingPoint({"loss_weight": PRESETS[f"{name}-dkl"].keywords["alpha"]}, "TRADES")
    found = _preset(loss, name)
    return found._replace(objective="ikl") if many and loss != "DKL" else found


def _preset(loss: str, name: str) -> StartingPoint:
    keywords = dict(PRESETS[f"{name}-{loss.lower()}"].keywords)
    return StartingPoint(_without_defaults(loss, keywords), f"the preset {name} (docs/choosing.md)")


def _without_defaults(loss: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """The weights, and what differs from the loss's defaults; the number of classes is that of the user's head."""
    known = inspect.signature(LOSSES[f"{loss}Loss"]).parameters
    kept = [name for name in ORDER if name in keywords and name in known and name != "num_classes"]
    weights = ("alpha", "beta", "gamma")
    return {name: keywords[name] for name in kept if name in weights or keywords[name] != known[name].default}
