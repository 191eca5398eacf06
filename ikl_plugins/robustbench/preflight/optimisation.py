"""The check for optimisation in the forward, and for more passes of the network than stated."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from .subject import Finding, Subject, first_names, hooked, is_leaf

__all__ = ["optimisation"]

_TORCH = os.path.dirname(torch.__file__)
_AUTOGRAD = os.path.join(_TORCH, "autograd", "")
_OPTIM = os.path.join(_TORCH, "optim", "")
_FUNC = os.path.join(_TORCH, "_functorch", "eager_transforms.py")


def optimisation(subject: Subject) -> Finding:
    """None in the forward, and no more passes of the network than stated: a search without gradients is one too."""
    model, images = subject.model, subject.batch
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return None, "The model has parts in TorchScript, into which the check cannot look."
    failure = ""
    passes: list[Counter[str]] = []
    with _calls_of_torch() as calls:
        try:
            with _calls_of_layers(model) as counts:
                model(images.clone())
            passes.append(counts)
            with _calls_of_layers(model) as counts, torch.enable_grad():
                model(images.detach().clone().requires_grad_())
            passes.append(counts)
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
    if calls:
        return False, (
            f"The forward calls {first_names(sorted(calls))}. RobustBench takes no model that optimises in its forward."
        )
    if failure:
        return None, f"The forward fails: {failure}"
    name, number = max(((counts.most_common(1) or [("", 1)])[0] for counts in passes), key=lambda pair: pair[1])
    if number > subject.number_forward_passes:
        return False, (
            f"{number} passes of the network in one forward, counted at `{name}`; state "
            f"number_forward_passes={number}, also if layers share weights, and RobustBench takes no search in the "
            f"forward."
        )
    return True, "No derivative is taken and no optimiser steps in the forward."


@contextlib.contextmanager
def _calls_of_torch() -> Iterator[set[str]]:
    """Notes the calls that take a derivative or step an optimiser, by a profiler of this thread."""
    calls: set[str] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") == "run_backward":
            calls.add("torch.autograd's run_backward")
        if event != "call":
            return
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_AUTOGRAD) and name in ("grad", "backward", "make_dual"):
            calls.add(f"torch.autograd.{name}")
        elif file.startswith(_OPTIM) and name in ("step", "wrapper"):
            calls.add("the step of an optimiser")
        elif file == _FUNC and name in ("grad_impl", "grad_and_value_impl", "_vjp_with_argnums", "_jvp_with_argnums"):
            calls.add("a derivative of torch.func")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@contextlib.contextmanager
def _calls_of_layers(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of each leaf that has parameters: a search without gradients calls them again and again."""
    counts: Counter[str] = Counter()

    def hook(name: str, module: nn.Module) -> Callable[..., None] | None:
        has_parameters = next(module.parameters(), None) is not None
        return (lambda module, arguments: counts.update([name])) if is_leaf(module) and has_parameters else None

    with hooked(model, hook):
        yield counts
