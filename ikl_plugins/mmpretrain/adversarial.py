"""Adversarial training and robust validation of an ``ImageClassifier``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import MMLogger
from mmpretrain.models import CrossEntropyLoss, LabelSmoothLoss
from torch import Tensor, nn

from .. import _validation as check
from ..adversarial import PGD, AdversarialWeightPerturbation, frozen_statistics
from ..adversarial.weight_perturbation import is_sharded
from ..presets import RobustDistillation, robust_distillation
from .classifier import term_scalars
from .metrics import ROBUST_SCORE, RobustAccuracy
from .pixels import pixel_space
from .taught import TaughtClassifier

__all__ = ["AdversarialClassifier"]

_CALLER = "AdversarialClassifier"
_VIEWS = ("natural", "adversarial")
_REFERENCES = ("teacher", "student")


class _Batch(NamedTuple):
    """What the losses of a batch are made of, in AWP's pass and in the training's."""

    adversarial: Tensor
    natural: Tensor
    data_samples: list[Any]
    labels: Tensor | None
    taught: Tensor | None  # the teacher's logits of the view that it sees; None without a teacher
    taught_natural: Tensor | None  # those of the natural images, where they are needed


class AdversarialClassifier(TaughtClassifier):
    r"""An ``ImageClassifier`` that is trained on adversarial images, and validated on them if asked to.

    The loss of a batch, with natural images x and adversarial images x' that the attack makes from them::

        natural_weight * cross entropy(f(x), y) + robust_loss(student = f(x'), teacher = f(x))

    ``robust_loss=dict(type='KLLoss', loss_weight=6.0)`` is TRADES; with ``IKLLoss`` or ``GKLLoss`` it is the paper's.
    Backbone, neck and head stay where an ``ImageClassifier`` has them, and the plain config tests the checkpoint.

    With a frozen teacher t it is an adversarial distillation. The teacher's logits take the place of the natural ones,
    of v = x, or of v = x' where ``teacher_view='adversarial'``::

        natural_weight * cross entropy(f(x), y) + robust_loss(student = f(x'), teacher = t(v))
            + teacher_natural_weight * robust_loss(student = f(x), teacher = t(x))

    Args:
        *args: those of ``ImageClassifier``: backbone, neck, head; the head's loss is the natural cross entropy.
        attack: keywords of :class:`ikl_plugins.adversarial.PGD`, in pixel units whatever the data preprocessor does:
            the inner maximisation of the training. The objective ``'ikl'`` is weighed by the class prior of the robust
            loss if it has one. Those of a ``preset`` stay where it gives none.
        robust_loss: config of a loss registered by this package. Its class prior, if it has one, collects what the
            teacher's side predicts.
        preset: a published adversarial distillation, one of ``'ard'``, ``'rslad'`` and ``'adaad'``, or the same with
            IKL, ``'ard-ikl'`` and so on: what the other arguments are where they are not given. See
            :func:`ikl_plugins.presets.robust_distillation`.
        teacher: as of :class:`DistillationClassifier`, and so are ``teacher_ckpt``, ``teacher_input``,
            ``teacher_precision``, ``teacher_compile``, ``teacher_channels_last`` and ``teacher_val_batches``. None for
            none.
        teacher_ckpt: file or http(s) address of its checkpoint.
        teacher_input: what its inputs are.
        teacher_precision: ``'bf16'`` for the teacher alone.
        teacher_compile: runs it by ``torch.compile``.
        teacher_channels_last: lays it out channels last.
        teacher_val_batches: before training, log its accuracy on so many batches of the validation data.
        teacher_view: ``'natural'`` images for the teacher, or ``'adversarial'`` ones.
        teacher_natural_weight: weight of the robust loss of the natural images, at least 0.
        attack_reference: whose predictions the objectives ``'soft_cross_entropy'`` and ``'ikl'`` go away from:
            ``'teacher'``, of the view that it sees (its default where there is one), or ``'student'``, of the natural
            images.
        natural_weight: weight of the head's loss, at least 0; 1 by default, 0 in the presets.
        label_smoothing: replaces the head's cross entropy by one with labels of ``1 - label_smoothing``, and
            ``label_smoothing`` spread over all classes; in [0, 1).
        awp: keywords of :class:`ikl_plugins.adversarial.AdversarialWeightPerturbation`; None for none. The perturbation
            goes up the whole training loss, but for ``awp_averages_views``.
        augmented_weight: weight of the robust loss of the second view, where the data preprocessor is a
            ``TwoViewDataPreprocessor``; the natural loss weighs both views alike, the class prior collects the first.
        awp_averages_views: of two views the perturbation goes up the robust loss of both as one batch, whatever
            ``augmented_weight`` is, as in the authors' code.
        natural_first: the training forward takes the natural images first, as Wang et al. do, not the adversarial ones,
            as the authors do. BatchNorm's running statistics forget the first a little more.
        val_attack: keywords of the attack in validation and test; None for natural accuracy alone. ``RobustAccuracy``
            reads what it finds.
        val_seed: seed of the random start in validation, the same for each batch.
        pixel_range: value of a white pixel before the data preprocessor: 255, or 1 where the pipeline divides.
        channels_last: lays weights and images out channels last, which makes convolutions faster on CPUs and under
            mixed precision on GPUs. Checkpoints are the same.
        **kwargs: those of ``ImageClassifier``; mean, std and channel order are read from its ``data_preprocessor``.

    Raises:
        TypeError: a number that is none, or an unknown keyword.
        ValueError: a value out of range, a class prior of another class count than the head, a head that has no plain
            cross entropy to smooth.

    Note:
        Adversarial and natural images have batch statistics of their own. Natural logits for the attack are computed
        once. Both branches of the robust loss carry gradient. Schedules, class prior and AWP need
        ``custom_hooks = [dict(type='IKLHook')]``.

    References:
        Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, section 3.4 and algorithm 1; Zhang et al.,
        Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019 (TRADES); Wang et al., Better
        Diffusion Models Further Improve Adversarial Training, ICML 2023.
    """

    robust_loss: Any

    def __init__(
        self,
        *args: Any,
        attack: Mapping[str, Any] | None = None,
        robust_loss: Any = None,
        preset: str | None = None,
        teacher: str | Path | Mapping[str, Any] | nn.Module | None = None,
        teacher_ckpt: str | Path | None = None,
        teacher_input: Mapping[str, Any] | None = None,
        teacher_precision: str | None = None,
        teacher_compile: bool = False,
        teacher_channels_last: bool = False,
        teacher_val_batches: int = 1,
        teacher_view: str | None = None,
        teacher_natural_weight: float | None = None,
        attack_reference: str | None = None,
        natural_weight: float | None = None,
        label_smoothing: float = 0.0,
        awp: Mapping[str, Any] | None = None,
        augmented_weight: float | None = None,
        awp_averages_views: bool = False,
        natural_first: bool | None = None,
        val_attack: Mapping[str, Any] | None = None,
        val_seed: int = 0,
        pixel_range: float = 255.0,
        channels_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        method = self._method(preset)
        if method.attack and (attack is None or isinstance(attack, Mapping)):
            attack = _over(method.attack, attack or {})
        self.attack = _build("attack", PGD, attack)
        self.val_attack = None if val_attack is None else _build("val_attack", PGD, val_attack)
        if self.val_attack is not None and self.val_attack.changes:
            raise ValueError(
                f"{_CALLER}: `val_attack` must be the same in all epochs, got {self.val_attack}. "
                f"Leave `eps_ramp` to `attack`."
            )
        self.awp = None if awp is None else _build("awp", AdversarialWeightPerturbation, awp)
        if robust_loss is None and method.loss:
            robust_loss = {"type": method.loss, **method.keywords}
        self.robust_loss = self.build_loss("robust_loss", robust_loss)
        natural_weight = method.natural_weight if natural_weight is None else natural_weight
        self.natural_weight = check.check_number(_CALLER, "natural_weight", natural_weight)
        taught = {
            "teacher_view": teacher_view,
            "teacher_natural_weight": teacher_natural_weight,
            "attack_reference": attack_reference,
            "teacher_ckpt": teacher_ckpt,
            "teacher_input": teacher_input,
            "teacher_precision": teacher_precision,
            "teacher_compile": teacher_compile or None,
            "teacher_channels_last": teacher_channels_last or None,
        }
        self._set_teacher(method, taught, has_teacher=teacher is not None)
        if teacher is not None:
            self.hold_teacher(
                teacher,
                teacher_ckpt,
                teacher_input=teacher_input,
                teacher_precision=teacher_precision,
                teacher_compile=teacher_compile,
                teacher_channels_last=teacher_channels_last,
                teacher_val_batches=teacher_val_batches,
            )
        self.augmented_weight = augmented_weight
        if augmented_weight is not None:
            self.augmented_weight = check.check_number(_CALLER, "augmented_weight", augmented_weight)
        self.awp_averages_views = awp_averages_views
        self.natural_first = method.natural_first if natural_first is None else natural_first
        if label_smoothing:
            self._smooth_labels(label_smoothing)
        self.val_seed = val_seed
        self.pixels = pixel_space(self.data_preprocessor, pixel_range, caller=_CALLER)
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def loss(self, inputs: Tensor | Sequence[Tensor], data_samples: list[Any]) -> dict[str, Tensor]:
        """The losses of one batch, and what else the log shows.

        Args:
            inputs: what the data preprocessor hands on, shape (N, C, H, W), or two such views.
            data_samples: one for each image, with labels.

        Returns:
            ``loss_ce`` and ``loss_robust``, and ``loss_natural`` with a ``teacher_natural_weight``; beside them
            ``weighted_mse`` and ``soft_cross_entropy``, the two parts of the robust loss (of the first view), ``eps``,
            and where labels are hard ``adversarial_accuracy`` in percent.
        """
        self.check_epochs()
        self._restore()
        views = self._views(inputs)
        data_samples = data_samples * len(views)
        natural = self._arranged(torch.cat(views) if len(views) > 1 else views[0])
        labels = self._labels(data_samples)
        prior = self.robust_loss.class_prior
        rows = prior.prior(labels) if prior is not None and self.attack.uses_prior else None
        strength = self.attack.strength(self.epoch, self.epochs)
        by_teacher = self.attack_reference == "teacher" and not self.attack.needs_labels
        taught_natural = taught = self._taught_natural(natural)
        pixels = self.attack(
            self,
            self.pixels.to_pixels(natural),
            forward=self._pixel_logits,
            check_values=False,  # the pixel space has read them
            labels=labels,
            natural_logits=taught_natural if by_teacher and self.teacher_view == "natural" else None,
            teacher=self._taught_pixels if by_teacher and self.teacher_view == "adversarial" else None,
            class_prior=rows,
            strength=strength,
        )
        adversarial = self.pixels.to_inputs(pixels)
        if self.teacher_view == "adversarial":
            taught = self.teacher(adversarial)
        batch = _Batch(adversarial, natural, data_samples, labels, taught, taught_natural)
        if self.awp is not None and self.epoch is not None and self.awp.active(self.epoch):
            with frozen_statistics(self):
                apart = 1 if self.awp_averages_views else len(views)
                total, _ = self.parse_losses(self._losses(batch, apart, observe=False))
                self.awp.perturb(self, total)
        return {**self._losses(batch, len(views), observe=True), "eps": natural.new_full((), strength.eps)}

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None, **kwargs: Any) -> list[Any]:
        """Predictions of natural images, and of adversarial ones as ``robust_pred_score`` where ``val_attack`` and
        labels are given.
        """
        inputs = self._arranged(inputs)
        attacked = self.val_attack is not None and data_samples is not None and "gt_label" in data_samples[0]
        predictions: list[Any] = super().predict(inputs, data_samples, **kwargs)
        if self.val_attack is None or not attacked:
            return predictions
        adversarial = self.val_attack(
            self,
            self.pixels.to_pixels(inputs),
            forward=self._pixel_logits,
            check_values=False,
            labels=self.hard_labels(predictions, "`val_attack`", "leave it out"),
            generator=torch.Generator(inputs.device).manual_seed(self.val_seed),
        )
        scores = torch.softmax(self._pixel_logits(adversarial).float(), 1)
        for sample, score in zip(predictions, scores, strict=True):
            sample.set_field(score, ROBUST_SCORE)
        return predictions

    def attach(self, runner: Any) -> None:
        """Prepares for a run: weights that AWP has perturbed are restored before the optimizer's step, or behind it."""
        super().attach(runner)
        metrics = [] if runner.val_loop is None else runner.val_loop.evaluator.metrics
        if self.val_attack is None and any(isinstance(metric, RobustAccuracy) for metric in metrics):
            raise ValueError(
                f"{_CALLER}: `val_attack` must be given for RobustAccuracy. "
                f"Write val_attack=dict(eps='8/255', steps=20, step_size='2/255')."
            )
        if self.awp is None:
            return
        if is_sharded(runner.model):
            raise ValueError(
                f"{_CALLER}: `awp` must see whole weights, got a model sharded by FSDP. "
                f"Use MMDistributedDataParallel, or leave `awp` out."
            )
        optimizer = getattr(runner.optim_wrapper, "optimizer", None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"{_CALLER}: `awp` must have a single optimizer, got {type(runner.optim_wrapper).__name__}. "
                f"Use param groups."
            )
        before = self.awp.undo == "before_step"
        register = optimizer.register_step_pre_hook if before else optimizer.register_step_post_hook
        register(lambda *_: self._restore())

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Starts an epoch; warns of an ``awp`` that this training never reaches."""
        super().begin_epoch(epoch, epochs)
        if epoch == 1 and self.awp is not None and not self.awp.active(epochs):
            MMLogger.get_current_instance().warning(
                "%s: `awp` begins with epoch %g, but the training has %d. Lower its warmup_epochs.",
                _CALLER,
                self.awp.warmup_epochs,
                epochs,
            )

    def end_iteration(self) -> None:
        """Restores the weights where no optimizer's step has done it, as between those of accumulated gradients."""
        self._restore()

    def epoch_reasons(self) -> list[str]:
        """The class prior, an attack that changes, and AWP."""
        reasons = super().epoch_reasons()
        if self.attack.changes:
            reasons.append("an `attack` that changes over the epochs")
        if self.awp is not None:
            reasons.append("`awp`")
        return reasons

    def _restore(self) -> None:
        if self.awp is not None:
            self.awp.restore()

    def _labels(self, data_samples: list[Any]) -> Tensor | None:
        """The class indices; None where there are none and nothing but the log would show them."""
        if self.robust_loss.class_prior is not None:
            return self.hard_labels(data_samples, "the class prior of `robust_loss`")
        if self.attack.needs_labels:
            return self.hard_labels(
                data_samples,
                f"the objective '{self.attack.objective}' of `attack`",
                "use objective='soft_cross_entropy' there",
            )
        hard = all(
            "gt_label" in sample and "gt_score" not in sample and sample.gt_label.numel() == 1
            for sample in data_samples
        )
        return self.hard_labels(data_samples, "the log") if hard else None

    def _views(self, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
        views = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if (len(views) == 2) != (self.augmented_weight is not None) or len(views) > 2:
            raise ValueError(
                f"{_CALLER}: `augmented_weight` goes with two views, got {self.augmented_weight} and {len(views)}. "
                f"Use MultiView(num_views=[1, 1]) and TwoViewDataPreprocessor, or leave it out."
            )
        return views

    def _losses(self, batch: _Batch, views: int, *, observe: bool) -> dict[str, Tensor]:
        labels = batch.labels
        if not self.natural_first:
            adversarial_logits = self.logits(batch.adversarial)
        # What only a teacher's side would have used has its statistics, as in the authors' codes, but no backward pass.
        used = batch.taught is None or self.natural_weight > 0 or self.teacher_natural_weight > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and used):
            feats = self.extract_feat(batch.natural)
            natural_logits = self.head_logits(feats)
            losses = self.head_losses(feats, natural_logits, batch.data_samples, self.natural_weight)
        if not used:  # autocast of older releases of torch keeps that pass's copies of the weights, without a graph
            torch.clear_autocast_cache()
        if self.natural_first:
            adversarial_logits = self.logits(batch.adversarial)
        # The class prior collects the teacher's side of the training pass, of the first view alone.
        teacher_logits = natural_logits if batch.taught is None else batch.taught
        collects = observe and self.training
        losses["loss_robust"], terms = self._robust(adversarial_logits, teacher_logits, labels, views, collects)
        losses.update(terms)
        if self.teacher_natural_weight and batch.taught_natural is not None:
            natural, _ = self._robust(natural_logits, batch.taught_natural, labels, views, False)
            losses["loss_natural"] = self.teacher_natural_weight * natural
        if labels is not None:
            right = adversarial_logits.detach().argmax(1) == labels
            losses["adversarial_accuracy"] = 100.0 * right.float().mean()
        return losses

    def _robust(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, views: int, collects: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The robust loss of all views, and the terms of the first."""
        shares: Sequence[Tensor | None] = [None] * views if labels is None else labels.chunk(views)
        robust, terms = student_logits.new_zeros(()), {}
        for view, (student, teacher, own) in enumerate(
            zip(student_logits.chunk(views), teacher_logits.chunk(views), shares, strict=True)
        ):
            weight = 1.0 if view == 0 else self.augmented_weight
            robust = robust + weight * self.robust_loss(student, teacher, own, observe=collects and view == 0)
            if view == 0:
                terms = term_scalars(self.robust_loss)
        return robust, terms

    def _method(self, preset: str | None) -> RobustDistillation:
        """The settings of a preset, or those of adversarial training."""
        if preset is None:
            return RobustDistillation()
        classes = getattr(self.head, "num_classes", None)
        if classes is None:
            raise ValueError(
                f"{_CALLER}: `preset` needs `num_classes` of the head, which {type(self.head).__name__} has not. "
                f"Give `attack` and `robust_loss`."
            )
        return robust_distillation(preset, classes, _CALLER)

    def _set_teacher(self, method: RobustDistillation, given: Mapping[str, Any], *, has_teacher: bool) -> None:
        """The settings that go with a teacher alone."""
        named = [name for name, value in given.items() if value is not None] + ["preset"] * bool(method.loss)
        if named and not has_teacher:
            raise ValueError(
                f"{_CALLER}: `{named[0]}` goes with a teacher, got None. Write teacher=..., teacher_ckpt='....pth'."
            )
        view, weight, reference = (
            given[name] for name in ("teacher_view", "teacher_natural_weight", "attack_reference")
        )
        self.teacher_view = method.teacher_view if view is None else view
        weight = method.teacher_natural_weight if weight is None else weight
        self.teacher_natural_weight = check.check_number(_CALLER, "teacher_natural_weight", weight)
        self.attack_reference = ("teacher" if has_teacher else "student") if reference is None else reference
        for kind, value, known in (
            ("teacher_view", self.teacher_view, _VIEWS),
            ("attack_reference", self.attack_reference, _REFERENCES),
        ):
            if value not in known:
                raise ValueError(check.unknown_name_message(_CALLER, f"`{kind}`", str(value), known))

    def _taught_natural(self, natural: Tensor) -> Tensor | None:
        """The teacher's logits of natural images, where anything needs them."""
        if not self.has_teacher or (self.teacher_view == "adversarial" and not self.teacher_natural_weight):
            return None
        return self.teacher(natural)

    def _taught_pixels(self, pixels: Tensor) -> Tensor:
        return self.teacher.differentiable(self.pixels.to_inputs(pixels))

    def _pixel_logits(self, pixels: Tensor) -> Tensor:
        return self.logits(self.pixels.to_inputs(pixels))

    def _arranged(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _smooth_labels(self, label_smoothing: float) -> None:
        smoothing = check.check_number(_CALLER, "label_smoothing", label_smoothing)
        if smoothing >= 1:
            raise ValueError(
                f"{_CALLER}: `label_smoothing` must be below 1, got {smoothing}. The published value is 0.1."
            )
        loss: Any = getattr(self.head, "loss_module", None)
        if type(loss) is not CrossEntropyLoss or loss.use_soft or loss.use_sigmoid:
            how = " with use_soft or use_sigmoid" if type(loss) is CrossEntropyLoss else ""
            raise ValueError(
                f"{_CALLER}: `label_smoothing` goes with a plain CrossEntropyLoss, got {type(loss).__name__}{how}. "
                f"Use label_smoothing=0."
            )
        self.head.loss_module = LabelSmoothLoss(
            smoothing,
            num_classes=self.head.num_classes,
            mode="original",
            reduction=loss.reduction,
            loss_weight=loss.loss_weight,
            class_weight=loss.class_weight,
        )


def _build(name: str, kind: type, settings: Any) -> Any:
    """An object from its keywords; unknown ones are refused with the nearest known."""
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"{_CALLER}: `{name}` must be a dict of keywords of {kind.__name__}, got {type(settings).__name__}. "
            f"Write {name}=dict(...)."
        )
    known = list(inspect.signature(kind).parameters)
    for keyword in settings:
        if keyword not in known:
            raise TypeError(check.unknown_name_message(_CALLER, f"keyword of `{name}`", str(keyword), known))
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_CALLER}: in `{name}`: {error}") from error


def _over(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of an attack over those of a preset, whose steps a budget replaces."""
    steps = ("steps", "step_size") if given.get("budget") is not None else ()
    return {**{name: value for name, value in preset.items() if name not in steps}, **given}
