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
back its key. The attack itself is :class:`ikl_plugins.adversarial.PGD`.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchdistill.common.module_util import check_if_fsdp_wrapped, check_if_wrapped
from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT, register_forward_proc_func

from .. import _validation as check
from ..adversarial import PGD, Strength
from .losses import PROCESS_LINE, AdversarialLogits

__all__ = ["AdversarialForward", "adversarial_forward"]

_logger = logging.getLogger(__name__)
_CALLER = "adversarial_forward"
_GREY_LEVEL = 1 / 255  # what normalising in a narrow dtype and undoing it may lose


def adversarial_forward(
    *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **attack: Any
) -> str:
    """Registers a forward process for adversarial training, for ``!import_call`` in a YAML file.

    Args:
        mean: what the data set's ``Normalize`` subtracts, one number per channel, of pixels in [0, 1]. None, together
            with ``std``, if the images are pixels.
        std: what it divides by.
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
    known = list(inspect.signature(PGD).parameters)
    for keyword in attack:
        if keyword not in known:
            raise TypeError(check.unknown_name_message(_CALLER, "keyword", keyword, [*known, "mean", "std"]))
    if "eps" not in attack:
        raise TypeError(f"{_CALLER}: `eps` must be given, the radius of the attack. Pass a number or '8/255'.")
    forward = AdversarialForward(PGD(**attack), mean=mean, std=std)
    settings = {**attack, "mean": mean, "std": std}
    shown = ", ".join(f"{name}={settings[name]!r}" for name in sorted(settings) if settings[name] is not None)
    key = f"ikl_plugins.{_CALLER}({shown})"
    holder = FORWARD_PROC_FUNC_DICT.get(key)
    if holder is None:
        register_forward_proc_func(key=key)(forward)
    elif not isinstance(holder, AdversarialForward):
        raise ValueError(
            f"{_CALLER}: the forward process key '{key}' must be free, but {holder!r} holds it. "
            f"Register that one under another key."
        )
    return key


class AdversarialForward:
    """A forward process of torchdistill: attacks the batch, then runs the adversarial and the natural images.

    Both training forwards run in the mode that the model is in, the adversarial one first, as the authors' script does.
    The attack runs on the bare model; it changes neither its modes nor its running statistics nor its gradients.

    Args:
        attack: the inner maximisation, in pixel space.
        mean: see :func:`adversarial_forward`.
        std: see :func:`adversarial_forward`.

    Raises:
        TypeError: ``mean`` or ``std`` is no sequence of numbers.
        ValueError: only one of them is given, their lengths differ, or a number is not one of pixels in [0, 1].

    Attributes:
        attack: the inner maximisation.
        strength: what the attack may do in the running epoch; None before ``ikl_pre_epoch_process`` has told the epoch.
    """

    def __init__(self, attack: PGD, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        if (mean is None) != (std is None):
            missing = "mean" if mean is None else "std"
            raise ValueError(
                f"{_CALLER}: `mean` and `std` must be given together, got no `{missing}`. Give both of the data set's "
                f"Normalize, or none of them if the images are pixels in [0, 1]."
            )
        self.attack = attack
        self.strength: Strength | None = None
        self._mean = None if mean is None else _per_channel("mean", mean)
        self._std = None if std is None else _per_channel("std", std)
        if self._mean is not None and self._std is not None and self._mean.shape != self._std.shape:
            raise ValueError(
                f"{_CALLER}: `mean` and `std` must have one length, got {len(self._mean)} and {len(self._std)}. "
                f"Give one number per channel, as in the data set's Normalize."
            )
        self._first_batch = True

    def in_epoch(self, epoch: int, epochs: int) -> AdversarialForward:
        """A forward process for one epoch: a box's own, as boxes of the same settings share the registered one.

        Args:
            epoch: number of the epoch in its stage, 1 for the first.
            epochs: how many epochs the stage has.

        Returns:
            A copy with the strength of that epoch.

        Raises:
            ValueError: the strength changes over the epochs, and ``epoch`` is beyond ``epochs``.
        """
        told = copy.copy(self)
        told.strength = self.attack.strength(epoch, epochs)
        told._first_batch = epoch == 1
        return told

    def __call__(
        self, model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None, **kwargs: Any
    ) -> AdversarialLogits:
        """The logits of both views.

        Args:
            model: the box's model, wrapped or not.
            sample_batch: natural images as the data set gives them, shape (N, C, H, W).
            targets: class indices (N,), needed for the objective ``'cross_entropy'``.
            supp_dict: ignored, as other forward processes do.
            **kwargs: ignored.

        Returns:
            Logits (N, classes) of the natural and of the adversarial images.

        Raises:
            TypeError: images that are no floating tensor.
            ValueError: images that are no pixels once ``mean`` and ``std`` are undone; labels or epochs missing; a
                model that returns no logits, or is sharded over processes.
        """
        if self.strength is None and self.attack.changes:
            raise ValueError(
                f"{_CALLER}: an attack whose strength changes over the epochs must know where epochs begin, but nobody "
                f"has said so. Add this line to `train:` of the config (or to each of its stages that uses it):\n"
                f"  {PROCESS_LINE}"
            )
        if self.attack.objective == "cross_entropy" and targets is None:
            raise ValueError(
                f"{_CALLER}: `targets` must be given with objective='cross_entropy', got None. Let the data set give "
                f"labels, or set objective: 'soft_cross_entropy'."
            )
        if check_if_fsdp_wrapped(model):
            raise ValueError(
                f"{_CALLER}: the model must be whole in each process, got one sharded by {type(model).__name__}. "
                f"Set `wrapper: 'DistributedDataParallel'` under `train: model:`."
            )
        bare: nn.Module = model.get_submodule("module") if check_if_wrapped(model) else model
        pixels = self._to_pixels(sample_batch)
        adversarial = self.attack(
            bare,
            pixels,
            forward=lambda images: _logits(bare, self._to_inputs(images)),
            labels=targets,
            strength=self.strength,
        )
        adversarial_logits = _logits(model, self._to_inputs(adversarial))
        # A second forward through DistributedDataParallel would broadcast BatchNorm's buffers in place, under the graph
        # of the first. Its hooks are on the parameters, so that gradients are averaged all the same.
        second = bare if isinstance(model, DistributedDataParallel) else model
        return AdversarialLogits(natural=_logits(second, sample_batch), adversarial=adversarial_logits)

    def _to_pixels(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"{_CALLER}: a batch must be a floating tensor of images, got {kind}. Let the transform of the data "
                f"set end with ToTensor and Normalize, or with ToTensor alone."
            )
        pixels = images.detach()
        if self._mean is not None and self._std is not None:
            if images.dim() < 2 or len(self._mean) not in (1, images.shape[1]):
                raise ValueError(
                    f"{_CALLER}: `mean` and `std` must have one number per channel of the images, got "
                    f"{len(self._mean)} for images of shape {tuple(images.shape)}. Give those of the data set's "
                    f"Normalize."
                )
            pixels = pixels * _like(self._std, images) + _like(self._mean, images)
        if pixels.numel() == 0:
            return pixels  # refused by the attack
        low, high = (bound.item() for bound in torch.aminmax(pixels))
        if not (low >= -_GREY_LEVEL and high <= 1 + _GREY_LEVEL):
            values = f"got values from {low:.4g} to {high:.4g}"
            if self._mean is None:
                raise ValueError(
                    f"{_CALLER}: images must be pixels in [0, 1], {values}. If the data set's transform normalises, "
                    f"give the attack the `mean` and `std` of its Normalize."
                )
            raise ValueError(
                f"{_CALLER}: images must be pixels in [0, 1] once `mean` and `std` are undone, {values}. Both must be "
                f"those of the data set's Normalize, which must come once, and behind ToTensor."
            )
        if self._first_batch and self._mean is not None and low >= self._mean.min() > 0:
            _logger.warning(
                "%s: in the first batch no pixel is darker than `mean`, once `mean` and `std` are undone. If the data "
                "set's transform does not normalise, leave both out: the attack would be too strong.",
                _CALLER,
            )
        self._first_batch = False
        return pixels.clamp(0, 1)

    def _to_inputs(self, pixels: Tensor) -> Tensor:
        if self._mean is None or self._std is None:
            return pixels
        return (pixels - _like(self._mean, pixels)) / _like(self._std, pixels)

    def __repr__(self) -> str:
        mean, std = (None if one is None else one.tolist() for one in (self._mean, self._std))
        return f"AdversarialForward({self.attack!r}, mean={mean}, std={std})"


def _per_channel(name: str, values: object) -> Tensor:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(
            f"{_CALLER}: `{name}` must be a list of numbers, one per channel, got {values!r}. "
            f"Write it as the data set's Normalize has it, such as [0.5, 0.5, 0.5]."
        )
    numbers = [check.check_number(_CALLER, name, value, positive=name == "std") for value in values]
    if max(numbers) > 1:
        raise ValueError(
            f"{_CALLER}: `{name}` must hold numbers of at most 1, as pixels lie in [0, 1], got {list(values)}. "
            f"Divide those of pixels in 0..255 by 255."
        )
    return torch.tensor(numbers, dtype=torch.float64)


def _like(numbers: Tensor, images: Tensor) -> Tensor:
    """One number per channel, in the images' dtype and shaped to broadcast."""
    return numbers.to(images.device, images.dtype).reshape(-1, *[1] * (images.dim() - 2))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    if isinstance(output, Tensor):
        return output
    what = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        what += f" with the keys {', '.join(map(repr, output))}"
    raise ValueError(
        f"{_CALLER}: the model must return the tensor of logits, got {what}. Attack a network whose forward gives the "
        f"logits alone."
    )
