"""A data set of generated images, as large as the disk allows."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from mmcv.transforms import LoadImageFromFile
from mmpretrain.datasets import BaseDataset

from .. import _validation as check
from .npz_memmap import MappedArray, map_images

__all__ = ["CHANNEL_ORDERS", "GeneratedImages"]

CHANNEL_ORDERS = ("bgr", "rgb")

_CALLER = "GeneratedImages"


class GeneratedImages(BaseDataset):  # type: ignore[misc]
    """Images and labels in the form in which the diffusion-generated CIFAR sets are published, mapped, not loaded.

    The form is an .npz file that holds ``image``, uint8 of shape (N, H, W, 3) in RGB order, and ``label``, N class
    indices. 50 million images are 150 GB: the file is mapped, an image is read when it is asked for, and a process
    keeps no more than about 128 MiB of the file in its resident memory.

    Args:
        data_file: the .npz file, which must not be compressed (see :func:`ikl_plugins.mmpretrain.unpack_npz`); or an
            .npy file of the images; or a list of such files, one after the other: parts need not be merged.
        label_file: where images are .npy files, those of the labels, likewise.
        data_root: the folder that the paths are relative to.
        channel_order: the order in which the pipeline gets the channels. ``'bgr'`` is that of ``LoadImageFromFile``,
            ``'rgb'`` that of MMPretrain's ``CIFAR10`` and ``CIFAR100``; the data preprocessor's ``to_rgb`` must fit.
        indices: the images to take: the first n; with -n the last n; or a list of positions. None for all.
        pipeline: transforms, without one that loads an image.
        metainfo: as in MMPretrain's ``BaseDataset``, like all that follow.
        classes: see there.
        test_mode: see there.
        lazy_init: opens the files at the first use.
        max_refetch: see there.

    Raises:
        ValueError: a file is missing, damaged or compressed, or holds something else; images of several sizes; an
            unknown channel order; positions out of range; a transform that loads images.

    Note:
        A sample has ``img``, ``img_shape``, ``ori_shape``, ``gt_label`` and ``sample_idx``. The data set is sent to
        workers without its images, each of them maps the files itself.

    References:
        Wang et al., Better Diffusion Models Further Improve Adversarial Training, ICML 2023, for the data.

    Example:
        In a config::

            generated = dict(type='GeneratedImages', data_root='data/cifar10', data_file='1m.npz', pipeline=[
                dict(type='RandomCrop', crop_size=32, padding=4),
                dict(type='RandomFlip', prob=0.5, direction='horizontal'),
                dict(type='PackInputs')])
    """

    _fully_initialized: bool

    def __init__(
        self,
        data_file: str | Path | Sequence[str | Path],
        label_file: str | Path | Sequence[str | Path] | None = None,
        *,
        data_root: str | Path = "",
        channel_order: str = "bgr",
        indices: int | Sequence[int] | None = None,
        pipeline: Sequence[Any] = (),
        metainfo: Any = None,
        classes: str | Sequence[str] | None = None,
        test_mode: bool = False,
        lazy_init: bool = False,
        max_refetch: int = 1000,
    ) -> None:
        if channel_order not in CHANNEL_ORDERS:
            raise ValueError(check.unknown_name_message(_CALLER, "`channel_order`", str(channel_order), CHANNEL_ORDERS))
        self.channel_order = channel_order
        self.data_files = _paths(data_root, data_file)
        self.label_files = [None] * len(self.data_files) if label_file is None else _paths(data_root, label_file)
        if len(self.label_files) != len(self.data_files):
            raise ValueError(
                f"{_CALLER}: `label_file` must name as many files as `data_file`, got {len(self.label_files)} and "
                f"{len(self.data_files)}."
            )
        self._parts: list[tuple[MappedArray, MappedArray]] = []
        self._ends: list[int] = []
        self._positions: range | numpy.ndarray[Any, Any] = range(0)
        super().__init__(
            ann_file="",
            metainfo=metainfo,
            data_root=str(data_root),
            indices=indices,
            serialize_data=False,
            pipeline=pipeline,
            test_mode=test_mode,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
            classes=classes,
        )
        if any(isinstance(transform, LoadImageFromFile) for transform in self.pipeline.transforms):
            raise ValueError(f"{_CALLER}: `pipeline` must not load images. Take LoadImageFromFile out.")

    def full_init(self) -> None:
        """Opens the files; a second call does nothing."""
        if self._fully_initialized:
            return
        files = zip(self.data_files, self.label_files, strict=True)
        self._parts = [map_images(data_file, label_file) for data_file, label_file in files]
        sizes = {images.shape[1:3] for images, _ in self._parts}
        if len(sizes) > 1:
            raise ValueError(f"{_CALLER}: `data_file` must have images of one size, got {sorted(sizes)}. Split it.")
        self._ends = list(itertools.accumulate(len(images) for images, _ in self._parts))
        self._positions = range(self._ends[-1])
        self._fully_initialized = True
        if self._indices is not None:
            self.get_subset_(self._indices)

    def __len__(self) -> int:
        self.full_init()
        return len(self._positions)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """One sample before the pipeline, from the end if ``idx`` is negative."""
        images, labels, row = self._place(idx)
        image = images[row]
        if self.channel_order == "bgr":
            image = numpy.ascontiguousarray(image[..., ::-1])
        return {
            "img": image,
            "img_shape": image.shape[:2],
            "ori_shape": image.shape[:2],
            "gt_label": int(labels[row]),
            "sample_idx": idx if idx >= 0 else idx + len(self),
        }

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of one sample, in a list, as MMPretrain's wrappers of data sets ask for it."""
        _, labels, row = self._place(idx)
        return [int(labels[row])]

    def get_gt_labels(self) -> numpy.ndarray[Any, Any]:
        """The classes of all samples, read into memory: 8 bytes for each image of the files."""
        self.full_init()
        labels = numpy.concatenate([part.read().astype(numpy.int64) for _, part in self._parts])
        positions = self._positions
        return labels[positions.start : positions.stop] if isinstance(positions, range) else labels[positions]

    def get_subset_(self, indices: int | Sequence[int]) -> None:
        """Keeps some of the samples; see ``indices`` of the class."""
        self.full_init()
        count = len(self._positions)
        if isinstance(indices, int):
            self._positions = self._positions[:indices] if indices >= 0 else self._positions[indices:]
            return
        chosen = numpy.asarray(indices, dtype=numpy.int64)
        if chosen.size and not (-count <= chosen.min() and chosen.max() < count):
            raise ValueError(
                f"{_CALLER}: `indices` must lie below the {count} images, got {chosen.min()} to {chosen.max()}. "
                f"Correct them."
            )
        chosen = numpy.where(chosen < 0, chosen + count, chosen)
        positions = self._positions
        self._positions = chosen + positions.start if isinstance(positions, range) else positions[chosen]

    def get_subset(self, indices: int | Sequence[int]) -> GeneratedImages:
        """A data set of some of the samples; see ``indices`` of the class."""
        subset = copy.deepcopy(self)
        subset.get_subset_(indices)
        return subset

    def extra_repr(self) -> list[str]:
        """What ``repr`` shows beside the number of samples."""
        return [f"Files: \t{', '.join(map(str, self.data_files))}", f"Channel order: \t{self.channel_order}"]

    def _place(self, idx: int) -> tuple[MappedArray, MappedArray, int]:
        count = len(self)
        if not -count <= idx < count:
            raise IndexError(f"{_CALLER}: sample {idx} of {count}")
        position = int(self._positions[idx])
        part = bisect.bisect_right(self._ends, position)
        images, labels = self._parts[part]
        return images, labels, position - (self._ends[part - 1] if part else 0)


def _paths(root: str | Path, files: str | Path | Sequence[str | Path]) -> list[Any]:
    listed = [files] if isinstance(files, (str, Path)) else list(files)
    if not listed:
        raise ValueError(f"{_CALLER}: `data_file` must name at least one file, got none. Name the .npz file.")
    return [Path(root).expanduser() / Path(file).expanduser() for file in listed]
