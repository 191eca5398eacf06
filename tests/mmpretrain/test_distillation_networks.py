"""The networks of the distillation literature as backbones, and as teachers with the checkpoints of their zoo.

Names, shapes and forward passes are those of network_oracles, which calls nothing of the package.
"""

import mmpretrain_runs as runs
import network_oracles
import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from ikl_plugins import models
from ikl_plugins.mmpretrain import load_weights

CLASSES = 3
TEACHERS = ("resnet32x4", "ResNet50", "wrn_40_2", "vgg13")  # of those that mdistiller publishes, one of each kind
MEAN, STD = (129.3105, 124.1085, 112.404), (68.2125, 65.4075, 70.4055)


def network(name, classes=CLASSES):
    return {"type": "DistillationNetwork", "name": name, "num_classes": classes}


def config(name="resnet8", kind="ImageClassifier", classes=CLASSES, **keywords):
    return {
        "type": kind,
        "data_preprocessor": {"mean": list(MEAN), "std": list(STD), "to_rgb": False, "num_classes": classes},
        "backbone": network(name, classes),
        "head": {"type": "LogitsClsHead", "num_classes": classes},
        **keywords,
    }


def save(path, name, classes=CLASSES):
    """A file in the form in which mdistiller publishes its teachers; gives the weights."""
    weights = network_oracles.NETWORKS[name].weights(classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 240, "model": weights, "best_acc": 72.34}, path)
    return weights


def oracle(name, weights, inputs):
    return network_oracles.NETWORKS[name].forward(network_oracles.Pass(weights), inputs).logits


@pytest.mark.parametrize("name", models.__all__)
def test_every_network_is_a_backbone_under_its_published_names(name):
    classifier = MODELS.build(config(name))
    entries = network_oracles.NETWORKS[name].entries(CLASSES)
    assert {key: tuple(value.shape) for key, value in classifier.state_dict().items()} == {
        f"backbone.{key}": shape for key, shape in entries.items()
    }
    assert type(classifier.backbone) is type(getattr(models, name)(num_classes=CLASSES))


def test_the_classifier_s_logits_and_loss_are_those_of_the_network():
    weights = network_oracles.NETWORKS["resnet8x4"].weights(CLASSES)
    classifier = MODELS.build(config("resnet8x4")).eval()
    classifier.load_state_dict({f"backbone.{key}": value for key, value in weights.items()})
    raw = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    inputs = (raw - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = oracle("resnet8x4", weights, inputs)
    labels = [0, 2, 1, 1]
    samples = [DataSample().set_gt_label(label) for label in labels]
    data = classifier.data_preprocessor({"inputs": raw, "data_samples": samples})
    with torch.no_grad():
        torch.testing.assert_close(classifier(data["inputs"]), expected, rtol=1e-4, atol=1e-4)
        loss = classifier.loss(data["inputs"], data["data_samples"])["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(expected, torch.tensor(labels)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_checkpoint_of_mdistiller_teaches_as_it_is(name, tmp_path):
    weights = save(tmp_path / "teacher.pth", name)
    keywords = {"teacher": network(name), "teacher_ckpt": str(tmp_path / "teacher.pth")}
    model = MODELS.build(config("resnet8", "DistillationClassifier", **keywords)).train()
    inputs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.teacher(inputs), oracle(name, weights, inputs), rtol=1e-3, atol=1e-3)


def test_a_distilled_network_is_read_by_its_own_class_and_teaches_in_turn(tmp_path):
    save(tmp_path / "teacher.pth", "resnet14")
    keywords = {
        "teacher": network("resnet14"),
        "teacher_ckpt": str(tmp_path / "teacher.pth"),
        "distill_loss": {"type": "IKLLoss", "beta": 4.0, "global_info": True},
    }
    student = config("resnet8", "DistillationClassifier", **keywords)
    runs.runner(tmp_path / "run", student, epochs=1, train_dataloader=runs.loader(6, 3, size=32)).train()
    saved = tmp_path / "run" / "epoch_1.pth"
    weights = {key: value for key, value in load_weights(saved).items() if "class_prior" not in key}
    own = models.resnet8(num_classes=CLASSES)
    own.load_state_dict({key.removeprefix("backbone."): value for key, value in weights.items()})  # strictly
    # What MMEngine has written has 'backbone.' in front: its classifier is the teacher.
    keywords = {"teacher": config("resnet8"), "teacher_ckpt": str(saved)}
    second = MODELS.build(config("resnet8", "DistillationClassifier", **keywords))
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(second.teacher(inputs), own.eval()(inputs))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (network("resnet20"), r"must fit the network in `teacher`.* missing: layer1\.2\."),
        (config("resnet14"), r"does not; missing: backbone\.conv1\.weight.*unexpected: conv1\.weight"),
        (network("resnet14", 5), r"other shapes: fc\.weight \(3, 64\) instead of \(5, 64\)"),
    ],
)
def test_another_network_s_checkpoint_is_refused(teacher, message, tmp_path):
    save(tmp_path / "teacher.pth", "resnet14")
    keywords = {"teacher": teacher, "teacher_ckpt": str(tmp_path / "teacher.pth")}
    with pytest.raises(ValueError, match=message):
        MODELS.build(config(kind="DistillationClassifier", **keywords))
