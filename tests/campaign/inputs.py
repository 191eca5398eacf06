"""Generated inputs: the right number within the dtype's tolerance, or a refusal that names the argument.

A refusal is a ValueError or a TypeError.

Every case is drawn from the seed and its own number, so that one can be looked at alone:

    >>> case = draw(seed=0, number=17)
    >>> outcome, detail = judge(case)
"""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from campaign.oracle import ascend, pairwise, rows_of, softmax
from campaign.record import Record
from torch import Tensor, nn

import ikl_plugins
from ikl_plugins import ClassPrior
from ikl_plugins.adversarial import PGD
from ikl_plugins.adversarial.schedule import Strength

__all__ = ["Case", "WrongResultError", "draw", "judge", "judge_all", "run"]

CASES = 10_000
QUICK_CASES = 400
CHUNK = 250
RIGHT = "right number"
# What is right as well, with less or nothing to compare.
NOT_FINITE = "not finite, as the formula"
BEYOND = "beyond float32"
EMPTY = "no sample"
# dtype of the inputs -> relative tolerance, against the largest entry of the row, and absolute one, in units of the
# size of the terms. Half precision computes in float32; its relative tolerance is that of rounding the gradient.
TOLERANCES = {
    torch.float64: (1e-10, 1e-15),
    torch.float32: (2e-5, 5e-7),
    torch.bfloat16: (4e-3, 5e-7),
    torch.float16: (1e-3, 5e-7),
}
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
REDUCTIONS = ("batchmean", "sum", "none")
KINDS = ("dkl", "ikl", "gkl")
BAD_NUMBERS: tuple[Any, ...] = (
    "1.0", None, True, [1.0], 1 + 2j, -1.0, float("nan"), float("inf"), -float("inf"), 10**400, Decimal("1.5"),
    np.float64("nan"), torch.tensor(1.0), (), {}, -1e-300,
)  # fmt: skip
BAD_REDUCTIONS: tuple[Any, ...] = (
    "mean",
    "Sum",
    "",
    None,
    3,
    ["sum"],
    ("none",),
    True,
    np.array(["sum", "none"]),
    b"sum",
)
BAD_CLASS_COUNTS: tuple[Any, ...] = (0, -3, 2.0, "10", True, None, [3], float("nan"))
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class WrongResultError(AssertionError):
    """A number, shape, dtype or gradient that is not the oracle's."""


class Case(NamedTuple):
    """One call of the package.

    Attributes:
        subject: what is called.
        what: what is special about the input.
        names: the arguments of which the refusal must name one; empty if the call is right.
        call: makes the call and holds its result against the oracle; returns what is to be told of a right one, None
            for :data:`RIGHT`.
    """

    subject: str
    what: str
    names: tuple[str, ...]
    call: Callable[[], str | None]


def judge(case: Case) -> tuple[str, str | None]:
    """The outcome of a case, and why it is a failure; None if it is none."""
    try:
        found = case.call()
    except WrongResultError as error:
        return "wrong number", str(error)
    except (ValueError, TypeError) as error:
        kind = type(error).__name__
        if not case.names:
            return "refused what is right", f"{kind}: {error}"
        if not any(re.search(rf"\b{name}\b", str(error)) for name in case.names):
            return "refused without a name", f"{kind} must name {' or '.join(case.names)}: {error}"
        return f"{kind} that names the argument", None
    except Exception:  # whatever else comes is what this campaign looks for
        return "another error", traceback.format_exc(limit=-3)
    if case.names:
        return "accepted what is wrong", f"{' or '.join(case.names)} must be refused: {case.what}"
    return found or RIGHT, None


def draw(*, seed: int, number: int) -> Case:
    """The case of that number."""
    rng = np.random.default_rng([seed, number])
    subject = rng.choice(
        ["function", "module", "prior", "attack"], p=[0.66, 0.22, 0.08, 0.04]
    )  # fmt: skip
    return {"function": _function, "module": _module, "prior": _prior, "attack": _attack}[subject](rng)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _shape(rng: np.random.Generator) -> tuple[int, ...]:
    samples = int(_pick(rng, (0, 1, 1, 2, 3, 4, 5, 8)))
    classes = int(_pick(rng, (1, 2, 2, 3, 4, 5, 7, 10, 13)))
    dense = rng.random()
    places = (
        () if dense < 0.7 else (int(rng.integers(0, 4)),) if dense < 0.85 else tuple(rng.integers(1, 4, 2).tolist())
    )
    return samples, classes, *places


def _values(rng: np.random.Generator, shape: tuple[int, ...], style: str) -> Tensor:
    """Logits in float64."""
    values = torch.from_numpy(rng.normal(size=shape)) * float(_pick(rng, (0.1, 1.0, 3.0, 10.0)))
    flat = values.view(-1)
    if style == "one value":
        values.fill_(float(rng.normal()))
    elif style == "far" and len(flat):
        values = torch.from_numpy(rng.choice([-1e4, 1e4, 0.0, 1.0], size=shape))
    elif style == "denormal":
        values = torch.from_numpy(rng.choice([1e-310, -1e-310, 1e-40, 5e-8, 0.0], size=shape))
    elif style == "not finite" and len(flat):
        for _ in range(int(rng.integers(1, 3))):
            flat[int(rng.integers(len(flat)))] = float(_pick(rng, (np.nan, np.inf, -np.inf)))
    elif style == "beyond":
        values = values * 1e30
    return values


def _laid_out(rng: np.random.Generator, values: Tensor) -> Tensor:
    """The same values in another layout."""
    layout = _pick(rng, ("contiguous", "contiguous", "transposed", "sliced", "expanded", "offset", "channels_last"))
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = values.new_full((2 * values.shape[0], *values.shape[1:]), float("nan"))
        wide[::2] = values
        return wide[::2]
    if layout == "expanded" and values.numel():
        return values[:1].expand(values.shape) if rng.random() < 0.5 else values[:, :1].expand(values.shape)
    if layout == "offset":
        flat = values.new_full((values.numel() + 3,), float("nan"))
        flat[3:] = values.reshape(-1)
        return flat[3:].view(values.shape)
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values.contiguous()


def _logits(rng: np.random.Generator, shape: tuple[int, ...], style: str, dtype: torch.dtype) -> Tensor:
    return _laid_out(rng, _values(rng, shape, style).to(dtype))


def _weights(rng: np.random.Generator, shape: tuple[int, ...], style: str) -> Tensor:
    """A class prior in float64."""
    values = torch.from_numpy(rng.random(shape)) + 0.01
    if style == "zeros":
        values = values * (torch.from_numpy(rng.random(shape)) > 0.5)
    elif style == "all zero":
        values = torch.zeros(shape, dtype=torch.float64)
    elif style == "one-hot":
        values = torch.zeros(shape, dtype=torch.float64)
        if values.numel():
            values[:, 0] = 1.0
    elif style == "unnormalised":
        return values * 4.0
    elif style == "denormal":
        values = torch.where(torch.from_numpy(rng.random(shape)) > 0.5, values, 1e-42)
    return values / values.sum(1, keepdim=True).clamp(min=1e-30) if style != "all zero" else values


# --- comparison ------------------------------------------------------------------------------------------------------


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype, size: float, what: str) -> None:
    """Compares within the dtype's tolerance, rows against their own largest entry."""
    if actual.shape != expected.shape:
        raise WrongResultError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if expected.numel() == 0:
        return
    relative, absolute = TOLERANCES[dtype]
    actual = actual.detach().double()
    bound_of = relative * expected.abs() + absolute * size
    if expected.dim() == 2:
        bound_of = relative * expected.abs().amax(1, keepdim=True) + absolute * size
    # What does not fit the dtype becomes infinite in it.
    lost = (expected.abs() > torch.finfo(dtype).max * (1 - 1e-3)) & torch.isinf(actual)
    wrong = ~((actual - expected).abs() <= bound_of) & ~lost  # so that NaN is wrong
    if bool(wrong.any()):
        where = int(wrong.reshape(-1).to(torch.int8).argmax())
        raise WrongResultError(
            f"{what}: {float(actual.reshape(-1)[where]):.9g} instead of {float(expected.reshape(-1)[where]):.9g} at "
            f"{where}, {int(wrong.sum())} of {wrong.numel()} entries, {dtype}"
        )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _hold(
    function: Callable[[Tensor, Tensor], Tensor],
    kind: str,
    student: Tensor,
    teacher: Tensor,
    settings: dict[str, Any],
    reduction: str,
    *,
    class_prior: Tensor | None,
    gradients: tuple[bool, bool] = (True, True),
    lenient: bool = False,
) -> str:
    """Value, shape, dtype and gradients of one call against the oracle.

    Args:
        function: from student and teacher logits to the loss.
        kind: which loss it is.
        student: logits.
        teacher: logits.
        settings: of the oracle.
        reduction: of the call.
        class_prior: weights, (N, C) or of the logits' shape.
        gradients: which of the two require grad.
        lenient: beyond the range in which float32 can hold the squares: a number that is not finite will do.

    Returns:
        :data:`RIGHT`, or what else there was to compare.

    Raises:
        WrongResultError: it is not the oracle's.
    """
    s, t = student.detach(), teacher.detach()
    s, t = s.requires_grad_(gradients[0]), t.requires_grad_(gradients[1])
    loss = function(s, t)
    compute = _compute_dtype(s, t)
    numbers = {key: float(value) for key, value in settings.items()}
    prior_rows = None
    if class_prior is not None:
        whole = class_prior.detach().double()
        if whole.dim() < s.dim():
            whole = whole.reshape(*whole.shape, *[1] * (s.dim() - 2)).expand(s.shape)
        prior_rows = rows_of(whole)
    expected = pairwise(kind, rows_of(s), rows_of(t), class_prior=prior_rows, **numbers)
    rows = len(expected.weighted_mse)
    values = expected.weighted_mse + expected.cross_entropy
    shape = (s.shape[0], *s.shape[2:]) if reduction == "none" else ()
    if loss.dtype != compute or tuple(loss.shape) != shape:
        raise WrongResultError(f"loss of {loss.dtype} {tuple(loss.shape)} instead of {compute} {shape}")
    wanted = values if reduction == "none" else values.sum() / (max(1, rows) if reduction == "batchmean" else 1)
    actual = loss.detach().reshape(wanted.shape)

    # Rows that are not finite must show it. Those that GKL's normaliser spoils beside them may or may not.
    known = torch.isfinite(wanted)
    finite_rows = torch.isfinite(rows_of(s)).all(1) & torch.isfinite(rows_of(t)).all(1)
    required = ~known & (~finite_rows if reduction == "none" else ~finite_rows.all())
    if bool((torch.isfinite(actual) & required).any()):
        raise WrongResultError(f"{actual} is finite where the formula gives {wanted}")
    if lenient:
        known = known & torch.isfinite(actual)
    finite = [float(x.detach().double().abs().max()) for x in (s, t) if x.numel() and bool(torch.isfinite(x).all())]
    size = max([1.0, *finite]) * max(1.0, numbers.get("alpha", 1.0), numbers.get("beta", 1.0))
    if kind == "dkl":
        size /= min(1.0, numbers.get("temperature", 1.0)) ** 2
    if prior_rows is not None and prior_rows.numel():
        size *= max(1.0, float(prior_rows.sum(1).max())) ** 2  # pairs of weights
    of_loss = size * max(1.0, rows if reduction == "sum" else 1.0)  # a sum adds up the rounding of each row
    _close(actual[known], wanted[known], compute, of_loss * (size if lenient else 1.0), "loss")
    outcome = EMPTY if not s.numel() else BEYOND if lenient else RIGHT if bool(known.any()) else NOT_FINITE
    if not bool(known.all()) or not any(gradients):
        return outcome

    upstream = 0.5 + 0.25 * (torch.arange(rows) % 5) if reduction == "none" else torch.tensor(1.75)
    targets = [x for x, need in zip((s, t), gradients, strict=True) if need]
    found = torch.autograd.grad(loss, targets, upstream.reshape(loss.shape).to(loss.dtype))
    scale = upstream.double().reshape(-1, 1) if reduction == "none" else upstream.double()
    if reduction == "batchmean":
        scale = scale / max(1, rows)
    right = [
        gradient * scale
        for gradient, need in zip((expected.student_gradient, expected.teacher_gradient), gradients, strict=True)
        if need
    ]
    for gradient, logits, right_one in zip(found, targets, right, strict=True):
        if gradient.dtype != logits.dtype or gradient.shape != logits.shape:
            raise WrongResultError(f"gradient of {gradient.dtype} {tuple(gradient.shape)} for {logits.dtype}")
        if bool(torch.isfinite(right_one).all()):
            _close(rows_of(gradient), right_one, logits.dtype, size, "gradient")
    return outcome


# --- the three functions ---------------------------------------------------------------------------------------------


def _settings(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("alpha", "beta"):
        if rng.random() < 0.6:
            found[name] = _number(rng, _pick(rng, (0.0, 0.1, 1.0, 4.0, 20.0)))
    names = ("temperature",) if kind == "dkl" else ("temperature", "weight_temperature")
    for name in names:
        if rng.random() < 0.5:
            found[name] = _number(rng, _pick(rng, (0.25, 0.5, 1.0, 2.0, 4.0, 20.0)))
    if kind == "gkl" and rng.random() < 0.7:
        found["gamma"] = _number(rng, _pick(rng, (0.0, 0.2, 0.5, 1.0, 2.0)))
    return found


def _number(rng: np.random.Generator, value: float) -> Any:
    """The same number as one of the types that a number may have."""
    if value == int(value) and rng.random() < 0.3:
        return int(value)
    return _pick(rng, (float, float, np.float64, Fraction))(value)


def _bad_parameter(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[str, Any]:
    name = _pick(rng, names)
    if name == "reduction":
        return name, _pick(rng, BAD_REDUCTIONS)
    options = list(BAD_NUMBERS)
    if name.endswith("temperature"):
        options += [0, 0.0, -0.0]
    return name, _pick(rng, options)


def _bad_logits(rng: np.random.Generator, good: Tensor) -> tuple[str, Any]:
    """Something in place of logits that must be refused, and what it is."""
    options: dict[str, Callable[[], Any]] = {
        "int64": lambda: good.long(),
        "bool": lambda: good > 0,
        "complex64": lambda: good.to(torch.complex64),
        "uint8": lambda: torch.zeros(good.shape, dtype=torch.uint8),
        "float8": lambda: torch.zeros(good.shape, dtype=torch.float8_e4m3fn),
        "sparse": lambda: good.contiguous().to_sparse(),
        "numpy": lambda: good.float().numpy(),
        "list": lambda: good.tolist(),
        "None": lambda: None,
        "text": lambda: "logits",
        "0-dim": lambda: torch.tensor(1.0),
        "1-dim": lambda: torch.ones(max(1, good.shape[1])),
        "one class more": lambda: torch.zeros(good.shape[0], good.shape[1] + 1, *good.shape[2:]),
        "one sample more": lambda: torch.zeros(good.shape[0] + 1, *good.shape[1:]),
        "one dimension more": lambda: good.unsqueeze(-1).expand(*good.shape, 2),
        "no classes": lambda: torch.zeros(good.shape[0], 0),
        "another device": lambda: torch.zeros(good.shape, device="meta"),
    }
    what = _pick(rng, sorted(options))
    return what, options[what]()


def _bad_prior(rng: np.random.Generator, student: Tensor) -> tuple[str, Any]:
    samples, classes = student.shape[:2]
    rows = torch.full((max(1, samples), classes), 1.0 / classes)
    options: dict[str, Callable[[], Any]] = {
        "negative": lambda: _with(rows, -0.1),
        "NaN": lambda: _with(rows, float("nan")),
        "infinite": lambda: _with(rows, float("inf")),
        "minus infinity": lambda: _with(rows, -float("inf")),
        "int64": lambda: rows.long(),
        "bool": lambda: rows > 0,
        "complex64": lambda: rows.to(torch.complex64),
        "float8": lambda: torch.zeros(rows.shape, dtype=torch.float8_e4m3fn),
        "sparse": lambda: rows.to_sparse(),
        "numpy": lambda: rows.numpy(),
        "list": lambda: rows.tolist(),
        "one sample more": lambda: torch.cat([rows, rows[:1]]),
        "one class more": lambda: torch.cat([rows, rows[:, :1]], 1),
        "1-dim": lambda: rows[0],
        "another device": lambda: torch.empty(rows.shape, device="meta"),
    }
    what = _pick(rng, sorted(options))
    return what, options[what]()


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] = value
    return changed


STYLES = ("plain", "plain", "plain", "one value", "far", "denormal", "not finite", "beyond")
PRIORS = ("plain", "zeros", "all zero", "one-hot", "unnormalised", "denormal")


def _function(rng: np.random.Generator) -> Case:
    kind = _pick(rng, KINDS)
    function = getattr(ikl_plugins, f"{kind}_loss")
    subject = f"{kind}_loss"
    shape = _shape(rng)
    style = _pick(rng, STYLES)
    dtype = _pick(rng, DTYPES)
    other = dtype if rng.random() < 0.8 else _pick(rng, DTYPES)
    student = _logits(rng, shape, style, dtype)
    teacher = student.detach().clone() if rng.random() < 0.05 and other == dtype else _logits(rng, shape, style, other)
    settings = _settings(rng, kind)
    reduction = _pick(rng, REDUCTIONS)
    prior = None
    if kind != "dkl" and rng.random() < 0.4:
        form = shape if rng.random() < 0.3 else shape[:2]
        prior = _laid_out(rng, _weights(rng, form, _pick(rng, PRIORS)).to(_pick(rng, DTYPES)))
    keywords = {**settings, "reduction": reduction}
    if prior is not None:
        keywords["class_prior"] = prior
    where = f"{style}, {tuple(shape)}, {dtype}/{other}, {reduction}"

    def plainly(names: tuple[str, ...], what: str, *arguments: Any, **changed: Any) -> Case:
        def call() -> None:
            function(*arguments, **{**keywords, **changed})

        return Case(subject, f"{what} ({where})", names, call)

    defect = _pick(rng, ("parameter", "logits", "prior", "finite")) if rng.random() < 0.4 else None
    if defect == "parameter":
        names = ("alpha", "beta", "temperature", "reduction")
        names += () if kind == "dkl" else ("weight_temperature",)
        names += ("gamma",) if kind == "gkl" else ()
        name, value = _bad_parameter(rng, names)
        return plainly((name,), f"{name}={value!r:.80}", student, teacher, **{name: value})
    if defect == "logits":
        what, bad = _bad_logits(rng, student)
        if rng.random() < 0.5:
            return plainly(("student_logits",), f"student: {what}", bad, teacher)
        return plainly(("teacher_logits", "student_logits"), f"teacher: {what}", student, bad)
    if defect == "prior" and kind != "dkl" and shape[0] > 0:
        what, bad = _bad_prior(rng, student)
        return plainly(("class_prior",), f"prior: {what}", student, teacher, class_prior=bad)
    if defect == "finite" and student.numel():
        bad = _logits(rng, shape, "not finite", dtype)
        if not bool(torch.isfinite(bad).all()):
            return plainly(("student_logits", "teacher_logits"), "check_finite", bad, teacher, check_finite=True)
    gradients = _pick(rng, ((True, True), (True, True), (True, False), (False, True), (False, False)))

    def call() -> str:
        return _hold(
            lambda s, t: function(s, t, **keywords), kind, student, teacher, settings, reduction,
            class_prior=prior, gradients=gradients, lenient=style == "beyond",
        )  # fmt: skip

    return Case(subject, where, (), call)


# --- the three modules -----------------------------------------------------------------------------------------------


def _bad_targets(rng: np.random.Generator, good: Tensor, classes: int) -> tuple[str, Any]:
    good = good.long()
    options: dict[str, Callable[[], Any]] = {
        "None": lambda: None,
        "float32": lambda: good.float(),
        "bool": lambda: good > 0,
        "complex64": lambda: good.to(torch.complex64),
        "list": lambda: good.tolist(),
        "numpy": lambda: good.numpy(),
        "too large": lambda: torch.full_like(good, classes),
        "negative": lambda: torch.full_like(good, -1),
        "-100": lambda: torch.full_like(good, -100),
        "one more": lambda: good.new_zeros(good.shape[0] + 1, *good.shape[1:]),
        "one-hot": lambda: good.new_zeros(*good.shape, classes + 1),
        "0-dim": lambda: torch.tensor(0),
    }
    what = _pick(rng, sorted(options))
    return what, options[what]()


def _module(rng: np.random.Generator) -> Case:
    kind = _pick(rng, KINDS)
    cls = getattr(ikl_plugins, f"{kind.upper()}Loss")
    subject = cls.__name__
    samples, classes, *places = _shape(rng)
    samples = max(1, samples)
    places = [max(1, place) for place in places]
    settings = _settings(rng, kind)
    reduction = _pick(rng, REDUCTIONS)
    dtype = _pick(rng, DTYPES)
    global_info = kind != "dkl" and rng.random() < 0.75
    keywords: dict[str, Any] = {**settings, "reduction": reduction}
    if global_info:
        keywords.update(global_info=True, num_classes=classes)
    where = f"{dtype}, {samples} samples, {classes} classes, {reduction}, global_info={global_info}"
    shape = (samples, classes, *places)
    style = _pick(rng, ("plain", "plain", "far", "one value"))
    batches = [
        (
            _logits(rng, shape, style, dtype),
            _logits(rng, shape, style, dtype),
            torch.from_numpy(rng.integers(0, classes, (samples, *places))).to(_pick(rng, INTEGERS)),
        )
        for _ in range(int(rng.integers(1, 4)))
    ]

    defect = _pick(rng, ("parameter", "classes", "targets", "logits")) if rng.random() < 0.35 else None
    if defect == "parameter":
        names = ("alpha", "beta", "temperature", "reduction", *(() if kind == "dkl" else ("weight_temperature",)))
        name, value = _bad_parameter(rng, names + (("gamma",) if kind == "gkl" else ()))
        return Case(
            subject, f"{name}={value!r:.80} ({where})", (name,), lambda: cls(**{**keywords, name: value}) and None
        )
    if defect == "classes":
        if kind == "dkl":
            return Case(subject, "global_info=True", ("global_info",), lambda: cls(global_info=True) and None)
        if rng.random() < 0.5:
            value = _pick(rng, BAD_CLASS_COUNTS)
            bad = {**keywords, "global_info": True, "num_classes": value}
            return Case(subject, f"num_classes={value!r}", ("num_classes",), lambda: cls(**bad) and None)
        bad = {**keywords, "num_classes": classes + 1}

        def other_count() -> None:
            cls(**bad)(*batches[0])

        return Case(subject, f"num_classes of others ({where})", ("num_classes",), other_count)
    if defect == "targets" and global_info:
        what, targets = _bad_targets(rng, batches[0][2], classes)
        if not (what == "too large" and isinstance(targets, Tensor) and int(targets.max()) < classes):

            def bad_targets() -> None:
                cls(**keywords)(*batches[0][:2], targets)

            return Case(subject, f"targets: {what} ({where})", ("targets",), bad_targets)
    if defect == "logits":
        what, bad_logits = _bad_logits(rng, batches[0][0])

        def wrong_logits() -> None:
            cls(**keywords)(batches[0][0], bad_logits, batches[0][2])

        return Case(subject, f"logits: {what} ({where})", ("teacher_logits", "student_logits"), wrong_logits)

    def call() -> None:
        criterion = cls(**keywords)
        temperature = float(settings.get("weight_temperature", 1.0))
        matrix = torch.full((classes, classes), 1.0 / classes, dtype=torch.float64)
        for epoch in range(2):
            sums, counts = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
            for index, (student, teacher, labels) in enumerate(batches):
                training = epoch == 1 or index != 1
                criterion.train(training)
                rows = None
                if global_info:
                    held = criterion.class_prior.matrix
                    _close(held, matrix, torch.float32, 1.0, f"class prior of epoch {epoch}")
                    rows = held.double()[labels.long()].movedim(-1, 1)
                _hold(
                    lambda s, t, y=labels: criterion(s, t, y), kind, student, teacher, settings, reduction,
                    class_prior=rows,
                )  # fmt: skip
                terms = criterion.last_terms
                both = terms.weighted_mse.double() + terms.soft_cross_entropy.double()
                with torch.no_grad():
                    criterion.eval()
                    value = criterion(student, teacher, labels).double()
                _close(both.reshape(-1), value.reshape(-1), torch.float32, 1.0 + float(value.abs().max()), "last_terms")
                if training:
                    flat = labels.reshape(-1).long()
                    sums.index_add_(0, flat, softmax(rows_of(teacher), temperature))
                    counts += torch.bincount(flat, minlength=classes)
            criterion.end_epoch()
            seen = counts > 0
            matrix[seen] = sums[seen] / counts[seen, None]

    return Case(subject, f"{style}, {where}", (), call)


# --- the class prior -------------------------------------------------------------------------------------------------


def _prior(rng: np.random.Generator) -> Case:
    classes = int(rng.integers(1, 9))
    samples = int(rng.integers(0, 7))
    places = tuple(rng.integers(1, 4, int(rng.integers(0, 3))).tolist())
    dtype = _pick(rng, DTYPES)
    integer = _pick(rng, INTEGERS)
    where = f"{samples} samples, {classes} classes, places {places}, {dtype}, {integer}"

    def batch() -> tuple[Tensor, Tensor]:
        chances = _laid_out(rng, _weights(rng, (samples, classes, *places), "plain").to(dtype))
        return chances, torch.from_numpy(rng.integers(0, classes, (samples, *places))).to(integer)

    if rng.random() < 0.5:
        probabilities, targets = batch()
        defect = _pick(rng, ("num_classes", "targets", "probabilities", "prior"))
        if defect == "num_classes":
            value = _pick(rng, BAD_CLASS_COUNTS)
            return Case("ClassPrior", f"num_classes={value!r}", ("num_classes",), lambda: ClassPrior(value) and None)
        if defect in ("targets", "prior") and samples:
            what, bad = _bad_targets(rng, targets, classes)
            shapes = ("one more", "one-hot", "0-dim")
            if defect == "targets" or what not in shapes:  # prior() takes labels of any shape

                def wrong_targets() -> None:
                    prior = ClassPrior(classes)
                    prior.observe(probabilities, bad) if defect == "targets" else prior.prior(bad)

                names = ("targets", "probabilities") if what in shapes else ("targets",)
                return Case("ClassPrior", f"targets: {what} ({where})", names, wrong_targets)
        if defect == "probabilities" and samples:
            options: dict[str, Any] = {
                "int64": probabilities.long(), "bool": probabilities > 0, "list": probabilities.tolist(), "None": None,
                "complex64": probabilities.to(torch.complex64), "one class more": probabilities[:, :1].expand(
                    samples, classes + 1, *places), "1-dim": torch.ones(samples), "sparse": probabilities.to_sparse(),
            }  # fmt: skip
            what = _pick(rng, sorted(options))
            bad_chances = options[what]
            return Case(
                "ClassPrior", f"probabilities: {what} ({where})", ("probabilities",),
                lambda: ClassPrior(classes).observe(bad_chances, targets),
            )  # fmt: skip

    rounds = [[batch() for _ in range(int(rng.integers(0, 3)))] for _ in range(2)]

    def call() -> None:
        prior = ClassPrior(classes)
        matrix = torch.full((classes, classes), 1.0 / classes, dtype=torch.float64)
        for batches in rounds:
            sums, counts = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes)
            for chances, labels in batches:
                prior.observe(chances, labels)
                for row, label in zip(rows_of(chances), labels.reshape(-1).tolist(), strict=True):
                    sums[label] += row
                    counts[label] += 1
            prior.end_epoch()
            seen = counts > 0
            matrix[seen] = sums[seen] / counts[seen, None]
            _close(prior.matrix, matrix, torch.float32, 1.0, "matrix")
            labels = torch.arange(classes).to(integer)
            _close(prior.prior(labels), matrix, torch.float32, 1.0, "rows")

    return Case("ClassPrior", where, (), call)


# --- the attack ------------------------------------------------------------------------------------------------------


class _NoGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).detach()


def _attack(rng: np.random.Generator) -> Case:
    norm = _pick(rng, ("linf", "l2"))
    objective = _pick(rng, ("cross_entropy", "margin", "soft_cross_entropy", "ikl"))
    start = _pick(
        rng, ("uniform", "normal", "none") if objective in ("cross_entropy", "margin") else ("uniform", "normal")
    )
    dtype = _pick(rng, (torch.float64, torch.float64, torch.float32))
    samples, side, classes = int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(2, 6))
    shape = (samples, 3, side, side)
    eps, steps = float(_pick(rng, (1 / 255, 8 / 255, 0.3, 1.0))), int(rng.integers(1, 6))
    step_size = eps * float(_pick(rng, (0.1, 0.5, 1.0)))
    images = torch.from_numpy(rng.choice([0.0, 1.0, 0.5], size=shape) if rng.random() < 0.2 else rng.random(shape))
    images = _laid_out(rng, images.to(dtype))
    labels = torch.from_numpy(rng.integers(0, classes, samples)).to(_pick(rng, INTEGERS))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=tuple(parameter.shape))))
    prior = None
    if objective == "ikl" and rng.random() < 0.5:
        prior = _weights(rng, (samples, classes), "plain").to(dtype)
    seed = int(rng.integers(2**31))
    options: dict[str, Any] = {
        "eps": eps, "steps": steps, "step_size": step_size, "norm": norm, "objective": objective, "random_start": start
    }  # fmt: skip
    keywords: dict[str, Any] = {"labels": labels, "class_prior": prior}
    where = f"{norm}, {objective}, {start}, eps {eps:.3g}, {steps} steps, {dtype}, {shape}"

    def bad(names: tuple[str, ...], what: str, of: Any = model, on: Any = images, **changed: Any) -> Case:
        def call() -> None:
            attack = PGD(
                **{**options, **{key: value for key, value in changed.items() if key in options or key == "budget"}}
            )
            attack(
                of,
                on,
                **{
                    **keywords,
                    **{
                        key: value
                        for key, value in changed.items()
                        if key in ("labels", "natural_logits", "class_prior", "strength")
                    },
                },
            )

        return Case("PGD", f"{what} ({where})", names, call)

    if rng.random() < 0.5:
        numbers: tuple[Any, ...] = (None, "8/0", "abc", -1, 0, float("nan"), float("inf"), True, [0.1], 2 + 0j, "nan")
        budgets: tuple[Any, ...] = ("most", 3, [(1, 2)], [], [(0.5, 2, 1.0)])
        choices: list[Callable[[], Case]] = [
            lambda: bad(("eps",), "eps", eps=_pick(rng, numbers)),
            lambda: bad(("eps",), "eps beyond pixels", eps=8.0 if norm == "linf" else 1e3),
            lambda: bad(("step_size", "steps"), "step_size", step_size=_pick(rng, numbers)),
            lambda: bad(("steps", "step_size"), "steps", steps=_pick(rng, (0, -1, 1.5, "3", None, True))),
            lambda: bad(("norm",), "norm", norm=_pick(rng, ("Linf", "l1", "", None, 2, ["linf"]))),
            lambda: bad(("objective",), "objective", objective=_pick(rng, ("ce", "kl", None, 1, ["margin"]))),
            lambda: bad(("random_start",), "random_start", random_start=_pick(rng, ("Uniform", True, None, "gauss"))),
            lambda: bad(("images",), "images uint8", on=(images * 255).to(torch.uint8)),
            lambda: bad(("images",), "images 0..255", on=images * 255 + 2),
            lambda: bad(("images",), "images below 0", on=images - 0.6),
            lambda: bad(("images",), "images NaN", on=torch.full_like(images, float("nan"))),
            lambda: bad(("images",), "no images", on=images[:0]),
            lambda: bad(("images",), "images None", on=None),
            lambda: bad(("images",), "images numpy", on=images.numpy()),
            lambda: bad(("images",), "images sparse", on=images.contiguous().to_sparse()),
            lambda: bad(("model",), "model is a function", of=lambda x: x),
            lambda: bad(("model",), "model without gradient", of=_NoGradient()),
            lambda: bad(("budget", "steps"), "budget", steps=None, step_size=None, budget=_pick(rng, budgets)),
            lambda: bad(("strength",), "strength", strength=Strength(_pick(rng, (0.0, -1.0, "a")), 2, 0.1)),
        ]  # fmt: skip
        if objective in ("cross_entropy", "margin"):
            choices += [
                lambda: bad(("labels",), "no labels", labels=None),
                lambda: bad(("labels",), "labels float", labels=labels.float()),
                lambda: bad(("labels",), "labels too large", labels=torch.full((samples,), classes)),
                lambda: bad(("labels",), "labels negative", labels=torch.full((samples,), -1)),
                lambda: bad(("labels",), "labels one more", labels=torch.zeros(samples + 1, dtype=torch.long)),
                lambda: bad(("labels",), "labels list", labels=labels.tolist()),
            ]
        else:
            choices += [
                lambda: bad(("natural_logits",), "logits", natural_logits=_pick(rng, ("x", [1.0], torch.ones(3)))),
                lambda: bad(("random_start",), "start without a gradient", random_start="none"),
            ]  # fmt: skip
            if objective == "ikl":
                choices.append(lambda: bad(("class_prior",), "class_prior", class_prior=-torch.ones(samples, classes)))
        return _pick(rng, choices)()

    def call() -> None:
        attack = PGD(**options)
        model.train()
        found = attack(model, images, generator=torch.Generator().manual_seed(seed), **keywords)
        slack = 1e-12 if dtype == torch.float64 else 1e-6
        distance = (found - images).flatten(1)
        far = distance.abs().amax(1) if norm == "linf" else distance.square().sum(1).sqrt()
        if not (bool((far <= eps + slack + 1e-6 * eps).all()) and bool((found >= 0).all() & (found <= 1).all())):
            raise WrongResultError(f"outside the ball or [0, 1]: {float(far.max())}")
        untouched = all(parameter.grad is None for parameter in model.parameters()) and model.training
        if found.shape != images.shape or found.dtype != dtype or found.requires_grad or not untouched:
            raise WrongResultError("shape, dtype, gradient or the model's state")
        if dtype != torch.float64:
            return  # the sign of a gradient near 0 depends on its rounding
        generator = torch.Generator().manual_seed(seed)
        flat = images.reshape(samples, -1)
        begin = flat
        if start == "normal":
            begin = flat + 0.001 * torch.randn(shape, generator=generator, dtype=dtype).reshape(samples, -1)
        elif start == "uniform" and norm == "linf":
            offset = torch.rand(shape, generator=generator, dtype=dtype).reshape(samples, -1) * (2 * eps) - eps
            begin = (flat + offset).clamp(0, 1)
        elif start == "uniform":
            way = torch.randn(shape, generator=generator, dtype=dtype).reshape(samples, -1)
            radius = torch.rand(samples, generator=generator, dtype=dtype) ** (1.0 / flat.shape[1])
            offset = way / way.square().sum(1, keepdim=True).sqrt() * (eps * radius)[:, None]
            begin = (flat + offset).clamp(0, 1)
        weight, bias = model[1].weight.detach(), model[1].bias.detach()
        wanted = ascend(
            weight, bias, flat, begin, norm=norm, eps=eps, steps=steps, step_size=step_size, objective=objective,
            labels=labels.long() if objective in ("cross_entropy", "margin") else None,
            natural_logits=flat @ weight.T + bias, class_prior=prior,
        )  # fmt: skip
        if not torch.allclose(found.reshape(samples, -1), wanted, rtol=0, atol=1e-8):
            raise WrongResultError(f"off by {float((found.reshape(samples, -1) - wanted).abs().max()):.3g}")

    return Case("PGD", where, (), call)


# --- the campaign ----------------------------------------------------------------------------------------------------


def run(record: Record, work: Path, *, seed: int, quick: bool) -> None:
    """Draws and judges all cases, and finishes the part.

    Args:
        record: of the part.
        work: not used.
        seed: of the cases.
        quick: few cases.
    """
    judge_all(record, seed=seed, quick=quick)
    record.finish()


def judge_all(record: Record, *, seed: int, quick: bool, judged: Callable[[], None] = lambda: None) -> None:
    """Draws and judges the cases that the record does not have yet, chunk by chunk; the part is not finished by it.

    Args:
        record: of the part.
        seed: of the cases.
        quick: few cases.
        judged: called after each chunk, before it is saved: what it adds to the record is kept with the chunk, and if
            it raises, the chunk is not.
    """
    cases = QUICK_CASES if quick else CASES
    record.fact("cases", cases)
    for first in range(0, cases, CHUNK):
        name = f"from {first}"
        if record.done(name):
            continue
        begin = time.perf_counter()
        outcomes: dict[str, Counter[str]] = {}
        for number in range(first, min(cases, first + CHUNK)):
            case = draw(seed=seed, number=number)
            outcome, detail = judge(case)
            outcomes.setdefault(case.subject, Counter())[outcome] += 1
            if detail is not None:
                record.fail(case.subject, number=number, input=case.what, what=outcome, detail=detail)
        for subject, counts in outcomes.items():
            record.add(subject, counts.elements())
        seconds = record.content["facts"].get("seconds", 0.0) + time.perf_counter() - begin
        record.fact("seconds", round(seconds, 2))
        judged()
        record.save(name)
