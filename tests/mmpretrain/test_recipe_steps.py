"""A first epoch of the published configs under the real runner, each step held against the published formulas."""

import re
from pathlib import Path

import mmpretrain_runs as runs
import numpy
import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.datasets import CIFAR10, CIFAR100
from mmpretrain.registry import MODELS
from mmpretrain_recipes import AUGMENTED_WEIGHTS, GENERATED, RECIPES, ROBUST, SHIPPED, family_of, need_robustbench
from PIL import Image
from published_values import cifar_archives, soft_loss

from ikl_plugins.mmpretrain import load_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few generated images of each data set, where the configs look for them."""
    random = numpy.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    with cifar_archives(folder, (CIFAR10, CIFAR100)):
        write_others(folder, random)
        yield folder


def write_others(folder, random):
    for dataset, sizes, classes in (("cifar10", ("1m", "20m"), 10), ("cifar100", ("1m", "50m"), 100)):
        for size in sizes:
            images = random.integers(0, 256, (8, 32, 32, 3), dtype=numpy.uint8)
            numpy.savez(folder / dataset / f"{size}.npz", image=images, label=random.integers(classes, size=8))

    picture = folder / "picture.JPEG"
    Image.fromarray(random.integers(0, 256, (64, 80, 3), dtype=numpy.uint8)).save(picture)
    lists = {"train": "", "val": ""}
    for split, text in lists.items():
        for label in range(1000):  # the data set insists on every class
            path = folder / "imagenet" / split / f"n{label:08}" / "0.JPEG"
            path.parent.mkdir(parents=True)
            path.hardlink_to(picture)
            text += f"{split}/n{label:08}/0.JPEG {label}\n"
        lists[split] = text
    (folder / "imagenet_lt").mkdir()
    (folder / "imagenet_lt" / "ImageNet_LT_train.txt").write_text(lists["train"])
    (folder / "imagenet_lt" / "ImageNet_LT_test.txt").write_text(lists["val"])


class Watch(Hook):
    """Notes what goes through the loss and what the log gets, and ends the training after the first epoch."""

    priority = "HIGHEST"

    def __init__(self):
        self.calls = []
        self.steps = []
        self.scores = None

    def before_train(self, runner):
        model = runner.model
        for name in ("distill_loss", "robust_loss"):
            if hasattr(model, name):
                getattr(model, name).register_forward_pre_hook(lambda module, args: self.calls.append(args[:2]))
        model.head.register_forward_hook(lambda module, args, output: setattr(self, "logits", output))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.calls.clear()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        labels = torch.cat([sample.gt_label for sample in data_batch["data_samples"]])
        self.steps.append((list(self.calls), self.logits.detach(), labels, outputs["loss"].detach()))

    def after_train_epoch(self, runner):
        runner.train_loop.stop_training = True

    def after_val_epoch(self, runner, metrics=None):
        self.scores = metrics


def prepare(path, load):
    """The config with few images, small batches, a small wide ResNet, and a teacher of random weights."""
    need_robustbench(path)
    recipe = RECIPES[path]
    config = load(path)
    config.log_level = "WARNING"
    config.experiment_name = re.sub(r"\W", "_", path)  # loggers are kept by name
    for split in ("train", "val", "test"):
        config[f"{split}_dataloader"].update(batch_size=2, num_workers=0, persistent_workers=False)
    train, val = config.train_dataloader, config.val_dataloader
    if path in ROBUST:
        name = config.model.backbone.architecture
        config.model.backbone.architecture = re.sub(r"-\d+-10", "-10-1", name)
        (train.dataset.datasets[0] if path in GENERATED else train.dataset).indices = -3
        val.dataset.indices = 2
        if path in GENERATED:
            train.batch_size = 5
            train.batch_sampler.epoch_size = 5
        else:
            config.model.awp.warmup_epochs = 1  # from the first epoch on, which is all there is
            config.custom_hooks[2].begin_iter = 1
    else:
        train.dataset.indices = 3
        val.dataset.indices = 2
    torch.manual_seed(5)
    if recipe.teacher is not None:
        config.model.teacher_val_batches = 1
        if isinstance(config.model.teacher, str):
            content = {"state_dict": MODELS.build(load(f"imagenet_lt/{recipe.teacher}.py").model).state_dict()}
        else:
            content = MODELS.build(config.model.teacher).state_dict()
        if path.startswith("cifar100/"):
            content = {"epoch": 240, "model": content, "best_acc": 72.34}
        where = Path(config.model.teacher_ckpt.replace("*", "87"))
        if "://" in config.model.teacher_ckpt:  # these random weights have not the digest in its name
            where = Path(torch.hub.get_dir()) / "checkpoints" / where.name
            config.model.teacher_ckpt = str(where)
        where.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, where)
    return config


@pytest.fixture
def place(load, data, tmp_path, monkeypatch):
    """The place of a run: data, a hub folder for checkpoints, and torch's switches as they were."""
    (tmp_path / "data").symlink_to(data)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield load
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


def take_steps(path, load):
    """The first epoch of the real runner over a few images, every step held against the formulas."""
    recipe, family = RECIPES[path], family_of(path)
    config = prepare(path, load)
    runner = Runner.from_cfg(config)
    watch = Watch()
    runner.register_hook(watch)
    teacher = runner.model.teacher if getattr(runner.model, "has_teacher", False) else None
    if teacher is not None:
        before_teacher = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    before = {}
    runner.register_hook(
        runs.Record(
            before_train=lambda runner: before.update(
                {name: parameter.detach().clone() for name, parameter in runner.model.named_parameters()}
            )
        )
    )
    model = runner.train()

    assert len(watch.steps) == (1 if family.drop_last or path in GENERATED else 2)
    weights = [1.0] if recipe.loss is not None else []
    if path in AUGMENTED_WEIGHTS:
        weights.append(AUGMENTED_WEIGHTS[path])
    for calls, logits, labels, loss in watch.steps:
        calls = calls[-len(weights) :] if weights else []  # those before are of the weight perturbation
        labelled = logits
        if path in ROBUST:
            assert len(calls) == len(weights)
            labelled = torch.cat([teacher_logits for _, teacher_logits in calls])
            labels = labels.repeat(len(calls))
        assert labelled.shape == (len(labels), family.classes)
        smoothing = 0.1 if path in GENERATED else 0.0
        hard = F.cross_entropy(labelled.detach().double(), labels, label_smoothing=smoothing).item()
        expected = recipe.ce_weight * hard
        for weight, (student_logits, teacher_logits) in zip(weights, calls, strict=True):
            expected += weight * soft_loss(recipe, student_logits, teacher_logits)
        assert loss.item() == pytest.approx(expected, rel=3e-4, abs=1e-6)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)  # a bias behind dead activations may stay
    if teacher is not None:
        assert not teacher.module.training
        after = teacher.module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before_teacher.items())
    assert {"accuracy/top1"} <= set(watch.scores)
    assert ("robust/top1" in watch.scores) == (path in ROBUST)
    assert ("long_tail/all" in watch.scores) == path.startswith("imagenet_lt/")

    # What was trained is read by whom it is made for.
    saved = Path(runner.work_dir) / "epoch_1.pth"
    if path in ROBUST:
        from ikl_plugins.robustbench.loading import load_checkpoint

        loaded = load_checkpoint(saved, config.model.backbone.architecture, dataset=path.split("_")[0])
        assert type(loaded).__module__.startswith("robustbench.model_zoo.architectures")
        assert loaded(torch.rand(2, 3, 32, 32)).shape == (2, family.classes)
    else:
        plain = MODELS.build(load(f"{path.split('/')[0]}/{recipe.student}.py").model)
        content = load_weights(saved)
        plain.load_state_dict(
            {name: tensor for name, tensor in content.items() if not name.startswith("distill_loss.")}
        )


# Each family, each loss, each form of prior, ramp and view, with the cheap networks.
FAST = [
    "cifar100/resnet20.py",
    "cifar100/resnet20_from_resnet56-kd.py",
    "cifar100/resnet20_from_resnet56-ikl.py",
    "cifar100/resnet20_from_resnet56-gkl.py",
    "cifar100/ShuffleV1_from_wrn_40_2-gkl.py",
    "imagenet/MobileNetV1_from_resnet50-gkl.py",
    "imagenet_lt/resnet18_from_resnet18-kl.py",
    "cifar10_adversarial/wrn_34_10-trades.py",
    "cifar100_adversarial/wrn_34_10-gkl.py",
    "cifar100_adversarial/wrn_34_10_autoaugment-ikl.py",
    "cifar10_generated/wrn_28_10_1m-kl.py",
    "cifar100_generated/wrn_28_10_50m-ikl.py",
]


@pytest.mark.parametrize("path", FAST)
def test_a_step_of_training_is_that_of_the_published_formula(path, place):
    take_steps(path, place)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in FAST])
def test_a_step_of_training_of_all_others(path, place):
    take_steps(path, place)
