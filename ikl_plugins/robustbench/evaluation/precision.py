"""A quick look at another precision or memory layout, whose result is not AutoAttack's."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ... import _validation as check

__all__ = ["PRECISIONS", "QuickLook", "precision_in_words", "quick_look"]

PRECISIONS = ("float32", "bfloat16")


class QuickLook(nn.Module):
    """A network under autocast or in the layout channels last, with float32 images and logits as attacks need them.

    Args:
        network: in eval mode; it keeps its weights.
        precision: 'float32' or 'bfloat16'.
        channels_last: whether it gets its images in that layout.
    """

    def __init__(self, network: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.network = network
        self._dtype = getattr(torch, precision)
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            images = images.view_as(images)
            # Attacks take views of gradients, which would come in the layout of the network.
            images.register_hook(lambda gradient: gradient.contiguous())  # type: ignore[no-untyped-call]
        low = self._dtype is not torch.float32
        with torch.autocast(images.device.type, self._dtype) if low else contextlib.nullcontext():
            logits: Tensor = self.network(images.to(memory_format=self._layout))
        return logits.float()


def precision_in_words(caller: str, precision: str, channels_last: bool) -> str:
    """As the log has it: 'float32' for no quick look, else such as 'bfloat16, channels_last'."""
    if precision not in PRECISIONS:
        raise ValueError(check.unknown_name_message(caller, "precision", precision, PRECISIONS))
    if not isinstance(channels_last, bool):
        raise TypeError(f"{caller}: `channels_last` must be True or False, got {channels_last!r}.")
    return f"{precision}, channels_last" if channels_last else precision


def quick_look(model: nn.Module, words: str) -> nn.Module:
    """The model as an evaluation ran it whose log has these words as ``precision``."""
    precision, _, layout = words.partition(", ")
    return model if words == "float32" else QuickLook(model, precision, bool(layout))
