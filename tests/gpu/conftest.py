"""What only a CUDA device shows; its tests are collected where the others are repeated on one."""

from __future__ import annotations

from collections.abc import Iterator

import on_device
import pytest
import torch

collect_ignore_glob = [] if on_device.chosen() == "cuda" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_cuda(_seed: None, request: pytest.FixtureRequest) -> Iterator[None]:
    with on_device.on_device("cuda", request.module):
        torch.manual_seed(0)
        yield
