"""The torchdistill adapter: ``dependencies: ['ikl_plugins.torchdistill']`` in a YAML file makes the losses known.

Importing this package registers with torchdistill, once:

- a mid-level loss for each of :data:`ikl_plugins.losses.LOSSES`, ``IKLLoss`` for one, and for short ``IKL``;
- the pre-epoch process ``ikl_pre_epoch_process``;
- the auxiliary model wrapper ``TeacherInput``, for a teacher of other inputs than the student's;
- the data set wrapper ``ikl_plugins.FixedViews``, whose augmentations recur, for a teacher whose logits are kept;
- the networks of :mod:`ikl_plugins.models`, each as ``ikl_plugins.<name>``, and those of RobustBench as
  ``ikl_plugins.robustbench_network``, with ``architecture`` and ``num_classes`` among their ``kwargs``.

``adversarial_forward``, ``cached_forward``, ``robust_evaluation``, ``image_folder``, ``ImageList``, ``share_of_batch``
and ``WarmupCosine`` are for ``!import_call``; the first two register a forward process, the third a post-epoch process.
"""

try:
    import torchdistill.losses.registry  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ikl_plugins.torchdistill needs torchdistill, but `{error.name}` is missing. "
        f"Run: pip install 'ikl_plugins[torchdistill]'"
    ) from error

from .adversarial import AdversarialForward, adversarial_forward
from .box_evaluation import robust_evaluation
from .data import ImageList, image_folder, share_of_batch
from .losses import AdversarialLogits, MidLevelLoss, find_losses, mid_level_losses
from .losses import __getattr__ as __getattr__  # a class by the name of each loss
from .processes import ikl_pre_epoch_process
from .registration import register
from .schedules import WarmupCosine
from .teacher import TeacherInput
from .teacher_cache import FixedViews, cached_forward

__all__ = [
    "AdversarialForward",
    "AdversarialLogits",
    "FixedViews",
    "ImageList",
    "MidLevelLoss",
    "TeacherInput",
    "WarmupCosine",
    "adversarial_forward",
    "cached_forward",
    "find_losses",
    "ikl_pre_epoch_process",
    "image_folder",
    "mid_level_losses",
    "register",
    "robust_evaluation",
    "share_of_batch",
]

register()
