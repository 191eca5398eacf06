"""The conditions under which a model is judged, whatever the program around has switched on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["AUTOCAST", "own_conditions", "precision", "stop_autocast", "trainable_copy"]

AUTOCAST = ("cpu", "cuda")


@contextlib.contextmanager
def own_conditions() -> Iterator[None]:
    """Gradients are possible, computing is in float32 and new tensors are on the CPU.

    An attack takes gradients, which ``torch.inference_mode`` forbids; and its numbers are those of the caller's program
    only where autocast and another default dtype or device do not reach.
    """
    autocast = {device: torch.is_autocast_enabled(device) for device in AUTOCAST}
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stop_autocast()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            for device, enabled in autocast.items():
                torch.set_autocast_enabled(device, enabled)


def stop_autocast() -> tuple[str, ...]:
    """Turns autocast off; the devices it was on for."""
    on = tuple(device for device in AUTOCAST if torch.is_autocast_enabled(device))
    for device in on:
        torch.set_autocast_enabled(device, False)
    return on


def trainable_copy(caller: str, model: nn.Module) -> nn.Module:
    """The model, or a copy of one that was made inside ``torch.inference_mode``, through which no gradient flows.

    Raises:
        ValueError: it was made there and cannot be copied, or has no values at all.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = next((name for name, tensor in tensors if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(f"{caller}: `model` must have values, but {empty} is on the meta device. Load its weights.")
    made = next((name for name, tensor in tensors if tensor.is_inference()), None)
    if made is None:
        return model
    try:
        return copy.deepcopy(model)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{caller}: `model` must take gradients, but {made} was made inside torch.inference_mode. Build it outside."
        ) from error


def precision(model: nn.Module) -> str:
    """The floating dtypes of parameters and buffers, such as 'float32'."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
    return ", ".join(sorted(found)) or "float32"
