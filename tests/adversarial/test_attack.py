"""The attack against a reference in plain float64 sums, and what it promises about the model, its input and its output.

The reference has a network of one hidden layer, whose gradient with respect to the pixels is written out by hand, and
takes the steps of Madry et al. one pixel at a time::

    logits = W tanh(V x)       d/dx_d = sum_h (sum_k r_k W[k, h]) (1 - tanh_h^2) V[h, d]

where r is the gradient of the objective with respect to the logits: q - onehot for the cross entropy, q - p for KL
divergence, and that of the pairwise C x C sum for IKL.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ikl_plugins.adversarial import PGD, PixelSpace, Strength

OF_LABELS = ("cross_entropy", "margin")
each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
each_objective = pytest.mark.parametrize("objective", ["cross_entropy", "margin", "soft_cross_entropy", "ikl"])

SHAPE = (2, 3, 3)  # of an image of the reference
CLASSES = 4
LABELS = torch.tensor([3, 0, 1])


# --- the reference ---------------------------------------------------------------------------------------------------


def hidden_network() -> nn.Sequential:
    first, second = nn.Linear(18, 6, bias=False), nn.Linear(6, CLASSES, bias=False)
    with torch.no_grad():
        first.weight.mul_(3)
        second.weight.mul_(4)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second).double()


def forward_by_hand(model: nn.Sequential, pixels: list[float]) -> tuple[list[float], list[float]]:
    """Activations of the hidden layer, logits."""
    inner, outer = model[1].weight.tolist(), model[3].weight.tolist()
    hidden = [math.tanh(math.fsum(v * x for v, x in zip(row, pixels, strict=True))) for row in inner]
    return hidden, [math.fsum(w * h for w, h in zip(row, hidden, strict=True)) for row in outer]


def softmax(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def pull_of_logits(
    objective: str, logits: list[float], natural: list[float], label: int, prior: list[float] | None
) -> list[float]:
    """The gradient of one image's objective with respect to its logits."""
    q, p = softmax(logits), softmax(natural)
    if objective == "cross_entropy":
        return [q[k] - (1.0 if k == label else 0.0) for k in range(len(q))]
    if objective == "margin":
        rival = max((k for k in range(len(q)) if k != label), key=lambda k: logits[k])
        return [float(k == rival) - float(k == label) for k in range(len(q))]
    pull = [q[k] - p[k] for k in range(len(q))]
    if objective == "ikl":  # 1/4 sum_jk w_j w_k ((t_j - t_k) - (s_j - s_k))^2, each pair met twice
        w = p if prior is None else prior
        for j in range(len(q)):
            for k in range(len(q)):
                pull[j] += w[j] * w[k] * ((logits[j] - logits[k]) - (natural[j] - natural[k]))
    return pull


def attack_by_hand(
    model: nn.Sequential,
    image: list[float],
    start: list[float],
    strength: tuple[float, int, float],
    norm: str,
    objective: str,
    label: int,
    natural: list[float],
    prior: list[float] | None,
) -> list[float]:
    eps, steps, size = strength
    inner, outer = model[1].weight.tolist(), model[3].weight.tolist()
    pixels = range(len(image))
    x = list(start)
    for _ in range(steps):
        hidden, logits = forward_by_hand(model, x)
        pull = pull_of_logits(objective, logits, natural, label, prior)
        back = [
            math.fsum(pull[k] * outer[k][h] for k in range(len(pull))) * (1 - hidden[h] ** 2)
            for h in range(len(hidden))
        ]
        gradient = [math.fsum(back[h] * inner[h][d] for h in range(len(back))) for d in pixels]
        if norm == "linf":
            moved = [x[d] + size * math.copysign(1.0, gradient[d]) for d in pixels]
            projected = [min(max(moved[d], image[d] - eps), image[d] + eps) for d in pixels]
        else:
            length = math.sqrt(math.fsum(g * g for g in gradient))
            offset = [x[d] + size * gradient[d] / length - image[d] for d in pixels]
            distance = math.sqrt(math.fsum(o * o for o in offset))
            shrink = min(1.0, eps / distance)
            projected = [image[d] + shrink * offset[d] for d in pixels]
        x = [min(max(value, 0.0), 1.0) for value in projected]
    return x


def start_by_hand(images: Tensor, norm: str, random_start: str, eps: float, seed: int) -> Tensor:
    """The first point of the attack, from the numbers that the generator gives, one image and pixel at a time."""
    generator = seeded(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": images.dtype, "device": images.device}
    flat = images.flatten(1)
    start = flat.clone()
    if random_start == "normal":
        drawn = torch.randn(images.shape, **options).flatten(1)
        for n, row in enumerate(flat):
            for d, value in enumerate(row):
                start[n, d] = value + 0.001 * drawn[n, d]  # not brought back into the ball or into [0, 1]
    elif random_start == "uniform" and norm == "linf":
        drawn = torch.rand(images.shape, **options).flatten(1)
        for n, row in enumerate(flat):
            for d, value in enumerate(row):
                start[n, d] = min(max(float(value + (2 * drawn[n, d] - 1) * eps), 0.0), 1.0)
    elif random_start == "uniform":
        direction = torch.randn(images.shape, **options).flatten(1)
        share = torch.rand(len(images), **options)
        for n, row in enumerate(flat):
            radius = eps * float(share[n]) ** (1 / len(row))
            length = math.sqrt(math.fsum(float(x) ** 2 for x in direction[n]))
            for d, value in enumerate(row):
                start[n, d] = min(max(float(value + radius * direction[n, d] / length), 0.0), 1.0)
    return start.reshape(images.shape)


@pytest.mark.parametrize(
    ("objective", "random_start", "with_prior"),
    [
        ("cross_entropy", "none", False),
        ("margin", "none", False),
        *itertools.product(["cross_entropy", "margin", "soft_cross_entropy", "ikl"], ["normal", "uniform"], [False]),
        ("ikl", "uniform", True),
    ],
)
@each_norm
def test_the_attack_is_that_of_the_papers(norm: str, objective: str, random_start: str, with_prior: bool) -> None:
    model = hidden_network()
    images = torch.rand(3, *SHAPE, dtype=torch.float64)
    images[0, 0, 0] = torch.tensor([0.0, 1.0, 0.01])  # at the ends of the range
    prior = torch.softmax(3 * torch.randn(3, CLASSES, dtype=torch.float64), 1) if with_prior else None
    eps = 0.2 if norm == "linf" else 0.6
    attack = PGD(eps=eps, steps=5, step_size=0.3 * eps, norm=norm, objective=objective, random_start=random_start)
    found = attack(model, images, labels=LABELS, class_prior=prior, generator=seeded(7))

    starts = start_by_hand(images, norm, random_start, eps, seed=7)
    for n in range(3):
        image, start = images[n].flatten().tolist(), starts[n].flatten().tolist()
        natural = forward_by_hand(model, image)[1]
        rows = None if prior is None else prior[n].tolist()
        strength = (eps, 5, 0.3 * eps)
        expected = attack_by_hand(model, image, start, strength, norm, objective, int(LABELS[n]), natural, rows)
        torch.testing.assert_close(found[n].flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
    # The scene has all cases: pixels inside the ball, on its border (L-inf), at 0 and 1; the prior makes a difference.
    assert bool(((found == 0) | (found == 1)).any())
    assert float((found - images).abs().max()) > 0.05
    if with_prior:
        assert float((found - attack(model, images, generator=seeded(7))).abs().max()) > 1e-3


# --- networks that watch ---------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Convolution, batch normalisation, dropout, head; notes every call."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, classes)
        self.inputs: list[Tensor] = []
        self.modes: list[tuple[bool, bool, bool]] = []
        self.gradients: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images.detach().clone())
        self.modes.append((self.training, self.norm.training, self.drop.training))
        self.gradients.append((torch.is_grad_enabled(), images.requires_grad))
        return self.head(self.drop(torch.relu(self.norm(self.conv(images)))).mean((2, 3)))


@pytest.fixture
def model() -> Watched:
    """With running statistics that differ from those of the test's batches."""
    model = Watched()
    for _ in range(3):
        model(torch.rand(8, 3, 6, 6))
    model.inputs.clear(), model.modes.clear(), model.gradients.clear()
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 6, 6)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 4, 2, 2])


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator(torch.empty(0).device).manual_seed(seed)


def linf(**settings: Any) -> PGD:
    return PGD(**{"eps": "8/255", "steps": 3, "step_size": "4/255", **settings})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- the start -------------------------------------------------------------------------------------------------------


def test_the_first_point_follows_torchs_own_seed_without_a_generator(images: Tensor, labels: Tensor) -> None:
    def first(seed: int) -> Tensor:
        watched = Watched()
        torch.manual_seed(seed)
        linf()(watched, images, labels=labels)
        return watched.inputs[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("random_start", ["normal", "uniform"])
@each_norm
def test_memory_format_changes_neither_the_draw_nor_the_result(
    model: Watched, images: Tensor, labels: Tensor, norm: str, random_start: str
) -> None:
    attack = linf(norm=norm, random_start=random_start, eps=0.5, step_size=0.1)
    plain = attack(model, images, labels=labels, generator=seeded())
    first = model.inputs[0]
    model.inputs.clear()
    strided = images.to(memory_format=torch.channels_last)
    adversarial = attack(model, strided, labels=labels, generator=seeded())
    assert torch.equal(model.inputs[0], first)
    torch.testing.assert_close(adversarial, plain, rtol=0, atol=1e-6)
    for tensor in (*model.inputs, adversarial):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    assert plain.is_contiguous()


# --- forward passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_mode", ["eval", "train"])
@each_objective
def test_natural_logits_are_computed_once_and_where_they_are_needed(
    model: Watched, images: Tensor, labels: Tensor, objective: str, model_mode: str
) -> None:
    linf(objective=objective, model_mode=model_mode, steps=5)(model, images, labels=labels)
    natural = objective not in OF_LABELS
    assert model.gradients == [(False, False)] * natural + [(True, True)] * 5, "the natural pass keeps no graph"
    assert model.modes == [(model_mode == "train",) * 3] * (5 + natural), "the natural pass is in the attack's mode"
    assert [torch.equal(point, images) for point in model.inputs] == [True] * natural + [False] * 5


@pytest.mark.parametrize("objective", ["soft_cross_entropy", "ikl"])
def test_natural_logits_that_are_given_are_used(model: Watched, images: Tensor, objective: str) -> None:
    attack = linf(objective=objective, steps=5)
    with torch.no_grad():
        natural = copy.deepcopy(model).eval()(images)
    alone = attack(model, images, generator=seeded())
    model.inputs.clear()
    given = attack(model, images, natural_logits=natural, generator=seeded())
    assert len(model.inputs) == 5
    assert torch.equal(given, alone)
    elsewhere = attack(model, images, natural_logits=natural.roll(1, 1), generator=seeded())
    assert not torch.equal(elsewhere, alone)


@pytest.mark.parametrize("objective", ["soft_cross_entropy", "ikl"])
def test_a_teacher_sees_the_adversarial_images_and_its_gradient_counts(objective: str) -> None:
    """AdaAD goes up KL(teacher(x) || model(x)), both differentiated; IKL is that of the pairs of classes."""
    torch.manual_seed(0)
    model, teacher, images = hidden_network(), hidden_network(), torch.rand(4, *SHAPE, dtype=torch.float64)
    prior = torch.rand(4, CLASSES, dtype=torch.float64).softmax(1)

    def value(x: Tensor) -> Tensor:
        student, reference = model(x), teacher(x)
        p = reference.softmax(1)
        if objective == "soft_cross_entropy":
            return (p * (p.log() - student.log_softmax(1))).sum()
        gap = (reference[:, :, None] - reference[:, None]) - (student[:, :, None] - student[:, None])
        weights = prior[:, :, None] * prior[:, None]
        return 0.25 * (weights * gap**2).sum() - (p.detach() * student.log_softmax(1)).sum()

    expected = images + 0.001 * torch.randn(images.shape, dtype=torch.float64, generator=seeded())
    for _ in range(3):
        expected.requires_grad_()
        (gradient,) = torch.autograd.grad(value(expected), expected)
        expected = expected.detach() + 0.02 * gradient.sign()
        expected = torch.min(torch.max(expected, images - 0.05), images + 0.05).clamp(0, 1)
    attack = PGD(eps=0.05, steps=3, step_size=0.02, random_start="normal", objective=objective)
    rows = prior if objective == "ikl" else None
    found = attack(model, images, teacher=teacher, class_prior=rows, generator=seeded())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_natural_logits_with_a_graph_keep_it(model: Watched, images: Tensor) -> None:
    """The training step goes on with them."""
    natural = model.eval()(images)
    linf(objective="ikl")(model, images, natural_logits=natural)
    natural.sum().backward()
    assert model.head.weight.grad is not None


@each_objective
def test_forward_takes_the_place_of_the_model(model: Watched, images: Tensor, labels: Tensor, objective: str) -> None:
    """Normalisation, and logits named in a richer output; the ball stays one of pixels."""
    model.eval()
    normalise = PixelSpace([0.5], [0.2]).to_inputs
    adversarial = linf(objective=objective)(
        model, images, forward=lambda x: {"logits": model(normalise(x))}["logits"], labels=labels, generator=seeded()
    )
    assert float(torch.cat(model.inputs).max()) > 1
    whole = nn.Sequential(nn.BatchNorm2d(3, eps=0.0, affine=False), copy.deepcopy(model)).eval()  # as one network
    whole[0].running_mean.fill_(0.5), whole[0].running_var.fill_(0.04)
    same = linf(objective=objective)(whole, images, labels=labels, generator=seeded())
    torch.testing.assert_close(adversarial, same, rtol=0, atol=1e-6)
    assert float((adversarial - images).abs().max()) <= 8 / 255 + 1e-6


def test_steps_and_strength_are_those_of_the_epoch(model: Watched, images: Tensor, labels: Tensor) -> None:
    attack = PGD(eps="8/255", budget="high", eps_ramp=1.0)
    adversarial = attack(model, images, labels=labels, strength=attack.strength(2, 4))
    assert len(model.inputs) == 3
    assert float((adversarial - images).abs().max()) == pytest.approx(4 / 255, rel=1e-4)
    with pytest.raises(ValueError, match=r"^PGD\.strength: `epoch` must be at least 1 .*got None"):
        attack(model, images, labels=labels)
    adversarial = attack(model, images, labels=labels, strength=Strength(1 / 255, 1, 0.5 / 255))
    assert float((adversarial - images).abs().max()) <= 1 / 255 + 1e-6


# --- modes, statistics, gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("model_mode", ["eval", "train"])
@each_objective
def test_the_model_is_as_before(
    model: Watched, images: Tensor, labels: Tensor, objective: str, model_mode: str, training: bool
) -> None:
    model.train(training)
    model.norm.train(not training)
    model.conv.bias.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    kept = model.head.weight.grad
    flags = [(module, module.training) for module in model.modules()]
    requires = [parameter.requires_grad for parameter in model.parameters()]
    before = state(model)

    linf(objective=objective, model_mode=model_mode)(model, images, labels=labels)

    assert set(model.modes) == {(model_mode == "train",) * 3}
    assert [(module, module.training) for module in model.modules()] == flags
    assert_same(state(model), before)
    assert model.norm.track_running_stats is True
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
    assert model.head.weight.grad is kept
    assert bool((kept == 7.0).all())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["head.weight"]


@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_the_mode_decides_which_statistics_normalise(
    model: Watched, images: Tensor, labels: Tensor, model_mode: str
) -> None:
    """One step from the natural images, against torch's own gradient of a copy in that mode."""
    model.drop.p = 0.0
    adversarial = linf(model_mode=model_mode, random_start="none", steps=1)(model, images, labels=labels)
    steps = {}
    for mode in ("eval", "train"):
        twin = copy.deepcopy(model).train(mode == "train")
        pixels = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(twin(pixels), labels), pixels)
        steps[mode] = (images + 4 / 255 * torch.sign(gradient)).clamp(0, 1)
    assert not torch.equal(steps["eval"], steps["train"])
    torch.testing.assert_close(adversarial, steps[model_mode], rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_mode", ["eval", "train"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_the_model_is_as_before_when_the_attack_raises(
    model: Watched, images: Tensor, model_mode: str, calls: int
) -> None:
    """In the natural pass, in the first step, in the second."""
    model.drop.eval()
    flags = [module.training for module in model.modules()]
    before = state(model)

    def forward(pixels: Tensor) -> Tensor:
        if len(model.inputs) == calls:
            raise KeyError("from the model")
        return model(pixels)

    with pytest.raises(KeyError, match="from the model"):
        linf(objective="ikl", model_mode=model_mode)(model, images, forward=forward)
    assert [module.training for module in model.modules()] == flags
    assert model.norm.track_running_stats is True
    assert_same(state(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@each_norm
@each_objective
def test_images_are_not_changed_and_the_result_stands_alone(
    model: Watched, labels: Tensor, norm: str, objective: str
) -> None:
    leaf = torch.rand(4, 3, 6, 6, requires_grad=True)
    images = leaf * 1.0  # within a graph
    before = images.detach().clone()
    for random_start in ("normal", "uniform", *(["none"] if objective in OF_LABELS else [])):
        adversarial = linf(norm=norm, objective=objective, random_start=random_start)(model, images, labels=labels)
        assert torch.equal(images, before)
        assert adversarial.data_ptr() != images.data_ptr()
        assert adversarial.is_leaf
        assert not adversarial.requires_grad
    assert leaf.grad is None
    images.sum().backward()


# --- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("inside", [False, True], ids=["images of outside", "images of inside"])
@each_norm
@each_objective
def test_the_attack_works_where_no_graph_is_kept(
    model: Watched, images: Tensor, labels: Tensor, objective: str, norm: str, inside: bool, context: Any
) -> None:
    attack = linf(norm=norm, objective=objective, eps=0.3, step_size=0.1)
    expected = attack(model, images, labels=labels, generator=seeded())
    with context():
        given = images * 1.0 if inside else images
        assert given.is_inference() == (inside and context is torch.inference_mode)
        found = attack(model, given, labels=labels, generator=seeded())
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert not found.is_inference(), "the training forward can record with it"


@pytest.mark.parametrize("what", ["labels", "natural_logits", "class_prior"])
def test_inference_tensors_beside_the_images(model: Watched, images: Tensor, what: str) -> None:
    attack = linf(objective="cross_entropy" if what == "labels" else "ikl")
    with torch.inference_mode():
        rows = torch.softmax(torch.arange(20.0).reshape(4, 5) % 3, 1)
        given = rows.argmax(1) if what == "labels" else rows
    expected = attack(model, images, **{what: given.clone()}, generator=seeded())
    assert torch.equal(attack(model, images, **{what: given}, generator=seeded()), expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.int16, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_labels_of_other_integer_types_and_frozen_models(
    model: Watched, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    expected = linf()(model, images, labels=labels, generator=seeded())
    model.requires_grad_(False)
    assert torch.equal(linf()(model, images, labels=labels.to(dtype), generator=seeded()), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@each_norm
@each_objective
def test_autocast_runs_the_model_and_leaves_the_objective_in_float32(
    model: Watched, images: Tensor, labels: Tensor, objective: str, norm: str
) -> None:
    """As if the network alone had run under autocast."""
    model.eval()
    seen: list[torch.dtype] = []

    def noting(pixels: Tensor) -> Tensor:
        logits = model(pixels)
        seen.append(logits.dtype)
        return logits

    def narrow(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(pixels)

    attack = linf(norm=norm, objective=objective, eps=0.2, step_size=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attack(model, images, forward=noting, labels=labels, generator=seeded())
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert torch.equal(found, attack(model, images, forward=narrow, labels=labels, generator=seeded()))


@each_objective
def test_the_objective_of_a_half_precision_network_is_in_float32(objective: str) -> None:
    """Seen in the gradient that comes back to the logits: exact but for the last rounding to bf16."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).bfloat16()
    with torch.no_grad():
        model[1].weight.mul_(20)
    seen: list[Tensor] = []

    def forward(pixels: Tensor) -> Tensor:
        logits = model(pixels)
        if logits.requires_grad:
            seen.append(logits.detach().double())
            logits.register_hook(lambda gradient: seen.append(gradient.double()))
        return logits

    images, labels = torch.rand(6, 3, 2, 2).bfloat16(), torch.tensor([0, 1, 2, 3, 0, 1])
    natural = torch.randn(6, 4).bfloat16()
    attack = PGD(eps=0.1, steps=1, step_size=0.1, objective=objective)
    attack(model, images, forward=forward, labels=labels, natural_logits=natural)
    logits, gradient = seen
    rows = zip(logits.tolist(), natural.tolist(), labels.tolist(), strict=True)
    pulls = [pull_of_logits(objective, z, t, label, None) for z, t, label in rows]
    torch.testing.assert_close(gradient, torch.tensor(pulls, dtype=torch.float64), rtol=2**-8, atol=1e-5)


@each_objective
def test_the_training_step_goes_on_in_the_same_autocast_region(
    model: Watched, images: Tensor, labels: Tensor, objective: str
) -> None:
    """Autocast keeps the copies of the weights that a pass made; one without a graph would leave no gradient."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = linf(objective=objective)(model, images, labels=labels)
        loss = F.cross_entropy(model(adversarial), labels)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Casts(TorchDispatchMode):
    """Counts how often weights of a shape are cast."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_to_copy" in str(function) and args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


def test_no_copy_of_a_weight_outlives_the_attack(model: Watched, images: Tensor) -> None:
    """Some versions of torch keep the copies that a pass without a graph made; training with them has no gradient."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linf(objective="ikl")(model, images)
        with Casts((5, 6)) as casts:
            model(images)
            assert casts.count == 1
            model(images)
            assert casts.count == 1, "autocast keeps copies at all"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", ["margin", "ikl"])
@each_norm
def test_the_result_has_the_dtype_of_the_images(dtype: torch.dtype, norm: str, objective: str) -> None:
    model = Watched().eval().to(dtype)
    images, labels = torch.rand(4, 3, 6, 6).to(dtype), torch.tensor([0, 1, 2, 3])
    found = linf(norm=norm, objective=objective, eps=0.25, step_size=0.125)(model, images, labels=labels)
    assert found.dtype == dtype
    offset = (found - images).double()
    sizes = offset.flatten(1).norm(dim=1) if norm == "l2" else offset.abs()
    assert 0.1 < float(sizes.max()) <= 0.25 + {torch.bfloat16: 0.01, torch.float16: 0.002}.get(dtype, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@each_norm
def test_a_gradient_of_0_moves_nothing(images: Tensor, labels: Tensor, norm: str, dtype: torch.dtype) -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).to(dtype), images.to(dtype)
    nn.init.zeros_(model[1].weight)
    found = linf(norm=norm, random_start="none")(model, images, labels=labels)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-7)


@each_norm
def test_a_small_gradient_gives_a_whole_step(images: Tensor, labels: Tensor, norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5, bias=False)).double()
    nn.init.normal_(model[1].weight, std=1e-8)
    attack = linf(norm=norm, random_start="none", eps=0.5, step_size=0.1, steps=1)
    images = images.double() * 0.5 + 0.25
    offset = (attack(model, images, labels=labels) - images).flatten(1)
    length = offset.norm(dim=1) if norm == "l2" else offset.abs().amax(1)
    torch.testing.assert_close(length, torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_gradient_that_is_a_view(images: Tensor, labels: Tensor) -> None:
    """A network that begins with a sum over places: the gradient is one number per channel, expanded."""
    model = nn.Linear(3, 5)
    attack = linf(random_start="none", steps=1)
    found = attack(model, images, forward=lambda pixels: model(pixels.sum((2, 3))), labels=labels)
    assert float((found - images).abs().max()) == pytest.approx(4 / 255, rel=1e-4)


@given(
    norm=st.sampled_from(["linf", "l2"]),
    objective=st.sampled_from(["cross_entropy", "margin", "soft_cross_entropy", "ikl"]),
    random_start=st.sampled_from(["normal", "uniform", "none"]),
    shape=st.sampled_from([(1, 7), (2, 1, 1, 1), (5, 3, 4, 4), (2, 1, 5, 3), (1, 2, 3), (2, 4, 2, 2, 2)]),
    classes=st.sampled_from([2, 3, 10]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    eps=st.sampled_from([1e-4, 8 / 255, 0.3, 1.0]),
    steps=st.sampled_from([1, 2, 7]),
    size=st.sampled_from([0.1, 0.5, 1.0, 3.0]),  # of eps
    ends=st.sampled_from([0.0, 0.5]),  # share of the pixels that are 0 or 1
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_within_the_ball_and_within_0_and_1(
    norm: str,
    objective: str,
    random_start: str,
    shape: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    eps: float,
    steps: int,
    size: float,
    ends: float,
    seed: int,
) -> None:
    assume(objective in OF_LABELS or random_start != "none")
    torch.manual_seed(seed)
    images = torch.rand(shape, dtype=dtype)
    images = torch.where(torch.rand(shape) < ends, images.round(), images)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), classes)).to(dtype)
    labels = torch.randint(classes, (len(images),))
    size = min(1.0, size * eps)
    attack = PGD(eps=eps, steps=steps, step_size=size, norm=norm, objective=objective, random_start=random_start)
    found = attack(model, images, labels=labels)
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    assert bool(((found >= 0) & (found <= 1)).all()), "written so that NaN fails"
    offset = (found - images).flatten(1)
    sizes = offset.norm(dim=1) if norm == "l2" else offset.abs().amax(1)
    assert float(sizes.max()) <= eps + 2e-7


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda attack: pickle.loads(pickle.dumps(attack))])  # noqa: S301
def test_copies_attack_alike(model: Watched, images: Tensor, duplicate: Any) -> None:
    model.drop.p = 0.0
    for strengths in ({"steps": 3, "step_size": "2/255"}, {"budget": "high", "eps_ramp": 0.5}):
        attack = PGD(eps="8/255", norm="l2", random_start="normal", objective="ikl", model_mode="train", **strengths)
        twin, strength = duplicate(attack), attack.strength(3, 8)
        assert (vars(twin), repr(twin), twin.strength(3, 8)) == (vars(attack), repr(attack), strength)
        one, other = (each(model, images, strength=strength, generator=seeded()) for each in (attack, twin))
        assert torch.equal(one, other)
