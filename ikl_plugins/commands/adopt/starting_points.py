"""The settings that a loss begins with in an MMPretrain config, which has no numbers that could be mapped.

Published ones where there are any: those of the nearest number of classes. A loss without an entry begins with its own
defaults.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["StartingPoint", "for_adversarial_training", "for_distillation"]

_MANY = 100  # classes, from which on the settings of CIFAR-100 are the nearest in adversarial training
_LARGE = 1000  # classes, from which on those of ImageNet are the nearest in distillation


class StartingPoint(NamedTuple):
    """Keywords of a loss, where they come from, and the objective of the attack that goes with them."""

    keywords: dict[str, Any]
    origin: str = "the defaults of the loss"
    objective: str = "soft_cross_entropy"


_IKL_ROBUST = {"alpha": 4.0, "beta": 20.0, "weight_temperature": 4.0, "global_info": True}
_GKL_ROBUST = {"alpha": 4.0, "beta": 20.0, "gamma": 1.0, "weight_temperature": 4.0, "global_info": True}
_CIFAR100 = "published for CIFAR-100, resnet56 to resnet20"
_IMAGENET = "published for ImageNet, ResNet-34 to ResNet-18"
_DISTILLATION = {
    "DKL": StartingPoint(
        {"alpha": 16.0, "beta": 16.0, "temperature": 4.0}, "the gradients of KL with temperature 4.0, times its square"
    ),
    "IKL": StartingPoint({"alpha": 1.0, "beta": 4.0, "temperature": 4.0, "weight_temperature": 100.0}, _CIFAR100),
    "GKL": StartingPoint(
        {"alpha": 1.0, "beta": 4.0, "gamma": 0.2, "temperature": 4.0, "weight_temperature": 4.0, "global_info": True},
        _CIFAR100,
    ),
    "KL": StartingPoint({"temperature": 4.0, "scale_by_temperature_squared": True}, "the classic distillation loss"),
}
_LARGE_DISTILLATION = {
    "DKL": StartingPoint({"alpha": 1.0, "beta": 1.0}, "the gradients of KL with temperature 1.0, times its square"),
    "IKL": StartingPoint({"alpha": 1.0, "beta": 0.5, "global_info": True}, _IMAGENET),
    "GKL": StartingPoint({"alpha": 1.0, "beta": 0.5, "gamma": 0.6, "global_info": True}, _IMAGENET),
    "KL": StartingPoint({}, "the classic distillation loss"),
}
_ROBUST = {
    "DKL": StartingPoint({"alpha": 6.0, "beta": 6.0}, "the gradients of TRADES with 6"),
    "IKL": StartingPoint(_IKL_ROBUST, "published for CIFAR-10"),
    "GKL": StartingPoint(_GKL_ROBUST, "published for CIFAR-10, where gamma 1 is IKL"),
    "KL": StartingPoint({"loss_weight": 6.0}, "TRADES"),
}
_MANY_ROBUST = _ROBUST | {
    "IKL": StartingPoint({**_IKL_ROBUST, "alpha": 5.0}, "published for CIFAR-100", "ikl"),
    "GKL": StartingPoint({**_GKL_ROBUST, "alpha": 5.0}, "published for CIFAR-100, where gamma 1 is IKL", "ikl"),
}


def for_distillation(loss: str, classes: int | None) -> StartingPoint:
    """Of a loss ('IKL', 'KL', ...) and a number of classes, None where it is unknown."""
    table = _LARGE_DISTILLATION if classes is not None and classes >= _LARGE else _DISTILLATION
    return table.get(loss, StartingPoint({}))


def for_adversarial_training(loss: str, classes: int | None) -> StartingPoint:
    """As :func:`for_distillation`."""
    table = _MANY_ROBUST if classes is not None and classes >= _MANY else _ROBUST
    return table.get(loss, StartingPoint({}))
