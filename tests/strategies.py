"""Hypothesis strategies that the tests of several rooms share: random tensors, and layouts of strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("contiguous", "reversed dimensions", "channels last", "every second", "offset", "expanded")

seeds = st.integers(0, 2**31 - 1)


@st.composite
def generators(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(seeds))


def one_of(values: Sequence[float], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A float64 tensor each of whose entries is one of the values."""
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), tuple(shape), generator=generator)]


def laid_out(dense: Tensor, layout: str) -> Tensor:
    """The numbers of ``dense`` (for 'expanded': of its first sample) with the strides of ``layout``."""
    dimensions = list(range(dense.dim()))
    if layout == "reversed dimensions":
        return dense.permute(dimensions[::-1]).contiguous().permute(dimensions[::-1])
    if layout == "channels last":
        return dense.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "every second":
        wide = dense.new_full([2 * size for size in dense.shape], float("nan"))
        every_second = wide[tuple(slice(None, None, 2) for _ in dimensions)]
        return every_second.copy_(dense)
    if layout == "offset":
        return torch.cat([dense.new_full((3,), float("nan")), dense.flatten()])[3:].view(dense.shape)
    if layout == "expanded" and len(dense):
        return dense[:1].expand(dense.shape)
    return dense


def layouts(dense: Tensor) -> st.SearchStrategy[Tensor]:
    """``dense`` with any strides."""
    return st.sampled_from(LAYOUTS).map(lambda layout: laid_out(dense, layout))


def mapped_from(options: dict[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    """One of the named options, with what its function gives."""
    return st.sampled_from(sorted(options)).map(lambda name: (name, options[name]()))
