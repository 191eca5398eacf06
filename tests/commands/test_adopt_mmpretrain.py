"""tools/adopt.py on MMPretrain configs: the new file adds what is needed and changes nothing else.

The oracle is MMEngine itself: what the new file inherits is compared with what the old one holds.
"""

import re
import subprocess
import sys
from pathlib import Path

from ikl_plugins.commands import adopt
import pytest

pytest.importorskip("mmpretrain", reason="the configs are MMPretrain's (extra `mmpretrain`)")

import mmpretrain
import torch
from ikl_plugins.commands.adopt.mmpretrain import adopt_config, check_config, setting_names
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

ROOT = Path(adopt.__file__).parent.parent
INSTALLED = Path(mmpretrain.__file__).parent / ".mim" / "configs"

NETWORK = """\
# a small network
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR', depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,),
        stem_channels=4, base_channels=4),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
)
"""
RUNTIME = """\
default_scope = 'mmpretrain'
custom_hooks = [dict(type='EMAHook', momentum=1e-3, priority='ABOVE_NORMAL')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=5), logger=dict(type='LoggerHook'))
data_preprocessor = dict(num_classes=10, mean=[125.3, 123.0, 113.9], std=[51.6, 50.8, 51.3], to_rgb=False)
"""
STUDENT = """\
_base_ = ['parts/network.py', 'parts/runtime.py']
train_dataloader = dict(
    batch_size=4,
    dataset=dict(type='CIFAR10', pipeline=[dict(type='RandomCrop', crop_size=16, padding=4), dict(type='PackInputs')]),
)
val_dataloader = dict(batch_size=4)
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
"""
TEACHER = """\
_base_ = './student.py'
model = dict(backbone=dict(base_channels=8), head=dict(in_channels=16))
"""
LAZY = """\
from mmengine.config import read_base
from mmengine.hooks import EMAHook
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet_CIFAR
from mmpretrain.evaluation import Accuracy

default_scope = "mmpretrain"
custom_hooks = [dict(type=EMAHook, momentum=1e-3)]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=5))
model = dict(
    type=ImageClassifier,
    backbone=dict(type=ResNet_CIFAR, depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,),
                  stem_channels=4, base_channels=4),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=10, in_channels=8),
)
train_dataloader = dict(dataset=dict(pipeline=[dict(type="RandomCrop", crop_size=16)]))
val_dataloader = dict(batch_size=4)
val_evaluator = [dict(type=Accuracy, topk=(1,))]
test_evaluator = [dict(type=Accuracy, topk=(1, 5))]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "parts").mkdir()
    for name, text in {
        "parts/network.py": NETWORK, "parts/runtime.py": RUNTIME, "student.py": STUDENT, "teacher.py": TEACHER,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def checkpoint(folder):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    path = folder / "teacher.pth"
    torch.save({"state_dict": MODELS.build(Config.fromfile(folder / "teacher.py").model).state_dict()}, path)
    return path


def load(adoption, path=None):
    path = adoption.output if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(adoption.text)
    return Config.fromfile(path)


def plain(value):
    """Config content with tuples as lists, types as bare names."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return getattr(value, "__name__", value)


def distil(folder, loss="IKL", output="new.py", **options):
    return adopt_config(
        folder / "student.py", folder / output, loss, teacher=folder / "teacher.py",
        teacher_ckpt=folder / "teacher.pth", **options,
    )  # fmt: skip


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_distillation_config_is_exactly_this(folder, monkeypatch):
    monkeypatch.chdir(folder)
    adoption = adopt_config("student.py", "new.py", "IKL", teacher="teacher.py", teacher_ckpt="teacher.pth")
    assert (
        adoption.text
        == """\
# Distillation with IKL, on top of student.py. Made by tools/adopt.py of ikl_plugins.
_base_ = "./student.py"

custom_imports = dict(imports=["ikl_plugins.mmpretrain"])

custom_hooks = [*_base_.custom_hooks, dict(type="IKLHook")]

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/teacher.py",
    teacher_ckpt="{{ fileDirname }}/teacher.pth",
    distill_loss=dict(type="IKLLoss", alpha=1.0, beta=4.0, temperature=4.0, weight_temperature=100.0),
)
"""
    )
    assert adoption.notes == [
        "distill_loss: a starting point, published for CIFAR-100, resnet56 to resnet20",
        "teacher_ckpt: there is no teacher.pth yet; it must be there when the training starts",
        "custom_hooks: yours (EMAHook) and IKLHook",
    ]


def test_an_adversarial_config_is_exactly_this(folder, monkeypatch):
    monkeypatch.chdir(folder)
    adoption = adopt_config("student.py", "sub/new.py", "IKL", adversarial=True, eps="4/255")
    assert (
        adoption.text
        == """\
# Adversarial training with IKL, on top of student.py. Made by tools/adopt.py of ikl_plugins.
_base_ = "../student.py"

custom_imports = dict(imports=["ikl_plugins.mmpretrain"])

val_evaluator = [_base_.val_evaluator, dict(type="RobustAccuracy", topk=(1,))]

test_evaluator = val_evaluator

default_hooks = dict(checkpoint=dict(save_best="robust/top1", rule="greater"))

custom_hooks = [*_base_.custom_hooks, dict(type="IKLHook")]

model = dict(
    type="AdversarialClassifier",
    attack=dict(
        eps="4/255",
        budget="high_as_executed",
        eps_ramp=1.0,
        random_start="normal",
        objective="soft_cross_entropy",
    ),
    robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True),
    val_attack=dict(eps="4/255", steps=20, step_size="1/255"),
)
"""
    )


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL", "KL"])
def test_what_is_inherited_is_the_old_config(folder, loss, adversarial):
    adoption = (
        adopt_config(folder / "student.py", folder / "a" / "b.py", loss, adversarial=True)
        if adversarial else distil(folder, loss, "a/b.py")
    )  # fmt: skip
    new, old = plain(load(adoption).to_dict()), plain(Config.fromfile(folder / "student.py").to_dict())
    ours = {"attack", "robust_loss", "val_attack"} if adversarial else {"teacher", "teacher_ckpt", "distill_loss"}
    model = new.pop("model")
    assert model.pop("type") == ("AdversarialClassifier" if adversarial else "DistillationClassifier")
    assert {key: model.pop(key) for key in ours}
    assert model | {"type": "ImageClassifier"} == old.pop("model")
    assert new.pop("custom_imports") == {"imports": ["ikl_plugins.mmpretrain"]}
    assert new.pop("custom_hooks") == [*old.pop("custom_hooks"), {"type": "IKLHook"}]
    if adversarial:
        robust = {"type": "RobustAccuracy", "topk": [1]}
        for name in ("val_evaluator", "test_evaluator"):
            assert new.pop(name) == [old.pop(name), robust]
        assert new.pop("default_hooks") == old["default_hooks"] | {
            "checkpoint": {"type": "CheckpointHook", "interval": 5, "save_best": "robust/top1", "rule": "greater"}
        }
        del old["default_hooks"]
    assert new == old


# Typed from the published settings and from the formulas; not from the tool.
STARTING_POINTS = [
    ("IKL", 10, {"alpha": 1.0, "beta": 4.0, "temperature": 4.0, "weight_temperature": 100.0}),
    (
        "GKL",
        10,
        {"alpha": 1.0, "beta": 4.0, "gamma": 0.2, "temperature": 4.0, "weight_temperature": 4.0, "global_info": True},
    ),
    ("DKL", 10, {"alpha": 16.0, "beta": 16.0, "temperature": 4.0}),
    ("KL", 10, {"temperature": 4.0, "scale_by_temperature_squared": True}),
    ("IKL", 1000, {"alpha": 1.0, "beta": 0.5, "global_info": True}),
    ("GKL", 1000, {"alpha": 1.0, "beta": 0.5, "gamma": 0.6, "global_info": True}),
    ("DKL", 1000, {"alpha": 1.0, "beta": 1.0}),
    ("KL", 1000, {}),
]


@pytest.mark.parametrize(("loss", "classes", "expected"), STARTING_POINTS)
def test_the_starting_point_is_the_published_one(folder, loss, classes, expected):
    for name in ("student.py", "teacher.py"):
        path = folder / name
        path.write_text(f"{path.read_text()}classes = {classes}\n")
    network = folder / "parts" / "network.py"
    network.write_text(network.read_text().replace("num_classes=10", f"num_classes={classes}"))
    assert load(distil(folder, loss)).model.distill_loss.to_dict() == {"type": f"{loss}Loss", **expected}


@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL", "KL"])
@pytest.mark.parametrize("classes", [10, 100])
def test_the_robust_starting_point_is_the_published_one(folder, loss, classes):
    network = folder / "parts" / "network.py"
    network.write_text(network.read_text().replace("num_classes=10", f"num_classes={classes}"))
    model = load(adopt_config(folder / "student.py", folder / "new.py", loss, adversarial=True)).model
    published = {"alpha": {10: 4.0, 100: 5.0}[classes], "beta": 20.0, "weight_temperature": 4.0, "global_info": True}
    trades = {"KL": {"loss_weight": 6.0}, "DKL": {"alpha": 6.0, "beta": 6.0}}
    expected = trades.get(loss, published | ({"gamma": 1.0} if loss == "GKL" else {}))
    assert model.robust_loss.to_dict() == {"type": f"{loss}Loss", **expected}
    both_terms = loss in ("IKL", "GKL") and classes == 100
    assert model.attack.objective == ("ikl" if both_terms else "soft_cross_entropy")


def test_dkl_and_kl_of_a_starting_point_have_the_same_gradients(folder):
    import ikl_plugins.mmpretrain as ours

    student, teacher = (torch.randn(6, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for loss in ("DKL", "KL"):
        config = load(distil(folder, loss)).model.distill_loss.to_dict()
        value = getattr(ours, config.pop("type"))(**config)(student, teacher)
        found.append(torch.autograd.grad(value, (student, teacher)))
    torch.testing.assert_close(found[0], found[1])


def test_settings_go_to_the_loss_or_to_the_classifier(folder):
    adoption = distil(folder, settings={"beta": 12.0, "warmup_epochs": 20, "distill_weight": 0.9, "global_info": True})
    model = load(adoption).model
    assert model.distill_loss.to_dict() == {
        "type": "IKLLoss", "alpha": 1.0, "beta": 12.0, "temperature": 4.0, "weight_temperature": 100.0,
        "global_info": True,
    }  # fmt: skip
    assert (model.warmup_epochs, model.distill_weight) == (20, 0.9)
    assert adoption.notes[0].endswith("; yours: beta, global_info")
    assert "natural_weight" in setting_names("IKL", adversarial=True)
    assert "scale_by_temperature_squared" in setting_names("KL", adversarial=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("custom_imports = dict(imports='json')\n", ["json", "ikl_plugins.mmpretrain"]),
        (
            "custom_imports = dict(imports=['json', 'csv'], allow_failed_imports=True)\n",
            ["json", "csv", "ikl_plugins.mmpretrain"],
        ),
        ("custom_imports = dict(imports=['ikl_plugins.mmpretrain'])\n", ["ikl_plugins.mmpretrain"]),
    ],
)
def test_imports_of_the_users_stay(folder, before, after):
    (folder / "student.py").write_text(STUDENT + before)
    adoption = distil(folder)
    config = load(adoption)
    assert config.custom_imports.imports == after
    assert config.custom_imports.get("allow_failed_imports") == (True if "allow_failed" in before else None)
    assert ("custom_imports" in adoption.text) == (len(after) > 1)


def test_hooks_are_added_only_where_they_are_missing(folder):
    (folder / "student.py").write_text(STUDENT + "custom_hooks = [dict(type='IKLHook', seed_epochs=False)]\n")
    assert "custom_hooks" not in distil(folder).text
    (folder / "student.py").write_text(STUDENT + "custom_hooks = None\n")
    assert load(distil(folder)).custom_hooks == [{"type": "IKLHook"}]
    (folder / "parts" / "runtime.py").write_text(RUNTIME.replace("custom_hooks", "some_hooks"))
    (folder / "student.py").write_text(STUDENT)
    assert load(distil(folder)).custom_hooks == [{"type": "IKLHook"}]


def test_lists_of_evaluators_and_evaluators_that_differ(folder):
    extra = "val_evaluator = [dict(type='Accuracy'), dict(type='SingleLabelMetric')]\n"
    extra += "test_evaluator = dict(type='Accuracy')\n"
    (folder / "student.py").write_text(STUDENT + extra)
    config = load(adopt_config(folder / "student.py", folder / "new.py", "KL", adversarial=True))
    assert [metric.type for metric in config.val_evaluator] == ["Accuracy", "SingleLabelMetric", "RobustAccuracy"]
    assert [metric.type for metric in config.test_evaluator] == ["Accuracy", "RobustAccuracy"]


def test_without_validation_none_is_added(folder):
    (folder / "student.py").write_text(STUDENT + "val_evaluator = None\ntest_evaluator = None\n")
    adoption = adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True)
    assert "RobustAccuracy" not in adoption.text
    assert "val_attack" not in adoption.text
    assert any(note.startswith("no validation") for note in adoption.notes)


def test_a_checkpoint_hook_is_made_where_there_is_none(folder):
    (folder / "parts" / "runtime.py").write_text(RUNTIME.replace("checkpoint=", "other="))
    config = load(adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True))
    assert config.default_hooks.checkpoint.to_dict() == {
        "type": "CheckpointHook", "interval": 1, "save_best": "robust/top1", "rule": "greater",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broadcast", "added"), [("", True), (", broadcast_buffers=True", True), (", broadcast_buffers=False", False)]
)
def test_a_wrapper_must_not_overwrite_running_sums(folder, broadcast, added):
    (folder / "student.py").write_text(
        f"{STUDENT}model_wrapper_cfg = dict(type='MMDistributedDataParallel'{broadcast})\n"
    )
    config = load(distil(folder, "GKL"))
    assert config.model_wrapper_cfg.broadcast_buffers is False
    assert ("model_wrapper_cfg" in distil(folder, "GKL").text) == added
    assert "model_wrapper_cfg" not in distil(folder, "IKL").text  # no class prior, no sums


MIXERS = {
    "mixup": "model = dict(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)]))\n",
    "batch_augments": "model = dict(data_preprocessor=dict(batch_augments=dict(augments=[dict(type='CutMix', "
    "alpha=1.)])))\n",
    "to_onehot": "data_preprocessor = dict(to_onehot=True)\n",
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("adversarial", [False, True])
def test_mixed_images_and_a_class_prior_do_not_go_together(folder, name, adversarial):
    (folder / "student.py").write_text(STUDENT + MIXERS[name])

    def make(**options):
        if adversarial:
            return adopt_config(folder / "student.py", folder / "new.py", "GKL", adversarial=True, **options)
        return distil(folder, "GKL", **options)

    adoption = make()
    assert "global_info" not in adoption.text
    assert any("gives images no single label, so the class prior is left off" in note for note in adoption.notes)
    with pytest.raises(ValueError, match=r"student\.py, line 9: `[\w.]+` must go with global_info=False"):
        make(settings={"global_info": True})


def test_a_preprocessor_of_the_models_goes_before_one_at_the_top(folder):
    added = MIXERS["to_onehot"] + "model = dict(data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3))\n"
    (folder / "student.py").write_text(STUDENT + added)
    assert load(distil(folder, "GKL")).model.distill_loss.global_info is True


def test_a_head_that_knows_no_classes_takes_those_of_the_backbone(folder):
    network = (
        "model = dict(type='ImageClassifier', backbone=dict(type='LeNet5', num_classes=10), "
        "head=dict(type='ClsHead'))\n"
    )
    (folder / "student.py").write_text(network + "default_scope = 'mmpretrain'\n")
    adoption = adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True)
    assert load(adoption).model.robust_loss.num_classes == 10
    (folder / "student.py").write_text(network.replace(", num_classes=10", ""))
    adoption = adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True)
    assert "global_info" not in adoption.text
    assert "the head has no `num_classes`, so the class prior is left off (global_info=False)" in adoption.notes
    with pytest.raises(ValueError, match=r"`num_classes` of the head must be given with global_info=True, got none"):
        adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True, settings={"global_info": True})


# --- it works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["IKL", "GKL"])
def test_the_check_builds_and_trains_a_distillation(folder, checkpoint, loss, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # paths in the new file are seen from the file
    built, trained = check_config(distil(folder, loss, "a/b.py"))
    assert built.startswith("DistillationClassifier with ")
    assert "2 hooks" in built
    assert trained.startswith("a batch of random images of shape (3, 16, 16): loss_ce ")
    assert "loss_distill" in trained
    assert list((folder / "a").iterdir()) == []


def test_the_check_builds_and_trains_adversarially(folder):
    _, trained = check_config(adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True))
    assert "loss_robust" in trained


def test_the_top_level_data_preprocessor_is_the_models(folder):
    """Images of one channel, of which only the top-level mean tells."""
    text = STUDENT + "data_preprocessor = dict(_delete_=True, mean=[33.46], std=[78.87])\n"
    text += "model = dict(backbone=dict(in_channels=1))\n"
    (folder / "student.py").write_text(text)
    _, trained = check_config(adopt_config(folder / "student.py", folder / "new.py", "KL", adversarial=True))
    assert "shape (1, 16, 16)" in trained


def test_mixup_trains(folder, checkpoint):
    (folder / "student.py").write_text(STUDENT + MIXERS["mixup"])
    assert (
        "loss_robust" in check_config(adopt_config(folder / "student.py", folder / "n.py", "IKL", adversarial=True))[1]
    )
    assert "loss_distill" in check_config(distil(folder, "GKL"))[1]


def test_mmengines_runner_takes_the_new_config(folder, checkpoint):
    config = load(distil(folder))
    config.work_dir = str(folder / "work")
    for name in ("train", "val", "test"):
        for part in (f"{name}_dataloader", f"{name}_cfg", f"{name}_evaluator"):
            config.pop(part, None)
    model = Runner.from_cfg(config).model
    assert type(model).__name__ == "DistillationClassifier"
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([125.3, 123.0, 113.9])
    assert model.teacher.module.backbone.base_channels == 8


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_lazy_style(folder, checkpoint, adversarial):
    (folder / "lazy.py").write_text(LAZY)
    options = {"adversarial": True} if adversarial else {"teacher": folder / "teacher.py", "teacher_ckpt": checkpoint}
    adoption = adopt_config(folder / "lazy.py", folder / "sub" / "new.py", "GKL", **options)
    assert "    from ..lazy import *\n" in adoption.text
    new, old = plain(load(adoption).to_dict()), plain(Config.fromfile(folder / "lazy.py").to_dict())
    assert [hook["type"].rpartition(".")[2] for hook in new["custom_hooks"]] == ["EMAHook", "IKLHook"]
    assert new["custom_hooks"][0] == old["custom_hooks"][0]
    assert all(new["model"][part] == old["model"][part] for part in ("backbone", "neck", "head"))
    if adversarial:
        for name in ("val_evaluator", "test_evaluator"):
            assert new[name] == [*old[name], {"type": "ikl_plugins.mmpretrain.RobustAccuracy", "topk": [1]}]
        assert new["default_hooks"]["checkpoint"] == old["default_hooks"]["checkpoint"] | {
            "save_best": "robust/top1", "rule": "greater",
        }  # fmt: skip
    assert len(check_config(adoption)) == 2
    again = adopt_config(folder / "sub" / "new.py", folder / "x.py", "GKL", **options)
    assert again.text == ""


def test_a_lazy_config_must_be_importable(folder):
    (folder / "my-lazy.py").write_text(LAZY)
    with pytest.raises(ValueError, match=r"a config in the lazy style must have a path that Python can import, got "):
        adopt_config(folder / "my-lazy.py", folder / "new.py", "IKL", adversarial=True)


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "another model": (
        "model = dict(type='MAE')\n",
        r"student\.py, line 9: `type` of `model` must be ImageClassifier, .*got MAE",
    ),
    "no head": ("model = dict(head=None)\n", r"student\.py, line 9: `head` of `model` must be a dict.* got none"),
    "two heads": (
        "model = dict(head=dict(_delete_=True, type='ConformerHead', num_classes=10, in_channels=[8, 8]))\n",
        r"student\.py, line 9: `head` of `model` must give one set .*got ConformerHead, which has two sets of logits",
    ),
    "several labels": (
        "model = dict(head=dict(_delete_=True, type='MultiLabelLinearClsHead', num_classes=10, in_channels=8))\n",
        r"got MultiLabelLinearClsHead, which has several labels for an image",
    ),
    "a distilled head": (
        "model = dict(\n    head=dict(_delete_=True, type='LeViTClsHead', num_classes=10, in_channels=8))\n",
        r"student\.py, line 10: `distillation` of LeViTClsHead must be False.*Write head=dict\(distillation=False\)",
    ),
    "no model": (
        "model = dict(_delete_=True)\nmodel = None\n",
        r"student\.py, line 10: `model` must be a dict, got none",
    ),
    "not Python": ("a = = 1\n", r"student\.py, line 9: the config must be Python, but invalid syntax"),
    "an error inside": (
        "a = 1 / 0\n",
        r"student\.py must be an MMEngine config, but ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("adversarial", [False, True])
def test_what_cannot_be_adopted_is_refused_by_line_and_key(folder, case, adversarial):
    added, message = REFUSED[case]
    (folder / "other_teacher.py").write_text("_base_ = ['parts/network.py', 'parts/runtime.py']\n")
    (folder / "student.py").write_text(STUDENT + added)
    options = {"adversarial": True} if adversarial else {"teacher": folder / "other_teacher.py"}
    with pytest.raises(ValueError, match=rf"(?s)adopt: .*{message}"):
        adopt_config(folder / "student.py", folder / "new.py", "IKL", **options)


def test_a_base_that_is_missing_is_named(folder):
    (folder / "parts" / "network.py").unlink()
    with pytest.raises(
        ValueError, match=r"student\.py must be an MMEngine config, but FileNotFoundError: .*network\.py"
    ):
        distil(folder)


def test_the_line_is_that_of_the_base_which_sets_the_key(folder):
    network = folder / "parts" / "network.py"
    network.write_text(NETWORK.replace("'LinearClsHead'", "'CSRAClsHead'"))
    with pytest.raises(ValueError, match=r"parts/network\.py, line 8: `head` of `model` must give one set"):
        adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True)
    network.write_text(NETWORK.replace("depth=18", "with_cp=True, depth=18"))
    with pytest.raises(ValueError, match=r"parts/network\.py, line 5: `with_cp` of the backbone must be False"):
        adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True)
    assert distil(folder).text  # without an attack checkpointing is fine


def test_what_is_adopted_is_not_adopted_in_another_way(folder):
    load(distil(folder))
    with pytest.raises(
        ValueError, match=r"new\.py, line 9: `model` must be a plain ImageClassifier, got DistillationClassifier"
    ):
        adopt_config(folder / "new.py", folder / "x.py", "IKL", adversarial=True)
    assert adopt_config(folder / "new.py", folder / "x.py", "IKL", teacher=folder / "teacher.py").text == ""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"must be given --teacher and --teacher-ckpt, or --adversarial, got none of them"),
        ({"adversarial": True, "teacher": "t.py"}, ValueError, r"--adversarial must stand without a teacher, got one"),
        ({"eps": 0.1, "teacher": "t.py"}, ValueError, r"--eps goes with --adversarial, got it without"),
        ({"teacher": "nowhere.py"}, ValueError, r"--teacher must be a file, but there is none at nowhere\.py"),
        ({"settings": {"bta": 1}}, ValueError, r"adopt: unknown keyword of --set `bta`\. Did you mean `beta`\?"),
        (
            {"adversarial": True, "settings": {"beta": -1}},
            ValueError,
            r"for the new loss: IKLLoss: `beta` must be a finite",
        ),
        (
            {"adversarial": True, "settings": {"loss_weight": "x"}},
            TypeError,
            r"for the new loss: IKLLoss: `loss_weight` must",
        ),
    ],
)
def test_options_that_do_not_fit(folder, options, error, message):
    with pytest.raises(error, match=message):
        adopt_config(folder / "student.py", folder / "new.py", "IKL", **options)


def test_a_kl_temperature_must_be_one(folder):
    with pytest.raises(ValueError, match=r"for the new loss: KLLoss: `temperature` must be a finite number above 0"):
        distil(folder, "KL", settings={"temperature": 0})


def test_a_teacher_of_other_classes_is_refused(folder):
    (folder / "teacher.py").write_text(TEACHER.replace("in_channels=16", "in_channels=16, num_classes=100"))
    with pytest.raises(
        ValueError, match=r"teacher\.py, line 2: `num_classes` of the teacher's head must be .*10, got 100"
    ):
        distil(folder)


def test_a_teacher_without_a_model_is_refused(folder):
    (folder / "teacher.py").write_text("a = 1\n")
    with pytest.raises(ValueError, match=r"teacher\.py: `model` must be a dict, got none"):
        distil(folder)


def test_the_check_says_what_is_wrong(folder, checkpoint):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, checkpoint)
    with pytest.raises(ValueError, match=r"adopt: the new config must build, but .*does not fit it; missing: "):
        check_config(distil(folder))
    (folder / "student.py").write_text(STUDENT + "custom_imports = dict(imports='no_such_module')\n")
    with pytest.raises(ImportError, match="Failed to import custom modules"):
        check_config(distil(folder))
    (folder / "student.py").write_text(STUDENT + "model = dict(backbone=dict(in_channels=5))\n")
    with pytest.raises(
        ValueError, match=r"the new model must train on 2 random images of shape \(3, 16, 16\), but Runtime"
    ):
        check_config(adopt_config(folder / "student.py", folder / "new.py", "IKL", adversarial=True))


# --- installed configs -----------------------------------------------------------------------------------------------


def adopted_alike(path, folder):
    """Adopts an installed config in both ways; what came of it, for a count."""
    seen = []
    for adversarial in (False, True):
        options = {"adversarial": True} if adversarial else {"teacher": path, "teacher_ckpt": "https://a.b/c.pth"}
        try:
            adoption = adopt_config(path, folder / "new.py", "IKL", **options)
        except ValueError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert said.startswith(f"adopt: {INSTALLED}")
            seen.append("unreadable" if "must be an MMEngine config" in said else "refused")
            continue
        new, old = plain(load(adoption).to_dict()), plain(Config.fromfile(path, import_custom_modules=False).to_dict())
        ours = ("type", "attack", "robust_loss", "val_attack", "teacher", "teacher_ckpt", "distill_loss")
        assert {key: value for key, value in new["model"].items() if key not in ours} == {
            key: value for key, value in old["model"].items() if key != "type"
        }
        assert new["custom_hooks"] == [*old.get("custom_hooks", []), {"type": "IKLHook"}]
        added = {"model", "custom_imports", "custom_hooks"}
        added |= {"val_evaluator", "test_evaluator", "default_hooks"} if adversarial else set()
        assert {key for key in {*new, *old} if new.get(key) != old.get(key)} <= added
        seen.append("adopted")
    return seen


@pytest.mark.parametrize(
    "name",
    [
        "resnet/resnet18_8xb16_cifar10.py", "vision_transformer/vit-base-p16_32xb128-mae_in1k.py",
        "swin_transformer/swin-tiny_16xb64_in1k.py", "convnext/convnext-tiny_32xb128_in1k.py",
        "mobilenet_v2/mobilenet-v2_8xb32_in1k.py", "lenet/lenet5_mnist.py", "arcface/resnet50-arcface_8xb32_inshop.py",
        "regnet/regnetx-400mf_8xb128_in1k.py",
    ],
)  # fmt: skip
def test_installed_configs_are_adopted(name, tmp_path):
    path = INSTALLED / name
    if not path.is_file():
        pytest.skip(f"this MMPretrain has no {name}")
    seen = adopted_alike(path, tmp_path)
    assert seen == (["refused"] * 2 if "arcface" in name else ["adopted"] * 2)


@pytest.mark.slow
def test_every_installed_config_is_adopted_or_refused_in_one_line(tmp_path):
    counts = {"adopted": 0, "refused": 0, "unreadable": 0}
    for path in sorted(INSTALLED.rglob("*.py")):
        if "_base_" not in path.parts:
            for outcome in adopted_alike(path, tmp_path):
                counts[outcome] += 1
    assert counts["adopted"] > 700
    assert counts["unreadable"] < 30


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "adopt.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(cwd)},
    )  # fmt: skip


def test_the_command_line(folder, checkpoint):
    done = run(
        "student.py", "--teacher", "teacher.py", "--teacher-ckpt", "teacher.pth", "--loss", "GKL", "--set", "beta=8.0",
        "--output", "runs/gkl.py", "--check", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--- /dev/null\n+++ runs/gkl.py\n@@")
    assert "checked: DistillationClassifier" in done.stderr
    assert "UserWarning" not in done.stderr
    assert Config.fromfile(folder / "runs" / "gkl.py").model.distill_loss.beta == 8.0
    assert [path.name for path in (folder / "runs").iterdir()] == ["gkl.py"]


def adopt_main(capsys, *arguments):
    status = None
    try:
        adopt.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return out, err, status


def test_the_command_refuses_in_one_line(folder, capsys):
    student = folder / "student.py"
    message = (
        "error: adopt: --in-place goes with a torchdistill YAML, as the new config inherits from the old one; use "
    )
    assert adopt_main(capsys, student, "--adversarial", "--in-place")[2].startswith(message)
    assert "--teacher-logits goes with a torchdistill YAML" in adopt_main(capsys, student, "--teacher-logits", "fc")[2]
    status = adopt_main(capsys, student, "--adversarial", "--output", student, "--force")[2]
    assert status.startswith("error: adopt: --output must be another file than the config")
    assert student.read_text() == STUDENT


def test_without_an_output_nothing_is_written(folder, capsys):
    before = sorted(folder.rglob("*"))
    out, err, status = adopt_main(capsys, folder / "student.py", "--adversarial", "--check")
    assert status is None
    assert '+_base_ = "./student.py"\n' in out
    assert "checked: AdversarialClassifier" in err
    assert err.endswith("nothing written; give --output FILE\n")
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_an_adopted_config_says_so(folder, capsys):
    load(distil(folder))
    out, err, status = adopt_main(
        capsys, folder / "new.py", "--teacher", folder / "teacher.py", "--output", folder / "x.py"
    )
    assert (out, status) == ("", None)
    assert err == f"{folder / 'new.py'} is adopted already: nothing to change, nothing written\n"
    assert not (folder / "x.py").exists()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_tool_makes(tmp_path, monkeypatch):
    student, distilled, robust = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adopt.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "my_student.py": student, "my_teacher.py": "_base_ = './my_student.py'\n", "my_teacher.pth": "",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    made = adopt_config("my_student.py", "new.py", "IKL", teacher="my_teacher.py", teacher_ckpt="my_teacher.pth")
    assert made.text == distilled
    assert adopt_config("my_student.py", "new.py", "IKL", adversarial=True).text == robust
