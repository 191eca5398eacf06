"""All checks in their order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..._progress import Shown, teller
from ..conditions import own_conditions
from ..data import Images
from ..evaluation.checks import chance, check_class_order
from ..evaluation.log import data_facts
from ..submittable import network_obstacle
from .claims import claim, radius
from .forward import batch, deterministic, eval_mode, output
from .gradients import gradients
from .inputs import inputs, normalisation
from .logits import logits
from .optimisation import optimisation
from .result import Check, Preflight
from .subject import Finding, Subject, as_it_was

__all__ = ["CHECKS", "preflight"]

# Each looks at the model, images and claims, and says whether it passed (None: not checked) and why.
_TABLE: dict[str, Callable[[Subject], Finding]] = {
    # What needs no forward comes first: a claim that cannot hold is said before minutes of checks.
    "eps": radius,
    "claim": claim,
    "inputs": inputs,
    "eval mode": eval_mode,
    "output": output,  # keeps the logits for those below
    "deterministic": deterministic,
    "batch": batch,
    "gradients": gradients,
    "logits": logits,
    "normalisation": normalisation,
    "optimisation": optimisation,
}
_OF_LOGITS = ("deterministic", "batch", "gradients", "logits", "normalisation")
CHECKS = tuple(_TABLE)


@own_conditions()
def preflight(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: object = None,
    norm: str = "Linf",
    claimed: float | None = None,
    measured: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 32,
    number_forward_passes: int = 1,
    data: str | Images | None = None,
    progress: bool | Callable[[Check], None] | None = True,
) -> Preflight:
    """Checks a model against the rules of RobustBench and the usual mistakes.

    The checks work on copies of the model. One that cannot be copied is left as it was in its parameters, buffers,
    gradients and the mode of each module. All checks but 'eval mode' see it in eval mode, and without the caller's
    ``torch.inference_mode``, autocast, and default dtype and device. The generators of random numbers are put back too.

    Args:
        model: of images in [0, 1], returning logits (N, C).
        images: images in [0, 1], shape (N, channels, H, W), at least 2, on the device of the model. They are all used;
            32 to 200 are enough.
        labels: their class indices (N,). Without them the input range is judged by the structure of the model alone.
        eps: radius of the threat model, preferably as text such as '8/255'; None for corruptions.
        norm: 'Linf' or 'L2'.
        claimed, measured: robust accuracy of the claim and of the evaluation, in percent.
        mean, std: normalisation that the model was trained with, one number per channel or one for all, for images in
            [0, 1]. Without them those in common use are tried.
        batch_size: images per forward, at least 1.
        number_forward_passes: how often one prediction may pass the network, at least 1, as the leaderboard states it.
            A network that shares weights between layers calls the same layer more than once, and needs that number
            here too.
        data: name of the data, or the :class:`~ikl_plugins.robustbench.data.Images` that the images are from; for the
            report.
        progress: True for a bar on a terminal and lines elsewhere, on standard error; False for neither; or a function
            that is called with each check as it is made.

    Returns:
        The checks: 'eps' (exact), 'claim' (not above what was measured), 'inputs' (in [0, 1]), 'eval mode', 'output'
        (logits are finite and of shape (N, C), computed in float32 or in the one dtype that all parameters have),
        'deterministic' (also whatever batches came before), 'batch' (an image's logits depend on no other image),
        'gradients' (finite, not zero, the same in any batch, and true: steps along them and along random directions
        change the logits as they predict), 'logits' (not probabilities, scaled and shifted or not), 'normalisation'
        (once) and 'optimisation' (none in the forward, and no more passes of the network than stated); by which images
        they judge, and the natural accuracy on them; and, known before any attack, why RobustBench would not take a
        network of this class.
        A compiled model is checked as it was before, and must give the same.

    Raises:
        TypeError: the model is no module, images or labels are no tensors of the right kind.
        ValueError: classes of ``data`` in another order than the checkpoint's, shapes that do not fit each other, fewer
            than 2 images, labels that the model has no class for, an accuracy that is not in 0 to 100, only one of
            ``mean`` and ``std``, or a number of passes below 1.

    Warns:
        UserWarning: the natural accuracy is no better than chance.
    """
    check_class_order("preflight", model, data)
    shown = Shown("checks")
    subject = Subject(
        user=model,
        images=images,
        labels=labels,
        eps=eps,
        norm=norm,
        claimed=claimed,
        measured=measured,
        mean=mean,
        std=std,
        batch_size=batch_size,
        number_forward_passes=number_forward_passes,
    )
    found: list[Check] = []

    def show(check: Check) -> None:
        failed = sum(check.passed is False for check in found)
        shown("preflight", len(found), len(_TABLE), f"{failed} failed")

    tell = teller("preflight", progress, show)
    with as_it_was(subject.model), torch.no_grad():
        for name, check in _TABLE.items():
            if name in _OF_LOGITS and not len(subject.logits):
                found.append(Check(name, None, "The model gives no finite logits of shape (N, C)."))
            else:
                found.append(Check(name, *check(subject)))
            tell(found[-1])
    facts = {"natural_accuracy": None, **data_facts(data, images, labels)}
    why = None
    if labels is not None and len(subject.logits):
        right = int(subject.logits.argmax(dim=1).eq(labels).sum())
        facts["natural_accuracy"] = 100 * right / len(images)
        why = chance(right, len(images), subject.logits.shape[1])
    if why is not None:
        warnings.warn(f"preflight: {why}", UserWarning, stacklevel=3)
    return Preflight(tuple(found), facts, () if why is None else (why,), network_obstacle(model))
