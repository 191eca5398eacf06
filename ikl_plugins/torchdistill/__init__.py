"""The torchdistill adapter: ``dependencies: ['ikl_plugins.torchdistill']`` in a YAML file makes the losses known.

Importing this package registers with torchdistill, once:

- the mid-level losses ``DKLLoss``, ``IKLLoss``, ``GKLLoss`` and, for short, ``DKL``, ``IKL``, ``GKL``;
- the pre-epoch process ``ikl_pre_epoch_process``;
- the networks of :mod:`ikl_plugins.models`, each as ``ikl_plugins.<name>``, and those of RobustBench as
  ``ikl_plugins.robustbench_network``, with ``architecture`` and ``num_classes`` among their ``kwargs``.

``adversarial_forward`` and ``image_folder`` are for ``!import_call``; the first registers a forward process.
"""

try:
    import torchdistill.losses.registry  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ikl_plugins.torchdistill needs torchdistill, but `{error.name}` is missing. "
        f"Run: pip install 'ikl_plugins[torchdistill]'"
    ) from error

from .adversarial import AdversarialForward, adversarial_forward
from .data import image_folder
from .losses import AdversarialLogits, DKLLoss, GKLLoss, IKLLoss, MidLevelLoss, find_losses
from .processes import ikl_pre_epoch_process
from .registration import register

__all__ = [
    "AdversarialForward",
    "AdversarialLogits",
    "DKLLoss",
    "GKLLoss",
    "IKLLoss",
    "MidLevelLoss",
    "adversarial_forward",
    "find_losses",
    "ikl_pre_epoch_process",
    "image_folder",
    "register",
]

register()
