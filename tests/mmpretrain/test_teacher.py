"""Building a teacher, its weights and its inputs, and that it stays out of everything that is trained."""

import copy
import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmpretrain.models import ImageClassifier
from torch import nn

from ikl_plugins.mmpretrain import DistillationClassifier, EpochClassifier, FrozenTeacher, build_teacher
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


# id: keywords, largest difference of a logit to those of the plain network, relative to the largest logit
FAST = {
    "bf16": ({"teacher_precision": "bf16"}, 3e-2),
    "compiled": ({"teacher_compile": True}, 1e-5),
    "channels last": ({"teacher_channels_last": True}, 1e-5),
    "all": ({"teacher_precision": "bf16", "teacher_compile": True, "teacher_channels_last": True}, 3e-2),
}


@pytest.mark.parametrize("case", FAST)
def test_a_faster_teacher_gives_the_same_logits_in_float32(student, trained, monkeypatch, case):
    keywords, tolerance = FAST[case]
    module, _, _ = trained()
    compiles, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: calls.append(module) or compiles(module, backend="eager"))
    inputs = inputs_of(student, images())
    with torch.no_grad():
        expected = module(inputs)
    before = copy.deepcopy(module.state_dict())
    holder = build_teacher(module, student=student, **keywords)
    for _ in range(2):
        logits = holder(inputs)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of the student
        assert holder(inputs).dtype == (torch.float32 if "teacher_precision" in keywords else torch.bfloat16)
    assert len(calls) == keywords.get("teacher_compile", False)
    assert list(holder.module.state_dict()) == list(before)
    assert all(map(torch.equal, holder.module.state_dict().values(), before.values()))
    weight = holder.module.backbone.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == ("teacher_channels_last" in keywords)
    holder.apply(lambda tensor: tensor.double())  # as of a classifier's `.to()`
    assert holder(inputs.double()).dtype == (torch.float32 if "teacher_precision" in keywords else torch.float64)
    own = pickle.loads(pickle.dumps(holder))  # noqa: S301
    torch.testing.assert_close(own(inputs.double()), holder(inputs.double()))
    assert copy.deepcopy(holder) is holder


def test_a_teacher_that_cannot_be_compiled_goes_on_as_it_is_and_says_so(monkeypatch, caplog):
    def broken(module):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module: broken)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    holder = FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), compiled=True)
    inputs = torch.randn(4, 3, 2, 2)
    for _ in range(2):
        torch.testing.assert_close(holder(inputs), holder.module(inputs))
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == [
        "teacher: torch.compile fails, and it goes on uncompiled (RuntimeError: no C++ compiler). "
        "Drop `teacher_compile`."
    ]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"teacher_precision": "fp16"}, ValueError, "`teacher_precision` must be 'bf16' or None, got 'fp16'"),
        ({"teacher_compile": "yes"}, TypeError, "`teacher_compile` must be True or False, got 'yes'"),
        ({"teacher_channels_last": 1}, TypeError, "`teacher_channels_last` must be True or False, got 1"),
    ],
)
def test_other_options_of_the_teacher_are_refused(small_network, trained, keywords, error, message):
    with pytest.raises(error, match=message):
        DistillationClassifier(**small_network(), teacher=trained()[0], **keywords)
