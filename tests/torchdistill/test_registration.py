"""What torchdistill knows after the import, and that a key of somebody else's is left alone."""

import importlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.common.main_util import import_dependencies
from torchdistill.core.interfaces.registry import PRE_EPOCH_PROC_FUNC_DICT
from torchdistill.losses.registry import LOSS_DICT, LOW_LEVEL_LOSS_DICT, MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import MODEL_DICT, get_model

import ikl_plugins.torchdistill as adapter
from ikl_plugins import models

LOSSES = {f"{kind}{end}": getattr(adapter, f"{kind}Loss") for kind in ("DKL", "IKL", "GKL") for end in ("Loss", "")}


def run(statement):
    return subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "dependencies",
    ["ikl_plugins.torchdistill", ["ikl_plugins.torchdistill"], [{"name": "ikl_plugins.torchdistill"}]],
)
def test_dependencies_of_every_form_register_the_losses(dependencies):
    import_dependencies(dependencies)
    assert {key: MIDDLE_LEVEL_LOSS_DICT[key] for key in LOSSES} == LOSSES
    assert PRE_EPOCH_PROC_FUNC_DICT["ikl_pre_epoch_process"] is adapter.ikl_pre_epoch_process


def test_each_public_network_is_known_by_its_prefixed_name():
    names = {key for key in MODEL_DICT if key.startswith("ikl_plugins.")}
    assert names == {f"ikl_plugins.{name}" for name in (*models.__all__, "robustbench_network")}
    # The way of upstream's script: torchvision's names first.
    config = {"key": "ikl_plugins.resnet8", "kwargs": {"num_classes": 3}}
    assert get_image_classification_model(config) is None
    model = get_model(config["key"], None, **config["kwargs"])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_robustbench_s_networks_are_built_by_key():
    pytest.importorskip("pyautoattack", reason="RobustBench is not installed")
    config = {"key": "ikl_plugins.robustbench_network", "kwargs": {"architecture": "WideResNet-10-1", "num_classes": 3}}
    assert get_image_classification_model(config) is None
    assert get_model(config["key"], None, **config["kwargs"]).fc.out_features == 3


def test_registering_again_changes_nothing():
    before = dict(MIDDLE_LEVEL_LOSS_DICT), dict(PRE_EPOCH_PROC_FUNC_DICT), dict(MODEL_DICT)
    adapter.register()
    importlib.import_module("ikl_plugins.torchdistill").register()
    assert before == (MIDDLE_LEVEL_LOSS_DICT, PRE_EPOCH_PROC_FUNC_DICT, MODEL_DICT)


@pytest.mark.parametrize(
    ("registry", "kind", "key"),
    [
        (MIDDLE_LEVEL_LOSS_DICT, "loss", "IKL"),
        (LOW_LEVEL_LOSS_DICT, "loss", "GKLLoss"),
        (LOSS_DICT, "loss", "DKLLoss"),
        (PRE_EPOCH_PROC_FUNC_DICT, "pre-epoch process", "ikl_pre_epoch_process"),
        (MODEL_DICT, "model", "ikl_plugins.resnet8"),
        (MODEL_DICT, "model", "ikl_plugins.robustbench_network"),
    ],
)
def test_a_key_of_somebody_else_is_refused_and_kept(monkeypatch, registry, kind, key):
    class Foreign:
        pass

    monkeypatch.setitem(registry, key, Foreign)
    monkeypatch.delitem(MIDDLE_LEVEL_LOSS_DICT, "DKL")
    with pytest.raises(ValueError, match=rf"{kind} key '{key}' must be free, but .*Foreign holds it"):
        adapter.register()
    assert registry[key] is Foreign
    assert "DKL" not in MIDDLE_LEVEL_LOSS_DICT  # nothing was registered


def test_without_torchdistill_the_error_names_the_command():
    done = run("import sys\nsys.modules['torchdistill'] = None\nimport ikl_plugins\nimport ikl_plugins.torchdistill")
    assert done.returncode != 0
    assert done.stderr.strip().endswith("Run: pip install 'ikl_plugins[torchdistill]'")
