"""A weighted MSE without a part in the loss is said once: what counts, when it is looked at, and what stays silent."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
from no_waits import NoWaits
from torch import Tensor

from ikl_plugins import DKLLoss, GKLLoss, IKLLoss, _value_checks, read_value_checks

CLASSES = 6
CONFIDENT = {"alpha": 1.0, "beta": 4.0, "temperature": 4.0, "weight_temperature": 1.0}


def batches(count: int, scale: float = 40.0, shape: tuple[int, ...] = ()) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A student of small logits, a teacher of large ones, and labels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        student = torch.randn(4, CLASSES, *shape, generator=generator).requires_grad_()
        labels = torch.randint(CLASSES, (4, *shape), generator=generator)
        yield student, scale * torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 1).float(), labels


def train(loss: Any, count: int = 100, scale: float = 40.0, shape: tuple[int, ...] = (), **forward: Any) -> None:
    for batch in batches(count, scale, shape):
        loss(*batch, **forward)


def ratio(scale: float) -> float:
    """Of the two terms with ``CONFIDENT``, beta 1, by the sums over pairs."""
    found = [
        oracles.decoupled("ikl", student.detach(), teacher, temperature=4.0)
        for student, teacher, _ in batches(100, scale)
    ]
    return sum(one.weighted_mse.mean().item() for one in found) / sum(one.cross_entropy.mean().item() for one in found)


def said(loss: Any, *args: Any, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(loss, *args, **kwargs)
    return [str(warning.message) for warning in caught]


def test_a_confident_teacher_is_said_once_after_100_batches() -> None:
    loss = IKLLoss(**CONFIDENT)
    assert said(loss, 99) == []
    with pytest.warns(
        UserWarning, match=r"IKLLoss: the weighted MSE was .*Raise `weight_temperature` \(1\) or `beta` \(4\)"
    ):
        train(loss, 1)
    assert said(loss, 300) == []


@pytest.mark.parametrize(("beta", "warns"), [(0.9, True), (1.1, False)])
def test_a_thousandth_is_the_border(beta: float, warns: bool) -> None:
    loss = IKLLoss(**{**CONFIDENT, "beta": beta * 1e-3 / ratio(12.0)})
    assert bool(said(loss, scale=12.0)) is warns


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        pytest.param(IKLLoss(**{**CONFIDENT, "weight_temperature": 40.0}), {}, id="flat-weights"),
        pytest.param(IKLLoss(**{**CONFIDENT, "beta": 0.0}), {}, id="beta-0"),
        pytest.param(IKLLoss(**{**CONFIDENT, "alpha": 0.0}), {}, id="alpha-0"),
        pytest.param(DKLLoss(), {}, id="dkl-drives-the-teacher"),
        pytest.param(IKLLoss(**CONFIDENT).eval(), {}, id="eval"),
        pytest.param(IKLLoss(**CONFIDENT), {"observe": False}, id="not-a-training-batch"),
        pytest.param(IKLLoss(**CONFIDENT, global_info=True, num_classes=CLASSES), {}, id="uniform-prior"),
        pytest.param(GKLLoss(**CONFIDENT, gamma=0.0), {}, id="gamma-0"),
    ],
)
def test_what_stays_silent(loss: Any, options: dict[str, Any]) -> None:
    assert said(loss, **options) == []


def test_networks_that_agree_and_views_of_one_network_stay_silent() -> None:
    teacher = 40.0 * torch.eye(CLASSES)
    for make in (lambda: (teacher + 1e-3).requires_grad_(), lambda: torch.zeros(CLASSES, CLASSES).requires_grad_()):
        loss, student = IKLLoss(**CONFIDENT), make()
        graph = student.eq(0).all().item()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(101):
                loss(student, teacher.clone().requires_grad_() if graph else teacher)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_any_reduction_and_shape(reduction: str, shape: tuple[int, ...]) -> None:
    assert len(said(GKLLoss(**CONFIDENT, gamma=0.5, reduction=reduction), shape=shape)) == 1


def test_it_travels_and_is_no_state() -> None:
    loss = IKLLoss(**CONFIDENT)
    train(loss, 60)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for again in (copy.deepcopy(loss), torch.load(file, weights_only=False)):
        assert not again.state_dict()
        assert said(again, 39) == []
        assert len(said(again, 1)) == 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    yield
    _value_checks.take_findings()


def test_on_a_device_it_is_said_where_values_are_read(device: None) -> None:
    loss = IKLLoss(**CONFIDENT)
    teacher, student = 40.0 * torch.eye(CLASSES), torch.zeros(CLASSES, CLASSES, requires_grad=True)
    with NoWaits():
        for _ in range(120):
            loss(student, teacher)
    with pytest.warns(UserWarning, match="weighted MSE was"):
        read_value_checks()
    read_value_checks()


def test_torch_compile_leaves_it_out() -> None:
    loss = IKLLoss(**CONFIDENT)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert said(compiled, 101) == []
