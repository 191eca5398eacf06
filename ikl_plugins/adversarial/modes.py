"""Scopes in which a model runs in another mode, or leaves its running statistics alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["frozen_statistics", "model_mode"]


@contextmanager
def model_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Runs a block with ``model`` in eval or in training mode; afterwards each module has its own flag back.

    A plain ``model.train()`` afterwards would wake what its owner has put to sleep: a frozen batch normalisation, say.

    Args:
        model: the network.
        mode: ``'eval'`` or ``'train'``.

    Raises:
        ValueError: another ``mode``.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with model_mode(model, "eval"):
        ...     print([module.training for module in model])
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"model_mode: `mode` must be 'eval' or 'train', got {mode!r}. Use one of them.")
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train(mode == "train")
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Runs a block in which no batch or instance normalisation updates its running statistics or its count of batches.

    Layers in training mode go on normalising with the statistics of the batch; layers in eval mode are left alone.

    Args:
        model: the network, already in the mode that the block needs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(1)
        >>> with frozen_statistics(layer):
        ...     output = layer(torch.tensor([[1.0], [3.0]]))
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0.]), tensor(0))
    """
    # A layer in training mode that does not track takes the batch's statistics. Batch normalisation then touches no
    # buffer, instance normalisation writes to those it has.
    tracking = [
        (module, module.running_mean, module.running_var)
        for module in model.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
    ]
    try:
        for module, _, _ in tracking:
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, mean, variance in tracking:
            module.track_running_stats = True
            module.running_mean, module.running_var = mean, variance
