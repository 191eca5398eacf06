"""Building a teacher, its weights and its inputs, and that it stays out of everything that is trained."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmpretrain.models import ImageClassifier
from torch import nn

from ikl_plugins.mmpretrain import EpochClassifier, FrozenTeacher, build_teacher
from ikl_plugins.models import resnet8

OTHER_MEAN = (100.0, 90.0, 80.0)


@pytest.fixture
def student(small_network):
    return EpochClassifier(**small_network())


@pytest.fixture
def trained(small_network, tmp_path):
    """A teacher with a config file and a checkpoint as MMEngine writes it; BatchNorm has seen images."""

    def make(classes=3, channels=3, preprocessor="model", **keywords):
        network = small_network(classes=classes, channels=channels, **keywords)
        module = ImageClassifier(**network)
        module.train()
        module(torch.randn(8, 3, 16, 16))
        config = {"model": {"type": "ImageClassifier", **network}}
        settings = config["model"].pop("data_preprocessor")
        if preprocessor == "model":
            config["model"]["data_preprocessor"] = settings
        elif preprocessor == "file":
            config["data_preprocessor"] = settings
        paths = tmp_path / "teacher.py", tmp_path / "teacher.pth"
        Config(config).dump(paths[0])
        torch.save({"meta": {"epoch": 3}, "state_dict": module.state_dict()}, paths[1])
        return module.eval(), str(paths[0]), str(paths[1])

    return make


def images(rows=4):
    return torch.randint(256, (rows, 3, 16, 16), dtype=torch.uint8)


def inputs_of(model, raw):
    return model.data_preprocessor({"inputs": raw, "data_samples": None})["inputs"]


def agrees(holder, student, module, seen=None):
    """The teacher sees the images as its network would that has the preprocessor of ``seen`` (its own)."""
    raw = images()
    with torch.no_grad():
        expected = module(inputs_of(seen or module, raw))
    torch.testing.assert_close(holder(inputs_of(student, raw)), expected, rtol=1e-4, atol=1e-4)


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preprocessor", ["model", "file"])
@pytest.mark.parametrize("keywords", [{}, {"mean": OTHER_MEAN}, {"std": (1.0, 2.0, 3.0)}])
@pytest.mark.parametrize("to_rgb", [True, False])
def test_a_config_file_and_its_checkpoint_give_the_teacher_and_its_inputs(
    small_network, trained, preprocessor, keywords, to_rgb
):
    module, config, ckpt = trained(preprocessor=preprocessor, **keywords)
    network = small_network()
    network["data_preprocessor"]["to_rgb"] = to_rgb  # where it is not the teacher's the channels are turned
    student = EpochClassifier(**network)
    holder = build_teacher(config, ckpt.replace("teacher.", "*er."), student=student)  # as the epoch of a best one
    agrees(holder, student, module)
    assert (holder.conversion is None) == (to_rgb and not keywords)
    assert holder.num_classes == 3


def test_without_preprocessor_a_config_file_and_a_dict_see_the_students_inputs(student, trained):
    module, config, ckpt = trained(preprocessor="none")
    settings = Config.fromfile(config).to_dict()["model"]
    for teacher in (config, settings, {"cfg_path": config}):
        agrees(build_teacher(teacher, ckpt, student=student), student, module, student)


def test_a_config_file_may_have_a_bare_network(student, tmp_path):
    """Which takes no data preprocessor."""
    module = resnet8(3).eval()
    torch.save(module.state_dict(), tmp_path / "bare.pth")
    Config({"model": {"type": "DistillationNetwork", "name": "resnet8", "num_classes": 3}}).dump(tmp_path / "bare.py")
    holder = build_teacher(tmp_path / "bare.py", tmp_path / "bare.pth", student=student)
    inputs = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(holder(inputs), module(inputs))


@pytest.mark.parametrize("own", [False, True])
def test_a_dict_without_preprocessor_sees_the_students_inputs(student, trained, own):
    module, config, ckpt = trained(mean=OTHER_MEAN)
    settings = Config.fromfile(config).to_dict()["model"]
    if own:
        del settings["data_preprocessor"]["type"]  # what building it fills in
    else:
        del settings["data_preprocessor"]
    before = copy.deepcopy(settings)
    agrees(build_teacher(settings, ckpt, student=student), student, module, module if own else student)
    assert settings == before


def test_a_network_is_taken_as_it_is(student, trained):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    holder = build_teacher(bare, student=student)
    assert holder.module is bare
    assert (holder.conversion, holder.num_classes) == (None, None)
    raw = images()
    torch.testing.assert_close(holder(inputs_of(student, raw)), bare(inputs_of(student, raw)))

    module, _, ckpt = trained(mean=OTHER_MEAN)
    agrees(build_teacher(module, student=student), student, module)
    untrained = copy.deepcopy(module)
    nn.init.zeros_(untrained.head.fc.weight)
    build_teacher(untrained, ckpt, student=student)
    torch.testing.assert_close(untrained.head.fc.weight, module.head.fc.weight)


def test_weights_that_the_config_names_and_those_of_a_classifier_of_this_package(small_network, student, trained):
    """Of the latter the plain one is taken, without its own teacher."""
    module, _, ckpt = trained()
    network = {"type": "ImageClassifier", **small_network(channels=3)}
    ours = {**network, "type": "DistillationClassifier", "teacher": "gone.py", "teacher_ckpt": "gone.pth"}
    weights = {**module.state_dict(), "distill_loss.class_prior.matrix": torch.zeros(3, 3)}
    torch.save({"state_dict": weights}, f"{ckpt}.ours")
    for config, path in (
        ({**network, "pretrained": ckpt}, None),
        ({**network, "init_cfg": {"type": "Pretrained", "checkpoint": ckpt}}, None),
        (
            {
                **network,
                "init_cfg": [{"type": "Normal", "layer": "Conv2d"}, {"type": "Pretrained", "checkpoint": ckpt}],
            },
            None,
        ),
        (ours, f"{ckpt}.ours"),
    ):
        holder = build_teacher(config, path, student=student)
        assert type(holder.module) is ImageClassifier
        torch.testing.assert_close(holder.module.head.fc.weight, module.head.fc.weight)
        assert not holder.module.head.fc.weight.requires_grad


# --- the holder ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_in_eval_mode_and_without_gradient():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    holder = FrozenTeacher(module)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    statistics = module[2].running_mean.clone()
    module.train()  # by somebody else who holds it
    inputs = torch.randn(4, 3, 2, 2, requires_grad=True)
    logits = holder(inputs)
    assert not logits.requires_grad
    assert torch.equal(logits, holder(inputs))
    assert torch.equal(module[2].running_mean, statistics)
    assert not any(part.training for part in module.modules())
