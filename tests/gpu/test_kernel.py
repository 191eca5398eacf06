"""The Triton kernels on the device, over the grid that they pass in the interpreter, and the walk beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import device as on

from ikl_plugins import ikl_loss, kernels

pytestmark = pytest.mark.gpu


def _grid() -> Any:
    path = Path(__file__).parents[1] / "core" / "kernels_in_the_interpreter.py"
    spec = importlib.util.spec_from_file_location("kernels_in_the_interpreter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GRID = _grid()


def test_the_kernels_serve() -> None:
    pytest.importorskip("triton")
    assert kernels.why_not(torch.empty(0).device) == ""
    assert on.ways(torch.device("cuda")) == [on.WALK, on.KERNEL]


@pytest.mark.parametrize("way", [on.WALK, on.KERNEL])
@pytest.mark.parametrize("number", range(len(GRID.USES)))
def test_values_and_gradients(number: int, way: str) -> None:
    with on.going(way):
        for call in GRID.CALLS:
            GRID._compare(GRID.USES[number], call)


@pytest.mark.parametrize("layout", GRID.LAYOUTS)
def test_layouts(layout: str) -> None:
    for other in ("same", "contiguous"):
        GRID.test_layouts(layout, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 100), (64, 1000), (32, 21841), (4, 128256)])
def test_kernel_and_walk_agree_at_the_shapes_of_training(shape: tuple[int, int], dtype: torch.dtype) -> None:
    leaves, found = (3 * torch.randn(2, *shape)).to(dtype), {}
    for way in (on.WALK, on.KERNEL):
        student, teacher = (leaf.clone().requires_grad_() for leaf in leaves)
        with on.going(way):
            loss = ikl_loss(student, teacher, temperature=2.0)
            loss.backward()
        found[way] = loss.detach(), student.grad, teacher.grad
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for one, other in zip(*found.values(), strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_equal_calls_give_equal_bits() -> None:
    student, teacher = torch.randn(512, 1000, requires_grad=True), torch.randn(512, 1000)
    first, second = (torch.autograd.grad(ikl_loss(student, teacher), student)[0] for _ in range(2))
    assert torch.equal(first, second)
