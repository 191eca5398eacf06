"""Which way computes the losses: the variable, what serves which tensors, and what is said where a way cannot."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch

from ikl_plugins import _way, functional, ikl_loss, kernels, native
from ikl_plugins._fused import fused_loss

RECORD = Path(__file__).parents[2] / "docs" / "results" / "bench_losses.csv"


@pytest.fixture
def served() -> Iterator[list[str]]:
    """The names of the operators that were called, in a process where both can be had."""
    called: list[str] = []

    def noting(name: str) -> Any:
        def operator(*arguments: Any) -> Any:
            called.append(name)
            if name == "native":
                return fused_loss(*arguments)
            loss, terms, _ = fused_loss(*arguments, True)
            return loss, *(terms or ()), None

        return operator

    with pytest.MonkeyPatch.context() as patch:
        for name in ("IKL_PLUGINS_KERNEL", "IKL_PLUGINS_NATIVE"):
            patch.delenv(name, raising=False)
        patch.setattr(_way, "_is_read", False)
        patch.setattr(functional, "_said", set())
        patch.setattr(native, "_undecided", True)
        patch.setattr(native, "_is_built", lambda: True)
        patch.setattr(native, "_load", lambda: noting("native"))
        # No CUDA here: torch's device without data stands for it.
        patch.setattr(kernels, "serves", lambda student, *others: student.is_meta)
        patch.setattr(kernels, "operator", lambda: noting("triton"))
        yield called


def _loss(device: str) -> torch.Tensor:
    return ikl_loss(torch.randn(3, 5, device=device), torch.randn(3, 5, device=device))


@pytest.mark.parametrize(
    ("named", "on_cpu", "on_cuda"),
    [("", ["native"], ["triton"]), ("native", ["native"], None), ("triton", None, ["triton"]), ("walk", [], [])],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_fastest_way_that_serves_or_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
    served: list[str],
    named: str,
    on_cpu: list[str] | None,
    on_cuda: list[str] | None,
    device: str,
) -> None:
    """None: the walk serves, and that is said once."""
    monkeypatch.setenv("IKL_PLUGINS_KERNEL", named)
    expected = on_cpu if device == "cpu" else on_cuda
    if expected is None:
        with pytest.warns(RuntimeWarning, match=f"IKL_PLUGINS_KERNEL={named} cannot serve 2-dimensional .* {device}"):
            _loss(device)
    assert _loss(device).shape == ()
    assert served == (expected or [])


def test_a_name_that_there_is_not_is_refused_every_time(monkeypatch: pytest.MonkeyPatch, served: list[str]) -> None:
    monkeypatch.setenv("IKL_PLUGINS_KERNEL", "cuda")
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r"one of 'walk', 'native', 'triton', got 'cuda'"):
            _loss(device)
    assert served == []


def test_a_kernel_that_is_not_there_leaves_the_walk(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "operator", lambda: None)
    assert _loss("meta").is_meta
    monkeypatch.setattr(native, "_is_built", lambda: False)
    oracles.assert_matches(ikl_loss, "ikl", torch.randn(3, 5).double(), torch.randn(3, 5).double())
    assert served == []


def test_the_advice_to_build_has_the_figures_of_the_record() -> None:
    with RECORD.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "time"]
    walk, operator = (
        {(row["rows"], row["classes"]): float(row["seconds"]) for row in rows if row["method"] == method}
        for method in ("IKL", "IKL, C++ operator")
    )
    gains = [walk[shape] / operator[shape] for shape in walk]
    assert tuple(map(round, (min(gains), max(gains)))) == _way.SPEED_UP
