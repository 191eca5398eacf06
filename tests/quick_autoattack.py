"""What tests of evaluations share: AutoAttack with fewer steps, a network and images for it, and how logs compare."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.evaluation.log import FORMAT
from ikl_plugins.robustbench.known_sets import KNOWN

robustbench = import_robustbench()


class Quick(robustbench.eval.AutoAttack):
    """The same attacks; some images fall to the first, some to a later one, some stand."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter, attack.n_iter_2, attack.n_iter_min = 8, 3, 1
            attack.n_iter_orig = 8  # of L1, which spreads them over three radii
            attack.eot_iter = min(attack.eot_iter, 3)
        self.fab.n_iter = 6
        self.square.n_queries = 60


def network(classes=10, seed=0, channels=3):
    """A small network for images of 8x8."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, classes)
    return nn.Sequential(*layers).eval()


def batch(model, count=14, wrong=2, seed=0, channels=3):
    """Images that the model gets right, but for the first ones."""
    images = torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % logits.shape[1]
    return images, labels


def write_network_and_images(folder, count, wrong=0):
    """Writes net.pt, a small WideResNet, and images.npz, which it gets right but for the first ones."""
    torch.manual_seed(2)
    model = robustbench_network("WideResNet-10-1").eval()
    torch.save({"state_dict": model.state_dict()}, folder / "net.pt")
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(pixels / 255).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 10
    np.savez(folder / "images.npz", images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return model, pixels / 255, labels


def write_imagenet(folder, count):
    """Writes ImageNet's class folders with the first images of RobustBench's list; all names of the list."""
    helpers = Path(robustbench.data.__file__).parent / "helper_files"
    names = (helpers / "imagenet_test_image_ids.txt").read_text().split()
    for label in json.loads((helpers / "imagenet_class_to_id_map.json").read_text()):  # not all are in the list
        (folder / "val" / label).mkdir(parents=True)
    for number, name in enumerate(names[:count]):
        pixels = np.random.default_rng(number).integers(0, 256, (240, 260, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val" / name)
    return names


class Harmless(robustbench.eval.AutoAttack):
    """Attacks that change nothing, at once: every image that is classified right stands."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted, self.fab, self.square):
            attack.perturb = lambda images, labels: images.clone()


def consistent_log(count=10000, natural=8530, robust=5709, classes=10, **changes):
    """The log of an evaluation of a test set that nobody has run, which agrees with itself: apgd-ce found all."""
    labels = [index % classes for index in range(count)]
    wrong = [(label + 1) % classes for label in labels]
    fell = ["apgd-ce" if robust <= index < natural else None for index in range(count)]
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"]
    progress = [
        {"attack": attack, "standing": robust, "seconds": 1.0, "batches": batches, "batches_done": batches}
        for attack, images in zip(attacks, (natural, robust, robust, robust), strict=True)
        for batches in (-(-images // 128),)
    ]
    name = {10: "cifar10", 100: "cifar100"}.get(classes, "made up")
    log = {
        "format": FORMAT,
        "versions": {"python": "3.11.2", "torch": "2.14.1", "robustbench": "1.1.1", "pyautoattack": "0.2.0"},
        "autoattack": {"module": "pyautoattack", "package": "pyautoattack", "version": "0.2.0"},
        "date": "2026-11-30T12:00:00+00:00",
        "device": "cpu (x86_64)",
        "model": "network",
        "checkpoint": None,
        "weights_sha256": "0" * 64,
        "dtype": "float32",
        "precision": "float32",
        "seed": 0,
        "threat_model": "Linf",
        "dataset": None,
        "eps": "8/255",
        "eps_value": 8 / 255,
        "version": "standard",
        "standard": True,
        "attacks": attacks,
        "parameters": {},
        "own_attacks": {},
        "surrogate": None,
        "dropped": [],
        "n_target_classes": min(9, classes - 1),
        "n_classes": classes,
        "n_examples": count,
        "batch_size": 128,
        "data": {
            "name": name,
            "source": KNOWN[name].source if name in KNOWN else None,
            "sha256": "0" * 64,
            "n_examples": count,
            "preprocessing": None,
        },
        "classes": None,
        "labels": labels,
        "natural_predictions": [*labels[:natural], *wrong[natural:]],
        "predictions": [*labels[:robust], *wrong[robust:]],
        "natural_correct": [int(index < natural) for index in range(count)],
        "fell_to": fell,
        "robust": [int(index < robust) for index in range(count)],
        "progress": [{**entry, "keys": ["0" * 16] * entry["batches"]} for entry in progress],
        "warnings": [],
        "unreliable": False,
        "adversarial": None,
        "finished": True,
        "natural_accuracy": 100 * natural / count,
        "robust_accuracy": 100 * robust / count,
    }
    return {**log, **changes}


def without_times(log):
    """A log without what differs from run to run."""
    kept = {key: value for key, value in log.items() if key not in ("date", "seal")}
    for key in ("progress", "corruptions"):
        if key in log:
            kept[key] = [{name: value for name, value in entry.items() if name != "seconds"} for entry in log[key]]
    return kept


def message(text, kind=ValueError):
    """Expects a refusal that has this text."""
    return pytest.raises(kind, match=re.escape(text))


class Interruption(Exception):  # noqa: N818
    """What stops a run in the tests."""
