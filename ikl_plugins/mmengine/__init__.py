"""What every OpenMMLab package shares: ``custom_imports = dict(imports=['ikl_plugins.mmengine'])`` makes it known.

MMEngine alone is needed. Importing this package registers, once, in MMEngine's root registry, where mmpretrain, mmdet,
mmseg and mmrazor find them: the losses ``DKLLoss``, ``IKLLoss``, ``GKLLoss`` and ``KLLoss``, the hooks ``IKLHook`` and
``BatchNormMomentumHook``, the averaged model ``WarmupEMA``, the schedulers ``ResumableOneCycleLR`` and
``OneCycleMomentum``, the optimizer wrapper ``AutocastOptimWrapper``.

It also adds the few names that a checkpoint of MMEngine holds to those that torch loads with ``weights_only=True``
(:func:`ikl_plugins.mmengine.checkpoints.allow_mmengine_checkpoints`), so that resuming and testing work.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ikl_plugins.mmengine needs MMEngine, but `{error.name}` is missing. Run: pip install mmengine"
    ) from error

from .averaging import WarmupEMA
from .checkpoints import allow_mmengine_checkpoints, load_weights, verify
from .epochs import EpochModel, class_priors
from .hooks import IKLHook
from .losses import DKLLoss, GKLLoss, IKLLoss, KLLoss
from .optim import AutocastOptimWrapper
from .registration import register
from .schedules import BatchNormMomentumHook, OneCycleMomentum, ResumableOneCycleLR

__all__ = [
    "AutocastOptimWrapper",
    "BatchNormMomentumHook",
    "DKLLoss",
    "EpochModel",
    "GKLLoss",
    "IKLHook",
    "IKLLoss",
    "KLLoss",
    "OneCycleMomentum",
    "ResumableOneCycleLR",
    "WarmupEMA",
    "allow_mmengine_checkpoints",
    "class_priors",
    "load_weights",
    "register",
    "verify",
]

allow_mmengine_checkpoints()
register()
