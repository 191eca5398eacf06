"""Strategies for calls of the package. Most calls are right; about a third has one thing wrong.

What is called gives a :class:`Case`; making the call and holding its result against the oracle are its ``call``.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from strategies import generators, layouts, mapped_from, one_of
from torch import Tensor, nn

import ikl_plugins
from campaign.expected import Right, hold_attack, hold_loss, hold_module, hold_prior
from ikl_plugins import ClassPrior
from ikl_plugins.adversarial import PGD
from ikl_plugins.adversarial.schedule import Strength

KINDS = ("dkl", "ikl", "gkl")
STYLES = ("plain", "plain", "plain", "one value", "far", "denormal", "not finite", "beyond")
PRIORS = ("plain", "zeros", "all zero", "one-hot", "unnormalised", "denormal")
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


class Case(NamedTuple):
    """One call of the package."""

    what: str  # what is special about the input
    call: Callable[[], Right | None]  # also holds the result against the oracle; returns what was right about it
    names: tuple[str, ...] = ()  # arguments of which the refusal must name one; none if the call is right


def one_in(count: int) -> st.SearchStrategy[bool]:
    """True for about one of ``count`` examples, and not for the simplest."""
    return st.integers(0, count - 1).map(lambda drawn: drawn == count - 1)


# --- tensors ---------------------------------------------------------------------------------------------------------


def shapes(*, least: int) -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C), (N, C, d1) or (N, C, d1, d2), with at least so many samples and places."""
    samples = st.sampled_from((4, 1, 2, 3, 5, 8, 6, 7, *([] if least else [0])))
    places = st.sampled_from((2, 1, 3, 1, 2, *([] if least else [0])))
    classes = st.integers(1, 13)
    dense = (st.tuples(samples, classes, *[places] * count) for count in range(3))
    return st.one_of(*dense)


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
    return draw(layouts(values.to(dtype)))


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...], style: str, dtype: torch.dtype) -> Tensor:
    """A class prior."""
    generator = draw(generators())
    values = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.01
    half = torch.rand(shape, generator=generator) > 0.5
    if style == "zeros":
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


def bad_dtypes(good: Tensor) -> dict[str, Callable[[], Any]]:
    """What is in no place taken for a tensor of numbers."""
    return {
        "int64": lambda: torch.zeros(good.shape, dtype=torch.int64),
        "bool": lambda: good > 0,
        "complex64": lambda: good.to(torch.complex64),
        "float8": lambda: torch.zeros(good.shape, dtype=torch.float8_e4m3fn),
        "sparse": lambda: good.contiguous().to_sparse(),
        "numpy": lambda: good.float().numpy(),
        "list": lambda: good.tolist(),
        "another device": lambda: torch.zeros(good.shape, device="meta"),
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
            "None": lambda: None,
            "float32": lambda: good.float(),
            "bool": lambda: good > 0,
            "complex64": lambda: good.to(torch.complex64),
            "list": lambda: good.tolist(),
            "numpy": lambda: good.numpy(),
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
        optional["gamma"] = numbers(1.0, 0.0, 0.2, 0.5, 2.0)
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
    shape, style, dtype = draw(shapes(least=0)), draw(st.sampled_from(STYLES)), draw(dtypes)
    other = draw(st.one_of(st.just(dtype), dtypes))
    student, teacher = draw(logits(shape, style, dtype)), draw(logits(shape, style, other))
    if other == dtype and draw(one_in(20)):
        teacher = student.clone()
    settings, reduction, prior = draw(loss_settings(kind)), draw(reductions), None
    if kind != "dkl" and draw(st.booleans()):
        form = draw(st.sampled_from((shape[:2], shape)))
        prior = draw(weights(form, draw(st.sampled_from(PRIORS)), draw(dtypes)))
    keywords = {**settings, "reduction": reduction, **({} if prior is None else {"class_prior": prior})}
    where = f"{style}, {shape}, {dtype}/{other}, {reduction}"

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


@st.composite
def prior_cases(draw: st.DrawFn) -> Case:
    classes, samples = draw(st.integers(1, 8)), draw(st.integers(0, 6))
    places = draw(st.lists(st.integers(1, 3), max_size=2))
    dtype = draw(dtypes)
    where = f"{samples} samples, {classes} classes, places {places}, {dtype}"
    batch = st.tuples(weights((samples, classes, *places), "plain", dtype), labels((samples, *places), classes))
    if not draw(st.booleans()):
        rounds = draw(st.lists(st.lists(batch, max_size=2), min_size=2, max_size=2))
        return Case(where, lambda: hold_prior(ClassPrior(classes), rounds))
    probabilities, targets = draw(batch)
    defect = draw(st.sampled_from(("num_classes", "targets", "probabilities", "prior"))) if samples else "num_classes"
    if defect == "num_classes":
        value = draw(st.sampled_from(BAD_CLASS_COUNTS))
        return Case(f"num_classes={value!r}", lambda: ClassPrior(value) and None, ("num_classes",))
    if defect == "probabilities":
        bad_tensors = {name: of for name, of in bad_dtypes(probabilities).items() if name not in ("float8", "numpy")}
        more = {
            "None": lambda: None,
            "one class more": lambda: probabilities[:, :1].expand(samples, classes + 1, *places),
            "1-dim": lambda: torch.ones(samples),
        }
        what, bad = draw(mapped_from({**bad_tensors, **more}))
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
    found: list[tuple[str, str, Any]] = [
        ("eps", "eps", bad),
        ("eps", "eps", (8.0 if options["norm"] == "linf" else 1e3,)),
        ("step_size", "step_size steps", bad),
        ("steps", "steps step_size", (0, -1, 1.5, "3", None, True)),
        ("norm", "norm", ("Linf", "l1", "", None, 2, ["linf"])),
        ("objective", "objective", ("ce", "kl", None, 1, ["margin"])),
        ("random_start", "random_start", ("Uniform", True, None, "gauss")),
        ("images", "images", ((images * 255).to(torch.uint8), images * 255 + 2, images - 0.6, images * float("nan"))),
        ("images", "images", (images[:0], None, images.numpy(), images.contiguous().to_sparse())),
        ("model", "model", (lambda x: x, _NoGradient())),
        ("budget", "budget steps", ("most", 3, [(1, 2)], [], [(0.5, 2, 1.0)])),
        ("strength", "strength", tuple(Strength(eps, 2, 0.1) for eps in (0.0, -1.0, "a"))),
    ]
    if options["objective"] in ("cross_entropy", "margin"):
        other_labels = (torch.full((samples,), classes), torch.full((samples,), -1), torch.zeros(samples + 1).long())
        found.append(("labels", "labels", (None, targets.float(), targets.tolist(), *other_labels)))
    else:
        found.append(("natural_logits", "natural_logits", ("x", [1.0], torch.ones(3))))
        found.append(("random_start", "random_start", ("none",)))
    if options["objective"] == "ikl":
        found.append(("class_prior", "class_prior", (-torch.ones(samples, classes),)))
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

    return Case(f"{name}={changed[name]!r:.80} ({where})", call, tuple(names.split()))


SUBJECTS: dict[str, st.SearchStrategy[Case]] = {
    **{f"{kind}_loss": function_cases(kind) for kind in KINDS},
    **{f"{kind.upper()}Loss": module_cases(kind) for kind in KINDS},
    "ClassPrior": prior_cases(),
    "PGD": attack_cases(),
}
# Of the examples of a profile; together 1.
SHARES = {"dkl_loss": 0.22, "ikl_loss": 0.22, "gkl_loss": 0.22, "ClassPrior": 0.08, "PGD": 0.04}
SHARES |= {"DKLLoss": 0.07, "IKLLoss": 0.075, "GKLLoss": 0.075}
