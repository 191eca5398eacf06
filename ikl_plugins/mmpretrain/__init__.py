"""The MMPretrain adapter: ``custom_imports = dict(imports=['ikl_plugins.mmpretrain'])`` in a config makes it known.

It stands on :mod:`ikl_plugins.mmengine`, which it imports and whose names it has too. In MMPretrain's registries it
adds, once: the models ``DistillationClassifier`` and ``AdversarialClassifier``, the backbones ``DistillationNetwork``
and ``RobustBenchNetwork`` with their head ``LogitsClsHead``, the teacher ``RobustBenchModel``, the data preprocessor
``TwoViewDataPreprocessor``, the transforms ``CIFAR10AutoAugment`` and ``ClippedCutout``, the metrics ``RobustAccuracy``
and ``ManyMediumFew``, the hook ``RobustEvaluationHook``, the data set ``GeneratedImages``, the batch sampler
``GeneratedBatchSampler``.
"""

try:
    import mmengine  # noqa: F401
    import mmpretrain.models  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ikl_plugins.mmpretrain needs MMPretrain and MMEngine, but `{error.name}` is missing. "
        f"Run: pip install 'ikl_plugins[mmpretrain]'"
    ) from error

from ..mmengine import (
    AutocastOptimWrapper,
    BatchNormMomentumHook,
    DKLLoss,
    GKLLoss,
    IKLHook,
    IKLLoss,
    KLLoss,
    OneCycleMomentum,
    ResumableOneCycleLR,
    WarmupEMA,
    allow_mmengine_checkpoints,
    load_weights,
    verify,
)
from .adversarial import AdversarialClassifier
from .classifier import EpochClassifier
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
from .npz_memmap import unpack_npz
from .pixels import pixel_space
from .preprocessing import CIFAR10AutoAugment, ClippedCutout, TwoViewDataPreprocessor
from .registration import register
from .robust_evaluation import RobustEvaluationHook
from .sampling import GeneratedBatchSampler
from .teacher import FrozenTeacher, build_teacher

__all__ = [
    "AdversarialClassifier",
    "AutocastOptimWrapper",
    "BatchNormMomentumHook",
    "CIFAR10AutoAugment",
    "ClippedCutout",
    "DKLLoss",
    "DistillationClassifier",
    "EpochClassifier",
    "FrozenTeacher",
    "GKLLoss",
    "GeneratedBatchSampler",
    "GeneratedImages",
    "IKLHook",
    "IKLLoss",
    "KLLoss",
    "LogitsClsHead",
    "ManyMediumFew",
    "OneCycleMomentum",
    "ResumableOneCycleLR",
    "RobustAccuracy",
    "RobustEvaluationHook",
    "TwoViewDataPreprocessor",
    "WarmupEMA",
    "allow_mmengine_checkpoints",
    "build_distillation_network",
    "build_robustbench_model",
    "build_robustbench_network",
    "build_teacher",
    "load_weights",
    "pixel_space",
    "register",
    "unpack_npz",
    "verify",
]

register()
