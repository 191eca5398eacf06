"""Every refusal of the losses: its type, and that it names caller, argument, rule, what came and the way out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from ikl_plugins import DKLLoss, GKLLoss, IKLLoss, dkl_loss, gkl_loss, ikl_loss
from ikl_plugins._validation import unknown_name_message

FUNCTIONS = [dkl_loss, ikl_loss, gkl_loss]
MODULES = [DKLLoss, IKLLoss, GKLLoss]
S = torch.zeros(4, 3)
T = torch.ones(4, 3)
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]

each_function = pytest.mark.parametrize("function", FUNCTIONS)


def refused(error: type[Exception], call: Callable[[], Any], *parts: str) -> None:
    """``call`` raises ``error``; its message starts with the first part and holds the others, in this order."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    assert message.startswith(parts[0]), message
    assert re.search(".*".join(map(re.escape, parts)), message), message
    # House form: "caller: ... what is wrong. The way out."
    assert re.match(r"\w[\w.]*: ", message), message
    assert message.endswith((".", "...)."))
    assert message.count(". ") >= 1, f"no way out in: {message}"


# --- logits ----------------------------------------------------------------------------------------------------------


@each_function
def test_logits_that_are_not_tensors(function: Any) -> None:
    name = function.__name__
    way_out = "Pass the tensor of raw class scores."
    for other in ([[1.0, 2.0]], None):
        came = type(other).__name__
        for student, teacher, argument in ((other, T, "student_logits"), (S, other, "teacher_logits")):
            refused(
                TypeError,
                lambda s=student, t=teacher: function(s, t),
                f"{name}: `{argument}` must be a torch.Tensor, got {came}. {way_out}",
            )


@each_function
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, *EIGHT_BITS], ids=str)
def test_logits_that_are_not_floating(function: Any, dtype: torch.dtype) -> None:
    """Nor those of 8 bits, which torch counts as floating and has no arithmetic for."""
    name = function.__name__
    for student, teacher, argument in ((S.to(dtype), T, "student_logits"), (S, T.to(dtype), "teacher_logits")):
        refused(
            TypeError,
            lambda s=student, t=teacher: function(s, t),
            f"{name}: `{argument}` must have a floating dtype of at least 16 bits, got {dtype}. Pass raw class scores",
            "`.float()`",
            "`targets`",
        )


# Tensors that are not plain, and how a message calls them.
NOT_PLAIN = [
    (lambda: T.to_sparse(), "the layout torch.sparse_coo"),
    (lambda: T.to_sparse_csr(), "the layout torch.sparse_csr"),
    (lambda: torch.nested.nested_tensor([T, T]), "a nested tensor"),
]
each_not_plain = pytest.mark.parametrize(("make", "kind"), NOT_PLAIN, ids=[kind for _, kind in NOT_PLAIN])
# torch says that both are new, once in a process.
new_in_torch = pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")


@each_function
@each_not_plain
@new_in_torch
def test_logits_that_are_sparse_or_nested(function: Any, make: Any, kind: str) -> None:
    for student, teacher, argument in ((make(), T, "student_logits"), (S, make(), "teacher_logits")):
        refused(
            TypeError,
            lambda s=student, t=teacher: function(s, t),
            f"{function.__name__}: `{argument}` must be a dense tensor, got {kind}. Convert it to a plain tensor",
        )


@each_function
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_logits_without_a_batch(function: Any, shape: tuple[int, ...]) -> None:
    refused(
        ValueError,
        lambda: function(torch.zeros(shape), torch.zeros(shape)),
        f"{function.__name__}: `student_logits` must have shape (N, C) or (N, C, d1, ...), got {shape}.",
        "`.unsqueeze(0)`",
    )


@each_function
@pytest.mark.parametrize(
    ("student", "teacher", "hint"),
    [
        ((4, 3), (5, 3), False),
        ((4, 3), (4, 5), True),
        ((4, 3), (3,), False),
        ((4, 3), (1, 3), False),
        ((4, 3), (4, 3, 1), False),
        ((2, 3, 4), (2, 3, 5), False),
        ((2, 3, 4), (2, 5, 4), True),
    ],
    ids=str,
)
def test_logits_of_two_shapes(function: Any, student: Any, teacher: Any, hint: bool) -> None:
    """Broadcasting would be a silent average over the wrong samples."""
    parts = [
        f"{function.__name__}: `student_logits` and `teacher_logits` must have one shape, got {student} and {teacher}.",
        "Pass logits of the same samples over the same classes.",
    ]
    if hint:
        parts.insert(1, "The networks do not have the same number of classes.")
    refused(ValueError, lambda: function(torch.zeros(student), torch.zeros(teacher)), *parts)
    if not hint:
        with pytest.raises(ValueError, match=r"^(?!.*number of classes)"):
            function(torch.zeros(student), torch.zeros(teacher))


@each_function
@pytest.mark.parametrize("shape", [(4, 0), (2, 0, 3)], ids=str)
def test_logits_without_classes(function: Any, shape: tuple[int, ...]) -> None:
    refused(
        ValueError,
        lambda: function(torch.zeros(shape), torch.zeros(shape)),
        f"{function.__name__}: `student_logits` must have at least one class on dimension 1, got {shape}.",
        "Classes belong on dimension 1",
    )


@each_function
def test_logits_on_two_devices(function: Any) -> None:
    refused(
        ValueError,
        lambda: function(S, T.to("meta")),
        f"{function.__name__}: `student_logits` and `teacher_logits` must be on one device, got cpu and meta.",
        "`.to(...)`",
    )


@each_function
def test_check_finite_reports_every_tensor_once(function: Any) -> None:
    student, teacher = torch.zeros(4, 3), torch.zeros(4, 3)
    student[1, 2] = math.nan
    student[3, 0] = math.inf
    teacher[0, 1] = -math.inf
    name = function.__name__
    refused(
        ValueError,
        lambda: function(student, teacher, check_finite=True),
        f"{name}: logits must be finite when check_finite=True, but `student_logits` has 2 of 12, the first at index "
        "(1, 2); `teacher_logits` has 1 of 12, the first at index (0, 1).",
        "Lower the learning rate or the loss scale",
    )
    refused(
        ValueError,
        lambda: function(S, teacher, check_finite=True),
        f"{name}: logits must be finite when check_finite=True, but `teacher_logits` has 1 of 12, the first at index",
        "(0, 1).",
    )
    assert function(student, teacher).isnan()  # off by default, and then not hidden
    assert torch.equal(function(S, T, check_finite=True), function(S, T))
    function(torch.zeros(0, 3), torch.zeros(0, 3), check_finite=True)


@pytest.mark.parametrize("module", MODULES)
def test_modules_check_finite_under_their_own_name(module: Any) -> None:
    refused(
        ValueError,
        lambda: module(check_finite=True)(S * math.nan, T),
        f"{module.__name__}: logits must be finite when check_finite=True, but `student_logits` has 12 of 12",
    )


# --- numbers ---------------------------------------------------------------------------------------------------------

NUMBERS = [
    (caller, name)
    for callers, names in (
        ((dkl_loss, DKLLoss), ("alpha", "beta", "temperature")),
        ((ikl_loss, IKLLoss), ("alpha", "beta", "temperature", "weight_temperature")),
        ((gkl_loss, GKLLoss), ("alpha", "beta", "temperature", "weight_temperature", "gamma")),
    )
    for caller, name in itertools.product(callers, names)
]
each_number = pytest.mark.parametrize(("caller", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))


def _with_number(caller: Any, name: str, value: object) -> Callable[[], Any]:
    return lambda: caller(**{name: value}) if isinstance(caller, type) else caller(S, T, **{name: value})


def _rule(name: str) -> str:
    return "a finite number above 0" if "temperature" in name else "a finite number of at least 0"


@each_number
@pytest.mark.parametrize("value", ["1.0", None, True, 1j, [1.0]], ids=repr)
def test_settings_that_are_not_numbers(caller: Any, name: str, value: object) -> None:
    refused(
        TypeError,
        _with_number(caller, name, value),
        f"{caller.__name__}: `{name}` must be {_rule(name)}, got {value!r} of type {type(value).__name__}.",
        "Pass a plain Python float.",
    )


@each_number
def test_settings_that_are_tensors(caller: Any, name: str) -> None:
    """A learnable weight would silently not learn."""
    refused(
        TypeError,
        _with_number(caller, name, torch.tensor(1.0)),
        f"{caller.__name__}: `{name}` must be {_rule(name)}, got tensor(1.) of type Tensor.",
    )


@each_number
@pytest.mark.parametrize("value", [-1.0, -1e-9, math.inf, -math.inf, math.nan, -2])
def test_settings_out_of_range(caller: Any, name: str, value: float) -> None:
    refused(
        ValueError,
        _with_number(caller, name, value),
        f"{caller.__name__}: `{name}` must be {_rule(name)}, got {value}. Choose a value in that range.",
    )


@each_number
def test_zero_is_a_weight_but_no_temperature(caller: Any, name: str) -> None:
    for zero in (0, 0.0):
        call = _with_number(caller, name, zero)
        if "temperature" in name:
            refused(ValueError, call, f"{caller.__name__}: `{name}` must be a finite number above 0, got {zero}.")
        else:
            call()


@each_number
def test_whole_numbers_are_numbers(caller: Any, name: str) -> None:
    call, reference = _with_number(caller, name, 2), _with_number(caller, name, 2.0)
    if isinstance(caller, type):
        assert torch.equal(call()(S, T), reference()(S, T))
    else:
        assert torch.equal(call(), reference())


def test_a_whole_number_beyond_every_float() -> None:
    refused(ValueError, lambda: ikl_loss(S, T, alpha=10**400), "ikl_loss: `alpha` must be a finite number of at least")


def test_real_numbers_of_other_types() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy comes with the demo and the adapters, not with the core")
    expected = gkl_loss(S, T, alpha=0.5, temperature=0.5, gamma=0.5)
    for half in (numpy.float32(0.5), numpy.float64(0.5), Fraction(1, 2)):
        assert torch.equal(gkl_loss(S, T, alpha=half, temperature=half, gamma=half), expected)
        assert torch.equal(GKLLoss(alpha=half, temperature=half, gamma=half)(S, T), expected)


# --- reduction -------------------------------------------------------------------------------------------------------


class Every:
    """Compares as an array does: to no single truth."""

    def __eq__(self, other: object) -> Any:
        return torch.tensor([True, False])

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "every"


@pytest.mark.parametrize("caller", [*FUNCTIONS, *MODULES])
@pytest.mark.parametrize("reduction", ["mean", "avg", "SUM", "", None, 1, ["sum"], {}, b"sum", Every()], ids=repr)
def test_unknown_reductions(caller: Any, reduction: Any) -> None:
    asked_for_mean = isinstance(reduction, str) and reduction == "mean"
    hint = " (the mean over samples and classes is not offered)" if asked_for_mean else ""
    refused(
        ValueError,
        _with_number(caller, "reduction", reduction),
        f"{caller.__name__}: `reduction` must be one of 'batchmean', 'sum', 'none', got {reduction!r}. ",
        f"Use 'batchmean' for the mean over samples{hint}.",
    )


# --- class prior -----------------------------------------------------------------------------------------------------

each_with_prior = pytest.mark.parametrize("function", [ikl_loss, gkl_loss])


@each_with_prior
def test_a_prior_that_is_not_a_floating_tensor(function: Any) -> None:
    name = function.__name__
    refused(
        TypeError,
        lambda: function(S, T, class_prior=[[1.0, 0.0, 0.0]] * 4),
        f"{name}: `class_prior` must be a torch.Tensor, got list. Pass ClassPrior.prior(targets), one row per sample.",
    )
    refused(
        TypeError,
        lambda: function(S, T, class_prior=torch.ones(4, 3, dtype=torch.int64)),
        f"{name}: `class_prior` must have a floating dtype of at least 16 bits, got torch.int64. Convert with",
    )
    refused(
        TypeError,
        lambda: function(S, T, class_prior=T.to(torch.float8_e5m2)),
        f"{name}: `class_prior` must have a floating dtype of at least 16 bits, got torch.float8_e5m2. Convert with",
    )


@each_with_prior
@each_not_plain
@new_in_torch
def test_a_prior_that_is_sparse_or_nested(function: Any, make: Any, kind: str) -> None:
    refused(
        TypeError,
        lambda: function(S, T, class_prior=make()),
        f"{function.__name__}: `class_prior` must be a dense tensor, got {kind}. Convert it to a plain tensor first.",
    )


@each_with_prior
@pytest.mark.parametrize(
    ("prior", "logits"),
    [
        ((3, 3), (4, 3)),
        ((4, 4), (4, 3)),
        ((3,), (4, 3)),
        ((4, 3, 1), (4, 3)),
        ((4, 3, 2), (4, 3, 5)),
        ((4, 5), (4, 3, 5)),
    ],
    ids=str,
)
def test_a_prior_of_another_shape(function: Any, prior: tuple[int, ...], logits: tuple[int, ...]) -> None:
    refused(
        ValueError,
        lambda: function(torch.zeros(logits), torch.zeros(logits), class_prior=torch.ones(prior)),
        f"{function.__name__}: `class_prior` must have shape {logits[:2]}, one row per sample, or that of the logits "
        f"{logits}, got {prior}.",
        "Pass ClassPrior.prior(targets); a (C, C) matrix is indexed with the targets first.",
    )


@each_with_prior
def test_a_prior_on_another_device(function: Any) -> None:
    refused(
        ValueError,
        lambda: function(S, T, class_prior=torch.ones(4, 3, device="meta")),
        f"{function.__name__}: `class_prior` must be on the device of the logits, got meta and cpu.",
        "`.to(...)`",
    )


@each_with_prior
@pytest.mark.parametrize(
    ("value", "span"),
    [(-0.25, "-0.25 to 1.0"), (math.inf, "1.0 to inf"), (math.nan, "nan to nan"), (-math.inf, "-inf to 1.0")],
    ids=str,
)
def test_a_prior_that_holds_no_weights(function: Any, value: float, span: str) -> None:
    prior = torch.ones(4, 3)
    prior[2, 1] = value
    refused(
        ValueError,
        lambda: function(S, T, class_prior=prior),
        f"{function.__name__}: `class_prior` must hold finite weights of at least 0, got values from {span}.",
        "Pass probabilities, not logits.",
    )


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    message = unknown_name_message("IKLLoss", "argument", "gama", ["gamma", "beta", "alpha"])
    assert message == "IKLLoss: unknown argument `gama`. Did you mean `gamma`? Known: alpha, beta, gamma."
    message = unknown_name_message("IKLLoss", "argument", "xyzzy", {"gamma", "beta"})
    assert message == "IKLLoss: unknown argument `xyzzy`. Known: beta, gamma."
