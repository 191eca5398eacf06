"""External evaluations: what their adversarial images prove, and records that are refused."""

import json

import numpy as np
import pytest
import torch
from quick_autoattack import batch, message, network

pytest.importorskip("ikl_plugins.robustbench", reason="RobustBench is not installed", exc_type=ImportError)

from ikl_plugins.robustbench import evaluate
from ikl_plugins.robustbench.evaluation.external import (
    check_external,
    lowest_robust,
    read_external,
    verify_external,
)

EPS = 8 / 255
RECORD = {
    "attack": "A3",
    "by": "Jane Doe",
    "code": "https://example.org/a3",
    "natural_accuracy": 100 * 12 / 14,
    "robust_accuracy": 50.0,
    "n_examples": 14,
    "threat_model": "Linf",
    "eps": "8/255",
}


@pytest.fixture(scope="module")
def evaluated():
    """A network, its images, and an evaluation by few of AutoAttack's attacks."""
    model = network()
    images, labels = batch(model)
    found = evaluate(model, images, labels, eps="1/255", attacks=["apgd-ce"], progress=None)
    log = {**found.log, "eps": "8/255", "eps_value": EPS}  # as if the attack had found no more in the larger ball
    return model, images, labels, log


@pytest.fixture
def record(tmp_path):
    def write(**changes):
        path = tmp_path / "a3.json"
        path.write_text(json.dumps({key: value for key, value in {**RECORD, **changes}.items() if value is not None}))
        return path

    return write


def attacked(model, images, labels, eps=EPS):
    """One step of the gradient's sign from the first ten images; the others as they are."""
    images = images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    made = (images + eps * images.grad.sign()).clamp(0, 1).detach()
    return torch.cat([made[:10], images[10:].detach()])


@pytest.mark.parametrize("lie", [0.0, 80.0])
def test_the_images_count_and_not_the_number(evaluated, record, tmp_path, lie):
    model, images, labels, log = evaluated
    made = attacked(model, images, labels)
    np.savez(tmp_path / "a3.npz", image=made.numpy(), label=labels.numpy())
    stated = read_external("t", record(adversarial="a3.npz", robust_accuracy=lie))
    found = verify_external("t", stated, model, log, images, batch_size=5)
    with torch.no_grad():
        fools = [int(model(image[None]).argmax()) != int(label) for image, label in zip(made, labels, strict=True)]
    stands = [bool(robust) and not wrong for robust, wrong in zip(log["robust"], fools, strict=True)]
    right = [bool(flag) for flag in log["natural_correct"]]
    assert found.robust_accuracy == pytest.approx(100 * sum(stands) / 14)
    assert found.fooled == sum(wrong and correct for wrong, correct in zip(fools, right, strict=True)) > 0
    assert lowest_robust(log, [found]) == found.robust_accuracy < log["robust_accuracy"]
    assert "its images run again" in str(found)
    assert found.record()["adversarial"] == "a3.npz"


def test_a_record_without_images_is_taken_as_stated(evaluated, record):
    model, images, _, log = evaluated
    stated = read_external("t", record())
    check_external("t", stated, log)
    found = verify_external("t", stated, model, log, images)
    assert found is stated
    assert str(found) == "A3 by Jane Doe (https://example.org/a3): 50.00 % of 14 images, Linf eps 8/255; as stated"
    assert lowest_robust(log, [found]) == min(50.0, log["robust_accuracy"])
    assert read_external("t", found) is found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": None}, "`attack` must be there"),
        ({"code": "mine"}, "`code` must be an address"),
        ({"by": "a\nb"}, "`by` must be one line"),
        ({"by": "\x1b[2J"}, "`by` must be one line"),
        ({"natural_accuracy": float("nan")}, "NaN is no number of JSON"),
        ({"robust_accuracy": 90.0}, "robust <= natural <= 100"),
        ({"natural_accuracy": 101.0}, "robust <= natural <= 100"),
        ({"n_examples": 0}, "`n_examples` must be an integer of at least 1"),
        ({"threat_model": "linf"}, "unknown threat_model `linf`"),
        ({"eps": "8"}, "`eps` must be at most 1"),
        ({"norm": "Linf"}, "unknown key `norm`"),
        ({"adversarial": "none.npz"}, "`adversarial` must be a file beside it"),
    ],
)
def test_a_record_that_cannot_be_is_refused_by_its_key(record, changes, words):
    path = record(**changes)
    with message(words) as refused:
        read_external("t", path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with message("must hold a mapping, got list"):
        read_external("t", tmp_path / "list.json")
    for text, why in (("[" * 100_000, "too many levels"), ('{"by": "a", "by": "b"}', "a name comes twice")):
        (tmp_path / "none.json").write_text(text)
        with message(f"must be a record in JSON, but {tmp_path / 'none.json'} is not: {why}"):
            read_external("t", tmp_path / "none.json")
    (tmp_path / "none.json").unlink()
    with message("must be a record in JSON"):
        read_external("t", tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threat_model": "L2", "eps": "0.5"}, "must have the threat model of the evaluation, Linf 8/255, got L2 0.5"),
        ({"eps": "4/255"}, "got Linf 4/255 of A3"),
        ({"natural_accuracy": 90.0}, "must be of this model, with natural accuracy 85.71 %, got 90.00 %"),
    ],
)
def test_a_record_of_something_else_is_refused(evaluated, record, changes, words):
    with message(words):
        check_external("t", read_external("t", record(**changes)), evaluated[-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made, labels: (made + 1 / 255, labels), "must hold images within Linf eps 8/255, but "),
        (lambda made, labels: (made[:13], labels[:13]), "must hold the 14 evaluated images in their order"),
        (lambda made, labels: (made, labels.roll(1, 0)), "must hold the 14 evaluated images in their order"),
        (lambda made, labels: (made * 3, labels), "pixels must lie in [0, 1]"),
    ],
)
def test_images_that_prove_nothing_are_refused(evaluated, record, tmp_path, change, words):
    model, images, labels, log = evaluated
    made, labels = change(attacked(model, images * 0.9, labels), labels)
    np.savez(tmp_path / "a3.npz", image=made.numpy(), label=labels.numpy())
    with message(words):
        verify_external("t", read_external("t", record(adversarial="a3.npz")), model, log, images * 0.9)
