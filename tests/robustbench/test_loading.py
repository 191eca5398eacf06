"""Checkpoints of every origin, as classifiers of images in [0, 1] that equal what their hosts compute."""

import argparse
import copy
import os
import sys

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("ikl_plugins.robustbench", reason="RobustBench is not installed", exc_type=ImportError)

from PIL import Image

from ikl_plugins import models
from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench import Normalised, from_mmpretrain, from_torchdistill, load_checkpoint

PLAIN, DM = "WideResNet-10-1", "DMWideResNet-10-1-SiLU"
CLASSES = ("cat", "dog", "fox")
CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def randomised(network):
    """The network with batch-normalisation statistics that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            module.num_batches_tracked.fill_(7)
    return network.eval()


def images(count=4, size=32):
    """Images whose values are bytes / 255, as a data set gives them."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (count, 3, size, size), generator=generator).float() / 255


def named(weights, prefix="", convert=lambda name, tensor: tensor):
    return {prefix + name: convert(name, tensor) for name, tensor in weights.items()}


def averaged_counters(name, tensor):
    """What averaging whole state dicts makes of the counters of batch normalisation."""
    return tensor.float() + 0.7 if name.endswith("num_batches_tracked") else tensor


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- the formats -----------------------------------------------------------------------------------------------------

PRIOR = {f"robust_loss.class_prior.{name}": torch.ones(2) for name in ("matrix", "sums", "counts")}
DISTILL_PRIOR = {f"distill_loss.class_prior.{name}": torch.ones(2) for name in ("matrix", "sums", "counts")}
UNUSED = {"sub_block1.layer.0.bn1.weight": torch.ones(16), "sub_block1.layer.0.conv1.weight": torch.ones(16, 16, 3, 3)}
FORMATS = {
    "plain": lambda weights: weights,
    "plain, data parallel": lambda weights: named(weights, "module."),
    "mmpretrain": lambda weights: {"meta": {}, "state_dict": named(weights, "backbone.")},
    "mmpretrain, class prior": lambda weights: {"state_dict": {**named(weights, "backbone."), **PRIOR}},
    "mmpretrain, distilled": lambda weights: {"state_dict": {**DISTILL_PRIOR, **named(weights, "backbone.")}},
    "torchdistill": lambda weights: {"model": weights, "best_value": 0.5, "args": argparse.Namespace(seed=1)},
    "robustbench": lambda weights: {"state_dict": named(weights, "model.")},
    "robustbench, both": lambda weights: {"state_dict": named(weights, "module.model.")},
    "official, averaged": lambda weights: named({**weights, **UNUSED}, "module.", averaged_counters),
    "official, flat": lambda weights: named({**weights, **UNUSED}, "", averaged_counters),
    "generated data": lambda weights: {"model_state_dict": named(weights, "module.0."), "epoch": 400},
    "generated data, one device": lambda weights: {"model_state_dict": named(weights, "0.")},
}
OFFICIAL_IS_WIDE = ("official, averaged", "official, flat")


@pytest.mark.parametrize(
    ("form", "architecture"),
    [
        *((form, PLAIN) for form in FORMATS),
        *((form, DM) for form in FORMATS if form not in OFFICIAL_IS_WIDE),
        ("generated data", "PreActResNet-18"),
    ],
)
def test_every_format_loads_to_the_bit(form, architecture, tmp_path):
    network = randomised(robustbench_network(architecture, 10))
    content = FORMATS[form](copy.deepcopy(network.state_dict()))
    torch.save(content, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", architecture)
    assert type(loaded) is type(network)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(network.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(images()), network(images()))
    assert all(tensor.dtype == network.state_dict()[name].dtype for name, tensor in loaded.state_dict().items())


def test_last_weights_instead_of_averaged_ones(tmp_path):
    last, averaged = randomised(robustbench_network(DM)), robustbench_network(DM).eval()
    content = {
        "model_state_dict": named(averaged.state_dict(), "module.0."),
        "unaveraged_model_state_dict": named(last.state_dict(), "module.0."),
    }
    torch.save(content, tmp_path / "a.pt")
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "a.pt", DM)(images()), averaged(images()))
        assert torch.equal(load_checkpoint(tmp_path / "a.pt", DM, averaged=False)(images()), last(images()))


def test_a_network_of_this_package_is_normalised_as_it_was_trained(tmp_path):
    name = "resnet8"
    network = randomised(models.resnet8())
    torch.save({"model": network.state_dict()}, tmp_path / "a.pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR100)
    loaded = load_checkpoint(tmp_path / "a.pt", name, "cifar100")
    with torch.no_grad():
        assert torch.equal(loaded(images()), network((images() - mean) / std))
        other = load_checkpoint(tmp_path / "a.pt", name, "cifar100", mean=(0.5,) * 3, std=(0.25,) * 3)
        assert torch.equal(other(images()), network((images() - 0.5) / 0.25))


def test_statistics_go_around_a_network_without_and_into_one_with(tmp_path):
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics.values())
    for name in (PLAIN, DM):
        network = randomised(robustbench_network(name, 10))
        torch.save(network.state_dict(), tmp_path / "a.pt")
        loaded = load_checkpoint(tmp_path / "a.pt", name, **statistics)
        assert isinstance(loaded, Normalised) == (name == PLAIN)
        if name == DM:
            network.mean, network.std = mean, std
            expected = network(images())
        else:
            expected = network((images() - mean) / std)
        assert torch.equal(loaded(images()), expected)


@pytest.mark.parametrize("name", [PLAIN, DM, "resnet8"])
def test_a_layer_in_the_file_that_normalises_is_used(name, tmp_path):
    """On any data set; other numbers than its own are refused."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
    network = randomised(models.resnet8(num_classes=10) if name == "resnet8" else robustbench_network(name, 10))
    saved = {"0.mean": mean, "0.std": std, **named(network.state_dict(), "1.")}
    torch.save({"state_dict": named(saved, "module.")}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", name)
    if name == DM:  # the layer is then inside it
        network.mean, network.std = mean, std
        expected = network(images())
    else:
        expected = network((images() - mean) / std)
    torch.testing.assert_close(loaded(images()), expected, rtol=0, atol=0)
    same = load_checkpoint(tmp_path / "a.pt", name, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
    assert torch.equal(same(images()), expected)
    with pytest.raises(ValueError, match=r"`mean` and `std` must be those in .*a\.pt, mean \(0\.5.*Leave them out"):
        load_checkpoint(tmp_path / "a.pt", name, mean=(0.4, 0.4, 0.3), std=(0.25, 0.2, 0.3))


def test_the_data_set_chooses_classes_and_statistics(tmp_path):
    network = randomised(robustbench_network(DM, 100, dataset="cifar100"))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    assert torch.equal(load_checkpoint(tmp_path / "a.pt", DM, "cifar100")(images()), network(images()))
    small = randomised(robustbench_network(DM, 3))
    torch.save(small.state_dict(), tmp_path / "b.pt")
    assert load_checkpoint(tmp_path / "b.pt", DM, num_classes=3)(images()).shape == (4, 3)


def test_a_device_is_moved_to(tmp_path):
    torch.save(robustbench_network(PLAIN).state_dict(), tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", PLAIN, mean=(0.5,) * 3, std=(0.5,) * 3, device="meta")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}


# --- RobustBench's own loader ----------------------------------------------------------------------------------------


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Saves something and returns the path."""

    def save(content, name="a.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def plain(change=lambda weights: weights, classes=10):
    """Weights of the small wide network, changed."""
    return lambda: change(robustbench_network(PLAIN, classes).state_dict())


def without(name):
    return lambda weights: {other: tensor for other, tensor in weights.items() if other != name}


def mixed(weights):
    return {f"net.{name}" if name.startswith("block") else name: tensor for name, tensor in weights.items()}


def extra(name):
    return plain(lambda weights: {**weights, name: torch.ones(1)})


def other(name, classes=10):
    return lambda: robustbench_network(name, classes).state_dict()


def of_ours(name, **more):
    return lambda: {**getattr(models, name)().state_dict(), **more}


def side_by_side(name):
    return lambda: {**named(of_ours(name)(), "module.student."), "module.teacher.x.weight": torch.ones(2, 2)}


def unknown():
    return {"backbone.conv1.weight": torch.ones(2), "head.fc.weight": torch.ones(3, 2)}


THREE = (0.5,) * 3
RESNET8 = ("resnet8", "cifar100")
MISFITS = [
    (
        "missing",
        other(DM),
        (PLAIN,),
        {},
        r"a\.pt .*missing: conv1\.weight, .* and \d+ more; unexpected: init_conv\.weight",
    ),
    ("width", other("WideResNet-10-2"), (PLAIN,), {}, r"\(32, 16, 3, 3\) instead of \(16, 16, 3, 3\).*WideResNet-10-2"),
    ("ours", of_ours("resnet14"), RESNET8, {}, r"resnet8, .*unexpected: .*resnet14"),
    ("not whole", plain(without("bn1.weight")), (PLAIN,), {}, r"missing: bn1\.weight\. .*not whole"),
    ("no known one", unknown, (PLAIN,), {}, r"has backbone, head; use from_mmpretrain or from_t"),
    ("prefix", plain(mixed), (PLAIN,), {}, r"unexpected: net\.block1\.layer\.0\.bn1\.weight"),
    ("beside", side_by_side("resnet8"), RESNET8, {}, r"It is under student\., beside teacher\."),
    ("beside another", side_by_side("resnet14"), RESNET8, {}, r"Under student\. it looks like .*resnet14"),
    ("wrapped", lambda: {"net": named(of_ours("resnet14")(), "a.b.")}, RESNET8, {}, r"architecture='resnet14'"),
    ("no statistic", extra("distill_loss.class_prior.x"), (PLAIN,), {}, r"unexpected: distill_loss\.class_prior\.x\."),
    ("of another", extra("x.robust_loss.class_prior.matrix"), (PLAIN,), {}, r"unexpected: x\.robust_loss"),
    ("sub-block", of_ours("resnet8", **UNUSED), RESNET8, {}, r"unexpected: sub_block1"),
    ("classes", other(PLAIN, 100), (PLAIN,), {}, r"100 classes and not 10.*num_classes=100"),
    ("and more", plain(without("bn1.weight"), 100), (PLAIN,), {}, r"not whole"),
    ("no average", plain(), (PLAIN,), {"averaged": False}, r"beside their average"),
    ("empty", dict, (PLAIN,), {}, r"an empty mapping"),
    ("no tensors", lambda: {"epoch": 3}, (PLAIN,), {}, r"tensors alone, .*'epoch' \(int\)"),
    ("data set", dict, (PLAIN, "cifar"), {}, r"data set `cifar`\. Did you mean `cifar10`\?"),
    ("architecture", dict, ("WideResNet-34",), {}, r"architecture `WideResNet-34`.*resnet8"),
    ("no mean", of_ours("resnet8"), ("resnet8",), {}, r"`mean` and `std` must be given for resnet8"),
    ("no std", dict, (PLAIN,), {"mean": THREE}, r"`mean` and `std` must be given both"),
    ("two means", dict, (PLAIN,), {"mean": (0.5,) * 2, "std": THREE}, r"one number for each of 3 channels"),
    ("no class", dict, (PLAIN,), {"num_classes": 0}, r"`num_classes` .* got 0"),
    ("imagenet", plain(), (DM, "imagenet"), {}, r"must know mean and std"),
]


@pytest.mark.parametrize(
    ("content", "arguments", "keywords", "message"), [row[1:] for row in MISFITS], ids=[row[0] for row in MISFITS]
)
def test_what_does_not_fit_is_refused(saved, content, arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved(content()), *arguments, **keywords)


def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run(saved, tmp_path):
    content = {"state_dict": robustbench_network(PLAIN).state_dict(), "epoch": {"x": Bomb(tmp_path / "exploded")}}
    with pytest.raises(ValueError, match=r"a\.pt .*mkdir"):
        load_checkpoint(saved(content), PLAIN)
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_is_no_checkpoint_is_refused(saved, tmp_path):
    path = saved(robustbench_network(PLAIN).state_dict())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.pt .*may be damaged"):
        load_checkpoint(path, PLAIN)
    with pytest.raises(ValueError, match=r"there is none at .*none\.pt"):
        load_checkpoint(tmp_path / "none.pt", PLAIN)


def test_statistics_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"^Normalised: `std` must be finite numbers above 0"):
        Normalised(nn.Identity(), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5))


@pytest.mark.parametrize(
    ("load", "module"), [(from_mmpretrain, "mmpretrain.registry"), (from_torchdistill, "torchdistill.models.registry")]
)
def test_without_the_host_the_command_is_named(load, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    host = module.partition(".")[0]
    with pytest.raises(ImportError, match=rf"^{load.__name__} .*`{host}.*pip install 'ikl_plugins\[{host}\]'$"):
        load("config", "checkpoint")


# --- MMPretrain ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of 32x32 in class folders, every byte value in them, red and blue far apart."""
    random = numpy.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for index in range(12):
        pixels = random.integers(0, 256, (32, 32, 3))
        pixels[..., 0] //= 3
        path = root / "test" / CLASSES[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype("uint8")).save(path)
    return root


def read(folder):
    """The images in the order of the data sets, as RGB in [0, 1], and their labels."""
    paths = sorted((folder / "test").rglob("*.png"))
    pixels = numpy.stack([numpy.asarray(Image.open(path).convert("RGB")) for path in paths])
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255, labels


CONFIG = """
custom_imports = dict(imports=['ikl_plugins.mmpretrain'])
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR', depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,),
        stem_channels=4, base_channels=4,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=8),
    data_preprocessor=dict({preprocessor}),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r}, data_prefix='test', pipeline=pipeline),
)
test_cfg = dict()
test_evaluator = dict(type='Accuracy', topk=(1,))
"""
PREPROCESSORS = {
    "rgb": "mean=[120.3, 110.7, 100.1], std=[60.2, 55.4, 50.9], to_rgb=True",
    "bgr": "mean=[120.3, 110.7, 100.1], std=[60.2, 55.4, 50.9], to_rgb=False",
    "bytes": "to_rgb=True",
    "padded": "mean=[120.3, 110.7, 100.1], std=[60.2, 55.4, 50.9], to_rgb=True, pad_size_divisor=24",
}


@pytest.fixture
def mmpretrain_config(folder, tmp_path):
    """Writes a config, weights for it, and returns both paths."""
    pytest.importorskip("mmpretrain.models")

    def write(preprocessor="rgb", change=lambda text: text, weights=None):
        import mmpretrain.registry
        from mmengine.config import Config

        path = tmp_path / "config.py"
        text = CONFIG.format(preprocessor=PREPROCESSORS.get(preprocessor, preprocessor), root=str(folder))
        path.write_text(change(text))
        if weights is None:
            plain = tmp_path / "plain.py"
            plain.write_text(text)
            torch.manual_seed(2)
            network = randomised(mmpretrain.registry.MODELS.build(Config.fromfile(str(plain)).model))
            pixels = {"inputs": 255 * read(folder)[0].flip(1)}
            with torch.no_grad():
                logits = network(network.data_preprocessor(pixels, False)["inputs"])
                # Logits that differ by about 1 among images: neither saturated nor all of one class.
                network.head.fc.weight /= logits.std(0, keepdim=True).T
                logits = network(network.data_preprocessor(pixels, False)["inputs"])
                network.head.fc.bias -= logits.mean(0)
            weights = {"meta": {}, "state_dict": network.state_dict()}
        torch.save(weights, tmp_path / "epoch_1.pth")
        return path, tmp_path / "epoch_1.pth"

    return write


def host_test(path, checkpoint, work_dir, model=None):
    """Accuracy in percent and the scores of MMPretrain's own test."""
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    scores = []

    class Record(Hook):
        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            scores.extend(sample.pred_score for sample in outputs)

    config = Config.fromfile(str(path))
    config.work_dir, config.load_from, config.log_level = str(work_dir), str(checkpoint), "WARNING"
    config.experiment_name = f"test_loading_{os.getpid()}_{host_test.count}"
    host_test.count += 1
    runner = Runner.from_cfg(config)
    runner.register_hook(Record())
    return runner.test()["accuracy/top1"], torch.stack(scores)


host_test.count = 0


def scores_and_accuracy(model, folder):
    """Of the wrapped model, in the batches of the host's test."""
    pixels, labels = read(folder)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in pixels.split(4)])
    return logits.softmax(1), 100 * (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("preprocessor", PREPROCESSORS)
def test_mmpretrain_s_own_test_gives_the_same(preprocessor, mmpretrain_config, folder, tmp_path):
    path, checkpoint = mmpretrain_config(preprocessor)
    model = from_mmpretrain(path, checkpoint)
    assert not model.training
    ours, accuracy = scores_and_accuracy(model, folder)
    theirs_accuracy, theirs = host_test(path, checkpoint, tmp_path / "work")
    assert torch.equal(ours, theirs)
    assert accuracy == pytest.approx(theirs_accuracy, abs=1e-4)
    assert len(set(ours.argmax(1).tolist())) > 1
    # It matters: another channel order gives something else.
    swapped = from_mmpretrain(path, checkpoint, channel_order="rgb")
    assert not torch.allclose(scores_and_accuracy(swapped, folder)[0], theirs)


def training_config(text):
    """The same as a classifier that is trained adversarially, with a class prior."""
    adversarial = "attack=dict(eps='8/255', steps=1), robust_loss=dict(type='IKLLoss', global_info=True)"
    return text.replace("type='ImageClassifier'", f"type='AdversarialClassifier', {adversarial}")


def distilling_config(text):
    distilling = "teacher='no_such_file.py', distill_loss=dict(type='IKLLoss', global_info=True)"
    return text.replace("type='ImageClassifier'", f"type='DistillationClassifier', {distilling}")


@pytest.mark.parametrize(("change", "loss"), [(training_config, "robust_loss"), (distilling_config, "distill_loss")])
def test_of_a_training_classifier_the_plain_one_is_loaded(change, loss, mmpretrain_config, folder):
    path, checkpoint = mmpretrain_config()
    plain, _ = scores_and_accuracy(from_mmpretrain(path, checkpoint), folder)
    content = torch.load(checkpoint, weights_only=True)
    for name in ("matrix", "sums", "counts"):
        content["state_dict"][f"{loss}.class_prior.{name}"] = torch.zeros(3)
    path, checkpoint = mmpretrain_config(change=change, weights=content)
    model = from_mmpretrain(path, checkpoint)
    assert type(model.classifier).__name__ == "ImageClassifier"
    assert torch.equal(scores_and_accuracy(model, folder)[0], plain)
    content["state_dict"][f"{loss}.other"] = torch.zeros(3)
    path, checkpoint = mmpretrain_config(change=change, weights=content)
    with pytest.raises(ValueError, match=rf"must fit `model` of .*config\.py, .*; unexpected: {loss}\.other\. Name"):
        from_mmpretrain(path, checkpoint)


def test_averaged_weights_are_those_of_mmpretrain_s_test(mmpretrain_config, folder, tmp_path):
    path, checkpoint = mmpretrain_config()
    averaged = torch.load(checkpoint, weights_only=True)["state_dict"]
    last = {name: 2 * tensor for name, tensor in averaged.items()}
    content = {
        "meta": {"mmengine_version": "0.10.7"},
        "state_dict": averaged,
        "ema_state_dict": {**named(last, "module."), "steps": torch.tensor(3)},
    }
    path, checkpoint = mmpretrain_config(weights=content)
    ours, _ = scores_and_accuracy(from_mmpretrain(path, checkpoint), folder)
    assert torch.equal(ours, host_test(path, checkpoint, tmp_path / "work")[1])
    model = from_mmpretrain(path, checkpoint, averaged=False)
    loaded = model.classifier.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in last.items())


def test_a_config_object_and_a_top_level_preprocessor_serve_too(mmpretrain_config, folder):
    from mmengine.config import Config

    path, checkpoint = mmpretrain_config()
    expected, _ = scores_and_accuracy(from_mmpretrain(path, checkpoint), folder)
    config = Config.fromfile(str(path))
    config.data_preprocessor = config.model.pop("data_preprocessor")
    before = config.pretty_text
    assert torch.equal(scores_and_accuracy(from_mmpretrain(config, checkpoint), folder)[0], expected)
    assert config.pretty_text == before


def test_images_in_0_1_of_a_training_classifier_stay_so(mmpretrain_config):
    def in_0_1(text):
        text = training_config(text).replace("attack=dict", "pixel_range=1.0, attack=dict")
        return with_step("type='torchvision/ToTensor'")(text)

    path, checkpoint = mmpretrain_config("mean=[0.5] * 3, std=[0.25] * 3, to_rgb=True", change=in_0_1)
    model = from_mmpretrain(path, checkpoint)
    with torch.no_grad():
        assert torch.equal(model(images()), model.classifier((images() - 0.5) / 0.25))


def test_data_that_is_rgb_by_itself_is_not_turned(mmpretrain_config):
    def cifar10(text):
        return text.replace("dict(type='LoadImageFromFile'), ", "").replace("type='CustomDataset'", "type='CIFAR10'")

    path, checkpoint = mmpretrain_config("mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False", change=cifar10)
    model = from_mmpretrain(path, checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model.classifier(images()))


def test_a_gradient_reaches_the_images_and_devices_are_followed(mmpretrain_config):
    model = from_mmpretrain(*mmpretrain_config())
    pixels = images().requires_grad_()
    model(pixels).logsumexp(1).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert model.to("meta").classifier.data_preprocessor.device.type == "meta"


def with_step(step):
    return lambda text: text.replace("dict(type='PackInputs')", f"dict({step}), dict(type='PackInputs')")


def replaced(old, new):
    return lambda text: text.replace(old, new)


UNSAID = [
    ("no reader", replaced("dict(type='LoadImageFromFile'), ", ""), {}, r"`channel_order` must be given"),
    ("no model", replaced("model = dict(", "network = dict("), {}, r"config\.py must have a `model`"),
    ("order", replaced("", ""), {"channel_order": "RGB"}, r"`channel_order` must be 'rgb', .*got 'RGB'"),
]


@pytest.mark.parametrize(("change", "keywords", "message"), [row[1:] for row in UNSAID], ids=[row[0] for row in UNSAID])
def test_a_config_that_does_not_say_how_images_are_prepared_is_refused(change, keywords, message, mmpretrain_config):
    path, checkpoint = mmpretrain_config(change=change)
    with pytest.raises(ValueError, match=r"^from_mmpretrain: .*" + message):
        from_mmpretrain(path, checkpoint, **keywords)


def test_arguments_of_mmpretrain_that_are_none_are_refused(mmpretrain_config, tmp_path):
    path, checkpoint = mmpretrain_config()
    with pytest.raises(ValueError, match=r"^from_mmpretrain: `config` .*none at .*none\.py"):
        from_mmpretrain(tmp_path / "none.py", checkpoint)
    with pytest.raises(TypeError, match=r"^from_mmpretrain: `config` .*, got dict"):
        from_mmpretrain({}, checkpoint)
    with pytest.raises(ValueError, match=r"there is none at .*none\.pth"):
        from_mmpretrain(path, tmp_path / "none.pth")
    model = from_mmpretrain(path, checkpoint)
    model.classifier.head = None
    with pytest.raises(ValueError, match=r"^from_mmpretrain: .* logits of shape \(N, C\), got a tuple"):
        model(images())


# --- what MMPretrain's checkpoint says of its images -----------------------------------------------------------------


def stored(network, preprocessor):
    text = CONFIG.format(preprocessor=preprocessor, root="x").replace(
        "pipeline=pipeline", "pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]"
    )  # MMEngine writes it out
    weights = named(network.state_dict(), "backbone.")
    return {"meta": {"cfg": text, "mmengine_version": "0.10.7"}, "state_dict": weights}


PIXELS = "mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], to_rgb=True"
NORMALISED = "mean=[127.5, 102.0, 76.5], std=[63.75, 51.0, 76.5], to_rgb=True"


OWN = r"give mean=\(0\.5, 0\.4, 0\.3\), std=\(0\.25, 0\.2, 0\.3\)"
STORED = [
    ("mean", NORMALISED, PLAIN, r"RGB with mean \(0\.5, 0\.4, 0\.3\) and std \(0\.25.*" + OWN),
    ("order", PIXELS.replace("True", "False"), PLAIN, r"BGR with mean \(0, 0, 0\)"),
    ("bytes", "to_rgb=True", PLAIN, r"RGB with .* std \(0\.003922, .*give mean="),
    ("level", PIXELS.replace("0.0, 0.0", "1.0, 1.0"), PLAIN, r"mean \(0\.003922, .*give mean="),
    ("twice", NORMALISED, DM, r"RGB with mean \(0\.5, "),
    ("ours", NORMALISED, "resnet8", r"with mean \(0\.5071, .* std \(0\.2675, .*RGB with mean \(0\.5, .*" + OWN),
]


@pytest.mark.parametrize(
    ("preprocessor", "name", "message"), [row[1:] for row in STORED], ids=[row[0] for row in STORED]
)
def test_a_checkpoint_whose_own_config_has_other_images_is_refused(saved, preprocessor, name, message):
    network = models.resnet8() if name == "resnet8" else robustbench_network(name)
    with pytest.raises(ValueError, match=rf"^load_checkpoint: .*{message}"):
        load_checkpoint(saved(stored(network, preprocessor)), name, "cifar100" if name == "resnet8" else "cifar10")


@pytest.mark.parametrize("architecture", [PLAIN, DM])
def test_a_checkpoint_whose_own_config_has_the_same_images_is_loaded(saved, architecture):
    network = randomised(robustbench_network(architecture))
    assert load_checkpoint(saved(stored(network, PIXELS)), architecture)(images()).equal(network(images()))
    digits = "mean=[0.02, 0.0, 0.0], std=[255.0, 255.0, 255.02], to_rgb=True"  # of another precision
    assert load_checkpoint(saved(stored(network, digits)), architecture)(images()).equal(network(images()))


def test_statistics_that_are_given_must_be_those_of_the_checkpoint_s_config(saved):
    network, own = robustbench_network(PLAIN), {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}
    assert isinstance(load_checkpoint(saved(stored(network, NORMALISED)), PLAIN, **own), Normalised)
    for other in (NORMALISED.replace("True", "False"), NORMALISED.replace("127.5", "120"), PIXELS):
        with pytest.raises(ValueError, match=r"with mean \(0\.5, 0\.4, 0\.3\) and .* but .* has (BGR|RGB) with mean"):
            load_checkpoint(saved(stored(network, other)), PLAIN, **own)


def test_a_text_that_is_no_config_says_nothing_and_is_not_run(saved, tmp_path):
    network = randomised(robustbench_network(PLAIN))
    for text in (
        "model = (",
        "model = build()",
        "",
        f"__import__('os').mkdir({str(tmp_path / 'exploded')!r})",
        "model = dict(data_preprocessor=dict(mean=['a'], std=['b']))",
    ):
        content = stored(network, PIXELS)
        content["meta"]["cfg"] = text
        assert load_checkpoint(saved(content), PLAIN)(images()).equal(network(images()))
    assert not (tmp_path / "exploded").exists()


# --- torchdistill ----------------------------------------------------------------------------------------------------

YAML = """
dependencies: [{{'name': 'ikl_plugins.torchdistill'}}]
datasets:
  some/test: &test !import_call
    key: 'torchvision.datasets.ImageFolder'
    init:
      kwargs:
        root: '{root}/test'
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms: [{steps}]
models:
  {role}:
    key: '{key}'
    kwargs: {kwargs}
    dst_ckpt: 'x.pt'
train: {{}}
test:
  test_data_loader:
    dataset_id: 'some/test'
    sampler:
      class_or_func: !import_get
        key: 'torch.utils.data.SequentialSampler'
      kwargs:
    kwargs: {{batch_size: 4, num_workers: 0}}
"""
STEPS = {
    "tensor": "!import_call {key: 'torchvision.transforms.ToTensor'}",
    "normalize": "!import_call {key: 'torchvision.transforms.Normalize', init: {kwargs: "
    "{mean: [0.31, 0.47, 0.53], std: [0.21, 0.33, 0.27]}}}",
    "resize": "!import_call {key: 'torchvision.transforms.Resize', init: {kwargs: {size: [32, 32]}}}",
}


@pytest.fixture
def torchdistill_config(folder, tmp_path):
    """Writes a YAML file, weights for it, and returns both paths and the network."""
    pytest.importorskip("torchdistill.models.registry")

    def write(*steps, role="student_model", key="ikl_plugins.resnet8", kwargs="{num_classes: 3}", network=None):
        path, checkpoint = tmp_path / "config.yaml", tmp_path / "x.pt"
        text = YAML.format(
            root=folder, steps=", ".join(STEPS[step] for step in steps), role=role, key=key, kwargs=kwargs
        )
        path.write_text(text)
        torch.manual_seed(4)
        network = randomised(models.resnet8(3) if network is None else network)
        torch.save({"model": network.state_dict(), "args": argparse.Namespace(seed=0)}, checkpoint)
        return path, checkpoint, network

    return write


def driver_accuracy(path, network):
    """Of torchdistill's loaders and the network on them, and the logits."""
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.datasets.util import build_data_loader

    config = load_yaml_file(str(path))
    settings = config["test"]["test_data_loader"]
    loader = build_data_loader(config["datasets"][settings["dataset_id"]], settings, distributed=False)
    with torch.no_grad():
        batches = [(network(batch), labels) for batch, labels in loader]
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return 100 * (logits.argmax(1) == labels).double().mean().item(), logits


@pytest.mark.parametrize(
    ("role", "steps"),
    [
        ("student_model", ("tensor", "normalize")),
        ("model", ("resize", "tensor", "normalize")),
        ("student_model", ("tensor",)),
    ],
)
def test_torchdistill_s_own_test_gives_the_same(role, steps, torchdistill_config, folder):
    path, checkpoint, network = torchdistill_config(*steps, role=role)
    model = from_torchdistill(path, checkpoint)
    assert not model.training
    assert isinstance(model, Normalised) == ("normalize" in steps)
    pixels, labels = read(folder)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in pixels.split(4)])
    theirs_accuracy, theirs = driver_accuracy(path, network)
    assert torch.equal(logits, theirs)
    assert 100 * (logits.argmax(1) == labels).double().mean().item() == theirs_accuracy


SPOILED = [
    ("no student", replaced("student_model", "teacher_model"), r"`models: student_model:` or"),
    ("no data set", replaced("dataset_id: 'some/test'", "dataset_id: 'other'"), r"data set of its `test:`"),
    ("no data", replaced("/test'\n        tr", "/none'\n        tr"), r"must name data that is there"),
    ("no YAML", lambda text: "a: [", r"must be YAML"),
    ("a list", lambda text: "- 1", r"must have `models: student_model:`"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in SPOILED], ids=[row[0] for row in SPOILED])
def test_a_yaml_file_that_is_none_is_refused(torchdistill_config, change, message):
    path, checkpoint, _ = torchdistill_config("tensor", "normalize")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"(?s)^from_torchdistill: .*config\.yaml .*{message}"):
        from_torchdistill(path, checkpoint)


def test_weights_of_another_model_are_refused(torchdistill_config, tmp_path):
    path, checkpoint, _ = torchdistill_config("tensor", network=models.resnet14(3))
    with pytest.raises(
        ValueError, match=r"x\.pt must fit the model 'ikl_plugins\.resnet8' .*unexpected: layer1\.1\.conv1"
    ):
        from_torchdistill(path, checkpoint)
    with pytest.raises(ValueError, match=r"^from_torchdistill: `config` .*none at .*none\.yaml"):
        from_torchdistill(tmp_path / "none.yaml", checkpoint)
    torch.save({"model": {}, "args": Bomb(tmp_path / "exploded")}, checkpoint)
    with pytest.raises(ValueError, match=r"would run code"):
        from_torchdistill(path, checkpoint)
    assert not (tmp_path / "exploded").exists()
