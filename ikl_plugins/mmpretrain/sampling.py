"""Batches of real and generated images in a fixed proportion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import ConcatDataset
from mmengine.dist import get_dist_info
from mmpretrain.datasets import CIFAR10
from torch.utils.data import Sampler

from .. import _validation as check
from .generated import GeneratedImages

__all__ = ["GeneratedBatchSampler"]

_CALLER = "GeneratedBatchSampler"
_WAY_OUT = (
    "Write dataset=dict(type='ConcatDataset', ignore_keys='classes', datasets=[real, generated]) and "
    "sampler=dict(type='DefaultSampler', shuffle=True)"
)


class GeneratedBatchSampler(Sampler[list[int]]):
    r"""Mixes generated images into every batch: ``floor(fraction * B)`` of its B images, the rest real.

    Generated images are drawn with replacement from all of them. Real images are drawn without: within an epoch none
    comes twice unless each has come once. Every batch is full, and an epoch has ``ceil(epoch_size / B)`` steps, so that
    with a fraction of 0.7 it shows 30 % of the real images.

    B is the batch of all ranks together, ``batch_size`` times their number: the fraction holds for it, the ranks share
    its generated images evenly, and no real image goes to two of them.

    Args:
        sampler: MMEngine's ``DefaultSampler`` of a ``ConcatDataset`` whose first data set has the real images, all
            others the generated ones. Its seed and its epoch are used, its order is not.
        batch_size: images of a batch of one rank. MMEngine passes it on from the ``dataloader``.
        fraction: share of generated images in a batch, from 0 to below 1.
        epoch_size: how many images make an epoch; by default the number of real images. 50,000 for CIFAR of which some
            images are held out.

    Raises:
        TypeError: a number that is none.
        ValueError: a fraction or a size out of range; another data set or sampler; images that would reach the network
            with red and blue exchanged.

    Note:
        The batches of an epoch depend on the seed, the epoch and the number of ranks alone, so that a resumed run draws
        what the uninterrupted one would. MMEngine's ``DistSamplerSeedHook``, one of its default hooks, sets the epoch
        at the sampler.

    References:
        Carmon et al., Unlabeled Data Improves Adversarial Robustness, NeurIPS 2019; Gowal et al., Improving Robustness
        using Generated Data, NeurIPS 2021.

    Example:
        In a config::

            train_dataloader = dict(
                batch_size=512,
                dataset=dict(type='ConcatDataset', ignore_keys='classes', datasets=[real, generated]),
                sampler=dict(type='DefaultSampler', shuffle=True),
                batch_sampler=dict(type='GeneratedBatchSampler', fraction=0.7))
    """

    def __init__(self, sampler: Any, batch_size: int, *, fraction: float, epoch_size: int | None = None) -> None:
        fraction = check.check_number(_CALLER, "fraction", fraction)
        if fraction >= 1:
            raise ValueError(
                f"{_CALLER}: `fraction` must be below 1, got {fraction}. Without real images use no batch_sampler."
            )
        self.sampler = sampler
        self.batch_size = check.check_integer(_CALLER, "batch_size", batch_size)
        self.real_images, self.generated_images = _sizes(sampler)
        self.epoch_size = (
            self.real_images if epoch_size is None else check.check_integer(_CALLER, "epoch_size", epoch_size)
        )
        self.rank, self.world_size = get_dist_info()
        together = self.batch_size * self.world_size
        # As a decimal fraction: 0.29 of 100 are 29, though the float 0.29 is a little less.
        self.generated_per_step = math.floor(Fraction(str(fraction)) * together)
        self.real_per_step = together - self.generated_per_step
        self.steps: int = math.ceil(self.epoch_size / together)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        # All ranks draw the same batch and take every world_size-th image of it.
        random = numpy.random.default_rng((self.sampler.seed, self.sampler.epoch))
        order = numpy.empty(0, dtype=numpy.int64)
        for _ in range(self.steps):
            while len(order) < self.real_per_step:
                order = numpy.concatenate([order, random.permutation(self.real_images)])
            real, order = order[: self.real_per_step], order[self.real_per_step :]
            generated = self.real_images + random.integers(self.generated_images, size=self.generated_per_step)
            yield numpy.concatenate([real, generated])[self.rank :: self.world_size].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Sets the next epoch, 0 for the first, as MMEngine does at the sampler itself."""
        self.sampler.set_epoch(epoch)


def _sizes(sampler: Any) -> tuple[int, int]:
    """How many real and how many generated images the sampler's data set has."""
    if not all(hasattr(sampler, name) for name in ("dataset", "seed", "epoch", "set_epoch")):
        raise ValueError(f"{_CALLER}: `sampler` must be a DefaultSampler, got {type(sampler).__name__}. {_WAY_OUT}.")
    if not getattr(sampler, "shuffle", True):
        raise ValueError(f"{_CALLER}: `sampler` must have shuffle=True, got False. {_WAY_OUT}.")
    dataset = sampler.dataset
    if not isinstance(dataset, ConcatDataset) or len(dataset.datasets) < 2:
        what = type(dataset).__name__
        raise ValueError(
            f"{_CALLER}: the data set must be a ConcatDataset of real and generated images, got "
            f"{'one with a single part' if isinstance(dataset, ConcatDataset) else what}. {_WAY_OUT}."
        )
    real, *generated = dataset.datasets
    for part in dataset.datasets:
        if len(part) == 0:
            raise ValueError(
                f"{_CALLER}: every data set must have images, got a {type(part).__name__} of none. Look at its paths."
            )
    for part in generated:
        _check_channels(real, part)
    return len(real), sum(map(len, generated))


def _check_channels(real: Any, generated: Any) -> None:
    """MMPretrain's CIFAR sets give RGB, images from files come as BGR: one batch must not have both."""
    if not isinstance(generated, GeneratedImages):
        return
    first = next(iter(getattr(getattr(real, "pipeline", None), "transforms", [])), None)
    order = "rgb" if isinstance(real, CIFAR10) else "bgr" if isinstance(first, LoadImageFromFile) else None
    if order not in (None, generated.channel_order):
        preprocessor = "to_rgb=False" if order == "rgb" else "to_rgb=True"
        raise ValueError(
            f"{_CALLER}: GeneratedImages must have channel_order='{order}' beside {type(real).__name__}, got "
            f"'{generated.channel_order}'. Change it and use {preprocessor}."
        )
