"""The inner maximisation of adversarial training: projected gradient ascent in pixel space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check
from .._value_checks import check_values, largest
from ..functional import dkl_settings, evaluate, ikl_settings
from .modes import frozen_statistics, model_mode
from .schedule import (
    BudgetRow,
    Strength,
    check_budget,
    check_epoch,
    check_radius,
    check_strength,
    largest_distance,
    pixel_number,
    ramp,
    row_of,
)

__all__ = ["MODEL_MODES", "NORMS", "OBJECTIVES", "PGD", "RANDOM_STARTS"]

NORMS = ("linf", "l2")
RANDOM_STARTS = ("normal", "uniform", "none")
OBJECTIVES = ("cross_entropy", "ikl", "margin", "soft_cross_entropy")
MODEL_MODES = ("eval", "train")

Objective = Callable[[Tensor, Tensor], Tensor]  # of logits and the adversarial images that they are of

_NORMAL_START = 0.001  # standard deviation of the authors' start, in pixel units
_TINY = 1e-12  # keeps a gradient of 0 from being divided by 0
# In float16 gradients of pixels are so small that many become 0; the objective is scaled up until one overflows.
_FIRST_SCALE = 2.0**12
_LOWER_SCALE = 2.0**-4


class PGD:
    r"""Projected gradient descent: images in the ball of radius eps around the natural ones that the model gets wrong.

    From a start ``x_0`` near the natural images ``x`` it takes steps up the objective ``L`` and back into the ball::

        linf:  x_{i+1} = clip(x_i + step_size * sign(dL/dx_i))         l2:  x_{i+1} = clip(x_i + step_size * g / |g|_2)

    where ``clip`` projects onto the ball and then onto [0, 1].

    Args:
        eps: radius in pixel units, a number or text such as ``'8/255'``. At most 1 for L-inf; for L2 at most the
            largest distance between two images, the root of their number of values (55 for 32x32 RGB).
        steps: number of steps, at least 1; with ``step_size``, instead of ``budget``.
        step_size: length of a step in pixel units at the full ``eps``; while eps is smaller it shrinks with it.
        budget: ``'low'``, ``'high'``, ``'high_as_executed'`` (see :data:`BUDGETS`), or rows (until, steps, step size /
            eps), the first a fraction of the training: how steps and step size change over the epochs.
        eps_ramp: fraction of the training over which eps grows linearly from 0; 0 for none, 1 for all of it, as in the
            authors' scripts. Epochs are counted from 1, so that the last one of the ramp has the full eps.
        norm: ``'linf'`` or ``'l2'``.
        random_start: ``'normal'`` adds 0.001 N(0, 1), not projected before the first step (the authors' and TRADES'
            start); ``'uniform'`` draws from the ball; ``'none'`` starts at the natural images.
        objective: ``'soft_cross_entropy'`` to the natural predictions, whose gradient is that of KL divergence;
            ``'ikl'``, the same plus the weighted MSE of the logit differences, each with weight 1; ``'cross_entropy'``
            to the labels; ``'margin'``, the largest logit of the other classes minus that of the label, without a
            bound: that of Carlini and Wagner. The first two may go away from a teacher's predictions instead.
        model_mode: ``'eval'``, or ``'train'`` for the statistics of the batch and dropout. Running statistics stay as
            they are in both.

    Raises:
        TypeError: a number that is none.
        ValueError: a value out of range, an unknown name, or a start from which the objective has no gradient.

    Note:
        Gradients are taken with respect to the images alone: no parameter's ``.grad`` is touched, and the attack works
        under ``torch.no_grad()``, too. Each module's training flag is restored. Under autocast the model runs as
        autocast decides, the objective in float32; for float16 it is scaled, so that small gradients are not lost. On a
        device values are checked later (see :mod:`ikl_plugins._value_checks`): the attack never waits for it.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, equation 1 and section
        2.1; Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019 (TRADES),
        algorithm 1; Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, algorithm 1; Huang et al.,
        Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023 (AdaAD).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ikl_plugins.adversarial import PGD
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
        >>> images = torch.full((4, 3, 1, 1), 0.5)
        >>> attack = PGD(eps="8/255", steps=10, step_size="2/255")
        >>> adversarial = attack(model, images, labels=torch.tensor([0, 1, 0, 1]))
        >>> bool((adversarial - images).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    def __init__(
        self,
        *,
        eps: float | str,
        steps: int | None = None,
        step_size: float | str | None = None,
        budget: str | Sequence[Sequence[float]] | None = None,
        eps_ramp: float = 0.0,
        norm: str = "linf",
        random_start: str = "uniform",
        objective: str = "cross_entropy",
        model_mode: str = "eval",
    ) -> None:
        for kind, value, known in (
            ("norm", norm, NORMS),
            ("random_start", random_start, RANDOM_STARTS),
            ("objective", objective, OBJECTIVES),
            ("model_mode", model_mode, MODEL_MODES),
        ):
            if value not in known:
                raise ValueError(check.unknown_name_message("PGD", f"`{kind}`", str(value), known))
        self.norm = norm
        self.random_start = random_start
        self.objective = objective
        self.model_mode = model_mode
        self.eps = pixel_number("PGD", "eps", eps)
        largest = 1.0 if norm == "linf" else math.inf
        check_radius("eps", self.eps, eps, largest)
        self.eps_ramp = check.check_number("PGD", "eps_ramp", eps_ramp)
        if self.eps_ramp > 1:
            raise ValueError(
                f"PGD: `eps_ramp` must be a fraction from 0 to 1, got {eps_ramp}. Pass 1.0 for all epochs."
            )
        if random_start == "none" and not self.needs_labels:
            raise ValueError(
                f"PGD: `random_start` must be 'normal' or 'uniform' with objective='{objective}', got 'none'. "
                f"It has no gradient at natural images."
            )
        if (budget is None) == (steps is None) or (steps is None) != (step_size is None):
            given = {"steps": steps, "step_size": step_size, "budget": budget}
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(
                f"PGD: `steps` and `step_size` must be given, or `budget`, got {shown}. "
                f"Write steps=10, step_size='2/255'."
            )
        if budget is None:
            size = pixel_number("PGD", "step_size", step_size)
            check_radius("step_size", size, step_size, largest)
            self.budget: tuple[BudgetRow, ...] = (
                BudgetRow(1.0, check.check_integer("PGD", "steps", steps), size / self.eps),
            )
        else:
            self.budget = check_budget("PGD", budget)

    @property
    def changes(self) -> bool:
        """Whether the strength depends on the epoch."""
        return self.eps_ramp > 0 or len(self.budget) > 1

    def strength(self, epoch: int | None = None, epochs: int | None = None) -> Strength:
        """What the attack may do in an epoch.

        Args:
            epoch: number of the epoch, 1 for the first; needed where the strength changes over the epochs.
            epochs: how many epochs the training has.

        Returns:
            Radius, number of steps and step size.

        Raises:
            ValueError: an epoch that is missing or out of range.

        Example:
            >>> attack = PGD(eps=0.5, budget="high", eps_ramp=1.0)
            >>> [attack.strength(epoch, 4) for epoch in (1, 4)]
            [Strength(eps=0.125, steps=2, step_size=0.125), Strength(eps=0.5, steps=5, step_size=0.25)]
        """
        eps, row = self.eps, self.budget[0]
        if self.changes:
            epoch, epochs = check_epoch("PGD.strength", epoch, epochs)
            eps *= ramp(epoch, epochs, self.eps_ramp)
            row = row_of(self.budget, epoch, epochs)
        return Strength(eps, row.steps, eps * row.relative_step)

    @property
    def needs_labels(self) -> bool:
        """Whether the objective is pulled away from the labels, so that a call must give them."""
        return self.objective in ("cross_entropy", "margin")

    @property
    def uses_prior(self) -> bool:
        """Whether a class prior, if there is one, weighs the objective."""
        return self.objective == "ikl"

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        forward: Callable[[Tensor], Any] | None = None,
        labels: Tensor | None = None,
        natural_logits: Tensor | None = None,
        teacher: Callable[[Tensor], Any] | None = None,
        class_prior: Tensor | None = None,
        strength: Strength | None = None,
        generator: torch.Generator | None = None,
        check_values: bool = True,
    ) -> Tensor:
        """Adversarial images.

        Args:
            model: the network, not wrapped for several ranks; its modes are changed and restored.
            images: natural images, floating, shape (N, C, H, W) or (N, ...), values in [0, 1].
            forward: from such images to logits (N, classes); by default the model itself. The place for a
                normalisation.
            labels: class indices (N,), where :attr:`needs_labels`.
            natural_logits: logits (N, classes) of the natural images for the other objectives, a teacher's for one. By
                default they are computed here, once, in the mode of the attack.
            teacher: in their place a differentiable function from such images to logits: these objectives go away from
                what it predicts of the adversarial images themselves. ``'soft_cross_entropy'`` then has the gradient of
                KL(teacher || model), through both, as in AdaAD.
            class_prior: rows (N, classes), where :attr:`uses_prior`; by default the natural predictions weigh.
            strength: what the attack may do; by default :meth:`strength` without an epoch.
            generator: of the random start, on the device of the images; by default torch's own.
            check_values: False for images that :class:`PixelSpace` has checked.

        Returns:
            Images of the same shape, within eps of the natural ones and within [0, 1], without gradient.

        Raises:
            TypeError: images that are not floating, or labels that are not integers.
            ValueError: images outside [0, 1], a radius beyond every image, missing labels, a model that is not
                differentiable with respect to its input, or logits that are not finite.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"PGD: `model` must be a torch.nn.Module, got {type(model).__name__}. A function goes to `forward`."
            )
        eps, steps, step_size = self.strength() if strength is None else check_strength(strength)
        self._check_images(images, eps, values=check_values)
        check.check_has_values("PGD", "images", images, next(model.parameters(), None))
        forward = model if forward is None else forward
        graph, mode = torch.inference_mode(False), model_mode(model, self.model_mode)
        try:
            with graph, torch.enable_grad(), mode, frozen_statistics(model):
                images = _recordable(images.detach())
                if self.needs_labels:
                    objective = self._away_from_labels(labels)
                else:
                    objective = self._away_from_predictions(forward, images, natural_logits, teacher, class_prior)
                low, high = (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)
                adversarial = self._start(images, low, high, eps, generator)
                scale: _Float16Scale | None = None
                for step in range(steps):
                    if scale is not None and step == steps - 1:
                        scale.settle()
                    adversarial.requires_grad_()
                    value, gradient, scale = _value_and_gradient(forward, objective, adversarial, scale)
                    adversarial = self._step(adversarial.detach(), gradient, images, low, high, eps, step_size)
        finally:
            # Under autocast older releases of torch keep the natural pass's copies of the weights, which have no graph.
            torch.clear_autocast_cache()
        self._check_finite(value, gradient, scale)
        return adversarial

    def _check_finite(self, value: Tensor, gradient: Tensor, scale: _Float16Scale | None) -> None:
        """Refuses what the last step has met; the sign of NaN is 0, so that the images alone would not show it."""
        bound = largest(gradient) if scale is None else scale.bound

        def judge(objective: float, bound: float) -> str | None:
            if math.isfinite(objective) and math.isfinite(bound):
                return None
            return (
                f"PGD: objective '{self.objective}' and its gradient must stay finite, got the value {objective}. "
                f"Look for a layer that overflows."
            )

        if not torch.compiler.is_compiling():
            check_values("PGD", "objective", (value, bound.to(value.dtype)), judge)

    def _check_images(self, images: Tensor, eps: float, *, values: bool) -> None:
        check.check_floating("PGD", "images", images, "Divide by 255.")
        if images.dim() < 2 or images.numel() == 0:
            raise ValueError(
                f"PGD: `images` must be a batch (N, C, H, W) of images, got shape {tuple(images.shape)}. "
                f"Skip empty batches."
            )
        if values and not torch.compiler.is_compiling():
            check_values("PGD", "images", torch.aminmax(images.detach()), _judge_pixels)
        check_radius("eps", eps, eps, largest_distance(self.norm, images[0].numel()))

    def _away_from_labels(self, labels: Tensor | None) -> Objective:
        """From logits to the objective, summed over the batch; the labels are checked with the first logits."""
        targets: Tensor | None = None

        def objective(logits: Tensor, _: Tensor) -> Tensor:
            nonlocal targets
            if targets is None:
                checked = check.check_targets("PGD", labels, logits.shape[1], logits, name="labels")
                targets = check.safe_index(_recordable(checked), logits.shape[1])
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.objective == "margin":
                return _margins(wide, targets).sum()
            return F.cross_entropy(wide, targets, reduction="sum")

        return objective

    def _away_from_predictions(
        self,
        forward: Callable[[Tensor], Any],
        images: Tensor,
        natural_logits: Tensor | None,
        teacher: Callable[[Tensor], Any] | None,
        class_prior: Tensor | None,
    ) -> Objective:
        """The same for the objectives that need no labels."""
        if teacher is not None:
            natural_logits = None
        elif natural_logits is None:
            with torch.no_grad():
                natural_logits = _logits(forward(images))
        else:
            way_out = "Leave them out, or pass those of `images`."
            check.check_floating("PGD", "natural_logits", natural_logits, way_out)
            check.check_has_values("PGD", "natural_logits", natural_logits, images)
            if natural_logits.dim() != 2:
                shape = tuple(natural_logits.shape)
                raise TypeError(f"PGD: `natural_logits` must have shape (N, classes), got {shape}. {way_out}")
        fixed: Any = None if natural_logits is None else natural_logits.detach()
        if self.uses_prior:
            settings = ikl_settings(alpha=1.0, beta=1.0, temperature=1.0, weight_temperature=1.0, reduction="sum")
        else:  # DKL has KL's gradients of both sides; the MSE is the teacher's
            beta = 0.0 if teacher is None else 1.0
            settings = dkl_settings(alpha=1.0, beta=beta, temperature=1.0, reduction="sum")
        checked = False

        def objective(logits: Tensor, adversarial: Tensor) -> Tensor:
            nonlocal checked
            reference = fixed if teacher is None else _logits(teacher(adversarial))
            if not checked:
                check.check_logits("PGD", logits, reference)
                if class_prior is not None:
                    check.check_class_prior("PGD", class_prior, logits)
                checked = True
            return evaluate(logits, reference, class_prior if self.uses_prior else None, settings)[0]

        return objective

    def _start(
        self, images: Tensor, low: Tensor, high: Tensor, eps: float, generator: torch.Generator | None
    ) -> Tensor:
        # Drawn by logical position, so that the memory format does not decide who gets which number.
        options: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
        if generator is not None:  # torch.compile knows no generators, not even None
            options["generator"] = generator
        if self.random_start == "none":
            return images.clone()
        if self.random_start == "normal":
            return torch.add(images, torch.randn(images.shape, **options), alpha=_NORMAL_START)
        if self.norm == "linf":
            offset = torch.rand(images.shape, **options).mul_(2 * eps).sub_(eps)
        else:
            direction = torch.randn(images.shape, **options)
            radius = torch.rand(len(images), **options) ** (1.0 / images[0].numel())
            offset = direction * _per_image(eps * radius / _norms(direction), images)
        return torch.clamp((images + offset).to(images.dtype), low, high)

    def _step(
        self, adversarial: Tensor, gradient: Tensor, images: Tensor, low: Tensor, high: Tensor, eps: float, size: float
    ) -> Tensor:
        if self.norm == "linf":
            # The projections onto the ball and onto [0, 1] are one clamp, as the natural image lies in both.
            return torch.clamp(torch.add(adversarial, gradient.sign(), alpha=size), low, high)
        offset = adversarial - images + size * (gradient / _per_image(_norms(gradient), gradient))
        offset *= _per_image((eps / _norms(offset)).clamp_(max=1.0), images)
        # The way back into [0, 1] is one towards the natural image, so it stays in the ball.
        return (images + offset).clamp_(0, 1).to(images.dtype)

    def __repr__(self) -> str:
        names = ("eps", "budget", "eps_ramp", "norm", "random_start", "objective", "model_mode")
        return f"PGD({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _recordable(tensor: Tensor) -> Tensor:
    """The tensor; a copy if it was made in inference mode, as autograd cannot save that one."""
    made_in_inference_mode = not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if made_in_inference_mode else tensor


def _judge_pixels(low: float, high: float) -> str | None:
    if low >= 0 and high <= 1:
        return None
    return (
        f"PGD: `images` must lie in [0, 1], got values from {low:.4g} to {high:.4g}. "
        f"Normalise in the model or in `forward`."
    )


def _computes_in_float16(images: Tensor, logits: Tensor) -> bool:
    """Whether gradients of the pixels are, in parts, of float16; a model may have an autocast block of its own."""
    if torch.float16 in (images.dtype, logits.dtype):
        return True
    kind = images.device.type
    # Older releases of torch cannot compile the first question; whoever compiles has a device that knows autocast.
    if not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)):
        return False
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


class _Float16Scale:
    """A factor on the objective, lowered on the device after each gradient that overflows.

    The signs and directions that the steps take do not depend on it.
    """

    def __init__(self, images: Tensor) -> None:
        self.factor = images.new_full((), _FIRST_SCALE, dtype=torch.float32)
        self.bound = self.factor  # of the last gradient; infinite once one overflows that is not scaled up

    def adapted(self, gradient: Tensor) -> Tensor:
        """The gradient, with numbers where it had overflowed."""
        bound = largest(gradient).to(self.factor.dtype)
        finite = bound < torch.inf
        self.bound = torch.where(finite | (self.factor <= 1), bound, 0.0)
        self.factor = torch.where(finite, self.factor, self.factor * _LOWER_SCALE)
        self._finite = finite
        return gradient.nan_to_num_()

    def settle(self) -> None:
        """Before the last gradient: where the one before it overflowed, it is not scaled up, so as to tell why."""
        self.factor = torch.where(self._finite, self.factor, self.factor.clamp(max=1))


def _value_and_gradient(
    forward: Callable[[Tensor], Any],
    objective: Objective,
    adversarial: Tensor,
    scale: _Float16Scale | None,
) -> tuple[Tensor, Tensor, _Float16Scale | None]:
    """The objective's value at these images, its gradient of them, and the scale for the next step."""
    logits = _logits(forward(adversarial))
    if scale is None and _computes_in_float16(adversarial, logits):
        scale = _Float16Scale(adversarial)
    gradient = None
    if logits.requires_grad:
        value = objective(logits, adversarial)
        try:
            scaled = value if scale is None else value * scale.factor
            (gradient,) = torch.autograd.grad(scaled, adversarial, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "PGD: `model` must not use reentrant checkpointing, which hides the images' gradient. "
                "Set with_cp=False (OpenMMLab) or use_reentrant=False (torch)."
            ) from error
    if gradient is None:
        raise ValueError(
            "PGD: `model` must be differentiable, but its logits carry no gradient. Look for a detach() or no_grad()."
        )
    return value.detach(), gradient if scale is None else scale.adapted(gradient), scale


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError(
            f"PGD: `model` must return logits of shape (N, classes), got {_kind(output)}. "
            f"Name them: forward=lambda images: model(images)[0]."
        )
    return output


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    """The largest logit of the other classes minus that of the target, (N,): above 0 for what is misclassified."""
    if logits.shape[1] < 2:
        raise ValueError(
            "PGD: `model` must have at least 2 classes for objective='margin', got 1. Use 'cross_entropy'."
        )
    column = targets[:, None]
    return logits.scatter(1, column, -torch.inf).amax(1) - logits.gather(1, column)[:, 0]


def _kind(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _norms(rows: Tensor) -> Tensor:
    """The L2 norm of each image, (N,), never quite 0, in a dtype that knows numbers so small."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=wide)
    return norms.clamp_(min=_TINY)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.dim() - 1))
