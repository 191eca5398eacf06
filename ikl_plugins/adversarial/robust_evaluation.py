"""Robust accuracy during training: AutoAttack's APGD-CE on images held out, on as many ranks as there are."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _validation as check
from .._random_states import kept_random_states
from .schedule import pixel_number

__all__ = ["METRIC", "Accuracies", "RobustEvaluation"]

METRIC = "robust/apgd-ce"
_NORMS = ("Linf", "L2", "L1")


class Accuracies(NamedTuple):
    """Of the same images, in percent.

    Attributes:
        natural: right as they are.
        robust: right as they are, and under APGD-CE.
    """

    natural: float
    robust: float


class RobustEvaluation:
    """The accuracy that the first attack of standard AutoAttack leaves: APGD on the cross entropy, 100 iterations.

    The attack is AutoAttack's own code, and its result that of AutoAttack with the same images in the same batches, the
    same seed and ``attacks_to_run=['apgd-ce']``. It is an upper bound of the robust accuracy, no substitute for all
    four attacks.

    Args:
        eps: radius in pixel units, a number or text such as ``'8/255'``; at most 1 for L-inf.
        norm: 'Linf', 'L2' or 'L1'.
        n_examples: number of images, spread over the classes; all where there are fewer.
        interval: evaluate behind every so many epochs, and behind the last.
        n_restarts: random restarts; None for those of standard AutoAttack, 1, and 5 for L1.
        batch_size: images in a batch. They share random numbers, so that it is part of the result.
        seed: of the random starts; those of the training are not touched.
        caller: how errors call the adapter.

    Raises:
        TypeError: a number that is none.
        ValueError: a value out of range.
        ImportError: no AutoAttack is installed.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks, ICML 2020.
    """

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "Linf",
        n_examples: int = 512,
        interval: int = 1,
        n_restarts: int | None = None,
        batch_size: int = 128,
        seed: int = 0,
        caller: str = "RobustEvaluation",
    ) -> None:
        if norm not in _NORMS:
            raise ValueError(check.unknown_name_message(caller, "norm", norm, _NORMS))
        self.eps = pixel_number(caller, "eps", eps)
        if norm == "Linf" and self.eps > 1:
            raise ValueError(f"{caller}: `eps` must be at most 1 for Linf, got {eps}. Write '8/255'.")
        self.text = f"eps {eps}, {norm}"
        self.norm = norm
        self.n_examples = check.check_integer(caller, "n_examples", n_examples)
        self.interval = check.check_integer(caller, "interval", interval)
        self.n_restarts = None if n_restarts is None else check.check_integer(caller, "n_restarts", n_restarts)
        self.batch_size = check.check_integer(caller, "batch_size", batch_size)
        self.seed = check.check_integer(caller, "seed", seed, least=0)
        self._autoattack = _autoattack(caller)

    def due(self, done: int, end: int | None) -> bool:
        """Whether to evaluate behind ``done`` epochs of ``end``."""
        return done % self.interval == 0 or done == end

    def chosen(self, labels: Sequence[int] | None, length: int) -> list[int]:
        """Which images of a data set to take: of each class its first ones, equally many as far as they reach.

        Args:
            labels: of all images; None where they are not known, and images are taken at equal distances.
            length: number of images.

        Returns:
            Rising indices.
        """
        count = min(self.n_examples, length)
        if labels is None:
            return [index * length // count for index in range(count)]
        seen: Counter[int] = Counter()
        rank_in_class = []
        for label in labels:
            rank_in_class.append(seen[label])
            seen[label] += 1
        return sorted(sorted(range(length), key=rank_in_class.__getitem__)[:count])

    def accuracies(
        self, network: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> Accuracies:
        """Attacks the images that ``network`` gets right.

        In a process group the ranks share the batches, with the buffers of rank 0, which are those of a checkpoint; all
        get the result of a single rank. Modes, buffers and random numbers are then as they were.

        Args:
            network: whose modes and buffers matter; in eval mode meanwhile. Its parameters get no gradient.
            logits: from pixels to the float32 logits (N, classes), differentiable.
            images: pixels in [0, 1], shape (N, C, H, W), on the device of the network.
            labels: class indices (N,).

        Returns:
            The accuracies.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if _in_group() else (0, 1)
        with torch.inference_mode(False), _judged(network), kept_random_states():
            perturb = self._attack(logits, images.device)
            right = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            for batch in torch.split(torch.arange(len(images), device=images.device), self.batch_size)[rank::ranks]:
                right[batch] = _is_right(logits, images[batch], labels[batch])
            _over_ranks(right, "SUM")
            robust = right.clone()
            for batch in torch.split(right.nonzero().flatten(), self.batch_size)[rank::ranks]:
                robust[batch] = _is_right(logits, perturb(images[batch], labels[batch]), labels[batch])
            _over_ranks(robust, "MIN")
        natural, standing = torch.stack([right.sum(), robust.sum()]).tolist()
        return Accuracies(100.0 * natural / len(images), 100.0 * standing / len(images))

    def _attack(self, logits: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        adversary = self._autoattack(
            logits, norm=self.norm, eps=self.eps, seed=self.seed, verbose=False, version="standard", device=device
        )
        apgd = adversary.apgd
        apgd.loss = "ce"
        if self.n_restarts is not None:
            apgd.n_restarts = self.n_restarts

        def perturb(images: Tensor, labels: Tensor) -> Tensor:
            apgd.seed = self.seed  # AutoAttack begins each batch with it
            adversarial: Tensor = apgd.perturb(images, labels)
            return adversarial

        return perturb


def _autoattack(caller: str) -> Any:
    """The class AutoAttack: the original where it is installed, else pyautoattack's with the original's interface."""
    try:
        return importlib.import_module("autoattack").AutoAttack
    except ImportError:
        try:
            from .._autoattack import AutoAttack
        except ImportError as error:
            raise ImportError(
                f"{caller} needs an AutoAttack, but `{error.name}` is missing. Run: pip install pyautoattack",
                name=error.name,
            ) from error
    return AutoAttack


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _over_ranks(values: Tensor, operation: str) -> None:
    if _in_group():
        dist.all_reduce(values, op=getattr(dist.ReduceOp, operation))


@torch.no_grad()
def _is_right(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return logits(images).max(dim=1)[1].eq(labels).to(torch.int64)  # as AutoAttack decides between equal logits


@contextmanager
def _judged(network: nn.Module) -> Iterator[None]:
    """Eval mode and, in a process group, the buffers of rank 0; afterwards both as they were."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()] if _in_group() else []
    try:
        network.eval()
        for buffer, _ in buffers:
            dist.broadcast(buffer, 0)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, own in buffers:
            buffer.copy_(own)
