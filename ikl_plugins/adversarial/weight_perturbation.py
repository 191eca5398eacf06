"""Adversarial weight perturbation (AWP): the training gradient is taken where the loss is worse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor, nn

from .. import _validation as check
from .._value_checks import largest

__all__ = ["UNDO", "AdversarialWeightPerturbation"]

UNDO = ("before_step", "after_step")

_TINY = 1e-20  # keeps a gradient of 0 from being divided by 0


class AdversarialWeightPerturbation:
    r"""Moves the weights up the loss for one training step, and back.

    Each weight tensor w of at least two dimensions, g its gradient of the loss, becomes for the training pass::

        w + gamma * ||w|| * g / ||g||

    and is restored from a copy before the optimizer's step, or behind it. Biases and the affine parameters of
    normalisation layers stay.

    Args:
        gamma: relative size of the perturbation, above 0; the published runs have 5e-3.
        warmup_epochs: the first epoch with a perturbation, epochs counted from 1; 0 and 1 for all of them.
        undo: ``'before_step'``: weights are restored before the optimizer's step, which then decays the weights
            themselves. ``'after_step'``, as the authors' code has it: behind the step, which decays perturbed weights;
            what it has added to them stays.

    Raises:
        TypeError: a value that is no number.
        ValueError: a value out of range, or an unknown ``undo``.

    Note:
        When ``torch.distributed`` is initialised the gradients of all ranks are added first: one perturbation for all
        of them, so that replicas stay equal. All ranks must call :meth:`perturb`. Where a gradient is not finite, as
        under a loss scale that is still falling, nothing is perturbed.

    References:
        Wu et al., Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, equations 8 to 12. The
        selection of weights is that of its authors' code: 'weight' in the name and at least two dimensions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> awp = AdversarialWeightPerturbation(gamma=0.1)
        >>> images = torch.tensor([[1.0, 0.0]])
        >>> with awp.perturbed(model, model(images).sum()):
        ...     model(images).sum().backward()
        ...     print(model.weight.data)
        tensor([[1.1414, 1.0000]])
        >>> model.weight.data
        tensor([[1., 1.]])
    """

    def __init__(self, *, gamma: float = 5e-3, warmup_epochs: int = 10, undo: str = "before_step") -> None:
        caller = type(self).__name__
        self.gamma = check.check_number(caller, "gamma", gamma, positive=True)
        self.warmup_epochs = check.check_number(caller, "warmup_epochs", warmup_epochs)
        if undo not in UNDO:
            raise ValueError(check.unknown_name_message(caller, "`undo`", str(undo), UNDO))
        self.undo = undo
        self._originals: list[tuple[Tensor, Tensor]] = []
        self._perturbed: list[Tensor] = []  # as they were before the optimizer's step, if that comes first

    def active(self, epoch: int) -> bool:
        """Whether weights are perturbed in ``epoch``, 1 for the first."""
        return epoch >= self.warmup_epochs

    def perturb(self, model: nn.Module, loss: Tensor) -> None:
        """Perturbs the weights of ``model``; :meth:`restore` must follow.

        Args:
            model: the network, not wrapped for several ranks.
            loss: a scalar with a graph to the weights: the training loss at the weights as they are. The graph is used
                up; no parameter's ``.grad`` is touched.

        Raises:
            ValueError: weights are perturbed already or sharded, ``loss`` depends on no weight tensor or is no scalar.
        """
        caller = f"{type(self).__name__}.perturb"
        if self._originals:
            raise ValueError(f"{caller}: weights must be restored first. Call restore().")
        if is_sharded(model):
            raise ValueError(
                f"{caller}: `model` must hold whole weights, got one sharded by FSDP. Use DistributedDataParallel."
            )
        if loss.dim() > 0 or not loss.requires_grad:
            raise ValueError(
                f"{caller}: `loss` must be a scalar with a graph, got shape {tuple(loss.shape)} and "
                f"requires_grad={loss.requires_grad}."
            )
        weights: list[Tensor] = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.dim() >= 2 and "weight" in name
        ]
        found = torch.autograd.grad(loss, weights, allow_unused=True) if weights else ()
        if all(gradient is None for gradient in found):
            raise ValueError(
                f"{caller}: `loss` must depend on a trainable weight of `model` with at least two dimensions."
            )
        self._move(
            weights,
            [
                torch.zeros_like(weight) if gradient is None else gradient
                for weight, gradient in zip(weights, found, strict=True)
            ],
        )
        torch.clear_autocast_cache()  # or the training pass would see copies of the weights as they were

    @torch.no_grad()
    def _move(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """A few launches for all weights together, and one for each to add its part."""
        devices: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for weight, gradient in zip(weights, gradients, strict=True):
            devices.setdefault(weight.device, []).append((weight, gradient))
        flats = [torch.cat([gradient.reshape(-1) for _, gradient in pairs]) for pairs in devices.values()]
        flats = [flat.to(torch.promote_types(flat.dtype, torch.float32)) for flat in flats]  # for numbers like _TINY
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for flat in flats:
                torch.distributed.all_reduce(flat)  # the sum: the perturbation does not depend on its scale
        bound = largest(flats[0])
        for flat in flats[1:]:
            bound = bound + largest(flat).to(bound.device)
        for flat, pairs in zip(flats, devices.values(), strict=True):
            # What has overflowed in half precision gives no direction: the step is taken at the weights as they are.
            flat = torch.where(bound.to(flat.device) < torch.inf, flat, 0.0)
            self._move_along(flat, [weight for weight, _ in pairs])

    def _move_along(self, flat: Tensor, weights: list[Tensor]) -> None:
        parts = torch.split(flat, [weight.numel() for weight in weights])
        scales = self.gamma * _norms(weights) / (_norms(parts) + _TINY)
        self._originals += zip(weights, _copies(weights), strict=True)
        for weight, part, scale in zip(weights, parts, scales.unbind(), strict=True):
            weight.addcmul_(part.view(weight.shape), scale)
        if self.undo == "after_step":
            self._perturbed += _copies(weights)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back; nothing happens when none are perturbed.

        With ``undo='before_step'`` to the bit; with ``'after_step'`` what has been added to them since stays, and where
        nothing has been, as no step was made, they are what they were.
        """
        if self._originals:
            weights, originals = zip(*self._originals, strict=True)
            if self._perturbed:
                # Not weights - perturbation, which rounds: a step that a loss scaler skips would change them.
                originals = torch._foreach_add(originals, torch._foreach_sub(weights, self._perturbed))
            torch._foreach_copy_(weights, originals)
            self._originals.clear()
            self._perturbed.clear()
            torch.clear_autocast_cache()

    @contextmanager
    def perturbed(self, model: nn.Module, loss: Tensor) -> Iterator[None]:
        """Runs forward and backward, and for ``undo='after_step'`` the optimizer's step, with perturbed weights."""
        try:
            self.perturb(model, loss)
            yield
        finally:
            self.restore()


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds the whole weights: FSDP, wrapped around the model or around parts of it."""
    wrappers = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    shards = any(hasattr(weight, "placements") or "_flat_param" in name for name, weight in model.named_parameters())
    return shards or not wrappers.isdisjoint(("FullyShardedDataParallel", "FSDPModule"))


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, in a dtype that knows numbers as small as ``_TINY``."""
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return torch.stack(torch._foreach_norm(wide))
