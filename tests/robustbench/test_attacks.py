"""The attacks of an evaluation and what AutoAttack warns of, with AutoAttack itself as the oracle."""

import contextlib
import functools
import importlib
import logging
import random
import re
import sys
import types
from importlib import metadata

import numpy as np
import pytest
import torch
from quick_autoattack import Interruption, Quick, batch, message, network, without_times
from torch import nn

from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.robustbench import report
from ikl_plugins.robustbench.evaluation import Unfinished, curve, evaluate, memory, merge
from ikl_plugins.robustbench.evaluation.attacks import source_sha256
from ikl_plugins.robustbench.evaluation.evidence import check_log
from ikl_plugins.robustbench.evaluation.log import Evaluation, is_standard, weights_sha256
from ikl_plugins.robustbench.evaluation.verdict import attacks_in_words, is_unreliable
from ikl_plugins.robustbench.leaderboard import rank
from ikl_plugins.robustbench.report import write_report
from ikl_plugins.robustbench.submittable import submission_obstacles

robustbench = import_robustbench()
checks = importlib.import_module("autoattack.checks")
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)
    for name in checks.funcs:  # AutoAttack never sets these counts back
        monkeypatch.setitem(checks.funcs, name, 0)


class Changed(nn.Module):
    """A network that does something to its images or its logits."""

    def __init__(self, before=lambda images: images, after=lambda logits: logits, seed=0):
        super().__init__()
        self.network, self.before, self.after = network(seed=seed), before, after
        self.eval()

    def forward(self, images):
        return self.after(self.network(self.before(images)))


def optimised(images):
    with torch.enable_grad():
        found = images.detach().requires_grad_()
        return images + 0 * torch.autograd.grad(found.sum(), found)[0]


def noisy(images):
    # Its own generator: AutoAttack seeds torch's before each batch, and before each of its looks.
    return images + 1e-3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(random.getrandbits(32)))


MODELS = {
    "sound": Changed,
    "masked": lambda: Changed(lambda images: (8 * images).round() / 8 + 0 * images),
    "probabilities": lambda: Changed(after=lambda logits: logits.softmax(1)),
    "random": lambda: Changed(noisy),
    "dynamic": lambda: Changed(optimised),
}
FLAGS = {
    "masked": "zero gradient",
    "probabilities": "probability distribution",
    "random": "randomized",
    "dynamic": "dynamic",
}


def autoattack(model, images, labels, *, eps, batch_size=5, norm="Linf", version="standard", attacks=(), change=None):
    """One run of AutoAttack: adversarial images, predictions and its warnings."""
    options = {"version": "custom", "attacks_to_run": attacks} if attacks else {"version": version}
    adversary = Quick(model, norm=norm, eps=eps, seed=0, verbose=False, device="cpu", **options)
    if change is not None:
        change(adversary)
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("auto-attack").addHandler(handler)
    try:
        with torch.random.fork_rng():
            found = adversary.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)
    finally:
        logging.getLogger("auto-attack").removeHandler(handler)
    return (*found, said)


def checked(model, images, labels, *, eps, change=None, batch_size=5, norm="Linf", version="standard", **options):
    """Our evaluation, which has found what one run of AutoAttack finds, and has its warnings."""
    options = {"norm": norm, "version": version, "batch_size": batch_size, **options}
    found = evaluate(model, images, labels, eps=eps, progress=False, **options)
    number = int(eps.split("/")[0]) / 255 if "/" in eps else float(eps)
    options.pop("parameters", None)
    adversarial, predictions, said = autoattack(model, images, labels, eps=number, change=change, **options)
    assert torch.equal(found.adversarial_images(images), adversarial)
    assert found.log["predictions"] == predictions.tolist()
    assert found.log["warnings"] == once(said)
    check_log("evaluate", found.log)
    return found


def once(messages):
    """Of each kind, by all but its number, the one with the largest."""
    found = {}
    for text in messages:
        start, number, end = re.fullmatch(r"(\D*)([\d.]*\d)?(.*)", text).groups(default="0")
        found[start, end] = max(found.get((start, end), (0, "")), (float(number), text))
    return [text for _, text in found.values()]


# --- warnings --------------------------------------------------------------------------------------------------------

SQUARE = "Square Attack has decreased the robust accuracy"
RUNS = [
    ("sound", {"version": "standard"}, None),
    ("masked", {"version": "standard"}, SQUARE),
    ("masked", {"version": "plus"}, FLAGS["masked"]),
    ("masked", {"version": "rand"}, FLAGS["masked"]),
    ("masked", {"attacks": ("square", "apgd-ce")}, None),
    ("masked", {"attacks": ("apgd-ce", "square", "apgd-dlr")}, FLAGS["masked"]),
    ("masked", {"attacks": ("apgd-ce", "square")}, SQUARE),
    ("probabilities", {"version": "rand"}, FLAGS["probabilities"]),
    ("dynamic", {"attacks": ("apgd-ce",)}, FLAGS["dynamic"]),
]


@pytest.mark.parametrize(("name", "options", "flag"), RUNS)
def test_the_warnings_are_those_of_the_same_run_of_autoattack(name, options, flag):
    model = MODELS[name]()
    found = checked(model, *batch(model, 5 if "plus" in options.values() else 7, 1), eps="16/255", **options)
    assert found.log["unreliable"] == (flag is not None)
    said = " ".join(found.log["warnings"])
    assert (SQUARE in said) == (flag == SQUARE)
    assert flag in said if flag else not said


@pytest.mark.parametrize(("options", "flag"), [({"attacks": ["apgd-ce"]}, True), ({"version": "rand"}, False)])
def test_a_random_model_is_flagged_unless_it_is_evaluated_as_one(options, flag):
    model = MODELS["random"]()
    data = batch(model, count=5, wrong=1)
    found = evaluate(model, *data, eps="1/255", progress=False, **options)
    said = autoattack(model, *data, eps=1 / 255, **options)[2]
    assert [FLAGS["random"] in text for text in found.log["warnings"]] == [True] * flag
    assert [FLAGS["random"] in text for text in said] == [True] * flag
    assert found.log["unreliable"] == flag


def test_one_model_does_not_answer_for_another():
    for name in ("dynamic", "sound"):
        model = MODELS[name]()
        found = evaluate(model, *batch(model), eps="1/255", attacks=["apgd-ce"], progress=False)
        assert found.log["unreliable"] == (name == "dynamic")


def stop_after(count):
    def stop(_):
        nonlocal count
        count -= 1
        if not count:
            raise Interruption

    return stop


@pytest.mark.parametrize("name", ["masked", "dynamic"])
def test_a_run_that_goes_on_neither_loses_nor_doubles_a_warning(name, tmp_path):
    model = MODELS[name]()
    data = batch(model, count=7, wrong=1)
    options = {"eps": "16/255", "attacks": ["apgd-dlr", "square"], "batch_size": 3}
    whole = evaluate(model, *data, progress=False, **options)
    count = sum(entry["batches"] for entry in whole.log["progress"])
    assert count > 2
    for stops in ([1], [count], [1] * count):
        path = tmp_path / f"{stops}.json"
        for number in stops:
            with pytest.raises(Interruption):
                evaluate(model, *data, log=path, progress=stop_after(number), **options)
        for _ in range(2):  # going on, and reading what is finished
            found = evaluate(model, *data, log=path, progress=False, **options)
            assert (found.log["warnings"], found.log["unreliable"]) == (whole.log["warnings"], True)
    assert Evaluation.load(path).log["warnings"] == whole.log["warnings"]
    assert len(whole.log["warnings"]) == (2 if name == "masked" else 1)


def test_shards_and_merged_ones_have_each_others_warnings(tmp_path):
    model = MODELS["masked"]()
    data = batch(model, count=9, wrong=1)
    options = {"eps": "16/255", "attacks": ["apgd-dlr", "square"], "batch_size": 3, "progress": False}
    whole = evaluate(model, *data, **options)
    path, found = tmp_path / "a" / "log.json", []
    while len(found) < 2:
        for number in (2, 1):
            with contextlib.suppress(Unfinished):
                found.append(evaluate(model, *data, log=path, shard=(number, 2), wait=0, **options))
    merged = merge([path], tmp_path / "b" / "log.json")
    assert len(whole.log["warnings"]) == 2
    for other in (*found, merged, Evaluation.load(path)):
        assert (other.log["warnings"], other.log["unreliable"]) == (whole.log["warnings"], True)


def test_warnings_are_where_people_look(tmp_path):
    model = MODELS["masked"]()
    attacks = ["apgd-dlr", "square"]
    found = evaluate(model, *batch(model, count=7, wrong=1), eps="16/255", attacks=attacks, progress=False)
    assert len(found.log["warnings"]) == 2
    for text in (str(found), write_report(found, tmp_path).read_text()):
        assert all(f"AutoAttack warns: {warning}" in text for warning in found.log["warnings"])
        assert "may be unreliable" in text


def facts(**changes):
    """A log as far as its verdict needs it: 1000 images, 900 right, 500 behind apgd-ce."""
    standing = {"apgd-ce": 500, **changes.pop("standing", {})}
    progress = [{"attack": name, "standing": left, "batches": 4, "batches_done": 4} for name, left in standing.items()]
    return {
        "n_examples": 1000,
        "natural_correct": [1] * 900 + [0] * 100,
        "progress": progress,
        "warnings": [],
        "version": "standard",
        "attacks": list(STANDARD),
        "dropped": [],
        "parameters": {},
        "precision": "float32",
        **changes,
    }


UNRELIABLE = [
    ({}, False),
    ({"standing": {"square": 498}}, False),  # 0.2 points
    ({"standing": {"square": 497}}, True),
    ({"standing": {"square": 497, "apgd-t": 490}}, False),  # as AutoAttack counts it
    ({"standing": {"square": 497, "somebody:else": 100}}, True),
    ({"standing": {"transfer-square": 400}}, False),
    ({"warnings": ["with only 3 classes it is not possible to use the targeted DLR loss!"]}, False),
    *(({"warnings": [f"it seems: {flag}"]}, True) for flag in ("a randomized defense!", "a dynamic defense!")),
]


@pytest.mark.parametrize(("changes", "expected"), UNRELIABLE)
def test_what_is_unreliable_follows_from_warnings_and_progress(changes, expected):
    assert is_unreliable(facts(**changes)) == expected


NOT_STANDARD = [
    {"version": "plus"},
    {"attacks": [*STANDARD, "somebody:else"]},
    {"attacks": [*STANDARD[:3]], "dropped": [{"attack": "square", "reason": "none"}]},
    {"parameters": {"square": {"n_queries": 20000}}},
    {"precision": "bfloat16"},
    {"precision": "float32, channels_last"},
]


@pytest.mark.parametrize("changes", NOT_STANDARD)
def test_what_is_not_standard_is_not_called_so(changes):
    assert is_standard(facts())
    log = facts(**changes)
    assert not is_standard(log)
    assert attacks_in_words({**log, "standard": False}).startswith("not standard: ")


# --- L1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"attacks": ("square", "fab", "apgd-dlr")}])
def test_l1_is_autoattacks(options):
    model = network()
    found = checked(model, *batch(model, count=6, wrong=1), norm="L1", eps="1", **options)
    assert 0 < found.robust_accuracy < found.natural_accuracy
    assert found.standard == (not options)


def test_l1_has_a_curve_and_no_leaderboard(tmp_path, monkeypatch):
    model = network()
    images, labels = batch(model)
    points = curve(model, images, labels, ["0.5", "4"], norm="L1", attacks=["apgd-ce"], progress=False)
    assert points[0]["robust_accuracy"] > points[1]["robust_accuracy"]
    found = evaluate(model, images, labels, norm="L1", eps=1, attacks=["apgd-ce"], progress=False)
    found.log["curve"] = points
    labels = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: labels.append(figure.axes[0].get_xlabel()))
    write_report(found, tmp_path)
    assert "L1 radius eps (sum over pixels in [0, 1])" in labels
    with message("`apgd-ce.n_iter` must be an integer of at least 2, got 1"):
        evaluate(model, *batch(model), norm="L1", eps=1, parameters={"apgd-ce": {"n_iter": 1}})
    with message("rank: `threat_model` must have a leaderboard for cifar10, got 'L1'. Known: cifar10 L2, cifar10 Linf"):
        rank("cifar10", "L1", 50.0)
    assert "got 'L1'" in submission_obstacles(model, "cifar10", threat_model="L1", eps="12")[0]


# --- parameters ------------------------------------------------------------------------------------------------------


def own(part, **values):
    """Sets attributes of one of AutoAttack's attacks."""

    def change(adversary):
        for name, value in values.items():
            setattr(getattr(adversary, part), name, value)

    return change


def with_iterations(adversary):
    """What AutoAttack has for another number of iterations."""
    adversary.apgd = type(adversary.apgd)(
        adversary.model, n_iter=23, n_restarts=5, eps=adversary.epsilon, seed=0, device="cpu", logger=adversary.logger
    )


PARAMETERS = [
    ({"apgd-ce": {"n_iter": 23}}, with_iterations),
    ({"apgd-ce": {"rho": 0.3, "n_restarts": 2}}, own("apgd", thr_decr=0.3, n_restarts=2)),
    ({"apgd-dlr": {"eot_iter": 2}}, own("apgd", eot_iter=2)),
    ({"apgd-t": {"n_target_classes": 2}}, own("apgd_targeted", n_target_classes=2)),
    ({"fab": {"n_restarts": 2, "eta": 1.5}}, own("fab", n_restarts=2, eta=1.5)),
    ({"fab-t": {"alpha_max": 0.5, "n_target_classes": 3}}, own("fab", alpha_max=0.5, n_target_classes=3)),
    ({"square": {"n_queries": 25, "p_init": 0.3}}, own("square", n_queries=25, p_init=0.3)),
]


@pytest.mark.parametrize(("parameters", "change"), PARAMETERS)
def test_a_parameter_is_autoattacks(parameters, change):
    passes = []
    model = Changed(after=lambda logits: passes.append(1) or logits)
    images, labels = batch(model, count=5, wrong=1)
    options = {"eps": "3/255", "attacks": list(parameters), "batch_size": 5}
    found = checked(model, images, labels, parameters=parameters, change=change, **options)
    assert found.log["parameters"] == parameters
    passes.clear()
    evaluate(model, images, labels, parameters=parameters, progress=False, **options)
    changed = len(passes)
    passes.clear()
    plain = evaluate(model, images, labels, progress=False, **options)
    assert plain.log["parameters"] == {}
    same = torch.equal(found.adversarial_images(images), plain.adversarial_images(images))
    assert not same or changed != len(passes)


def test_a_parameter_is_of_one_attack_and_makes_it_not_standard(tmp_path):
    model = network()
    images, labels = batch(model)
    own = {"square": {"n_queries": 60, "n_restarts": 1}, "fab-t": {"n_restarts": 1}, "apgd-ce": {"n_iter": 8}}
    assert evaluate(model, images, labels, eps="40/255", parameters=own, progress=False).standard  # AutoAttack's
    changed = {"square": {"n_queries": 70}}
    found = evaluate(model, images, labels, eps="40/255", parameters=changed, progress=False, log=tmp_path / "a.json")
    words = "not standard: apgd-ce, apgd-t, fab-t, square, with square.n_queries=70"
    assert (found.standard, found.log["version"], found.log["parameters"]) == (False, "standard", changed)
    report = write_report(found, tmp_path).read_text()
    assert words in str(found)
    assert words in report
    assert "standard AutoAttack" not in report.replace("This is not standard AutoAttack", "")
    obstacle = submission_obstacles(model, "cifar10", eps="8/255", parameters=changed)[-1]
    assert "be of standard AutoAttack, got apgd-ce, apgd-t, fab-t, square, with square.n_queries=70" in obstacle
    with message('has other parameters {"square": {"n_queries": 70}} instead of {}'):
        evaluate(model, images, labels, eps="40/255", progress=False, log=tmp_path / "a.json")
    # Of two attacks that share an object in AutoAttack one alone is changed.
    both = {"eps": "2/255", "attacks": ["apgd-ce", "apgd-dlr"], "batch_size": 5, "progress": False}
    found = evaluate(model, images, labels, parameters={"apgd-ce": {"n_restarts": 1}}, **both)
    assert found.log["parameters"] == {"apgd-ce": {"n_restarts": 1}}
    fab = evaluate(model, images, labels, eps="40/255", attacks=["fab-t", "fab"], parameters={"fab": {"n_restarts": 5}})
    assert fab.log["parameters"] == {"fab": {"n_restarts": 5}}  # fab-t leaves it with one


BAD_PARAMETERS = [
    ({"square": {"queries": 9}}, ValueError, "unknown parameter of square `queries`. Did you mean `n_queries`?"),
    ({"square": {"rho": 0.5}}, ValueError, "Known: n_queries, n_restarts, p_init"),
    ({"fab": {"n_iter": 9}}, ValueError, "AutoAttack's attacks that run (apgd-ce, apgd-t, fab-t, square), got fab"),
    ({"square": {"n_queries": 0}}, ValueError, "`square.n_queries` must be an integer of at least 1, got 0"),
    ({"square": {"n_queries": 2.0}}, TypeError, "got 2.0"),
    ({"square": {"n_queries": True}}, TypeError, "got True"),
    ({"apgd-ce": {"rho": 1.5}}, ValueError, "`apgd-ce.rho` must be above 0 and at most 1, got 1.5"),
    ({"fab-t": {"eta": 1}}, ValueError, "`fab-t.eta` must be above 1 and at most 2, got 1"),
    ({"apgd-t": {"n_target_classes": 10}}, ValueError, "must be at most 9, the other classes, got 10"),
    ({"square": 5}, TypeError, "must map attacks to mappings"),
    ([], TypeError, "must map attacks to mappings"),
]


@pytest.mark.parametrize(("parameters", "kind", "text"), BAD_PARAMETERS)
def test_what_is_no_parameter_is_refused(parameters, kind, text):
    model = network()
    with message(text, kind):
        evaluate(model, *batch(model), eps="3/255", parameters=parameters)


# --- attacks of others -----------------------------------------------------------------------------------------------


def sign(model, images, labels, *, norm, eps, seed):
    """One step along the sign of the gradient from a random start."""
    start = images + eps * (2 * torch.rand_like(images) - 1)
    start = start.clamp(0, 1).requires_grad_()
    loss = nn.functional.cross_entropy(model(start), labels)
    (gradient,) = torch.autograd.grad(loss, start)
    return (images + eps * gradient.sign()).clamp(0, 1)


class Draws:
    """An attack that draws of all kinds of random numbers, and keeps what it drew and what it was given."""

    def __init__(self):
        self.drawn, self.given = [], []

    def __call__(self, model, images, labels, **options):
        self.drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
        self.given.append((len(images), options))
        return images.zero_()  # which are its own copy


def test_an_attack_of_others_runs_alone_and_behind_autoattacks(monkeypatch):
    model = network()
    images, labels = batch(model)
    adversarial, predictions, _ = autoattack(model, images, labels, eps=1 / 255, version="rand")
    standing = predictions.eq(labels).nonzero().flatten()
    fell = []
    for part in standing.split(5):
        torch.manual_seed(0)
        found = sign(model, images[part], labels[part], norm="Linf", eps=1 / 255, seed=0)
        wrong = model(found).argmax(1) != labels[part]
        adversarial[part[wrong]] = found[wrong]
        fell += part[wrong].tolist()
    module = types.ModuleType("somebody")
    module.sign = sign
    monkeypatch.setitem(sys.modules, "somebody", module)
    point = metadata.EntryPoint("signs", "somebody:sign", "ikl_plugins.attacks")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "ikl_plugins.attacks" else [])
    names = {"somebody:sign": "somebody:sign", "signs": "signs", sign: f"{__name__}:sign"}
    for attack, name in names.items():
        found = evaluate(model, images, labels, eps="1/255", attacks=["rand", attack], batch_size=5, progress=False)
        assert torch.equal(found.adversarial_images(images), adversarial)
        assert [index for index, by in enumerate(found.log["fell_to"]) if by == name] == fell
        assert (found.log["attacks"], found.log["version"]) == (["apgd-ce", "apgd-dlr", name], "rand")
        alone = evaluate(model, images, labels, eps="6/255", attacks=[attack], batch_size=5, progress=False)
        assert (alone.log["attacks"], alone.log["version"], alone.standard) == ([name], "custom", False)
        assert name in str(alone)
        assert alone.robust_accuracy < alone.natural_accuracy
    assert list(alone.log["own_attacks"]) == [f"{__name__}:sign"]
    with message("unknown attack `sings`. Did you mean `signs`? Known: apgd-ce"):
        evaluate(model, images, labels, eps="1/255", attacks=["sings"])


def test_its_random_numbers_are_those_of_the_seed_and_the_callers_stay():
    model, attack = network(), Draws()
    images, labels = batch(model, count=9, wrong=0)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(8), np.random.seed(8), random.seed(8)
    following = torch.rand(2)[1].item(), np.random.rand(2)[1], [random.random() for _ in range(2)][1]
    torch.manual_seed(8), np.random.seed(8), random.seed(8)
    torch.rand(1), np.random.rand(), random.random()
    evaluate(model, images, labels, eps="1", norm="Linf", attacks=[attack], seed=3, batch_size=5, progress=False)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == following
    assert attack.drawn == [expected] * 2
    assert attack.given == [(size, {"norm": "Linf", "eps": 1.0, "seed": 3}) for size in (5, 4)]


def test_an_attack_of_others_goes_on_where_it_stopped_unless_it_has_changed(tmp_path, monkeypatch):
    model = network()
    images, labels = batch(model)
    options = {"eps": "3/255", "attacks": ["apgd-ce", functools.partial(sign)], "batch_size": 5}
    whole = evaluate(model, images, labels, progress=False, **options)
    with pytest.raises(Interruption):
        evaluate(model, images, labels, log=tmp_path / "a.json", progress=stop_after(4), **options)
    found = evaluate(model, images, labels, log=tmp_path / "a.json", progress=False, **options)
    assert {**without_times(found.log), "adversarial": None} == without_times(whole.log)
    assert torch.equal(found.adversarial_images(images), whole.adversarial_images(images))
    (digest,) = found.log["own_attacks"].values()
    assert len(digest) == 64
    (tmp_path / "other.py").write_text("def sign(*_, **__):\n    pass\n")
    source = str(tmp_path / "other.py")
    monkeypatch.setattr("inspect.getsourcefile", lambda _: source)
    with message("has other own_attacks"):
        evaluate(model, images, labels, log=tmp_path / "a.json", progress=False, **options)


class Steps:
    """An attack with settings."""

    def __init__(self, steps):
        self.steps, self.network = steps, network(seed=steps)

    def __call__(self, model, images, labels, **options):
        return images

    def run(self, model, images, labels, **options):
        return images


def test_the_checksum_of_an_attack_tells_its_settings_and_not_the_process():
    def with_network(seed):
        helper = {"network": network(seed=seed), "at": {3, 1, 2}}
        return lambda model, images, labels, **options: helper and images

    def endless(model, images, labels, **options):
        return endless

    makers = [
        lambda number: functools.partial(sign, steps=number),
        lambda number: functools.partial(sign, network(seed=number)),
        lambda number: functools.partial(sign, np.arange(number)),
        lambda number: gives([len, network, number]),
        with_network,
        Steps,
        lambda number: Steps(number).run,
    ]
    digests = [source_sha256(make(number)) for make in makers for number in (3, 4)]
    assert len({*digests, None}) == 15
    assert digests == [source_sha256(make(number)) for make in makers for number in (3, 4)]
    assert source_sha256(endless) is None
    assert source_sha256(len) is None


def gives(change):
    def attack(model, images, labels, **options):
        return change(images)

    return attack


def trains(model, images, labels, **options):
    model.train()
    return images


def steps(model, images, labels, **options):
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return images


def steps_unseen(model, images, labels, **options):
    next(model.parameters()).data.mul_(-1)
    return images


def hooks(model, images, labels, **options):
    model.register_forward_hook(lambda module, given, logits: -logits)
    return images


BAD = [
    (gives(lambda images: None), "floating images of shape (5, 3, 8, 8), got NoneType"),
    (gives(lambda images: images[:, :1]), "got torch.float32 of (5, 1, 8, 8)"),
    (gives(lambda images: images.round().long()), "got torch.int64 of"),
    (gives(lambda images: images + 1), "images in [0, 1], got values from 1"),
    (gives(lambda images: images * torch.nan), "got values from nan"),
    (gives(lambda images: (images + 4.1 / 255).clamp(0, 1)), "within Linf eps 4/255, got 5 of 5 further away"),
    (trains, "must leave the model as it is"),
    (steps, "must leave the model as it is"),
    (steps_unseen, "must leave the model as it is"),
    (hooks, "must leave the model as it is"),
    (gives(lambda images: [][1]), "must give images, but raised IndexError: list index out of range"),
    (gives(lambda images: images.nothing), "must give images, but raised AttributeError: 'Tensor' object has no"),
]


@pytest.mark.parametrize(("attack", "text"), BAD)
def test_what_an_attack_must_not_do_is_refused_by_its_name(attack, text):
    model = network()
    with message(text, (RuntimeError, ValueError)) as caught:
        evaluate(model, *batch(model), eps="4/255", attacks=[attack], batch_size=5, progress=False)
    assert f"attack `{attack.__module__}:{attack.__qualname__}` must" in str(caught.value)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 4 / 255), ("L2", 0.5), ("L1", 5.0)])
def test_rounding_does_not_put_an_image_out_of_the_ball(norm, eps):
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    model = network()
    images, labels = batch(model, count=40, wrong=0)
    images = 0.3 + 0.4 * images
    labels = model(images).argmax(1)

    def edge(factor):
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        if norm == "Linf":
            direction = direction.sign()
        lengths = torch.linalg.vector_norm(direction.flatten(1), order, dim=1).view(-1, 1, 1, 1)
        return gives(lambda given: given + factor * eps * direction / lengths)

    options = {"norm": norm, "eps": eps, "progress": False}
    evaluate(model, images, labels, attacks=[edge(1)], **options)
    with message("further away"):
        evaluate(model, images, labels, attacks=[edge(1.001)], **options)


BAD_ATTACKS = [
    (["apgd"], ValueError, "unknown attack `apgd`"),
    ([3], TypeError, "must hold names and callables, got 3"),
    (["torch:nothing"], ValueError, "attack `torch:nothing` must be a module and a callable in it"),
    (["no_such_module:f"], ValueError, "No module named 'no_such_module'"),
    (["torch:pi"], TypeError, "attack `torch:pi` must be callable, got float"),
    ([sign, sign], ValueError, "each once"),
    (["standard", "square"], ValueError, "attacks of others behind 'standard', got 'square'"),
    (["apgd-ce", "standard"], ValueError, "unknown attack `standard`"),
    (["transfer-square"], ValueError, "transfer attacks are computed on, got transfer-square without one"),
]


@pytest.mark.parametrize(("attacks", "kind", "text"), BAD_ATTACKS)
def test_what_is_no_attack_is_refused(attacks, kind, text):
    model = network()
    with message(text, kind):
        evaluate(model, *batch(model), eps="3/255", attacks=attacks)


# --- transfer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "fab", "square"])
def test_a_transfer_attack_is_autoattacks_on_the_surrogate_judged_on_the_model(attack):
    model, surrogate = network(), network(seed=1)
    with torch.no_grad():  # near enough for something to transfer
        for own, other in zip(surrogate.parameters(), model.parameters(), strict=True):
            own.mul_(0.08).add_(0.92 * other)
    images, labels = batch(model, count=20)
    found = evaluate(
        model, images, labels, eps="12/255", attacks=[f"transfer-{attack}"], surrogate=surrogate, batch_size=5
    )
    adversary = Quick(
        surrogate, norm="Linf", eps=12 / 255, seed=0, verbose=False, version="custom", attacks_to_run=[attack]
    )
    part = {"apgd-ce": adversary.apgd, "apgd-t": adversary.apgd_targeted}.get(attack) or getattr(adversary, attack)
    expected = images.clone()
    with torch.no_grad():
        for some in torch.arange(2, 20).split(5):
            made = part.perturb(images[some].clone(), labels[some])
            wrong = model(made).argmax(1) != labels[some]
            expected[some[wrong]] = made[wrong]
    assert torch.equal(found.adversarial_images(images), expected)
    assert 0 < found.robust_accuracy < found.natural_accuracy
    assert set(found.log["fell_to"]) == {None, f"transfer-{attack}"}
    assert found.log["surrogate"] == {"model": "Sequential", "weights_sha256": weights_sha256(surrogate)}
    assert found.log["weights_sha256"] == weights_sha256(model)


def test_what_autoattack_says_of_a_surrogate_is_not_said_of_the_model():
    model, surrogate = network(), MODELS["masked"]()
    data = batch(model, count=5, wrong=1)
    found = evaluate(model, *data, eps="6/255", attacks=["transfer-apgd-dlr"], surrogate=surrogate, progress=False)
    assert (found.log["warnings"], found.log["unreliable"]) == ([], False)


def test_transfer_behind_the_standard_attacks_is_not_standard_and_other_surrogates_are_refused(tmp_path):
    model = network()
    images, labels = batch(model, count=5, wrong=1)
    options = {"eps": "2/255", "attacks": ["standard", "transfer-square"], "progress": False}
    parameters = {"transfer-square": {"n_queries": 5}}
    path = tmp_path / "a.json"
    found = evaluate(model, images, labels, surrogate=network(seed=1), parameters=parameters, log=path, **options)
    plain = evaluate(model, images, labels, eps="2/255", progress=False)
    assert (found.log["attacks"], found.standard) == ([*STANDARD, "transfer-square"], False)
    assert found.log["parameters"] == parameters
    assert [by for by in found.log["fell_to"] if by in STANDARD] == [by for by in plain.log["fell_to"] if by]
    assert weights_sha256(network(seed=1)) in write_report(found, tmp_path).read_text()
    with message("has other surrogate"):
        evaluate(model, images, labels, surrogate=network(seed=2), parameters=parameters, log=path, **options)
    with message("evaluate surrogate: it must have the 10 classes of the model, got 7"):
        evaluate(model, images, labels, surrogate=network(7), **options)
    with message("evaluate surrogate: it must take images of (3, 8, 8), but raised: "):
        evaluate(model, images, labels, surrogate=network(channels=1), **options)
    with message("`surrogate` is what transfer attacks are computed on, got one, but no attack named transfer-..."):
        evaluate(model, images, labels, surrogate=network(), eps="2/255")


# --- batch size and precision ----------------------------------------------------------------------------------------


def test_what_an_image_keeps_for_the_backward_is_measured():
    model = network()
    images = torch.rand(1, 3, 8, 8)
    # The image for the weights of the convolution, 8x4x4 outputs of the ReLU that the last layer keeps as well.
    for count in (1, 2):
        assert memory._kept(model, images.repeat(count, 1, 1, 1))[0] == count * 4 * (3 * 8 * 8 + 8 * 4 * 4)


EACH = 3 * 4 * (192 + 128) + 24 * 4 * 192


@pytest.mark.parametrize(
    ("free", "size"), [(1e12, 1024), (1024 * EACH, 1024), (1024 * EACH - 1, 512), (16 * EACH, 16), (None, 128)]
)
def test_the_batch_is_the_largest_that_fits(free, size, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_free", lambda device: free)
    model = network()
    images, labels = batch(model)
    options = {"eps": "3/255", "attacks": ["apgd-ce"], "log": tmp_path / "log.json", "progress": False}
    found = evaluate(model, images, labels, batch_size="auto", **options)
    assert found.log["batch_size"] == size
    monkeypatch.setattr(memory, "_free", lambda device: 40 * EACH)
    again = evaluate(model, images, labels, batch_size="auto", **options)
    assert again.log["batch_size"] == size
    assert evaluate(model, images, labels, batch_size="auto", eps="1/255", attacks=["fab"]).log["batch_size"] == 16
    with message("`model` must give logits of shape (1, C) for 1 images, got a tuple"):
        evaluate(Changed(after=lambda logits: (logits,)), images, labels, batch_size="auto", eps="1/255")
    monkeypatch.setattr(memory, "_free", lambda device: 15 * EACH)
    with message("batch_size='auto' needs memory for 16 images"):
        evaluate(model, images, labels, batch_size="auto", eps="1/255", attacks=["apgd-ce"])


def test_a_size_that_does_not_run_is_halved(monkeypatch):
    def limited(images):
        if len(images) > 100:
            raise torch.cuda.OutOfMemoryError("none")
        return images

    model = Changed(limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert [memory._runs(model, torch.rand(1, 3, 8, 8), size) for size in (64, 100, 128)] == [True, True, False]


def test_control_groups_limit_the_memory(tmp_path):
    own, root, info = tmp_path / "cgroup", tmp_path / "fs", tmp_path / "meminfo"
    info.write_text("MemTotal: 9 kB\nMemAvailable:    300 kB\n")
    assert list(memory._machine(info)) == [300 * 1024]

    def group(path, **files):
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / path / name.replace("__", ".")).write_text(text)

    group(".", memory__max="9000\n", memory__current="1000\n")
    group("a", memory__max="max\n", memory__current="500\n")
    group("a/b", memory__max="4000\n", memory__current="3500\n", memory__stat="anon 3\ninactive_file 250\n")
    own.write_text("0::/a/b\n")
    assert sorted(memory._groups(own, root)) == [750, 8000]
    group("memory", memory__limit_in_bytes="700", memory__usage_in_bytes="600", memory__stat="total_inactive_file 50")
    own.write_text("3:cpu:/x\n2:memory,hugetlb:/docker/elsewhere\n")
    assert list(memory._groups(own, root)) == [150]
    assert list(memory._groups(tmp_path / "none", root)) == []


@pytest.mark.parametrize(("precision", "channels_last"), [("bfloat16", False), ("float32", True), ("bfloat16", True)])
def test_a_quick_look_is_autoattack_on_the_model_at_that_precision(precision, channels_last):
    model = network()
    images, labels = batch(model, count=6, wrong=1)
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.register_forward_hook(lambda _, given, logits: seen.append(logits.dtype))

    class Converted(nn.Module):
        def forward(self, images):
            images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                return model(images).float()

    words = f"{precision}, channels_last" if channels_last else precision
    for norm, eps, attacks in (("Linf", 4 / 255, ("apgd-dlr", "fab")), ("L2", 0.1, ("apgd-ce",))):
        found = evaluate(
            model,
            images,
            labels,
            eps=eps,
            norm=norm,
            attacks=attacks,
            batch_size=5,
            precision=precision,
            channels_last=channels_last,
            progress=False,
        )
        assert seen[-1] is (torch.bfloat16 if precision == "bfloat16" else torch.float32)
        assert seen[-2].is_contiguous(memory_format=torch.channels_last) == channels_last
        assert (found.log["precision"], found.standard) == (words, False)
        assert words in str(found)
        assert found.log["weights_sha256"] == weights_sha256(model)
        if not channels_last:  # whose gradients AutoAttack cannot view
            expected = autoattack(Converted().eval(), images, labels, eps=eps, norm=norm, attacks=attacks)
            assert torch.equal(found.adversarial_images(images), expected[0])
    assert words in submission_obstacles(model, "cifar10", eps="8/255", precision=words)[-1]
    with message("unknown precision `half`. Known: bfloat16, float32"):
        evaluate(model, images, labels, eps="1/255", precision="half")
