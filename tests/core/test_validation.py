"""What the core refuses: error class and the fragment of the message that matters, a row a line."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from ikl_plugins import ClassPrior, DKLLoss, GKLLoss, IKLLoss, dkl_loss, gkl_loss, ikl_loss
from ikl_plugins._validation import unknown_name_message
from ikl_plugins.losses import warmup_factor

FUNCTIONS = [dkl_loss, ikl_loss, gkl_loss]
MODULES = [DKLLoss, IKLLoss, GKLLoss]
S = torch.zeros(4, 3)
T = torch.ones(4, 3)
LABELS = torch.tensor([0, 1, 2, 0])
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]
NUMBERS = [
    (caller, name)
    for callers, names in (
        ((dkl_loss, DKLLoss), ("alpha", "beta", "temperature")),
        ((ikl_loss, IKLLoss), ("alpha", "beta", "temperature", "weight_temperature")),
        ((gkl_loss, GKLLoss), ("alpha", "beta", "temperature", "weight_temperature", "gamma")),
    )
    for caller, name in itertools.product(callers, names)
]
Row = tuple[str, Callable[[], Any], type[Exception], str]


class Every:
    """Compares as an array does: to no single truth."""

    def __eq__(self, other: object) -> Any:
        return torch.tensor([True, False])

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "every"


def filled(value: float, *places: tuple[int, int], base: float = 1.0) -> torch.Tensor:
    tensor = torch.full((4, 3), base)
    for place in places:
        tensor[place] = value
    return tensor


def with_prior(**prior_of: torch.Tensor) -> IKLLoss:
    """A loss whose class prior holds what somebody has loaded into it."""
    loss = IKLLoss(global_info=True, num_classes=3)
    assert loss.class_prior is not None
    loss.class_prior.load_state_dict({**loss.class_prior.state_dict(), **prior_of})
    return loss


def calls(caller: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: caller(**settings) if isinstance(caller, type) else caller(S, T, **settings)


def logits_rows(function: Any) -> list[Row]:
    name = function.__name__
    rows: list[Row] = []
    for argument, order in (("student_logits", 1), ("teacher_logits", -1)):

        def call(make: Any, other: Any = S, order: int = order) -> Callable[[], Any]:
            return lambda: function(*(make(), other)[::order])

        for label, make, error, fragment in (
            ("list", lambda: [[1.0, 2.0]], TypeError, "must be a torch.Tensor, got list"),
            ("none", lambda: None, TypeError, "must be a torch.Tensor, got NoneType"),
            *(
                (
                    str(dtype),
                    lambda dtype=dtype: S.to(dtype),
                    TypeError,
                    f"must have a floating dtype of at least 16 bits, got {dtype}",
                )
                for dtype in (torch.int64, torch.bool, torch.complex64, *EIGHT_BITS)
            ),
            ("coo", T.to_sparse, TypeError, "must be a dense tensor, got the layout torch.sparse_coo"),
            ("csr", lambda: T.to_sparse_csr(), TypeError, "must be a dense tensor, got the layout torch.sparse_csr"),
            ("nested", lambda: torch.nested.nested_tensor([T, T]), TypeError, "must be a dense tensor, got a nested"),
        ):
            rows.append((f"{name}-{argument}-{label}", call(make), error, f"{name}: `{argument}` {fragment}"))
    for shape in ((), (3,), (4, 0), (2, 0, 3)):
        rows.append(
            (
                f"{name}-{shape}",
                lambda shape=shape: function(torch.zeros(shape), torch.zeros(shape)),
                ValueError,
                f"{name}: `student_logits` must have shape (N, C) or (N, C, d1, ...), C at least 1, got {shape}",
            )
        )
    for one, other in (
        ((4, 3), (5, 3)),
        ((4, 3), (4, 5)),
        ((4, 3), (3,)),
        ((4, 3), (1, 3)),
        ((4, 3), (4, 3, 1)),
        ((2, 3, 4), (2, 3, 5)),
    ):
        rows.append(
            (
                f"{name}-{one}-{other}",
                lambda one=one, other=other: function(torch.zeros(one), torch.zeros(other)),
                ValueError,
                f"{name}: `student_logits` and `teacher_logits` must have one shape, got {one} and {other}",
            )
        )
    rows.append((f"{name}-devices", lambda: function(S, T.to("meta")), ValueError, "one device, got cpu and meta"))
    bad = filled(math.nan, (1, 2)), filled(-math.inf, (0, 1))
    for students, message in (
        (bad[0], f"{name}: `student_logits` must be finite with check_finite=True, but 1 of 12 are not, the first at"),
        (S, f"{name}: `teacher_logits` must be finite with check_finite=True, but 1 of 12 are not, the first at index"),
    ):
        rows.append(
            (
                f"{name}-finite-{message[1:8]}",
                lambda students=students: function(students, bad[1], check_finite=True),
                ValueError,
                message,
            )
        )
    return rows


def number_rows() -> list[Row]:
    rows: list[Row] = []
    for caller, name in NUMBERS:
        temperature = "temperature" in name
        rule = f"`{name}` must be a finite number {'above 0' if temperature else 'of at least 0'}, got"
        for value in ("1.0", None, True, 1j, [1.0], torch.tensor(1.0)):  # a learnable weight would not learn
            shown = f"{caller.__name__}: {rule} {value!r} of type {type(value).__name__}"
            rows.append((f"{caller.__name__}-{name}-{value!r}", calls(caller, **{name: value}), TypeError, shown))
        zeros = (0, 0.0) if temperature else ()
        for value in (-1.0, -1e-9, math.inf, -math.inf, math.nan, -2, *zeros):
            shown = f"{caller.__name__}: {rule} {value}"
            rows.append((f"{caller.__name__}-{name}-{value}", calls(caller, **{name: value}), ValueError, shown))
    rows.append(("huge", calls(ikl_loss, alpha=10**400), ValueError, "got a number beyond every float"))
    for caller in (*FUNCTIONS, *MODULES):
        for reduction in ("mean", "SUM", "", None, 1, ["sum"], {}, b"sum", Every()):
            shown = f"{caller.__name__}: `reduction` must be one of 'batchmean', 'sum', 'none', got {reduction!r}"
            rows.append((f"{caller.__name__}-{reduction!r}", calls(caller, reduction=reduction), ValueError, shown))
    return rows


def prior_rows(function: Any) -> list[Row]:
    name = f"{function.__name__}: `class_prior` must"

    def call(prior: Any, shape: tuple[int, ...] = (4, 3)) -> Callable[[], Any]:
        return lambda: function(torch.zeros(shape), torch.zeros(shape), class_prior=prior)

    rows: list[Row] = [
        ("list", call([[1.0, 0.0, 0.0]] * 4), TypeError, f"{name} be a torch.Tensor, got list"),
        ("int", call(torch.ones(4, 3, dtype=torch.int64)), TypeError, "at least 16 bits, got torch.int64"),
        ("float8", call(T.to(torch.float8_e5m2)), TypeError, "at least 16 bits, got torch.float8_e5m2"),
        ("sparse", call(T.to_sparse()), TypeError, f"{name} be a dense tensor"),
        ("device", call(T.to("meta")), ValueError, f"{name} be on the logits' device, got meta and cpu"),
        ("negative", call(filled(-0.25, (2, 1))), ValueError, f"{name} hold finite weights of at least 0, got values"),
        ("infinite", call(filled(math.inf, (2, 1))), ValueError, "got values from 1.0 to inf"),
        ("nan", call(filled(math.nan, (2, 1))), ValueError, "got values from nan to nan"),
    ]
    for prior, logits in (
        ((3, 3), (4, 3)),
        ((4, 4), (4, 3)),
        ((3,), (4, 3)),
        ((4, 3, 1), (4, 3)),
        ((4, 3, 2), (4, 3, 5)),
        ((4, 5), (4, 3, 5)),
    ):
        fragment = f"{name} have shape {logits[:2]} or that of the logits {logits}, got {prior}"
        rows.append((f"{prior}-{logits}", call(torch.ones(prior), logits), ValueError, fragment))
    return [(f"{function.__name__}-{label}", *rest) for label, *rest in rows]


def labels_rows() -> list[Row]:
    """Labels of the class prior and of the losses that have one."""
    prior = ClassPrior(3)
    predictions = torch.full((4, 3), 1 / 3)
    rows: list[Row] = []
    for name, call in (
        ("ClassPrior.prior", prior.prior),
        ("ClassPrior.observe", lambda labels: prior.observe(predictions, labels)),
        ("IKLLoss", lambda labels: IKLLoss(global_info=True, num_classes=3)(S, T, labels)),
        ("GKLLoss", lambda labels: GKLLoss(global_info=True, num_classes=3).eval()(S, T, labels)),
    ):
        for labels, error, fragment in (
            (None, ValueError, "be given as a tensor of class indices, got NoneType"),
            ([0, 1, 2, 0], TypeError, "be given as a tensor of class indices, got list"),
            (T[:, 0], TypeError, "hold integer class indices, got torch.float32"),
            (T[:, 0] > 0, TypeError, "hold integer class indices, got torch.bool"),
            (LABELS.to(torch.complex64), TypeError, "hold integer class indices, got torch.complex64"),
            (LABELS + 1, ValueError, "lie in [0, 2], got values from 1 to 3"),
            (LABELS - 1, ValueError, "lie in [0, 2], got values from -1 to 1"),
            (LABELS.to(torch.uint8) + 1, ValueError, "lie in [0, 2], got values from 1 to 3"),
            ((LABELS - 1).view(torch.uint64), ValueError, "lie in [0, 2]"),
        ):
            label = f"{name}-{fragment}-{getattr(labels, 'dtype', '')}"
            shown = f"{name}: `targets` must {fragment}"
            rows.append((label, lambda call=call, labels=labels: call(labels), error, shown))
    for shape, labels in (((4, 2), LABELS), ((4,), LABELS), ((4, 3, 2), LABELS), ((3, 3), LABELS)):
        shown = f"ClassPrior.observe: `probabilities` must have shape (4, 3) for targets of shape (4,), got {shape}"
        call = lambda shape=shape, labels=labels: prior.observe(torch.zeros(shape), labels)  # noqa: E731
        rows.append((f"observe-{shape}", call, ValueError, shown))
    observe = prior.observe
    rows += [
        ("observe-list", lambda: observe([[1.0]], LABELS), TypeError, "`probabilities` must be a torch.Tensor"),
        ("observe-int", lambda: observe(T.long(), LABELS), TypeError, "at least 16 bits, got torch.int64"),
        (
            "observe-device",
            lambda: observe(T.to("meta"), LABELS),
            ValueError,
            "on the prior's device, got meta and cpu",
        ),
        (
            "observe-float8",
            lambda: observe(T.to(EIGHT_BITS[0]), LABELS),
            TypeError,
            "at least 16 bits, got torch.float8",
        ),
        ("observe-sparse", lambda: observe(T.to_sparse(), LABELS), TypeError, "`probabilities` must be a dense tensor"),
    ]
    dense = torch.zeros(2, 3, 5)
    for labels in (torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, 5).long()):
        shown = f"IKLLoss: `targets` must have shape (2, 5) for logits of shape (2, 3, 5), got {tuple(labels.shape)}"
        call = lambda labels=labels: IKLLoss(global_info=True, num_classes=3)(dense, dense, labels)  # noqa: E731
        rows.append((f"dense-{tuple(labels.shape)}", call, ValueError, shown))
    return rows


def module_rows() -> list[Row]:
    rows: list[Row] = []
    for module in MODULES:
        name = module.__name__
        rows += [
            (f"{name}-classes", calls(module, num_classes=2.0), TypeError, f"{name}: `num_classes` must be an integer"),
            (f"{name}-bool", calls(module, num_classes=True), TypeError, "got True of type bool"),
            (
                f"{name}-zero",
                calls(module, num_classes=0),
                ValueError,
                f"{name}: `num_classes` must be an integer of",
            ),
            (
                f"{name}-other",
                lambda module=module: module(num_classes=4)(S, T),
                ValueError,
                f"{name}: `num_classes` must be the number of classes of the logits, got 4 for logits of shape (4, 3)",
            ),
            (
                f"{name}-finite",
                lambda module=module: module(check_finite=True)(S * math.nan, T),
                ValueError,
                f"{name}: `student_logits` must be finite with check_finite=True, but 12 of 12",
            ),
            (f"{name}-shapes", lambda module=module: module()(S, T[:2]), ValueError, f"{name}: `student_logits` and"),
        ]
    return [
        *rows,
        ("dkl-prior", calls(DKLLoss, global_info=True), ValueError, "DKLLoss: `global_info` must be False"),
        ("ikl-prior", calls(IKLLoss, global_info=True), ValueError, "IKLLoss: `num_classes` must be given with"),
        ("gkl-prior", calls(GKLLoss, global_info=True), ValueError, "GKLLoss: `num_classes` must be given with"),
        (
            "loaded",
            lambda: with_prior(matrix=-torch.ones(3, 3))(S, T, LABELS),
            ValueError,
            "rows that sum to 1",
        ),
        ("prior-text", calls(ClassPrior, num_classes="3"), TypeError, "ClassPrior: `num_classes` must be an integer"),
        ("prior-bool", calls(ClassPrior, num_classes=True), TypeError, "got True of type bool"),
        ("prior-zero", calls(ClassPrior, num_classes=0), ValueError, "`num_classes` must be an integer of at least 1"),
        (
            "state",
            lambda: ClassPrior(3).load_state_dict(ClassPrior(4).state_dict()),
            ValueError,
            "must be torch.float32 of shape (3, 3)",
        ),
        ("ramp", lambda: warmup_factor(0, 5), ValueError, "warmup_factor: `epoch` must be at least 1, got 0"),
        ("ramp-none", lambda: warmup_factor(1, None), TypeError, "warmup_factor: `warmup_epochs` must be"),
        ("ramp-below", lambda: warmup_factor(1, -1), ValueError, "warmup_factor: `warmup_epochs` must be"),
    ]


TABLE = [
    *itertools.chain.from_iterable(map(logits_rows, FUNCTIONS)),
    *number_rows(),
    *prior_rows(ikl_loss),
    *prior_rows(gkl_loss),
    *labels_rows(),
    *module_rows(),
]


@pytest.mark.parametrize(("call", "error", "fragment"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_refusals(call: Callable[[], Any], error: type[Exception], fragment: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that nested and sparse tensors are new
        with pytest.raises(error, match=re.escape(fragment)) as caught:
            call()
    assert caught.type is error
    assert len(re.split(r"[.)] (?=[A-Z])", str(caught.value))) <= 2, f"at most two sentences: {caught.value}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_non_finite_logits_go_through_unless_checked(function: Any) -> None:
    assert function(filled(math.nan, (1, 2)), T).isnan()  # and are not hidden
    assert torch.equal(function(S, T, check_finite=True), function(S, T))
    function(torch.zeros(0, 3), torch.zeros(0, 3), check_finite=True)


@pytest.mark.parametrize(("caller", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_whole_numbers_are_numbers_and_zero_is_a_weight(caller: Any, name: str) -> None:
    whole, reference = (calls(caller, **{name: value})() for value in (2, 2.0))
    if isinstance(caller, type):
        whole, reference = whole(S, T), reference(S, T)
    assert torch.equal(whole, reference)
    if "temperature" not in name:
        for zero in (0, 0.0):
            calls(caller, **{name: zero})()


def test_real_numbers_of_other_types() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy comes with the demo and the adapters, not with the core")
    expected = gkl_loss(S, T, alpha=0.5, temperature=0.5, gamma=0.5)
    for half in (numpy.float32(0.5), numpy.float64(0.5), Fraction(1, 2)):
        assert torch.equal(gkl_loss(S, T, alpha=half, temperature=half, gamma=half), expected)
        assert torch.equal(GKLLoss(alpha=half, temperature=half, gamma=half)(S, T), expected)


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    message = unknown_name_message("IKLLoss", "argument", "gama", ["gamma", "beta", "alpha"])
    assert message == "IKLLoss: unknown argument `gama`. Did you mean `gamma`? Known: alpha, beta, gamma."
    message = unknown_name_message("IKLLoss", "argument", "xyzzy", {"gamma", "beta"})
    assert message == "IKLLoss: unknown argument `xyzzy`. Known: beta, gamma."
