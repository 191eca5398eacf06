"""The rules on what an evaluation is given: model, images, labels, threat and attacks."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import _validation as check
from ..conditions import precision
from ..data import Images, check_pixels
from ..eps import Eps, parse_eps

__all__ = [
    "ATTACKS",
    "NORMS",
    "VERSIONS",
    "chance",
    "check_class_order",
    "check_data",
    "check_model",
    "check_radii",
    "check_seed",
    "check_threat",
    "natural_predictions",
    "warn_of_chance",
]

ATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
VERSIONS = ("standard", "plus", "rand")
NORMS = ("Linf", "L2", "L1")


def natural_predictions(
    caller: str, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, device: torch.device
) -> tuple[Tensor, int]:
    """Predictions on natural images and the number of classes, after every rule on what a model gives."""
    found, classes = [], None
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device)
        logits = _forward(caller, model, batch)
        _check_logits(caller, logits, batch, start)
        classes = logits.shape[1]
        found.append(logits.max(dim=1)[1].cpu())
    if classes is None or classes < 2:
        raise ValueError(f"{caller}: `model` must have at least 2 classes, got {classes}.")
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ValueError(
            f"{caller}: `labels` must lie in [0, {classes - 1}], the model's classes, got values from {low} to {high}."
        )
    return torch.cat(found), classes


def _check_logits(caller: str, logits: object, batch: Tensor, start: int) -> None:
    count = len(batch)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        way_out = "Wrap it so that its forward returns the logits alone."
        if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) % count == 0:
            size = f"{batch.shape[2]}x{batch.shape[3]}"
            way_out = f"Give images of the size that it was made for, such as 32x32: these are {size}."
        raise ValueError(
            f"{caller}: `model` must give logits of shape ({count}, C) for {count} images, got {what}. {way_out}"
        )
    if logits.dtype != torch.float32:
        raise ValueError(
            f"{caller}: `model` must give float32 logits, as AutoAttack keeps its losses in it, got {logits.dtype}. "
            "Return `logits.float()`."
        )
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise ValueError(
            f"{caller}: `model` must give finite logits, got {bad} of {logits.numel()} that are not, from "
            f"image {start} on."
        )


def _forward(caller: str, model: nn.Module, images: Tensor) -> Tensor:
    try:
        logits: Tensor = model(images)
    except RuntimeError as error:
        dtypes = precision(model)
        if dtypes == "float32" or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{caller}: `model` must take float32 images, but has {dtypes} weights and fails ({first}). Call "
            "`model.float()`; to attack it as it is, convert images and logits in a module around it."
        ) from error
    return logits


def chance(correct: int, total: int, classes: int) -> str | None:
    """A sentence on an accuracy that is no better than guessing among ``classes``, within two standard errors."""
    share = 1 / classes
    if correct / total > share + 2 * math.sqrt(share * (1 - share) / total):
        return None
    return (
        f"{correct} of {total} natural images are right, no more than by chance ({100 * share:.3g} %): check that the "
        "images are those that the model was trained on, in values, size, channel order and class order."
    )


def warn_of_chance(caller: str, predictions: Tensor, labels: Tensor, classes: int) -> None:
    why = chance(int(predictions.eq(labels).sum()), len(labels), classes)
    if why is not None:
        warnings.warn(f"{caller}: {why}", UserWarning, stacklevel=4)


def check_threat(caller: str, norm: str, eps: str | float | Eps) -> Eps:
    if norm not in NORMS:
        raise ValueError(check.unknown_name_message(caller, "norm", norm, NORMS))
    return parse_eps(caller, eps, norm=norm)


def check_radii(caller: str, radii: Sequence[str | float | Eps], norm: str) -> list[Eps]:
    """The radii of a curve in rising order, refused unless there is at least one and each is there once."""
    if isinstance(radii, (str, bytes)) or not isinstance(radii, Sequence):
        raise TypeError(f"{caller}: `radii` must be a sequence of radii, got {radii!r}. Write ['2/255', '4/255'].")
    parsed = sorted((check_threat(caller, norm, radius) for radius in radii), key=float)
    if not parsed:
        raise ValueError(f"{caller}: `radii` must hold at least one radius, got none. Write ['2/255', '4/255'].")
    for smaller, larger in itertools.pairwise(parsed):
        if float(smaller) == float(larger):
            raise ValueError(f"{caller}: `radii` must be different, but {smaller} and {larger} are one. Name it once.")
    return parsed


def check_model(caller: str, model: nn.Module, version: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: `model` must be a torch.nn.Module, got {type(model).__name__}.")
    if model.training:
        raise ValueError(f"{caller}: `model` must be in eval mode, but is in training mode. Call `model.eval()`.")
    training = [name for name, module in model.named_modules() if module.training]
    if training and version != "rand":
        raise ValueError(
            f"{caller}: `model` must be in eval mode, but in training mode: {check.first_names(training)}. "
            "Call `model.eval()`; random parts need version='rand'."
        )


def check_class_order(caller: str, model: nn.Module, data: object) -> None:
    """Refuses images from elsewhere whose classes are the checkpoint's in another order."""
    trained, names = getattr(model, "classes", None), data.classes if type(data) is Images else None
    if not isinstance(trained, tuple) or names is None or trained == names or {*trained} != {*names}:
        return
    theirs, ours = next(pair for pair in zip(trained, names, strict=False) if pair[0] != pair[1])
    raise ValueError(
        f"{caller}: classes must be in the checkpoint's order, but have {ours!r} where it has {theirs!r}. Use "
        "in_class_order, or --mmpretrain CONFIG."
    )


def check_data(caller: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        what = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{caller}: `images` must be a floating tensor (N, C, H, W), got {what}. Divide uint8 by 255.")
    check_pixels(caller, images)
    indices = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not indices or labels.dtype == torch.bool:
        what = check.kind_of(labels)
        raise TypeError(f"{caller}: `labels` must be a tensor of class indices, got {what}. Pass a long tensor.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{caller}: `labels` must have shape ({len(images)},), got {tuple(labels.shape)}.")
    # AutoAttack takes views of gradients, which have the layout of the images.
    images, labels = images.detach().cpu().float().contiguous(), labels.detach().cpu().long()
    # What was made inside torch.inference_mode takes no gradient, but its copy does.
    return images.clone() if images.is_inference() else images, labels


def check_seed(caller: str, seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{caller}: `seed` must be an integer, got {seed!r}, as a run must be repeatable.")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{caller}: `seed` must lie from -2^63 to 2^64 - 1, as torch takes it, got {seed}.")
