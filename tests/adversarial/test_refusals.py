"""What adversarial training refuses: error class and the fragment of the message that matters, a row a line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation, PixelSpace, Strength, model_mode

Row = tuple[str, Callable[[], Any], type[Exception], str]

EPS = 8 / 255
IMAGES = torch.full((4, 3, 2, 2), 0.25)
LABELS = torch.tensor([0, 4, 2, 2])
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
SINGLE = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
VECTORS = nn.Sequential(nn.Flatten(), nn.LayerNorm(12))
FROZEN = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
FROZEN[1].weight.requires_grad_(False)


def made(**settings: Any) -> Callable[[], Any]:
    """A PGD; 'steps' and 'step_size' unless a budget or one of them is given."""
    if not settings.keys() & {"budget", "steps", "step_size"}:
        settings = {"steps": 1, "step_size": EPS, **settings}
    return lambda: PGD(**{"eps": EPS, **settings})


def run(
    *, model: Any = MODEL, images: Any = IMAGES, objective: str = "cross_entropy", norm: str = "linf", **given: Any
) -> Callable[[], Any]:
    settings = {name: given.pop(name) for name in ("eps", "random_start") if name in given}
    attack = PGD(**{"eps": EPS, "steps": 2, "step_size": EPS, "objective": objective, "norm": norm, **settings})
    return lambda: attack(model, images, **{"labels": LABELS, **given})


def with_ends(low: float, high: float, shape: tuple[int, ...] = (4, 3, 2, 2)) -> Tensor:
    images = torch.full(shape, 0.25)
    images.view(-1)[0], images.view(-1)[-1] = low, high
    return images


def outputs(change: Callable[[Tensor], Any], **given: Any) -> Callable[[], Any]:
    return run(forward=lambda x: change(MODEL(x)), **given)


def perturb(loss: Callable[[], Tensor], model: nn.Module = MODEL) -> Callable[[], Any]:
    return lambda: AdversarialWeightPerturbation().perturb(model, loss())


SETTINGS: list[Row] = [
    *(
        (f"{kind} {name}", made(**{kind: name}), ValueError, f"PGD: unknown `{kind}` `{name}`. {rest}")
        for kind, name, rest in (
            ("norm", "linff", "Did you mean `linf`? Known: l2, linf."),
            ("norm", "L2", "Known: l2, linf."),
            ("norm", 2, "Did you mean `l2`?"),
            ("random_start", "unifrom", "Did you mean `uniform`? Known: none, normal, uniform."),
            ("random_start", None, "Did you mean `none`?"),
            ("objective", "kl", "Did you mean `ikl`? Known: cross_entropy, ikl, margin, soft_cross_entropy."),
            ("objective", "cw", "Known:"),
            ("model_mode", "evaluate", "Did you mean `eval`? Known: eval, train."),
            ("model_mode", True, "Known:"),
            ("budget", "hihg", "Did you mean `high`? Known: high, high_as_executed, low."),
            ("budget", "qqq", "Known:"),
        )
    ),
    *(
        (f"start {name}", made(random_start="none", objective=name), ValueError, "must be 'normal' or 'uniform' with")
        for name in ("soft_cross_entropy", "ikl")
    ),
    ("position", lambda: PGD(0.1), TypeError, "positional argument"),  # type: ignore[misc]
    ("ramp 1.5", made(eps_ramp=1.5), ValueError, "`eps_ramp` must be a fraction from 0 to 1"),
    ("ramp 20", made(eps_ramp=20), ValueError, "from 0 to 1, got 20"),
    ("ramp -0.5", made(eps_ramp=-0.5), ValueError, "`eps_ramp` must be a finite number"),
    ("ramp True", made(eps_ramp=True), TypeError, "got True of type bool"),
    *(
        (f"given {given}", lambda given=given: PGD(eps=EPS, **given), ValueError, "must be given, or `budget`")
        for given in (
            {},
            {"steps": 2},
            {"step_size": 0.1},
            {"budget": "low", "steps": 2},
            {"budget": "low", "step_size": 0.1},
            {"budget": "low", "steps": 2, "step_size": 0.1},
        )
    ),
    *(
        (f"steps {steps!r}", made(steps=steps, step_size=EPS), error, f"integer of at least 1, {came}")
        for steps, error, came in (
            (0, ValueError, "got 0"),
            (-3, ValueError, "got -3"),
            (2.0, TypeError, "got 2.0 of type float"),
            ("2", TypeError, "got '2' of type str"),
            (True, TypeError, "got True of type bool"),
        )
    ),
    *(
        (f"rows {rows}", made(budget=rows), ValueError, f"rise to 1, got {ends}")
        for rows, ends in (
            ([], []),
            ([(0.5, 2, 1.0)], [0.5]),
            ([(0.5, 2, 1.0), (0.5, 3, 1.0), (1.0, 3, 1.0)], [0.5, 0.5, 1.0]),
            ([(0.75, 2, 1.0), (0.5, 3, 1.0), (1.0, 3, 1.0)], [0.75, 0.5, 1.0]),
            ([(1.0, 2, 1.0), (0.5, 3, 1.0)], [1.0, 0.5]),
            ([(100, 2, 1.0), (200, 3, 1.0)], [100.0, 200.0]),  # epochs instead of shares
        )
    ),
    *(
        (
            f"budget {budget}",
            made(budget=budget),
            TypeError,
            f"a name (high, high_as_executed, low) or rows, got {budget!r}",
        )
        for budget in (3, [1.0, 2, 1.0], [(1.0, 2)], [(1.0, 2, 1.0, 1.0)], {"low": 1}, {(1.0, 2, 1.0)})
    ),
    *(
        (f"row {row}", made(budget=[row]), error, f"PGD: `budget: {fragment}")
        for row, error, fragment in (
            ((0.0, 2, 1.0), ValueError, "until` must be a finite number above 0, got 0.0"),
            (("1", 2, 1.0), TypeError, "until` must be a finite number above 0, got '1' of type str"),
            ((1.0, 0, 1.0), ValueError, "steps` must be an integer of at least 1, got 0"),
            ((1.0, 2.0, 1.0), TypeError, "steps` must be an integer of at least 1, got 2.0 of type float"),
            ((1.0, 2, 0.0), ValueError, "step size / eps` must be a finite number above 0, got 0.0"),
            ((1.0, 2, math.nan), ValueError, "step size / eps` must be a finite number above 0, got nan"),
        )
    ),
    *(
        (f"text {name} {text}", made(**{"steps": 1, "step_size": EPS, name: text}), ValueError, f"got {text!r}")
        for name in ("eps", "step_size")
        for text in ("", "eight", "8/0", "8 of 255", "8/255/2", "nan", "inf", "1e400", "8//255")
    ),
    *(
        (
            f"{name} {norm} {value}",
            made(**{"steps": 1, "step_size": EPS, "norm": norm, name: value}),
            ValueError,
            f"`{name}` must be a finite number above 0, got {shown}",
        )
        for name in ("eps", "step_size")
        for norm in ("linf", "l2")
        for value, shown in ((0, "0"), ("0/255", "0.0"), (-0.1, "-0.1"), ("-1/4", "-0.25"), (math.nan, "nan"))
    ),
    *(
        (f"eps {value!r}", made(eps=value), TypeError, f"`eps` must be a finite number above 0, got {value!r} of type")
        for value in (None, True, [8, 255], 1j)
    ),
    *(
        (
            f"bytes {name} {value!r}",
            made(**{"steps": 1, "step_size": EPS, name: value}),
            ValueError,
            f"at most 1, got {value!r}. Pixels lie in [0, 1]: {way}",
        )
        for name in ("eps", "step_size")
        for value, way in ((8, "'8/255'"), (7.5, "'7.5/255'"), ("8", "'8/255'"), (16, "'16/255'"))
    ),
    *(
        (f"epochs {given}", lambda given=given: PGD(eps=EPS, budget="high").strength(*given), ValueError, fragment)
        for given, fragment in (
            ((None, None), "PGD.strength: `epoch` must be at least 1"),
            ((None, 4), "`epoch` must be at least 1"),
            ((1, None), "`epochs` must be at least 1"),
            ((0, 4), "`epoch` must be at least 1"),
            ((2.0, 4), "got 2.0"),
            ((True, 4), "got True"),
            ((1, "4"), "got '4'"),
            ((5, 4), "PGD.strength: `epoch` must be at most 4, the training's, got 5"),
        )
    ),
    ("ramp epochs", lambda: PGD(eps=EPS, steps=1, step_size=EPS, eps_ramp=1.0).strength(), ValueError, "`epoch` must"),
    ("mode", lambda: model_mode(MODEL, "test").__enter__(), ValueError, "`mode` must be 'eval' or 'train', got 'test'"),
    ("mode None", lambda: model_mode(MODEL, None).__enter__(), ValueError, "got None"),
]

CALLS: list[Row] = [
    *(
        (f"images {came}", run(images=images), TypeError, f"PGD: `images` must {rule}, got {came}")
        for images, rule, came in (
            ((IMAGES * 255).to(torch.uint8), "have a floating dtype of at least 16 bits", "torch.uint8"),
            (IMAGES > 0.5, "have a floating dtype of at least 16 bits", "torch.bool"),
            (IMAGES.to(torch.complex64), "have a floating dtype of at least 16 bits", "torch.complex64"),
            (IMAGES.to(torch.float8_e5m2), "have a floating dtype of at least 16 bits", "torch.float8_e5m2"),
            (IMAGES.tolist(), "be a torch.Tensor", "list"),
            (None, "be a torch.Tensor", "NoneType"),
            (IMAGES.to_sparse(), "be a dense tensor", "the layout torch.sparse_coo"),
        )
    ),
    *(
        (f"images {shape}", run(images=torch.zeros(shape)), ValueError, f"of images, got shape {shape}")
        for shape in ((), (3,), (0, 3, 6, 6), (4, 0))
    ),
    *(
        (f"values {shown}", run(images=with_ends(low, high)), ValueError, f"in [0, 1], got values from {shown}")
        for low, high, shown in (
            (-0.5, 0.5, "-0.5 to 0.5"),
            (0.0, 1.5, "0 to 1.5"),
            (-2.118, 2.64, "-2.118 to 2.64"),
            (math.nan, 0.5, "nan to nan"),
            (0.0, math.inf, "0 to inf"),
        )
    ),
    ("l2", run(norm="l2", eps=128.0), ValueError, "at most 3.464, got 128.0"),
    ("strength", run(strength=Strength(8.0, 1, 1.0)), ValueError, "PGD: `eps` must be at most 1, got 8.0"),
    *(
        (f"strength {name} {strength}", run(strength=strength), ValueError, f"PGD: `strength: {name}` must be")
        for name, strength in (
            ("eps", Strength(-0.1, 1, 0.1)),
            ("eps", Strength(0.0, 1, 0.1)),
            ("steps", Strength(0.1, 0, 0.1)),
            ("step_size", Strength(0.1, 1, 0.0)),
        )
    ),
    *(
        (f"labels {objective} {fragment}", run(objective=objective, labels=labels), error, f"`labels` must {fragment}")
        for objective in ("cross_entropy", "margin")
        for labels, error, fragment in (
            (None, ValueError, "be given as a tensor of class indices, got NoneType"),
            ([0, 1, 2, 3], TypeError, "be given as a tensor of class indices, got list"),
            (torch.rand(4), TypeError, "hold integer class indices, got torch.float32"),
            (torch.ones(4, dtype=torch.bool), TypeError, "hold integer class indices, got torch.bool"),
            (torch.tensor([0, 1, 2, 5]), ValueError, "lie in [0, 4], got values from 0 to 5"),
            (torch.tensor([0, -100, 2, 3]), ValueError, "lie in [0, 4], got values from -100 to 3"),
            (torch.zeros(3, dtype=torch.int64), ValueError, "have shape (4,)"),
            (torch.eye(5, dtype=torch.int64)[:4], ValueError, "have shape (4,)"),
        )
    ),
    *(
        (f"output {objective} {came}", outputs(change, objective=objective), ValueError, f"(N, classes), got {came}")
        for objective in ("cross_entropy", "ikl")
        for change, came in (
            (lambda logits: (logits, logits), "a tuple"),
            (lambda logits: {"logits": logits}, "a dict"),
            (lambda logits: None, "a NoneType"),
            (lambda logits: logits[:, :, None], "shape (4, 5, 1)"),
            (lambda logits: logits.argmax(1), "shape (4,)"),
            (lambda logits: logits.sum(), "shape ()"),
        )
    ),
    *(
        (f"no graph {objective} {name}", run(objective=objective, forward=forward), ValueError, "carry no gradient")
        for objective in ("cross_entropy", "margin", "soft_cross_entropy", "ikl")
        for name, forward in (
            ("detached", lambda x: MODEL(x).detach()),
            ("input", lambda x: MODEL(x.detach())),  # the parameters have a graph, the images none
            ("no_grad", torch.no_grad()(MODEL)),
            ("inference_mode", torch.inference_mode()(MODEL)),
            ("argmax", lambda x: F.one_hot(MODEL(x).argmax(1), 5)),
            ("numbers", lambda x: MODEL(torch.tensor(x.tolist()))),
        )
    ),
    (
        "reentrant",
        run(forward=lambda x: checkpoint(MODEL, x, use_reentrant=True)),
        ValueError,
        "reentrant checkpointing",
    ),
    ("one class", run(objective="margin", model=SINGLE, labels=0 * LABELS), ValueError, "have at least 2 classes"),
    *(
        (
            f"{bad} {objective} {norm}",
            outputs(lambda logits, bad=bad: logits * bad, objective=objective, norm=norm),
            ValueError,
            f"PGD: objective '{objective}' and its gradient must stay finite, got the value",
        )
        for bad in (math.nan, math.inf)
        for objective in ("cross_entropy", "margin", "soft_cross_entropy", "ikl")
        for norm in ("linf", "l2")
    ),
    *(  # the square root at 0: under L2 the result is NaN; under L-inf it is the start, as the sign of NaN is 0
        (
            f"gradient {norm}",
            run(forward=lambda x: MODEL(x + 0 * (x - x.detach()).sqrt()), norm=norm, random_start="none"),
            ValueError,
            "and its gradient must stay finite",
        )
        for norm in ("linf", "l2")
    ),
    (
        "overflow",  # finite logits whose difference is beyond float32
        outputs(lambda logits: logits + torch.full((4, 5), 3e38).scatter_(1, LABELS[:, None], -3e38)),
        ValueError,
        "must stay finite, got the value inf",
    ),
    ("prior shape", run(objective="ikl", class_prior=torch.full((4, 4), 0.25)), ValueError, "`class_prior` must"),
    ("prior below", run(objective="ikl", class_prior=torch.full((4, 5), -0.2)), ValueError, "weights of at least 0"),
    ("prior list", run(objective="ikl", class_prior=[0.2] * 5), TypeError, "PGD: `class_prior` must be a torch.Tensor"),
    ("natural", run(objective="ikl", natural_logits=torch.zeros(4, 3)), ValueError, "got (4, 5) and (4, 3)"),
    ("natural tuple", run(objective="ikl", natural_logits=(LABELS,)), TypeError, "`natural_logits` must be"),
    ("function", run(model=lambda x: MODEL(x)), TypeError, "PGD: `model` must be a torch.nn.Module, got function"),
]

WEIGHTS: list[Row] = [
    *(
        (f"awp {settings}", lambda settings=settings: AdversarialWeightPerturbation(**settings), error, fragment)
        for settings, error, fragment in (
            ({"undo": "after"}, ValueError, "AdversarialWeightPerturbation: unknown `undo` `after`"),
            ({"gamma": 0.0}, ValueError, "AdversarialWeightPerturbation: `gamma` must be a finite number above 0"),
            ({"gamma": -1}, ValueError, "got -1"),
            ({"gamma": "5e-3"}, TypeError, "got '5e-3' of type str"),
            ({"warmup_epochs": -1}, ValueError, "`warmup_epochs` must be a finite number of at least 0, got -1"),
            ({"warmup_epochs": None}, TypeError, "got None of type NoneType"),
        )
    ),
    ("awp position", lambda: AdversarialWeightPerturbation(5e-3), TypeError, "positional argument"),  # type: ignore[misc]
    ("per sample", perturb(lambda: MODEL(IMAGES).sum(1)), ValueError, "got shape (4,) and requires_grad=True"),
    ("one entry", perturb(lambda: MODEL(IMAGES).sum().reshape(1)), ValueError, "got shape (1,) and requires_grad=True"),
    ("detached", perturb(lambda: MODEL(IMAGES).sum().detach()), ValueError, "got shape () and requires_grad=False"),
    ("other", perturb(lambda: SINGLE(IMAGES).sum()), ValueError, "`loss` must depend on a trainable weight of `model`"),
    ("frozen", perturb(lambda: FROZEN(IMAGES).sum(), FROZEN), ValueError, "`loss` must depend on a trainable weight"),
    ("vectors", perturb(lambda: VECTORS(IMAGES).sum(), VECTORS), ValueError, "with at least two dimensions"),
]


def pixels(*statistics: Any, images: Any = IMAGES, **settings: Any) -> Callable[[], Any]:
    return lambda: PixelSpace(*statistics, way_out="Mend it.", **settings).to_pixels(images)


PIXELS: list[Row] = [
    ("mean alone", pixels([0.5]), ValueError, "PixelSpace: `mean` and `std` must be given both or not at all"),
    ("std alone", pixels(None, [0.5], caller="host"), ValueError, "host: `mean` and `std` must be given both"),
    ("lengths", pixels([0.5], [0.5, 0.5]), ValueError, "`mean` and `std` must have one length, got 1 and 2"),
    ("text", pixels("0.5", [0.5]), TypeError, "`mean` must be a list of numbers, one per channel, got '0.5'"),
    ("number", pixels([0.5], 0.5), TypeError, "`std` must be a list of numbers, one per channel, got 0.5"),
    ("empty", pixels([], []), TypeError, "`mean` must be a list of numbers"),
    ("below", pixels([-0.1], [0.5]), ValueError, "`mean` must be a finite number of at least 0, got -0.1"),
    ("zero", pixels([0.5], [0]), ValueError, "`std` must be a finite number above 0, got 0"),
    ("bytes", pixels([127.5], [0.5]), ValueError, "`mean` must hold numbers of at most 1, the value of white, got"),
    ("std bytes", pixels([0.5], [58.0]), ValueError, "`std` must hold numbers of at most 1"),
    ("white", pixels(white=0), ValueError, "`white` must be a finite number above 0, got 0"),
    ("uint8", pixels(images=IMAGES.to(torch.uint8)), TypeError, "`inputs` must have a floating dtype"),
    ("list", pixels(images=[1.0]), TypeError, "`inputs` must be a torch.Tensor, got list"),
    ("channels", pixels([0.5] * 2, [0.5] * 2), ValueError, "one number per channel, got 2 for images of shape (4, 3,"),
    ("vector", pixels(images=torch.zeros(3)), ValueError, "for images of shape (3,)"),
    ("dark", pixels(images=with_ends(-0.001, 1.0)), ValueError, "values from -0.001 to 1."),
    ("light", pixels(images=with_ends(0.0, 1.001)), ValueError, "got values from 0 to 1.001. Mend it."),
    ("nan", pixels(images=with_ends(math.nan, 1.0)), ValueError, "got values from nan to nan"),
    ("twice", pixels([0.5], [0.5], images=with_ends(-2.0, 0.0)), ValueError, "once mean and std are undone"),
    ("255", pixels(white=255.0, images=with_ends(0.0, 256.0)), ValueError, "must lie in [0, 255]"),
    ("unit", pixels(white=255.0, images=with_ends(0.0, 1.0)), ValueError, "must reach up to 255"),
]

TABLE = [*SETTINGS, *CALLS, *WEIGHTS, *PIXELS]


@pytest.mark.parametrize(("call", "error", "fragment"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_refusals(call: Callable[[], Any], error: type[Exception], fragment: str) -> None:
    models = MODEL, SINGLE, VECTORS, FROZEN
    before = [[tensor.clone() for tensor in model.state_dict().values()] for model in models]
    with pytest.raises(error, match=re.escape(fragment)) as caught:
        call()
    assert caught.type is error
    for model, tensors in zip(models, before, strict=True):
        assert model.training
        for tensor, old in zip(model.state_dict().values(), tensors, strict=True):
            torch.testing.assert_close(tensor, old, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "l2", "eps": 3.464},
        {"objective": "soft_cross_entropy", "labels": None},
        {"objective": "ikl", "labels": None},
        {"random_start": "none"},
    ],
    ids=str,
)
def test_what_is_no_mistake(settings: dict[str, Any]) -> None:
    run(**settings)()


def test_values_that_have_been_checked_are_not_read_again() -> None:
    """NaN would be refused by a look at the values, and here is met by the objective."""
    bad = with_ends(math.nan, 0.5)
    with pytest.raises(ValueError, match="must stay finite"):
        run(images=bad, check_values=False)()
    with pytest.raises(ValueError, match=r"at most 3\.464"):
        run(norm="l2", eps=128.0, check_values=False)()
