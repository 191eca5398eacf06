"""Importing the adapter makes RobustBench usable, and leaves alone what is there already."""

import hashlib
import importlib
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ikl_plugins.robustbench", reason="RobustBench is not installed", exc_type=ImportError)
from ikl_plugins._robustbench_import import autoattack_facts, import_robustbench

CHECKOUT = os.environ.get("IKL_PLUGINS_ROBUSTBENCH_CHECKOUT")
# Modules that a later release, or the original AutoAttack, would bring.
REAL_AUTOATTACK = """
from pyautoattack import *
import pyautoattack

class AutoAttack:
    real = True
    def run_standard_evaluation(self): ...
"""
REAL_PARTS = (
    "autopgd_base",
    "checks",
    "fab_base",
    "fab_projections",
    "fab_pt",
    "fab_tf",
    "other_utils",
    "square",
    "state",
)
REAL_PKG_RESOURCES = "real = True\ndef resource_filename(package, name):\n    return 'real'\n"


def python(*words, folders=(), code=0, **options):
    """What a Python with these folders on its path prints."""
    path = os.pathsep.join([*map(str, folders), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def run(statement, *folders, code=0):
    return python("-c", statement, folders=folders, code=code)


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
assert __name__ != '__main__' or not {'robustbench', 'autoattack', 'pyautoattack'} & set(sys.modules)
import ikl_plugins.robustbench
import multiprocessing, pickle, robustbench
from robustbench.data import _clean_dataset_loaders
from robustbench.eval import AutoAttack
from robustbench.model_zoo.architectures.wide_resnet import WideResNet
from robustbench.model_zoo.enums import BenchmarkDataset

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(48, 10)
    def forward(self, x):
        return self.layer(x.flatten(1))

def attack():
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.rand(4, 3, 4, 4)
    y = net(x).argmax(1)
    adversarial = AutoAttack(net, norm='Linf', eps=0.1, version='custom', attacks_to_run=['apgd-ce'],
                             verbose=False).run_standard_evaluation(x, y, bs=2)
    assert adversarial.shape == x.shape and (adversarial - x).abs().max() <= 0.1 + 1e-6

def work(queue, model, attack_of_parent, classes):
    import autoattack
    attack()
    assert type(model) is WideResNet and type(attack_of_parent) is AutoAttack is autoattack.AutoAttack
    assert classes[0].__module__ == 'pyautoattack.state' and 'pkg_resources' not in sys.modules
    queue.put('the worker attacks')

if __name__ == '__main__':
    attack()
    assert callable(robustbench.load_model) and callable(robustbench.benchmark)
    # Importing again changes nothing, and no other adapter or host was needed.
    from ikl_plugins._robustbench_import import autoattack_facts, import_robustbench
    before = list(sys.meta_path), sys.modules['autoattack']
    assert import_robustbench() is robustbench
    assert before == (list(sys.meta_path), sys.modules['autoattack'])
    assert not [name for name in sys.modules if name.startswith(('mmengine', 'mmpretrain', 'torchdistill'))]
    assert not [name for name in sys.modules if name.startswith(('ikl_plugins.mmpretrain', 'ikl_plugins.torchdistill'))]
    from autoattack import fab_tf, state
    spawn = multiprocessing.get_context('spawn')
    queue = spawn.Queue()
    sent = WideResNet(10, 10, 1), AutoAttack(Net(), verbose=False), [state.EvaluationState, fab_tf.FABAttack_TF]
    worker = spawn.Process(target=work, args=(queue, *sent))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    print(queue.get())
    print(sorted(name for name in ('autoattack', 'pkg_resources') if name in sys.modules), AutoAttack.__module__,
          autoattack_facts()['module'])
"""


def absent(name):
    # Not find_spec of importlib.util: it would find ours, which this process has.
    return importlib.machinery.PathFinder.find_spec(name) is None


def test_one_import_serves_a_script_and_its_workers_and_lends_names_no_longer_than_needed(tmp_path):
    if not absent("autoattack"):
        pytest.skip("the original AutoAttack is installed")
    script = tmp_path / "script.py"
    script.write_text(USE)
    worker, loaded = python(script).splitlines()
    assert worker == "the worker attacks"
    loaded, *modules = loaded.rsplit(" ", 2)
    assert modules == ["ikl_plugins._autoattack", "pyautoattack"]
    assert "'autoattack'" in loaded
    if absent("pkg_resources"):
        assert "pkg_resources" not in loaded


# --- `ikl robustbench` -----------------------------------------------------------------------------------------------

# What RobustBench does at its import, and no more.
ROBUSTBENCH = {
    "__init__.py": "from . import loaders\nfrom .eval import Model\n",
    "loaders.py": "import pkg_resources\nfile = pkg_resources.resource_filename(__name__, 'files.txt')\n",
    "eval.py": """
import sys
from autoattack import AutoAttack
class Model: pass
if __name__ == '__main__':
    from . import loaders
    print(__name__, sys.argv[1:], loaders.file.rpartition('/')[2], AutoAttack.__module__, end=' ')
    print('pkg_resources' in sys.modules, flush=True)
""",
}
PROGRAM = """
import multiprocessing, subprocess, sys, torch
from autoattack.fab_tf import FABAttack_TF  # before RobustBench
from robustbench.{module} import {name} as Model

def load(items):
    return torch.load('whole.pt', weights_only=False)

def work(model):
    assert type(model) is type(load([])) is Model
    print('worker', FABAttack_TF.__module__, 'pkg_resources' in sys.modules, flush=True)

if __name__ == '__main__':
    torch.save(Model(), 'whole.pt')
    for method in sys.argv[1:]:
        child = multiprocessing.get_context(method).Process(target=work, args=(Model(),))
        child.start()
        child.join()
        loader = torch.utils.data.DataLoader([0], num_workers={workers}, collate_fn=load,
                                             multiprocessing_context=method if {workers} else None)
        assert [type(model) for model in loader] == [Model]
    subprocess.run([sys.executable, '-W', 'ignore', '-m', 'robustbench.eval', '--help'], check=True)
"""
OWN_TESTS = """
import pathlib, torch, unittest
from robustbench.data import _clean_dataset_loaders
from robustbench.model_zoo.architectures.wide_resnet import WideResNet
from robustbench.model_zoo.enums import BenchmarkDataset

for threat_model in ('Linf', 'L2'):
    folder = pathlib.Path('models/cifar10', threat_model)
    folder.mkdir(parents=True)
    torch.save(WideResNet(28, 10).state_dict(), folder / 'Standard.pt')
_clean_dataset_loaders[BenchmarkDataset.cifar_10] = lambda n, *_: (torch.rand(n, 3, 32, 32), torch.zeros(n).long())
unittest.main(module=None)
"""


def made_up_robustbench(folder):
    (folder / "robustbench").mkdir(parents=True)
    for name, text in ROBUSTBENCH.items():
        (folder / "robustbench" / name).write_text(text)
    return folder


def test_where_the_real_modules_are_ours_stay_out(tmp_path, real_ones):
    output = run(
        "import sys\n"
        "from ikl_plugins._robustbench_import import autoattack_facts, import_robustbench\n"
        "robustbench = import_robustbench()\n"
        "import autoattack, autoattack.state, pkg_resources\n"
        "assert autoattack.AutoAttack.real and robustbench.eval.AutoAttack is autoattack.AutoAttack\n"
        "assert pkg_resources.real and autoattack.state.real\n"
        "print('ikl_plugins._autoattack' in sys.modules, autoattack_facts())",
        made_up_robustbench(tmp_path / "site"),
        real_ones,
    )
    facts = {"module": "autoattack", "package": None, "version": f"code {digest(real_ones / 'autoattack')}"}
    assert output == f"False {facts}\n"  # pyautoattack is installed as well, and is not named


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_and_its_children_have_what_robustbench_lacks(tmp_path, real):
    if not absent("autoattack") or not absent("pkg_resources"):
        pytest.skip("the original AutoAttack or pkg_resources is installed")
    program = tmp_path / "program.py"
    methods, folders = (
        (["spawn", "forkserver", "fork"], []) if real else (["spawn"], [made_up_robustbench(tmp_path / "site")])
    )
    model = ("model_zoo.architectures.dm_wide_resnet", "Swish") if real else ("eval", "Model")
    program.write_text(PROGRAM.format(module=model[0], name=model[1], workers=int(real)))
    output = python("-m", "ikl_plugins", "robustbench", program, *methods, folders=folders, cwd=tmp_path)
    *workers, last = output.split("\n", len(methods))
    assert workers == ["worker pyautoattack.fab_tf False"] * len(methods)
    assert last.startswith("usage: eval.py" if real else "__main__ ['--help'] files.txt ikl_plugins._autoattack False")


def test_a_module_is_run_and_what_is_installed_stays_in_charge(tmp_path, real_ones):
    made_up_robustbench(tmp_path)  # a checkout, as the folder is that of the program
    words = ["-m", "ikl_plugins", "robustbench", "-m", "robustbench.eval", "--n_ex=1"]
    output = python(*words, folders=[real_ones], cwd=tmp_path)
    assert output == "__main__ ['--n_ex=1'] real autoattack True\n"


def test_errors_of_the_program_are_its_own(tmp_path):
    assert "error: ikl robustbench: the program must be a file" in python(
        "-m", "ikl_plugins", "robustbench", "none.py", code=1
    )
    program = tmp_path / "program.py"
    program.write_text("raise ValueError('of the program')")
    error = python("-m", "ikl_plugins", "robustbench", program, code=1)
    assert error.startswith("Traceback")
    assert error.endswith("ValueError: of the program\n")


@pytest.mark.skipif(CHECKOUT is None, reason="set IKL_PLUGINS_ROBUSTBENCH_CHECKOUT to a clone of RobustBench")
def test_robustbenchs_own_tests_pass_with_files_in_place_of_downloads(tmp_path):
    """Three of its five; the others need all networks of the zoo."""
    for name in ("robustbench", "tests"):
        shutil.copytree(Path(CHECKOUT, name), tmp_path / name)
    driver = tmp_path / "driver.py"
    driver.write_text(OWN_TESTS)
    python("-m", "ikl_plugins", "robustbench", driver, "tests.test_eval", "tests.test_utils", cwd=tmp_path)


# --- which AutoAttack ------------------------------------------------------------------------------------------------


def digest(folder):
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]


@pytest.mark.parametrize("origin", ["index", "git", "folder", "editable", "shadowed"])
def test_the_autoattack_that_runs_is_named(tmp_path, monkeypatch, origin):
    site, source = tmp_path / "site", tmp_path / "source"
    code = (site if origin in ("index", "git", "folder") else source) / "madeattack"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text("class AutoAttack:\n    def run_standard_evaluation(self): ...\n")
    url = {
        "git": {"url": "https://example.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}},
        "folder": {"url": source.as_uri(), "dir_info": {}},
        "editable": {"url": source.as_uri(), "dir_info": {"editable": True}},
    }
    # Beside it, what all of this lies in is installed, as a checkout with its environment inside is.
    around = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    file = "made.pth" if origin == "editable" else "madeattack/__init__.py"
    for name, record, place in (("made_up_attack", file, url.get(origin)), ("around", "around.pth", around)):
        facts = site / f"{name}-0.1.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (facts / "RECORD").write_text(f"{record},,\n")
        if name == "made_up_attack" and origin == "editable":
            (facts / "top_level.txt").write_text("madeattack\n")
        if place is not None:
            (facts / "direct_url.json").write_text(json.dumps(place))
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(source)
    monkeypatch.setitem(sys.modules, "madeattack", None)  # removed again afterwards
    del sys.modules["madeattack"]
    made = importlib.import_module("madeattack").AutoAttack
    monkeypatch.setattr(import_robustbench().eval, "AutoAttack", type("Derived", (made,), {}))
    package = None if origin == "shadowed" else "made_up_attack"
    version = {"index": "0.1", "git": "0.1, commit 0123456789ab", "shadowed": f"code {digest(code)}"}
    version = version.get(origin, f"0.1, code {digest(code)}")
    assert autoattack_facts() == {"module": "madeattack", "package": package, "version": version}


def test_an_autoattack_of_ones_own_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_attack.py").write_text("class AutoAttack:\n    def run_standard_evaluation(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "own_attack", None)
    del sys.modules["own_attack"]
    own = importlib.import_module("own_attack")
    code = digest(tmp_path)
    (tmp_path / "other.py").write_text("")  # of which it is no part
    monkeypatch.setattr(import_robustbench().eval, "AutoAttack", own.AutoAttack)
    assert autoattack_facts() == {"module": "own_attack", "package": None, "version": f"code {code}"}
    del own.__file__
    assert autoattack_facts()["version"] == "code without a file"


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "named"), [("robustbench", "robustbench"), ("pyautoattack", "autoattack")])
def test_what_is_missing_is_named_with_the_command(tmp_path, missing, named):
    if named == "autoattack" and not absent(named):
        pytest.skip("the original AutoAttack is installed")
    statement = f"import sys\nsys.modules['{missing}'] = None\nimport ikl_plugins.robustbench"
    folders = [made_up_robustbench(tmp_path)] if missing != "robustbench" else []
    last = run(statement, *folders, code=1).strip().splitlines()[-1]
    assert last == (
        f"ImportError: ikl_plugins.robustbench needs RobustBench and an AutoAttack, but `{named}` is missing. "
        f"Run: pip install 'ikl_plugins[robustbench]'"
    )
