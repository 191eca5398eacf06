"""The torchdistill adapter: ``dependencies: ['ikl_plugins.torchdistill']`` in a YAML file makes the losses known.

Importing this package registers with torchdistill, once:

- the mid-level losses ``DKLLoss``, ``IKLLoss``, ``GKLLoss`` and, for short, ``DKL``, ``IKL``, ``GKL``;
- the pre-epoch process ``ikl_pre_epoch_process``;
- the networks of :mod:`ikl_plugins.models`, each as ``ikl_plugins.<name>``, and those of RobustBench as
  ``ikl_plugins.robustbench_network``, with ``architecture`` and ``num_classes`` among their ``kwargs``.

``adversarial_forward``, ``image_folder``, ``ImageList``, ``share_of_batch`` and ``WarmupCosine`` are for
``!import_call``; the first registers a forward process.
"""

try:
    import torchdistill.losses.registry  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ikl_plugins.torchdistill needs torchdistill, but `{error.name}` is missing. "
        f"Run: pip install 'ikl_plugins[torchdistill]'"
    ) from error

from .adversarial import AdversarialForward, adversarial_forward
from .data import ImageList, image_folder, share_of_batch
from .losses import AdversarialLogits, DKLLoss, GKLLoss, IKLLoss, MidLevelLoss, find_losses
from .processes import ikl_pre_epoch_process
from .registration import register
from .schedules import WarmupCosine

__all__ = [
    "AdversarialForward",
    "AdversarialLogits",
    "DKLLoss",
    "GKLLoss",
    "IKLLoss",
    "ImageList",
    "MidLevelLoss",
    "WarmupCosine",
    "adversarial_forward",
    "find_losses",
    "ikl_pre_epoch_process",
    "image_folder",
    "register",
    "share_of_batch",
]

register()
