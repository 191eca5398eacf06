"""The losses as fused Triton kernels, for logits on a CUDA device.

Forward plus backward take three launches (GKL's ``reduction='none'`` two more) and no wait for the device. Each reads
both logits once, the second writes each gradient once, in the dtype of its logits and with the chain rule's last factor
in it; nothing else of the logits' size is made. The arithmetic is float32. Sums run in one order, so equal calls give
equal bits.

Triton comes with torch's CUDA builds and is imported where the first CUDA tensor asks for it: importing this module
imports torch alone. At the first use on a device the kernels are compared with :mod:`ikl_plugins._composed` on two
small batches, the one wait there is. Where they disagree, or do not compile, a warning says so and the walk of
:mod:`ikl_plugins._fused` serves from then on.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._composed import Settings, composed_loss
from ._launch import Kept, find_gradients, find_values

__all__ = ["Later", "operator", "serves", "why_not"]

_DEVICE_TYPES = ("cuda",)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON = (3, 4)  # the first that compiles loops over tuples
_TOLERANCE = 1e-4  # of the comparison, times the largest entry
_NAMES = ("loss", "weighted MSE", "soft cross entropy", "student's gradient", "teacher's gradient")

_reasons: dict[torch.device, str] = {}  # why the kernels do not serve on a device, "" where they do
_comparing = threading.Lock()


def serves(student: Tensor, teacher: Tensor, class_prior: Tensor | None) -> bool:
    """Whether the kernels take these tensors, which fit each other.

    They take plain float16, bfloat16 and float32 tensors of any layout on a CUDA device. The first question on a device
    compares (see the module), unless a CUDA graph is being captured: then the answer is no for once.
    """
    return (
        student.device.type in _DEVICE_TYPES and _takes(student, teacher, class_prior) and not why_not(student.device)
    )


def why_not(device: torch.device) -> str:
    """Why the kernels do not serve on a device, compared there if they have not been; '' if they do."""
    reason = _reasons.get(device)
    if reason is not None:
        return reason
    with _comparing:
        if device in _reasons:  # another thread has compared meanwhile
            return _reasons[device]
        reason = _without_triton()
        if not reason:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "a CUDA graph is being captured before the first use"
            reason = _disagreement(device)
            if reason:
                _give_up(device, reason)
        _reasons[device] = reason
    return reason


def operator() -> Operator | None:
    """The function that computes the losses of tensors which the kernels serve; None where there is no Triton.

    It takes student, teacher, class prior or None, settings, and which of the two needs a gradient. It returns the
    loss, its weighted MSE and its soft cross entropy, and the gradients as a :class:`Later`, None if there are none.
    """
    return None if _without_triton() else _compute


class Later(NamedTuple):
    """The gradients of a call, still to be computed: from the operands of that call, which autograd keeps anyway."""

    settings: Settings
    needs: tuple[bool, bool]
    kept: Kept | None  # None where the kernels have failed

    def __call__(
        self, student: Tensor, teacher: Tensor, class_prior: Tensor | None, grad_loss: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``(grad_loss * loss).sum()`` for student and teacher, in their dtypes."""
        operands = student, teacher, class_prior, self.settings
        if self.kept is not None:
            try:
                return find_gradients(*operands, self.needs, self.kept, grad_loss)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                _give_up(student.device, _failure(error))
        return _composed(*operands, self.needs, grad_loss)[1]


Operator = Callable[
    [Tensor, Tensor, Tensor | None, Settings, tuple[bool, bool]], tuple[Tensor, Tensor, Tensor, Later | None]
]


def _compute(
    student: Tensor, teacher: Tensor, class_prior: Tensor | None, settings: Settings, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Later | None]:
    kept: Kept | None = None
    try:
        loss, mse, cross_entropy, kept = find_values(student, teacher, class_prior, settings)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # what compilers raise has no common base
        _give_up(student.device, _failure(error))
        with torch.no_grad():
            loss, mse, cross_entropy = composed_loss(student, teacher, class_prior, settings)
    later = Later(settings, needs, kept) if any(needs) else None
    return loss, mse, cross_entropy, later


def _takes(student: Tensor, teacher: Tensor, class_prior: Tensor | None) -> bool:
    # Whoever watches or replaces each operation of torch shall see the operations of torch.
    if torch._C._len_torch_dispatch_stack() != 0:
        return False
    for tensor in (student, teacher, class_prior):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
        if tensor.is_neg() or tensor._is_zerotensor():  # memory holds something else
            return False
    classes, places = student.shape[1], student.shape[2:].numel()
    return (
        student.dtype in _DTYPES
        and teacher.dtype in _DTYPES
        and student.numel() > 0
        # The way from a row's first class to its last is counted in 32 bits.
        and classes * max(places, student.stride(1), teacher.stride(1)) < 2**31
    )


@functools.cache
def _without_triton() -> str:
    """Why there is no Triton to be used, '' if there is."""
    try:
        import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        return f"Triton is not there ({error})"
    found = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    return "" if found >= _TRITON else f"Triton {triton.__version__} is older than {'.'.join(map(str, _TRITON))}"


def _disagreement(device: torch.device) -> str:
    """In what the kernels differ from the composed losses on two small batches, or how they fail; '' if neither."""
    whole = Settings(alpha=1.0, beta=2.0, temperature=2.0, weight_temperature=1.0, reduction="batchmean")
    divided = whole._replace(gamma=0.5, divide_by_pairs=True)
    needs = True, True
    try:
        # Rows that a tile holds whole, and longer ones with all that there is beside.
        for shape, settings in (((6, 37), whole), ((2, 5000), divided)):
            count = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
            student, teacher, prior = (torch.sin(step * count).to(device, torch.float32) for step in (0.7, 1.3, 1.9))
            operands = 3.0 * student, 4.0 * teacher, (prior + 1.0) / shape[1] if settings is divided else None
            upstream = torch.full((), 0.75, device=device)
            loss, mse, cross_entropy, kept = find_values(*operands, settings)
            found = loss, mse, cross_entropy, *find_gradients(*operands, settings, needs, kept, upstream)
            values, gradients = _composed(*operands, settings, needs, upstream)
            for name, one, other in zip(_NAMES, found, (*values, *gradients), strict=True):
                one, other = (torch.as_tensor(x).detach().cpu().double() for x in (one, other))
                error = float((one - other).abs().max())
                if not error <= _TOLERANCE * float(other.abs().max()):
                    return f"the {name} of {shape[0]} x {shape[1]} logits differs by {error:.2g}"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return _failure(error)
    return ""


def _composed(
    student: Tensor,
    teacher: Tensor,
    class_prior: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool],
    upstream: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Values and gradients by :func:`composed_loss`."""
    with torch.enable_grad():
        student, teacher = student.detach().requires_grad_(needs[0]), teacher.detach().requires_grad_(needs[1])
        values = composed_loss(student, teacher, class_prior, settings)
        gradients = iter(torch.autograd.grad(values[0], [x for x in (student, teacher) if x.requires_grad], upstream))
    return values, (next(gradients) if needs[0] else None, next(gradients) if needs[1] else None)


def _give_up(device: torch.device, reason: str) -> None:
    _reasons[device] = reason
    warnings.warn(
        f"ikl_plugins: the Triton kernel must agree with the composed losses on {device}, but {reason}. "
        f"The walk serves.",
        RuntimeWarning,
        stacklevel=2,
    )


def _failure(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"it fails with {type(error).__name__}: {lines[-1].strip()[:200] if lines else ''}"
