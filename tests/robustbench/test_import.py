"""Importing the adapter makes RobustBench usable, and leaves alone what is there already."""

import importlib.machinery
import os
import subprocess
import sys

import pytest

pytest.importorskip("ikl_plugins.robustbench", reason="RobustBench is not installed", exc_type=ImportError)

# Modules that a later release, or the original AutoAttack, would bring.
REAL_AUTOATTACK = """
from pyautoattack import *
import pyautoattack

class AutoAttack:
    real = True
"""
REAL_PARTS = ("autopgd_base", "checks", "fab_base", "fab_projections", "fab_pt", "other_utils", "square", "state")
REAL_PKG_RESOURCES = "real = True\ndef resource_filename(package, name):\n    return 'real'\n"


def run(statement, *folders, code=0):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", statement],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])},
    )
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def real_ones(tmp_path):
    """A folder with modules of the names that RobustBench asks for."""
    package = tmp_path / "autoattack"
    package.mkdir()
    (package / "__init__.py").write_text(REAL_AUTOATTACK)
    for part in REAL_PARTS:
        (package / f"{part}.py").write_text(f"from pyautoattack.{part} import *\nreal = True\n")
    (tmp_path / "pkg_resources.py").write_text(REAL_PKG_RESOURCES)
    return tmp_path


USE = """
import sys, torch
assert not {'robustbench', 'autoattack', 'pyautoattack'} & set(sys.modules)
import ikl_plugins.robustbench
import robustbench
from robustbench.data import _clean_dataset_loaders
from robustbench.eval import AutoAttack
from robustbench.model_zoo.enums import BenchmarkDataset

torch.manual_seed(0)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(48, 10)
    def forward(self, x):
        return self.layer(x.flatten(1))
net = Net().eval()
x = torch.rand(4, 3, 4, 4)
y = net(x).argmax(1)
adversarial = AutoAttack(net, norm='Linf', eps=0.1, version='custom', attacks_to_run=['apgd-ce'],
                         verbose=False).run_standard_evaluation(x, y, bs=2)
assert adversarial.shape == x.shape and (adversarial - x).abs().max() <= 0.1 + 1e-6
assert callable(robustbench.load_model) and callable(robustbench.benchmark)
# Importing again changes nothing, and no other adapter or host was needed.
from ikl_plugins._robustbench_import import import_robustbench
before = list(sys.meta_path), sys.modules['autoattack']
assert import_robustbench() is robustbench
assert before == (list(sys.meta_path), sys.modules['autoattack'])
assert not [name for name in sys.modules if name.startswith(('mmengine', 'mmpretrain', 'torchdistill'))]
assert not [name for name in sys.modules if name.startswith(('ikl_plugins.mmpretrain', 'ikl_plugins.torchdistill'))]
print(sorted(name for name in ('autoattack', 'pkg_resources') if name in sys.modules), AutoAttack.__module__)
"""


def absent(name):
    # Not find_spec of importlib.util: it would find ours, which this process has.
    return importlib.machinery.PathFinder.find_spec(name) is None


def test_as_installed_it_works_and_lends_names_no_longer_than_needed():
    if not absent("autoattack"):
        pytest.skip("the original AutoAttack is installed")
    loaded, module = run(USE).strip().rsplit(" ", 1)
    assert module == "ikl_plugins._autoattack"
    assert "'autoattack'" in loaded
    if absent("pkg_resources"):
        assert "pkg_resources" not in loaded


def test_where_the_real_modules_are_ours_stay_out(real_ones):
    output = run(
        "import sys, ikl_plugins.robustbench, robustbench.eval, robustbench.loaders\n"
        "import autoattack, pkg_resources\n"
        "assert autoattack.AutoAttack.real and robustbench.eval.AutoAttack is autoattack.AutoAttack\n"
        "assert pkg_resources.real and autoattack.state.real\n"
        "print('ikl_plugins._autoattack' in sys.modules)",
        real_ones,
    )
    assert output == "False\n"


@pytest.mark.parametrize(("missing", "named"), [("robustbench", "robustbench"), ("pyautoattack", "autoattack")])
def test_what_is_missing_is_named_with_the_command(missing, named):
    if named == "autoattack" and not absent(named):
        pytest.skip("the original AutoAttack is installed")
    statement = f"import sys\nsys.modules['{missing}'] = None\nimport ikl_plugins.robustbench"
    last = run(statement, code=1).strip().splitlines()[-1]
    assert last == (
        f"ImportError: ikl_plugins.robustbench needs RobustBench and an AutoAttack, but `{named}` is missing. "
        f"Run: pip install 'ikl_plugins[robustbench]'"
    )
