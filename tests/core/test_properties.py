"""Hypothesis draws shapes, dtypes, strides, settings and block sizes; the pairwise references judge."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out
from torch import Tensor

import ikl_plugins._fused
from ikl_plugins import ClassPrior, dkl_loss, gkl_loss, ikl_loss

LOSSES = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}

shapes = st.one_of(
    st.tuples(st.integers(0, 6), st.integers(1, 40)),
    st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(0, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)),
)
weights = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 50.0))
temperatures = st.one_of(st.sampled_from([1.0, 4.0, 100.0]), st.floats(0.25, 50.0))
gammas = st.one_of(st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.floats(0.0, 2.0))
dtypes = st.sampled_from(list(oracles.TOLERANCES))


@st.composite
def calls(
    draw: st.DrawFn, *, dtype: st.SearchStrategy[torch.dtype] = dtypes
) -> tuple[str, Tensor, Tensor, dict[str, Any]]:
    """A loss, its logits and its settings."""
    kind = draw(st.sampled_from(oracles.KINDS))
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def logits() -> Tensor:
        spread = draw(st.sampled_from([0.1, 1.0, 3.0, 10.0]))
        numbers = spread * torch.randn(shape, dtype=torch.float64, generator=generator)
        return laid_out(numbers.to(draw(dtype)), draw(st.sampled_from(LAYOUTS)))

    student, teacher = logits(), logits()
    more: dict[str, Any] = {"alpha": draw(weights), "beta": draw(weights), "temperature": draw(temperatures)}
    more["reduction"] = draw(st.sampled_from(["batchmean", "sum", "none"]))
    if kind != "dkl":
        more["weight_temperature"] = draw(temperatures)
        if draw(st.booleans()):
            rows = torch.softmax(2 * torch.randn(shape[:2], dtype=torch.float64, generator=generator), 1)
            rows[torch.rand(rows.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0.0
            # float32 holds what every computation sees of it
            more["class_prior"] = laid_out(rows.float(), draw(st.sampled_from(LAYOUTS)))
    if kind == "gkl":
        more["gamma"] = draw(gammas)
    return kind, student, teacher, more


@given(call=calls(), rows_per_block=st.integers(1, 8))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_value_and_gradients_match_the_pair_tables(
    call: tuple[str, Tensor, Tensor, dict[str, Any]], rows_per_block: int
) -> None:
    kind, student, teacher, more = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ikl_plugins._fused, "_BLOCK_ELEMENTS_CPU", rows_per_block * student.shape[1])
        oracles.assert_matches(LOSSES[kind], kind, student, teacher, **more)


@given(call=calls(dtype=st.just(torch.float64)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_both_ways_to_the_gradient_agree(call: tuple[str, Tensor, Tensor, dict[str, Any]]) -> None:
    kind, student, teacher, more = call
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = LOSSES[kind](s, t, **more)
    upstream = torch.full_like(loss, 0.75)
    plain = torch.autograd.grad(loss, (s, t), upstream, retain_graph=True)
    attached = torch.autograd.grad(loss, (s, t), upstream, create_graph=True)
    torch.testing.assert_close(attached, plain, rtol=1e-9, atol=1e-10)


@given(call=calls(dtype=st.just(torch.float64)), shift=st.floats(-100.0, 100.0))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_values_are_not_negative_and_shifts_do_not_matter(
    call: tuple[str, Tensor, Tensor, dict[str, Any]], shift: float
) -> None:
    kind, student, teacher, more = call
    more["reduction"] = "none"
    values = LOSSES[kind](student, teacher, **more)
    assert bool((values >= -1e-12).all())
    torch.testing.assert_close(LOSSES[kind](student + shift, teacher - shift, **more), values, rtol=1e-9, atol=1e-9)


@given(
    classes=st.integers(1, 6),
    epochs=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rows_of_a_prior_stay_distributions(classes: int, epochs: list[list[int]], seed: int) -> None:
    """Whatever the epochs hold: every row sums to 1, and the row of a class that did not occur is the one before."""
    generator = torch.Generator().manual_seed(seed)
    prior = ClassPrior(classes)
    for epoch in epochs:
        before, seen = prior.matrix.clone(), set()
        for samples in epoch:
            targets = torch.randint(classes, (samples,), generator=generator)
            prior.observe(torch.softmax(torch.randn(samples, classes, generator=generator), 1), targets)
            seen |= set(targets.tolist())
        prior.end_epoch()
        torch.testing.assert_close(prior.matrix.sum(1), torch.ones(classes))
        for label in set(range(classes)) - seen:
            assert torch.equal(prior.matrix[label], before[label])
