"""The published experiments as torchdistill configs: values against tables typed from the sources, and a step of each.

The tables here are typed from the paper, its code and its READMEs; nothing is taken from its generator, make_configs.
"""

import copy
import math
import os
import re
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

import numpy
import torchvision
from PIL import Image
from published_values import (
    DISTILLED,
    FAMILIES,
    SIZES,
    WRN,
    WRN_TRADES,
    Recipe,
    cifar_archives,
    decoupled,
    soft_loss,
)
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.interfaces.registry import get_forward_proc_func
from torchdistill.losses.registry import get_high_level_loss
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model
from torchdistill.optim.registry import get_scheduler
from torchvision.datasets import CIFAR10, CIFAR100

from ikl_plugins._files import configs_folder
from ikl_plugins.adversarial import PGD
from ikl_plugins.torchdistill.training import Trainer, load_checkpoint, load_config

CONFIGS = configs_folder() / "torchdistill"
FOLDERS = ("cifar10", "cifar100", "imagenet", "imagenet_lt")
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for folder in FOLDERS for path in (CONFIGS / folder).rglob("*.yaml"))
# RSLAD's weights, and those with IKL that nobody has published; values of zibojia/RSLAD @c40e04f
RSLAD = {"alpha": 5 / 60, "beta": 5 / 60}
RSLAD_IKL = {"alpha": 5 / 60, "beta": 25 / 60, "temperature": 1.0, "weight_temperature": 4.0, "global_info": True}
ROBUST = {
    "cifar10/ResNet-18_from_wrn_34_10-rslad.yaml": Recipe("ResNet-18", "WRN-34-10", "DKL", RSLAD, 0.1),
    "cifar10/ResNet-18_from_wrn_34_10-rslad_ikl.yaml": Recipe("ResNet-18", "WRN-34-10", "IKL", RSLAD_IKL, 0.1),
}
ALL, SHIPPED = SHIPPED, [path for path in SHIPPED if path not in ROBUST]


AT = decoupled((4.0, 20.0), 1.0, 4.0, True)  # the second script asks for T2 = 1, but its default, 4, is in effect
RECIPES = {f"{name}.yaml": recipe for name, recipe in DISTILLED.items()} | {
    "cifar10/wrn_34_10-ikl.yaml": Recipe("WRN-34-10", None, "IKL", AT, lr=0.2),
    "cifar10/wrn_34_10-gkl.yaml": Recipe("WRN-34-10", None, "GKL", {**AT, "gamma": 0.2}, lr=0.2),
    "cifar10/wrn_34_10-trades.yaml": Recipe(
        "WRN-34-10", None, "DKL", {"alpha": 6.0, "beta": 6.0, "temperature": 1.0}, lr=0.2
    ),
}
# network: key and keywords
NETWORKS = {
    "resnext101_32x4d": ("resnet101", {"num_classes": 1000, "groups": 32, "width_per_group": 4}),
    "MobileNetV1": ("ikl_plugins.MobileNetV1", {"num_classes": 1000}),
    "WRN-34-10": ("ikl_plugins.robustbench_network", {"architecture": "WideResNet-34-10", "num_classes": 10}),
    **{name: (name, {"num_classes": 1000}) for name in ("resnet18", "resnet34", "resnet50")},
}
NETWORKS |= {name: (f"ikl_plugins.{name}", {"num_classes": 100}) for name in SIZES if name not in NETWORKS}


def family_of(path):
    if path.startswith("cifar10/"):
        return WRN_TRADES if path.endswith("-trades.yaml") else WRN
    return FAMILIES[path.split("/")[0]]


def criterion_of(path):
    """Key and keywords of the loss."""
    recipe = RECIPES[path]
    if recipe.loss is None:
        return "CrossEntropyLoss", {"reduction": "mean"}
    if recipe.loss == "KL":
        weights = {"alpha": recipe.ce_weight, "beta": recipe.weight}
        return "KDLoss", {**recipe.settings, **weights, "reduction": "batchmean"}
    ramp = {"warmup_epochs": recipe.ramp} if recipe.ramp else {}
    return f"{recipe.loss}Loss", {"ce_weight": 1.0, **recipe.settings, "num_classes": family_of(path).classes, **ramp}


CROP_AND_FLIP = "RandomCrop(size=(32, 32), padding=4) RandomHorizontalFlip(p=0.5) ToTensor()"
CIFAR100_STATISTICS = " Normalize(mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761])"
IMAGENET_STATISTICS = " ToTensor() Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])"
RESIZED = (
    "RandomResizedCrop(size=(224, 224), scale=(0.08, 1.0), ratio=(0.75, 1.3333), interpolation=bilinear, "
    "antialias=True) RandomHorizontalFlip(p=0.5)" + IMAGENET_STATISTICS
)
CENTRE = "Resize(size=256, interpolation=bilinear, max_size=None, antialias=True) CenterCrop(size=(224, 224))"
# of training and test images
TRANSFORMS = {
    "cifar100": (CROP_AND_FLIP + CIFAR100_STATISTICS, "ToTensor()" + CIFAR100_STATISTICS),
    "cifar10": (CROP_AND_FLIP, "ToTensor()"),
    "imagenet": (RESIZED, CENTRE + IMAGENET_STATISTICS),
    "imagenet_lt": (RESIZED, CENTRE + IMAGENET_STATISTICS),
}


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A working directory with a few generated images of each data set, where the files look for them."""
    random = numpy.random.default_rng(0)
    folder = tmp_path_factory.mktemp("recipes")
    lists = {"train": [], "test": []}
    for split in ("train", "val"):
        for label in range(2):
            for index in range(2):
                name = f"{split}/n{label:08}/{index}.JPEG"
                path = folder / "data" / "imagenet" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (64, 80, 3), dtype=numpy.uint8)).save(path)
                lists["train" if split == "train" else "test"].append(f"{name} {999 - label}\n")
    (folder / "data" / "imagenet_lt").mkdir()
    for split, lines in lists.items():
        (folder / "data" / "imagenet_lt" / f"ImageNet_LT_{split}.txt").write_text("".join(lines))

    with cifar_archives(folder / "data", (CIFAR10, CIFAR100)):
        yield folder


@pytest.fixture(autouse=True)
def _place(data, monkeypatch):
    monkeypatch.chdir(data)
    for variable in ("IKL_PLUGINS_DATA", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def workplace(data, tmp_path, monkeypatch):
    """An empty working directory with the data in it; the checkpoints, up to 180 MB each, do not outlive the test."""
    (tmp_path / "data").symlink_to(data / "data")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for folder in ("download_ckpts", "runs"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)


def network(model_config):
    """What torchdistill's script builds, without the weights that torchvision would download."""
    kwargs = {name: value for name, value in model_config["kwargs"].items() if name != "weights"}
    if model_config["key"] == "ikl_plugins.robustbench_network" and find_spec("pyautoattack") is None:
        pytest.skip("the network of configs/torchdistill/cifar10 is RobustBench's, which is not installed")
    model = get_image_classification_model({"key": model_config["key"], "kwargs": kwargs})
    return get_model(model_config["key"], **kwargs) if model is None else model


# --- the files and the tables ----------------------------------------------------------------------------------------


def test_there_is_a_file_for_each_published_experiment_and_no_other():
    assert sorted(RECIPES) == SHIPPED
    assert len(SHIPPED) == 33 + 6 + 3 + 11 + 3


@pytest.mark.parametrize("path", SHIPPED)
def test_every_value_is_the_published_one(path):
    recipe, family = RECIPES[path], family_of(path)
    folder, name = path.removesuffix(".yaml").split("/")
    config = load_yaml_file(str(CONFIGS / path))
    assert set(config) == {"dependencies", "datasets", "models", "train", "test"}
    assert config["dependencies"] == ["ikl_plugins.torchdistill"]

    train = config["train"]
    assert train["num_epochs"] == family.epochs
    assert train["optimizer"] == {
        "key": "SGD",
        "kwargs": {"lr": recipe.lr, "momentum": 0.9, "weight_decay": family.weight_decay},
    }
    loader = train["train_data_loader"]
    assert loader["dataset_id"] == f"{folder}/train"
    assert loader["sampler"]["class_or_func"] is torch.utils.data.RandomSampler
    assert loader["kwargs"].pop("num_workers") > 0
    assert loader["kwargs"] == {"batch_size": family.batch, **({"drop_last": True} if family.drop_last else {})}
    assert train["pre_epoch_process"] == "ikl_pre_epoch_process"

    assert train["criterion"]["key"] == "WeightedSumLoss"
    ((term, loss),) = train["criterion"]["kwargs"]["sub_terms"].items()
    assert term == (name.split("-")[1] if "-" in name else "ce")
    assert loss["weight"] == 1.0
    settings = dict(loss["criterion"]["kwargs"])
    if recipe.loss is not None:
        places = {f"{role}_module_{part}" for role in ("student", "teacher") for part in ("path", "io")}
        assert {settings.pop(place) for place in places} == {".", "output"}
    assert (loss["criterion"]["key"], settings) == criterion_of(path)
    get_high_level_loss(train["criterion"])

    # Selection and test are those of the official code: the best epoch on the test images.
    (test_set,) = {train["val_data_loader"]["dataset_id"], config["test"]["test_data_loader"]["dataset_id"]}
    assert test_set == ("imagenet/val" if folder == "imagenet" else f"{folder}/test")
    assert set(config["datasets"]) == {f"{folder}/train", test_set}
    for dataset, transform in zip((f"{folder}/train", test_set), TRANSFORMS[folder], strict=True):
        found = " ".join(map(str, config["datasets"][dataset].transform.transforms))
        assert found == transform

    student = config["models"]["model" if recipe.teacher is None else "student_model"]
    assert student == {
        "key": NETWORKS[recipe.student][0],
        "kwargs": NETWORKS[recipe.student][1],
        "dst_ckpt": f"runs/torchdistill/{folder}/{name}/{name}.pt",
    }
    if recipe.teacher is None:
        assert set(config["models"]) == {"model"}
        return
    assert set(config["models"]) == {"teacher_model", "student_model"}
    assert train["student"] == {"forward_proc": "forward_batch_only"}
    assert train["teacher"] == {"forward_proc": "forward_batch_only", "requires_grad": False}
    key, kwargs = NETWORKS[recipe.teacher]
    teacher = config["models"]["teacher_model"]
    if folder == "imagenet":
        assert teacher == {"key": key, "kwargs": {**kwargs, "weights": "IMAGENET1K_V1"}}
        torchvision.models.get_model_weights(key)["IMAGENET1K_V1"]
    elif folder == "imagenet_lt":
        source = f"runs/torchdistill/imagenet_lt/{recipe.teacher}/{recipe.teacher}.pt"
        assert teacher == {"key": key, "kwargs": kwargs, "src_ckpt": source}
        assert f"dst_ckpt: '{source}'" in (CONFIGS / "imagenet_lt" / f"{recipe.teacher}.yaml").read_text()
    else:
        source = f"download_ckpts/cifar_teachers/{recipe.teacher}_vanilla/ckpt_epoch_240.pth"
        assert teacher == {"key": key, "kwargs": kwargs, "src_ckpt": source}


@pytest.mark.parametrize("path", SHIPPED)
def test_every_epoch_has_the_published_learning_rate(path):
    recipe, family = RECIPES[path], family_of(path)
    train = load_yaml_file(str(CONFIGS / path))["train"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **train["optimizer"]["kwargs"])
    scheduler = get_scheduler(optimizer, train["scheduler"]["key"], **train["scheduler"]["kwargs"])
    for epoch in range(1, train["num_epochs"] + 1):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(recipe.lr * family.share(epoch)), epoch
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.startswith("cifar10/")])
def test_the_attack_is_the_one_that_the_authors_ran(path):
    model = load_yaml_file(str(CONFIGS / path))["train"]["model"]
    assert set(model) == {"forward_proc"}
    attack = get_forward_proc_func(model["forward_proc"]).attack
    for epoch in (1, 50, 51, 100, 101, 150, 151, 200):
        eps = 8 / 255 * epoch / 200
        assert attack.strength(epoch, 200) == pytest.approx((eps, 5, eps / 2)), epoch
    assert attack.norm == "linf"
    assert attack.random_start == "normal"
    assert attack.objective == "soft_cross_entropy"
    assert attack.model_mode == "eval"
    key = model["forward_proc"]
    assert "mean" not in key
    assert "std" not in key


@pytest.mark.parametrize("folder", ["cifar10", "imagenet", "imagenet_lt"])
def test_the_batch_is_divided_among_the_processes(folder, monkeypatch):
    family = family_of(f"{folder}/")
    paths = [path for path in SHIPPED if path.startswith(f"{folder}/")]
    for path in (paths[0], paths[-1]):
        for processes in (1, 2, family.processes):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            loader = load_yaml_file(str(CONFIGS / path))["train"]["train_data_loader"]
            assert loader["kwargs"]["batch_size"] == family.batch // processes
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=rf"`total` must be a multiple of .*3, got {family.batch}"):
        load_yaml_file(str(CONFIGS / paths[0]))


# --- networks --------------------------------------------------------------------------------------------------------


USED = {name for recipe in RECIPES.values() for name in (recipe.student, recipe.teacher) if name}


@pytest.mark.parametrize("name", sorted(USED))
def test_a_network_has_the_published_size(name):
    key, kwargs = NETWORKS[name]
    with torch.device("meta"):
        model = network({"key": key, "kwargs": kwargs})
    assert (sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())) == SIZES[name]
    assert all(parameter.is_meta for parameter in model.parameters())


# --- a training step -------------------------------------------------------------------------------------------------


def prepare(path, batch_size=2, **kwargs):
    """The config with small batches and a teacher of random weights, in the form of its checkpoint."""
    config = load_config(CONFIGS / path)
    teacher = config["models"].get("teacher_model")
    if teacher is not None:
        teacher["kwargs"].update(kwargs)
        if teacher["kwargs"].pop("weights", None):
            teacher["src_ckpt"] = "teacher.pt"  # in place of what torchvision would download
        source = Path(teacher["src_ckpt"])
        source.parent.mkdir(parents=True, exist_ok=True)
        content = {"epoch": 240, "model": network(teacher).state_dict(), "best_acc": 72.34}
        torch.save(content, source)
    for loader in (config["train"]["train_data_loader"], config["train"]["val_data_loader"]):
        loader["kwargs"].update(batch_size=batch_size, num_workers=0)
    config["test"]["test_data_loader"]["kwargs"].update(batch_size=batch_size, num_workers=0)
    return config


def take_steps(path, architecture=None):
    """An epoch over the few images, every batch of it held against the formula; gives the trainer."""
    recipe, family = RECIPES[path], family_of(path)
    config = prepare(path)
    if architecture is not None:
        config["models"]["model"]["kwargs"]["architecture"] = architecture
    if recipe.student == "WRN-34-10":
        network({"key": NETWORKS["WRN-34-10"][0], "kwargs": {"architecture": "WideResNet-10-1"}})  # skips, or goes on
    trainer = Trainer(config, torch.device("cpu"), 0)
    box = trainer.box
    seen = []
    box.criterion.register_forward_pre_hook(lambda module, args: seen.append(args))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    teacher = getattr(box, "teacher_model", None)
    teacher_before = None if teacher is None else {name: one.clone() for name, one in teacher.state_dict().items()}

    row = trainer.train_epoch(0)

    expected = []
    for io_dict, _, targets in seen:
        student = io_dict["student"]["."]["output"]
        if path.startswith("cifar10/"):
            logits, teacher_logits, labelled = student.adversarial, student.natural, student.natural
        else:
            logits = labelled = student
            teacher_logits = io_dict["teacher"]["."]["output"] if teacher is not None else None
        assert logits.shape == (len(targets), family.classes)
        hard = recipe.ce_weight * F.cross_entropy(labelled.double(), targets).item()
        expected.append(hard + (0 if recipe.loss is None else soft_loss(recipe, logits, teacher_logits)))
    images = len(config["datasets"][config["train"]["train_data_loader"]["dataset_id"]])
    assert len(seen) == (images // 2 if family.drop_last else math.ceil(images / 2))
    assert row["train_loss"] == pytest.approx(sum(expected) / len(seen), rel=2e-4)
    assert row["lr"] == pytest.approx(recipe.lr * family.share(1))
    unmoved = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    assert len(unmoved) < len(before) / 20, unmoved  # a bias behind dead activations may stay
    if teacher is not None:
        assert not teacher.training
        assert all(torch.equal(value, teacher_before[name]) for name, value in teacher.state_dict().items())
    assert 0 <= trainer.accuracy(config["test"]["test_data_loader"]) <= 100


# Each family, each loss, each form of prior and ramp, with the cheap networks.
FAST = [
    "cifar100/resnet20_from_resnet56-kd.yaml",
    "cifar100/resnet20_from_resnet56-ikl.yaml",
    "cifar100/resnet20_from_resnet56-gkl.yaml",
    "cifar100/wrn_16_2_from_wrn_40_2-gkl.yaml",
    "cifar100/ShuffleV1_from_wrn_40_2-gkl.yaml",
    "cifar100/vgg8_from_vgg13-ikl.yaml",
    "cifar100/MobileNetV2_from_ResNet50-gkl.yaml",
    "imagenet/resnet18_from_resnet34-ikl.yaml",
    "imagenet/MobileNetV1_from_resnet50-gkl.yaml",
    "imagenet_lt/resnet18.yaml",
    "imagenet_lt/resnet18_from_resnet18-kl.yaml",
    "imagenet_lt/resnet18_from_resnet18-ikl.yaml",
]
ADVERSARIAL = [path for path in SHIPPED if path.startswith("cifar10/")]


@pytest.mark.parametrize("path", FAST)
def test_a_step_of_training_is_that_of_the_published_formula(path, workplace):
    take_steps(path)


@pytest.mark.parametrize("path", ADVERSARIAL)
def test_a_step_of_adversarial_training_is_that_of_the_published_formula(path, workplace):
    take_steps(path, architecture="WideResNet-10-1")


@pytest.mark.parametrize("path", ROBUST)
def test_an_adversarial_distillation_has_the_published_values(path):
    config = load_yaml_file(str(CONFIGS / path))
    train, recipe = config["train"], ROBUST[path]
    assert train["num_epochs"] == 300
    assert train["train_data_loader"]["kwargs"]["batch_size"] == 128
    assert train["optimizer"]["kwargs"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}
    assert train["scheduler"]["kwargs"] == {"milestones": [215, 260, 285], "gamma": 0.1}
    forward = get_forward_proc_func(train["student"]["forward_proc"])
    assert forward.attack.strength() == pytest.approx((8 / 255, 10, 2 / 255))
    attack = (forward.attack.random_start, forward.attack.objective, forward.attack.model_mode, forward.teacher_view)
    assert attack == ("normal", "soft_cross_entropy", "eval", "natural")
    assert train["teacher"] == {"forward_proc": "forward_batch_only", "requires_grad": False}
    (term,) = train["criterion"]["kwargs"]["sub_terms"].values()
    assert term["criterion"]["kwargs"]["teacher_natural_weight"] == 1 / 5
    found = {key: term["criterion"]["kwargs"][key] for key in recipe.settings}
    assert found == pytest.approx(recipe.settings)
    source = config["models"]["teacher_model"]["src_ckpt"]
    assert source.replace("_last.pt", ".pt") in (CONFIGS / "cifar10" / "wrn_34_10-trades.yaml").read_text()


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * ("ikl" not in path)) for path in ROBUST]
)
def test_a_step_of_adversarial_distillation_is_that_of_the_formula(path, workplace):
    pytest.importorskip("pyautoattack", reason="the networks are RobustBench's")
    recipe = ROBUST[path]
    trainer = Trainer(prepare(path, architecture="WideResNet-10-1"), torch.device("cpu"), 0)
    forward = trainer.box.student_forward_proc = copy.copy(trainer.box.student_forward_proc)
    forward.attack = PGD(eps="8/255", steps=1, step_size="2/255", objective="soft_cross_entropy")  # ten take a while
    seen = []
    trainer.box.criterion.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    row = trainer.train_epoch(0)
    expected = [
        soft_loss(recipe, student.adversarial, teacher) + soft_loss(recipe, student.natural, teacher) / 5
        for student, teacher in ((io["student"]["."]["output"], io["teacher"]["."]["output"]) for io in seen)
    ]
    assert row["train_loss"] == pytest.approx(sum(expected) / len(seen), rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in FAST])
def test_a_step_of_training_of_all_others_at_full_size(path, workplace):
    take_steps(path)


@pytest.mark.parametrize("path", [*FAST, *ADVERSARIAL])
def test_upstreams_script_runs_the_file(path, workplace, monkeypatch):
    script = os.environ.get("IKL_PLUGINS_UPSTREAM_SCRIPT")
    if not script:
        pytest.skip("set IKL_PLUGINS_UPSTREAM_SCRIPT to torchdistill's examples/torchvision/image_classification.py")
    config = prepare(path)
    text = (CONFIGS / path).read_text().replace("WideResNet-34-10", "WideResNet-10-1")
    for name, value in (("num_epochs", 1), ("num_workers", 0), ("batch_size", 2), ("total", 2)):
        text = re.sub(rf"{name}: \d+", f"{name}: {value}", text)
    text = re.sub(r"\n *weights: .*", "", text)
    Path("small.yaml").write_text(text)
    arguments = [script, "--config", "small.yaml", "--device", "cpu", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    with torch.backends.cudnn.flags(enabled=True):
        runpy.run_path(script, run_name="__main__")
    student = config["models"].get("student_model", config["models"].get("model"))
    content = load_checkpoint(student["dst_ckpt"]) if Path(student["dst_ckpt"]).is_file() else None
    # A network that recognises none of two or four images is never the best, and so not saved.
    assert content is None or len(content["model"]) > 0


# --- the whole command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commands_of_a_readme_name_files_that_are_there(folder):
    text = (CONFIGS / folder / "README.md").read_text()
    start = r"^(?:ikl|torchrun --nproc_per_node (\d+) -m ikl_plugins) train torchdistill/(\S+)"
    commands = re.findall(start, text, re.MULTILINE)
    assert commands
    for processes, path in commands:
        assert path in ALL
        assert processes in ("", str(family_of(f"{folder}/").processes))
