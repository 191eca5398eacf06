"""RobustBench's networks as backbones: trained in every classifier, and loaded by RobustBench's class as they are."""

import importlib
import importlib.util

import mmpretrain_runs as runs
import pytest
import torch
from mmpretrain.registry import MODELS

import ikl_plugins.mmpretrain
from ikl_plugins._robustbench_import import import_robustbench

# By its companion: the folder tests/robustbench would be found under its own name.
if importlib.util.find_spec("pyautoattack") is None:
    pytest.skip("the networks are RobustBench's", allow_module_level=True)
import_robustbench()
wide_resnet = importlib.import_module("robustbench.model_zoo.architectures.wide_resnet")

CLASSES = 3
PIXELS = {"mean": [0.0] * 3, "std": [255.0] * 3, "to_rgb": True, "num_classes": CLASSES}


def config(kind="ImageClassifier", architecture="WideResNet-10-1", classes=CLASSES, **keywords):
    return {
        "type": kind,
        "data_preprocessor": PIXELS,
        "backbone": {"type": "RobustBenchNetwork", "architecture": architecture, "num_classes": classes},
        "head": {"type": "LogitsClsHead", "num_classes": CLASSES},
        **keywords,
    }


def every_kind(folder):
    """The three classifiers, with class priors where they have any."""
    loss = {"type": "IKLLoss", "beta": 4.0, "global_info": True}
    torch.manual_seed(1)
    torch.save(MODELS.build(config()).state_dict(), folder / "teacher.pth")
    return {
        "ImageClassifier": config(),
        "DistillationClassifier": config(
            "DistillationClassifier", teacher=config(), teacher_ckpt=str(folder / "teacher.pth"), distill_loss=loss
        ),
        "AdversarialClassifier": config(
            "AdversarialClassifier",
            attack={"eps": "8/255", "steps": 1, "step_size": "8/255"},
            robust_loss=loss,
            awp={"gamma": 0.005},
            label_smoothing=0.1,
        ),
    }


KINDS = ("ImageClassifier", "DistillationClassifier", "AdversarialClassifier")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_robustbench_s_class_key_for_key(kind, tmp_path):
    data = runs.loader(6, 3, size=32)
    runs.runner(tmp_path / "run", every_kind(tmp_path)[kind], epochs=1, train_dataloader=data).train()
    saved = ikl_plugins.mmpretrain.load_weights(tmp_path / "run" / "epoch_1.pth")
    plain = {name: tensor for name, tensor in saved.items() if "class_prior" not in name}
    assert ("class_prior" in "".join(saved)) == (kind != "ImageClassifier")
    theirs = wide_resnet.WideResNet(depth=10, num_classes=CLASSES, widen_factor=1)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert list(plain) == [f"backbone.{name}" for name in before]
    theirs.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in plain.items()}, strict=True)
    # Its logits are those of the trained classifier, which gets bytes in BGR.
    classifier = MODELS.build(config())
    classifier.load_state_dict(plain, strict=True)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = theirs.eval()(images.flip(1) / 255)
        data = classifier.eval().data_preprocessor({"inputs": images}, False)
        assert torch.equal(classifier(data["inputs"]), logits)
        scores = torch.stack([sample.pred_score for sample in classifier.predict(data["inputs"])])
    torch.testing.assert_close(scores, logits.softmax(1))
    # The file as it is gives the same network.
    from ikl_plugins.robustbench import load_checkpoint

    loaded = load_checkpoint(tmp_path / "run" / "epoch_1.pth", "WideResNet-10-1", num_classes=CLASSES)
    assert type(loaded) is wide_resnet.WideResNet
    with torch.no_grad():
        assert torch.equal(loaded(images.flip(1) / 255), logits)


def test_the_head_takes_the_last_of_several_outputs():
    head = ikl_plugins.mmpretrain.LogitsClsHead(num_classes=CLASSES)
    logits = torch.rand(2, CLASSES)
    assert head((torch.rand(2, 9), logits)) is logits
    assert head(logits) is logits


def test_class_counts_that_differ_are_refused():
    classifier = MODELS.build(config(classes=5))
    with pytest.raises(ValueError, match=r"must give logits of shape \(N, 3\), got shape \(2, 5\)"):
        classifier(torch.rand(2, 3, 32, 32))
