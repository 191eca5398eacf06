"""The tests of losses, prior, attack and adapters once more on a device: `pytest -m gpu`.

They are repeated where CUDA is there, or on the device that IKL_PLUGINS_TEST_DEVICE names ('cpu': a rehearsal). Tensors
that a test makes without naming a device lie on it. Random ones are drawn on the CPU, so that a seed gives what it
gives without a device. Checks of values are immediate but in the tests of deferred ones.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from ikl_plugins import _value_checks

VARIABLE = "IKL_PLUGINS_TEST_DEVICE"
RANDOM = (torch.rand, torch.randn, torch.randint, torch.randperm)
DEFERRED = ("test_value_checks", "test_device", "test_steps")  # modules whose checks are not immediate
# Modules that are not repeated, and why.
LEFT_OUT = {
    "core": {
        "test_native": "the C++ operator is for the CPU",
        "test_files": "no tensors",
        "test_import": "other processes",
        "test_kernels": "the interpreter, and other processes; tests/gpu has the kernels themselves",
        "test_presets": "no tensors",
    },
    "adversarial": {
        "test_refusals": "its inputs are made at import",
        "test_robust_evaluation": "its oracle draws where it runs, and other processes",
    },
    "torchdistill": {
        "test_box_evaluation": "whole runs, which choose their device themselves",
        "test_data": "no tensors",
        "test_recipes": "the text of the configs",
        "test_registration": "other processes",
        "test_torchdistill_docs": "the text of the pages",
        "test_training": "whole runs, which choose their device themselves",
    },
    "mmpretrain": {
        "test_checkpoints": "files",
        "test_generated": "files, and other processes",
        "test_long_tail": "the text of the configs",
        "test_mmpretrain_configs": "the text of the configs",
        "test_preprocessing": "it runs on the host",
        "test_recipes": "the text of the configs",
        "test_refusals": "the text of the configs",
        "test_registration": "other processes",
        "test_resume": "whole runs, which choose their device themselves",
        "test_robust_evaluation_hook": "whole runs, which choose their device themselves",
        "test_sampling": "no tensors of a device",
        "test_train_mmpretrain": "other processes",
    },
}
# A test, likewise: torch.compile loses a requires_grad_() under a mode of functions.
LEFT_OUT_TEST = "test_adversarial_training_compiles_and_its_last_batch_may_be_smaller"


def chosen() -> str | None:
    """The device of the repeated tests, None where they are not repeated."""
    return os.environ.get(VARIABLE) or ("cuda" if torch.cuda.is_available() else None)


def repeats(metafunc: pytest.Metafunc) -> bool:
    """Whether a test makes sense on a device."""
    path = metafunc.definition.path
    left_out = LEFT_OUT.get(path.parent.name)
    if left_out is None or path.stem in left_out or metafunc.function.__name__ == LEFT_OUT_TEST:
        return False
    return metafunc.definition.get_closest_marker("slow") is None


class _OnDevice(DeviceContext):
    """torch's own mode for a default device, with random numbers from the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func not in RANDOM or given.get("device") is not None:
            return super().__torch_function__(func, types, args, given)
        leaf, generator = given.pop("requires_grad", False), given.get("generator")
        place = torch.device("cpu") if generator is None else generator.device
        drawn: Tensor = func(*args, **given, device=place).to(self.device)
        return drawn.requires_grad_(leaf)


@contextlib.contextmanager
def on_device(device: str, module: types.ModuleType) -> Iterator[None]:
    """Runs a test on a device, with the tensors that its module has made at import and whole float32 convolutions."""
    with pytest.MonkeyPatch.context() as patch, _OnDevice(torch.device(device)):
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        for name, value in vars(module).copy().items():
            if isinstance(value, Tensor):
                patch.setattr(module, name, value.to(device))
            elif isinstance(value, torch.device):
                patch.setattr(module, name, torch.device(device))
            elif isinstance(value, types.FunctionType) and value.__defaults__:
                moved = (one.to(device) if isinstance(one, Tensor) else one for one in value.__defaults__)
                patch.setattr(value, "__defaults__", tuple(moved))
        if module.__name__.rpartition(".")[2] not in DEFERRED:
            patch.setenv(_value_checks.VARIABLE, "immediate")
        try:
            yield
        finally:
            _value_checks.take_findings()
