"""From tensors and settings to the launches of :mod:`ikl_plugins.kernels._device_code`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._composed import LEAST_GAMMA, Settings

__all__ = ["Kept", "find_gradients", "find_values"]

# Registers hold a tile several times over: 8 elements for each thread of up to 16 warps. So many classes fit one tile.
_CLASSES_OF_A_TILE = 4096
# Where the places of a sample lie side by side in memory, 16 rows are read together: they fill a sector of 32 bytes.
_CLASSES_OF_A_TILE_SIDE_BY_SIDE = 256
_ROWS_SIDE_BY_SIDE = 16
_ELEMENTS_OF_A_WARP = 256
_SUMMED_AT_ONCE = 1024

_Strides = tuple[int, int, int]  # of (samples, classes, places)


class Kept(NamedTuple):
    """What the gradients need of the values, beside their operands."""

    factor: Tensor | None  # GKL's on the weighted MSE, of each program
    saved: Tensor | None  # (7, rows), if a row is larger than a tile


class _Plan(NamedTuple):
    """The operands as (samples, classes, places), and how programs share them out."""

    samples: int
    classes: int
    places: int
    tile_rows: int
    tile_classes: int
    warps: int
    strides: list[_Strides]

    @property
    def programs_of_a_sample(self) -> int:
        return -(-self.places // self.tile_rows)

    @property
    def programs(self) -> int:
        return self.samples * self.programs_of_a_sample

    @property
    def whole_rows(self) -> bool:
        return self.tile_classes >= self.classes


def find_values(
    student: Tensor, teacher: Tensor, class_prior: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Loss, weighted MSE and soft cross entropy after the reduction, in two launches.

    For the reduction 'none' it takes two as well, or five where GKL divides.
    """
    from . import _device_code as code

    student, teacher = _collapsible(student), _collapsible(teacher)
    prior = None if class_prior is None else _collapsible(class_prior)
    plan = _plan(student, teacher, prior)
    rows = plan.samples * plan.places
    each_row = settings.reduction == "none"
    divides = settings.divide_by_pairs and settings.beta > 0
    scale = 1.0 / rows if settings.reduction == "batchmean" else 1.0

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    shape = (student.shape[0], *student.shape[2:]) if each_row else (plan.programs,)
    mse, cross_entropy = empty(*shape), empty(*shape)
    pairs, factor = (empty(plan.programs), empty(plan.programs)) if divides else (None, None)
    divisors = empty(2, plan.programs) if divides else None
    kept = Kept(factor, None if plan.whole_rows else empty(7, rows))
    power = settings.gamma if prior is not None else -settings.gamma
    with _on_device_of(student):
        code.values_kernel[(plan.programs,)](
            student,
            teacher,
            prior,
            mse,
            cross_entropy,
            pairs,
            divisors,
            kept.saved,
            *_sizes_layout_factors(code, plan, settings),
            mse_scale=0.5 * settings.beta * scale,
            ce_scale=settings.alpha * scale,
            each_row=each_row,
            **_constants(code, plan, settings, prior),
        )
        if not each_row:
            totals = empty(), empty(), empty()
            code.totals_kernel[(1,)](
                mse,
                cross_entropy,
                pairs,
                divisors,
                *totals,
                factor,
                plan.programs,
                rows,
                power,
                block=_SUMMED_AT_ONCE,
                enable_fp_fusion=False,
            )
            return *totals, kept
        if factor is not None:
            code.totals_kernel[(1,)](
                None,
                None,
                pairs,
                divisors,
                None,
                None,
                None,
                factor,
                plan.programs,
                rows,
                power,
                block=_SUMMED_AT_ONCE,
                enable_fp_fusion=False,
            )
            shares = factor.view(plan.samples, -1, 1).expand(-1, -1, plan.tile_rows).reshape(plan.samples, -1)
            mse.view(plan.samples, plan.places).mul_(shares[:, : plan.places])
    return mse + cross_entropy, mse, cross_entropy, kept


def find_gradients(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    kept: Kept,
    upstream: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``(upstream * loss).sum()``, each in the dtype of its logits, in one launch."""
    from . import _device_code as code

    student, teacher = _collapsible(student), _collapsible(teacher)
    prior = None if class_prior is None else _collapsible(class_prior)
    like = torch.empty_like(student, device="meta")
    if _strides(like) is None:
        like = torch.empty_like(like, memory_format=torch.contiguous_format)
    upstream_rows = None if upstream.dim() == 0 else _collapsible(upstream.unsqueeze(1))
    found = [
        torch.empty_strided(like.shape, like.stride(), dtype=logits.dtype, device=logits.device) if need else None
        for logits, need in zip((student, teacher), needs, strict=True)
    ]
    plan = _plan(student, teacher, prior, upstream_rows, like)
    rows = plan.samples * plan.places
    scale = 1.0 / rows if settings.reduction == "batchmean" else 1.0
    with _on_device_of(student):
        code.gradients_kernel[(plan.programs,)](
            student,
            teacher,
            prior,
            upstream if upstream_rows is None else upstream_rows,
            kept.factor,
            kept.saved,
            *found,
            *_sizes_layout_factors(code, plan, settings),
            mse_scale=settings.beta * scale / settings.mse_temperature,
            ce_scale=settings.alpha * scale / settings.temperature,
            student_in_mse=settings.student_in_mse,
            **_constants(code, plan, settings, prior),
        )
    return found[0], found[1]


def _sizes_layout_factors(code: Any, plan: _Plan, settings: Settings) -> tuple[Any, Any, Any]:
    return (
        code.Sizes(plan.classes, plan.places, plan.programs_of_a_sample, plan.samples * plan.places),
        code.Layout(*(code.Strides(*strides) for strides in plan.strides)),
        code.Factors(
            1.0 / settings.temperature,
            1.0 / settings.weight_temperature,
            1.0 / settings.mse_temperature,
            max(settings.gamma, LEAST_GAMMA),
        ),
    )


def _constants(code: Any, plan: _Plan, settings: Settings, prior: Tensor | None) -> dict[str, int | bool]:
    """What a kernel is compiled for, beside dtypes and strides."""
    if settings.beta == 0:
        weights = code.WITHOUT
    elif settings.gamma == 0:
        weights = code.ONES
    elif prior is not None:
        weights = code.PRIOR if settings.gamma == 1.0 else code.PRIOR_POWER
    elif settings.gamma != 1.0:
        weights = code.SOFTMAX_POWER
    else:
        weights = code.LABELS if settings.weight_temperature == settings.temperature else code.SOFTMAX
    # One more value goes from tile to tile, and with it some registers of each thread.
    halved = weights is code.PRIOR_POWER and not plan.whole_rows
    return {
        "cross_entropy": settings.alpha > 0,
        "weights": weights.value,
        "whole_rows": plan.whole_rows,
        "tile_rows": plan.tile_rows,
        "tile_classes": plan.tile_classes // 2 if halved else plan.tile_classes,
        # A fused multiply-add would make noise of a difference that is 0.
        "enable_fp_fusion": False,
        "num_warps": plan.warps,
    }


def _plan(student: Tensor, *others: Tensor | None) -> _Plan:
    """A plan for the student's shape.

    Args:
        student: logits.
        others: teacher, prior, upstream, gradients, in this order; a prior may be (N, C). None gets strides of 0.
    """
    samples, classes, places = student.shape[0], student.shape[1], student.shape[2:].numel()
    strides = [_strides_in(tensor, student) for tensor in (student, *others)]
    strides += [(0, 0, 0)] * (5 - len(strides))
    if places == 1:
        samples, places = 1, samples
        strides = [(0, category, sample) for sample, category, _ in strides]
    elif all(sample == place * places for sample, _, place in strides):  # channels last
        samples, places = 1, samples * places
    _, category, place = strides[0]
    if category == 1 or place != 1:
        tile_classes = min(_power_of_two(classes), _CLASSES_OF_A_TILE)
        tile_rows = max(1, 512 // tile_classes)
        warps = tile_rows * tile_classes // _ELEMENTS_OF_A_WARP
    else:
        tile_classes = min(_power_of_two(classes), _CLASSES_OF_A_TILE_SIDE_BY_SIDE)
        tile_rows = max(_ROWS_SIDE_BY_SIDE, 1024 // tile_classes)
        warps = tile_rows * tile_classes // _ELEMENTS_OF_A_WARP
        if tile_classes < classes:  # the statistics of 16 rows that go from tile to tile need the registers of half
            tile_classes //= 2
    return _Plan(samples, classes, places, tile_rows, tile_classes, warps, strides)


def _power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()


def _collapsible(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of one whose places d1, ... are not evenly apart."""
    return tensor if _strides(tensor) is not None else tensor.contiguous()


def _strides(tensor: Tensor) -> _Strides | None:
    """Of (N, C, d1, ...) as (N, C, d1 * ...), if it can be seen so; the last is 0 where there are no places."""
    step, size = 0, 1
    for length, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if length == 1:
            continue
        if size == 1:
            step = stride
        elif stride != step * size:
            return None
        size *= length
    return tensor.stride(0), tensor.stride(1), step


def _strides_in(tensor: Tensor | None, student: Tensor) -> _Strides:
    if tensor is None:
        return 0, 0, 0
    found = _strides(tensor)
    if found is None:
        raise ValueError(
            f"kernels: strides {tensor.stride()} must have one step behind the classes. Call contiguous()."
        )
    return found


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
