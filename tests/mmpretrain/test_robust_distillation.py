"""Adversarial distillation against the formulas of the authors' codes, written out here in float64 with plain torch."""

from __future__ import annotations

import copy
import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from distillation_by_hand import EPS, STEP, attack_by_hand, pairwise_mse, soft_ce
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from mmpretrain_runs import assert_same, network, runner
from torch import nn

import ikl_plugins.mmpretrain  # noqa: F401 - registers what the configs name
from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.mmpretrain import AdversarialClassifier
from ikl_plugins.models.robustbench_zoo import robustbench_network

SIZE, IMAGES = 8, 6
MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]  # of the student
TEACHER_MEAN, TEACHER_STD = [90.0, 90.0, 80.0], [70.0, 50.0, 60.0]


class Backbone(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return (F.softplus(self.bn(self.conv(x))).mean((2, 3)),)


def parts(channels, classes, mean, std):
    return {
        "backbone": Backbone(channels),
        "head": {"type": "LinearClsHead", "num_classes": classes, "in_channels": channels},
        "data_preprocessor": {"type": "ClsDataPreprocessor", "mean": mean, "std": std, "to_rgb": True},
    }


def plain(channels, classes=10, mean=TEACHER_MEAN, std=TEACHER_STD):
    model = ImageClassifier(**parts(channels, classes, mean, std))
    nn.init.normal_(model.head.fc.weight, std=3.0)
    return model


def make(classes=10, **changes):
    torch.manual_seed(0)
    settings = {**parts(6, classes, MEAN, STD), "teacher": plain(9, classes), "teacher_val_batches": 0, **changes}
    model = AdversarialClassifier(**settings)
    nn.init.normal_(model.head.fc.weight)
    return model.double().train()


ATTACK = {"eps": EPS, "steps": 3, "step_size": STEP}


def batch(classes=10):
    """Images far from black and white, where ARD's own start is not cut at 0 and 1 and ours is."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(60, 190, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator) for _ in range(IMAGES)]
    return {"inputs": images, "data_samples": [DataSample().set_gt_label(i % classes) for i in range(IMAGES)]}


def prepared(model, classes=10):
    data = model.data_preprocessor(batch(classes), training=True)
    return (
        data["inputs"].double(),
        data["data_samples"],
        torch.cat([sample.gt_label for sample in data["data_samples"]]),
    )


class OnPixels(nn.Module):
    """A bare network on pixels in [0, 1]."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.backbone, self.fc = copy.deepcopy(model.backbone), copy.deepcopy(model.head.fc)
        self.mean, self.std = (torch.tensor(row, dtype=torch.float64).view(3, 1, 1) / 255 for row in (mean, std))

    def forward(self, pixels):
        return self.fc(self.backbone((pixels - self.mean) / self.std)[0])


def networks(model, inputs):
    """Student and teacher on pixels, and the pixels."""
    student = OnPixels(model, MEAN, STD)
    return (
        student,
        OnPixels(model.teacher.module, TEACHER_MEAN, TEACHER_STD).eval(),
        inputs * student.std + student.mean,
    )


def mean_kl(student, teacher):
    """``nn.KLDivLoss()`` of the authors' codes: a mean over batch and classes."""
    p = torch.softmax(teacher, 1)
    return (p * (p.log() - torch.log_softmax(student, 1))).mean()


def ard(student, teacher, x, y, classes):
    x_adv = attack_by_hand(student, x, lambda net, z: F.cross_entropy(net(z), y), uniform=True, training=True)
    outputs = student(x_adv)
    student(x)  # the natural forward of the code moves the statistics; alpha = 1 leaves its cross entropy out
    return 30.0 * 30.0 * mean_kl(outputs / 30.0, teacher(x).detach() / 30.0)


def rslad(student, teacher, x, y, classes):
    labels = teacher(x).detach()
    x_adv = attack_by_hand(student, x, lambda net, z: mean_kl(net(z), labels))
    times = {10: 1.0, 100: 10.0}[classes]
    first = times * mean_kl(student(x_adv), labels)
    return 5 / 6 * first + 1 / 6 * times * mean_kl(student(x), labels)


def adaad(student, teacher, x, y, classes):
    x_adv = attack_by_hand(student, x, lambda net, z: mean_kl(net(z), teacher(z)))
    student(x)
    outputs, labels = student(x_adv), teacher(x_adv).detach()
    return mean_kl(outputs, labels) * {10: 1.0, 100: 100.0}[classes]  # the mean over the batch alone for 100 classes


def total_of(losses):
    return sum(value for name, value in losses.items() if "loss" in name)


def held_against(model, expected, student, inputs, samples):
    """A step of the model gives the value of the one by hand, its gradients and its statistics."""
    expected.backward()
    torch.manual_seed(5)
    losses = model.loss(inputs, samples)
    total = total_of(losses)
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in (
        (model.backbone.conv.weight, student.backbone.conv.weight),
        (model.head.fc.weight, student.fc.weight),
        (model.head.fc.bias, student.fc.bias),
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)
    for ours, theirs in zip(model.backbone.bn.buffers(), student.backbone.bn.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    return losses


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("method", [ard, rslad, adaad], ids=lambda method: method.__name__)
def test_a_step_of_a_preset_is_that_of_the_authors_code(method, classes):
    model = make(classes, preset=method.__name__, attack=ATTACK)
    inputs, samples, labels = prepared(model, classes)
    student, teacher, pixels = networks(model, inputs)
    held_against(model, method(student, teacher, pixels, labels, classes), student, inputs, samples)


@pytest.mark.parametrize("method", ["ard", "rslad", "adaad"])
def test_presets_have_the_published_attack(method):
    attack = make(preset=method).attack
    told = attack.strength()
    assert (told.eps, told.steps, told.step_size) == pytest.approx((8 / 255, 10, 2 / 255))
    assert make(preset=method, attack={"budget": "low"}).attack.strength().steps == 2


def test_ikl_takes_the_place_of_kl_with_a_prior_of_the_teachers_predictions():
    model = make(preset="rslad-ikl", attack=ATTACK)
    prior = torch.rand(10, 10, generator=torch.Generator().manual_seed(3)).softmax(1)
    model.robust_loss.class_prior.matrix.copy_(prior)
    inputs, samples, labels = prepared(model)
    student, teacher, pixels = networks(model, inputs)
    soft, rows = teacher(pixels).detach(), prior.double()[labels]
    x_adv = attack_by_hand(student, pixels, lambda net, z: mean_kl(net(z), soft))

    def ikl(logits):
        return 5 / 60 * soft_ce(logits, soft) + 25 / 60 * pairwise_mse(logits, soft, rows)

    adversarial = ikl(student(x_adv))
    model.begin_epoch(1, 4)
    losses = held_against(model, adversarial + 0.2 * ikl(student(pixels)), student, inputs, samples)
    torch.testing.assert_close(losses["loss_robust"], adversarial)
    torch.testing.assert_close(losses["weighted_mse"] + losses["soft_cross_entropy"], adversarial.detach())
    sums = torch.zeros(10, 10, dtype=torch.float64).index_add_(0, labels, torch.softmax(soft / 4.0, 1))
    torch.testing.assert_close(model.robust_loss.class_prior.sums, sums, rtol=1e-8, atol=1e-10)


LOSSES = {
    "kl": ({"type": "KLLoss"}, lambda s, t, w: 10 * mean_kl(s, t)),
    "dkl": (
        {"type": "DKLLoss", "alpha": 2.0},
        lambda s, t, w: 2 * soft_ce(s, t) + pairwise_mse(s, t, t.softmax(1)).detach(),
    ),
    "ikl": ({"type": "IKLLoss", "beta": 3.0}, lambda s, t, w: soft_ce(s, t) + 3 * pairwise_mse(s, t, t.softmax(1))),
    "gkl": (
        {"type": "GKLLoss", "gamma": 2.0},
        lambda s, t, w: (
            soft_ce(s, t) + IMAGES * pairwise_mse(s, t, t.softmax(1) ** 2) / (t.softmax(1) ** 2).sum(1).square().sum()
        ),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("objective", ["soft_cross_entropy", "ikl", "cross_entropy"])
@pytest.mark.parametrize("view", ["natural", "adversarial"])
@pytest.mark.parametrize("reference", ["teacher", "student"])
def test_every_loss_objective_view_and_reference(loss, objective, view, reference):
    config, formula = LOSSES[loss]
    model = make(
        attack={**ATTACK, "random_start": "normal", "objective": objective},
        robust_loss=config,
        teacher_view=view,
        attack_reference=reference,
        teacher_natural_weight=0.5,
        natural_weight=0.25,
    )
    inputs, samples, labels = prepared(model)
    student, teacher, pixels = networks(model, inputs)
    frozen = copy.deepcopy(student).eval()(pixels).detach() if reference == "student" else teacher(pixels).detach()

    def of_attack(net, z):
        if objective == "cross_entropy":
            return F.cross_entropy(net(z), labels)
        soft = teacher(z) if (view, reference) == ("adversarial", "teacher") else frozen
        if objective == "soft_cross_entropy":
            return mean_kl(net(z), soft)
        return soft_ce(net(z), soft) + pairwise_mse(net(z), soft, soft.softmax(1).detach())

    x_adv = attack_by_hand(student, pixels, of_attack)
    seen = teacher(x_adv if view == "adversarial" else pixels).detach()
    first, natural = student(x_adv), student(pixels)
    expected = 0.25 * F.cross_entropy(natural, labels) + formula(first, seen, None)
    expected = expected + 0.5 * formula(natural, teacher(pixels).detach(), None)
    held_against(model, expected, student, inputs, samples)


@pytest.mark.parametrize(("preset", "passes"), [("ard", 1), ("rslad", 1), ("adaad", 4), ("rslad-ikl", 1)])
def test_no_more_passes_of_the_teacher_than_needed(preset, passes):
    model = make(preset=preset, attack=ATTACK, awp={"warmup_epochs": 1})
    inputs, samples, _ = prepared(model)
    seen = []
    model.teacher.module.backbone.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model.begin_epoch(1, 1)
    model.loss(inputs, samples)
    assert len(seen) == passes
    assert seen.count(True) == passes - 1  # of the attack on both
    assert not any(parameter.requires_grad for parameter in model.teacher.module.parameters())
    assert not model.teacher.module.training


def test_two_views_have_the_teachers_logits_of_both():
    views = {
        "augmented_weight": 0.3,
        "data_preprocessor": {"type": "TwoViewDataPreprocessor", "mean": MEAN, "std": STD},
    }
    views["data_preprocessor"]["to_rgb"] = True
    model = make(preset="rslad", attack=ATTACK, **views)
    inputs, samples, _ = prepared(make(preset="rslad"))
    both = torch.cat([inputs, inputs.flip(-1)])
    student, teacher, pixels = networks(model, both)
    soft = teacher(pixels).detach()
    x_adv = attack_by_hand(student, pixels, lambda net, z: mean_kl(net(z), soft))
    expected = 0.0
    for weight, logits in ((5 / 6, student(x_adv)), (1 / 6, student(pixels))):
        for share, ours, theirs in zip((1.0, 0.3), logits.chunk(2), soft.chunk(2), strict=True):
            expected = expected + weight * share * mean_kl(ours, theirs)
    held_against(model, expected, student, [inputs, inputs.flip(-1)], samples)


def test_autocast_trains_every_weight_in_float32():
    model = make(preset="adaad-ikl", attack=ATTACK).float()
    model.begin_epoch(1, 4)
    inputs, samples, _ = prepared(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(inputs.float(), samples)
    total_of(losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses["loss_robust"].dtype == torch.float32


# --- runs ------------------------------------------------------------------------------------------------------------


def distilled(teacher_ckpt, **changes):
    return network(
        type="AdversarialClassifier",
        preset="rslad-ikl",
        attack=ATTACK,
        teacher=network(),
        teacher_ckpt=str(teacher_ckpt),
        **changes,
    )


def test_a_run_is_resumed_to_the_bit_and_its_checkpoint_is_of_the_plain_classifier(teacher, tmp_path):
    config = distilled(teacher, awp={"warmup_epochs": 1})
    whole = runner(tmp_path / "whole", config, epochs=3)
    whole.train()
    assert not [name for name in whole.model.state_dict() if "teacher" in name]
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copy(tmp_path / "whole" / "epoch_2.pth", stopped)
    (stopped / "last_checkpoint").write_text(str(stopped / "epoch_2.pth"))
    resumed = runner(stopped, config, epochs=3, resume=True)
    resumed.train()
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    keys = {name for name in whole.model.state_dict() if not name.startswith("robust_loss.class_prior.")}
    assert keys == set(runner(tmp_path / "plain", network()).model.state_dict())


def test_a_teacher_beside_the_config_is_found_when_the_run_begins(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(teacher, folder / "robust.pth")
    run = runner(tmp_path / "work", distilled("robust.pth"), epochs=1)
    object.__setattr__(run.cfg, "_filename", str(folder / "config.py"))
    run.train()
    assert run.model.teacher.num_classes == 3


# --- teachers of other libraries --------------------------------------------------------------------------------------

RGB = {"mean": [0.0] * 3, "std": [255.0] * 3, "to_rgb": True}
IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}


def zoo_teacher(folder, monkeypatch, name="Small2024Test", classes=10):
    """A small network among RobustBench's models, its file where RobustBench would download one to."""
    if importlib.util.find_spec("pyautoattack") is None:
        pytest.skip("needs robustbench")
    data, kind = import_robustbench().data, f"cifar{classes}"
    network = robustbench_network("WideResNet-10-1", classes)
    entry = {"model": lambda: robustbench_network("WideResNet-10-1", classes), "gdrive_id": "abc"}
    monkeypatch.setitem(data.all_models[data.BenchmarkDataset(kind)][data.ThreatModel.Linf], name, entry)
    path = folder / "models" / kind / "Linf" / f"{name}.pt"
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return {"type": "RobustBenchModel", "name": name}, None, RGB, network


def torchvision_teacher(folder, monkeypatch):
    """By the path of its function, as MMEngine's registries build anything."""
    network = pytest.importorskip("torchvision").models.shufflenet_v2_x0_5(num_classes=10)
    torch.save(network.state_dict(), folder / "a.pth")
    config = {"type": "torchvision.models.shufflenet_v2_x0_5", "num_classes": 10}
    return config, "a.pth", {**IMAGENET, "size": 40}, network


def timm_teacher(folder, monkeypatch):
    """MMPretrain's own class; the weights come from a file."""
    network = pytest.importorskip("timm").create_model("resnet10t", num_classes=10)
    torch.save(network.state_dict(), folder / "timm.pth")
    fetched = {"file": str(folder / "timm.pth"), "num_classes": 10, "classifier": "fc"}
    config = {"type": "TimmClassifier", "model_name": "resnet10t", "pretrained": True, "pretrained_cfg": fetched}
    return {**config, "num_classes": 10}, None, {**IMAGENET, "size": [48, 40]}, network


def published_teacher(folder, monkeypatch):
    """A checkpoint as ARD's code writes it, of a network in DataParallel, by RobustBench's class."""
    if importlib.util.find_spec("pyautoattack") is None:
        pytest.skip("needs robustbench")
    network = robustbench_network("WideResNet-10-1")
    weights = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"net": weights, "epoch": 199}, folder / "wrn.t7")
    return {"type": "RobustBenchNetwork", "architecture": "WideResNet-10-1"}, "wrn.t7", RGB, network


LIBRARIES = [zoo_teacher, published_teacher, torchvision_teacher, timm_teacher]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda one: one.__name__)
def test_a_teacher_of_another_library_sees_its_own_images(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, ckpt, own, network = library(tmp_path, monkeypatch)
    model = make(preset="adaad", attack=ATTACK, teacher=config, teacher_ckpt=ckpt, teacher_input=own).float()
    raw = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    inputs = model.data_preprocessor({"inputs": raw}, training=True)["inputs"].requires_grad_()
    pixels = raw.flip(1).float()  # RGB, from 0 to 255
    if "size" in own:
        sides = [own["size"]] * 2 if isinstance(own["size"], int) else own["size"]
        pixels = F.interpolate(pixels, sides, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(own[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network.eval()((pixels - mean) / std)
    torch.testing.assert_close(model.teacher(inputs), expected, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(model.teacher.differentiable(inputs).sum(), inputs)[0].any()
    if library is zoo_teacher:
        with pytest.raises(ValueError, match="`teacher_input` must be given for RobustBenchModel"):
            make(preset="adaad", teacher=config)


# --- the shipped configs of the published experiments ----------------------------------------------------------------

TEACHERS = {10: "Zhang2019Theoretically", 100: "Gowal2020Uncovering"}
# epochs, images of a step, milestones: ARD's code has 256 images for CIFAR-100
SCHEDULES = {
    ("ard", 10): (200, 128, [100, 150]),
    ("ard", 100): (200, 256, [100, 150]),
    ("rslad", 10): (300, 128, [215, 260, 285]),
    ("rslad", 100): (300, 128, [215, 260, 285]),
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("student", ["ResNet18", "MobileNetV2"])
@pytest.mark.parametrize("method", ["ard", "rslad", "rslad_ikl"])
def test_a_published_experiment_is_built_and_stepped(method, student, classes, load, tmp_path, monkeypatch):
    teacher, *_ = zoo_teacher(tmp_path, monkeypatch, TEACHERS[classes], classes)
    config = load(f"cifar{classes}_robust_distillation/{student}-{method}.py")
    assert config.model.teacher == {**teacher, "dataset": f"cifar{classes}"}
    assert config.model.get("teacher_precision") == {10: None, 100: "bf16"}[classes]
    (steps,) = config.param_scheduler
    found = config.train_cfg.max_epochs, config.train_dataloader.batch_size, steps.milestones
    assert found == SCHEDULES[method.split("_")[0], classes]
    optimizer = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}
    assert (config.optim_wrapper, steps.gamma) == ({"optimizer": optimizer}, 0.1)
    assert config.custom_hooks == [{"type": "IKLHook"}, {"type": "SyncBuffersHook"}]
    config.model.attack = {"steps": 1}
    model = MODELS.build(config.model)
    model.begin_epoch(1, 1)
    data = {"inputs": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8).unbind(), "data_samples": []}
    data["data_samples"] = [DataSample().set_gt_label(label) for label in (0, 9)]
    losses = model.train().train_step(data, build_optim_wrapper(model, config.optim_wrapper))
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert losses["loss_robust"] > 0
    if method == "rslad_ikl":
        assert model.robust_loss.class_prior.counts.sum() == 2


# --- refusals --------------------------------------------------------------------------------------------------------

NONE = {"teacher": None}
SCORES = {"type": "ClsDataPreprocessor", "mean": MEAN, "std": STD, "to_onehot": True, "num_classes": 10}
KL = {"robust_loss": {"type": "KLLoss"}}
REFUSED = {
    "preset alone": (NONE | {"preset": "rslad"}, "`preset` goes with a teacher"),
    "view alone": (NONE | KL | {"attack": ATTACK, "teacher_view": "natural"}, "`teacher_view` goes with a teacher"),
    "weights alone": (NONE | KL | {"attack": ATTACK, "teacher_ckpt": "x.pth"}, "`teacher_ckpt` goes with a teacher"),
    "switch alone": (
        NONE | KL | {"attack": ATTACK, "teacher_channels_last": True},
        "`teacher_channels_last` goes with a teacher",
    ),
    "preset": ({"preset": "rsald"}, "unknown preset `rsald`. Did you mean `rslad`"),
    "view": ({"preset": "ard", "teacher_view": "both"}, "unknown `teacher_view` `both`"),
    "reference": ({"preset": "ard", "attack_reference": "labels"}, "unknown `attack_reference` `labels`"),
    "weight": ({"preset": "ard", "teacher_natural_weight": -1.0}, "`teacher_natural_weight` must be a finite number"),
    "classes": ({"preset": "ard", "teacher": plain(9, 7)}, "`teacher` must have the class count of the student, got 7"),
    "batches": ({"preset": "ard", "teacher_val_batches": -1}, "`teacher_val_batches` must be a number of batches"),
    "no attack": (NONE | KL, "`attack` must be a dict"),
    "no loss": (NONE | {"attack": ATTACK}, "`robust_loss`"),
    "prior of scores": ({"preset": "rslad-ikl", "data_preprocessor": SCORES}, "the class prior of `robust_loss`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make(**changes)


def test_mixed_labels_go_with_a_loss_without_prior():
    soft = {
        "type": "LinearClsHead",
        "num_classes": 10,
        "in_channels": 6,
        "loss": {"type": "CrossEntropyLoss", "use_soft": True},
    }
    model = make(preset="rslad", attack=ATTACK, data_preprocessor=SCORES, head=soft).float()
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.isfinite(model.train_step(batch(), optimizer)["loss"])
