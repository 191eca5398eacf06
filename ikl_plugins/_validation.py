"""Checks of user input, shared by the functions, the modules and the adapters.

Every refusal names the caller, the argument, the rule, what came and the way out.
"""

from __future__ import annotations

import difflib
import math
import weakref
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import _value_checks
from ._value_checks import check_values, is_recorded

REDUCTIONS = ("batchmean", "sum", "none")
# What the losses compute with. torch counts its 8-bit formats as floating, but they have no arithmetic.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def kind_of(value: object) -> str:
    """What a value is, for a message: the dtype of a tensor, else the type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_number(caller: str, name: str, value: object, *, positive: bool = False) -> float:
    """``value`` as a float, refused unless it is a finite real number, at least 0 (above 0 if ``positive``)."""
    if type(value) is float and 0.0 < value < math.inf:
        return value  # the common case, on the path of every call
    rule = "a finite number above 0" if positive else "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{caller}: `{name}` must be {rule}, got {value!r} of type {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        shown = "a number beyond every float" if isinstance(value, int) and number == math.inf else value
        raise ValueError(f"{caller}: `{name}` must be {rule}, got {shown}.")
    return number


def check_integer(caller: str, name: str, value: object, way_out: str = "", *, least: int = 1) -> int:
    """``value``, refused unless it is an integer of at least ``least``."""
    rule = f"{caller}: `{name}` must be an integer of at least {least}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{rule} of type {type(value).__name__}.{way_out and ' ' + way_out}")
    if value < least:
        raise ValueError(f"{rule}.{way_out and ' ' + way_out}")
    return value


def check_num_classes(caller: str, num_classes: object) -> int:
    """``num_classes``, refused unless it is an integer of at least 1."""
    return check_integer(caller, "num_classes", num_classes, "Pass the number of classes of the logits.")


def check_reduction(caller: str, reduction: str) -> None:
    """Refuses an unknown ``reduction``."""
    if isinstance(reduction, str) and reduction in REDUCTIONS:
        return
    known = ", ".join(repr(name) for name in REDUCTIONS)
    raise ValueError(
        f"{caller}: `reduction` must be one of {known}, got {reduction!r}. 'batchmean' is the mean over samples."
    )


def check_floating(caller: str, name: str, tensor: object, way_out: str) -> None:
    """Refuses what is not a dense tensor of a dtype in ``FLOATING``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: `{name}` must be a torch.Tensor, got {kind_of(tensor)}. {way_out}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{caller}: `{name}` must have a floating dtype of at least 16 bits, got {tensor.dtype}. {way_out}"
        )
    _check_dense(caller, name, tensor)


def _check_dense(caller: str, name: str, tensor: Tensor) -> None:
    """Refuses a tensor without values of its own in rows."""
    if type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested:
        return  # the common case, on the path of every call
    kind = type(tensor)
    if nn.parameter.is_lazy(tensor):
        found = "an uninitialized one"
    elif tensor.is_nested:
        found = "a nested tensor"
    elif tensor.layout is not torch.strided:
        found = f"the layout {tensor.layout}"
    # Subclasses that compute by themselves: torch's own work, but for masked ones, whose values may be missing.
    elif not torch.compiler.is_compiling() and not _computes_as_torch(kind):
        found = f"the subclass {kind.__name__}"
    else:
        return
    raise TypeError(f"{caller}: `{name}` must be a dense tensor, got {found}. Convert it to a plain tensor.")


def _computes_as_torch(kind: type[Tensor]) -> bool:
    plain = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain or (kind.__module__.startswith("torch.") and not kind.__module__.startswith("torch.masked."))


def _place(tensor: Tensor) -> str:
    """The device of a tensor, for a message."""
    return f"{tensor.device}, without values" if isinstance(tensor, FakeTensor) else str(tensor.device)


def check_device(caller: str, name: str, tensor: Tensor, beside: Tensor, owner: str) -> None:
    """Refuses two tensors that cannot meet: they are on two devices, or only one of them has values."""
    if tensor.device != beside.device or _one_is_fake(tensor, beside):
        raise ValueError(
            f"{caller}: `{name}` must be on {owner} device, got {_place(tensor)} and {_place(beside)}. "
            f"Move one with `.to(...)`."
        )


def check_has_values(caller: str, name: str, tensor: Tensor, beside: Tensor | None) -> None:
    """Refuses a tensor without values where the one that it meets has some."""
    if beside is not None and ((tensor.is_meta and not beside.is_meta) or _one_is_fake(tensor, beside)):
        raise ValueError(f"{caller}: `{name}` must have values, got {_place(tensor)}. Pass the tensor itself.")


def _one_is_fake(one: Tensor, other: Tensor) -> bool:
    """Whether one of two tensors is one of torch's tracers, which take no others beside them."""
    if type(one) is type(other):
        return False
    fakes = [tensor for tensor in (one, other) if isinstance(tensor, FakeTensor)]
    return len(fakes) == 1 and not fakes[0].fake_mode.allow_non_fake_inputs


def check_logits(caller: str, student_logits: Tensor, teacher_logits: Tensor, *, finite: bool = False) -> None:
    """Refuses logits that are not two floating tensors of one (N, C, d1, ...) shape on one device.

    With ``finite`` NaN and infinity are refused as well, which reads all values.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_floating(caller, name, logits, "Pass raw class scores.")
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if len(shapes[0]) < 2 or shapes[0][1] == 0:
        raise ValueError(
            f"{caller}: `student_logits` must have shape (N, C) or (N, C, d1, ...), C at least 1, got {shapes[0]}. "
            f"Classes belong on dimension 1."
        )
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{caller}: `student_logits` and `teacher_logits` must have one shape, got {shapes[0]} and {shapes[1]}. "
            f"Pass the same samples and classes."
        )
    if student_logits.device != teacher_logits.device or _one_is_fake(student_logits, teacher_logits):
        raise ValueError(
            f"{caller}: `student_logits` and `teacher_logits` must be on one device, got "
            f"{_place(student_logits)} and {_place(teacher_logits)}. Move one with `.to(...)`."
        )
    if finite and not torch.compiler.is_compiling():
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            _check_finite(caller, name, logits.detach())


def _check_finite(caller: str, name: str, logits: Tensor) -> None:
    if logits.numel() == 0 or logits.is_meta:
        return
    size, shape = logits.numel(), logits.shape
    bad = ~torch.isfinite(logits)

    def judge(count: float, first: float) -> str | None:
        if not count:
            return None
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(int(first)), shape))
        return (
            f"{caller}: `{name}` must be finite with check_finite=True, but {int(count)} of {size} are not, the first "
            f"at index {index}. Lower the learning rate, or look for a layer that overflows."
        )

    check_values(caller, name, (bad.sum(), bad.flatten().to(torch.uint8).argmax()), judge)


def check_class_prior(caller: str, class_prior: Tensor, student_logits: Tensor, *, values: bool = True) -> None:
    """Refuses a ``class_prior`` that does not fit the logits or, with ``values``, holds what is no weight."""
    check_floating(caller, "class_prior", class_prior, "Pass ClassPrior.prior(targets).")
    rows = tuple(student_logits.shape[:2])
    if tuple(class_prior.shape) not in (rows, tuple(student_logits.shape)):
        raise ValueError(
            f"{caller}: `class_prior` must have shape {rows} or that of the logits "
            f"{tuple(student_logits.shape)}, got {tuple(class_prior.shape)}. Pass ClassPrior.prior(targets)."
        )
    check_device(caller, "class_prior", class_prior, student_logits, "the logits'")
    if values:
        check_weights(caller, class_prior)


def check_weights(caller: str, class_prior: Tensor) -> None:
    """Refuses negative or non-finite weights."""
    if torch.compiler.is_compiling() or class_prior.numel() == 0 or class_prior.is_meta:
        return

    def judge(low: float, high: float) -> str | None:
        if low >= 0 and math.isfinite(high):
            return None
        return (
            f"{caller}: `class_prior` must hold finite weights of at least 0, got values from {low} to {high}. "
            f"Pass probabilities, not logits."
        )

    check_values(caller, "class_prior", torch.aminmax(class_prior.detach()), judge)


# The labels of a batch pass through attack, loss and class prior: the last tensor that was looked at, its version and
# the class count it was held against.
_seen_targets: tuple[weakref.ref[Tensor], int, int] | None = None


def check_targets(
    caller: str,
    targets: Tensor | None,
    num_classes: int,
    logits: Tensor | None = None,
    name: str = "targets",
    beside: Tensor | None = None,
) -> Tensor:
    """``targets``, refused unless they are class indices in [0, num_classes), one for each prediction of ``logits``.

    They must have values where ``beside``, by default the logits, has some.
    """
    if not isinstance(targets, Tensor):
        raise (ValueError if targets is None else TypeError)(
            f"{caller}: `{name}` must be given as a tensor of class indices, got {kind_of(targets)}. "
            f"Pass the labels of the batch."
        )
    if targets.dtype not in _INTEGERS:
        raise TypeError(
            f"{caller}: `{name}` must hold integer class indices, got {targets.dtype}. "
            f"Of soft or mixed labels pass the argmax."
        )
    _check_dense(caller, name, targets)
    if logits is not None and targets.shape != (expected := (logits.shape[0], *logits.shape[2:])):
        raise ValueError(
            f"{caller}: `{name}` must have shape {expected} for logits of shape {tuple(logits.shape)}, got "
            f"{tuple(targets.shape)}. Pass one class index per prediction."
        )
    check_has_values(caller, name, targets, logits if beside is None else beside)
    if targets.numel() == 0 or targets.is_meta or is_recorded(targets):
        return targets
    global _seen_targets
    version = None if targets.is_inference() else targets._version
    seen = _seen_targets  # another thread may change it
    if seen is not None and version is not None and seen[1:] == (version, num_classes):
        whole = seen[0]()
        if whole is not None and (whole is targets or whole is targets._base):
            return targets

    def judge(low: float, high: float) -> str | None:
        if low >= 0 and high < num_classes:
            return None
        return (
            f"{caller}: `{name}` must lie in [0, {num_classes - 1}], got values from {int(low)} to {int(high)}. "
            f"Correct the class count, or drop ignored samples."
        )

    # torch has no comparisons of the wide unsigned types; beyond int64 they turn negative, and are refused as such.
    check_values(caller, name, torch.aminmax(targets.long()), judge)
    _seen_targets = None if version is None else (weakref.ref(targets), version, num_classes)
    return targets


def safe_index(targets: Tensor, num_classes: int) -> Tensor:
    """Checked targets as an index.

    On a device the check is read later, and an index out of range would end the process before that. Where nothing is
    checked it shall.
    """
    labels = targets.long()
    if is_recorded(labels) or _value_checks.on_host(labels):
        return labels
    return labels.clamp(0, num_classes - 1)


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


def failing_step(error: BaseException, steps: Sequence[object]) -> str | None:
    """The innermost of ``steps``, as of a pipeline of transforms, that ran when an error came; None if none did."""
    trace, found = error.__traceback__, None
    while trace is not None:
        values = trace.tb_frame.f_locals.values()
        found = next((pair for pair in enumerate(steps) if any(value is pair[1] for value in values)), found)
        trace = trace.tb_next
    return None if found is None else f"step {found[0]}, {' '.join(repr(found[1]).split())}"
