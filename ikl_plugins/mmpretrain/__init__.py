"""The MMPretrain adapter: ``custom_imports = dict(imports=['ikl_plugins.mmpretrain'])`` in a config makes it known.

Importing this package registers, once:

- in MMEngine's root registry, where mmpretrain, mmdet, mmseg and mmrazor find them: the losses ``DKLLoss``,
  ``IKLLoss``, ``GKLLoss``, ``KLLoss``, the hook ``IKLHook``, the optimizer wrapper ``AutocastOptimWrapper``;
- in MMPretrain's: the models ``DistillationClassifier`` and ``AdversarialClassifier``, the backbone
  ``RobustBenchNetwork`` with its head ``LogitsClsHead``, the data preprocessor ``TwoViewDataPreprocessor``, the metric
  ``RobustAccuracy``.

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
from .checkpoints import allow_mmengine_checkpoints, load_weights, verify
from .classifier import EpochClassifier
from .distillation import DistillationClassifier
from .hooks import IKLHook
from .losses import DKLLoss, GKLLoss, IKLLoss, KLLoss
from .metrics import RobustAccuracy
from .networks import LogitsClsHead, build_robustbench_network
from .optim import AutocastOptimWrapper
from .pixels import PixelSpace
from .preprocessing import TwoViewDataPreprocessor
from .registration import register
from .teacher import TeacherHolder, build_teacher

__all__ = [
    "AdversarialClassifier",
    "AutocastOptimWrapper",
    "DKLLoss",
    "DistillationClassifier",
    "EpochClassifier",
    "GKLLoss",
    "IKLHook",
    "IKLLoss",
    "KLLoss",
    "LogitsClsHead",
    "PixelSpace",
    "RobustAccuracy",
    "TeacherHolder",
    "TwoViewDataPreprocessor",
    "allow_mmengine_checkpoints",
    "build_robustbench_network",
    "build_teacher",
    "load_weights",
    "register",
    "verify",
]

allow_mmengine_checkpoints()
register()
