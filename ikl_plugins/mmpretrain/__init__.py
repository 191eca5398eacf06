"""The MMPretrain adapter: ``custom_imports = dict(imports=['ikl_plugins.mmpretrain'])`` in a config makes it known.

Importing this package registers, once:

- in MMEngine's root registry, where mmpretrain, mmdet, mmseg and mmrazor find them: the losses ``DKLLoss``,
  ``IKLLoss``, ``GKLLoss``, ``KLLoss``, the hooks ``IKLHook`` and ``BatchNormMomentumHook``, the averaged model
  ``WarmupEMA``, the schedulers ``ResumableOneCycleLR`` and ``OneCycleMomentum``, the optimizer wrapper
  ``AutocastOptimWrapper``;
- in MMPretrain's: the models ``DistillationClassifier`` and ``AdversarialClassifier``, the backbones
  ``DistillationNetwork`` and ``RobustBenchNetwork`` with their head ``LogitsClsHead``, the data preprocessor
  ``TwoViewDataPreprocessor``, the metrics ``RobustAccuracy`` and ``ManyMediumFew``, the data set ``GeneratedImages``,
  the batch sampler ``GeneratedBatchSampler``.

It also adds the few names that a checkpoint of MMEngine holds to those that torch loads with ``weights_only=True``
(:func:`ikl_plugins.mmpretrain.checkpoints.allow_mmengine_checkpoints`), so that resuming and testing work.
"""

try:
    import mmengine  # noqa: F401
    import mmpretrain.models  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ikl_plugins.mmpretrain needs MMPretrain and MMEngine, but `{error.name}` is missing. "
        f"Run: pip install 'ikl_plugins[mmpretrain]'"
    ) from error

from .adversarial import AdversarialClassifier
from .averaging import WarmupEMA
from .checkpoints import allow_mmengine_checkpoints, load_weights, verify
from .classifier import EpochClassifier
from .distillation import DistillationClassifier
from .generated import GeneratedImages
from .hooks import IKLHook
from .long_tail import ManyMediumFew
from .losses import DKLLoss, GKLLoss, IKLLoss, KLLoss
from .mapped import unpack_npz
from .metrics import RobustAccuracy
from .networks import LogitsClsHead, build_distillation_network, build_robustbench_network
from .optim import AutocastOptimWrapper
from .pixels import PixelSpace
from .preprocessing import TwoViewDataPreprocessor
from .registration import register
from .sampling import GeneratedBatchSampler
from .schedules import BatchNormMomentumHook, OneCycleMomentum, ResumableOneCycleLR
from .teacher import TeacherHolder, build_teacher

__all__ = [
    "AdversarialClassifier",
    "AutocastOptimWrapper",
    "BatchNormMomentumHook",
    "DKLLoss",
    "DistillationClassifier",
    "EpochClassifier",
    "GKLLoss",
    "GeneratedBatchSampler",
    "GeneratedImages",
    "IKLHook",
    "IKLLoss",
    "KLLoss",
    "LogitsClsHead",
    "ManyMediumFew",
    "OneCycleMomentum",
    "PixelSpace",
    "ResumableOneCycleLR",
    "RobustAccuracy",
    "TeacherHolder",
    "TwoViewDataPreprocessor",
    "WarmupEMA",
    "allow_mmengine_checkpoints",
    "build_distillation_network",
    "build_robustbench_network",
    "build_teacher",
    "load_weights",
    "register",
    "unpack_npz",
    "verify",
]

allow_mmengine_checkpoints()
register()
