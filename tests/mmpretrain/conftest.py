"""A small network of MMPretrain, batches as its data loaders give them, and the shipped configs as one reads them."""

import copy
import os
import warnings

import pytest
import torch

with warnings.catch_warnings():
    # mmcv-lite says at its import which operators it lacks.
    warnings.simplefilter("ignore")
    import mmpretrain.models  # noqa: F401

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from mmpretrain_runs import CONFIGS, save_teacher

CLASSES = 3
_READ = {}  # configs as read, by path and what their text looks at


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A checkpoint for ``mmpretrain_runs.network()`` that tells images apart."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(autouse=True)
def _models_reach_the_device(_seed, monkeypatch):
    """Where the tests run on a device a model gets there as the runner brings it: built on the CPU, and moved."""
    device, build = torch.empty(0).device, MODELS.build
    if device.type == "cpu":
        return

    def moved(*arguments, **keywords):
        with torch.device("cpu"):
            made = build(*arguments, **keywords)
        return made.to(device) if isinstance(made, torch.nn.Module) else made

    monkeypatch.setattr(MODELS, "build", moved)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Reads a shipped config in an empty working directory, as one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IKL_PLUGINS_DATA", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")

    def read(path):
        key = path, os.environ.get("WORLD_SIZE"), os.environ.get("IKL_PLUGINS_DATA")
        if key not in _READ:
            _READ[key] = Config.fromfile(CONFIGS / path)
        return copy.deepcopy(_READ[key])

    return read


@pytest.fixture
def small_network():
    """Backbone, neck, head and data preprocessor of a small classifier, changed by keywords."""

    def config(classes=CLASSES, channels=2, mean=(120.0, 110.0, 100.0), std=(60.0, 55.0, 50.0), **keywords):
        return {
            "backbone": {"type": "ResNet_CIFAR", "depth": 18, "stem_channels": channels, "base_channels": channels},
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LinearClsHead", "num_classes": classes, "in_channels": 8 * channels},
            "data_preprocessor": {"mean": list(mean), "std": list(std), "to_rgb": True, "num_classes": classes},
            **keywords,
        }

    return config


@pytest.fixture
def small_batch():
    """A batch before the data preprocessor: byte images, and one data sample for each."""

    def batch(images=6, classes=CLASSES, size=16, labels=None):
        generator = torch.Generator().manual_seed(7)
        labels = list(range(classes)) * images if labels is None else labels
        return {
            "inputs": [
                torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator) for _ in range(images)
            ],
            "data_samples": [DataSample().set_gt_label(labels[index]) for index in range(images)],
        }

    return batch
