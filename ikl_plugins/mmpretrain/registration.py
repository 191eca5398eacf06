"""What MMPretrain knows after ``import ikl_plugins.mmpretrain``, beside what :mod:`ikl_plugins.mmengine` registers."""

from __future__ import annotations

from mmpretrain import registry as host

from .. import mmengine as base
from ..mmengine.registration import ENTRIES, Entry, register_entries
from .adversarial import AdversarialClassifier
from .distillation import DistillationClassifier
from .generated import GeneratedImages
from .long_tail import ManyMediumFew
from .metrics import RobustAccuracy
from .networks import (
    LogitsClsHead,
    build_distillation_network,
    build_robustbench_model,
    build_robustbench_network,
)
from .preprocessing import CIFAR10AutoAugment, ClippedCutout, TwoViewDataPreprocessor
from .robust_evaluation import RobustEvaluationHook
from .sampling import GeneratedBatchSampler

__all__ = ["ENTRY_NAMES", "register"]

_ENTRIES = (
    Entry(host.MODELS, "model", "AdversarialClassifier", AdversarialClassifier),
    Entry(host.MODELS, "model", "DistillationClassifier", DistillationClassifier),
    Entry(host.MODELS, "backbone", "DistillationNetwork", build_distillation_network),
    Entry(host.MODELS, "backbone", "RobustBenchNetwork", build_robustbench_network),
    Entry(host.MODELS, "model", "RobustBenchModel", build_robustbench_model),
    Entry(host.MODELS, "head", "LogitsClsHead", LogitsClsHead),
    Entry(host.MODELS, "data preprocessor", "TwoViewDataPreprocessor", TwoViewDataPreprocessor),
    Entry(host.TRANSFORMS, "transform", "CIFAR10AutoAugment", CIFAR10AutoAugment),
    Entry(host.TRANSFORMS, "transform", "ClippedCutout", ClippedCutout),
    Entry(host.METRICS, "metric", "RobustAccuracy", RobustAccuracy),
    Entry(host.METRICS, "metric", "ManyMediumFew", ManyMediumFew),
    Entry(host.HOOKS, "hook", "RobustEvaluationHook", RobustEvaluationHook),
    Entry(host.DATASETS, "data set", "GeneratedImages", GeneratedImages),
    Entry(host.DATA_SAMPLERS, "batch sampler", "GeneratedBatchSampler", GeneratedBatchSampler),
)

ENTRY_NAMES = {entry.name for entry in (*_ENTRIES, *ENTRIES)}  # of both packages


def register() -> None:
    """Registers everything of both packages; a second call changes nothing.

    Raises:
        ValueError: somebody else holds one of the names. Nothing of the package that has it is registered then.
    """
    base.register()
    register_entries("ikl_plugins.mmpretrain", _ENTRIES)
