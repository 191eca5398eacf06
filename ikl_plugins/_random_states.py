"""Random number generators given back as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["kept_random_states"]


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Gives Python's, NumPy's and torch's generators back as they were, on the CPU and on the current CUDA device."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")  # whoever draws from it has imported it
    arrays = None if numpy is None else numpy.random.get_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng([torch.cuda.current_device()] if started else []):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)
