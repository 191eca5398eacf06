"""Adversarial images as one file: what it holds, that other programs and other models read it, and what is refused."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from quick_autoattack import Quick, batch, message, network, robustbench

from ikl_plugins.robustbench import load_images
from ikl_plugins.robustbench.data import Images, content_sha256
from ikl_plugins.robustbench.evaluation import evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    model = network(4)
    pixels, labels = batch(model, 40)
    images = Images(pixels, labels, ("cat", "owl", "fox", "elk"), "made up", content_sha256(pixels, labels))
    log = tmp_path_factory.mktemp("log") / "log.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quick)
        evaluate(model, pixels, labels, eps="4/255", attacks=["apgd-ce"], data=images, log=log, model_name="net")
    return model, images, Evaluation.load(log)


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_the_file_holds_what_autoattack_returns(measured, tmp_path, suffix):
    model, images, evaluation = measured
    path = tmp_path / f"adversarial.{suffix}"
    assert evaluation.export(path, images if suffix == "pt" else images.images) == path
    if suffix == "pt":
        found = torch.load(path, weights_only=True)
        assert torch.equal(found["adv_complete"], found["image"])
    else:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        assert {name: found[name].dtype.name for name in ("image", "label", "prediction", "natural_prediction")} == {
            **dict.fromkeys(("label", "prediction", "natural_prediction"), "int64"),
            "image": "float32",
        }
        found = {name: torch.from_numpy(v) if v.dtype.kind in "if" else v.tolist() for name, v in found.items()}
    attack = Quick(model, norm="Linf", eps=4 / 255, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce"])
    expected, predictions = attack.run_standard_evaluation(images.images, images.labels, bs=128, return_labels=True)
    assert torch.equal(found["image"], expected)
    assert torch.equal(found["prediction"], predictions)
    assert torch.equal(found["label"], images.labels)
    with torch.no_grad():
        assert torch.equal(found["natural_prediction"], model(images.images).argmax(1))
        assert torch.equal(found["prediction"], model(found["image"]).argmax(1))
    changed = [bool(one) for one in (expected != images.images).flatten(1).any(1)]
    assert found["fell_to"] == ["apgd-ce" if one else "" for one in changed]
    assert 0 < sum(changed) < 38
    facts = {"data": "made up", "classes": list(images.classes), "model": "net", "eps": "4/255", "attacks": ["apgd-ce"]}
    assert {name: found[name] for name in facts} == facts
    assert found["weights_sha256"] == evaluation.log["weights_sha256"]


def test_another_model_is_evaluated_on_the_file(measured, tmp_path):
    model, images, evaluation = measured
    read = load_images(evaluation.export(tmp_path / "adversarial.npz", images))
    assert read.classes == images.classes
    transfer = evaluate(model, read.images, read.labels, eps="1/510", attacks=["apgd-ce"], data=read)
    assert transfer.log["natural_correct"] == evaluation.log["robust"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[-1].weight.add_(0.02 * torch.randn(other[-1].weight.shape))
    transfer = evaluate(other, read.images, read.labels, eps="1/510", attacks=["apgd-ce"], data=read)
    assert transfer.log["natural_correct"] != evaluation.log["robust"]
    right = other(evaluation.adversarial_images(images.images)).argmax(1).eq(images.labels)
    assert transfer.log["natural_correct"] == right.int().tolist()


def test_what_does_not_belong_together_is_refused(measured, tmp_path):
    _, images, evaluation = measured
    path = tmp_path / "adversarial.pt"
    for wrong in (images.images.flip(0), images.images[:39], images.images.roll(1, 2)):
        with message("Evaluation.export: `images` must be the 40 that were evaluated, but have another checksum"):
            evaluation.export(path, wrong)
    with message("the file must end with .npz or .pt, got"):
        evaluation.export(tmp_path / "adversarial.pth", images)
    with message("must have all adversarial images, but its images were not kept"):
        dataclasses.replace(evaluation, adversarial=None).export(path, images)
    with message("must have all adversarial images, but it was interrupted"):
        dataclasses.replace(evaluation, log={**evaluation.log, "finished": False}).export(path, images)
    assert not path.exists()
