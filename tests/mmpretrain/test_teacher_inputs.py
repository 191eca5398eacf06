"""Teachers whose files, heads and inputs are not what a run would need: found, converted, told or refused."""

import copy
import os

import numpy
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from PIL import Image
from torch import nn

from ikl_plugins.mmpretrain import EpochClassifier, build_teacher

CLASSES, SIZE, IMAGES = 4, 16, 24
TWO_STAGES = {"num_stages": 2, "strides": (1, 2), "dilations": (1, 1), "out_indices": (1,)}
STATISTICS = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 55.0, 50.0], "to_rgb": True}
RESIZED = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": 24}, {"type": "PackInputs"}]


def network(width=4, **keywords):
    return {
        "type": "ImageClassifier",
        "backbone": {"type": "ResNet_CIFAR", "depth": 18, "stem_channels": width, "base_channels": width, **TWO_STAGES},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": 2 * width},
        **keywords,
    }


def loader(root, pipeline=(RESIZED[0], RESIZED[2])):
    data = {"type": "CustomDataset", "data_root": str(root), "with_label": True, "pipeline": list(pipeline)}
    return {
        "batch_size": 12,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": data,
    }


def run_config(root, teacher, **keywords):
    """A student's config, whose one epoch has one batch."""
    return {
        "default_scope": "mmpretrain",
        "custom_imports": {"imports": ["ikl_plugins.mmpretrain"]},
        "custom_hooks": [{"type": "IKLHook", "rehearse": False}],
        "model": network(type="DistillationClassifier", data_preprocessor=STATISTICS, teacher=teacher, **keywords),
        "train_dataloader": {**loader(root), "batch_size": IMAGES},
        "val_dataloader": loader(root),
        "train_cfg": {"by_epoch": True, "max_epochs": 1, "val_interval": 9},
        "val_cfg": {},
        "val_evaluator": {"type": "Accuracy"},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.0}},
        "default_hooks": {"checkpoint": None, "logger": None},
    }


def started(path, folder, monkeypatch):
    """The model of a run that the host's own runner has begun, in an empty working directory."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "elsewhere")
    config = Config.fromfile(str(path))
    config.work_dir, config.experiment_name = str(folder / "work"), f"test_teacher_inputs_{os.getpid()}_{folder.name}"
    runner = Runner.from_cfg(config)
    runner.train()
    return runner.model


@pytest.fixture
def said(capsys):
    """What the logger of the run says of the teacher: its lines and the warnings among them."""

    def read():
        lines = [line for line in "".join(capsys.readouterr()).splitlines() if "the teacher" in line]
        return "\n".join(lines), [line for line in lines if "WARNING" in line]

    return read


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Images whose class is their colour, and a teacher that MMPretrain's own test finds right on 24x24 pixels."""
    root = tmp_path_factory.mktemp("teacher_inputs")
    draw = numpy.random.default_rng(0)
    for index in range(IMAGES):
        pixels = draw.integers(0, 60, (SIZE, SIZE, 3))
        pixels[..., : CLASSES - 1][..., index % CLASSES : index % CLASSES + 1] += 150
        path = root / "images" / "abcd"[index % CLASSES] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype("uint8")).save(path)
    torch.manual_seed(0)
    preprocessor = {"mean": [90.0, 80.0, 70.0], "std": [30.0, 20.0, 40.0], "to_rgb": True}
    teacher = {
        "default_scope": "mmpretrain",
        "model": network(),
        "data_preprocessor": preprocessor,
        "test_dataloader": loader(root / "images", RESIZED),
        "test_cfg": {},
        "test_evaluator": {"type": "Accuracy"},
    }
    Config(teacher).dump(root / "teacher.py")
    module = MODELS.build(network(data_preprocessor=preprocessor))
    pipeline_inputs, labels = [], []
    dataset = __import__("mmpretrain.registry").registry.DATASETS.build(teacher["test_dataloader"]["dataset"])
    for sample in dataset:
        pipeline_inputs.append(sample["inputs"])
        labels.append(sample["data_samples"].gt_label)
    inputs = module.data_preprocessor({"inputs": torch.stack(pipeline_inputs)}, False)["inputs"]
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(module.train()(inputs), torch.cat(labels)).backward()
        optimizer.step()
    for _ in range(20):  # BatchNorm's statistics catch up
        with torch.no_grad():
            module.train()(inputs)
    torch.save({"meta": {}, "state_dict": module.state_dict()}, root / "teacher.pth")
    config = Config.fromfile(str(root / "teacher.py"))
    config.work_dir, config.load_from = str(root / "work"), str(root / "teacher.pth")
    config.experiment_name = f"test_teacher_inputs_{os.getpid()}"
    return root, module.eval(), Runner.from_cfg(config).test()["accuracy/top1"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_teacher_lies_beside_the_config_and_is_tested_by_default(places, tmp_path, monkeypatch, said):
    root, module, host_accuracy = places
    for name in ("teacher.py", "teacher.pth"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    Config(run_config(root / "images", {"cfg_path": "teacher.py"}, teacher_ckpt="teacher.pth")).dump(
        tmp_path / "student.py"
    )
    model = started(tmp_path / "student.py", tmp_path, monkeypatch)
    assert model.teacher.module.head.fc.weight.equal(module.head.fc.weight)
    lines, _ = said()
    assert f"on 24 validation images is {host_accuracy:.2f} %; {host_accuracy:.2f} % by its own test pipeline" in lines


def test_a_teacher_that_is_nowhere_is_named(places, tmp_path, monkeypatch):
    Config(run_config(places[0] / "images", "teacher.py")).dump(tmp_path / "student.py")
    with pytest.raises(
        ValueError, match=r"none at teacher\.py \(seen from .*elsewhere, and with IKLHook from its config"
    ):
        started(tmp_path / "student.py", tmp_path, monkeypatch)


def test_without_the_hook_a_missing_teacher_is_named_at_the_first_loss(small_network, small_batch, tmp_path):
    model = MODELS.build({"type": "DistillationClassifier", **small_network(classes=4), "teacher": "gone.py"})
    data = model.data_preprocessor(small_batch(), True)
    with pytest.raises(ValueError, match=r"there is none at gone\.py"):
        model.train().loss(data["inputs"], data["data_samples"])


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_other_inputs_than_its_own_are_told(places, tmp_path, monkeypatch, said):
    """Without its preprocessor the teacher is far from what its own test gives."""
    root, _, host_accuracy = places
    teacher = Config.fromfile(str(root / "teacher.py"))
    teacher.model.data_preprocessor = {"mean": [255.0] * 3, "std": [9.0] * 3}
    teacher.dump(tmp_path / "wrong.py")
    keywords = {"teacher_ckpt": str(root / "teacher.pth"), "teacher_val_batches": 2}
    Config(run_config(root / "images", str(tmp_path / "wrong.py"), **keywords)).dump(tmp_path / "student.py")
    started(tmp_path / "student.py", tmp_path, monkeypatch)
    assert "the teacher is not better than chance (25.00 % of 4 classes; " in said()[0]
    given = {"teacher_input": {**STATISTICS, "mean": [90.0, 80.0, 70.0], "std": [30.0, 20.0, 40.0], "size": 24}}
    Config(run_config(root / "images", str(tmp_path / "wrong.py"), **keywords, **given)).dump(tmp_path / "student.py")
    started(tmp_path / "student.py", tmp_path / "elsewhere", monkeypatch)
    lines, warnings = said()
    assert f"on 24 validation images is {host_accuracy:.2f} %" in lines
    assert not warnings


def test_a_worse_input_than_its_own_pipeline_s_is_warned_about(places, tmp_path, monkeypatch, said):
    """Red and blue are exchanged: green and grey images are right, and all are in the host's own test."""
    root, _, host_accuracy = places
    teacher = Config.fromfile(str(root / "teacher.py"))
    teacher.dump(tmp_path / "teacher.py")
    config = run_config(root / "images", str(tmp_path / "teacher.py"), teacher_ckpt=str(root / "teacher.pth"))
    config["model"].update(teacher_input={"mean": [90.0, 80.0, 70.0], "std": [30.0, 20.0, 40.0], "to_rgb": False})
    config["model"]["teacher_val_batches"] = 2
    Config(config).dump(tmp_path / "student.py")
    started(tmp_path / "student.py", tmp_path, monkeypatch)
    (warning,) = said()[1]
    assert f"has 50.00 % on the student's inputs, but {host_accuracy:.2f} % by its own test pipeline" in warning


@pytest.mark.parametrize("size", [24, [24, 24]])
def test_inputs_are_resized_and_normalised_for_the_teacher(size, places):
    root, module, _ = places
    student = EpochClassifier(
        **{name: value for name, value in network(data_preprocessor=dict(STATISTICS)).items() if name != "type"}
    )
    raw = torch.randint(256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).float()
    inputs = student.data_preprocessor({"inputs": raw}, False)["inputs"]
    large = F.interpolate(raw, (24, 24), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = module(module.data_preprocessor({"inputs": large}, False)["inputs"])
    settings = {"mean": [90.0, 80.0, 70.0], "std": [30.0, 20.0, 40.0], "to_rgb": True}
    ckpt = str(root / "teacher.pth")
    for teacher, given in (
        (str(root / "teacher.py"), {"size": size}),
        (network(), {"size": size, **settings}),
        (copy.deepcopy(module), {"size": size}),
    ):
        holder = build_teacher(teacher, ckpt, student=student, teacher_input=given)
        torch.testing.assert_close(holder(inputs), expected, rtol=1e-4, atol=1e-4)
    for given, message in (
        ({"scale": 2}, "`scale`.*size"),
        ({"size": (1, 2, 3)}, "number or two"),
        ({"size": 0}, "size"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            build_teacher(network(), ckpt, student=student, teacher_input=given)


# --- heads that nobody has trained -----------------------------------------------------------------------------------


@MODELS.register_module(force=True)
class FetchedClassifier(ImageClassifier):
    """Fetches the weights that fit while it is built, as Hugging Face does with ignore_mismatched_sizes=True."""

    def __init__(self, weights, pretrained=True, **keywords):
        super().__init__(**keywords)
        own = self.state_dict()
        fetched = {
            name: value for name, value in torch.load(weights)["state_dict"].items() if own[name].shape == value.shape
        }
        self.load_state_dict(fetched, strict=False)


def timm_weights(folder, classes):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    torch.save(timm.create_model("resnet10t", num_classes=classes).state_dict(), folder / "timm.pth")
    fetched = {"file": str(folder / "timm.pth"), "num_classes": classes, "classifier": "fc"}
    return {"type": "TimmClassifier", "model_name": "resnet10t", "pretrained": True, "pretrained_cfg": fetched}


@pytest.mark.parametrize("classes", [4, 7])
def test_of_networks_that_fetch_their_weights_a_random_head_is_refused(classes, places, tmp_path, small_network):
    student = EpochClassifier(**small_network(classes=4))
    head = {**network()["head"], "num_classes": classes}
    weights = MODELS.build(network(head=head)).state_dict()
    torch.save({"state_dict": weights}, tmp_path / "fetched.pth")
    hugging = {**network(), "type": "FetchedClassifier", "weights": str(tmp_path / "fetched.pth"), "pretrained": True}
    for teacher in ({**timm_weights(tmp_path, classes), "num_classes": 4}, hugging):
        if classes == 4:
            build_teacher(teacher, student=student)
        else:
            with pytest.raises(ValueError, match=r"trained as a whole, but .* leaves .*fc\.weight"):
                build_teacher(teacher, student=student)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "backbone": {
                **network()["backbone"],
                "init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet18"},
            }
        },
        {"init_cfg": [{"type": "Normal", "layer": "Linear"}]},
        {"init_cfg": [{"type": "Pretrained", "checkpoint": "a.pth", "prefix": "backbone"}]},
        {"load_from": True},
    ],
)
def test_a_teacher_without_weights_of_the_whole_network_is_refused(changes, places, tmp_path, small_network):
    """What a config goes on from is no result of its training."""
    file = {"load_from": str(places[0] / "teacher.pth")} if changes.pop("load_from", None) else {}
    Config({"model": network(**changes), **file}).dump(tmp_path / "untrained.py")
    with pytest.raises(ValueError, match="`teacher_ckpt` must be given, got None or a backbone alone"):
        build_teacher(str(tmp_path / "untrained.py"), student=EpochClassifier(**small_network(classes=4)))


def test_of_two_sets_of_weights_in_teacher_ckpt_the_average_is_taken(places, tmp_path, small_network):
    root, module, _ = places
    average = module.state_dict()
    last = {name: value + 1 for name, value in average.items()}
    torch.save({"state_dict": last, "state_dict_ema": average}, tmp_path / "two.pth")
    student = EpochClassifier(**small_network(classes=4))
    holder = build_teacher(str(root / "teacher.py"), str(tmp_path / "two.pth"), student=student)
    assert holder.module.head.fc.weight.equal(module.head.fc.weight)
    torch.save({"state_dict": last, "best": average}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth must leave no doubt .*'state_dict', 'best'"):
        build_teacher(str(root / "teacher.py"), str(tmp_path / "two.pth"), student=student)


def test_a_checkpoint_that_normalises_images_must_agree_with_the_data_preprocessor(places, tmp_path, small_network):
    root, module, _ = places
    layer = nn.Module()
    layer.register_buffer("mean", torch.tensor([90.0, 80.0, 70.0]).view(3, 1, 1) / 255)
    layer.register_buffer("std", torch.tensor([30.0, 20.0, 40.0]).view(3, 1, 1) / 255)
    torch.save(nn.Sequential(layer, module).state_dict(), tmp_path / "a.pth")
    student = EpochClassifier(**small_network(classes=4))
    build_teacher(str(root / "teacher.py"), str(tmp_path / "a.pth"), student=student)
    with pytest.raises(ValueError, match=r"a\.pth normalises images with mean"):
        build_teacher(network(), str(tmp_path / "a.pth"), student=student)
