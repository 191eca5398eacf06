"""`ikl adopt` on MMPretrain configs: the new file adds what is needed and changes nothing else.

The oracle is MMEngine itself: what the new file inherits is compared with what the old one holds.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("mmpretrain", reason="the configs are MMPretrain's (extra `mmpretrain`)")

import mmpretrain
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

import ikl_plugins.mmpretrain
from ikl_plugins.commands.adopt.mmpretrain import adopt_config, check_config, setting_names

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
def folder(tmp_path, monkeypatch):
    """The working directory, with configs of a student and its teacher."""
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    files = {"parts/network.py": NETWORK, "parts/runtime.py": RUNTIME, "student.py": STUDENT, "teacher.py": TEACHER}
    for name, text in files.items():
        Path(name).write_text(text)
    return tmp_path


@pytest.fixture
def checkpoint(folder):
    init_default_scope("mmpretrain")
    path = folder / "teacher.pth"
    torch.save({"state_dict": MODELS.build(Config.fromfile(folder / "teacher.py").model).state_dict()}, path)
    return path


def load(adoption):
    adoption.output.parent.mkdir(parents=True, exist_ok=True)
    adoption.output.write_text(adoption.text)
    return Config.fromfile(adoption.output)


def plain(value):
    """Config content with tuples as lists, types as bare names."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return getattr(value, "__name__", value)


def distil(loss="IKL", output="new.py", config="student.py", **options):
    options = {"teacher": "teacher.py", "teacher_ckpt": "teacher.pth", **options}
    return adopt_config(config, output, loss, **options)


def robust(loss="IKL", output="new.py", config="student.py", **options):
    return adopt_config(config, output, loss, adversarial=True, **options)


WAYS = pytest.mark.parametrize("adopt", [distil, robust])


def extend(text, file="student.py"):
    Path(file).write_text((STUDENT if file == "student.py" else "") + text)


def change(file, old, new):
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_radius_of_the_attack(folder):
    for eps, step in (("4/255", "1/255"), (0.1, 0.025)):
        model = load(robust(eps=eps)).model
        assert (model.attack.eps, model.val_attack.to_dict()) == (eps, {"eps": eps, "steps": 20, "step_size": step})


BEST = {"save_best": "robust/top1", "rule": "greater"}


def outcome(adopt, path, loss="IKL"):
    """'adopted' where the new config is the old one with what adopting adds; else 'refused' or 'unreadable'."""
    options = {} if adopt is robust else {"teacher": path, "teacher_ckpt": "https://a.b/c.pth"}
    try:
        adoption = adopt(loss, "a/b.py", path, **options)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert re.match(r"ikl adopt: /\S+\.py(, line \d+)?[: ]", said)
        return "unreadable" if "must be an MMEngine config" in said else "refused"
    new, old = plain(load(adoption).to_dict()), plain(Config.fromfile(path, import_custom_modules=False).to_dict())
    ours = ("type", "attack", "robust_loss", "val_attack", "teacher", "teacher_ckpt", "distill_loss")
    kept = {key: value for key, value in new["model"].items() if key not in ours}
    assert kept == {key: value for key, value in old["model"].items() if key != "type"}
    assert new["custom_hooks"] == [*old.get("custom_hooks", []), {"type": "IKLHook"}]
    added = {"model", "custom_imports", "custom_hooks"}
    added |= {"val_evaluator", "test_evaluator", "default_hooks"} if adopt is robust else set()
    assert {key for key in {*new, *old} if new.get(key) != old.get(key)} <= added
    return "adopted"


@WAYS
@pytest.mark.parametrize("loss", ["DKL", "IKL", "GKL", "KL"])
def test_what_is_inherited_is_the_old_config(folder, loss, adopt):
    assert outcome(adopt, folder / "student.py", loss) == "adopted"
    if adopt is robust:
        assert Config.fromfile("a/b.py").default_hooks.checkpoint == {"type": "CheckpointHook", "interval": 5, **BEST}


INSTALLED_EXAMPLES = {
    "resnet/resnet18_8xb16_cifar10.py": "adopted",
    "swin_transformer/swin-tiny_16xb64_in1k.py": "adopted",
    "lenet/lenet5_mnist.py": "adopted",
    "arcface/resnet50-arcface_8xb32_inshop.py": "refused",
}


@WAYS
@pytest.mark.parametrize("name", INSTALLED_EXAMPLES)
def test_installed_configs_are_adopted(tmp_path, monkeypatch, name, adopt):
    monkeypatch.chdir(tmp_path)
    if not (INSTALLED / name).is_file():
        pytest.skip(f"this MMPretrain has no {name}")
    assert outcome(adopt, INSTALLED / name) == INSTALLED_EXAMPLES[name]


@pytest.mark.slow
def test_every_installed_config_is_adopted_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [path for path in sorted(INSTALLED.rglob("*.py")) if "_base_" not in path.parts]
    counts = Counter(outcome(adopt, path) for path in paths for adopt in (distil, robust))
    assert counts["adopted"] > 700
    assert counts["unreadable"] < 30


# Typed from the published settings and from the formulas; not from the command.
LARGE = {"alpha": 1.0, "beta": 0.5, "global_info": True}
START = {
    "alpha": 4.0,
    "beta": 0.5,
    "temperature": 4.0,
    "weight_temperature": 4.0,
}  # the first lines of docs/choosing.md
ROBUST_IKL = {"beta": 20.0, "weight_temperature": 4.0, "global_info": True}
STARTING_POINTS = [
    (distil, "IKL", 10, START),
    (distil, "GKL", 10, {"alpha": 4.0, "beta": 2.0, "gamma": 0.5, "temperature": 4.0}),
    (distil, "DKL", 10, {"alpha": 1.0, "beta": 1.0}),
    (distil, "KL", 10, {"temperature": 4.0, "scale_by_temperature_squared": True}),
    (distil, "IKL", 1000, LARGE),
    (distil, "GKL", 1000, {**LARGE, "gamma": 0.6}),
    (distil, "DKL", 1000, {"alpha": 1.0, "beta": 1.0}),
    (distil, "KL", 1000, {}),
    (robust, "IKL", 10, {"alpha": 4.0, **ROBUST_IKL}),
    (robust, "IKL", 100, {"alpha": 5.0, **ROBUST_IKL}),
    (robust, "GKL", 10, {"alpha": 4.0, **ROBUST_IKL, "gamma": 0.2}),
    (robust, "GKL", 100, {"alpha": 4.0, "beta": 20.0, "global_info": True, "gamma": 0.4}),
    (robust, "DKL", 10, {"alpha": 6.0, "beta": 6.0}),
    (robust, "DKL", 100, {"alpha": 9.0, "beta": 9.0}),
    (robust, "KL", 10, {"loss_weight": 6.0}),
    (robust, "KL", 100, {"loss_weight": 9.0}),
]


@pytest.mark.parametrize(("adopt", "loss", "classes", "expected"), STARTING_POINTS)
def test_the_starting_point_is_the_published_one(folder, adopt, loss, classes, expected):
    change("parts/network.py", "num_classes=10", f"num_classes={classes}")
    model = load(adopt(loss)).model
    found = model.robust_loss if adopt is robust else model.distill_loss
    assert found.to_dict() == {"type": f"{loss}Loss", **expected}
    if adopt is robust:
        assert model.attack.objective == ("ikl" if classes == 100 and loss in ("IKL", "GKL") else "soft_cross_entropy")


def test_dkl_and_kl_of_adversarial_training_have_the_same_gradients(folder):
    student, teacher = (torch.randn(6, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for loss in ("DKL", "KL"):
        config = load(robust(loss)).model.robust_loss.to_dict()
        value = getattr(ikl_plugins.mmpretrain, config.pop("type"))(**config)(student, teacher)
        found.append(torch.autograd.grad(value, (student, teacher)))
    torch.testing.assert_close(found[0], found[1])


def test_settings_go_to_the_loss_or_to_the_classifier(folder):
    adoption = distil(settings={"beta": 12.0, "warmup_epochs": 20, "distill_weight": 0.9, "global_info": True})
    model = load(adoption).model
    expected = {**START, "beta": 12.0, "global_info": True}
    assert model.distill_loss.to_dict() == {"type": "IKLLoss", **expected}
    assert (model.warmup_epochs, model.distill_weight) == (20, 0.9)
    assert adoption.notes[0].endswith("; yours: beta, global_info")
    assert "natural_weight" in setting_names("IKL", adversarial=True)
    assert "scale_by_temperature_squared" in setting_names("KL", adversarial=False)


IMPORTS = [
    ("'json'", ["json", "ikl_plugins.mmpretrain"]),
    ("['json', 'csv'], allow_failed_imports=True", ["json", "csv", "ikl_plugins.mmpretrain"]),
    ("['ikl_plugins.mmpretrain']", ["ikl_plugins.mmpretrain"]),
]


@pytest.mark.parametrize(("held", "expected"), IMPORTS)
def test_imports_of_the_users_stay(folder, held, expected):
    extend(f"custom_imports = dict(imports={held})\n")
    adoption = distil()
    config = load(adoption)
    assert config.custom_imports.imports == expected
    assert config.custom_imports.get("allow_failed_imports", False) == ("allow_failed" in held)
    assert ("custom_imports" in adoption.text) == (len(expected) > 1)


def test_hooks_are_added_only_where_they_are_missing(folder):
    extend("custom_hooks = [dict(type='IKLHook', seed_epochs=False)]\n")
    assert "custom_hooks" not in distil().text
    extend("custom_hooks = None\n")
    assert load(distil()).custom_hooks == [{"type": "IKLHook"}]
    change("parts/runtime.py", "custom_hooks", "some_hooks")
    extend("")
    assert load(distil()).custom_hooks == [{"type": "IKLHook"}]


def test_lists_of_evaluators_and_evaluators_that_differ(folder):
    two = "val_evaluator = [dict(type='Accuracy'), dict(type='SingleLabelMetric')]"
    extend(f"{two}\ntest_evaluator = dict(type='Accuracy')\n")
    config = load(robust("KL"))
    assert [metric.type for metric in config.val_evaluator] == ["Accuracy", "SingleLabelMetric", "RobustAccuracy"]
    assert [metric.type for metric in config.test_evaluator] == ["Accuracy", "RobustAccuracy"]


@pytest.mark.parametrize("missing", ["val_evaluator = None\ntest_evaluator = None\n", "val_dataloader = None\n"])
def test_without_validation_none_is_added(folder, missing):
    extend(missing)
    adoption = robust()
    assert "RobustAccuracy" not in adoption.text
    assert "val_attack" not in adoption.text
    assert any(note.startswith("no validation") for note in adoption.notes)


def test_a_checkpoint_hook_is_made_where_there_is_none(folder):
    change("parts/runtime.py", "checkpoint=", "other=")
    expected = {"type": "CheckpointHook", "interval": 1, **BEST}
    assert load(robust()).default_hooks.checkpoint.to_dict() == expected


@pytest.mark.parametrize("broadcast", ["", ", broadcast_buffers=True", ", broadcast_buffers=False"])
def test_a_wrapper_must_not_overwrite_running_sums(folder, broadcast):
    extend(f"model_wrapper_cfg = dict(type='MMDistributedDataParallel'{broadcast})\n")
    with_prior = distil("GKL", settings={"global_info": True})
    assert load(with_prior).model_wrapper_cfg.broadcast_buffers is False
    assert ("model_wrapper_cfg" in with_prior.text) == ("False" not in broadcast)
    assert "model_wrapper_cfg" not in distil("IKL").text  # no class prior, no sums


MIXUP = "model = dict(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)]))\n"
ONE_HOT = "data_preprocessor = dict(to_onehot=True)\n"
CUTMIX = "model = dict(data_preprocessor=dict(batch_augments=dict(augments=[dict(type='CutMix', alpha=1.)])))\n"


@WAYS
@pytest.mark.parametrize("mixer", [MIXUP, CUTMIX, ONE_HOT])
def test_mixed_images_and_a_class_prior_do_not_go_together(folder, mixer, adopt):
    change("parts/network.py", "num_classes=10", "num_classes=1000")  # both begin with a class prior
    extend(mixer)
    adoption = adopt("GKL")
    assert "global_info" not in adoption.text
    assert any("so the class prior is left off" in note for note in adoption.notes)
    with pytest.raises(ValueError, match=r"student\.py, line 9: `[\w.]+` must go with global_info=False"):
        adopt("GKL", settings={"global_info": True})


def test_a_preprocessor_of_the_models_goes_before_one_at_the_top(folder):
    extend(f"{ONE_HOT}model = dict(data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3))\n")
    assert load(distil("GKL", settings={"global_info": True})).model.distill_loss.global_info is True


def test_a_head_that_knows_no_classes_takes_those_of_the_backbone(folder):
    backbone = "dict(type='LeNet5', num_classes=10)"
    network = f"model = dict(type='ImageClassifier', backbone={backbone}, head=dict(type='ClsHead'))\n"
    Path("lenet.py").write_text(network + "default_scope = 'mmpretrain'\n")
    assert load(robust(config="lenet.py")).model.robust_loss.num_classes == 10
    change("lenet.py", ", num_classes=10", "")
    adoption = robust(config="lenet.py")
    assert "global_info" not in adoption.text
    assert any(note.startswith("the head has no `num_classes`") for note in adoption.notes)
    with pytest.raises(ValueError, match=r"`num_classes` of the head must be given with global_info=True, got none"):
        robust(config="lenet.py", settings={"global_info": True})


# --- it works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["IKL", "GKL"])
def test_the_check_builds_and_trains_a_distillation(folder, checkpoint, loss, monkeypatch, tmp_path_factory):
    adoption = adopt_config(
        folder / "student.py", folder / "a" / "b.py", loss, teacher="teacher.py", teacher_ckpt="teacher.pth"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # paths in the new file are seen from the file
    built, trained = check_config(adoption)
    assert built.startswith("DistillationClassifier with ")
    assert "2 hooks" in built
    assert trained.startswith("a batch of random images of shape (3, 16, 16): loss_ce ")
    assert "loss_distill" in trained
    assert list((folder / "a").iterdir()) == []


def test_the_top_level_data_preprocessor_is_the_models(folder):
    """Images of one channel, of which only the top-level mean tells."""
    grey = "data_preprocessor = dict(_delete_=True, mean=[33.46], std=[78.87])\n"
    extend(f"{grey}model = dict(backbone=dict(in_channels=1))\n")
    assert "shape (1, 16, 16)" in check_config(robust("KL"))[1]


def test_mixup_trains(folder, checkpoint):
    extend(MIXUP)
    assert "loss_robust" in check_config(robust())[1]
    assert "loss_distill" in check_config(distil("GKL"))[1]


def test_mmengines_runner_takes_the_new_config(folder, checkpoint):
    config = load(distil())
    config.work_dir = str(folder / "work")
    for name in ("train", "val", "test"):
        for part in (f"{name}_dataloader", f"{name}_cfg", f"{name}_evaluator"):
            config.pop(part, None)
    model = Runner.from_cfg(config).model
    assert type(model).__name__ == "DistillationClassifier"
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([125.3, 123.0, 113.9])
    assert model.teacher.module.backbone.base_channels == 8


@WAYS
def test_the_lazy_style(folder, checkpoint, adopt):
    Path("lazy.py").write_text(LAZY)
    adoption = adopt("GKL", "sub/new.py", "lazy.py")
    assert "    from ..lazy import *\n" in adoption.text
    new, old = plain(load(adoption).to_dict()), plain(Config.fromfile("lazy.py").to_dict())
    assert [hook["type"].rpartition(".")[2] for hook in new["custom_hooks"]] == ["EMAHook", "IKLHook"]
    assert new["custom_hooks"][0] == old["custom_hooks"][0]
    assert all(new["model"][part] == old["model"][part] for part in ("backbone", "neck", "head"))
    if adopt is robust:
        for name in ("val_evaluator", "test_evaluator"):
            assert new[name] == [*old[name], {"type": "ikl_plugins.mmpretrain.RobustAccuracy", "topk": [1]}]
        assert new["default_hooks"]["checkpoint"] == old["default_hooks"]["checkpoint"] | BEST
    assert len(check_config(adoption)) == 2
    assert adopt("GKL", "x.py", "sub/new.py").text == ""


# --- refusals: what is added to the student's config, or the options; and the words of the error ----------------------


def head(text):
    return f"model = dict(head=dict(_delete_=True, num_classes=10, {text}))\n"


REFUSED = [
    ("model = dict(type='MAE')\n", r"line 9: `type` of `model` must be ImageClassifier, .*got MAE"),
    ("model = dict(head=None)\n", r"line 9: `head` of `model` must be a dict, got none"),
    (head("type='ConformerHead', in_channels=[8, 8]"), r"line 9: `head` of .*got ConformerHead, which has two sets"),
    (head("type='MultiLabelLinearClsHead', in_channels=8"), r"MultiLabelLinearClsHead, which has several labels"),
    (
        head("type='LinearClsHead', in_channels=8, loss=dict(\ntype='LabelSmoothLoss', mode='multi_label')"),
        r"line 10: `head` of .*got LabelSmoothLoss with mode='multi_label'",
    ),
    (head("type='LinearClsHead', loss=dict(\nuse_sigmoid=True)"), r"line 10: .*which takes a sigmoid of each logit"),
    (head("\ntype='LeViTClsHead', in_channels=8"), r"line 10: `distillation` of LeViTClsHead must be False"),
    ("model = dict(_delete_=True)\nmodel = None\n", r"line 10: `model` must be a dict, got none"),
    ("a = = 1\n", r"line 9: the config must be Python, but invalid syntax"),
    ("a = 1 / 0\n", r"must be an MMEngine config, but ZeroDivisionError: division by zero"),
]


@WAYS
@pytest.mark.parametrize(("added", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_adopted_is_refused_by_line_and_key(folder, added, message, adopt):
    Path("teacher.py").write_text("_base_ = ['parts/network.py', 'parts/runtime.py']\n")
    extend(added)
    with pytest.raises(ValueError, match=rf"(?s)^ikl adopt: student\.py.*{message}"):
        adopt()


def test_the_line_is_that_of_the_base_which_sets_the_key(folder):
    change("parts/network.py", "'LinearClsHead'", "'CSRAClsHead'")
    with pytest.raises(ValueError, match=r"parts/network\.py, line 8: `head` of `model` must give one set"):
        robust()
    Path("parts/network.py").write_text(NETWORK.replace("depth=18", "with_cp=True, depth=18"))
    with pytest.raises(ValueError, match=r"parts/network\.py, line 5: `with_cp` of the backbone must be False"):
        robust()
    assert distil().text  # without an attack checkpointing is fine
    Path("parts/network.py").unlink()
    with pytest.raises(ValueError, match=r"student\.py must be an MMEngine config, but FileNotFoundError: .*network"):
        distil()


def test_what_is_adopted_is_not_adopted_in_another_way(folder):
    load(distil())
    with pytest.raises(ValueError, match=r"new\.py, line 9: `model` must be a plain .*got DistillationClassifier"):
        robust(config="new.py")
    assert distil(config="new.py").text == ""


ADVERSARIAL = {"adversarial": True}
OPTIONS = [
    ({}, r"must come with --teacher or --adversarial"),
    ({**ADVERSARIAL, "teacher": "t.py"}, r"--adversarial must stand without a teacher"),
    ({"eps": 0.1, "teacher": "t.py"}, r"--eps goes with --adversarial"),
    ({"teacher": "nowhere.py"}, r"--teacher must be a file, but there is none at nowhere\.py"),
    ({"teacher": "wide.py"}, r"wide\.py, line 2: `num_classes` of the teacher's head must be .*10, got 100"),
    ({"settings": {"bta": 1}}, r"unknown keyword of --set `bta`\. Did you mean `beta`\?"),
    ({**ADVERSARIAL, "settings": {"beta": -1}}, r"for the new loss: IKLLoss: `beta` must be"),
    ({**ADVERSARIAL, "loss": "KL", "settings": {"temperature": 0}}, r"KLLoss: `temperature` must be .*above 0"),
    ({**ADVERSARIAL, "config": "my-lazy.py"}, r"must be one that Python can import, got my-lazy\.py"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message for _, message in OPTIONS])
def test_options_that_do_not_fit(folder, options, message):
    Path("wide.py").write_text(TEACHER.replace("in_channels=16", "in_channels=16, num_classes=100"))
    Path("my-lazy.py").write_text(LAZY)
    with pytest.raises((TypeError, ValueError), match=f"^ikl adopt: .*{message}"):
        adopt_config(**{"config": "student.py", "output": "new.py", "loss": "IKL", **options})


def test_the_check_says_what_is_wrong(folder, checkpoint):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, checkpoint)
    with pytest.raises(ValueError, match=r"the new config must build, but "):
        check_config(distil())
    extend("custom_imports = dict(imports='no_such_module')\n")
    with pytest.raises(ImportError, match="Failed to import custom modules"):
        check_config(distil())
    extend("model = dict(backbone=dict(in_channels=5))\n")
    with pytest.raises(ValueError, match=r"must train on 2 random images of shape \(3, 16, 16\), but Runtime"):
        check_config(robust())


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_line(folder, checkpoint, ikl):
    teacher = ("--teacher", "teacher.py", "--teacher-ckpt", "teacher.pth")
    done = ikl(
        "adopt", "student.py", *teacher, "--loss", "GKL", "--set", "beta=8", "--output", "runs/gkl.py", "--check"
    )
    assert done.status is None
    assert done.out.startswith("--- /dev/null\n+++ runs/gkl.py\n@@")
    assert "checked: DistillationClassifier" in done.err
    assert "UserWarning" not in done.err
    assert Config.fromfile("runs/gkl.py").model.distill_loss.beta == 8
    assert [path.name for path in Path("runs").iterdir()] == ["gkl.py"]
    again = ikl("adopt", "runs/gkl.py", *teacher, "--output", "x.py")
    assert (again.out, again.status) == ("", None)
    assert "\nruns/gkl.py is adopted already" in again.err
    assert not Path("x.py").exists()


def test_that_a_config_is_python_is_said_before_it_is_executed(folder, ikl):
    Path("student.py").write_text("import sys\nprint('executed', file=sys.stderr)\nraise SystemExit(3)\n")
    for options in ([], ["--check"]):
        done = ikl("adopt", "student.py", "--teacher", "teacher.py", "--teacher-ckpt", "teacher.pth", *options)
        first, second = done.err.splitlines()[:2]
        assert first == "ikl adopt: an MMPretrain config is Python, and is executed now: student.py and teacher.py"
        assert second == "executed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adversarial", "--in-place"], "--in-place goes with a torchdistill YAML"),
        (["--student-logits", "fc"], "--student-logits goes with a torchdistill YAML"),
        (["--teacher-logits", "fc"], "--teacher-logits goes with a torchdistill YAML"),
        (["--adversarial", "--output", "student.py", "--force"], "--output must be another file than the config"),
    ],
)
def test_the_command_refuses_in_one_line(folder, ikl, words, message):
    assert ikl("adopt", "student.py", *words).status.startswith(f"error: ikl adopt: {message}")
    assert Path("student.py").read_text() == STUDENT
