"""A log that somebody has edited, files of batches that somebody has edited, and a model that is another one."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch
from quick_autoattack import Interruption, Quick, batch, network, robustbench

from ikl_plugins.robustbench import Images, verify
from ikl_plugins.robustbench.evaluation import curve, evaluate, evaluate_corruptions
from ikl_plugins.robustbench.evaluation.log import Evaluation, read_log, write_log

pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
CIFAR = robustbench.data.BenchmarkDataset.cifar_10, robustbench.data.ThreatModel.corruptions
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
    evaluate_corruptions(NETWORK, "cifar10", data_dir=path.parent, n_examples=14, natural=DATA, log=path)


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


@pytest.fixture
def path(_quick, tmp_path_factory):
    """Of a small evaluation of its own, whose files a test may change."""
    path = tmp_path_factory.mktemp("own") / "evaluation.json"
    evaluate(NETWORK, IMAGES, LABELS, eps="4/255", attacks=["apgd-ce", "square"], log=path, data=DATA, batch_size=5)
    return path


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
# Without batch files nothing says on what corruptions were computed, or how long that took.
FREE_OF_CORRUPTIONS = FREE_UNFINISHED | {
    *("batch_size", "device", "seed", "versions", "versions.torch", "versions.robustbench", "versions.pyautoattack"),
    *("corruptions.sha256", "corruptions.seconds", "corruptions_mce_note", "precision"),
}


def named(place):
    return ".".join(str(part) for part in place if isinstance(part, str))


def test_each_edit_is_refused_by_the_seal(written):
    original, path = json.loads(written.read_text()), written.with_name("edited.json")
    edits, let_through = [place for place, _ in nodes(original)], {}
    for place in edits:
        path.write_text(json.dumps(with_edit(original, place)))
        key = place[-1] if place[0] == "seal" else place[0]  # without its line in the seal a key is named
        with pytest.raises(ValueError, match="^Evaluation.load: ") as refused:
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
            verify(NETWORK, path, DATA)
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


def rewritten(path, **changes):
    """The first batch with other arrays."""
    file = file_of(path)
    with np.load(file) as content:
        arrays = dict(content)
    np.savez(file, **{**arrays, **{name: change(arrays[name]) for name, change in changes.items()}})


def far(image):
    image[0, 0, 0, 0] = 1 - image[0, 0, 0, 0]
    return image


def beyond_white(image):
    image[0, 0, 0, 0] = 1 + 1e-3
    return image


def natural_images(image):
    with torch.no_grad():
        return IMAGES[3:4].expand(len(image), -1, -1, -1).numpy() * 0 + IMAGES[FELL[: len(image)]].numpy()


FELL: list[int] = []
FILES = [
    ({"image": far}, r"`adversarial\[\d+\]` of the log is an image within Linf eps 4/255, but the evidence gives 0\."),
    (
        {"image": beyond_white},
        r"`adversarial\[\d+\]` of the log is an image in \[0, 1\], but the evidence gives .* to 1.001",
    ),
    ({"image": natural_images}, r"`predictions\[\d+\]` of the log is \d, but the evidence gives \d"),
    ({"image": lambda image: image[:, :, 1:]}, "`adversarial` of the log is of images of .3, 8, 8., but"),
    ({"image": lambda image: image[1:]}, "is damaged .its parts do not fit."),
    ({"index": lambda index: index[::-1]}, "`index of 0-apgd-ce-00000-"),
    ({"index": lambda index: index + 1}, "`index of 0-apgd-ce-00000-"),
    ({"fell": lambda fell: fell + 1}, r"`fell_to\[0\]` of the log must follow from `0-apgd-ce"),
    ({"prediction": lambda prediction: prediction + 1}, r"`predictions\[0\]` of the log must follow from `0-apgd-ce"),
    ({"seconds": lambda seconds: seconds + 1}, r"`progress\[0\].seconds` of the log must follow from"),
    ({"key": lambda key: np.array("0" * 16)}, "is damaged .its parts do not fit."),
]


@pytest.mark.parametrize(("changes", "fragment"), FILES, ids=[fragment[:30] for _, fragment in FILES])
def test_an_edited_batch_is_refused(changes, fragment, path):
    with np.load(file_of(path)) as content:
        FELL[:] = content["fell"].tolist()
    assert FELL  # or nothing is edited
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=fragment):
        verify(NETWORK, path, DATA)
