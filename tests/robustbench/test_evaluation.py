"""ikl_plugins.robustbench.evaluation: AutoAttack's own results, a log that survives, curves and corruptions."""

import collections
import contextlib
import copy
import errno
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from quick_autoattack import Interruption, Quick, batch, message, network, without_times
from torch import nn
from torchvision.transforms import Normalize

from ikl_plugins import _files, _progress
from ikl_plugins._robustbench_import import autoattack_facts, import_robustbench
from ikl_plugins.robustbench.data import Images, content_sha256
from ikl_plugins.robustbench.evaluation import curve, evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation, weights_sha256
from ikl_plugins.robustbench.loading import Normalised
from ikl_plugins.robustbench.preflight import preflight

robustbench = import_robustbench()
BenchmarkDataset, ThreatModel = robustbench.data.BenchmarkDataset, robustbench.data.ThreatModel
QUICK = ("apgd-ce", "apgd-t")
compiled = functools.partial(torch.compile, backend="eager")
# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)


OPTIONS = {"eps": "4/255", "attacks": QUICK, "batch_size": 5}
Whole = collections.namedtuple("Whole", "model images labels folder evaluation")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation that ran in one go, with its log in a folder."""
    model, folder = network(), tmp_path_factory.mktemp("whole")
    images, labels = batch(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quick)
        evaluation = evaluate(model, images, labels, log=folder / "log.json", **OPTIONS)
    assert [entry["batches"] for entry in evaluation.log["progress"]] == [3, 2]
    return Whole(model, images, labels, folder, evaluation)


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of its log."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path / "log.json"


def same(found, whole):
    """The same log, and the same adversarial images, which the file has too."""
    assert without_times(found.log) == without_times(whole.evaluation.log)
    expected = whole.evaluation.adversarial_images(whole.images)
    assert torch.equal(found.adversarial_images(whole.images), expected)


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.calls = 0
        self.eval()

    def forward(self, images):
        self.calls += 1
        return self.network(images)


def hooked(before=None, after=None, model=None):
    """A network that does something to its images or to what it gives, with the same weights."""
    model = network() if model is None else model
    if before is not None:
        model.register_forward_pre_hook(lambda _, given: (before(given[0]),))
    if after is not None:
        model.register_forward_hook(lambda _, given, found: after(given[0], found))
    return model.eval()


def sample(count=14, wrong=2, classes=10, seed=0):
    """A network, images and labels."""
    model = network(classes)
    return model, *batch(model, count, wrong, seed)


def autoattack(model, images, labels, *, batch_size, eps, norm="Linf", version="standard", attacks=(), seed=0):
    """One run of AutoAttack: adversarial images and predictions."""
    adversary = robustbench.eval.AutoAttack(
        model, norm=norm, eps=eps, seed=seed, verbose=False, version=version, attacks_to_run=attacks, device="cpu"
    )
    targets = model(images[:1]).shape[1] - 1
    adversary.apgd_targeted.n_target_classes = min(adversary.apgd_targeted.n_target_classes, targets)
    adversary.fab.n_target_classes = min(adversary.fab.n_target_classes, targets)
    return adversary.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)


def checked(model, images, labels, *, eps, attacks=None, progress=None, **options):
    """Our evaluation, which has found what one run of AutoAttack finds."""
    found = evaluate(model, images, labels, eps=eps, attacks=attacks, progress=progress, **options)
    if attacks is not None:
        options.update(version="custom", attacks=attacks)
    number = int(eps.split("/")[0]) / 255 if "/" in eps else float(eps)
    adversarial, predictions = autoattack(model, images, labels, eps=number, **options)
    assert torch.equal(found.adversarial_images(images), adversarial)
    assert found.log["predictions"] == predictions.tolist()
    assert found.log["robust"] == predictions.eq(labels).int().tolist()
    return found


# --- AutoAttack's results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "norm", "eps"),
    [("standard", "Linf", "4/255"), ("standard", "L2", "0.1"), ("plus", "Linf", "4/255"), ("rand", "Linf", "4/255")],
)
def test_the_result_is_autoattacks(version, norm, eps):
    found = checked(*sample(), eps=eps, norm=norm, version=version, batch_size=5, seed=3)
    assert 0 < found.robust_accuracy < found.natural_accuracy  # some fall, some stand
    expected = {
        "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
        "rand": ["apgd-ce", "apgd-dlr"],
    }
    assert found.log["attacks"] == expected[version]
    assert found.standard == (version == "standard")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_have_any_number_of_channels(channels, norm):
    model = Normalised(network(channels=channels), (0.5,), (0.5,)).eval()
    images, labels = batch(model, channels=channels)
    found = checked(model, images, labels, eps="4/255" if norm == "Linf" else "0.1", norm=norm, batch_size=14)
    assert found.robust_accuracy < found.natural_accuracy
    whole = Normalised(model.network, (0.5,) * channels, (0.5,) * channels)  # as torchvision's Normalize broadcasts
    assert torch.equal(whole(images), model(images))
    assert torch.equal(whole.network(Normalize((0.5,), (0.5,))(images)), model(images))
    if channels > 1:  # broadcasting would make as many of one
        with message(f"images must have {channels} channels, as `mean` has, got (14, 1, 8, 8)"):
            whole(images[:, :1])


@pytest.mark.parametrize(
    "attacks", [("apgd-t", "apgd-ce"), ("apgd-dlr",), ("fab-t", "fab"), ("fab", "fab-t"), ("square", "apgd-ce")]
)
def test_named_attacks_are_autoattacks_in_their_order(attacks):
    model, images, labels = sample(count=8)
    model, ours = Counted(model), []
    found = checked(
        model, images, labels, eps="4/255", attacks=attacks, batch_size=3, progress=lambda _: ours.append(model.calls)
    )
    assert (found.log["version"], found.log["standard"], found.log["attacks"]) == ("custom", False, list(attacks))
    # Restarts may find nothing more, but take their passes. Ours are three on natural images, and one more within
    # AutoAttack's checks; theirs are three as well, and one of `autoattack` to count the classes.
    assert ours[-1] - 3 - 1 == model.calls - ours[-1] - 1 - 3


def test_the_layout_of_the_images_does_not_matter():
    model, images, labels = sample()
    expected = evaluate(model, images, labels, eps="4/255", attacks=["apgd-ce"])
    for other in (images.to(memory_format=torch.channels_last), images.double()):
        found = evaluate(model, other, labels.int(), eps="4/255", attacks=["apgd-ce"])
        assert without_times(found.log) == without_times(expected.log)
        assert torch.equal(found.adversarial_images(images), expected.adversarial_images(images))


@contextlib.contextmanager
def changed(set_it, get_it, value):
    """Something of torch's own, set for a while."""
    before = get_it()
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


CONDITIONS = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: changed(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
    ),
    "double by default": lambda: changed(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "another device by default": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_the_program_has_switched_on_does_not_reach_the_attacks(name, whole, tmp_path):
    def states():
        return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()

    with CONDITIONS[name]():
        before = states()
        found = evaluate(whole.model, whole.images, whole.labels, log=tmp_path / "log.json", **OPTIONS)
        assert states() == before
    same(found, whole)


def test_a_model_and_images_made_in_inference_mode_are_attacked_too(whole, tmp_path):
    with torch.inference_mode():
        model = network()
        images, labels = batch(model)
        found = evaluate(model, images, labels, log=tmp_path / "log.json", **OPTIONS)
        points = curve(model, images, labels, ["4/255"], attacks=QUICK, batch_size=5)
        checks = preflight(model, images, labels)
    same(found, whole)
    assert points[0]["robust"] == whole.evaluation.log["robust"]
    assert checks == preflight(whole.model, whole.images, whole.labels)


class Converted(nn.Module):
    """A network of another precision, behind images and logits of the given dtypes."""

    def __init__(self, dtype, images, logits):
        super().__init__()
        self.network, self.images, self.logits = network().to(dtype), images, logits
        self.eval()

    def forward(self, images):
        return self.network(images.to(self.images)).to(self.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_named_and_may_be_converted(dtype):
    images, labels = batch(network())
    word = str(dtype).removeprefix("torch.")
    with message(f"`model` must take float32 images, but has {word} weights and fails (Input type"):
        evaluate(network().to(dtype), images, labels, **OPTIONS)
    with message(f"`model` must give float32 logits, as AutoAttack keeps its losses in it, got {dtype}. Return"):
        evaluate(Converted(dtype, dtype, dtype), images, labels, **OPTIONS)
    found = checked(Converted(dtype, dtype, torch.float32), images, labels, **OPTIONS)
    assert found.log["dtype"] == word
    with message("`model` must have values, but 0.weight is on the meta device. Load its weights."):
        evaluate(network().to("meta"), images, labels, **OPTIONS)


def test_an_accuracy_no_better_than_chance_is_a_warning_before_the_attacks():
    model, images, labels = sample(count=20, wrong=17)
    made, why = [], r"^evaluate: 3 of 20 natural images are right, no more than by chance \(10 %\): check that the"
    with pytest.warns(UserWarning, match=why):
        evaluate(model, images, labels, progress=made.append, **OPTIONS)
    assert made


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(terminal, monkeypatch):
    model, images, labels = sample()
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    log = evaluate(model, images, labels, progress=True, **OPTIONS).log
    lines = [
        f"{entry['attack']}: {entry['standing']} of 14 standing ({entry['batches']} of {entry['batches']} batches)"
        for entry in log["progress"]
    ]
    text = shown.getvalue()
    if terminal:
        for entry in log["progress"]:
            end = f"{entry['batches']}/{entry['batches']} "
            assert re.search(rf"{entry['attack']}: 100%.* {end}.*, {entry['standing']} of 14 standing\]", text), text
    else:
        assert text.splitlines() == lines
    monkeypatch.setattr(_progress, "_SECONDS", 0)  # half a minute after each line
    curve(model, images, labels, ["4/255"], attacks=["apgd-ce"], batch_size=5)
    assert terminal or len(shown.getvalue().removeprefix(text).splitlines()) == 3
    assert "eps 4/255, apgd-ce: " in shown.getvalue().removeprefix(text)
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    evaluate(model, images, labels, progress=False, **OPTIONS)
    assert shown.getvalue() == ""
    with message("`progress` must be True, False or a function, got 'bar'", TypeError):
        evaluate(model, images, labels, progress="bar", **OPTIONS)


def test_the_numbers_are_those_of_robustbench(monkeypatch, capsys):
    model = network()
    images, labels = batch(model, count=10)
    table = robustbench.data._clean_dataset_loaders
    monkeypatch.setitem(table, BenchmarkDataset.cifar_10, lambda n, folder, transform: (images[:n], labels[:n]))
    attack = functools.partial(robustbench.eval.AutoAttack, seed=7)
    monkeypatch.setattr(robustbench.eval, "AutoAttack", attack)
    natural, robust = robustbench.benchmark(model, n_examples=10, dataset="cifar10", eps=4 / 255, batch_size=4)
    monkeypatch.setattr(robustbench.eval, "AutoAttack", attack.func)
    found = evaluate(model, images, labels, eps="4/255", batch_size=4, seed=7)
    assert (found.natural_accuracy, found.robust_accuracy) == pytest.approx((100 * natural, 100 * robust))
    assert 0 < robust < natural


def test_expectation_over_noise_is_autoattacks(tmp_path):
    # Too little to change a prediction on natural images.
    model = hooked(lambda images: images + 1e-3 * torch.randn_like(images))
    images, labels = batch(network())
    options = {"eps": "4/255", "version": "rand", "batch_size": 5}
    found = checked(model, images, labels, **options)
    resumed = interrupted(model, images, labels, after=2, log=tmp_path / "log.json", **options)
    assert without_times(resumed.log) == {**without_times(found.log), "adversarial": "log_adversarial"}


def test_natural_images_are_not_looked_at_again_before_each_batch():
    """AutoAttack looks once; with each further look a random model could fall without an attack."""
    right = torch.tensor([1.0, 0.5, 0.1, 0.0])
    model = Counted(hooked(after=lambda images, _: images.mean((1, 2, 3))[:, None] * right))
    images, labels = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    evaluate(model, images, labels, eps="1/255", version="rand", batch_size=1)
    # For two images each: one pass on the natural image; in both attacks one of its own, three for each of the eight
    # steps and the start, and one on what was found. And AutoAttack's checks with the first image: two, and one for
    # the accuracy.
    assert model.calls == 2 * (1 + 2 * (1 + 3 * 9 + 1)) + 3


def test_what_a_model_draws_comes_from_the_seed():
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 4
    guessing = hooked(after=lambda images, _: torch.rand(len(images), 4) + 0 * images.sum((1, 2, 3))[:, None])
    logs = []
    for ambient, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(ambient)
        logs.append(evaluate(guessing, images, labels, eps="1/255", version="rand", seed=seed).log)
    assert logs[0]["natural_predictions"] == logs[1]["natural_predictions"] != logs[2]["natural_predictions"]
    assert logs[0]["predictions"] == logs[1]["predictions"]


# --- few classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "targets"), [(4, 3), (5, 4), (10, 9), (12, 9)])
def test_the_targets_are_at_most_the_other_classes(classes, targets):
    found = checked(*sample(6, classes=classes), eps="6/255", attacks=["apgd-t", "fab-t"], batch_size=4)
    assert (found.log["n_target_classes"], found.log["n_classes"], found.log["dropped"]) == (targets, classes, [])
    assert not found.standard


@pytest.mark.parametrize("classes", [2, 3])
def test_below_four_classes_nothing_with_dlr_runs_and_the_result_is_not_standard(classes):
    model, images, labels = sample(5, 1, classes)
    found = evaluate(model, images, labels, eps="2/255", version="standard")
    assert found.log["attacks"] == ["apgd-ce", "fab-t", "square"]
    assert found.log["dropped"] == [
        {"attack": "apgd-t", "reason": f"its loss needs 4 classes, and the model has {classes}"}
    ]
    assert (found.standard, found.log["version"], found.log["n_target_classes"]) == (False, "standard", classes - 1)
    assert found.finished
    with message(f"with {classes} classes, got apgd-dlr, apgd-t"):
        evaluate(model, images, labels, eps="2/255", attacks=["apgd-dlr", "apgd-t"])


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_says_everything(tmp_path):
    model, images, labels = sample()
    checkpoint, path, made = tmp_path / "weights.pt", tmp_path / "log.json", []
    torch.save(model.state_dict(), checkpoint)
    data = Images(images, labels, tuple("abcdefghij"), "made up", "not read", None, "Res224")
    facts = {"checkpoint": checkpoint, "data": data, "model_name": "small"}
    evaluate(model, images, labels, seed=4, log=path, progress=made.append, **facts, **OPTIONS)
    log = json.loads(path.read_text())
    options = {"batch_size": 5, "eps": 4 / 255, "version": "custom", "seed": 4}
    adversarial, predictions = autoattack(model, images, labels, attacks=QUICK, **options)
    first, _ = autoattack(model, images, labels, attacks=["apgd-ce"], **options)
    fell, fell_first = ((found != images).flatten(1).any(1) for found in (adversarial, first))
    standing = [12 - int(fell_first.sum()), 12 - int(fell.sum())]
    assert 0 < standing[1] < standing[0] < 12
    names = [QUICK[0] if early else QUICK[1] if late else None for early, late in zip(fell_first, fell, strict=True)]
    expected = {
        "format": "ikl_plugins.robustbench.evaluation/2",
        "model": "small",
        "checkpoint": {"name": "weights.pt", "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()},
        "weights_sha256": weights_sha256(model),
        "dtype": "float32",
        "seed": 4,
        "threat_model": "Linf",
        "dataset": None,
        "eps": "4/255",
        "eps_value": 4 / 255,
        "version": "custom",
        "standard": False,
        "attacks": ["apgd-ce", "apgd-t"],
        "parameters": {},
        "own_attacks": {},
        "surrogate": None,
        "precision": "float32",
        "autoattack": autoattack_facts(),
        "dropped": [],
        "n_target_classes": 9,
        "n_classes": 10,
        "n_examples": 14,
        "batch_size": 5,
        "classes": list("abcdefghij"),
        "labels": labels.tolist(),
        "natural_predictions": model(images).argmax(1).tolist(),
        "natural_correct": [0, 0] + [1] * 12,
        "natural_accuracy": pytest.approx(100 * 12 / 14),
        "predictions": predictions.tolist(),
        "robust": predictions.eq(labels).int().tolist(),
        "robust_accuracy": pytest.approx(100 * standing[1] / 14),
        "fell_to": names,
        "warnings": [],
        "unreliable": False,
        "adversarial": "log_adversarial",
        "finished": True,
    }
    assert {key: log[key] for key in expected} == expected
    assert set(log) == {*expected, "data", "versions", "date", "device", "progress", "seal"}
    digest = content_sha256(images, labels)
    facts = {"name": "made up", "source": None, "sha256": digest, "n_examples": 14, "preprocessing": "Res224"}
    assert log["data"] == facts
    assert set(log["versions"]) == {"python", "torch", "torchvision", "robustbench", "ikl_plugins"}
    batches = [3, -(-standing[0] // 5)]
    assert [{**entry, "seconds": 0, "keys": len({*entry["keys"]})} for entry in log["progress"]] == [
        {"attack": name, "standing": left, "seconds": 0, "batches": number, "batches_done": number, "keys": number}
        for name, left, number in zip(QUICK, standing, batches, strict=True)
    ]
    files = [
        f"{place}-{entry['attack']}-{number:05d}-{key}.npz"
        for place, entry in enumerate(log["progress"])
        for number, key in enumerate(entry["keys"])
    ]
    (natural,) = (tmp_path / "log_adversarial").glob("natural-*.npz")
    assert sorted(file.name for file in natural.parent.iterdir()) == [*files, natural.name]
    first = np.load(natural.parent / files[0])
    assert [*first["index"], *first["fell"]] == [2, 3, 4, 5, 6, *(i for i in range(2, 7) if fell_first[i])]
    assert np.array_equal(first["image"], adversarial[first["fell"]])
    assert first["prediction"].tolist() == predictions[first["fell"]].tolist()
    assert [(event.attack, event.batch, event.batches, event.n_examples) for event in made] == [
        (name, batch + 1, number, 14) for name, number in zip(QUICK, batches, strict=True) for batch in range(number)
    ]


def test_a_log_is_read_with_its_images_and_without(copied, whole, tmp_path):
    loaded = Evaluation.load(copied)
    assert loaded.log == whole.evaluation.log
    same(loaded, whole)
    (tmp_path / "elsewhere").mkdir()
    loaded.save(tmp_path / "elsewhere" / "copy.json")
    alone = Evaluation.load(tmp_path / "elsewhere" / "copy.json")
    assert (alone.log, alone.adversarial) == (loaded.log, None)
    with message("the images must be beside the log, but were not kept"):
        alone.adversarial_images(whole.images)


def test_a_log_of_which_nothing_fell_needs_no_images(tmp_path):
    model, images, labels = sample()
    found = evaluate(model, images, labels, eps=1e-9, attacks=["apgd-ce"], log=tmp_path / "log.json")
    assert found.robust_accuracy == found.natural_accuracy
    shutil.rmtree(tmp_path / "log_adversarial")
    assert torch.equal(Evaluation.load(tmp_path / "log.json").adversarial_images(images), images)


def test_the_caller_keeps_random_numbers_weights_and_tracer(monkeypatch):
    model, images, labels = sample()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    traced = []
    monkeypatch.setattr(sys, "settrace", traced.append)
    monkeypatch.setattr(sys, "gettrace", lambda: "the tracer")
    evaluate(model, images, labels, eps="4/255", attacks=["apgd-ce"])
    assert traced[-1] == "the tracer"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_warning_of_autoattack_is_in_the_log_once_whatever_its_number():
    model = hooked(lambda images: images.round() + 0 * images)
    images, labels = batch(model)
    found = evaluate(model, images, labels, eps="4/255", attacks=["apgd-dlr"], batch_size=5)
    assert [re.sub(r"\d+", "N", text)[:35] for text in found.log["warnings"]] == ["there are N points with zero gradie"]
    assert logging.getLogger("auto-attack").handlers == []


# --- going on --------------------------------------------------------------------------------------------------------


def interrupted(model, images, labels, *, after, log, **options):
    """A run that is stopped after so many batches, and another that goes on."""
    count = 0

    def stop(_):
        nonlocal count
        count += 1
        if count == after:
            raise Interruption

    with pytest.raises(Interruption):
        evaluate(model, images, labels, log=log, progress=stop, **options)
    assert not Evaluation.load(log).finished
    return evaluate(model, images, labels, log=log, **options)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, whole, after):
    path = tmp_path / "log.json"
    resumed = interrupted(whole.model, whole.images, whole.labels, after=after, log=path, **OPTIONS)
    same(resumed, whole)
    same(Evaluation.load(path), whole)
    assert Evaluation.load(path).log == resumed.log


def test_fab_after_fab_t_goes_on_with_autoattacks_restarts(tmp_path):
    """In AutoAttack fab-t leaves fab with one restart, which shows in the number of passes."""
    model = Counted(network())
    images, labels = batch(model, count=6, wrong=0)
    options = {"eps": "3/255", "attacks": ("fab-t", "fab"), "batch_size": 6}
    counts = []
    whole = evaluate(model, images, labels, progress=lambda _: counts.append(model.calls), **options)
    assert len(counts) == 2
    resumed = interrupted(model, images, labels, after=1, log=tmp_path / "log.json", **options)
    assert torch.equal(resumed.adversarial_images(images), whole.adversarial_images(images))
    with pytest.raises(Interruption):
        evaluate(model, images, labels, log=tmp_path / "new.json", progress=stop, **options)
    model.calls = 0
    evaluate(model, images, labels, log=tmp_path / "new.json", **options)
    assert model.calls == counts[1] - counts[0] + 1  # and one on the natural images


def stop(_):
    raise Interruption


def test_a_finished_run_is_only_read(copied, whole, monkeypatch):
    def perturb(*_):
        raise AssertionError("an attack ran again")

    monkeypatch.setattr(type(Quick(whole.model, norm="Linf", eps=0.1, verbose=False).apgd), "perturb", perturb)
    again = evaluate(whole.model, whole.images, whole.labels, log=copied, **OPTIONS)
    assert again.log == whole.evaluation.log
    same(again, whole)


def test_a_file_of_a_run_killed_between_its_images_and_its_log_does_no_harm(tmp_path, whole, monkeypatch):
    replace, logs, path = os.replace, 0, tmp_path / "log.json"

    def stop(source, target):
        nonlocal logs
        logs += str(target).endswith("log.json")
        if logs == 4 and str(target).endswith("log.json"):
            raise Interruption
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "replace", stop)
        with pytest.raises(Interruption):
            evaluate(whole.model, whole.images, whole.labels, log=path, **OPTIONS)
    files = sorted(path.name[:15] for path in (tmp_path / "log_adversarial").iterdir())
    assert files == ["0-apgd-ce-00000", "0-apgd-ce-00001", "0-apgd-ce-00002", files[-1]]
    loaded = Evaluation.load(path)
    assert loaded.log["progress"][0]["batches_done"] == 2
    assert set(loaded.adversarial) <= set(range(7, 12))  # the first two are wrong without an attack
    same(evaluate(whole.model, whole.images, whole.labels, log=path, **OPTIONS), whole)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"eps": "6/255"}, f"eps_value {4 / 255} instead of {6 / 255}"),
        ({"norm": "L2"}, 'threat_model "Linf" instead of "L2"'),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"batch_size": 4}, "batch_size 5 instead of 4"),
        ({"attacks": ["apgd-ce"]}, 'attacks ["apgd-ce", "apgd-t"] instead of ["apgd-ce"]'),
        ({"attacks": ["apgd-t", "apgd-ce"]}, 'attacks ["apgd-ce", "apgd-t"] instead of ["apgd-t", "apgd-ce"]'),
        ({"attacks": None}, 'version "custom" instead of "standard"; attacks'),
        ({"model": network(seed=1)}, "weights"),
        ({"labels": torch.arange(14) % 10}, "data"),
        ({"images": torch.zeros(14, 3, 8, 8)}, "data"),
        ({"images": torch.zeros(9, 3, 8, 8), "labels": torch.zeros(9).long()}, "n_examples 14 instead of 9; data"),
        ({"model": hooked(lambda images: 1 - images)}, "predictions on the natural images"),
    ],
)
def test_the_log_of_another_evaluation_is_refused(copied, whole, changes, text):
    given = {"model": whole.model, "images": whole.images, "labels": whole.labels, "log": copied, **OPTIONS}
    before = copied.read_bytes()
    with message(f"`log` must be new or of the same evaluation, but {copied} has other {text}"):
        evaluate(**{**given, **changes})
    assert copied.read_bytes() == before


@pytest.mark.parametrize("package", ["torch", "robustbench", "autoattack"])
def test_a_log_from_other_versions_is_refused(copied, whole, package):
    found = Evaluation.load(copied)
    versions, key = (found.log[package], "version") if package == "autoattack" else (found.log["versions"], package)
    versions[key] = "0.1"
    found.save(copied)
    with pytest.raises(
        ValueError, match=rf"`log` must be new .* has other (version of )?{package} .*\b0\.1\b.* instead of"
    ):
        evaluate(whole.model, whole.images, whole.labels, log=copied, **OPTIONS)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.DataParallel(compiled(model)), "inside"])
def test_a_wrapped_model_goes_on_with_the_log_of_the_plain_one(wrap, copied, whole):
    interrupted(whole.model, whole.images, whole.labels, after=2, log=copied.parent / "plain.json", **OPTIONS)
    if wrap == "inside":
        wrapped = copy.deepcopy(whole.model)
        name, part = next(iter(wrapped.named_children()))
        setattr(wrapped, name, compiled(part))
    else:
        wrapped = wrap(whole.model)
    resumed = evaluate(wrapped.eval(), whole.images, whole.labels, log=copied.parent / "plain.json", **OPTIONS)
    assert without_times(resumed.log)["fell_to"] == whole.evaluation.log["fell_to"]
    for key in ("model", "weights_sha256"):
        assert resumed.log[key] == whole.evaluation.log[key]


def test_a_damaged_batch_is_refused_and_a_lost_one_runs_again(copied, whole):
    part = min((copied.parent / "log_adversarial").iterdir())
    part.write_bytes(part.read_bytes()[:-40])
    for read in (
        lambda: evaluate(whole.model, whole.images, whole.labels, log=copied, **OPTIONS),
        lambda: Evaluation.load(copied),
    ):
        with message(f"{part} must be the file of a batch, but is damaged"):
            read()
    part.unlink()
    with message(f"{part.parent} must hold all batches of the log, but lacks {part.name}"):
        Evaluation.load(copied)
    same(evaluate(whole.model, whole.images, whole.labels, log=copied, **OPTIONS), whole)
    same(Evaluation.load(copied), whole)


def test_adversarial_images_that_are_damaged_in_any_way_are_refused(copied, whole):
    """Readers of damaged files raise nearly anything; whatever it is, the message has the file's name."""
    part = max((copied.parent / "log_adversarial").glob("0-*"), key=lambda path: path.stat().st_size)
    content = part.read_bytes()
    directory = content.rindex(b"PK\x01\x02")  # of the archive: the entry of its last file
    messages, kinds = set(), set()
    for place in range(directory, len(content)):
        part.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        try:
            loaded = Evaluation.load(copied)
        except ValueError as error:
            messages.add(str(error).split("(")[0])
            kinds.add(type(error.__cause__))
        else:  # a date or the like
            same(loaded, whole)
    assert messages == {f"Evaluation: {part} must be the file of a batch, but is damaged "}
    assert {NotImplementedError, KeyError, zipfile.BadZipFile} <= kinds
    with np.load(io.BytesIO(content)) as sound:
        parts = dict(sound)
    for changed in ({"fell": parts["fell"][:-1]}, {"key": "0" * 16}):
        np.savez(part, **{**parts, **changed})
        with message(f"Evaluation: {part} must be the file of a batch, but is damaged"):
            Evaluation.load(copied)


def test_files_of_other_evaluations_are_left_alone_and_serve_again(tmp_path, monkeypatch):
    model, images, labels = sample()
    path = tmp_path / "log.json"
    (tmp_path / "mine").mkdir()  # a folder of the user's, behind a link where the batches go
    (tmp_path / "log_adversarial").symlink_to("mine")
    for name in ("0-apgd-ce-00000.npz", "images.npz", ".images.1-00000000.partial.npz"):
        (tmp_path / "mine" / name).write_text("mine")
    first = evaluate(model, images, labels, eps="9/255", attacks=["apgd-ce"], batch_size=2, log=path)
    before = {file: file.read_bytes() for file in (tmp_path / "log_adversarial").iterdir()}
    path.unlink()
    options = {"eps": "4/255", "attacks": ["apgd-ce"], "batch_size": 5}
    found = evaluate(model, images, labels, log=path, **options)
    assert torch.equal(Evaluation.load(path).adversarial_images(images), found.adversarial_images(images))
    assert without_times(found.log) == {
        **without_times(evaluate(model, images, labels, **options).log),
        "adversarial": "log_adversarial",
    }
    assert {file: file.read_bytes() for file in before} == before
    path.unlink()
    attack = type(Quick(model, norm="Linf", eps=0.1, verbose=False).apgd)
    monkeypatch.setattr(attack, "perturb", None)  # nothing is attacked again
    again = evaluate(model, images, labels, eps="9/255", attacks=["apgd-ce"], batch_size=2, log=path)
    assert without_times(again.log) == without_times(first.log)
    model.register_forward_pre_hook(lambda _, given: (1 - given[0],))
    path.unlink()
    with message("natural-"):
        evaluate(model, images, labels, eps="9/255", attacks=["apgd-ce"], batch_size=2, log=path)


FORMAT = "ikl_plugins.robustbench.evaluation/2"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"format": "ikl', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[1]", "got list"),
        (b'{"a": 1}', "got None"),
        (json.dumps({"format": FORMAT, "versions": {}}).encode(), "lacks weights_sha256"),
    ],
)
def test_a_file_that_is_no_log_is_refused_and_kept(tmp_path, content, text):
    path = tmp_path / "log.json"
    path.write_bytes(content)
    model = network()
    for read in (lambda: Evaluation.load(path), lambda: evaluate(model, *batch(model), eps="4/255", log=path)):
        with message(text) as caught:
            read()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    with message(f"there is none at {tmp_path / 'none'}"):
        Evaluation.load(tmp_path / "none")


@pytest.mark.parametrize("what", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_log(tmp_path, whole, monkeypatch, what):
    path = tmp_path / "log.json"
    given = (whole.model, whole.images, whole.labels)
    with pytest.raises(Interruption):
        evaluate(*given, log=path, progress=stop, **OPTIONS)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, what, full)
        with pytest.raises(OSError, match="No space left on device"):
            evaluate(*given, log=path, **OPTIONS)
    assert path.read_bytes() == before
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name]
    same(evaluate(*given, log=path, **OPTIONS), whole)


# --- refusals --------------------------------------------------------------------------------------------------------


def without_class_2(_, logits):
    return logits + torch.tensor([0, 0, torch.nan] + [0] * 7)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"norm": "linf"}, ValueError, "norm `linf`. Did you mean `Linf`?"),
        ({"version": "standart"}, ValueError, "version `standart`. Did you mean `standard`?"),
        ({"attacks": ["apgd"]}, ValueError, "attack `apgd`. Did you mean `apgd-t`?"),
        ({"attacks": "square"}, TypeError, "`attacks` must be a sequence"),
        ({"attacks": []}, ValueError, "got []"),
        ({"attacks": ["square"] * 2}, ValueError, "got ['square', 'square']"),
        ({"attacks": ["square"], "version": "plus"}, ValueError, "version='plus'"),
        ({"eps": 0}, ValueError, "`eps` must be above 0"),
        ({"eps": "8:255"}, ValueError, "got '8:255'"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be"),
        ({"batch_size": 2.0}, TypeError, "got 2.0"),
        ({"batch_size": True}, TypeError, "got True"),
        ({"seed": None}, TypeError, "`seed` must be an integer"),
        ({"seed": True}, TypeError, "got True"),
        ({"seed": 2**64}, ValueError, "`seed` must lie from -2^63 to 2^64 - 1"),
        ({"model": lambda images: images}, TypeError, "got function"),
        ({"model": network().train()}, ValueError, "must be in eval mode"),
        ({"model": network(1)}, ValueError, "at least 2 classes, got 1"),
        ({"model": nn.ReLU().eval()}, ValueError, "got shape (3, 3"),
        ({"model": hooked(after=lambda images, logits: (logits, images))}, ValueError, "got a tuple"),
        ({"model": hooked(after=without_class_2)}, ValueError, "finite logits, got 3 of 30"),
        ({"images": torch.rand(3, 8, 8)}, TypeError, "`images` must be a floating tensor"),
        ({"images": torch.ones(3, 3, 8, 8).byte()}, TypeError, "got torch.uint8"),
        ({"images": [1]}, TypeError, "got list"),
        ({"images": torch.full((3, 3, 8, 8), 1.5)}, ValueError, "got values from 1.5"),
        ({"images": -torch.ones(3, 3, 8, 8)}, ValueError, "got values from -1"),
        ({"images": torch.rand(0, 3, 8, 8)}, ValueError, "at least one image"),
        ({"labels": torch.zeros(3)}, TypeError, "got torch.float32"),
        ({"labels": torch.ones(3).bool()}, TypeError, "got torch.bool"),
        ({"labels": [0, 1, 2]}, TypeError, "`labels` must be a tensor of class indices"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "got (2,)"),
        ({"labels": torch.tensor([0, 1, 10])}, ValueError, "must lie in [0, 9]"),
        ({"labels": torch.tensor([0, -1, 2])}, ValueError, "got values from -1"),
    ],
)
def test_bad_input_is_refused(changes, kind, text):
    given = {"model": network(), "images": torch.rand(3, 3, 8, 8), "labels": torch.tensor([0, 1, 2]), "eps": "8/255"}
    with message(text, kind):
        evaluate(**{**given, **changes})


def test_parts_in_training_mode_are_for_random_models_alone():
    model = nn.Sequential(nn.Dropout(0.1), network()).eval()
    model[0].train()
    images, labels = batch(model[1], count=4)
    with message("in training mode: 0"):
        evaluate(model, images, labels, eps="1/255")
    assert evaluate(model, images, labels, eps="1/255", version="rand").finished
    assert model[0].training


# --- the curve -------------------------------------------------------------------------------------------------------


def test_a_curve_never_rises_and_each_point_is_an_attack_on_those_who_stand():
    model = network()
    images, labels = batch(model, count=10)
    made = []
    radii = ["6/255", "1/255", "3/255", "120/255"]
    points = curve(
        model,
        images,
        labels,
        radii,
        attacks=["apgd-ce"],
        batch_size=4,
        progress=lambda eps, event: made.append((str(eps), event)),
    )
    standing = torch.arange(10)
    for point, eps in zip(points, ("1/255", "3/255", "6/255", "120/255"), strict=True):
        number = int(eps.split("/")[0]) / 255
        _, predictions = autoattack(
            model, images[standing], labels[standing], batch_size=4, eps=number, version="custom", attacks=["apgd-ce"]
        )
        standing = standing[predictions == labels[standing]]
        robust = [int(index in standing.tolist()) for index in range(10)]
        assert point == {
            "eps": eps,
            "eps_value": number,
            "robust_accuracy": pytest.approx(10 * len(standing)),
            "robust": robust,
            "attacks": ["apgd-ce"],
        }
    values = [point["robust_accuracy"] for point in points]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 2
    assert values[-1] == 0
    assert list(dict.fromkeys(eps for eps, _ in made)) == ["1/255", "3/255", "6/255", "120/255"]


def test_a_curve_goes_on_where_all_have_fallen_and_from_its_logs(tmp_path, monkeypatch):
    model, images, labels = sample()
    radii = ["2/255", "120/255", "130/255"]
    first = curve(model, images, labels, radii, attacks=["apgd-ce"], folder=tmp_path, seed=2)
    assert [point["robust_accuracy"] for point in first][1:] == [0, 0]
    assert (first[2]["attacks"], first[2]["robust"]) == ([], [0] * 14)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["eps_2-255.json", "eps_2-255_120-255.json"]
    attack = type(Quick(model, norm="Linf", eps=0.1, verbose=False).apgd)
    monkeypatch.setattr(attack, "perturb", None)  # nothing is attacked again
    assert curve(model, images, labels, radii, attacks=["apgd-ce"], folder=tmp_path, seed=2) == first
    with message("has other seed 2 instead of 0"):
        curve(model, images, labels, radii, attacks=["apgd-ce"], folder=tmp_path)


NO_RADII = [
    ("8/255", TypeError, "`radii` must be a sequence"),
    ([], ValueError, "`radii` must hold at least one"),
    (["4/255", "2/255", "8/510"], ValueError, "4/255 and 8/510 are one"),
    (["x"], ValueError, "curve: `eps`"),
]


@pytest.mark.parametrize(("radii", "kind", "text"), NO_RADII)
def test_radii_that_make_no_curve_are_refused(radii, kind, text):
    model = network()
    with message(text, kind):
        curve(model, *batch(model), radii)


# --- checksums -------------------------------------------------------------------------------------------------------


def test_the_checksum_of_weights():
    state = {
        "b.weight": torch.tensor([[1.5, -2.0]]),
        "a.count": torch.tensor(3),
        "c.half": torch.tensor([0.5], dtype=torch.bfloat16),
    }
    expected = hashlib.sha256(
        b"a.count torch.int64 ()\n"
        + np.int64(3).tobytes()
        + b"b.weight torch.float32 (1, 2)\n"
        + np.array([1.5, -2.0], np.float32).tobytes()
        + b"c.half torch.bfloat16 (1,)\n"
        + b"\x00\x3f"
    )
    assert weights_sha256(state) == expected.hexdigest() == weights_sha256(dict(reversed(state.items())))
    model = network()
    assert weights_sha256(model) == weights_sha256(model.state_dict()) == weights_sha256(network())
    assert weights_sha256(model) != weights_sha256(network(seed=1))
    assert weights_sha256({"a": torch.zeros(2)}) != weights_sha256({"b": torch.zeros(2)})
    transposed = torch.rand(3, 2).t()
    assert weights_sha256({"a": transposed}) == weights_sha256({"a": transposed.contiguous()})
    assert weights_sha256({"a": 1}) != weights_sha256({"a": 2})
