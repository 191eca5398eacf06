"""Knowledge distillation for MMPretrain: an image classifier with a teacher, by config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import _validation as check
from ..losses import warmup_factor
from .classifier import term_scalars
from .taught import TaughtClassifier
from .teacher_cache import LogitCache

__all__ = ["DistillationClassifier"]


class DistillationClassifier(TaughtClassifier):
    """An ``ImageClassifier`` that also learns from a teacher: ``loss_ce + ramp * distill_weight * distill_loss``.

    In validation, test and inference it is the ``ImageClassifier`` of its backbone, neck and head, and its checkpoint
    loads into the config of that one. The teacher is frozen and in eval mode, and neither the checkpoint nor the
    optimizer nor a weight average knows it.

    Args:
        *args: those of ``ImageClassifier``, for the student: backbone, neck, head.
        teacher: path of a config, ``dict(cfg_path=...)``, config dict of a model, or the network (see
            :func:`ikl_plugins.mmpretrain.build_teacher`). With ``IKLHook`` a file that is not in the working directory
            is looked for beside the config of the run.
        teacher_ckpt: file or http(s) address of the teacher's checkpoint.
        teacher_input: ``dict(size=..., mean=..., std=..., to_rgb=...)``: the size that the teacher's inputs are resized
            to, and what replaces the settings of its ``data_preprocessor``.
        teacher_precision: ``'bf16'`` runs the teacher alone under bfloat16 autocast; its logits are float32.
        teacher_compile: runs the teacher by ``torch.compile``, or with a warning as it is where that fails.
        teacher_channels_last: lays the teacher's weights and inputs out channels last.
        teacher_cache: ``dict(folder=..., views=K)``: each image has K augmentations, which recur every K epochs, and
            the teacher's logits of them are kept on disk. ``dtype='float16'`` halves the file, another ``seed`` makes
            other augmentations. It needs ``IKLHook`` and images that are not mixed.
        distill_loss: config of DKLLoss, IKLLoss, GKLLoss or KLLoss, such as ``dict(type='IKLLoss', preset='start')``,
            which is the default. With ``global_info=True`` the number of classes is
            taken from the head.
        distill_weight: weight of that loss, at least 0.
        warmup_epochs: it is also multiplied by min(epoch / warmup_epochs, 1), epochs counted from 1; 0 and 1 mean no
            ramp, None that of the loss's ``preset``.
        ce_weight: weight of the head's own loss, at least 0. It is not ramped.
        teacher_val_batches: before training, log the teacher's accuracy on so many batches of the validation data,
            at least 32 images, spread over the whole set, beside that which its own config's test pipeline gives; 0 for
            none.
        **kwargs: those of ``ImageClassifier``. Mixup and CutMix in ``train_cfg`` go with every loss that has no class
            prior; a teacher with other means, stds or channel order in ``data_preprocessor`` gets its own inputs.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, or a teacher that does not fit.

    Note:
        A class prior (``global_info=True``) and a ramp must know the epoch: ``custom_hooks = [dict(type='IKLHook')]``.
        The log shows ``loss_ce``, ``loss_distill`` and the two terms of the latter, ``weighted_mse`` and
        ``soft_cross_entropy``, weight and ramp included.
    """

    def __init__(
        self,
        *args: Any,
        teacher: str | Path | Mapping[str, Any] | nn.Module,
        teacher_ckpt: str | Path | None = None,
        teacher_input: Mapping[str, Any] | None = None,
        teacher_precision: str | None = None,
        teacher_compile: bool = False,
        teacher_channels_last: bool = False,
        teacher_cache: Mapping[str, Any] | None = None,
        distill_loss: Mapping[str, Any] | nn.Module | None = None,
        distill_weight: float = 1.0,
        warmup_epochs: int | None = None,
        ce_weight: float = 1.0,
        teacher_val_batches: int = 1,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        check.check_number(name, "distill_weight", distill_weight)
        check.check_number(name, "warmup_epochs", 0 if warmup_epochs is None else warmup_epochs)
        check.check_number(name, "ce_weight", ce_weight)
        super().__init__(*args, **kwargs)
        loss = {"type": "IKLLoss", "preset": "start"} if distill_loss is None else distill_loss
        self.distill_loss = self.build_loss("distill_loss", loss)
        self.distill_weight = distill_weight
        self.warmup_epochs = getattr(self.distill_loss, "warmup_epochs", 0) if warmup_epochs is None else warmup_epochs
        self.ce_weight = ce_weight
        self.teacher_cache = None if teacher_cache is None else LogitCache(teacher_cache, self.data_preprocessor)
        self.hold_teacher(
            teacher,
            teacher_ckpt,
            teacher_val_batches=teacher_val_batches,
            teacher_input=teacher_input,
            teacher_precision=teacher_precision,
            teacher_compile=teacher_compile,
            teacher_channels_last=teacher_channels_last,
        )

    def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict[str, Any]:
        """The losses of one batch, of inputs (N, C, H, W) and one ``DataSample`` with labels per image.

        Returns:
            ``loss_ce`` and ``loss_distill``, which add up to the total; ``weighted_mse`` and ``soft_cross_entropy``,
            the terms of the latter; accuracies, if the head computes them.
        """
        prior = self.distill_loss.class_prior
        self.check_epochs()
        labels = None if prior is None else self.hard_labels(data_samples, "the class prior of `distill_loss`")
        feats = self.extract_feat(inputs)
        logits = self.head_logits(feats)
        cache = self.teacher_cache
        teacher_logits = (
            self.teacher(inputs) if cache is None else cache(self.teacher, inputs, data_samples, logits.detach())
        )
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"{type(self).__name__}: `teacher` must have the student's class count, got logits of shape "
                f"{tuple(teacher_logits.shape)} and {tuple(logits.shape)}. Take another teacher."
            )
        losses = self.head_losses(feats, logits, data_samples, self.ce_weight)
        scale = self.distill_weight
        if self.epoch is not None:
            scale *= warmup_factor(self.epoch, self.warmup_epochs)
        distill = scale * self.distill_loss(logits, teacher_logits, labels, observe=self.training)
        return {**losses, "loss_distill": distill, **term_scalars(self.distill_loss, scale)}

    def attach(self, runner: Any) -> None:
        """Also gives the training data the fixed augmentations of ``teacher_cache``."""
        super().attach(runner)
        if self.teacher_cache is not None:
            self.teacher_cache.attach(self.teacher, self.data_preprocessor, runner)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Also takes a teacher off the device whose logits are all kept."""
        super().begin_epoch(epoch, epochs)
        if self.teacher_cache is not None:
            self.teacher_cache.begin_epoch(self.teacher)

    def epoch_reasons(self) -> list[str]:
        """The class prior, the ramp and the cache."""
        reasons = super().epoch_reasons()
        if self.teacher_cache is not None:
            reasons.append("teacher_cache")
        if self.warmup_epochs > 1:
            reasons.append(f"warmup_epochs={self.warmup_epochs}")
        return reasons
