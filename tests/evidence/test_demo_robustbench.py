"""The last part of the demo: from a checkpoint to a submission folder, with an untrained network and few queries."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch
from demo import robustbench
from demo.parts import Parts
from PIL import Image

from ikl_plugins.models.robustbench_zoo import robustbench_network

pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture
def config():
    model = SimpleNamespace(
        backbone=SimpleNamespace(architecture="WideResNet-10-1"), attack=SimpleNamespace(eps="16/255")
    )
    return SimpleNamespace(model=model)


@pytest.fixture
def data(tmp_path):
    generator = numpy.random.default_rng(0)
    for digit in range(10):
        folder = tmp_path / "digits" / "test" / str(digit)
        folder.mkdir(parents=True)
        for index in range(2):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), numpy.uint8)).save(folder / f"{index}.png")
    return tmp_path / "digits"


@pytest.fixture
def checkpoint(tmp_path):
    network = robustbench_network("WideResNet-10-1")
    path = tmp_path / "best.pth"
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in network.state_dict().items()}}, path)
    return path


def run(output, data, config, checkpoint):
    """What came of it, and whether it was there."""
    with Parts(output, robustbench.PARTS, fresh=False) as parts:
        return robustbench.evaluate_and_submit(parts, data, config, checkpoint), bool(parts.kept)


def test_goes_from_a_checkpoint_to_a_submission_and_keeps_it(tmp_path, data, config, checkpoint, monkeypatch):
    monkeypatch.setattr(robustbench, "EXAMPLES", 10)  # one of each digit
    monkeypatch.setattr(robustbench, "CURVE", (0.5, 1.5))
    first, kept = run(tmp_path, data, config, checkpoint)
    assert not kept
    folder = tmp_path / "robustbench"
    log = json.loads((folder / "evaluation/evaluation.json").read_text())
    assert log["eps"] == "16/255"
    assert log["standard"]
    assert [point["eps"] for point in log["curve"]] == ["8/255", "24/255"]
    assert first["robust_accuracy"] == log["robust_accuracy"] <= first["natural_accuracy"]
    assert (folder / "evaluation/report.md").is_file()
    (entry,) = (folder / "submission/model_info/cifar10/Linf").glob("*.json")
    assert "Demonstration" in json.loads(entry.read_text())["footnote"]
    text = robustbench.markdown(first, folder)
    assert f"robust accuracy {log['robust_accuracy']:.2f} %" in text
    assert "One image is 10 points" in text

    assert run(tmp_path, data, config, checkpoint) == (first, True)


def test_a_network_that_fails_a_check_is_not_submitted(tmp_path, data, config, checkpoint, monkeypatch):
    # It takes all images for the class that none is of, so that no attack has anything to do.
    shutil.rmtree(data / "test/9")
    monkeypatch.setattr(robustbench, "EXAMPLES", 18)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["backbone.fc.weight"].zero_()  # no gradient reaches the image
    content["state_dict"]["backbone.fc.bias"][9] = 5.0
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"`preflight` must have passed, but failed\. gradients"):
        run(tmp_path, data, config, checkpoint)
    assert not (tmp_path / "robustbench/submission").exists()
