"""The checks of what goes into the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .subject import GREY_LEVELS, Finding, Subject, hooked

__all__ = ["inputs", "normalisation"]

_POINTS = 5.0  # by which another input range must be better before it is taken for the right one
_MEANS = ("mean", "mu", "means")
_STDS = ("std", "sigma", "stds")
# (mean, std) that models are commonly trained with, tried when none is given.
_COMMON = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR's": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "MNIST's": ((0.1307,), (0.3081,)),
}


def inputs(subject: Subject) -> Finding:
    low, high = float(subject.images.min()), float(subject.images.max())
    if low >= 0 and high <= 1:
        # All of an 8-bit image below 1/255 is not an image in [0, 1] that somebody divided once.
        if high * GREY_LEVELS <= 1 + 1e-6:
            return False, f"The images reach {high:.2g} at most. Divide 8-bit images by 255 only once."
        return True, f"The images lie in [{low:.3g}, {high:.3g}]."
    hint = "Divide by 255." if low >= 0 and high > 2 else "Leave the normalisation to the model."
    return False, f"The images range from {low:.4g} to {high:.4g} and not within [0, 1]. {hint}"


class _Normaliser(NamedTuple):
    """A layer that subtracts and divides, and what it was given in a forward."""

    name: str
    mean: Tensor
    std: Tensor
    inputs: Tensor


def normalisation(subject: Subject) -> Finding:
    """Once: by the layers that there are, and by no other range of inputs being clearly better."""
    layers = _normalisers(subject.model, subject.batch)
    for i, later in enumerate(layers):
        for earlier in layers[:i]:
            if _made_by(earlier, later.inputs, subject.batch):
                why = f"`{later.name}` normalises what `{earlier.name}` has normalised already. Remove one of them."
                return False, why
    structure = f"{len(layers)} normalising layers, none behind another"
    if len(layers) < 2:
        structure = f"One normalising layer (`{layers[0].name}`)" if layers else "No normalising layer"
    labels = subject.labels
    if labels is None:
        return True, f"{structure}. Without labels the accuracy was not compared."
    right = subject.logits.argmax(dim=1) == labels
    accuracy = 100 * float(right.float().mean())
    best, most = "", 0.0
    views = _views(subject.images, subject.mean, subject.std) if accuracy + _POINTS < 100 else {}  # none can be better
    for words, view in views.items():
        other = subject.forward(view).argmax(dim=1) == labels
        gain, error = _paired(other, right)
        if gain > _POINTS and gain > 2 * error and gain > most:
            best, most = f"{words} gives {100 * float(other.float().mean()):.1f} % accuracy", gain
    if best:
        return False, (
            f"{best} and the images in [0, 1] {accuracy:.1f} %: the model was trained with other inputs. Normalise "
            f"exactly once, inside the model, as in training."
        )
    return True, (
        f"{structure}. No other input range is clearly better than [0, 1], where {accuracy:.1f} % of "
        f"{len(right)} images are right."
    )


def _views(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Tensor]:
    """The images as a wrong pipeline would have passed them."""
    views = {"Multiplying by 255": images * GREY_LEVELS, "Dividing by 255": images / GREY_LEVELS}
    channels = images.shape[1]
    known: dict[str, tuple[Sequence[float], Sequence[float]]]
    if mean is not None and std is not None:
        known = {"the given": (mean, std)}
    else:
        fitting = {words: pair for words, pair in _COMMON.items() if len(pair[0]) == channels}
        known = {**fitting, "0.5 and 0.5": ((0.5,), (0.5,))}  # as Normalize((0.5,), (0.5,)) does for any channels
    for words, pair in known.items():
        shift, width = (images.new_tensor(numbers).view(1, -1, 1, 1) for numbers in pair)
        views[f"Normalising by {words} mean and std before the model"] = (images - shift) / width
        views[f"Undoing a normalisation by {words} mean and std"] = images * width + shift
    if channels == 3:
        views["Turning RGB into BGR"] = images.flip(1)
    return views


def _paired(other: Tensor, right: Tensor) -> tuple[float, float]:
    """Gain in accuracy of one set of predictions over another on the same images, and its standard error, in points."""
    difference = other.double() - right.double()
    n = len(difference)
    return 100 * float(difference.mean()), 100 * float(difference.std(unbiased=False)) / n**0.5


def _normalisers(model: nn.Module, images: Tensor) -> list[_Normaliser]:
    """The layers with a mean and a std per channel, in the order of their calls."""
    found: list[_Normaliser] = []

    def hook(name: str, module: nn.Module) -> Callable[..., None] | None:
        mean, std = _constants(module, _MEANS, images), _constants(module, _STDS, images)
        if mean is None or std is None or (bool((mean == 0).all()) and bool((std == 1).all())):
            return None

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0] if arguments else None
            if isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.shape[1] == images.shape[1]:
                found.append(_Normaliser(name, mean, std, inputs.detach().clone()))

        return before

    with hooked(model, hook):
        model(images.clone())
    return found


def _constants(module: nn.Module, names: Sequence[str], images: Tensor) -> Tensor | None:
    """The first attribute of these names that holds one number, or one per channel."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(x, (int, float)) for x in value):
            value = torch.tensor(value)
        if isinstance(value, Tensor) and value.numel() in (1, images.shape[1]) and value.is_floating_point():
            return value.detach().to(images.device, images.dtype).reshape(1, -1, 1, 1)
    return None


def _made_by(earlier: _Normaliser, inputs: Tensor, images: Tensor) -> bool:
    """Whether these inputs are what a layer made of the images (or of the images times 255)."""
    if inputs.shape != images.shape or torch.allclose(inputs, images, atol=1e-4):
        return False
    made = ((scale * images - earlier.mean) / earlier.std for scale in (1.0, float(GREY_LEVELS)))
    return any(torch.allclose(inputs, expected, rtol=1e-3, atol=1e-3) for expected in made)
