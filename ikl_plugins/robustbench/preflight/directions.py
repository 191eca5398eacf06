"""Whether a gradient is that of the function: beside the function's own changes along random directions.

For logits z(x), a direction d and weights w of the logits, w (z(x + h d) - z(x)) / h is what the gradient of w z
predicts as its product with d. Where a copy of the model computes in float64, both sides are exact but for rounding:
one direction then tells a gradient from another that differs in any part, whatever part that is, if a thousandth of the
gradient's energy is there. On one batch there is a second direction, along a random rectangle, of some channels, or
single pixels in it: for parts where the gradient is small, which attacks for L-infinity follow by its sign.

Each image is looked at once: at random within half a grey level of itself, at random in the ball, or where a step along
the sign of the gradient leads; with the weights of the cross entropy, and with those of the margin, of a single logit
or random ones. What looks wrong is looked at again, at other points and with steps to both sides: at a kink they bend,
z(x + h d) + z(x - h d) - 2 z(x) != 0, by as much as they err, and nothing is concluded.

The cost: two forwards and backwards for each image, and two forwards in float64. Where there is no copy in float64,
four steps to both sides in the model's own precision take their place, 9 forwards, and the limits are wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .subject import GREY_LEVELS, Subject

__all__ = ["Gradients", "false_gradients", "gradients_in_the_ball", "margins"]

_KINDS = 3  # of points, and of weights
_COARSE = 0.1  # in units of what is measured: what bends more, or drowns in rounding, tells nothing
_TINY = torch.finfo(torch.float64).tiny


class Gradients(NamedTuple):
    """At one point for each image.

    Attributes:
        which: numbers of the images (N,).
        points: (N, channels, H, W).
        logits: (N, C), float64.
        weights: two of the logits, that of the cross entropy first, each (N, C), float64.
        values: the gradients of the logits so weighted, float32.
    """

    which: Tensor
    points: Tensor
    logits: Tensor
    weights: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]


class _Arithmetic(NamedTuple):
    """How to take differences.

    Attributes:
        forward: the function.
        dtype: of its images.
        steps: per pixel; the one that errs least is taken for each image.
        rounding: of a logit, relative to the largest of an image.
        both_sides: steps also back, which shows kinks.
        error: what a difference that is right may be off by, relative to its size,
        typical: and so much on half of the images.
        share: of the images: so many may look wrong twice.
    """

    forward: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    steps: Sequence[float]
    rounding: float
    both_sides: bool
    error: float
    typical: float
    share: float


class _Seen(NamedTuple):
    """For each image the largest error, whether one could be judged, and whether one was wrong."""

    errors: Tensor
    judged: Tensor
    wrong: Tensor


def gradients_in_the_ball(subject: Subject, targets: Tensor, ascent: Tensor, radius: float) -> Gradients:
    """Gradients at points of all kinds, by the number of the image.

    Args:
        subject: a model with logits.
        targets: class indices (N,).
        ascent: gradient of the cross entropy at the images.
        radius: of the ball.
    """
    everything = torch.arange(len(targets), device=targets.device)
    return _gradients(subject, everything, targets, ascent, radius, torch.Generator().manual_seed(0))


def false_gradients(
    subject: Subject, seen: Gradients, targets: Tensor, ascent: Tensor, radius: float
) -> tuple[bool | None, str]:
    """Whether the gradients are right, None where no difference tells, and what is wrong.

    Args:
        subject: a model whose logits depend on nothing but the image.
        seen: what :func:`gradients_in_the_ball` gave.
        targets, ascent, radius: as there.
    """
    count = len(targets)
    for arithmetic in _arithmetics(subject):
        generator = torch.Generator().manual_seed(1)
        first = _compare(subject, arithmetic, seen, generator)
        if int(first.judged.sum()) < count / 2:
            continue
        suspects = seen.which[first.wrong]
        if len(suspects) > arithmetic.share * count:
            anew = _gradients(subject, suspects, targets, ascent, radius, generator)
            again = _compare(subject, arithmetic._replace(both_sides=True), anew, generator)
            if int(again.judged.sum()) < len(suspects) / 2:
                continue
            wrong = int(again.wrong.sum())
            if wrong > arithmetic.share * count:
                size = float(first.errors[suspects].median())
                return False, _why(f"by {size:.2g} of its size on {wrong} of {count} images")
        typical = float(first.errors[first.judged].median())
        if typical > arithmetic.typical:
            return False, _why(f"by {typical:.2g} of its size on half of the images")
        return True, ""
    return None, "The function is too rough, or too coarsely computed, to tell its gradient from another one."


def _why(how_much: str) -> str:
    return (
        f"The gradient is not that of the function: random steps change the logits otherwise than it predicts, "
        f"{how_much}. Remove what cuts or changes the gradient."
    )


def _arithmetics(subject: Subject) -> list[_Arithmetic]:
    fine = subject.rounding < 1e-6  # the gradient comes from the model's own precision
    found = []
    exact = subject.in_float64
    if exact is not None:
        limits = (0.05, 0.02, 0.02) if fine else (0.5, 0.3, 0.25)
        found.append(_Arithmetic(exact, torch.float64, (2.0**-20,), 1e-14, False, *limits))
    if fine:
        steps = (2.0**-12, 2.0**-10, 2.0**-8, 2.0**-6)
        found.append(_Arithmetic(subject.model, torch.float32, steps, 1e-6, True, 0.5, 0.35, 0.15))
    return found


def _gradients(
    subject: Subject, which: Tensor, targets: Tensor, ascent: Tensor, radius: float, generator: torch.Generator
) -> Gradients:
    parts = []
    for chosen in torch.split(which, subject.batch_size):
        points = _points(subject, chosen, ascent[chosen], radius, generator)
        weights, values = [], []
        for weigh in (_cross_entropy, _something_else(chosen, generator)):
            with torch.enable_grad():
                leaf = points.clone().requires_grad_()
                logits = subject.model(leaf).float()
                weights.append(weigh(logits.detach(), targets[chosen]))
                values.append(torch.autograd.grad(logits, leaf, weights[-1])[0])
        parts.append((chosen, points, logits.detach(), *weights, *values))
    chosen, points, logits, *pairs = map(torch.cat, zip(*parts, strict=True))
    first, second = pairs[0].double(), pairs[1].double()
    return Gradients(chosen, points, logits.double(), (first, second), (pairs[2], pairs[3]))


def _points(subject: Subject, chosen: Tensor, ascent: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Near the images, anywhere in the ball, or a step along the gradient."""
    images = subject.images[chosen]
    noise = _random(images, generator)
    wide, along = noise, ascent.sign()
    if subject.norm != "Linf":
        wide, along = (F.normalize(vector.flatten(1), dim=1).view_as(noise) for vector in (noise, ascent))
    near = noise / (2 * GREY_LEVELS)
    kind = (chosen % _KINDS).view(-1, 1, 1, 1)
    points = images + torch.where(kind == 0, near, torch.where(kind == 1, radius * wide, radius * along + near))
    # Off the ends of the range, where a model may clamp: a function has two derivatives there. Mirrored into it,
    # as many pixels at one end would be ties for a maximum or a median.
    low, high = min(0.0, float(subject.images.min())), max(1.0, float(subject.images.max()))
    room = 1e-3 * (high - low)
    inside = high - (high - (low + (points - low).abs())).abs()
    return (low + room + (1 - 2e-3) * (inside.clamp(low, high) - low)).detach()


def _random(images: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1]; the generator is its own, as the user's random numbers stay."""
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float32) * 2 - 1
    return noise.to(images.device, images.dtype)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.softmax(dim=1) - F.one_hot(targets, logits.shape[1])


def _something_else(chosen: Tensor, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Of the margin, of one logit, or random: by the number of the image.

    They sum to 0, as those of any attack's loss: a shift of all logits of an image need not be recorded.
    """

    def weights(logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        kind = (chosen // _KINDS % _KINDS).unsqueeze(1)
        margin = F.one_hot(margins(logits, targets)[1], classes).float() - F.one_hot(targets, classes)
        single = F.one_hot(chosen % classes, classes).float()
        random = torch.randn(logits.shape, generator=generator).to(logits.device)
        found = torch.where(kind == 0, margin, torch.where(kind == 1, single, random))
        return found - found.mean(dim=1, keepdim=True)

    return weights


def margins(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the largest other logit is above the target's, and whose it is."""
    own = logits.gather(1, targets[:, None])
    others, best = logits.scatter(1, targets[:, None], -torch.inf).max(dim=1)
    return others - own[:, 0], best


def _compare(subject: Subject, arithmetic: _Arithmetic, seen: Gradients, generator: torch.Generator) -> _Seen:
    parts = []
    for number, places in enumerate(torch.split(torch.arange(len(seen.which)), subject.batch_size)):
        points, own = seen.points[places], seen.logits[places]
        logits = arithmetic.forward(points.to(arithmetic.dtype, copy=True)).double()
        same = (own - logits).abs().amax(dim=1) <= 10 * subject.tolerance(logits)
        largest = logits.abs().amax(dim=1)
        directions = [_random(points, generator)]
        if number == 0:
            directions.append(_random(points, generator) * _part(points, generator))
        errors, wrongs = [], []
        for direction in directions:
            steps = _differences(arithmetic, points, logits, direction)
            for weights, gradient in zip(seen.weights, seen.values, strict=True):
                error, unsure = _error(
                    arithmetic, steps, weights[places], gradient[places].double(), direction.double(), largest
                )
                judged = same & (unsure < _COARSE)
                errors.append(torch.where(judged, error, -1.0))
                wrongs.append(judged & (error > arithmetic.error + 4 * unsure))
        error = torch.stack(errors).amax(dim=0)
        parts.append((error, error >= 0, torch.stack(wrongs).any(dim=0)))
    return _Seen(*map(torch.cat, zip(*parts, strict=True)))


def _differences(
    arithmetic: _Arithmetic, points: Tensor, logits: Tensor, direction: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Derivative of the logits along a direction by each step, and by how much it differs to either side."""
    points, direction = points.to(arithmetic.dtype), direction.to(arithmetic.dtype)
    found = []
    for step in arithmetic.steps:
        ahead = arithmetic.forward(points + step * direction).double()
        if arithmetic.both_sides:
            behind = arithmetic.forward(points - step * direction).double()
            found.append(((ahead - behind) / (2 * step), (ahead + behind - 2 * logits) / (2 * step)))
        else:
            found.append(((ahead - logits) / step, torch.zeros_like(logits)))
    return found


def _error(
    arithmetic: _Arithmetic,
    steps: list[tuple[Tensor, Tensor]],
    weights: Tensor,
    gradient: Tensor,
    direction: Tensor,
    largest: Tensor,
) -> tuple[Tensor, Tensor]:
    """By how much prediction and difference are apart, and how unsure that is, relative to the size of both."""
    each = (gradient * direction).flatten(1)
    predicted = each.sum(dim=1)
    # Rounding of a gradient is relative to what is around, not to each of its entries.
    blur = 1e-4 * gradient.square().flatten(1).mean(dim=1).sqrt() * direction.flatten(1).norm(dim=1)
    error, unsure = torch.zeros_like(predicted), torch.full_like(predicted, torch.inf)
    for step, (change, bend) in zip(arithmetic.steps, steps, strict=True):
        actual = (weights * change).sum(dim=1)
        noise = arithmetic.rounding / step * largest * weights.abs().sum(dim=1)
        size = (torch.maximum(actual.abs(), each.norm(dim=1)) + blur + noise).clamp(min=_TINY)
        doubt = ((weights * bend).sum(dim=1).abs() + noise) / size
        error = torch.where(doubt < unsure, (predicted - actual).abs() / size, error)
        unsure = torch.minimum(unsure, doubt)
    return error, unsure


def _part(points: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each image: a rectangle, of any size and of some channels or all, or single pixels in it."""
    count, channels, height, width = points.shape

    def interval(size: int) -> Tensor:
        length = (size ** torch.rand(count, 1, generator=generator)).round()
        start = (torch.rand(count, 1, generator=generator) * (size - length + 1)).floor()
        place = torch.arange(size)
        return (place >= start) & (place < start + length)

    density = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, 1.0, 0.1)
    part = (
        interval(channels).view(count, -1, 1, 1)
        & interval(height).view(count, 1, -1, 1)
        & interval(width).view(count, 1, 1, -1)
        & (torch.rand(points.shape, generator=generator) < density)
    )
    return part.to(points.device, points.dtype)
