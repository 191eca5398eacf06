"""README and docs/mmpretrain.md: what their differences make of a config trains better than the labels alone."""

import pytest
import torch
from examples import BATCH, CLASSES, EPOCHS, added, assert_beats, blocks, digits
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmpretrain.structures import DataSample
from mmpretrain_runs import network, runner
from torch.utils.data import DataLoader

from ikl_plugins.adversarial import PGD


def classifier(channels):
    """The config of a classifier of digits as images of three channels."""
    config = network(head={"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": 2 * channels})
    config["backbone"] |= {"stem_channels": channels, "base_channels": channels}
    config["data_preprocessor"] = {"mean": [80.0] * 3, "std": [96.0] * 3, "num_classes": CLASSES}
    return config


def images(inputs):
    return (255 * inputs).to(torch.uint8).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)


def loader():
    pixels = images(digits().inputs)
    samples = [
        {"inputs": one, "data_samples": DataSample().set_gt_label(label)}
        for one, label in zip(pixels, digits().labels.tolist(), strict=True)
    ]
    return DataLoader(samples, BATCH, shuffle=True, collate_fn=pseudo_collate)


def trained(folder, config, seed, epochs=EPOCHS, rate=0.02):
    """What the runner makes of a config's model."""
    run = runner(
        folder,
        config["model"],
        hooks=config.get("custom_hooks", ()),
        epochs=epochs,
        train_dataloader=loader(),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": rate, "momentum": 0.9}},
        default_hooks={"checkpoint": None, "logger": None},
        randomness={"seed": seed},
    )
    run.train()
    return run.model.eval()


def accuracy(model, eps=None):
    """On the test digits, in percent, under PGD of 10 steps in a ball of the radius ``eps``."""
    pixels = images(digits().test_inputs).float() / 255

    def forward(inputs):
        return model((inputs * 255 - 80.0) / 96.0, mode="tensor")

    if eps is not None:
        torch.manual_seed(0)
        attack = PGD(eps=eps, steps=10, step_size=f"{int(eps.split('/')[0]) / 4:g}/255")
        pixels = attack(model, pixels, forward=forward, labels=digits().test_labels)
    with torch.no_grad():
        return 100 * (forward(pixels).argmax(1) == digits().test_labels).double().mean().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `my_student.py`, `my_classifier.py`, and `my_teacher.py` with its weights."""
    place = tmp_path_factory.mktemp("examples")
    for name, channels in (("student", 8), ("classifier", 4), ("teacher", 16)):
        (place / f"my_{name}.py").write_text(f"model = {classifier(channels)!r}\n")
    teacher = trained(place, Config.fromfile(place / "my_teacher.py"), 100, rate=0.2)
    torch.save(teacher.state_dict(), place / "my_teacher.pth")
    return place


def test_the_distillation_trains(folder, monkeypatch):
    text = added(blocks("docs/mmpretrain.md", "diff")[0])
    assert text.replace("\n\n", "\n") == added(blocks("README.md", "diff")[1])
    monkeypatch.chdir(folder)
    (folder / "distilled.py").write_text(text)
    student, distilled = (Config.fromfile(folder / f"{name}.py") for name in ("my_student", "distilled"))
    assert_beats(
        [
            accuracy(trained(folder, distilled, seed, 6)) - accuracy(trained(folder, student, seed, 6))
            for seed in (0, 1)
        ],
        5.0,
    )


@pytest.mark.slow
def test_the_adversarial_training_trains(folder, monkeypatch):
    monkeypatch.chdir(folder)
    eps = "24/255"  # 8/255 hardly changes a digit
    (folder / "robust.py").write_text(added(blocks("docs/mmpretrain.md", "diff")[1]).replace("8/255", eps))
    natural, robust = (Config.fromfile(folder / f"{name}.py") for name in ("my_classifier", "robust"))
    assert robust.test_evaluator == robust.val_evaluator
    found = [accuracy(trained(folder, config, 0, epochs=4, rate=0.2), eps) for config in (natural, robust)]
    assert found[1] > found[0] + 20, found
