"""What MMEngine and MMPretrain know after ``import ikl_plugins.mmpretrain``, and under which names."""

from __future__ import annotations

from typing import Any

import mmengine.registry as root
import mmpretrain.registry as host

from .adversarial import AdversarialClassifier
from .averaging import WarmupEMA
from .distillation import DistillationClassifier
from .generated import GeneratedImages
from .hooks import IKLHook
from .long_tail import ManyMediumFew
from .losses import DKLLoss, GKLLoss, IKLLoss, KLLoss
from .metrics import RobustAccuracy
from .networks import LogitsClsHead, build_distillation_network, build_robustbench_network
from .optim import AutocastOptimWrapper
from .preprocessing import TwoViewDataPreprocessor
from .sampling import GeneratedBatchSampler
from .schedules import BatchNormMomentumHook, OneCycleMomentum, ResumableOneCycleLR

__all__ = ["register"]

# Every OpenMMLab library finds what is in MMEngine's root registry.
_ENTRIES: tuple[tuple[Any, str, str, Any], ...] = (
    (root.MODELS, "loss", "DKLLoss", DKLLoss),
    (root.MODELS, "loss", "IKLLoss", IKLLoss),
    (root.MODELS, "loss", "GKLLoss", GKLLoss),
    (root.MODELS, "loss", "KLLoss", KLLoss),
    (root.MODELS, "averaged model", "WarmupEMA", WarmupEMA),
    (root.HOOKS, "hook", "IKLHook", IKLHook),
    (root.HOOKS, "hook", "BatchNormMomentumHook", BatchNormMomentumHook),
    (root.PARAM_SCHEDULERS, "parameter scheduler", "ResumableOneCycleLR", ResumableOneCycleLR),
    (root.PARAM_SCHEDULERS, "parameter scheduler", "OneCycleMomentum", OneCycleMomentum),
    (root.OPTIM_WRAPPERS, "optimizer wrapper", "AutocastOptimWrapper", AutocastOptimWrapper),
    (host.MODELS, "model", "AdversarialClassifier", AdversarialClassifier),
    (host.MODELS, "model", "DistillationClassifier", DistillationClassifier),
    (host.MODELS, "backbone", "DistillationNetwork", build_distillation_network),
    (host.MODELS, "backbone", "RobustBenchNetwork", build_robustbench_network),
    (host.MODELS, "head", "LogitsClsHead", LogitsClsHead),
    (host.MODELS, "data preprocessor", "TwoViewDataPreprocessor", TwoViewDataPreprocessor),
    (host.METRICS, "metric", "RobustAccuracy", RobustAccuracy),
    (host.METRICS, "metric", "ManyMediumFew", ManyMediumFew),
    (host.DATASETS, "data set", "GeneratedImages", GeneratedImages),
    (host.DATA_SAMPLERS, "batch sampler", "GeneratedBatchSampler", GeneratedBatchSampler),
)


def register() -> None:
    """Registers everything of this adapter; a second call changes nothing.

    Raises:
        ValueError: somebody else holds one of the names. Nothing is registered then.
    """
    for registry, kind, name, ours in _ENTRIES:
        # The same name in another library's registry would hide that of the root.
        for where in (registry, *registry.children.values()):
            holder = where.module_dict.get(name)
            if holder is not None and _full_name(holder) != _full_name(ours):
                raise ValueError(
                    f"ikl_plugins.mmpretrain: the {kind} name '{name}' must be free, but {_full_name(holder)} holds it "
                    f"in the registry of {where.scope}. Register that one under another name."
                )
    for registry, _, name, ours in _ENTRIES:
        if registry.module_dict.get(name) is not ours:
            registry.register_module(name=name, module=ours, force=True)


def _full_name(holder: Any) -> str:
    return f"{holder.__module__}.{getattr(holder, '__qualname__', type(holder).__qualname__)}"
