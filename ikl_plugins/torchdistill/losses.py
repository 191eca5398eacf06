"""DKL, IKL and GKL as torchdistill mid-level losses: they find the logits, the core computes.

Beside names and layouts these classes know one thing the core does not: where an epoch begins and ends.
``ikl_pre_epoch_process`` tells them the number of the epoch and how many batches it has, and they roll their class
prior behind the last of these batches. That is before torchdistill's scripts validate and save, so that a checkpoint
holds the prior which the next epoch uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _validation as check
from .. import losses as core
from .._value_checks import read_value_checks
from ..class_prior import ClassPrior
from ..functional import LossTerms
from ..presets import ROBUST_DISTILLATION, Preset, find_preset, robust_distillation
from .epoch_log import EpochLog

__all__ = ["AdversarialLogits", "MidLevelLoss", "find_losses", "mid_level_losses"]

_SELF = "."  # torchdistill's path of the model itself
_CROSS_ENTROPY_REDUCTION = {"batchmean": "mean", "sum": "sum", "none": "none"}
PROCESS_LINE = "pre_epoch_process: 'ikl_pre_epoch_process'"


class AdversarialLogits(NamedTuple):
    """What a model gives in adversarial training: logits (N, C) of the natural and of the adversarial images.

    Beside them a teacher's of the adversarial images, where it sees those.
    """

    natural: Tensor
    adversarial: Tensor
    teacher: Tensor | None = None


class MidLevelLoss(nn.Module):
    """A loss of :data:`ikl_plugins.losses.LOSSES` in torchdistill: ``ce_weight * cross entropy + ramp * core loss``.

    In adversarial training, where the student's output is :class:`AdversarialLogits`, the adversarial logits are the
    student's, the natural ones the teacher's unless there is a teacher, and the natural ones meet the labels. With a
    teacher they meet its natural logits as well, ``+ ramp * teacher_natural_weight * core loss``.

    Args:
        student_module_path: the student's module that gives the logits; ``'.'`` for the model itself, any other needs a
            ``forward_hook`` in the config.
        student_module_io: ``'output'`` or ``'input'`` of that module.
        teacher_module_path: the same for the teacher.
        teacher_module_io: the same for the teacher.
        preset: name of settings, see :meth:`ikl_plugins.DecoupledLoss.preset`; other keywords go before them. With
            ``num_classes`` also of an adversarial distillation, see :func:`ikl_plugins.presets.robust_distillation`:
            ``'rslad'`` of DKLLoss, whose gradients are KL's, ``'rslad-ikl'`` of IKLLoss.
        ce_weight: weight of the cross entropy to the labels, at least 0; by default 0, with a preset 1. KDLoss calls it
            ``alpha``; here ``alpha`` is the core's weight of the soft-label cross entropy.
        warmup_epochs: the core loss is multiplied by min(epoch / warmup_epochs, 1), epochs of the stage counted from 1;
            0 and 1 mean no ramp, by default that of the preset. The cross entropy to the labels is not scaled.
        teacher_natural_weight: weight of the core loss of the student's natural logits to the teacher's natural ones,
            at least 0, in adversarial distillation; by default 0, or that of the preset.
        **loss_keywords: keywords of the core class, see there.

    Raises:
        TypeError: an unknown keyword (the message names the nearest known one), or one of the wrong type.
        ValueError: a value out of range.

    Attributes:
        core: the module of :mod:`ikl_plugins.losses`.
        last_terms: the core's :class:`ikl_plugins.LossTerms` of the last batch, before the ramp; None before it. Their
            means are written to the log at the end of an epoch, with the entropy of the class prior.
        term: the name of its term in the criterion, for the log; ``ikl_pre_epoch_process`` sets it.

    Note:
        A batch whose student logits require grad is a training batch: it is observed by the class prior and counted.
        torchdistill never calls ``train()`` or ``eval()`` on a criterion.

    Example:
        >>> import torch
        >>> from ikl_plugins.torchdistill import DKLLoss
        >>> loss = DKLLoss(".", "output", ".", "output", temperature=4.0, ce_weight=1.0)
        >>> io_dict = {".": {"output": torch.zeros(2, 3)}}
        >>> round(loss(io_dict, io_dict, torch.tensor([0, 2])).item(), 4)  # log 3, twice
        2.1972
    """

    core_class: ClassVar[type[core.DecoupledLoss]]

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        *,
        preset: str | None = None,
        ce_weight: float | None = None,
        warmup_epochs: int | None = None,
        teacher_natural_weight: float | None = None,
        **loss_keywords: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        known = [*_keywords(MidLevelLoss), *_keywords(self.core_class)]
        for keyword in loss_keywords:
            if keyword not in known:
                raise TypeError(check.unknown_name_message(name, "keyword", keyword, known))
        self._places = {
            "student": _place(name, "student", student_module_path, student_module_io),
            "teacher": _place(name, "teacher", teacher_module_path, teacher_module_io),
        }
        found, labels, natural = Preset(name, {}), 0.0, 0.0
        if preset in ROBUST_DISTILLATION:
            found, labels, natural = _adversarial_preset(name, preset, loss_keywords.get("num_classes"))
        elif preset is not None:
            found, labels = find_preset(preset, name), 1.0
        self.ce_weight = labels if ce_weight is None else ce_weight
        self.warmup_epochs = found.warmup_epochs if warmup_epochs is None else warmup_epochs
        natural = natural if teacher_natural_weight is None else teacher_natural_weight
        self.teacher_natural_weight = check.check_number(name, "teacher_natural_weight", natural)
        check.check_number(name, "ce_weight", self.ce_weight)
        check.check_number(name, "warmup_epochs", self.warmup_epochs)
        self.core = self.core_class(**{**found.keywords, **loss_keywords})
        self._epoch: int | None = None
        self._ramp = 1.0
        self._batches_per_epoch: int | None = None
        self._batches_seen = 0
        self._record: dict[str, Any] = {}
        self._log = EpochLog()
        self.term = name

    @property
    def class_prior(self) -> ClassPrior | None:
        """The core's class prior, None without ``global_info``."""
        return self.core.class_prior

    @property
    def last_terms(self) -> LossTerms | None:
        return self.core.last_terms

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        targets: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            student_io_dict: what torchdistill recorded of the student, by module path and 'input' or 'output'.
            teacher_io_dict: the same of the teacher.
            targets: class indices (N,) or (N, d1, ...), needed for ``ce_weight`` above 0 and for ``global_info``; for
                ``ce_weight`` alone, class probabilities of the logits' shape will do.
            *args: ignored, as other mid-level losses do.
            **kwargs: ignored.

        Returns:
            A 0-dim tensor, or (N, d1, ...) for ``reduction='none'``.

        Raises:
            TypeError: targets or logits of the wrong type.
            ValueError: no logits at a module path; targets missing or out of range; epoch boundaries missing.
        """
        student, teacher, labelled, natural = self._views(student_io_dict, teacher_io_dict)
        training = student.requires_grad
        if training:
            self._check_boundaries()
        prior = self.class_prior
        if prior is not None and prior.matrix.device != student.device:
            self.to(student.device)

        of_natural = None
        if natural is not None:  # first, so that `last_terms` are those of the adversarial images
            of_natural = self.teacher_natural_weight * self.core(labelled, natural, targets, observe=False)
        loss: Tensor = self.core(student, teacher, targets, observe=training)
        if of_natural is not None:
            loss = loss + of_natural
        # Factors of 1 are left out: on small logits each costs a noticeable part of the loss, forward and backward.
        if self._ramp != 1:
            loss = loss * self._ramp
        if self.ce_weight > 0:
            cross_entropy = self._cross_entropy(labelled, targets)
            loss = loss + (cross_entropy if self.ce_weight == 1 else self.ce_weight * cross_entropy)

        if training:
            self._log.add(self.last_terms)
            self._batches_seen += 1
            if self._batches_seen == self._batches_per_epoch:
                read_value_checks()
                self._end_epoch()
        return loss

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """Starts an epoch: sets the ramp, and rolls a class prior that the last epoch, cut short, left pending.

        All ranks must call this.

        Args:
            epoch: number of the epoch in its stage, 1 for the first.
            batches: number of training batches of this rank; None if the loader cannot tell. The class prior is then
                rolled at the beginning of the next epoch.
        """
        read_value_checks()
        self._end_epoch()  # nothing new: all rows keep their value
        self._epoch = epoch
        self._ramp = core.warmup_factor(epoch, self.warmup_epochs)
        self._batches_per_epoch = batches
        self._batches_seen = 0

    def _end_epoch(self) -> None:
        self.core.end_epoch()
        if self._epoch is not None:
            self._log.write(self.term, self._epoch, self.class_prior)

    def prior_record(self, stage: int) -> dict[str, Any]:
        """The class prior as a checkpoint keeps it: always the same dict, and its tensors are the live buffers.

        Args:
            stage: number of the training stage, part of the record.

        Returns:
            'stage' and the buffers of the class prior.
        """
        self._record["stage"] = stage
        self._refresh_record()
        return self._record

    def restore_prior(self, record: Mapping[str, Any], term: str) -> None:
        """Copies a record of :meth:`prior_record`, read from a checkpoint, into the class prior.

        Args:
            record: the record.
            term: the loss's name in the criterion, for messages.

        Raises:
            ValueError: the record does not fit this class prior, see :meth:`ikl_plugins.ClassPrior.check_state`.
        """
        prior = self.class_prior
        if prior is None or record is self._record:
            return
        prior.check_state(f"{type(self).__name__}, term '{term}'", record)
        with torch.no_grad():
            for key, buffer in prior.state_dict(keep_vars=True).items():
                buffer.copy_(record[key])

    def extra_repr(self) -> str:
        places = ", ".join(f"{role}='{path}' {io}" for role, (path, io) in self._places.items())
        return f"{places}, ce_weight={self.ce_weight}, warmup_epochs={self.warmup_epochs}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MidLevelLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._record:
            self._refresh_record()  # a move to another device replaces buffers
        return self

    def _refresh_record(self) -> None:
        if self.class_prior is not None:
            self._record.update(self.class_prior.state_dict(keep_vars=True))

    def _views(
        self, student_io: Mapping[str, Mapping[str, Any]], teacher_io: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The student's logits, the teacher's, those that meet the labels, and the teacher's logits that these meet."""
        views = student_io.get(_SELF, {}).get("output")
        if self.teacher_natural_weight and not (isinstance(views, AdversarialLogits) and teacher_io):
            raise ValueError(
                f"{type(self).__name__}: `teacher_natural_weight` goes with a teacher and adversarial images. "
                f"Leave it out, or use ikl_plugins.torchdistill.adversarial_forward."
            )
        if not isinstance(views, AdversarialLogits):
            student = self._logits("student", student_io)
            return student, self._logits("teacher", teacher_io), student, None
        # A hook keeps the last of several forwards.
        for role in ("student",) if teacher_io and views.teacher is None else ("student", "teacher"):
            path, io = self._places[role]
            if path != _SELF:
                raise ValueError(
                    f"{type(self).__name__}: `{role}_module_path` must be '.' in adversarial training, got '{path}' "
                    f"({io}). "
                    f"Set {role}_module_path: '.'."
                )
        natural = teacher = views.teacher
        if teacher_io and (teacher is None or self.teacher_natural_weight):
            natural = self._logits("teacher", teacher_io)
        if teacher is None:
            teacher = views.natural if natural is None else natural
        return views.adversarial, teacher, views.natural, natural if self.teacher_natural_weight else None

    def _logits(self, role: str, io_dict: Mapping[str, Mapping[str, Any]]) -> Tensor:
        name = type(self).__name__
        path, io = self._places[role]
        if role == "teacher" and not io_dict:
            raise ValueError(
                f"{name}: `teacher_module_path` must lead to a teacher, but this config trains without one. Add a "
                f"`teacher_model`, or use ikl_plugins.torchdistill.adversarial_forward."
            )
        recorded = io_dict.get(path, {})
        if io not in recorded:
            known = [f"'{other}' ({', '.join(sorted(parts))})" for other, parts in io_dict.items() if parts]
            raise ValueError(
                f"{name}: `{role}_module_path` must name a recorded module, got '{path}' ({io}); recorded of the "
                f"{role}: "
                f"{'; '.join(known) or 'nothing'}. {_hook_lines(role, path, io)}"
            )
        logits = recorded[io]
        if isinstance(logits, AdversarialLogits):
            raise ValueError(
                f"{name}: a teacher must see natural images, got an adversarial forward_proc. "
                f"Set `forward_proc: 'forward_batch_only'` under `train: {role}:`."
            )
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{name}: `{role}_module_path` must name a module that gives logits, but that of '{path}' is "
                f"{shown_output(logits)}. Name such a layer: {role}_module_path: 'fc'. "
                f"{_hook_lines(role, 'fc', 'output')}"
            )
        return logits

    def _cross_entropy(self, logits: Tensor, targets: Any) -> Tensor:
        soft = isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == logits.shape
        if not soft:
            check.check_targets(type(self).__name__, targets, logits.shape[1], logits)
            targets = check.safe_index(targets, logits.shape[1])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, reduction=_CROSS_ENTROPY_REDUCTION[self.core.reduction])

    def _check_boundaries(self) -> None:
        name = type(self).__name__
        prior = self.class_prior
        if self._epoch is None and (prior is not None or self.warmup_epochs > 1):
            cause = "global_info=True" if prior is not None else f"warmup_epochs={self.warmup_epochs}"
            raise ValueError(
                f"{name}: {cause} must know where epochs begin. Add to `train:` of the config, or to each stage:\n"
                f"  {PROCESS_LINE}"
            )
        limit = self._batches_per_epoch
        if prior is not None and limit is not None and self._batches_seen >= limit:
            raise ValueError(
                f"{name}: an epoch must have no more than the {limit} batches of `train_data_loader`. "
                f"Call pre_epoch_process before each epoch."
            )


_CLASSES: dict[str, type[MidLevelLoss]] = {}


def mid_level_losses() -> dict[str, type[MidLevelLoss]]:
    """The class of each loss in :data:`ikl_plugins.losses.LOSSES`, by the same name; also an attribute of this package.

    Returns:
        Subclasses of :class:`MidLevelLoss`, always the same ones.
    """
    for name, core_class in core.LOSSES.items():
        if name not in _CLASSES or _CLASSES[name].core_class is not core_class:
            doc = f":class:`ikl_plugins.{name}` as a mid-level loss; see :class:`MidLevelLoss`."
            members = {"__doc__": doc, "__module__": __name__, "core_class": core_class}
            _CLASSES[name] = type(name, (MidLevelLoss,), members)
    return {name: _CLASSES[name] for name in core.LOSSES}


def __getattr__(name: str) -> type[MidLevelLoss]:
    if name in core.LOSSES:
        return mid_level_losses()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_losses(criterion: nn.Module) -> dict[str, MidLevelLoss]:
    """The losses of this package inside a criterion, by the names of their terms.

    Args:
        criterion: a box's criterion. torchdistill's high-level losses keep their terms in a plain dict, ``term_dict``,
            as pairs of loss and weight; wrappers are looked into.

    Returns:
        The name of a loss is that of its term, and behind a dot its path inside a wrapper.
    """
    found: dict[str, MidLevelLoss] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for path, part in module.named_modules():
            name = ".".join(filter(None, (prefix, path)))
            if isinstance(part, MidLevelLoss):
                found[name] = part
            for term, entry in getattr(part, "term_dict", {}).items():
                loss = entry[0] if isinstance(entry, tuple) else entry
                if isinstance(loss, nn.Module):
                    visit(".".join(filter(None, (name, term))), loss)

    visit("", criterion)
    return found


def shown_output(output: object) -> str:
    """What a network has given in place of logits, for a message."""
    keys = f" with the keys {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    return f"a {type(output).__name__}{keys}"


def _keywords(cls: type) -> list[str]:
    """The named parameters of a class's constructor."""
    parameters = inspect.signature(cls).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _adversarial_preset(name: str, preset: str, num_classes: Any) -> tuple[Preset, float, float]:
    """The settings of an adversarial distillation, and its weights of the labels and of the natural images."""
    method = robust_distillation(preset, check.check_num_classes(name, num_classes), name)
    loss, keywords = method.loss, method.keywords
    if loss == "KLLoss":  # DKL of equal weights has its gradients
        weight = keywords["loss_weight"]
        loss, keywords = "DKLLoss", {"alpha": weight, "beta": weight, "temperature": keywords["temperature"]}
    if loss != name:
        raise ValueError(f"{name}: `preset` must be of a preset for {name}, got '{preset}'. Use {loss}.")
    return Preset(loss, keywords), method.natural_weight, method.teacher_natural_weight


def _place(name: str, role: str, path: str, io: str) -> tuple[str, str]:
    if not isinstance(path, str):
        raise TypeError(f"{name}: `{role}_module_path` must be a string, got {path!r}. Use '.' for the model itself.")
    if io not in ("input", "output"):
        raise ValueError(f"{name}: `{role}_module_io` must be 'output' or 'input', got {io!r}.")
    if path == _SELF and io == "input":
        raise ValueError(
            f"{name}: `{role}_module_io` must be 'output' for the model itself, got 'input'. "
            f"Name a module in `{role}_module_path`."
        )
    return path, io


def _hook_lines(role: str, path: str, io: str) -> str:
    return f"Add to `train:` of the config:\n  {role}:\n    forward_hook:\n      {io}: ['{path}']"
