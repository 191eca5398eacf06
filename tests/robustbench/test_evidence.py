"""A log that somebody has edited, files of batches that somebody has edited, and a model that is another one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from quick_autoattack import Harmless, Interruption, Quick, batch, message, network, robustbench

from ikl_plugins.robustbench import Images, verify
from ikl_plugins.robustbench.evaluation import curve, evaluate, evaluate_corruptions
from ikl_plugins.robustbench.evaluation.log import Evaluation, read_log, write_log

pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
CIFAR = robustbench.data.BenchmarkDataset.cifar_10, robustbench.data.ThreatModel.corruptions
VERIFICATION = importlib.import_module("ikl_plugins.robustbench.evaluation.verify")
NETWORK = network()
IMAGES, LABELS = batch(NETWORK)
DATA = Images(IMAGES, LABELS, tuple("abcdefghij"), "made up", "not read")


def interrupted(made):
    if made.attack == "apgd-t":
        raise Interruption


def standard(path):
    evaluation = evaluate(NETWORK, IMAGES, LABELS, eps="4/255", log=path, data=DATA, batch_size=5)
    options = {"attacks": ["apgd-ce"], "batch_size": 5, "progress": False}
    evaluation.log["curve"] = curve(NETWORK, IMAGES, LABELS, ["1/255", "3/255", "1"], **options)
    evaluation.save(path)


def unfinished(path):
    with pytest.raises(Interruption):
        evaluate(NETWORK, IMAGES, LABELS, eps="4/255", log=path, data=DATA, batch_size=5, progress=interrupted)


def corruptions(path):
    folder = path.parent / "CIFAR-10-C"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("fog", "snow"):
        np.save(folder / f"{name}.npy", random.integers(0, 256, (50000, 8, 8, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", random.integers(0, 10, 50000))
    header, errors = ["", *["fog"] * 5, *["snow"] * 5], ["AlexNet", *random.random(10)]
    rows = (header, ["", *[1, 2, 3, 4, 5] * 2], errors)
    baseline = path.with_name("alexnet.csv")
    baseline.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    options = {"n_examples": 14, "natural": DATA, "log": path, "baseline": baseline, "progress": False}
    evaluate_corruptions(NETWORK, "cifar10", data_dir=path.parent, **options)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quick)
        patch.setitem(robustbench.data.CORRUPTIONS_DICT[CIFAR[0]], CIFAR[1], ("fog", "snow"))
        yield


@pytest.fixture(scope="module", params=[standard, unfinished, corruptions], ids=lambda make: make.__name__)
def written(request, _quick, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param.__name__) / "evaluation.json"
    request.param(path)
    return path


@pytest.fixture(scope="module")
def small(_quick, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "evaluation.json"
    evaluate(NETWORK, IMAGES, LABELS, eps="8/255", attacks=["apgd-ce"], log=path, data=DATA, batch_size=5)
    return path


@pytest.fixture
def path(small, tmp_path):
    """Of an evaluation whose files a test may change."""
    shutil.copytree(small.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / small.name


# --- the log ---------------------------------------------------------------------------------------------------------


def nodes(value, place=()):
    """Every value of a log, by its place: numbers, texts, flags, lists and mappings."""
    if place:
        yield place, value
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(inner, (*place, key))


def changed(value, place):
    """Another value of the same kind, such as somebody would write."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 1 - value if value in (0, 1) and place[0] != "seed" else value + 1
    if isinstance(value, float):
        return value + 1 if value < 50 else value - 1
    if isinstance(value, str):
        return (
            {"2026": "2020"}.get(value[:4], value[:4]) + value[4:]
            if place == ("date",)
            else f"{value[:-1]}{value[-1:] == '0':d}"
        )
    if value is None:
        return {"fell_to": "apgd-ce", "progress": "0" * 16, "robust": [1] * 14}.get(place[0], "another")
    return [*value[:-1]] if isinstance(value, list) else dict([*value.items()][:-1])


def with_edit(log, place):
    log = copy.deepcopy(log)
    holder = log
    for key in place[:-1]:
        holder = holder[key]
    before = holder[place[-1]]
    holder[place[-1]] = {"another": 1} if before == {} else ["another"] if before == [] else changed(before, place)
    return log


# What only the seal keeps: statements that nothing else follows from.
FREE = {
    "date",
    "finished",  # made false, which claims less: so does a run that is killed before its last line
    "curve",  # without its last radius
    "model",
    "data.name",
    "versions.python",
    "versions.ikl_plugins",
    "versions.torchvision",
}
FREE_UNFINISHED = FREE - {"finished", "curve"}
# Without batch files nothing says where corruptions were computed, or how long that took.
FREE_OF_CORRUPTIONS = FREE_UNFINISHED | {
    *("batch_size", "device", "seed", "versions", "versions.torch", "versions.robustbench"),
    *("corruptions.seconds", "precision"),
}


def named(place):
    return ".".join(str(part) for part in place if isinstance(part, str))


def test_each_edit_is_refused_by_the_seal(written):
    original, path = json.loads(written.read_text()), written.with_name("edited.json")
    edits, let_through = [place for place, _ in nodes(original)], {}
    for place in edits:
        path.write_text(json.dumps(with_edit(original, place)))
        key = place[-1] if place[0] == "seal" else place[0]  # without its line in the seal a key is named
        with pytest.raises(ValueError, match=r"^Evaluation\.load: ") as refused:
            Evaluation.load(path)
        if key not in str(refused.value).replace(str(path), "") and place != ("seal",):
            let_through[place] = str(refused.value)
    assert not let_through
    assert len(edits) > 150


def test_each_edit_with_a_renewed_seal_is_refused_by_what_it_follows_from(written):
    log, path = read_log("test", written), written.with_name("edited.json")
    refused, free, unnamed = Counter(), set(), {}
    for place, _ in nodes(log):
        write_log(with_edit(log, place), path)
        try:
            verify(NETWORK, path, DATA, data_dir=path.parent if place[0] == "corruptions" else None)
        except ValueError as error:
            refused[named(place)] += 1
            if place[0] not in str(error).replace(str(path), ""):
                unnamed[place] = str(error)
        else:
            free.add(named(place))
    assert not unnamed
    expected = FREE_OF_CORRUPTIONS if "corruptions" in log else FREE if log["finished"] else FREE_UNFINISHED
    assert free == expected, refused


# --- the files -------------------------------------------------------------------------------------------------------


def file_of(path, what="0-apgd-ce-00000-*"):
    (found,) = path.with_name("evaluation_adversarial").glob(f"{what}.npz")
    return found


def images_with(value):
    def change(arrays):
        arrays["image"][0, 0, 0, 0] = value
        return arrays["image"]

    return change


FILES = {
    "far": ("image", images_with(0.5), r"`adversarial\[\d+\]` of the log is an image within Linf eps 8/255, but"),
    "beyond white": ("image", images_with(1.001), r"`adversarial\[\d+\]` of the log is an image in \[0, 1\], but"),
    "not a number": ("image", images_with(np.nan), r"`adversarial\[\d+\]` of the log is an image in \[0, 1\], but"),
    "does not fool": ("image", lambda a: IMAGES[a["fell"]].numpy(), r"`predictions\[\d+\]` of the log is \d, but"),
    "another size": ("image", lambda a: a["image"][:, :, 1:], r"`adversarial` of the log is of images of \(3, 8, 8\)"),
    "too few": ("image", lambda a: a["image"][1:], "is damaged .its parts do not fit."),
    "double": ("image", lambda a: a["image"].astype(float), "is damaged .its image do not fit."),
    "order": ("index", lambda a: a["index"][::-1], "is damaged .its index do not fit."),
    "other images": ("index", lambda a: a["index"] + 1, "is damaged .its index do not fit."),
    "no numbers": ("index", lambda a: a["index"].astype(bytes), "is damaged .its index do not fit."),
    "who fell": ("fell", lambda a: a["fell"] + 1, "is damaged .its fell do not fit."),
    "who fell twice": ("fell", lambda a: a["fell"] * 0 + a["fell"][0], "is damaged .its fell do not fit."),
    "taken for": ("prediction", lambda a: a["prediction"] + 1, r"`predictions\[0\]` of the log must follow from `0-"),
    "times": ("seconds", lambda a: a["seconds"] + np.ones(2), "is damaged .its seconds do not fit."),
    "endless": ("seconds", lambda a: a["seconds"] * np.inf, "is damaged .its seconds do not fit."),
    "numbered warning": ("warnings", lambda a: np.ones(1), "is damaged .its warnings do not fit."),
    "time": ("seconds", lambda a: a["seconds"] + 1, r"`progress\[0\].seconds` of the log must follow from"),
    "warning": ("warnings", lambda a: np.array(["Look out."]), "`warnings` of the log must follow from"),
    "key": ("key", lambda a: np.array("0" * 16), "is damaged .its key do not fit."),
}
UNREADABLE = {
    "no number": lambda text: text.replace('"seed": 0', '"seed": NaN'),
    "a name twice": lambda text: text.replace('"seed": 0', '"seed": 1, "seed": 0'),
    "nested": lambda text: "[" * 100_000,
    "UTF-16": lambda text: text.encode("utf-16").decode("latin-1"),
}
# Values that a reader would stumble over, behind a renewed seal.
ODD = {
    "a data set of none": ("data", None),
    "huge": ("eps_value", 10**400),
    "a line of the report": ("model", "net\n\nRobust accuracy: 99 %"),
    "half a character": ("model", "\ud800"),
    "a parameter of an attack that did not run": ("parameters", {"square": {"n_queries": 1}}),
    "a parameter that is true": ("parameters", {"apgd-ce": {"n_iter": True}}),
    "a parameter that nothing follows from": ("parameters", {"apgd-ce": {"n_iter": 1}}),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_log_is_refused_as_damaged(change, path):
    path.write_text(change(path.read_text()))
    with message(f"Evaluation.load: {path} must be a log, but is damaged, or none ("):
        Evaluation.load(path)


@pytest.mark.parametrize(("field", "value"), ODD.values(), ids=ODD)
def test_odd_values_are_refused_by_the_field(field, value, path):
    write_log({**read_log("test", path), field: value}, path)
    with message(f"`{field}` of the log must "):
        Evaluation.load(path)


def test_names_are_logged_in_one_line(tmp_path):
    names = {
        "model_name": "net\nwork",
        "data": "made\x00 \u2028up",
        "checkpoint": {"name": "\ud800", "sha256": "0" * 64},
    }
    path = tmp_path / "evaluation.json"
    evaluate(NETWORK, IMAGES, LABELS, eps="8/255", attacks=["apgd-ce"], log=path, progress=False, **names)
    log = Evaluation.load(path).log
    assert (log["model"], log["data"]["name"], log["checkpoint"]["name"]) == (
        r"net\nwork",
        r"made\x00 \u2028up",
        r"\ud800",
    )


@pytest.mark.parametrize("case", FILES)
def test_an_edited_batch_is_refused(case, path):
    name, change, fragment = FILES[case]
    file = file_of(path)
    with np.load(file) as content:
        arrays = dict(content)
    assert len(arrays["fell"])
    np.savez(file, **{**arrays, name: change(arrays)})
    with pytest.raises(ValueError, match=fragment):
        verify(NETWORK, path, DATA)


def test_batches_that_are_missing_or_of_another_run_are_refused(path, tmp_path):
    other = tmp_path / "other" / "evaluation.json"
    evaluate(NETWORK, IMAGES, LABELS, eps="8/255", attacks=["apgd-ce"], log=other, data=DATA, batch_size=5, seed=1)
    file = file_of(path)
    whole = file.read_bytes()
    file.unlink()
    with message(f"must hold all batches of the log, but lacks {file.name}"):
        Evaluation.load(path)
    shutil.copy(file_of(other), file)
    with message(f"{file} must be the file of a batch, but is damaged (its key do not fit)"):
        Evaluation.load(path)
    file.write_bytes(whole)
    Evaluation.load(path)
    file_of(path, "natural-*").unlink()
    with message("must hold the file natural-... of the evaluation, but has none"):
        Evaluation.load(path)
    shutil.copy(file_of(other, "natural-*"), path.with_name("evaluation_adversarial"))
    with message("`seed` of the log must follow from `evaluation_adversarial`, which give 1, got 0"):
        Evaluation.load(path)
    shutil.rmtree(path.with_name("evaluation_adversarial"))
    with message("verify: `adversarial` of the log must name a folder beside it with the"):
        verify(NETWORK, Evaluation.load(path), DATA)


# --- the model -------------------------------------------------------------------------------------------------------


def test_says_how_many_images_were_run(small, monkeypatch):
    fell = sum(attack is not None for attack in read_log("test", small)["fell_to"])
    assert str(verify(NETWORK, small, IMAGES, LABELS)) == (
        f"run again on 14 of 14 natural and {fell} of {fell} adversarial images: as the log says"
    )
    monkeypatch.setattr(VERIFICATION, "_CHEAP", 10)
    found = [verify(NETWORK, small, DATA, sample=3, batch_size=2) for _ in range(2)]
    assert [(one.natural, one.adversarial, one.fell) for one in found] == [(3, 3, fell)] * 2
    assert found[0].drawn != found[1].drawn
    assert verify(NETWORK, small, DATA, sample=None).natural == 14


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_sample_finds_false_predictions_as_often_as_stated(share, small, monkeypatch):
    """The chance to miss a share p with n images drawn is (1 - p)^n at most."""
    monkeypatch.setattr(VERIFICATION, "_CHEAP", 0)
    monkeypatch.setattr(VERIFICATION, "_check_keys", lambda *_: None)  # which alone would find it
    evaluation = Evaluation.load(small)
    log = copy.deepcopy(evaluation.log)
    false = [at for at in range(14) if log["fell_to"][at]][: int(14 * share)]
    for at in false:  # another wrong class
        log["predictions"][at] = next(c for c in range(10) if c not in (log["labels"][at], log["predictions"][at]))
    fell = sum(attack is not None for attack in log["fell_to"])
    missed = 0
    for _ in range(20):
        with contextlib.suppress(ValueError):
            verify(NETWORK, dataclasses.replace(evaluation, log=log), DATA, sample=4)
            missed += 1
    assert 20 - missed >= 20 * (1 - (1 - len(false) / fell) ** 4) - 5


NORMS = {"Linf": "4/255", "L2": "0.5", "L1": "20"}


@pytest.mark.parametrize("norm", NORMS)
def test_what_autoattack_finds_is_taken_for_what_it_is(norm, tmp_path):
    """L1 among them, where Square's steps leave white by rounding."""
    options = {"norm": norm, "eps": NORMS[norm], "version": "plus", "data": DATA, "progress": False}
    evaluate(NETWORK, IMAGES, LABELS, log=tmp_path / "log.json", **options)
    found = verify(NETWORK, tmp_path / "log.json", DATA)
    assert found.adversarial == found.fell > 0


def test_attacks_that_never_ran_are_found_out(tmp_path, monkeypatch):
    log = tmp_path / "evaluation.json"
    with monkeypatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Harmless)  # as with a model that hides its gradients
        forged = evaluate(NETWORK, IMAGES, LABELS, eps="16/255", log=log, data=DATA)
    assert forged.standard
    assert sum(forged.log["robust"]) == 12
    with message("verify: `robust` of the log is 1 for 12 images that apgd-ce attacked again, but the evidence gives"):
        verify(NETWORK, log, DATA)
    assert "again" not in str(verify(NETWORK, log, DATA, attack=0)).replace("run again", "")
    honest = evaluate(NETWORK, IMAGES, LABELS, eps="1/255", data=DATA, seed=2**64 - 1)
    stand = sum(honest.log["robust"])
    assert stand > 5
    assert str(verify(NETWORK, honest, DATA, attack=5)).endswith("; 0 of 5 images that stand fell to apgd-ce again")
    assert verify(NETWORK, honest, DATA, batch_size=3).attacked == stand


def test_another_model_and_other_images_are_refused(small):
    cases = [
        (network(seed=1), DATA, "`weights_sha256` of the log is"),
        (NETWORK, dataclasses.replace(DATA, labels=LABELS.flip(0)), "`data.sha256` of the log is"),
        (
            NETWORK,
            dataclasses.replace(DATA, images=IMAGES[:9], labels=LABELS[:9]),
            "`data.n_examples` of the log is 14",
        ),
        (NETWORK, dataclasses.replace(DATA, classes=tuple("jihgfedcba")), "`classes` of the log is"),
        (NETWORK, dataclasses.replace(DATA, preprocessing="Res224"), "`data.preprocessing` of the log is None"),
    ]
    for model, data, fragment in cases:
        with message(f"verify: {fragment}"):
            verify(model, small, data)


def test_a_model_that_draws_random_numbers_is_not_compared(tmp_path):
    model = torch.nn.Sequential(NETWORK[0], torch.nn.Dropout(0.2), *NETWORK[1:]).eval()
    model[1].train()
    path = tmp_path / "evaluation.json"
    evaluate(model, IMAGES, LABELS, eps="4/255", version="rand", log=path, data=DATA, progress=False)
    found = verify(model, path, DATA)
    assert not found.compared
    assert "not run again" in str(found)
