"""Two views of an image in one batch: for a robust loss on a basic and an augmented view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmpretrain.models import ClsDataPreprocessor
from torch import Tensor

__all__ = ["TwoViewDataPreprocessor"]


class TwoViewDataPreprocessor(ClsDataPreprocessor):  # type: ignore[misc]
    """MMPretrain's ``ClsDataPreprocessor`` for the two views that ``MultiView`` makes of every training image.

    Both views go through the same colour conversion, normalisation and padding; the model gets them as a list, the
    basic view first. A batch of single images, as in validation, passes as it does through the parent.

    Args:
        **kwargs: those of ``ClsDataPreprocessor``; batch augmentations, which mix images, are refused.

    Raises:
        ValueError: batch augmentations, or another number of views than two.

    Example:
        In a config::

            train_pipeline = [
                dict(type='LoadImageFromFile'),
                dict(type='MultiView', num_views=[1, 1], transforms=[basic_view, augmented_view]),
                dict(type='PackInputs'),
            ]
            data_preprocessor = dict(type='TwoViewDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.batch_augments is not None:
            raise ValueError(
                "TwoViewDataPreprocessor: `batch_augments` must be None. Remove `train_cfg: augments` from the model."
            )

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """A collated batch of one or two views: 'inputs' become a tensor (N, C, H, W), or a list of two."""
        inputs = data["inputs"]
        if not _has_views(inputs):
            return super().forward(data, training)  # type: ignore[no-any-return]
        if len(inputs) != 2:
            raise ValueError(
                f"TwoViewDataPreprocessor: `inputs` must hold two views of each image, got {len(inputs)}. "
                f"Set num_views=[1, 1]."
            )
        # Padding depends on all images of a batch, so both views are prepared as one.
        merged = torch.cat(list(inputs)) if isinstance(inputs[0], Tensor) else [*inputs[0], *inputs[1]]
        prepared = super().forward({**data, "inputs": merged}, training)
        return {**prepared, "inputs": list(prepared["inputs"].chunk(2))}


def _has_views(inputs: Any) -> bool:
    """Whether collated inputs are views, each a batch of its own. Single images are one tensor, or a list of them."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        return False
    return not isinstance(inputs[0], Tensor) or inputs[0].dim() == 4
