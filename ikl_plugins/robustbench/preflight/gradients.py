"""The check of the gradients that an attack would follow: that they are there, and those of the function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .directions import false_gradients, gradients_in_the_ball, margins
from .subject import GREY_LEVELS, Finding, Subject, first_line

__all__ = ["gradient_error", "gradients"]

_DEAD = 0.1  # share of images whose gradient may be zero: single ones lie where every unit is off
# Steps along the gradient, in grey levels. The small ones stay below the levels of a quantiser for most images.
_STEPS = (1.0, 0.2, 0.02, 0.002, 0.0005)
_NOISE = 1e-5  # of an image's largest logit: changes below are rounding, and tell nothing about a gradient
_ULPS = 32  # a predicted change of so many roundings shows in float32, unless the function is constant
_ALONE = 16  # images that are also passed one at a time
_KERNELS = 0.01  # of its norm: by how much a gradient may differ from batch to batch
_BAND = 20.0  # times: how far the median change may be from the one that the gradient predicts


def gradients(subject: Subject) -> Finding:
    """Finite, not zero, the same in any batch, and true, at the images and within the radius."""
    if subject.logits.shape[1] < 2:
        return None, "One class: there is nothing to attack."
    images = subject.images
    targets = subject.logits.argmax(dim=1) if subject.labels is None else subject.labels.long()
    radius = float(subject.radius) if subject.radius is not None else 4 / GREY_LEVELS
    ball = f"points inside the ball of {radius:.4g}"
    found = []
    try:
        for words, loss in (("the cross entropy", _cross_entropy), ("the margin", _margin)):
            gradient = _gradient(subject, loss, images, targets)
            if gradient is None:
                return False, "No gradient reaches the images: the logits do not depend on them."
            found.append((f"{words} at the images", gradient))
            failure, note = _dead(found)
            if failure:
                return False, failure
        ascent = found[0][1]
        with _without_tf32():
            seen = gradients_in_the_ball(subject, targets, ascent, radius)
    except RuntimeError as error:
        return False, f"No gradient reaches the images: {first_line(error)}"
    found.append((f"the cross entropy at {ball}", seen.values[0]))
    failure, note = _dead(found)
    if failure:
        return False, failure
    if not subject.independent:  # two forwards then differ by more than the step
        return True, f"Finite and not zero (steps along them not compared), at the images and within the radius.{note}"
    why = _of_the_batch(subject, targets, found[1][1])
    if why:
        return False, why
    longest = min(radius, 1.0) if subject.norm == "Linf" else None
    first = slice(subject.batch_size)  # one batch tells: this is about the model and not about single images
    inside = _moved(images[first], radius, subject.norm)
    # Levels of grey, as in a file, are where quantisers have theirs. They do not count alone: where an image is flat, a
    # layer that normalises is too steep for any step.
    grey = (images[first] * GREY_LEVELS).round() / GREY_LEVELS
    with _without_tf32():
        why = gradient_error(subject.model, inside, targets[first], longest, subject.rounding)
        if why:
            at_images = gradient_error(subject.model, grey, targets[first], longest, subject.rounding)
            return False, f"At the images, {at_images}" if at_images else f"At {ball}, {why}"
        right, why = false_gradients(subject, seen, targets, ascent, radius)
    if not right:
        return right, why
    return True, f"Finite, not zero and true, at the images and within the radius.{note}"


def _dead(found: list[tuple[str, Tensor]]) -> tuple[str, str]:
    """Why these gradients, by what they are of and where, are nothing to follow, and what is said if they are not."""
    zero = []
    for words, gradient in found:
        size = gradient.flatten(1).abs().amax(dim=1)
        bad = int((~torch.isfinite(size)).sum())
        if bad:
            return f"The gradient of {words} is inf or nan for {bad} of {len(size)}.", ""
        dead = int((size == 0).sum())
        if dead > _DEAD * len(size):
            return (
                f"The gradient of {words} is zero for {dead} of {len(size)}: attacks have nothing to "
                f"follow. Remove what has no derivative (rounding, thresholds), or scale the logits down."
            ), ""
        if dead:
            zero.append(f"{dead} of {len(size)} for {words}")
    return "", f" Zero: {'; '.join(zero)}." if zero else ""


def _moved(images: Tensor, radius: float, norm: str) -> Tensor:
    """A random point in the ball of each image; the generator is its own, as the user's random numbers stay."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2 - 1
    if norm == "L2":
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (images + radius * noise.to(images.device, images.dtype)).clamp(0, 1)


def _of_the_batch(subject: Subject, targets: Tensor, gradient: Tensor) -> str:
    """Why an image has another gradient of the margin in another batch; empty if it has not."""
    limit = max(_KERNELS, _ULPS * subject.rounding)
    half = max(1, subject.batch_size // 2)
    for words, count, size in (("one at a time", _ALONE, 1), (f"in batches of {half}", subject.batch_size, half)):
        images, expected = subject.images[:count], gradient[:count].flatten(1)
        other = _gradient(subject, _margin, images, targets[:count], size)
        apart = expected.norm(dim=1) if other is None else (other.flatten(1) - expected).norm(dim=1)
        wrong = int((apart > limit * expected.norm(dim=1)).sum())
        if wrong > len(images) / 2:  # single ones have ties, which kernels resolve otherwise
            return (
                f"Passed {words}, {wrong} of {len(images)} images have another gradient: attacks meet batches of many "
                f"sizes. Remove what depends on the size of a batch."
            )
    return ""


def _gradient(
    subject: Subject,
    loss: Callable[[Tensor, Tensor], Tensor],
    points: Tensor,
    targets: Tensor,
    batch_size: int | None = None,
) -> Tensor | None:
    """The gradient of a loss at each point; None if the loss does not depend on the points."""
    found = []
    size = batch_size or subject.batch_size
    for batch, target in zip(torch.split(points, size), torch.split(targets, size), strict=True):
        with torch.enable_grad():
            leaf = batch.detach().clone().requires_grad_()
            value = loss(subject.model(leaf).float(), target)
            gradient: Tensor | None = torch.autograd.grad(value, leaf, allow_unused=True)[0]
        if gradient is None:
            return None
        found.append(gradient)
    return torch.cat(found)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def _margin(logits: Tensor, targets: Tensor) -> Tensor:
    return margins(logits, targets)[0].sum()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 on a GPU too: TF32, which convolutions use by default, is a quantiser of its own for small steps."""
    cudnn: Any = torch.backends.cudnn
    legacy = (cudnn, torch.backends.cuda.matmul)
    places: list[tuple[Any, str, Any]] = [(place, "allow_tf32", False) for place in legacy]
    try:
        before = [getattr(place, name) for place, name, _ in places]
    except RuntimeError:  # the caller uses `fp32_precision`, which torch lets nobody mix with the flags
        kernels = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
        places = [(kernel, "fp32_precision", "ieee") for kernel in kernels]
        before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def gradient_error(model: nn.Module, points: Tensor, targets: Tensor, radius: float | None, rounding: float) -> str:
    """What is wrong with the gradients of the margin, judged by steps along their signs; empty if nothing is.

    Margins, as the cross entropy is flat where a model is sure. A gradient is true if the median change is about the
    predicted one for some step: long steps leave the linear range of a network, short ones drown in rounding. A short
    step that changes far more than predicted has met a jump.
    """
    with torch.enable_grad():
        leaf = points.detach().clone().requires_grad_()
        logits = model(leaf).float()
        (gradient,) = torch.autograd.grad(_margin(logits, targets), leaf)
    # Against the same kernels: a forward that records gradients may round in another way.
    logits = model(points.clone()).float()
    before = margins(logits, targets)[0]
    largest = logits.double().abs().amax(dim=1)
    steps = [step / GREY_LEVELS for step in _STEPS] + ([] if radius is None else [radius])
    # A model may clamp: steps stay among the images, even where these are not in [0, 1], which has a check of its own.
    low, high = min(0.0, float(points.min())), max(1.0, float(points.max()))
    medians: dict[float, float] = {}
    for step in steps:
        moved = (points + step * gradient.sign()).clamp(low, high)
        # Of the step that was made, after clamping and rounding.
        predicted = (gradient.double() * (moved.double() - points.double())).flatten(1).sum(dim=1)
        actual = margins(model(moved.clone()).float(), targets)[0].double() - before.double()
        visible = predicted > _ULPS * rounding * largest
        still = int((actual[visible] == 0).sum())
        if int(visible.sum()) > len(points) / 4 and still > int(visible.sum()) / 2:
            return (
                f"a step of {step * GREY_LEVELS:.4g}/{GREY_LEVELS} along the gradient changes nothing for {still} of "
                f"{int(visible.sum())}: the model is constant in steps, and its gradient is made up. Remove the "
                f"quantiser."
            )
        judged = torch.maximum(predicted.abs(), actual.abs()) > max(_NOISE, rounding) * largest
        if int(judged.sum()) > len(points) / 2:
            # A prediction of exactly 0 would make the ratio infinite or, without a change, no number.
            ratios = actual[judged] / predicted[judged].clamp(min=torch.finfo(torch.float64).tiny)
            medians[step] = float(ratios.median())
    jumps = [median for step, median in medians.items() if step < steps[0] and median > _BAND]
    true = [median for median in medians.values() if 1 / _BAND <= median <= _BAND]
    if jumps or (medians and not true):
        nearest = jumps[0] if jumps else min(medians.values(), key=lambda median: abs(median - 1))
        return (
            f"steps along the gradient change the margin by {nearest:.2g} times what it predicts: attacks would follow "
            f"another function. Remove what masks the gradient."
        )
    return ""
