"""The published experiments as MMPretrain configs: their values against tables typed from the sources."""

import math
from importlib.util import find_spec

import mmpretrain_runs as runs
import numpy
import pytest
import torch
import torchvision
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS
from mmpretrain_recipes import (
    AUGMENTED_WEIGHTS,
    DISTILLED,
    GENERATED,
    GENERATED_TABLE,
    RECIPES,
    ROBUST,
    SHIPPED,
    WIDE,
    family_of,
    kind_of,
    need_robustbench,
)
from mmpretrain_runs import CONFIGS
from published_values import SIZES, rows

from ikl_plugins.mmengine.losses import LOSSES

# --- the files and the tables ----------------------------------------------------------------------------------------


def test_there_is_a_file_for_each_experiment_and_no_other():
    assert sorted(RECIPES) == SHIPPED
    assert len(SHIPPED) == (9 + 33) + (2 + 6) + (3 + 11) + (6 + 8) + 2 * 4


@pytest.mark.parametrize("path", SHIPPED)
def test_the_training_is_the_published_one(path, load):
    recipe, family = RECIPES[path], family_of(path)
    config = load(path)
    optimizer = {"type": "SGD", "lr": recipe.lr, "momentum": 0.9, "weight_decay": family.weight_decay}
    if path in GENERATED:
        optimizer["nesterov"] = True
        assert config.optim_wrapper == {"optimizer": optimizer, "paramwise_cfg": {"norm_decay_mult": 0.0}}
    else:
        assert config.optim_wrapper == {"optimizer": optimizer}
    assert config.train_cfg == {"by_epoch": True, "max_epochs": family.epochs, "val_interval": 1}
    assert config.train_dataloader.batch_size == family.batch
    assert config.train_dataloader.get("drop_last", False) == family.drop_last
    assert config.train_dataloader.sampler == {"type": "DefaultSampler", "shuffle": True}
    assert config.randomness == {"seed": family.seed, "deterministic": True}
    assert config.custom_hooks[:2] == [{"type": "IKLHook"}, {"type": "SyncBuffersHook"}]
    assert config.work_dir == f"runs/mmpretrain/{path.removesuffix('.py')}"


@pytest.mark.parametrize("path", SHIPPED)
def test_the_loss_is_the_published_one(path, load):
    recipe, family = RECIPES[path], family_of(path)
    config = load(path).model
    assert config.type == kind_of(path)
    assert config.head.loss == {"type": "CrossEntropyLoss", "loss_weight": recipe.ce_weight}
    assert config.head.num_classes == config.data_preprocessor.num_classes == family.classes
    if recipe.loss is None:
        return
    loss_config = dict(config["distill_loss" if recipe.teacher else "robust_loss"])
    assert loss_config["type"] == f"{recipe.loss}Loss"
    if loss_config.get("global_info"):
        loss_config["num_classes"] = config.head.num_classes  # as the classifiers fill it in
    loss = MODELS.build(loss_config)
    expected = {**recipe.settings, "loss_weight": 1.0 if recipe.teacher else recipe.weight}
    if recipe.loss == "KL":
        expected["scale_by_temperature_squared"] = recipe.settings["temperature"] != 1
    else:
        expected["num_classes"] = family.classes if recipe.settings["global_info"] else None
    assert {name: getattr(loss, name) for name in expected} == expected
    assert loss.reduction == "batchmean"
    assert not set(loss_config) - {"type", *expected}
    assert config.get("distill_weight", 1.0) == (recipe.weight if recipe.teacher else 1.0)
    assert config.get("warmup_epochs", 0) == (recipe.ramp if recipe.ramp > 1 else 0)
    assert config.get("ce_weight", 1.0) == config.get("natural_weight", 1.0) == 1.0


def test_the_presets_are_the_published_losses():
    for path, recipe in RECIPES.items():
        if recipe.loss in ("DKL", "IKL", "GKL"):
            loss = LOSSES[f"{recipe.loss}Loss"].preset(path.removesuffix(".py"))
            settings = recipe.settings | {"num_classes": family_of(path).classes}
            assert {name: getattr(loss, name) for name in settings} == settings, path


@pytest.mark.parametrize("path", DISTILLED)
def test_the_teacher_is_the_published_one(path, load):
    recipe = RECIPES[path]
    folder = path.split("/")[0]
    model = load(path).model
    if folder == "cifar100":
        assert model.teacher == {"type": "DistillationNetwork", "name": recipe.teacher, "num_classes": 100}
        assert model.teacher_ckpt == f"download_ckpts/cifar_teachers/{recipe.teacher}_vanilla/ckpt_epoch_240.pth"
    elif folder == "imagenet":
        assert model.teacher == {"type": f"torchvision.models.{recipe.teacher}"}
        assert model.teacher_ckpt == torchvision.models.get_model_weights(recipe.teacher)["IMAGENET1K_V1"].url
    else:
        assert model.teacher == str(CONFIGS / "imagenet_lt" / f"{recipe.teacher}.py")
        teacher = load(f"imagenet_lt/{recipe.teacher}.py")
        assert model.teacher_ckpt == f"{teacher.work_dir}/best_accuracy_top1_epoch_*.pth"
        assert teacher.model.data_preprocessor == model.data_preprocessor


@pytest.mark.parametrize("path", DISTILLED)
def test_the_student_is_that_of_the_plain_config(path, load):
    folder, recipe = path.split("/")[0], RECIPES[path]
    model, plain = load(path).model, load(f"{folder}/{recipe.student}.py").model
    model.head.loss.loss_weight = 1.0  # KD weighs it
    shared = ("backbone", "neck", "head", "data_preprocessor")
    assert {part: model.get(part) for part in shared} == {part: plain.get(part) for part in shared}


CROP_AND_FLIP = [
    {"type": "RandomCrop", "crop_size": 32, "padding": 4},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
]
PACK = {"type": "PackInputs"}
TURN = {"type": "Rotate", "magnitude_range": (0, 15), "magnitude_std": "inf", "prob": 1.0, "pad_val": 0}
FILE = {"type": "LoadImageFromFile"}
RESIZED = [FILE, {"type": "RandomResizedCrop", "scale": 224, "backend": "pillow"}, CROP_AND_FLIP[1], PACK]
EDGE = {"type": "ResizeEdge", "scale": 256, "edge": "short", "backend": "pillow"}
CENTRE = [FILE, EDGE, {"type": "CenterCrop", "crop_size": 224}, PACK]
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# whether the images come as BGR, mean and std of pixels, training and test pipeline; of other folders the last row
PREPARED = {
    "imagenet": (True, IMAGENET_STATISTICS, RESIZED, CENTRE),
    "imagenet_lt": (True, IMAGENET_STATISTICS, RESIZED, CENTRE),
    "cifar100": (False, ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)), [*CROP_AND_FLIP, PACK], [PACK]),
    "": (False, ([0] * 3, [1] * 3), [*CROP_AND_FLIP, PACK], [PACK]),
}


@pytest.mark.parametrize("path", SHIPPED)
def test_images_are_prepared_as_published(path, load):
    config = load(path)
    preprocessor = config.model.data_preprocessor
    train, val, test = (config[f"{split}_dataloader"].dataset for split in ("train", "val", "test"))
    to_rgb, statistics, expected, of_test = PREPARED.get(path.split("/")[0], PREPARED[""])
    assert preprocessor.to_rgb is to_rgb
    pixels = [numpy.array(preprocessor[name]) / 255 for name in ("mean", "std")]
    numpy.testing.assert_allclose(pixels, statistics)
    assert val.pipeline == test.pipeline == of_test
    if path in GENERATED:
        turns = [{**TURN, "random_negative_prob": 0.5}] if family_of(path).classes == 100 else []
        assert [part.pipeline for part in train.datasets] == [[*CROP_AND_FLIP, *turns, PACK]] * 2
    elif path not in AUGMENTED_WEIGHTS:
        assert train.pipeline == expected
    assert preprocessor.get("type", "") == ("TwoViewDataPreprocessor" if path in AUGMENTED_WEIGHTS else "")


# type, folder and other keys of the training and the test images
LISTED = {"data_prefix": "imagenet"}
IMAGES = {
    "cifar100": ("CIFAR100", "data/cifar100", {"split": "train"}, {"split": "test"}),
    "imagenet": ("ImageNet", "data/imagenet", {"split": "train"}, {"split": "val"}),
    "imagenet_lt": (
        "ImageNet",
        "data",
        {**LISTED, "ann_file": "imagenet_lt/ImageNet_LT_train.txt"},
        {**LISTED, "ann_file": "imagenet_lt/ImageNet_LT_test.txt"},
    ),
}


@pytest.mark.parametrize("path", SHIPPED)
def test_no_checkpoint_is_chosen_by_test_images_but_as_published(path, load):
    """Under attack the best is chosen by the first 1,024 training images, which are not trained on."""
    config = load(path)
    folder = path.split("/")[0]
    sets = {split: config[f"{split}_dataloader"].dataset for split in ("train", "val", "test")}
    if path in GENERATED:
        sets["train"] = sets["train"].datasets[0]
    found = [{key: value for key, value in one.items() if key != "pipeline"} for one in sets.values()]
    metrics = [config.val_evaluator] if isinstance(config.val_evaluator, dict) else config.val_evaluator
    assert config.test_evaluator == config.val_evaluator
    if path in ROBUST:
        common = {"type": folder.split("_")[0].upper(), "data_root": f"data/{folder.split('_')[0]}", "split": "train"}
        held_out = [{"indices": 1024 - 50_000}, {"indices": 1024}, {"split": "test"}]
        assert found == [{**common, **keys} for keys in held_out]
        assert config.default_hooks.checkpoint.save_best == "robust/top1"
        assert metrics == [{"type": kind, "topk": (1,)} for kind in ("Accuracy", "RobustAccuracy")]
        return
    assert config.default_hooks.checkpoint.save_best == ("accuracy/top1" if folder == "imagenet_lt" else None)
    kind, root, train, test = IMAGES[folder]
    assert found == [{"type": kind, "data_root": root, **keys} for keys in (train, test, test)]
    if folder == "imagenet_lt":
        assert metrics[1] == {"type": "ManyMediumFew", "train_counts": "data/imagenet_lt/ImageNet_LT_train.txt"}


# --- adversarial training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROBUST)
def test_the_attack_is_the_one_that_the_authors_ran(path, load):
    need_robustbench(path)
    config = load(path)
    config.model.backbone.architecture = config.model.backbone.architecture.replace("34-10", "10-1").replace(
        "28-10", "10-1"
    )
    model = MODELS.build(config.model)
    attack, val_attack = model.attack, model.val_attack
    assert attack.norm == val_attack.norm == "linf"
    generated = path in GENERATED
    for epoch in (1, 50, 51, 100, 101, 150, 151, 200):
        eps = 8 / 255 if generated else 8 / 255 * epoch / 200
        expected = (8 / 255, 10, 2 / 255) if generated else (eps, 5, eps / 2)
        assert attack.strength(epoch, 200) == pytest.approx(expected), epoch
    assert val_attack.strength() == pytest.approx((8 / 255, 40 if generated else 20, 2 / 255))
    assert val_attack.random_start == "uniform"
    if generated:
        assert (attack.random_start, attack.objective, attack.model_mode) == ("uniform", "soft_cross_entropy", "train")
        assert val_attack.objective == "margin"
        assert model.awp is None
        assert model.natural_first
        assert config.model.label_smoothing == 0.1
        return
    cifar100 = path.startswith("cifar100") and not path.endswith("-trades.py")
    objective = "ikl" if cifar100 else "soft_cross_entropy"
    assert (attack.random_start, attack.objective, attack.model_mode) == ("normal", objective, "eval")
    assert val_attack.objective == "cross_entropy"
    assert (model.awp.gamma, model.awp.warmup_epochs, model.awp.undo) == (0.005, 10, "after_step")
    assert model.awp_averages_views
    assert not model.natural_first
    assert not model.awp.active(9)
    assert model.awp.active(10)
    assert model.augmented_weight == AUGMENTED_WEIGHTS.get(path)
    assert "label_smoothing" not in config.model
    # After each epoch of 48,976 images in batches of 128.
    steps = math.floor(48_976 / 128) if path.endswith("-trades.py") else math.ceil(48_976 / 128)
    (average,) = (hook for hook in config.custom_hooks if hook.type == "EMAHook")
    assert average == {**AVERAGE, "interval": steps, "begin_iter": steps}


AVERAGE = {"type": "EMAHook", "momentum": 0.1, "update_buffers": True}


def test_the_average_is_the_one_that_the_authors_make_of_the_checkpoints_of_the_epochs(tmp_path):
    """Of epoch 1 itself, then 0.9 * average + 0.1 * weights; buffers too."""
    states = []

    def note(run):
        states.append({name: value.clone() for name, value in run.model.state_dict().items()})

    hooks = [{"type": "IKLHook"}, {**AVERAGE, "interval": 3, "begin_iter": 3}]
    run = runs.runner(tmp_path, runs.network(), hooks=hooks, epochs=4)  # 3 steps each
    run.register_hook(runs.Record(after_train_epoch=note))
    run.train()
    found = next(hook.ema_model.module.state_dict() for hook in run.hooks if hasattr(hook, "ema_model"))
    expected, *others = states
    for state in others:
        expected = {name: 0.9 * value + 0.1 * state[name] for name, value in expected.items()}
    assert len(others) == 3
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("path", GENERATED)
def test_generated_images_are_mixed_in_as_published(path, load):
    family = family_of(path)
    folder, name = path.removesuffix(".py").split("/")
    config = load(path)
    dataset, size = folder.split("_")[0], name.split("_")[3].split("-")[0]
    (fraction,) = (fraction for key, *_, (fraction,) in rows(GENERATED_TABLE) if key == f"{dataset} {size}")
    loader = config.train_dataloader
    assert loader.batch_sampler == {"type": "GeneratedBatchSampler", "fraction": fraction, "epoch_size": 50_000}
    assert (loader.dataset.type, loader.dataset.ignore_keys) == ("ConcatDataset", "classes")
    generated = loader.dataset.datasets[1]
    assert (generated.type, generated.data_root, generated.data_file, generated.channel_order) == (
        "GeneratedImages",
        f"data/{dataset}",
        f"{size}.npz",
        "rgb",
    )
    assert len(loader.dataset.datasets) == 2
    assert config.model.backbone.dataset == dataset
    assert config.custom_hooks[2:] == [
        {"type": "BatchNormMomentumHook", "momentum": 0.01},
        {
            "type": "EMAHook",
            "ema_type": "WarmupEMA",
            "momentum": pytest.approx(1 - 0.995),
            "begin_epoch": 0.025 * family.epochs + 1,
        },
    ]


def test_only_batch_normalisation_is_left_out_of_the_decay(load):
    need_robustbench("cifar10_generated/wrn_28_10_1m-kl.py")
    config = load("cifar10_generated/wrn_28_10_1m-kl.py")
    backbone = MODELS.build({**config.model.backbone, "architecture": "DMWideResNet-10-1-SiLU"})
    wrapper = build_optim_wrapper(backbone, config.optim_wrapper)
    decays = {parameter: group["weight_decay"] for group in wrapper.param_groups for parameter in group["params"]}
    found = {name: decays[parameter] for name, parameter in backbone.named_parameters()}
    assert found == {name: 0.0 if "batchnorm" in name else 5e-4 for name in found}


# --- two views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(AUGMENTED_WEIGHTS))
def test_the_second_view_is_augmented_and_the_first_is_not(path, load):
    views, pack = load(path).train_dataloader.dataset.pipeline
    assert pack == PACK
    assert (views.type, views.num_views) == ("MultiView", [1, 1])
    basic, augmented = views.transforms
    assert basic == augmented[:2] == CROP_AND_FLIP
    kind = {"type": "ClippedCutout", "size": 16} if "cutout" in path else {"type": "CIFAR10AutoAugment"}
    assert augmented[2:] == [kind]


# --- schedules -------------------------------------------------------------------------------------------------------


def schedule(config, folder):
    """Learning rate and momentum of each epoch, from optimizer and schedulers as the runner builds them."""
    runner = runs.runner(
        folder,
        runs.network(),
        optim_wrapper=config.optim_wrapper,
        param_scheduler=config.param_scheduler,
        train_cfg=config.train_cfg,
        hooks=(),
    )
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert runner.train_loop.max_epochs == config.train_cfg.max_epochs
    schedulers = runner.build_param_scheduler(runner.param_schedulers)
    for _ in range(config.train_cfg.max_epochs):
        yield runner.optim_wrapper.get_lr()["lr"][0], runner.optim_wrapper.get_momentum()["momentum"][0]
        runner.optim_wrapper.step()
        for scheduler in schedulers:
            assert scheduler.by_epoch
            scheduler.step()


def published_schedule(path):
    recipe, family = RECIPES[path], family_of(path)
    if family.share is not None:
        return [(recipe.lr * family.share(epoch), 0.9) for epoch in range(1, family.epochs + 1)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=family.epochs, pct_start=0.025)
    values = []
    for _ in range(family.epochs):
        values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if len(values) < family.epochs:
            cycle.step()
    return values


def test_every_epoch_has_the_published_learning_rate_and_momentum(load, tmp_path):
    seen = {}
    for path in SHIPPED:
        config = load(path)
        parts = (config.optim_wrapper, config.param_scheduler, config.train_cfg)
        key = repr([part.to_dict() if hasattr(part, "to_dict") else part for part in parts])
        if key not in seen:
            seen[key] = list(schedule(config, tmp_path / str(len(seen))))
        numpy.testing.assert_allclose(seen[key], published_schedule(path), rtol=1e-9, atol=1e-12, err_msg=path)
    assert len(seen) == 2 + 1 + 1 + 2 + 3  # two rates for CIFAR-100, two half cosines, three lengths of one cycle


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in SHIPPED if not path.startswith("cifar100/")])
def test_the_batch_is_divided_among_the_processes(path, load, monkeypatch):
    family = family_of(path)
    for processes in (2, 8):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert load(path).train_dataloader.batch_size == family.batch // processes
    monkeypatch.delenv("WORLD_SIZE")
    assert load(path).train_dataloader.batch_size == family.batch


# --- networks --------------------------------------------------------------------------------------------------------


def measured(config):
    """Trained parameters and state-dict entries of a network in full size, where possible without its memory."""
    # MMPretrain's ResNets compute numbers while they are built.
    with torch.device("cpu" if config.type in ("ResNet", "ResNeXt") else "meta"):
        module = MODELS.build(config)
    return sum(parameter.numel() for parameter in module.parameters()), len(module.state_dict())


def test_networks_have_the_published_sizes(load):
    seen = {}

    def size(*configs):
        for config in configs:
            if repr(config) not in seen:
                seen[repr(config)] = measured(config)
        return tuple(numpy.add.reduce([seen[repr(config)] for config in configs]).tolist())

    for path, recipe in RECIPES.items():
        if recipe.student.startswith("WRN-") and find_spec("pyautoattack") is None:
            continue
        model = load(path).model
        expected = WIDE.get((recipe.student, family_of(path).classes)) or SIZES[recipe.student]
        assert size(model.backbone, model.head) == expected, path
        if isinstance(model.get("teacher"), str):
            model = load(f"imagenet_lt/{recipe.teacher}.py").model
            assert size(model.backbone, model.head) == SIZES[recipe.teacher], path
        elif recipe.teacher is not None:
            assert size(model.teacher) == SIZES[recipe.teacher], path


def test_resnet18_begins_as_torchvision_s_does(load):
    """Its weights have that library's names and deviations, and no block begins as the identity."""
    model = MODELS.build(load("imagenet/resnet18.py").model)
    model.init_weights()
    ours = {name.partition(".")[2]: tensor for name, tensor in model.named_parameters()}
    theirs = dict(torchvision.models.resnet18().named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.numel() > 500 and tensor.std() > 0:
            assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=0.1), name
        elif tensor.std() == 0:
            assert torch.equal(ours[name], tensor), name
