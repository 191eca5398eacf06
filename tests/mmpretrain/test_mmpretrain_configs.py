"""The shipped MMPretrain configs: each parses, builds everything it names, and trains a step."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, METRICS, MODEL_WRAPPERS, PARAM_SCHEDULERS, VISUALIZERS
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain_runs import CONFIGS

from ikl_plugins.mmpretrain import EpochClassifier

SHIPPED = sorted(
    str(path.relative_to(CONFIGS))
    for folder in ("digits", "cifar10_folder", "cifar10_miniature")
    for path in (CONFIGS / folder).glob("*.py")
)
MINIATURE = [path for path in SHIPPED if "miniature" in path]
IN_PROCESS = {
    "num_workers": 0,
    "persistent_workers": False,
    "pin_memory": False,
    "collate_fn": {"type": "default_collate"},
}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data folder with an image of noise for each class of each split of both data sets."""
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image", reason="images are written with Pillow")
    noise = numpy.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for dataset, labels in (("digits", "0123456789"), ("cifar10", CIFAR10)):
        for split in ("train", "val", "test"):
            for label in labels:
                path = folder / dataset / split / label / "0.png"
                path.parent.mkdir(parents=True)
                image.fromarray(noise.integers(0, 256, (32, 32, 3)).astype("uint8")).save(path)
    return folder


@pytest.fixture
def load(load, images, monkeypatch):
    """Reads a shipped config, with the images in the place of the data."""
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(images))
    return load


def save_teacher(config):
    """Writes what the config expects of its teacher's training."""
    torch.manual_seed(0)
    path = Path(config.model.teacher_ckpt)
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": MODELS.build(Config.fromfile(config.model.teacher).model).state_dict()}, path)


FAST = ("distill_ikl.py", "adversarial_ikl.py")
LARGE = [path for path in SHIPPED if path.startswith("cifar10_folder/") and path.split("/")[1] not in FAST]


@pytest.mark.parametrize("path", [pytest.param(path, marks=[pytest.mark.slow] * (path in LARGE)) for path in SHIPPED])
def test_each_shipped_config_trains_a_step(path, load):
    config = load(path)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.pop("indices", None)  # of real images; there are ten here
    if "distill" in path:
        save_teacher(config)
    if "val_attack" in config.model:
        config.model.val_attack.steps = 2
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    if isinstance(model, EpochClassifier):
        model.begin_epoch(config.train_cfg.max_epochs, config.train_cfg.max_epochs)  # ramps are over, AWP is on
    VISUALIZERS.build({**config.visualizer, "name": path, "save_dir": "vis"})  # the VisualizationHook looks for it
    for hook in [*config.custom_hooks, *config.default_hooks.values()]:
        HOOKS.build(hook)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    schedulers = config.param_scheduler if isinstance(config.param_scheduler, list) else [config.param_scheduler]
    for scheduler in schedulers:
        length = {"epoch_length": 10} if scheduler.get("convert_to_iter_based") else {}
        PARAM_SCHEDULERS.build(scheduler, default_args={"optimizer": wrapper, **length})
    evaluators = config.val_evaluator if isinstance(config.val_evaluator, list) else [config.val_evaluator]
    metrics = [METRICS.build(metric) for metric in evaluators]

    loader = Runner.build_dataloader({**config.train_dataloader, "batch_size": 4, **IN_PROCESS}, seed=0)
    model.train()
    losses = model.train_step(next(iter(loader)), wrapper)
    assert set(losses) >= {"loss"}
    assert all(torch.isfinite(value).all() for value in losses.values())
    if isinstance(model, EpochClassifier):
        model.end_iteration()
        model.end_epoch()

    loader = Runner.build_dataloader({**config.val_dataloader, "batch_size": 2, **IN_PROCESS})
    model.eval()
    batch = next(iter(loader))
    predictions = [sample.to_dict() for sample in model.val_step(batch)]
    for metric in metrics:
        metric.process(batch, predictions)
    assert config.default_hooks.checkpoint.save_best.split("/")[0] in [metric.prefix for metric in metrics]


@pytest.mark.parametrize("path", SHIPPED)
def test_the_shipped_configs_share_one_shape(path, load, monkeypatch):
    config = load(path)
    dataset, name = path.removesuffix(".py").split("/")
    assert config.work_dir == f"runs/mmpretrain/{dataset}/{name}"
    assert config.randomness.seed == 0
    assert {"IKLHook", "SyncBuffersHook"} <= {hook.type for hook in config.custom_hooks}
    for split in ("train", "val", "test"):
        assert config[f"{split}_dataloader"].dataset.data_prefix == split
    kind = dict.fromkeys(("adversarial", "robust"), "AdversarialClassifier") | {"distill": "DistillationClassifier"}
    assert config.model.type == kind.get(name.split("_")[0], "ImageClassifier")
    robust = config.model.type == "AdversarialClassifier"
    best = "robust/apgd-ce" if "apgd" in name else ("robust" if robust else "accuracy") + "/top1"
    assert config.default_hooks.checkpoint.save_best == best
    wrapper = config.model_wrapper_cfg
    assert MODEL_WRAPPERS.get(wrapper.type) is not None
    assert (wrapper.device_ids, wrapper.broadcast_buffers, wrapper.find_unused_parameters) == (None, False, False)
    if "distill" in path:
        teacher = Config.fromfile(config.model.teacher)
        assert str(config.model.teacher) == str(CONFIGS / dataset / ("robust_" * robust + "teacher.py"))
        assert config.model.teacher_ckpt == f"{teacher.work_dir}/epoch_{teacher.train_cfg.max_epochs}.pth"
        plain = load(f"{dataset}/{'natural' if robust and dataset == 'digits' else 'plain'}.py").model
        shared = ("backbone", "neck") if robust else ("backbone", "neck", "data_preprocessor")
        assert all(config.model.get(part) == plain.get(part) for part in shared)
    monkeypatch.delenv("IKL_PLUGINS_DATA")
    assert load(path).train_dataloader.dataset.data_root == f"data/{dataset.split('_')[0]}"


@pytest.mark.parametrize("path", MINIATURE)
def test_the_images_of_the_miniature_are_as_many_of_each_class(path, load):
    config = load(path)
    counts = {}
    for name, of_each in (("train", 4_500), ("val", 500)):  # of the prepared data, in the order of the classes
        indices = config[f"{name}_dataloader"].dataset.indices
        assert max(indices) < 10 * of_each
        classes = [index // of_each for index in indices]
        (counts[name],) = {classes.count(label) for label in range(10)}
    assert counts == {"train": 90 if "few_images" in path else 900, "val": 50}


@pytest.mark.parametrize("path", MINIATURE)
def test_the_configs_of_the_miniature_differ_in_the_loss_alone(path, load):
    reference = load("cifar10_miniature/adversarial_trades" + "_few_images" * ("few_images" in path) + ".py").to_dict()
    config = load(path).to_dict()
    for one in (reference, config):
        one["model"].pop("robust_loss")
        one.pop("work_dir")
    assert config == reference
    assert config["param_scheduler"][-1]["T_max"] == config["train_cfg"]["max_epochs"] - 1
    assert config["train_dataloader"]["num_workers"] == 0  # or a resumed training is another one


def test_the_losses_of_the_miniature_are_the_published_ones(load):
    losses = {Path(path).stem.removeprefix("adversarial_"): load(path).model.robust_loss for path in MINIATURE}
    trades = {"type": "KLLoss", "loss_weight": 6.0}
    ikl = {"type": "IKLLoss", "alpha": 4.0, "beta": 20.0, "global_info": True, "weight_temperature": 4.0}
    no_prior = {key: value for key, value in ikl.items() if key != "weight_temperature"}
    assert losses == {
        "trades": trades,
        "trades_few_images": trades,
        "dkl": {"type": "DKLLoss", "alpha": 1.0, "beta": 1.0, "loss_weight": 6.0},
        "ikl": ikl,
        "ikl_few_images": ikl,
        "gkl": {**ikl, "type": "GKLLoss", "gamma": 0.2},
        "ikl_no_prior": {**no_prior, "global_info": False},
    }
