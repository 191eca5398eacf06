"""Whole networks as MMPretrain's backbones: RobustBench's own, and those of the distillation literature.

They give logits, so that their checkpoints have the names of the original zoos, behind 'backbone.'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.models.heads import ClsHead
from torch import Tensor, nn

from .. import _validation as check
from .. import models
from ..models.robustbench_zoo import robustbench_network, zoo_model

__all__ = [
    "LogitsClsHead",
    "build_distillation_network",
    "build_robustbench_model",
    "build_robustbench_network",
]


def build_distillation_network(name: str, num_classes: int) -> nn.Module:
    """A network of :mod:`ikl_plugins.models` as backbone: ``backbone=dict(type='DistillationNetwork', name=...)``.

    It gives logits, so its head is ``dict(type='LogitsClsHead', num_classes=...)``. Its own names are those of the
    published checkpoints, so as a teacher it needs no classifier around it: ``teacher_ckpt`` is a file of mdistiller.

    Args:
        name: of the network, 'resnet8x4' for one; those in ``ikl_plugins.models.__all__``.
        num_classes: number of logits.

    Returns:
        The network, initialised as its zoo does.

    Raises:
        TypeError: ``num_classes`` is no integer.
        ValueError: an unknown name, or ``num_classes`` below 1.

    Example:
        In a config::

            model = dict(
                type='DistillationClassifier',
                data_preprocessor=dict(mean=[129.3105, 124.1085, 112.404], std=[68.2125, 65.4075, 70.4055]),
                backbone=dict(type='DistillationNetwork', name='resnet8x4', num_classes=100),
                head=dict(type='LogitsClsHead', num_classes=100),
                teacher=dict(type='DistillationNetwork', name='resnet32x4', num_classes=100),
                teacher_ckpt='resnet32x4_vanilla/ckpt_epoch_240.pth',
            )
    """
    if name not in models.__all__:
        raise ValueError(check.unknown_name_message("DistillationNetwork", "network", str(name), models.__all__))
    network: nn.Module = getattr(models, name)(num_classes=num_classes)
    return network


def build_robustbench_network(
    architecture: str,
    num_classes: int = 10,
    dataset: str = "cifar10",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A network of RobustBench's zoo as backbone: ``backbone=dict(type='RobustBenchNetwork', architecture=...)``.

    It gives logits, so its head is ``dict(type='LogitsClsHead', num_classes=...)``. Checkpoints have RobustBench's own
    names behind 'backbone.'.

    Arguments and errors are those of :func:`ikl_plugins.models.robustbench_zoo.robustbench_network`.

    Returns:
        An instance of RobustBench's class. It takes images in [0, 1] of 32x32, so that what is submitted gets
        ``data_preprocessor = dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True)``.
    """
    return robustbench_network(architecture, num_classes, dataset=dataset, mean=mean, std=std)


def build_robustbench_model(
    name: str, dataset: str = "cifar10", threat_model: str = "Linf", model_dir: str = "models"
) -> nn.Module:
    """A trained model of RobustBench's zoo as a teacher: ``teacher=dict(type='RobustBenchModel', name=...)``.

    It takes RGB images in [0, 1]: ``teacher_input=dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=...)``, with ``to_rgb``
    as the student's data preprocessor has it where that gives RGB.

    Arguments and errors are those of :func:`ikl_plugins.models.robustbench_zoo.zoo_model`, which downloads what is not
    in ``model_dir``.
    """
    model, _ = zoo_model(name, dataset, threat_model, model_dir, caller="RobustBenchModel")
    model.comes_trained = True  # type: ignore[assignment]  # for build_teacher, which asks for no checkpoint then
    return model


class LogitsClsHead(ClsHead):  # type: ignore[misc]  # the base class has no types
    """The head of a backbone that gives logits: MMPretrain's ``ClsHead`` without features, layers or parameters.

    Args:
        num_classes: number of logits that the backbone gives.
        **kwargs: those of ``ClsHead``: ``loss``, ``topk``, ``cal_acc``.

    Raises:
        TypeError: ``num_classes`` is no integer.
        ValueError: ``num_classes`` is below 1.

    Example:
        In a config::

            model = dict(
                type='ImageClassifier',
                data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True),
                backbone=dict(type='RobustBenchNetwork', architecture='WideResNet-34-10', num_classes=10),
                head=dict(type='LogitsClsHead', num_classes=10),
            )
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        check.check_num_classes("LogitsClsHead", num_classes)
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def pre_logits(self, feats: Any) -> Tensor:
        """The logits (N, num_classes) of the backbone, which may be the last of several outputs."""
        logits = feats[-1] if isinstance(feats, (tuple, list)) and feats else feats
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != self.num_classes:
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"LogitsClsHead: the backbone must give logits of shape (N, {self.num_classes}), got {what}. "
                f"Use LinearClsHead."
            )
        return logits
