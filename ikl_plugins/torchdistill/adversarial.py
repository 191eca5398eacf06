"""Adversarial training in torchdistill: a forward process that crafts the images and gives the logits of both views.

    train:
      model:
        forward_proc: !import_call
          key: 'ikl_plugins.torchdistill.adversarial_forward'
          init:
            kwargs:
              eps: '8/255'
              ...

torchdistill looks forward processes up by a string, so ``adversarial_forward`` registers one for its settings and gives
back its key. The attack itself is :class:`ikl_plugins.adversarial.PGD`. With a
``teacher_view`` it is an adversarial distillation.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchdistill.common.module_util import check_if_fsdp_wrapped, check_if_wrapped
from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT, register_forward_proc_func

from .. import _validation as check
from ..adversarial import PGD, PixelSpace, Strength
from ..class_prior import ClassPrior
from ..presets import RobustDistillation, robust_distillation
from .losses import PROCESS_LINE, AdversarialLogits, shown_output
from .teacher_cache import ROW

__all__ = ["AdversarialForward", "adversarial_forward"]

_logger = logging.getLogger(__name__)
_CALLER = "adversarial_forward"
GREY_LEVEL = 1 / 255  # what normalising in a narrow dtype and undoing it may lose
_VIEWS = ("natural", "adversarial")
_REFERENCES = ("teacher", "student")
WAY_OUT = "Give `mean` and `std` of the data set's Normalize, or neither if it has none."


def adversarial_forward(
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preset: str | None = None,
    teacher_view: str | None = None,
    attack_reference: str | None = None,
    natural_first: bool | None = None,
    **attack: Any,
) -> str:
    """Registers a forward process for adversarial training, for ``!import_call`` in a YAML file.

    Args:
        mean: what the data set's ``Normalize`` subtracts, one number per channel, of pixels in [0, 1]. None, together
            with ``std``, if the images are pixels.
        std: what it divides by.
        preset: a published adversarial distillation, or one with IKL: what is not given otherwise. See
            :func:`ikl_plugins.presets.robust_distillation`; the loss has a preset of its own.
        teacher_view: in an adversarial distillation the images that the teacher of the adversarial logits sees,
            ``'natural'`` or, of a frozen one, ``'adversarial'``. None for a training that attacks away from the
            student's own predictions, whether there is a teacher or not.
        attack_reference: whose predictions the objectives ``'soft_cross_entropy'`` and ``'ikl'`` go away from:
            ``'teacher'``, of the view that it sees (the default with a ``teacher_view``), or ``'student'``, of the
            natural images.
        natural_first: the training forward takes the natural images first; False by default.
        **attack: keywords of :class:`ikl_plugins.adversarial.PGD`, see there.

    Returns:
        The key of the process, made of the settings: the same settings give the same key, and are registered once.

    Raises:
        TypeError: an unknown keyword (the message names the nearest known one), or a value of the wrong type.
        ValueError: a value out of range, or somebody else holds the key.

    Example:
        >>> from ikl_plugins.torchdistill import adversarial_forward
        >>> adversarial_forward(eps="8/255", budget="low")
        "ikl_plugins.adversarial_forward(budget='low', eps='8/255')"
    """
    own = {
        "mean": mean,
        "std": std,
        "preset": preset,
        "teacher_view": teacher_view,
        "attack_reference": attack_reference,
        "natural_first": natural_first,
    }
    known = list(inspect.signature(PGD).parameters)
    for keyword in attack:
        if keyword not in known:
            raise TypeError(check.unknown_name_message(_CALLER, "keyword", keyword, [*known, *own]))
    settings = {**attack, **own}
    method = RobustDistillation()
    if preset is not None:
        method = robust_distillation(preset, 10, _CALLER)  # its attack is the same for any number of classes
        teacher_view = method.teacher_view if teacher_view is None else teacher_view
        steps = ("steps", "step_size") if attack.get("budget") is not None else ()
        attack = {**{name: value for name, value in method.attack.items() if name not in steps}, **attack}
    if "eps" not in attack:
        raise TypeError(f"{_CALLER}: `eps` must be given. Pass a number or '8/255'.")
    space = PixelSpace(mean, std, tolerance=GREY_LEVEL, caller=_CALLER, way_out=WAY_OUT)
    forward = AdversarialForward(
        PGD(**attack),
        space,
        teacher_view=teacher_view,
        attack_reference=attack_reference,
        natural_first=method.natural_first if natural_first is None else natural_first,
    )
    shown = ", ".join(f"{name}={settings[name]!r}" for name in sorted(settings) if settings[name] is not None)
    key = f"ikl_plugins.{_CALLER}({shown})"
    holder = FORWARD_PROC_FUNC_DICT.get(key)
    if holder is None:
        register_forward_proc_func(key=key)(forward)
    elif not isinstance(holder, AdversarialForward):
        raise ValueError(f"{_CALLER}: the key '{key}' must be free, but {holder!r} holds it. Rename that one.")
    return key


class TeacherForward:
    """A teacher's forward process that the attacked student, whose turn is after the teacher's, asks for more.

    Args:
        process: the process of the config.
        natural: whether anybody needs what the teacher gives for the natural images; if not, it gives None.

    Attributes:
        output: what it has given for the natural images of the batch.
    """

    def __init__(self, process: Callable[..., Any], *, natural: bool) -> None:
        self.process = process
        self.natural = natural
        self.output: Any = None
        self._ask: Callable[[Tensor], Any]

    def __call__(
        self, model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None, **kwargs: Any
    ) -> Any:
        """What ``process`` gives for the natural images."""
        # Without the records of the natural images, which a cache of logits would give for any others.
        other = supp_dict
        if isinstance(supp_dict, dict):
            other = {name: value for name, value in supp_dict.items() if name != ROW}
        self._ask = lambda images: self.process(model, images, targets, other, **kwargs)
        self.output = self.process(model, sample_batch, targets, supp_dict, **kwargs) if self.natural else None
        return self.output

    def logits(self, images: Tensor) -> Tensor:
        """The teacher's logits (N, classes) of other images than the batch's natural ones, differentiable."""
        return _logits(self._ask(images), "teacher")


class AdversarialForward:
    """A forward process of torchdistill: attacks the batch, then runs the adversarial and the natural images.

    Both training forwards run in the mode that the model is in, the adversarial one first, as the authors' script does,
    or last with ``natural_first``. The attack runs on the bare model; it changes neither its modes nor its running
    statistics nor its gradients.

    Args:
        attack: the inner maximisation, in pixel space.
        space: from the data set's images to pixels and back.
        teacher_view: see :func:`adversarial_forward`, and so for the others.
        attack_reference: likewise.
        natural_first: likewise.

    Raises:
        ValueError: an unknown view or reference, or a reference to a teacher without a view.

    Attributes:
        strength: what the attack may do in the running epoch; None before ``ikl_pre_epoch_process`` has told the epoch.
        prior: the class prior of the loss, which weighs the objective ``'ikl'``; None without one.
        teacher: the teacher's forward process; None before ``ikl_pre_epoch_process`` has told it.
    """

    def __init__(
        self,
        attack: PGD,
        space: PixelSpace,
        *,
        teacher_view: str | None = None,
        attack_reference: str | None = None,
        natural_first: bool = False,
    ) -> None:
        if teacher_view is None and attack_reference is not None:
            raise ValueError(
                f"{_CALLER}: `attack_reference` goes with `teacher_view`, got None. Add teacher_view: 'natural'."
            )
        for name, value, known in (
            ("teacher_view", teacher_view, _VIEWS),
            ("attack_reference", attack_reference, _REFERENCES),
        ):
            if value is not None and value not in known:
                raise ValueError(check.unknown_name_message(_CALLER, f"`{name}`", str(value), known))
        self.attack = attack
        self.space = space
        self.teacher_view = teacher_view
        self.by_teacher = teacher_view is not None and attack_reference != "student" and not attack.needs_labels
        self.natural_first = natural_first
        self.strength: Strength | None = None
        self.prior: ClassPrior | None = None
        self.teacher: TeacherForward | None = None
        self._first_batch = True

    def view(self) -> dict[str, Any]:
        """What an adversarial distillation adds to the settings of the attack."""
        view = {"teacher_view": self.teacher_view, "by_teacher": self.by_teacher, "natural_first": self.natural_first}
        return {name: value for name, value in view.items() if value}

    def in_epoch(
        self, epoch: int, epochs: int, prior: ClassPrior | None = None, teacher: TeacherForward | None = None
    ) -> AdversarialForward:
        """A forward process for one epoch: a box's own, as boxes of the same settings share the registered one.

        Args:
            epoch: number of the epoch in its stage, 1 for the first.
            epochs: how many epochs the stage has.
            prior: the class prior of the box's loss.
            teacher: the forward process of the box's teacher, where this one has a ``teacher_view``.

        Returns:
            A copy with the strength of that epoch.

        Raises:
            ValueError: the strength changes over the epochs, and ``epoch`` is beyond ``epochs``.
        """
        told = copy.copy(self)
        told.strength = self.attack.strength(epoch, epochs)
        told.prior = prior if self.attack.uses_prior else None
        told.teacher = teacher
        told._first_batch = epoch == 1
        return told

    def __call__(
        self, model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None, **kwargs: Any
    ) -> AdversarialLogits:
        """The logits of both views.

        Args:
            model: the box's model, wrapped or not.
            sample_batch: natural images as the data set gives them, shape (N, C, H, W).
            targets: class indices (N,), needed where the attack needs labels or a class prior weighs it.
            supp_dict: ignored, as other forward processes do.
            **kwargs: ignored.

        Returns:
            Logits (N, classes) of the natural and of the adversarial images, and the teacher's of the latter where it
            sees those.

        Raises:
            TypeError: images that are no floating tensor.
            ValueError: images that are no pixels once ``mean`` and ``std`` are undone; labels, epochs or teacher
                missing; a model that returns no logits, or is sharded over processes.
        """
        if self.strength is None and self.attack.changes:
            raise ValueError(
                f"{_CALLER}: an attack that changes must know where epochs begin. "
                f"Add to `train:` of the config, or to each "
                f"stage:\n  {PROCESS_LINE}"
            )
        teacher = self.teacher
        if self.teacher_view is not None and teacher is None:
            raise ValueError(
                f"{_CALLER}: `teacher_view` must have a `teacher_model:`, and the process that tells it. "
                f"Add to `train:` of the config, or to each stage:\n  {PROCESS_LINE}"
            )
        if check_if_fsdp_wrapped(model):
            raise ValueError(
                f"{_CALLER}: the model must be whole in each process, got {type(model).__name__}. "
                f"Set `wrapper: 'DistributedDataParallel'` under `train: model:`."
            )
        bare: nn.Module = model.get_submodule("module") if check_if_wrapped(model) else model
        pixels = self.space.to_pixels(sample_batch)
        self._warn_once(pixels)
        reference: dict[str, Any] = {}
        if teacher is not None and self.by_teacher:
            if self.teacher_view == "natural":
                reference["natural_logits"] = _logits(teacher.output, "teacher")
            else:
                reference["teacher"] = lambda images: teacher.logits(self.space.to_inputs(images))
        crafted = self.attack(
            bare,
            pixels,
            forward=lambda images: _logits(bare(self.space.to_inputs(images))),
            labels=targets,
            class_prior=None if self.prior is None else self.prior.prior(targets),
            strength=self.strength,
            check_values=False,
            **reference,
        )
        adversarial = self.space.to_inputs(crafted)
        # A second forward through DistributedDataParallel would broadcast BatchNorm's buffers in place, under the graph
        # of the first. Its hooks are on the parameters, so that gradients are averaged all the same.
        second = bare if isinstance(model, DistributedDataParallel) else model
        if self.natural_first:
            natural_logits, adversarial_logits = _logits(model(sample_batch)), _logits(second(adversarial))
        else:
            adversarial_logits, natural_logits = _logits(model(adversarial)), _logits(second(sample_batch))
        taught = None
        if teacher is not None and self.teacher_view == "adversarial":
            with torch.no_grad():
                taught = teacher.logits(adversarial)
        return AdversarialLogits(natural=natural_logits, adversarial=adversarial_logits, teacher=taught)

    def _warn_once(self, pixels: Tensor) -> None:
        if self._first_batch and self.space.normalises and pixels.numel() and pixels.min() >= self.space.mean.min() > 0:
            _logger.warning(
                "%s: in the first batch no pixel is darker than `mean`, once `mean` and `std` are undone. If the data "
                "set's transform does not normalise, leave both out: the attack would be too strong.",
                _CALLER,
            )
        self._first_batch = False

    def __repr__(self) -> str:
        return f"AdversarialForward({self.attack!r}, {self.space!r})"


def _logits(output: Any, role: str = "model") -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{_CALLER}: the {role} must return the tensor of logits, got {shown_output(output)}. Use another network."
        )
    return output
