"""Strategies for calls of the package. Most calls are right; about a third has one thing wrong.

What is called gives a :class:`Case`; making the call and holding its result against the oracle are its ``call``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from strategies import generators, layouts, mapped_from, one_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

import ikl_plugins
from campaign.expected import Right, hold_attack, hold_loss, hold_module, hold_prior
from ikl_plugins import ClassPrior
from ikl_plugins.adversarial import PGD
from ikl_plugins.adversarial.schedule import Strength

KINDS = ("dkl", "ikl", "gkl")
STYLES = ("plain", "plain", "plain", "one value", "far", "denormal", "not finite", "beyond")
PRIORS = ("plain", "uniform", "zeros", "all zero", "one-hot", "unnormalised", "denormal")
NUMBER_TYPES = (float, np.float64, Fraction, int)
BAD_NUMBERS: tuple[Any, ...] = (
    *("1.0", None, True, [1.0], 1 + 2j, -1.0, float("nan"), float("inf"), -float("inf"), 10**400, Decimal("1.5")),
    *(np.float64("nan"), torch.tensor(1.0), (), {}, -1e-300),
)
BAD_REDUCTIONS: tuple[Any, ...] = (
    *("mean", "Sum", "", None, 3, ["sum"], ("none",), True, np.array(["sum", "none"]), b"sum"),
)
BAD_CLASS_COUNTS: tuple[Any, ...] = (0, -3, 2.0, "10", True, None, [3], float("nan"))

dtypes = st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16))
integers = st.sampled_from(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)
reductions = st.sampled_from(("batchmean", "sum", "none"))


class _Named(Tensor):
    """A subclass that computes as torch does."""


# What logits may be beside plain tensors.
WRAPPINGS: tuple[Callable[[Tensor], Tensor], ...] = (
    *[lambda plain: plain] * 5,
    nn.Parameter,
    lambda plain: plain.as_subclass(_Named),
    lambda plain: torch._neg_view(-plain),
)


class Case(NamedTuple):
    """One call of the package."""

    what: str  # what is special about the input
    call: Callable[[], Right | None]  # also holds the result against the oracle; returns what was right about it
    names: tuple[str, ...] = ()  # arguments of which the refusal must name one; none if the call is right


def one_in(count: int) -> st.SearchStrategy[bool]:
    """True for about one of ``count`` examples, and not for the simplest."""
    return st.integers(0, count - 1).map(lambda drawn: drawn == count - 1)


# --- tensors ---------------------------------------------------------------------------------------------------------


def shapes(*, least: int, many: bool = False) -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C), (N, C, d1) or (N, C, d1, d2), with at least so many samples and places; ``many``: or many classes."""
    samples = st.sampled_from((4, 1, 2, 3, 5, 8, 6, 7, *([] if least else [0])))
    places = st.sampled_from((2, 1, 3, 1, 2, *([] if least else [0])))
    classes = st.integers(1, 13)
    dense = (st.tuples(samples, classes, *[places] * count) for count in range(3))
    return st.one_of(*dense, *([st.tuples(st.sampled_from((2, 1)), st.sampled_from((100, 400)))] if many else []))


@st.composite
def logits(draw: st.DrawFn, shape: tuple[int, ...], style: str, dtype: torch.dtype) -> Tensor:
    generator = draw(generators())
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    values *= draw(st.sampled_from((1.0, 0.1, 3.0, 10.0)))
    if style == "one value":
        values.fill_(draw(st.sampled_from((0.0, 0.7, -3.0))))
    elif style == "far":
        values = one_of((-1e4, 1e4, 0.0, 1.0), shape, generator)
    elif style == "denormal":
        values = one_of((1e-310, -1e-310, 1e-40, 5e-8, 0.0), shape, generator)
    elif style == "not finite" and values.numel():
        for value in draw(st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), min_size=1, max_size=2)):
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = value
    elif style == "beyond":
        values *= 1e30
    return draw(layouts(values.to(dtype)).map(draw(st.sampled_from(WRAPPINGS))))


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...], style: str, dtype: torch.dtype) -> Tensor:
    """A class prior."""
    generator = draw(generators())
    values = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.01
    half = torch.rand(shape, generator=generator) > 0.5
    if style == "uniform":
        values = torch.ones_like(values)
    elif style == "zeros":
        values = values * half
    elif style == "all zero":
        values = torch.zeros_like(values)
    elif style == "one-hot":
        values = torch.zeros_like(values)
        values[:, :1] = 1.0
    elif style == "denormal":
        values = torch.where(half, values, 1e-42)
    values = values * 4.0 if style == "unnormalised" else values / values.sum(1, keepdim=True).clamp(min=1e-30)
    return draw(layouts(values.to(dtype)))


@st.composite
def labels(draw: st.DrawFn, shape: tuple[int, ...], classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=draw(generators())).to(draw(integers))


# --- what is wrong ---------------------------------------------------------------------------------------------------


class _OfItsOwn(Tensor):
    """A subclass that computes by itself, and cannot."""

    @staticmethod
    def __new__(cls, good: Tensor) -> _OfItsOwn:
        return Tensor._make_wrapper_subclass(cls, good.shape, dtype=good.dtype)  # type: ignore[attr-defined]

    def __init__(self, good: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("no arithmetic")


def _quiet(make: Callable[[], Any]) -> Callable[[], Any]:
    """Without torch's warnings of what is in beta."""

    def made() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made


def odd_tensors(good: Tensor) -> dict[str, Callable[[], Any]]:
    """The same numbers, labels or not, as tensors that are in no place taken."""
    good = good.as_subclass(Tensor).resolve_neg().contiguous()
    good = good.float() if good.is_floating_point() else good
    rows = torch.ones(len(good), dtype=torch.float64), torch.zeros(len(good), dtype=torch.int64)
    odd: dict[str, Callable[[], Any]] = {
        "complex64": lambda: good.to(torch.complex64),
        "complex32": lambda: good.to(torch.complex32),
        "quantised": lambda: torch.quantize_per_tensor(good.float(), 0.1, 0, torch.qint8),
        "quantised by rows": lambda: torch.quantize_per_channel(good.float(), *rows, 0, torch.qint32),
        "bits8": lambda: torch.zeros(good.shape, dtype=torch.uint8).view(torch.bits8),
        "sparse": lambda: good.to_sparse(),
        "mkldnn": lambda: good.float().to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor(list(good)),
        "masked": lambda: masked_tensor(good, torch.ones(good.shape, dtype=torch.bool)),
        "not initialised": lambda: nn.UninitializedBuffer(dtype=good.dtype),
        "fake": lambda: FakeTensorMode().from_tensor(good),
        "a subclass of its own": lambda: _OfItsOwn(good),
        "another device": lambda: torch.zeros(good.shape, dtype=good.dtype, device="meta"),
        "numpy": good.numpy,
        "list": lambda: good.tolist(),
    }
    if good.dim() == 2:
        odd["sparse rows"] = lambda: good.to_sparse_csr()
    return {name: _quiet(make) for name, make in odd.items()}


def bad_dtypes(good: Tensor) -> dict[str, Callable[[], Any]]:
    """What is in no place taken for a tensor of numbers."""
    return {
        **odd_tensors(good.detach()),
        "int64": lambda: torch.zeros(good.shape, dtype=torch.int64),
        "bool": lambda: good > 0,
        "float8": lambda: torch.zeros(good.shape, dtype=torch.float8_e4m3fn),
    }


def bad_logits(good: Tensor) -> st.SearchStrategy[tuple[str, Any]]:
    """Something in place of logits, and what it is."""
    samples, classes, *places = good.shape
    return mapped_from(
        {
            **bad_dtypes(good),
            "uint8": lambda: torch.zeros(good.shape, dtype=torch.uint8),
            "None": lambda: None,
            "text": lambda: "logits",
            "0-dim": lambda: torch.tensor(1.0),
            "1-dim": lambda: torch.ones(classes),
            "one class more": lambda: torch.zeros(samples, classes + 1, *places),
            "one sample more": lambda: torch.zeros(samples + 1, classes, *places),
            "one dimension more": lambda: good.unsqueeze(-1).expand(*good.shape, 2),
            "no classes": lambda: torch.zeros(samples, 0),
        }
    )


def bad_prior(samples: int, classes: int) -> st.SearchStrategy[tuple[str, Any]]:
    rows = torch.full((samples, classes), 1.0 / classes)

    def last(value: float) -> Callable[[], Tensor]:
        return lambda: torch.cat([rows.flatten()[:-1], torch.tensor([value])]).view(rows.shape)

    return mapped_from(
        {
            **bad_dtypes(rows),
            "negative": last(-0.1),
            "NaN": last(float("nan")),
            "infinite": last(float("inf")),
            "minus infinity": last(-float("inf")),
            "one sample more": lambda: torch.cat([rows, rows[:1]]),
            "one class more": lambda: torch.cat([rows, rows[:, :1]], 1),
            "1-dim": lambda: rows[0],
        }
    )


OF_ANOTHER_SHAPE = ("one more", "one-hot", "0-dim")


def bad_targets(good: Tensor, classes: int) -> st.SearchStrategy[tuple[str, Any]]:
    good = good.long()
    return mapped_from(
        {
            **odd_tensors(good),
            "None": lambda: None,
            "float32": lambda: good.float(),
            "bool": lambda: good > 0,
            "too large": lambda: torch.full_like(good, classes),
            "negative": lambda: torch.full_like(good, -1),
            "-100": lambda: torch.full_like(good, -100),
            "one more": lambda: good.new_zeros(len(good) + 1, *good.shape[1:]),
            "one-hot": lambda: good.new_zeros(*good.shape, classes + 1),
            "0-dim": lambda: torch.tensor(0),
        }
    )


# --- settings --------------------------------------------------------------------------------------------------------


def numbers(*values: float) -> st.SearchStrategy[Any]:
    """One of the values, as one of the types that a number may have."""
    made = st.tuples(st.sampled_from(values), st.sampled_from(NUMBER_TYPES))
    return made.map(lambda drawn: drawn[1](drawn[0]) if drawn[0] == int(drawn[0]) or drawn[1] is not int else drawn[0])


def loss_settings(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    weight = numbers(1.0, 0.0, 0.1, 4.0, 20.0)
    temperature = numbers(1.0, 0.25, 0.5, 2.0, 4.0, 20.0)
    optional = {"alpha": weight, "beta": weight, "temperature": temperature}
    if kind != "dkl":
        optional["weight_temperature"] = temperature
    if kind == "gkl":
        optional["gamma"] = numbers(1.0, 0.0, 0.2, 0.5, 2.0, 11.0, 50.0)
    return st.fixed_dictionaries({}, optional=optional)


@st.composite
def bad_settings(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """One keyword of a loss with a value that it does not take."""
    names = ["alpha", "beta", "temperature", "reduction"]
    names += [] if kind == "dkl" else ["weight_temperature"]
    names += ["gamma"] if kind == "gkl" else []
    name = draw(st.sampled_from(names))
    zeros = (0, 0.0, -0.0) if name.endswith("temperature") else ()
    return {name: draw(st.sampled_from(BAD_REDUCTIONS if name == "reduction" else (*BAD_NUMBERS, *zeros)))}


# --- the losses, as functions and as modules -------------------------------------------------------------------------


@st.composite
def function_cases(draw: st.DrawFn, kind: str) -> Case:
    function = getattr(ikl_plugins, f"{kind}_loss")
    shape, style, dtype = draw(shapes(least=0, many=kind == "gkl")), draw(st.sampled_from(STYLES)), draw(dtypes)
    other = draw(st.one_of(st.just(dtype), dtypes))
    student, teacher = draw(logits(shape, style, dtype)), draw(logits(shape, style, other))
    if other == dtype and draw(one_in(20)):
        teacher = student.clone()
    settings, reduction, prior = draw(loss_settings(kind)), draw(reductions), None
    of_prior = "no"
    if kind != "dkl" and draw(st.booleans()):
        form, of_prior = draw(st.sampled_from((shape[:2], shape))), draw(st.sampled_from(PRIORS))
        prior = draw(weights(form, of_prior, draw(dtypes)))
    keywords = {**settings, "reduction": reduction, **({} if prior is None else {"class_prior": prior})}
    where = f"{style}, {shape}, {dtype}/{other}, {reduction}, {of_prior} prior, {settings}"

    def wrong(what: str, *names: str, s: Any = student, t: Any = teacher, **changed: Any) -> Case:
        return Case(f"{what} ({where})", lambda: function(s, t, **{**keywords, **changed}) and None, names)

    defect = draw(st.sampled_from(("parameter", "logits", "prior", "finite"))) if draw(one_in(2)) else None
    if defect == "parameter":
        changed = draw(bad_settings(kind))
        return wrong(f"{changed!r:.80}", *changed, **changed)
    if defect == "logits":
        what, bad = draw(bad_logits(student))
        if draw(st.booleans()):
            return wrong(f"student: {what}", "student_logits", s=bad)
        return wrong(f"teacher: {what}", "teacher_logits", "student_logits", t=bad)
    if defect == "prior" and kind != "dkl" and shape[0]:
        what, bad = draw(bad_prior(*shape[:2]))
        return wrong(f"prior: {what}", "class_prior", class_prior=bad)
    if defect == "finite" and student.numel():
        bad = draw(logits(shape, "not finite", dtype))
        if not bool(torch.isfinite(bad).all()):
            return wrong("check_finite", "student_logits", "teacher_logits", s=bad, check_finite=True)
    gradients = draw(st.sampled_from(((True, True), (True, False), (False, True), (False, False))))

    def call() -> Right:
        return hold_loss(
            lambda s, t: function(s, t, **keywords),
            kind,
            student,
            teacher,
            settings=settings,
            reduction=reduction,
            class_prior=prior,
            gradients=gradients,
            lenient=style == "beyond",
        )

    return Case(where, call)


@st.composite
def module_cases(draw: st.DrawFn, kind: str) -> Case:
    cls = getattr(ikl_plugins, f"{kind.upper()}Loss")
    samples, classes, *places = shape = draw(shapes(least=1))
    settings, dtype = draw(loss_settings(kind)), draw(dtypes)
    keywords = {**settings, "reduction": draw(reductions)}
    global_info = kind != "dkl" and not draw(one_in(4))
    if global_info:
        keywords.update(global_info=True, num_classes=classes)
    style = draw(st.sampled_from(("plain", "far", "one value")))
    where = f"{style}, {dtype}, {shape}, {keywords}"
    batch = st.tuples(logits(shape, style, dtype), logits(shape, style, dtype), labels((samples, *places), classes))
    batches = draw(st.lists(batch, min_size=1, max_size=3))
    student, teacher, targets = batches[0]

    def wrong(what: str, *names: str, batch: Any = None, **changed: Any) -> Case:
        def call() -> None:
            criterion = cls(**{**keywords, **changed})
            if batch is not None:
                criterion(*batch)

        return Case(f"{what} ({where})", call, names)

    defect = draw(st.sampled_from(("parameter", "classes", "targets", "logits"))) if draw(one_in(3)) else None
    if defect == "parameter":
        changed = draw(bad_settings(kind))
        return wrong(f"{changed!r:.80}", *changed, **changed)
    if defect == "classes" and kind == "dkl":
        return wrong("global_info", "global_info", global_info=True)
    if defect == "classes" and draw(st.booleans()):
        value = draw(st.sampled_from(BAD_CLASS_COUNTS))
        return wrong(f"num_classes={value!r}", "num_classes", global_info=True, num_classes=value)
    if defect == "classes":
        return wrong("one class more", "num_classes", batch=batches[0], global_info=True, num_classes=classes + 1)
    if defect == "targets" and global_info:
        what, bad = draw(bad_targets(targets, classes))
        return wrong(f"targets: {what}", "targets", batch=(student, teacher, bad))
    if defect == "logits":
        what, bad = draw(bad_logits(student))
        return wrong(f"teacher: {what}", "teacher_logits", "student_logits", batch=(student, bad, targets))
    return Case(where, lambda: hold_module(cls(**keywords), kind, batches, settings, keywords["reduction"]))


# --- the class prior and the attack ----------------------------------------------------------------------------------


def _remade(prior: ClassPrior) -> ClassPrior:
    """Another one, made without memory and given this one's state."""
    with torch.device("meta"):
        other = ClassPrior(prior.num_classes)
    other.to_empty(device="cpu").load_state_dict(prior.state_dict())
    return other


# What may happen to a class prior between its batches.
CASTS: dict[str, Callable[[ClassPrior], ClassPrior]] = {
    "as it is": lambda prior: prior,
    "half": lambda prior: prior.half(),
    "bfloat16": lambda prior: prior.to(torch.bfloat16),
    "type float16": lambda prior: prior.type(torch.float16),
    "double": lambda prior: prior.double(),
    "float": lambda prior: prior.float(),
    "inside a model": lambda prior: nn.Sequential(prior, nn.Linear(1, 1)).to(torch.float16)[0],
    "copied": copy.deepcopy,
    "to_empty and loaded": _remade,
}


@st.composite
def prior_cases(draw: st.DrawFn) -> Case:
    classes, samples = draw(st.integers(1, 8)), draw(st.integers(0, 6))
    places = draw(st.lists(st.integers(1, 3), max_size=2))
    dtype = draw(dtypes)
    where = f"{samples} samples, {classes} classes, places {places}, {dtype}"
    batch = st.tuples(weights((samples, classes, *places), "plain", dtype), labels((samples, *places), classes))
    if not draw(st.booleans()):
        rounds = draw(st.lists(st.lists(batch, max_size=2), min_size=2, max_size=2))
        cast = draw(st.sampled_from(sorted(CASTS)))
        return Case(f"{cast}, {where}", lambda: hold_prior(ClassPrior(classes), rounds, CASTS[cast]))
    probabilities, targets = draw(batch)
    defect = draw(st.sampled_from(("num_classes", "targets", "probabilities", "prior"))) if samples else "num_classes"
    if defect == "num_classes":
        value = draw(st.sampled_from(BAD_CLASS_COUNTS))
        return Case(f"num_classes={value!r}", lambda: ClassPrior(value) and None, ("num_classes",))
    if defect == "probabilities":
        more = {
            **bad_dtypes(probabilities),
            "None": lambda: None,
            "one class more": lambda: probabilities[:, :1].expand(samples, classes + 1, *places),
            "1-dim": lambda: torch.ones(samples),
        }
        what, bad = draw(mapped_from(more))
        call = lambda: ClassPrior(classes).observe(bad, targets)  # noqa: E731
        return Case(f"probabilities: {what} ({where})", call, ("probabilities",))
    what, bad = draw(bad_targets(targets, classes))
    if defect == "targets" or what in OF_ANOTHER_SHAPE:  # prior() takes labels of any shape
        names = ("targets", "probabilities") if what in OF_ANOTHER_SHAPE else ("targets",)
        return Case(f"targets: {what} ({where})", lambda: ClassPrior(classes).observe(probabilities, bad), names)
    return Case(f"targets of prior(): {what} ({where})", lambda: ClassPrior(classes).prior(bad) and None, ("targets",))


class _NoGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).detach()


def bad_attacks(
    images: Tensor, targets: Tensor, classes: int, options: dict[str, Any]
) -> list[tuple[str, str, st.SearchStrategy[Any]]]:
    """(what is wrong, arguments of which one must be named, values): an option of the attack or of its call."""
    bad = (None, "8/0", "abc", -1, 0, float("nan"), float("inf"), True, [0.1], 2 + 0j, "nan")
    samples = len(images)

    def odd(good: Tensor) -> tuple[Any, ...]:
        return tuple(make() for make in odd_tensors(good).values())

    found: list[tuple[str, str, Any]] = [
        ("eps", "eps", bad),
        ("eps", "eps", (8.0 if options["norm"] == "linf" else 1e3,)),
        ("step_size", "step_size steps", bad),
        ("steps", "steps step_size", (0, -1, 1.5, "3", None, True)),
        ("norm", "norm", ("Linf", "l1", "", None, 2, ["linf"])),
        ("objective", "objective", ("ce", "kl", None, 1, ["margin"])),
        ("random_start", "random_start", ("Uniform", True, None, "gauss")),
        ("images", "images", ((images * 255).to(torch.uint8), images * 255 + 2, images - 0.6, images * float("nan"))),
        ("images", "images", (images[:0], None)),
        ("images", "images", odd(images)),
        ("model", "model", (lambda x: x, _NoGradient())),
        ("budget", "budget steps", ("most", 3, [(1, 2)], [], [(0.5, 2, 1.0)])),
        ("strength", "strength", tuple(Strength(eps, 2, 0.1) for eps in (0.0, -1.0, "a"))),
    ]
    if options["objective"] in ("cross_entropy", "margin"):
        other_labels = (torch.full((samples,), classes), torch.full((samples,), -1), torch.zeros(samples + 1).long())
        found.append(("labels", "labels", (None, targets.float(), *odd(targets.long()), *other_labels)))
    else:
        found.append(("natural_logits", "natural_logits", ("x", torch.ones(3), *odd(torch.ones(samples, classes)))))
        found.append(("random_start", "random_start", ("none",)))
    if options["objective"] == "ikl":
        rows = torch.ones(samples, classes)
        found.append(("class_prior", "class_prior", (-rows, *odd(rows))))
    return [(name, names, st.sampled_from(values)) for name, names, values in found]


@st.composite
def attack_cases(draw: st.DrawFn) -> Case:
    objective = draw(st.sampled_from(("cross_entropy", "margin", "soft_cross_entropy", "ikl")))
    starts = ("uniform", "normal", *(("none",) if objective in ("cross_entropy", "margin") else ()))
    dtype = draw(st.sampled_from((torch.float64, torch.float32)))
    samples, side, classes = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    shape, eps = (samples, 3, side, side), draw(st.sampled_from((1 / 255, 8 / 255, 0.3, 1.0)))
    options: dict[str, Any] = {
        "eps": eps,
        "steps": draw(st.integers(1, 5)),
        "step_size": eps * draw(st.sampled_from((0.1, 0.5, 1.0))),
        "norm": draw(st.sampled_from(("linf", "l2"))),
        "objective": objective,
        "random_start": draw(st.sampled_from(starts)),
    }
    generator = draw(generators())
    values = torch.rand(shape, dtype=torch.float64, generator=generator)
    if objective in ("cross_entropy", "margin") and draw(one_in(5)):
        values = values.mul(2).round() / 2  # at whose bounds the others' steps end where they have no gradient
    images = draw(layouts(values.to(dtype)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes)).to(dtype)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=dtype, generator=generator)
    prior = draw(weights((samples, classes), "plain", dtype)) if objective == "ikl" and draw(st.booleans()) else None
    given: dict[str, Any] = {"labels": draw(labels((samples,), classes)), "class_prior": prior}
    where = f"{options}, {dtype}, {shape}"
    if draw(st.booleans()):
        seed = draw(st.integers(0, 2**31 - 1))
        return Case(where, lambda: hold_attack(PGD(**options), model, images, seed=seed, options=options, **given))

    name, names, bad = draw(st.sampled_from(bad_attacks(images, given["labels"], classes, options)))
    changed = {name: draw(bad), **({"steps": None, "step_size": None} if name == "budget" else {})}

    def call() -> None:
        attack = PGD(**{**options, **{key: changed[key] for key in changed if key in options or key == "budget"}})
        more = {key: changed[key] for key in changed if key in ("labels", "natural_logits", "class_prior", "strength")}
        attack(changed.get("model", model), changed.get("images", images), **{**given, **more})

    value = changed[name]
    what = f"{type(value).__name__} of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
    return Case(f"{name}={what} ({where})", call, tuple(names.split()))


SUBJECTS: dict[str, st.SearchStrategy[Case]] = {
    **{f"{kind}_loss": function_cases(kind) for kind in KINDS},
    **{f"{kind.upper()}Loss": module_cases(kind) for kind in KINDS},
    "ClassPrior": prior_cases(),
    "PGD": attack_cases(),
}
# Of the examples of a profile; together 1.
SHARES = {"dkl_loss": 0.22, "ikl_loss": 0.22, "gkl_loss": 0.22, "ClassPrior": 0.08, "PGD": 0.04}
SHARES |= {"DKLLoss": 0.07, "IKLLoss": 0.075, "GKLLoss": 0.075}
