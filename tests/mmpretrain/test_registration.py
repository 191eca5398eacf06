"""What MMEngine and MMPretrain know after the import, and that a name of somebody else's is left alone."""

import importlib
import subprocess
import sys

import mmengine.registry as root
import mmpretrain.registry as host
import pytest
import torch
from mmengine.registry import DefaultScope, Registry

import ikl_plugins.mmpretrain as adapter

ROOT = {
    "MODELS": ("DKLLoss", "IKLLoss", "GKLLoss", "KLLoss"),
    "HOOKS": ("IKLHook", "BatchNormMomentumHook"),
    "PARAM_SCHEDULERS": ("ResumableOneCycleLR", "OneCycleMomentum"),
    "OPTIM_WRAPPERS": ("AutocastOptimWrapper",),
}
HOST = {
    "MODELS": ("DistillationClassifier", "AdversarialClassifier", "LogitsClsHead", "TwoViewDataPreprocessor"),
    "METRICS": ("RobustAccuracy", "ManyMediumFew"),
    "DATASETS": ("GeneratedImages",),
    "DATA_SAMPLERS": ("GeneratedBatchSampler",),
}


def run(statement):
    return subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=120, check=False)


def test_every_name_is_in_its_registry():
    for library, tables in ((root, ROOT), (host, HOST)):
        for registry, names in tables.items():
            held = getattr(library, registry).module_dict
            assert {name: held[name] for name in names} == {name: getattr(adapter, name) for name in names}
    assert host.MODELS.module_dict["RobustBenchNetwork"] is adapter.build_robustbench_network
    assert host.MODELS.module_dict["DistillationNetwork"] is adapter.build_distillation_network


def test_registering_robustbench_s_networks_does_not_import_it():
    done = run(
        "import sys, ikl_plugins.mmpretrain\n"
        "assert 'mmpretrain' in sys.modules\n"
        "print({'autoattack', 'pyautoattack', 'robustbench', 'timm'} & {name.split('.')[0] for name in sys.modules})"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"  # the forks print at their import


@pytest.mark.parametrize("name", ROOT["MODELS"])
def test_the_losses_are_built_in_every_scope(name):
    cls = getattr(adapter, name)
    other = Registry("model", parent=root.MODELS, scope="ikl_plugins_test_scope")
    try:
        for registry in (root.MODELS, host.MODELS, other):
            assert type(registry.build({"type": name})) is cls
            assert type(registry.build({"type": f"mmengine.{name}"})) is cls
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            assert type(root.MODELS.build({"type": name})) is cls
    finally:
        root.MODELS.children.pop("ikl_plugins_test_scope")


def test_the_averaged_model_is_found_where_emahook_looks():
    for registry in (root.MODELS, host.MODELS):
        assert registry.get("WarmupEMA") is adapter.WarmupEMA


def test_registering_again_changes_nothing():
    registries = [getattr(library, key) for library, tables in ((root, ROOT), (host, HOST)) for key in tables]
    before = [dict(registry.module_dict) for registry in registries]
    adapter.register()
    importlib.import_module("ikl_plugins.mmpretrain").register()
    assert before == [registry.module_dict for registry in registries]


@pytest.mark.parametrize(
    ("registry", "kind", "name", "scope"),
    [
        (root.MODELS, "loss", "IKLLoss", "mmengine"),
        (host.MODELS, "loss", "KLLoss", "mmpretrain"),  # there it would hide ours
        (host.MODELS, "model", "DistillationClassifier", "mmpretrain"),
        (host.MODELS, "backbone", "RobustBenchNetwork", "mmpretrain"),
        (host.MODELS, "backbone", "DistillationNetwork", "mmpretrain"),
        (host.MODELS, "head", "LogitsClsHead", "mmpretrain"),
        (host.METRICS, "metric", "RobustAccuracy", "mmpretrain"),
        (root.HOOKS, "hook", "IKLHook", "mmengine"),
    ],
)
def test_a_name_of_somebody_else_is_refused_and_kept(monkeypatch, registry, kind, name, scope):
    class Foreign:
        pass

    monkeypatch.setitem(registry.module_dict, name, Foreign)
    monkeypatch.delitem(root.MODELS.module_dict, "DKLLoss")
    message = rf"the {kind} name '{name}' must be free, but .*Foreign holds it in the registry of {scope}\. Register"
    with pytest.raises(ValueError, match=message):
        adapter.register()
    assert registry.module_dict[name] is Foreign
    assert "DKLLoss" not in root.MODELS.module_dict  # nothing was registered


def test_an_import_after_somebody_else_is_refused_and_the_core_needs_no_host():
    done = run(
        "import sys, ikl_plugins\n"
        "assert not {'mmengine', 'mmpretrain', 'mmcv'} & set(sys.modules)\n"
        "from mmengine.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class GKLLoss: pass\n"
        "import ikl_plugins.mmpretrain"
    )
    assert done.returncode != 0
    assert "the loss name 'GKLLoss' must be free, but __main__.GKLLoss holds it" in done.stderr


@pytest.mark.parametrize("missing", ["mmengine", "mmpretrain"])
def test_without_the_host_the_error_names_the_command(missing):
    done = run(f"import sys\nsys.modules['{missing}'] = None\nimport ikl_plugins\nimport ikl_plugins.mmpretrain")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: ikl_plugins.mmpretrain needs MMPretrain and MMEngine, but `{missing}")
    assert last.endswith("Run: pip install 'ikl_plugins[mmpretrain]'")


def test_nothing_of_torch_is_replaced():
    assert torch.load.__module__ == "torch.serialization"
