"""What a call of the package must give: the oracle's number within the dtype's tolerance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from oracles import ascend, assert_close, decoupled, flatten_places, softmax
from torch import Tensor, nn

from ikl_plugins import ClassPrior
from ikl_plugins.adversarial import PGD

Right = str
RIGHT: Right = "right number"
# What is right as well, with less or nothing to compare.
NOT_FINITE: Right = "not finite, as the formula"
BEYOND: Right = "beyond float32"
EMPTY: Right = "no sample"


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, size: float, what: str) -> None:
    """As :func:`oracles.assert_close`; what does not fit the dtype may be infinite in it."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual = actual.detach().double()
    lost = (expected.abs() > torch.finfo(dtype).max * (1 - 1e-3)) & torch.isinf(actual)
    try:
        assert_close(torch.where(lost, expected, actual), expected, dtype, size)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}; {actual} instead of {expected}") from error


def hold_loss(
    function: Callable[[Tensor, Tensor], Tensor],
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    settings: dict[str, Any],
    reduction: str,
    class_prior: Tensor | None,
    gradients: tuple[bool, bool] = (True, True),
    lenient: bool = False,
) -> Right:
    """Value, shape, dtype and gradients of one call against the oracle.

    ``class_prior`` has (N, C) weights, or the logits' shape; ``gradients`` says which logits require grad; ``lenient``
    is for logits whose squares float32 cannot hold: a number that is not finite will do.
    """
    s, t = (x.detach().requires_grad_(needed) for x, needed in zip((student, teacher), gradients, strict=True))
    loss = function(s, t)
    numbers = {key: float(value) for key, value in settings.items()}
    if class_prior is not None:
        if class_prior.dim() < s.dim():
            class_prior = class_prior.reshape(*class_prior.shape, *[1] * (s.dim() - 2)).expand(s.shape)
        class_prior = flatten_places(class_prior.detach().double())
    rows_s, rows_t = flatten_places(s.detach()).double(), flatten_places(t.detach()).double()
    expected = decoupled(kind, rows_s, rows_t, class_prior=class_prior, **numbers)
    rows = len(rows_s)
    compute = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    shape = (len(s), *s.shape[2:]) if reduction == "none" else ()
    found = f"loss of {loss.dtype} {tuple(loss.shape)}"
    assert found == f"loss of {compute} {shape}", f"{found} instead of {compute} {shape}"
    wanted = expected.loss(reduction)
    actual = loss.detach().reshape(wanted.shape)

    # Rows that are not finite must show it. Those that GKL's normaliser spoils beside them may or may not.
    known = torch.isfinite(wanted)
    finite_rows = torch.isfinite(rows_s).all(1) & torch.isfinite(rows_t).all(1)
    required = ~known & (~finite_rows if reduction == "none" else ~finite_rows.all())
    assert not bool((torch.isfinite(actual) & required).any()), f"{actual} is finite where the formula gives {wanted}"
    if lenient or not bool(finite_rows.all()):  # 0 times infinity is 0 in the formula and need not be in the loss
        known = known & torch.isfinite(actual)
    finite = [float(x.abs().max()) for x in (rows_s, rows_t) if x.numel() and bool(torch.isfinite(x).all())]
    size = max([1.0, *finite]) * max(1.0, numbers.get("alpha", 1.0), numbers.get("beta", 1.0))
    size /= min(1.0, numbers.get("temperature", 1.0)) ** 2  # the gradient of logits / temperature
    if class_prior is not None and class_prior.numel():
        size *= max(1.0, float(class_prior.sum(1).max())) ** 2  # pairs of weights
    of_loss = size * max(1.0, rows if reduction == "sum" else 1.0)  # a sum adds up the rounding of each row
    close(actual[known], wanted[known], compute, of_loss * (size if lenient else 1.0), "loss")
    outcome = EMPTY if not s.numel() else BEYOND if lenient else RIGHT if bool(known.any()) else NOT_FINITE
    if not bool(known.all()) or not any(gradients):
        return outcome

    upstream = 0.5 + 0.25 * (torch.arange(rows) % 5) if reduction == "none" else torch.tensor(1.75)
    needed = [x for x in (s, t) if x.requires_grad]
    computed = iter(torch.autograd.grad(loss, needed, upstream.reshape(loss.shape).to(loss.dtype)))
    for inputs, right in zip((s, t), expected.gradients(reduction, upstream), strict=True):
        if not inputs.requires_grad:
            continue
        gradient = next(computed)
        assert (gradient.dtype, gradient.shape) == (inputs.dtype, inputs.shape), f"gradient of {gradient.dtype}"
        if bool(torch.isfinite(right).all()):
            close(flatten_places(gradient), right, inputs.dtype, size, "gradient")
    return outcome


class RunningMean:
    """The class prior by the book: the mean of the rows of each class in an epoch, in float64."""

    def __init__(self, classes: int) -> None:
        self.matrix = torch.full((classes, classes), 1.0 / classes, dtype=torch.float64)
        self.rows: list[list[Tensor]] = [[] for _ in range(classes)]

    def observe(self, probabilities: Tensor, targets: Tensor) -> None:
        for row, label in zip(flatten_places(probabilities).double(), targets.reshape(-1).tolist(), strict=True):
            self.rows[label].append(row)

    def end_epoch(self) -> None:
        for label, rows in enumerate(self.rows):
            if rows:
                self.matrix[label] = torch.stack(rows).mean(0)
                rows.clear()


def hold_module(
    criterion: Any,
    kind: str,
    batches: list[tuple[Tensor, Tensor, Tensor]],
    settings: dict[str, Any],
    reduction: str,
) -> Right:
    """Two epochs of a module: values, gradients, ``last_terms`` and the class prior that it keeps."""
    temperature = float(settings.get("weight_temperature", 1.0))
    prior = getattr(criterion, "class_prior", None)
    means = RunningMean(batches[0][0].shape[1])
    for epoch in range(2):
        for index, (student, teacher, targets) in enumerate(batches):
            training = epoch == 1 or index != 1
            criterion.train(training)
            rows = None
            if prior is not None:
                close(prior.matrix, means.matrix, torch.float32, 1.0, f"class prior of epoch {epoch}")
                rows = prior.matrix.double()[targets.long()].movedim(-1, 1)
            hold_loss(
                lambda s, t, y=targets: criterion(s, t, y),  # type: ignore[misc]
                kind,
                student,
                teacher,
                settings=settings,
                reduction=reduction,
                class_prior=rows,
            )
            terms = criterion.last_terms
            both = (terms.weighted_mse.double() + terms.soft_cross_entropy.double()).reshape(-1)
            value = criterion.eval()(student, teacher, targets).detach().double().reshape(-1)
            close(both, value, torch.float32, 1.0 + float(value.abs().max()), "last_terms")
            if training:
                of_teacher = flatten_places(teacher).double()
                means.observe(torch.stack([softmax(row, temperature) for row in of_teacher]).detach(), targets)
        criterion.end_epoch()
        means.end_epoch()
    return RIGHT


def hold_prior(
    prior: ClassPrior, rounds: list[list[tuple[Tensor, Tensor]]], cast: Callable[[ClassPrior], ClassPrior]
) -> Right:
    """Epochs of batches through a class prior, which is cast before each; a new one is uniform once it is reset."""
    fresh = copy.deepcopy(prior).to_empty(device="cpu")
    fresh.reset_parameters()
    means = RunningMean(prior.num_classes)
    close(fresh.matrix, means.matrix, torch.float32, 1.0, "reset matrix")
    for batches in rounds:
        for probabilities, targets in batches:
            prior = cast(prior)
            prior.observe(probabilities, targets)
            means.observe(probabilities, targets)
        prior.end_epoch()
        means.end_epoch()
        close(prior.matrix, means.matrix, torch.float32, 1.0, "matrix")
        for integer in (torch.int64, torch.uint8):
            rows = prior.prior(torch.arange(prior.num_classes).to(integer))
            close(rows, means.matrix, torch.float32, 1.0, "rows")
    return RIGHT


def hold_attack(
    attack: PGD,
    model: nn.Sequential,
    images: Tensor,
    *,
    seed: int,
    options: dict[str, Any],
    labels: Tensor,
    class_prior: Tensor | None,
) -> Right:
    """An attack on a linear model: the ball, [0, 1], the state of the model, and in float64 every pixel."""
    eps, start, dtype = options["eps"], options["random_start"], images.dtype
    model.train()
    generator = torch.Generator().manual_seed(seed)
    found = attack(model, images, labels=labels, class_prior=class_prior, generator=generator)
    slack = (1e-12 if dtype == torch.float64 else 1e-6) + 1e-6 * eps
    distance = (found - images).flatten(1)
    far = distance.abs().amax(1) if options["norm"] == "linf" else distance.square().sum(1).sqrt()
    assert bool((far <= eps + slack).all()), f"outside the ball: {float(far.max())}"
    assert bool(((found >= 0) & (found <= 1)).all()), "outside [0, 1]"
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (found.shape, found.dtype, found.requires_grad) == (images.shape, dtype, False)
    if dtype != torch.float64:
        return RIGHT  # the sign of a gradient near 0 depends on its rounding

    generator.manual_seed(seed)
    flat = images.reshape(len(images), -1)
    begin = flat
    if start == "normal":
        begin = flat + 0.001 * torch.randn(images.shape, generator=generator, dtype=dtype).reshape(flat.shape)
    elif start == "uniform" and options["norm"] == "linf":
        offset = torch.rand(images.shape, generator=generator, dtype=dtype).reshape(flat.shape) * (2 * eps) - eps
        begin = (flat + offset).clamp(0, 1)
    elif start == "uniform":
        way = torch.randn(images.shape, generator=generator, dtype=dtype).reshape(flat.shape)
        radius = torch.rand(len(flat), generator=generator, dtype=dtype) ** (1.0 / flat.shape[1])
        begin = (flat + way / way.square().sum(1, keepdim=True).sqrt() * (eps * radius)[:, None]).clamp(0, 1)
    weight, bias = (parameter.detach() for parameter in model[1].parameters())
    more = {key: options[key] for key in ("norm", "eps", "steps", "step_size", "objective")}
    wanted = ascend(weight, bias, flat, begin, labels=labels.long(), class_prior=class_prior, **more)
    torch.testing.assert_close(found.reshape(flat.shape), wanted, rtol=0, atol=1e-8)
    return RIGHT
