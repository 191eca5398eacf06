"""Checks of user input, shared by the functions, the modules and the adapters.

Every refusal names the caller, the argument, the rule, what came and the way out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

REDUCTIONS = ("batchmean", "sum", "none")
# What the losses compute with. torch counts its 8-bit formats as floating, but they have no arithmetic.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_number(caller: str, name: str, value: object, *, positive: bool = False) -> float:
    """``value`` as a float, refused unless it is a finite real number, at least 0 (above 0 if ``positive``)."""
    if type(value) is float and 0.0 < value < math.inf:
        return value  # the common case, on the path of every call
    rule = "a finite number above 0" if positive else "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(
            f"{caller}: `{name}` must be {rule}, got {value!r} of type {type(value).__name__}. "
            f"Pass a plain Python float."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        shown = value if number != math.inf else "a number beyond every float" if isinstance(value, int) else value
        raise ValueError(f"{caller}: `{name}` must be {rule}, got {shown}. Choose a value in that range.")
    return number


def check_reduction(caller: str, reduction: str) -> None:
    """Refuses an unknown ``reduction``."""
    if isinstance(reduction, str) and reduction in REDUCTIONS:
        return
    known = ", ".join(repr(name) for name in REDUCTIONS)
    hint = (
        "Use 'batchmean' for the mean over samples (the mean over samples and classes is not offered)."
        if isinstance(reduction, str) and reduction == "mean"
        else "Use 'batchmean' for the mean over samples."
    )
    raise ValueError(f"{caller}: `reduction` must be one of {known}, got {reduction!r}. {hint}")


def check_dense(caller: str, name: str, tensor: Tensor) -> None:
    """Refuses a sparse or nested tensor."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
        raise TypeError(f"{caller}: `{name}` must be a dense tensor, got {kind}. Convert it to a plain tensor first.")


def check_logits(caller: str, student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuses logits that are not two floating tensors of one (N, C, d1, ...) shape on one device."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{caller}: `{name}` must be a torch.Tensor, got {type(logits).__name__}. "
                f"Pass the tensor of raw class scores."
            )
        if logits.dtype not in FLOATING:
            raise TypeError(
                f"{caller}: `{name}` must have a floating dtype of at least 16 bits, got {logits.dtype}. "
                f"Pass raw class scores, or convert with `.float()`; class indices go to `targets`."
            )
        check_dense(caller, name, logits)
    if student_logits.dim() < 2:
        raise ValueError(
            f"{caller}: `student_logits` must have shape (N, C) or (N, C, d1, ...), got "
            f"{tuple(student_logits.shape)}. Add the batch dimension with `.unsqueeze(0)`."
        )
    if student_logits.shape != teacher_logits.shape:
        hint = ""
        if student_logits.dim() == teacher_logits.dim() and student_logits.shape[1] != teacher_logits.shape[1]:
            hint = " The networks do not have the same number of classes."
        raise ValueError(
            f"{caller}: `student_logits` and `teacher_logits` must have one shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}.{hint} "
            f"Pass logits of the same samples over the same classes."
        )
    if student_logits.shape[1] == 0:
        raise ValueError(
            f"{caller}: `student_logits` must have at least one class on dimension 1, got "
            f"{tuple(student_logits.shape)}. Classes belong on dimension 1, as in F.cross_entropy."
        )
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            f"{caller}: `student_logits` and `teacher_logits` must be on one device, got "
            f"{student_logits.device} and {teacher_logits.device}. Move one with `.to(...)`."
        )


def check_class_prior(caller: str, class_prior: Tensor, student_logits: Tensor) -> None:
    """Refuses a ``class_prior`` that does not fit the logits or holds negative or non-finite weights."""
    if not isinstance(class_prior, Tensor):
        raise TypeError(
            f"{caller}: `class_prior` must be a torch.Tensor, got {type(class_prior).__name__}. "
            f"Pass ClassPrior.prior(targets), one row per sample."
        )
    if class_prior.dtype not in FLOATING:
        raise TypeError(
            f"{caller}: `class_prior` must have a floating dtype of at least 16 bits, got {class_prior.dtype}. "
            f"Convert with `.float()`."
        )
    check_dense(caller, "class_prior", class_prior)
    rows = tuple(student_logits.shape[:2])
    if tuple(class_prior.shape) not in (rows, tuple(student_logits.shape)):
        raise ValueError(
            f"{caller}: `class_prior` must have shape {rows}, one row per sample, or that of the logits "
            f"{tuple(student_logits.shape)}, got {tuple(class_prior.shape)}. Pass ClassPrior.prior(targets); "
            f"a (C, C) matrix is indexed with the targets first."
        )
    if class_prior.device != student_logits.device:
        raise ValueError(
            f"{caller}: `class_prior` must be on the device of the logits, got {class_prior.device} and "
            f"{student_logits.device}. Move it with `.to(...)`."
        )
    if torch.compiler.is_compiling() or class_prior.numel() == 0 or class_prior.is_meta:
        return
    low, high = (bound.item() for bound in torch.aminmax(class_prior.detach()))
    if not (low >= 0 and math.isfinite(high)):
        raise ValueError(
            f"{caller}: `class_prior` must hold finite weights of at least 0, got values from {low} to {high}. "
            f"Pass probabilities, not logits."
        )


def check_finite_logits(caller: str, **named_logits: Tensor) -> None:
    """Refuses logits that hold NaN or infinity; one message names every tensor concerned."""
    found = []
    for name, logits in named_logits.items():
        bad = ~torch.isfinite(logits.detach())
        count = int(bad.sum())
        if count:
            first = tuple(bad.nonzero()[0].tolist())
            found.append(f"`{name}` has {count} of {logits.numel()}, the first at index {first}")
    if found:
        raise ValueError(
            f"{caller}: logits must be finite when check_finite=True, but {'; '.join(found)}. "
            f"Lower the learning rate or the loss scale, or look for the layer that overflows."
        )


def check_targets(caller: str, targets: Tensor, num_classes: int) -> None:
    """Refuses ``targets`` that are not integer class indices in [0, num_classes)."""
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"{caller}: `targets` must be a torch.Tensor of class indices, got {type(targets).__name__}. "
            f"Pass a long tensor of shape (N,)."
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(
            f"{caller}: `targets` must hold integer class indices, got {targets.dtype}. "
            f"Pass hard labels (for soft or mixed labels use their argmax)."
        )
    if torch.compiler.is_compiling() or targets.numel() == 0 or targets.is_meta:
        return
    # torch has no comparisons of the wide unsigned types; beyond int64 they turn negative, and are refused as such.
    low, high = (int(bound) for bound in torch.aminmax(targets.long()))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{caller}: `targets` must lie in [0, {num_classes - 1}], got values from {low} to {high}. "
            f"Set `num_classes` to the number of classes of the data, or drop ignored samples first."
        )


def check_num_classes(caller: str, num_classes: int) -> None:
    """Refuses a ``num_classes`` that is not an integer of at least 1."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(
            f"{caller}: `num_classes` must be an integer of at least 1, got {num_classes!r} of type "
            f"{type(num_classes).__name__}. Pass the number of classes of the logits."
        )
    if num_classes < 1:
        raise ValueError(
            f"{caller}: `num_classes` must be an integer of at least 1, got {num_classes}. "
            f"Pass the number of classes of the logits."
        )


def unknown_name_message(caller: str, kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown ``name``: the nearest known one first, then all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean `{nearest[0]}`? " if nearest else ""
    return f"{caller}: unknown {kind} `{name}`. {hint}Known: {', '.join(names)}."


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """The first of many names, for a message: 'a, b, c and 5 more'."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
