"""The kernels themselves. Importing this module imports Triton.

A program takes some rows, and of each row (one sample at one place) a block of classes at a time: a tile (R, B). With
logits ``s`` and ``t``, ``d = (t - s) / mse_temperature`` and unscaled class weights ``v`` (``exp(gamma (t - t_top) /
T2)``, ``(prior / U)**gamma``, or 1) it takes of each row

    t_top, s_top    the largest logit of teacher and student
    P, Q            sum exp((t - t_top) / T),  sum exp((s - s_top) / T)
    H               sum exp((t - t_top) / T) (s_top - s) / T
    U               sum exp((t - t_top) / T2); of a prior to a power the largest of its row, at least 1e-37
    V, m, S         sum v,  sum v d / V,  sum v (d - m)^2

which merge over blocks, so that a row's values take one reading. With ``W = V / U^gamma``, or V U^gamma of a prior,
which is the mass of the weights ``w`` of :mod:`ikl_plugins._fused`, and ``K = W^2 / V``,

    soft cross entropy    -sum_j p_j log q_j           = H / P + log Q
    weighted MSE          1/2 W sum_j w_j (d_j - m)^2  = 1/2 K S
    its derivative        W w_i (d_i - m)              = K v_i (d_i - m)
    pair weights          W^2                          = K V

Where the batch is divided by its pair weights these may all lie below what float32 tells from 0, or above what it can
be. So each program takes them, and K with them, relative to the largest of its rows, and keeps the logarithm of that.

Softmax is ``exp(x - top) / sum`` and not ``exp(x - logsumexp)``, which loses digits where logits are large.
"""

# Triton compiles what follows; to mypy it is no Python.
# mypy: ignore-errors
# ruff: noqa: SIM109  (it knows no `in`)

from typing import NamedTuple

import triton
import triton.language as tl

# What the class weights are.
WITHOUT = tl.constexpr(0)  # there is no weighted MSE
LABELS = tl.constexpr(1)  # the soft labels
SOFTMAX = tl.constexpr(2)  # the teacher's softmax at a temperature of its own
SOFTMAX_POWER = tl.constexpr(3)  # that to the power of gamma
ONES = tl.constexpr(4)  # gamma is 0
PRIOR = tl.constexpr(5)
PRIOR_POWER = tl.constexpr(6)  # the prior to the power of gamma


class Sizes(NamedTuple):
    classes: tl.tensor
    places: tl.tensor  # rows of a sample
    programs: tl.tensor  # of a sample
    rows: tl.tensor  # samples * places


class Strides(NamedTuple):
    """Of (samples, classes, places)."""

    sample: tl.tensor
    category: tl.tensor
    place: tl.tensor


class Layout(NamedTuple):
    """The Strides of each tensor; of one that is None they are not used."""

    student: Strides
    teacher: Strides
    prior: Strides
    upstream: Strides
    gradients: Strides


class Factors(NamedTuple):
    temperature: tl.tensor  # 1 / T, and so on
    weight_temperature: tl.tensor
    mse_temperature: tl.tensor
    gamma: tl.tensor


class Row(NamedTuple):
    """What the values of a row are made of, each (R,); 0 for what a loss does not need."""

    t_top: tl.tensor
    P: tl.tensor
    s_top: tl.tensor
    Q: tl.tensor
    H: tl.tensor
    U: tl.tensor
    V: tl.tensor
    m: tl.tensor
    S: tl.tensor


class Place(NamedTuple):
    """Where the rows of a program lie."""

    sample: tl.tensor
    place: tl.tensor  # (R,)
    row: tl.tensor  # (R,) number among all rows
    valid: tl.tensor  # (R,)


class Tile(NamedTuple):
    """Logits and prior (R, B) in float32: -inf, -inf and 0 where there is no row or no class."""

    s: tl.tensor
    t: tl.tensor
    prior: tl.tensor  # t where no prior is needed
    valid: tl.tensor


@triton.jit
def _rows(sizes, tile_rows: tl.constexpr):
    program = tl.program_id(0)
    sample = (program // sizes.programs).to(tl.int64)
    place = (program % sizes.programs) * tile_rows + tl.arange(0, tile_rows)
    return Place(sample, place.to(tl.int64), sample * sizes.places + place, place < sizes.places)


@triton.jit
def _offsets(at, column, strides):
    return (at.sample * strides.sample + at.place * strides.place)[:, None] + column[None, :] * strides.category


@triton.jit
def _load(student, teacher, prior, at, column, classes, strides, weights: tl.constexpr):
    valid = at.valid[:, None] & (column < classes)[None, :]
    s = tl.load(student + _offsets(at, column, strides.student), mask=valid, other=float("-inf")).to(tl.float32)
    t = tl.load(teacher + _offsets(at, column, strides.teacher), mask=valid, other=float("-inf")).to(tl.float32)
    w = t
    if weights == PRIOR or weights == PRIOR_POWER:
        w = tl.load(prior + _offsets(at, column, strides.prior), mask=valid, other=0.0).to(tl.float32)
    return Tile(s, t, w, valid)


@triton.jit
def _base(top):
    """The largest logit, or 0 where all are -inf: exponentials are 0 then, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _not_zero(value):
    """1 in place of 0: what is divided by it is 0 as well."""
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def _soft_labels(tile, t_top, factors):
    return tl.exp((tile.t - _base(t_top)[:, None]) * factors.temperature)


@triton.jit
def _unscaled_weights(tile, t_top, prior_top, labels, factors, weights: tl.constexpr):
    """v (R, B); 0 where there is no class: gamma is above 0, so gamma * log(0) is -inf and not NaN."""
    tempered = (tile.t - _base(t_top)[:, None]) * factors.weight_temperature
    if weights == LABELS:
        v = labels
    elif weights == SOFTMAX:
        v = tl.exp(tempered)
    elif weights == SOFTMAX_POWER:
        v = tl.exp(factors.gamma * tempered)
    elif weights == ONES:
        v = tl.where(tile.valid, 1.0, 0.0)
    elif weights == PRIOR:
        v = tile.prior
    else:
        v = tl.exp(factors.gamma * tl.log(tile.prior * (1.0 / prior_top)[:, None]))
    return v


@triton.jit
def _reduce(tile, factors, cross_entropy: tl.constexpr, weights: tl.constexpr):
    """The Row of a tile."""
    t_top, s_top = tl.max(tile.t, 1), tl.max(tile.s, 1)
    P = tl.zeros_like(t_top)
    Q, H, U, V, m, S = P, P, P, P, P, P
    labels = tile.t
    if cross_entropy or weights == LABELS:
        labels = _soft_labels(tile, t_top, factors)
        P = tl.sum(labels, 1)
    if cross_entropy:
        below = (_base(s_top)[:, None] - tile.s) * factors.temperature
        Q = tl.sum(tl.exp(-below), 1)
        H = tl.sum(labels * tl.where(tile.valid, below, 0.0), 1)
    if weights != WITHOUT:
        if weights == PRIOR_POWER:
            U = tl.maximum(tl.max(tile.prior, 1), 1e-37)  # 1 / U is finite, for a row of zeros too
        v = _unscaled_weights(tile, t_top, U, labels, factors, weights)
        d = tl.where(tile.valid, (tile.t - tile.s) * factors.mse_temperature, 0.0)
        V = tl.sum(v, 1)
        m = tl.sum(v * d, 1) / _not_zero(V)
        S = tl.sum(v * (d - m[:, None]) * (d - m[:, None]), 1)
        if weights == SOFTMAX_POWER:
            U = tl.sum(tl.exp((tile.t - _base(t_top)[:, None]) * factors.weight_temperature), 1)
    return Row(t_top, P, s_top, Q, H, U, V, m, S)


@triton.jit
def _merge(one, other, factors, weights: tl.constexpr):
    """The Row of two sets of classes (m and S as in Chan, Golub and LeVeque 1979)."""
    t_top, s_top = tl.maximum(one.t_top, other.t_top), tl.maximum(one.s_top, other.s_top)
    t_drop1, t_drop2 = one.t_top - _base(t_top), other.t_top - _base(t_top)
    s_drop1 = (one.s_top - _base(s_top)) * factors.temperature
    s_drop2 = (other.s_top - _base(s_top)) * factors.temperature
    scale1, scale2 = tl.exp(t_drop1 * factors.temperature), tl.exp(t_drop2 * factors.temperature)
    P = one.P * scale1 + other.P * scale2
    Q = one.Q * tl.exp(s_drop1) + other.Q * tl.exp(s_drop2)
    # A set without a logit above -inf, as the empty one, has no top to be lowered.
    H = scale1 * (one.H - one.P * tl.where(one.s_top == float("-inf"), 0.0, s_drop1))
    H += scale2 * (other.H - other.P * tl.where(other.s_top == float("-inf"), 0.0, s_drop2))
    U = one.U
    V1, V2, S1, S2 = one.V, other.V, one.S, other.S
    if weights == SOFTMAX_POWER:
        U = one.U * tl.exp(t_drop1 * factors.weight_temperature) + other.U * tl.exp(
            t_drop2 * factors.weight_temperature
        )
    if weights == SOFTMAX or weights == SOFTMAX_POWER:
        scale1 = tl.exp(factors.gamma * (t_drop1 * factors.weight_temperature))
        scale2 = tl.exp(factors.gamma * (t_drop2 * factors.weight_temperature))
    if weights == PRIOR_POWER:
        U = tl.maximum(one.U, other.U)
        scale1, scale2 = tl.exp(factors.gamma * tl.log(one.U / U)), tl.exp(factors.gamma * tl.log(other.U / U))
    if weights == LABELS or weights == SOFTMAX or weights == SOFTMAX_POWER or weights == PRIOR_POWER:
        V1, S1, V2, S2 = V1 * scale1, S1 * scale1, V2 * scale2, S2 * scale2
    V = V1 + V2
    share = V2 / _not_zero(V)
    apart = other.m - one.m
    return Row(t_top, P, s_top, Q, H, U, V, one.m + apart * share, S1 + S2 + apart * apart * V1 * share)


@triton.jit
def _weight_factor(row, valid, gamma, weights: tl.constexpr, divided: tl.constexpr):
    """K (R,), and what it is divided by if the batch is ``divided``, as the ``best`` U and a logarithm, see below.

    A row's U is taken relative to the best of all rows before the power, as in float32 the logarithm of the power has
    too few digits. What K is divided by is exp(largest) times best to the power of -2 gamma, or of 2 gamma for a prior.
    """
    power = -gamma
    if weights == PRIOR_POWER:
        power = gamma
    best = tl.sum(tl.zeros_like(row.V), 0) + 1.0
    largest = best - 1.0
    if divided:
        L = 2.0 * tl.log(row.V)
        if weights == SOFTMAX_POWER:
            best = tl.min(tl.where(valid, row.U, float("inf")), 0)
        if weights == PRIOR_POWER:
            best = tl.max(tl.where(valid, row.U, 0.0), 0)
        if weights == SOFTMAX_POWER or weights == PRIOR_POWER:
            L += 2.0 * power * tl.log(row.U / best)
        largest = tl.max(tl.where(valid, L, float("-inf")), 0)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        K = tl.exp(L - largest) / _not_zero(row.V)
    elif weights == LABELS or weights == SOFTMAX:
        K = 1.0 / row.V
    elif weights == SOFTMAX_POWER or weights == PRIOR_POWER:
        K = row.V * tl.exp(2.0 * power * tl.log(row.U))
    else:
        K = row.V
    return K, best, largest


@triton.jit
def values_kernel(
    student,
    teacher,
    prior,
    mse,
    ce,
    pairs,
    divisors,
    saved,
    sizes,
    strides,
    factors,
    mse_scale,
    ce_scale,
    cross_entropy: tl.constexpr,
    weights: tl.constexpr,
    each_row: tl.constexpr,
    whole_rows: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_classes: tl.constexpr,
):
    """Both terms of each row, or summed over the rows of a program.

    Args:
        student: logits, by the strides of its name, as each tensor of (samples, classes, places).
        teacher: logits.
        prior: class prior, or None.
        mse: where mse_scale * K * S goes: (rows,) if ``each_row``, else (programs,).
        ce: where ce_scale * cross entropy goes, likewise.
        pairs: (programs,), where the sums of pair weights over the largest of the program's rows go, or None.
        divisors: (2, programs), where what K is divided by goes, see :func:`_weight_factor`, or None.
        saved: (7, rows), what the gradients read, or None where ``whole_rows``.
    """
    at = _rows(sizes, tile_rows)
    columns = tl.arange(0, tile_classes)
    if whole_rows:
        tile = _load(student, teacher, prior, at, columns, sizes.classes, strides, weights)
        row = _reduce(tile, factors, cross_entropy, weights)
    else:
        zero = tl.zeros([tile_rows], tl.float32)
        low = tl.full([tile_rows], float("-inf"), tl.float32)
        row = Row(low, zero, low, zero, zero, zero, zero, zero, zero)
        for start in range(0, sizes.classes, tile_classes):
            tile = _load(student, teacher, prior, at, start + columns, sizes.classes, strides, weights)
            row = _merge(row, _reduce(tile, factors, cross_entropy, weights), factors, weights)
    if not whole_rows:
        tl.store(saved + at.row, row.t_top, mask=at.valid)
        tl.store(saved + sizes.rows + at.row, row.P, mask=at.valid)
        tl.store(saved + 2 * sizes.rows + at.row, row.s_top, mask=at.valid)
        tl.store(saved + 3 * sizes.rows + at.row, row.Q, mask=at.valid)
        tl.store(saved + 4 * sizes.rows + at.row, row.m, mask=at.valid)
        tl.store(saved + 5 * sizes.rows + at.row, row.U, mask=at.valid)
    K, best, largest = _weight_factor(row, at.valid, factors.gamma, weights, pairs is not None)
    if not whole_rows:
        tl.store(saved + 6 * sizes.rows + at.row, K, mask=at.valid)

    row_mse = tl.zeros_like(row.m)
    row_ce = tl.zeros_like(row.m)
    if weights != WITHOUT:
        row_mse = mse_scale * K * row.S
    if cross_entropy:
        row_ce = ce_scale * (row.H / row.P + tl.log(row.Q))
    program = tl.program_id(0)
    if each_row:
        tl.store(mse + at.row, row_mse, mask=at.valid)
        tl.store(ce + at.row, row_ce, mask=at.valid)
    else:
        tl.store(mse + program, tl.sum(tl.where(at.valid, row_mse, 0.0), 0))
        tl.store(ce + program, tl.sum(tl.where(at.valid, row_ce, 0.0), 0))
    if pairs is not None:
        tl.store(pairs + program, tl.sum(tl.where(at.valid, K * row.V, 0.0), 0))
        tl.store(divisors + program, best)
        tl.store(divisors + tl.num_programs(0) + program, largest)


@triton.jit
def _log_divisor(divisors, program, programs, power):
    """The logarithm of what each program has divided K by, in float64; -inf where there is no program."""
    best = tl.load(divisors + program, mask=program < programs, other=1.0).to(tl.float64)
    largest = tl.load(divisors + programs + program, mask=program < programs, other=float("-inf"))
    return largest + 2.0 * power * tl.log(best)


@triton.jit
def totals_kernel(
    mse, ce, pairs, divisors, loss, mse_total, ce_total, factor, programs, rows, power, block: tl.constexpr
):
    """The sums over the programs of :func:`values_kernel`, by one program and in one order.

    Args:
        mse: (programs,), or None where the values stay apart.
        ce: likewise.
        pairs: (programs,), or None where nothing is divided by them.
        divisors: (2, programs), likewise.
        loss: one number, as the next two.
        mse_total: of it, the weighted MSE.
        ce_total: of it, the cross entropy.
        factor: (programs,), GKL's on the weighted MSE of their rows: rows over the batch's pair weights, 0 if these are
            0, times what K was divided by. Or None.
        power: -gamma where the weights are a softmax to a power, gamma where they are a prior's.
    """
    lane = tl.arange(0, block)
    mse_sum = tl.zeros([block], tl.float32)
    ce_sum = tl.zeros([block], tl.float32)
    pair_sum = tl.zeros([block], tl.float32)
    largest = tl.full([block], float("-inf"), tl.float64)
    if pairs is not None:
        for start in range(0, programs, block):
            largest = tl.maximum(largest, _log_divisor(divisors, start + lane, programs, power))
    top = tl.max(largest, 0)
    for start in range(0, programs, block):
        valid = start + lane < programs
        share = tl.full([block], 1.0, tl.float32)
        if pairs is not None:
            share = tl.exp((_log_divisor(divisors, start + lane, programs, power) - top).to(tl.float32))
            pair_sum += share * tl.load(pairs + start + lane, mask=valid, other=0.0)
        if mse is not None:
            mse_sum += share * tl.load(mse + start + lane, mask=valid, other=0.0)
            ce_sum += tl.load(ce + start + lane, mask=valid, other=0.0)
    mse_found, ce_found = tl.sum(mse_sum, 0), tl.sum(ce_sum, 0)
    if pairs is not None:
        found = tl.sum(pair_sum, 0)
        found = tl.where(found == 0.0, 0.0, rows / _not_zero(found))
        mse_found *= found
        for start in range(0, programs, block):
            valid = start + lane < programs
            share = tl.exp((_log_divisor(divisors, start + lane, programs, power) - top).to(tl.float32))
            tl.store(factor + start + lane, found * share, mask=valid)
    if mse is not None:
        tl.store(loss, mse_found + ce_found)
        tl.store(mse_total, mse_found)
        tl.store(ce_total, ce_found)


@triton.jit
def _gradients(
    tile,
    row,
    factors,
    mse_scale,
    ce_scale,
    student_in_mse: tl.constexpr,
    cross_entropy: tl.constexpr,
    weights: tl.constexpr,
):
    """Of student and teacher (R, B), with ``mse_scale``, which has K in it, and ``ce_scale`` (R,)."""
    to_student = tl.zeros_like(tile.s)
    to_teacher = tl.zeros_like(tile.t)
    labels = tile.t
    if cross_entropy or weights == LABELS:
        labels = _soft_labels(tile, row.t_top, factors)
    if cross_entropy:
        predicted = tl.exp((tile.s - _base(row.s_top)[:, None]) * factors.temperature)
        to_student = (ce_scale / row.Q)[:, None] * predicted - (ce_scale / row.P)[:, None] * labels
    if weights != WITHOUT:
        v = _unscaled_weights(tile, row.t_top, row.U, labels, factors, weights)
        d = (tile.t - tile.s) * factors.mse_temperature
        to_teacher = mse_scale[:, None] * (v * (d - row.m[:, None]))
        if student_in_mse:
            to_student -= to_teacher
    return to_student, to_teacher


@triton.jit
def gradients_kernel(
    student,
    teacher,
    prior,
    upstream,
    factor,
    saved,
    student_gradient,
    teacher_gradient,
    sizes,
    strides,
    factors,
    mse_scale,
    ce_scale,
    student_in_mse: tl.constexpr,
    cross_entropy: tl.constexpr,
    weights: tl.constexpr,
    whole_rows: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_classes: tl.constexpr,
):
    """The gradients times the chain rule's last factor, rounded once.

    Args:
        student: as in :func:`values_kernel`, as the next two.
        teacher: logits.
        prior: class prior, or None.
        upstream: the last factor of each row; its strides are 0 if it is one number.
        factor: GKL's factor of each program, or None.
        saved: what :func:`values_kernel` left, or None where ``whole_rows``.
        student_gradient: where it goes, or None.
        teacher_gradient: likewise.
    """
    at = _rows(sizes, tile_rows)
    last = tl.load(
        upstream + at.sample * strides.upstream.sample + at.place * strides.upstream.place, mask=at.valid, other=0.0
    ).to(tl.float32)
    row_mse_scale = last * mse_scale
    if factor is not None:
        row_mse_scale *= tl.load(factor + tl.program_id(0))
    K = tl.zeros_like(last)
    row = Row(K, K, K, K, K, K, K, K, K)
    if not whole_rows:
        t_top = tl.load(saved + at.row, mask=at.valid, other=0.0)
        P = tl.load(saved + sizes.rows + at.row, mask=at.valid, other=1.0)
        s_top = tl.load(saved + 2 * sizes.rows + at.row, mask=at.valid, other=0.0)
        Q = tl.load(saved + 3 * sizes.rows + at.row, mask=at.valid, other=1.0)
        m = tl.load(saved + 4 * sizes.rows + at.row, mask=at.valid, other=0.0)
        U = tl.load(saved + 5 * sizes.rows + at.row, mask=at.valid, other=1.0)
        K = tl.load(saved + 6 * sizes.rows + at.row, mask=at.valid, other=0.0)
        row = Row(t_top, P, s_top, Q, P, U, P, m, P)
    stop = sizes.classes
    if whole_rows:
        stop = tile_classes
    for start in range(0, stop, tile_classes):
        columns = start + tl.arange(0, tile_classes)
        tile = _load(student, teacher, prior, at, columns, sizes.classes, strides, weights)
        if whole_rows:
            row = _reduce(tile, factors, cross_entropy, weights)
            K, _, _ = _weight_factor(row, at.valid, factors.gamma, weights, factor is not None)
        to_student, to_teacher = _gradients(
            tile, row, factors, row_mse_scale * K, last * ce_scale, student_in_mse, cross_entropy, weights
        )
        offsets = _offsets(at, columns, strides.gradients)
        if student_gradient is not None:
            tl.store(student_gradient + offsets, to_student.to(student_gradient.dtype.element_ty), mask=tile.valid)
        if teacher_gradient is not None:
            tl.store(teacher_gradient + offsets, to_teacher.to(teacher_gradient.dtype.element_ty), mask=tile.valid)
