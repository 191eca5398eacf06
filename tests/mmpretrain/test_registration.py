"""What MMEngine and MMPretrain know after the imports, and that a name of somebody else's is left alone."""

import mmengine.registry as root
import mmpretrain.registry as host
import pytest
import torch
from mmengine.registry import DefaultScope, Registry
from mmpretrain_runs import execute

import ikl_plugins.mmengine
import ikl_plugins.mmpretrain as adapter

ROOT = {
    "MODELS": ("DKLLoss", "IKLLoss", "GKLLoss", "KLLoss", "WarmupEMA"),
    "HOOKS": ("IKLHook", "BatchNormMomentumHook"),
    "PARAM_SCHEDULERS": ("ResumableOneCycleLR", "OneCycleMomentum"),
    "OPTIM_WRAPPERS": ("AutocastOptimWrapper",),
}
HOST = {
    "MODELS": ("DistillationClassifier", "AdversarialClassifier", "LogitsClsHead", "TwoViewDataPreprocessor"),
    "TRANSFORMS": ("CIFAR10AutoAugment", "ClippedCutout"),
    "METRICS": ("RobustAccuracy", "ManyMediumFew"),
    "DATASETS": ("GeneratedImages",),
    "DATA_SAMPLERS": ("GeneratedBatchSampler",),
}


def test_every_name_is_in_its_registry_once():
    adapter.register()
    ikl_plugins.mmengine.register()
    for library, tables in ((root, ROOT), (host, HOST)):
        for registry, names in tables.items():
            held = getattr(library, registry).module_dict
            assert {name: held[name] for name in names} == {name: getattr(adapter, name) for name in names}
    assert host.MODELS.module_dict["RobustBenchNetwork"] is adapter.build_robustbench_network
    assert host.MODELS.module_dict["DistillationNetwork"] is adapter.build_distillation_network
    assert torch.load.__module__ == "torch.serialization"


@pytest.mark.parametrize("name", ROOT["MODELS"][:4])
def test_the_losses_are_built_in_every_scope(name):
    cls = getattr(adapter, name)
    other = Registry("model", parent=root.MODELS, scope="ikl_plugins_test_scope")
    try:
        for registry in (root.MODELS, host.MODELS, other):
            assert type(registry.build({"type": name})) is type(registry.build({"type": f"mmengine.{name}"})) is cls
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            assert type(root.MODELS.build({"type": name})) is cls
    finally:
        root.MODELS.children.pop("ikl_plugins_test_scope")


@pytest.mark.parametrize(
    ("registry", "kind", "name", "scope", "other"),
    [
        (root.MODELS, "loss", "IKLLoss", "mmengine", (root.MODELS, "DKLLoss")),
        (host.MODELS, "loss", "KLLoss", "mmpretrain", (root.MODELS, "DKLLoss")),  # there it would hide ours
        (root.HOOKS, "hook", "IKLHook", "mmengine", (root.MODELS, "DKLLoss")),
        (host.MODELS, "model", "DistillationClassifier", "mmpretrain", (host.METRICS, "RobustAccuracy")),
        (host.MODELS, "backbone", "RobustBenchNetwork", "mmpretrain", (host.METRICS, "RobustAccuracy")),
        (host.METRICS, "metric", "ManyMediumFew", "mmpretrain", (host.MODELS, "LogitsClsHead")),
    ],
)
def test_a_name_of_somebody_else_is_refused_and_kept(monkeypatch, registry, kind, name, scope, other):
    class Foreign:
        pass

    monkeypatch.setitem(registry.module_dict, name, Foreign)
    monkeypatch.delitem(other[0].module_dict, other[1])
    with pytest.raises(ValueError, match=rf"the {kind} name '{name}' .*Foreign holds it in {scope}\."):
        adapter.register()
    assert registry.module_dict[name] is Foreign
    assert other[1] not in other[0].module_dict  # nothing was registered


# Each a process of its own: statements, and what its error must say (None where there is none).
IMPORTS = {
    "mmengine alone": (
        "import sys\n"
        "sys.modules['mmpretrain'] = sys.modules['mmcv'] = None\n"
        "from mmengine.config import Config\n"
        "from mmengine.registry import HOOKS, MODELS\n"
        "open('config.py', 'w').write(\"custom_imports = dict(imports=['ikl_plugins.mmengine'])\")\n"
        "Config.fromfile('config.py')\n"
        "assert 'ikl_plugins.mmpretrain' not in sys.modules\n"
        "hook, loss = HOOKS.build(dict(type='IKLHook')), MODELS.build(dict(type='GKLLoss', loss_weight=2.0))\n"
        "import torch\n"
        "from ikl_plugins.mmengine import cpu_ranks\n"
        "assert loss(torch.zeros(2, 3), torch.zeros(2, 3)) > 2 and not cpu_ranks.join()",
        None,
    ),
    "the core needs no host, and a loss of that name is left alone": (
        "import sys, ikl_plugins\n"
        "assert not {'mmengine', 'mmpretrain', 'mmcv'} & set(sys.modules)\n"
        "from mmengine.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class GKLLoss: pass\n"
        "import ikl_plugins.mmpretrain",
        "'GKLLoss' must be free, but __main__.GKLLoss holds it",
    ),
    "robustbench stays out": (
        "import sys, pickle, ikl_plugins.mmpretrain as adapter\n"
        "assert not {'autoattack', 'pyautoattack', 'robustbench', 'timm'} & {n.split('.')[0] for n in sys.modules}\n"
        "assert type(pickle.loads(pickle.dumps(adapter.GKLLoss()))) is adapter.GKLLoss",
        None,
    ),
    "no mmpretrain": (
        "import sys\nsys.modules['mmpretrain'] = None\nimport ikl_plugins.mmpretrain",
        "but `mmpretrain.models` is missing. Run: pip install 'ikl_plugins[mmpretrain]'",
    ),
    "no mmengine": (
        "import sys\nsys.modules['mmengine'] = None\nimport ikl_plugins.mmengine",
        "but `mmengine` is missing. Run: pip install mmengine",
    ),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_imports(case, tmp_path):
    statements, error = IMPORTS[case]
    output = execute("-W", "ignore", "-c", statements, cwd=tmp_path, code=0 if error is None else 1)
    assert error is None or error in output
