"""`ikl doctor` on made-up environments: each trap where it applies and where not, each host broken and whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ikl_plugins
from ikl_plugins.commands import doctor
from ikl_plugins.commands.doctor import Facts, diagnose, probe

# A machine on which nothing is wrong: upstream's hosts, a GPU, NumPy 1, an old setuptools, a real autoattack.
HEALTHY = Facts(
    python="3.11.7",
    versions={
        "ikl_plugins": "0.1.0",
        "torch": "2.5.1",
        "torchvision": "0.20.1",
        "numpy": "1.26.4",
        "torchdistill": "1.1.5",
        "setuptools": "81.0.0",
        "timm": "1.0.9",
    },
    modules={"pkg_resources": True, "autoattack": False, "pyautoattack": False, "ikl_plugins.robustbench": False},
    torch="2.5.1+cu124",
    cuda="12.4",
    gpus=("NVIDIA H100",),
    gpu_driver=True,
)
UP = {"mmengine": "0.10.7", "mmpretrain": "1.2.0", "mmcv": "2.2.0"}
FORK = {"onedl-mmengine": "0.10.12", "onedl-mmpretrain": "1.3.6", "onedl-mmcv": "2.3.6"}


def facts(base=HEALTHY, *, versions=None, modules=None, **changes):
    """The healthy machine with changes; a version of None takes a distribution out."""
    merged = {**base.versions, **(versions or {})}
    if "torch" in changes and changes["torch"] is not None:
        merged["torch"] = changes["torch"]
        merged["torchvision"] = f"0.{int(changes['torch'].split('.')[1]) + 15}.0"
        merged.update({name: version for name, version in (versions or {}).items() if name in ("torch", "torchvision")})
    merged = {name: version for name, version in merged.items() if version is not None}
    return base._replace(versions=merged, modules={**base.modules, **(modules or {})}, **changes)


BENCH = {"robustbench": "1.1.1"}
CPU = {"torch": "2.5.1+cpu", "cuda": None, "gpus": ()}
AUTOATTACK = {"modules": {"autoattack": True}}
NO_PKG = {"versions": {**BENCH, "setuptools": "82.0.0"}, "modules": {"pkg_resources": False, "autoattack": True}}
MM = {"versions": UP, "torch": "2.6.0", "safe_globals": True}
MIXED = {**UP, "onedl-mmengine": "0.10.12"}
BOTH = "mmengine mmpretrain mmcv mmcv-lite onedl-mmengine onedl-mmpretrain onedl-mmcv"
OLD_DISTILL, OLD_VISION = {"versions": {"torchdistill": "1.1.4"}}, {"versions": {"torchvision": "0.19.1"}}
LITE, TWICE = ({"versions": {**UP, "mmcv": held, "mmcv-lite": "2.2.0"}} for held in (None, "2.2.0"))
NUMPY = {"versions": {**UP, "numpy": "2.4.6"}}
NO_ENGINE, NO_MMCV = ({**MM, "versions": {**UP, name: None}} for name in ("mmengine", "mmcv"))
# Name of the trap, an environment in which it applies, whether it breaks something, whom it concerns, what the cure
# has; and an environment, as near as can be, in which it does not apply.
CASES = [
    ("python", {"python": "3.9.18"}, True, "core", "python3.11 -m venv", {"python": "3.10.0"}),
    ("torch", {"torch": None}, True, "core", "--force-reinstall torch torchvision", {}),
    ("torch version", {"torch": "2.3.1"}, True, "core", "'torch>=2.4' torchvision", {"torch": "2.4.0"}),
    ("torchvision", OLD_VISION, True, "mmpretrain", "'torchvision==0.20.*' 'torch==2.5.*'", {}),
    ("torch build", CPU, False, "core", "--index-url https://", {**CPU, "gpu_driver": False}),
    ("no GPU", {"gpus": (), "gpu_driver": False}, False, "core", "-m ikl_plugins train CONFIG --device cpu", {}),
    ("two stacks", {**MM, "versions": MIXED}, True, "mmpretrain", f"uninstall --yes {BOTH} &&", MM),
    ("mmengine missing", NO_ENGINE, True, "mmpretrain", "'mmengine>=0.10.7'", MM),
    ("mmcv missing", NO_MMCV, True, "mmpretrain", "'mmcv-lite>=2.2.0'", MM),
    ("mmcv twice", TWICE, True, "mmpretrain", "uninstall --yes mmcv mmcv-lite &&", MM),
    ("mmcv-lite", LITE, False, "mmpretrain", "install mmcv ", MM),
    ("fork", {"versions": FORK}, False, "mmpretrain", "none; for the other stack", MM),
    ("weights_only", {**MM, "safe_globals": False}, False, "mmpretrain", "custom_imports", {**MM, "torch": "2.5.1"}),
    ("numpy 2", NUMPY, False, "mmpretrain", "'numpy<2'", {"versions": {**FORK, "numpy": "2.4.6"}}),
    ("torchdistill version", OLD_DISTILL, True, "torchdistill", "'torchdistill>=1.1.5'", {}),
    ("setuptools", NO_PKG, True, "robustbench", "'setuptools<82'", {"versions": BENCH, **AUTOATTACK}),
    ("autoattack", {"versions": BENCH}, True, "robustbench", "'pyautoattack>=0.2", {"versions": BENCH, **AUTOATTACK}),
    ("tests", {"versions": BENCH, **AUTOATTACK}, False, "robustbench", "--import-mode=importlib", {}),
]
STANDS_IN = {"versions": BENCH, "modules": {"pkg_resources": False, "ikl_plugins.robustbench": True}}
MM_PKG = {"versions": UP, "modules": {"pkg_resources": False}}
PYAUTOATTACK = {"versions": BENCH, "modules": {"pyautoattack": True}}
BEHIND_US = {"versions": BENCH, "modules": {"pyautoattack": True, "ikl_plugins.robustbench": True}}
FORK_TORCH = {"versions": FORK, "torch": "2.14.1", "safe_globals": True}
NO_FORK_ENGINE, NO_FORK_MMCV = (
    {"versions": {**FORK, f"onedl-{name}": None}, "torch": "2.6.0"} for name in ("mmengine", "mmcv")
)
CASES += [
    ("torch", {"torch": None, "versions": {"torch": None}}, True, "core", "torch", {}),
    ("torch version", {"versions": UP, "torch": "2.5.1"}, True, "mmpretrain", "'torch>=2.6'", MM),
    ("torch build", {"gpus": ()}, False, "core", "CUDA_VISIBLE_DEVICES", {}),
    ("no GPU", {"versions": UP, "gpus": (), "gpu_driver": False}, False, "core", "AutocastOptimWrapper", {}),
    ("mmengine missing", NO_FORK_ENGINE, True, "mmpretrain", "install 'onedl-mmengine>=", MM),
    ("mmcv missing", NO_FORK_MMCV, True, "mmpretrain", "install 'onedl-mmcv>=", MM),
    ("weights_only", {**MM, "safe_globals": False}, False, "mmpretrain", "custom_imports", FORK_TORCH),
    ("setuptools", STANDS_IN, False, "robustbench", "'setuptools<82'", {"modules": {"pkg_resources": False}}),
    ("setuptools", MM_PKG, False, "mmpretrain", "'setuptools<82'", {"modules": {"pkg_resources": False}}),
    ("autoattack", PYAUTOATTACK, True, "robustbench", "git+https://github.com/fra31/auto-attack", {}),
    ("autoattack", BEHIND_US, False, "robustbench", "", {}),
]
FIELDS = ("name", "present", "breaks", "host", "cure", "absent")


def test_nothing_is_wrong_with_a_healthy_machine():
    assert diagnose(HEALTHY) == []


def named(name, environment):
    return [trap for trap in diagnose(environment) if trap.name == name]


@pytest.mark.parametrize(FIELDS, CASES, ids=[case[0] for case in CASES])
def test_a_trap_applies_where_it_should_and_not_beside(name, present, breaks, host, cure, absent):
    (trap,) = named(name, facts(**present))
    assert trap.breaks == breaks
    assert host in trap.hosts
    assert cure in trap.cure
    assert trap.detail.endswith(".")
    assert named(name, facts(**absent)) == []


def test_there_is_a_case_for_every_trap():
    assert set(re.findall(r'Trap\(\s*"([^"]+)"', Path(doctor.__file__).read_text())) == {case[0] for case in CASES}


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_a_host_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda program: pytest.fail("it must not be tried"))
    host = probe("mmpretrain", HEALTHY)
    assert (host.installed, host.works, host.detail) == (False, False, "not installed")
    assert host.cure == "python -m pip install 'ikl_plugins[mmpretrain]'"


def test_the_fork_is_mmpretrain_as_well(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda program: (True, "all of it"))
    assert probe("mmpretrain", facts(versions=FORK)) == ("mmpretrain", True, True, "all of it", "")


@pytest.mark.parametrize(
    ("detail", "cure"),
    [
        ("ModuleNotFoundError: No module named 'pkg_resources'", "'setuptools<82'"),
        ("ModuleNotFoundError: No module named 'autoattack'", "git+https://github.com/fra31/auto-attack"),
        ("ModuleNotFoundError: No module named 'mmcv.ops'", "'mmcv-lite>=2.2.0'"),
        ("ModuleNotFoundError: No module named 'ikl_plugins'", "--force-reinstall WHEEL"),
        ("ModuleNotFoundError: No module named 'einops'", "'ikl_plugins[robustbench]'"),
        ("AssertionError: MMCV==1.7.0 is used but incompatible.", "'ikl_plugins[robustbench]'"),
    ],
)
def test_the_cure_of_a_broken_host_follows_from_its_error(monkeypatch, detail, cure):
    monkeypatch.setattr(doctor, "_run", lambda program: (False, detail))
    host = probe("robustbench", facts(versions=BENCH))
    assert (host.installed, host.works, host.detail) == (True, False, detail)
    assert host.cure.startswith(f"python -m pip install {cure}")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('worked: yes'); import sys; sys.stderr.write('a warning\\n')", (True, "yes")),
        ("print('worked: yes'); raise SystemExit(3)", (False, "the process ended with code 3 and said nothing")),
        ("print('nothing')", (False, "the process ended with code 0 and said nothing")),
        ("import os; os.abort()", (False, "the process ended with code -6 and said nothing")),
        ("raise ImportError('first\\n\\nand a long explanation')", (False, "ImportError: first")),
        ("import no.such.thing", (False, "ModuleNotFoundError: No module named 'no'")),
    ],
)
def test_what_a_probe_says(program, expected):
    assert doctor._run(program) == expected


def test_a_probe_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "_TIME_LIMIT", 0.2)
    assert doctor._run("import time; time.sleep(60)") == (False, "no answer within 0.2 seconds")


@pytest.mark.parametrize("name", ["core", "torchdistill", "mmpretrain"])
def test_what_is_installed_here_works(name, capsys):
    if name != "core":
        pytest.importorskip(name)
    exec(doctor.PROBES[name], {})  # noqa: S102  # in this process, which has the hosts already
    assert "worked: " in capsys.readouterr().out


# --- the command, in environments of stubs ---------------------------------------------------------------------------

STUB_TORCH = """
__version__ = "2.5.1+cpu"
class version: cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
"""


@pytest.fixture
def environment(tmp_path):
    """Runs the command where only stubs can be imported: no site-packages, and modules that a test writes."""
    site = tmp_path / "site"
    # -S leaves out site-packages; the command's own probes get it by a wrapper that stands for the interpreter.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    script = f"import sys; sys.executable = {str(python)!r}; from ikl_plugins.commands.main import main; main()"

    def run(*arguments, modules=None, distributions=None):
        for name, text in {"torch": STUB_TORCH, **(modules or {})}.items():
            path = site / name / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name, version in {"torch": "2.5.1", **(distributions or {})}.items():
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        folders = os.pathsep.join([str(site), str(Path(ikl_plugins.__file__).parent.parent)])
        return subprocess.run(
            [sys.executable, "-S", "-c", script, "doctor", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": folders, "PATH": os.defpath},
        )

    return run


def test_a_torch_that_does_not_work(environment):
    done = environment("--json", modules={"torch": "raise ImportError('a broken build')"})
    content = json.loads(done.stdout)
    assert done.returncode == 1
    assert content["works"] is False
    core = content["hosts"][0]
    assert (core["name"], core["works"], core["detail"]) == ("core", False, "ImportError: a broken build")
    assert "does not work here: ikl_plugins itself. Run: python -m pip install" in done.stderr
    assert (content["facts"]["torch"], content["facts"]["versions"]["torch"]) == (None, "2.5.1")
    assert [trap["name"] for trap in content["traps"]] == ["torch"]
    assert all(host["detail"] == "not installed" for host in content["hosts"][1:])


def test_the_report_of_a_broken_environment(environment):
    versions = {"mmpretrain": "1.2.0", "mmengine": "0.10.7", "robustbench": "1.1.1", "setuptools": "82.0.0"}
    modules = {"mmpretrain": "import mmcv", "mmengine": "", "robustbench": ""}
    done = environment("--for", "mmpretrain, robustbench", modules=modules, distributions=versions)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith("  mmpretrain        BROKEN  ") and line.endswith("(asked for)") for line in lines)
    assert any(line.startswith("  torchdistill      absent  not installed") for line in lines)
    for name in ("mmcv missing", "setuptools", "autoattack", "torch version"):
        present = any(line.startswith((f"  ! {name}: ", f"  - {name}: ")) for line in lines)
        assert present, name
    assert "does not work here: mmpretrain, robustbench" in done.stderr.replace("ikl_plugins itself, ", "")


@pytest.fixture
def here(monkeypatch):
    """Sets what the command finds out, and that all works that is tried."""
    monkeypatch.setattr(doctor, "_run", lambda program: (True, "it runs"))
    return lambda environment: monkeypatch.setattr(doctor, "gather", lambda: environment)


def test_a_host_that_is_absent_fails_only_if_it_is_asked_for(here, ikl):
    here(HEALTHY)
    done = ikl("doctor")
    assert done.status is None
    assert ikl("doctor", "--for", "torchdistill").status is None
    status = ikl("doctor", "--for", "torchdistill,mmpretrain").status
    assert "does not work here: mmpretrain. Run: python -m pip install 'ikl_plugins[mmpretrain]'" in status


def test_json_is_the_whole_of_it(here, ikl):
    here(facts(versions=UP, torch="2.6.0", safe_globals=False))
    content = json.loads(ikl("doctor", "--json", "--for", "mmpretrain").out)
    assert content["works"] is True
    assert [host["name"] for host in content["hosts"]] == ["core", "torchdistill", "mmpretrain", "robustbench"]
    assert [trap["name"] for trap in content["traps"]] == ["weights_only"]
    assert content["facts"]["gpus"] == ["NVIDIA H100"]


def test_an_unknown_host_is_refused(ikl):
    assert (
        "--for must be among torchdistill, mmpretrain, robustbench, got 'mmdet'"
        in ikl("doctor", "--for", "mmdet").status
    )


@pytest.mark.parametrize(
    ("changes", "named", "lines"),
    [
        (
            {"kernels": [""], "operator": True},
            "",
            ["agree with the composed losses", "native on a CPU, triton on CUDA"],
        ),
        (
            {"kernels": ["Triton is not there"], "operator": False},
            "",
            ["not used: Triton is", "walk on .*, walk on CUDA"],
        ),
        (
            {"kernels": [], "gpus": (), "operator": True, "operator_refused": "others can write to /x"},
            "",
            [
                "not used: there is no CUDA device",
                "walk on a CPU$",
                "not loaded: others can write to /x; .*`ikl build`",
            ],
        ),
        ({"kernels": [], "gpus": ()}, "", ["not used: there is no CUDA device", "walk on a CPU$"]),
        ({"kernels": [""]}, "walk", ["agree with", "walk where it can serve, as IKL_PLUGINS_KERNEL says"]),
    ],
)
def test_the_report_says_which_way_the_losses_go(monkeypatch, changes, named, lines):
    monkeypatch.setenv("IKL_PLUGINS_KERNEL", named)
    said = doctor._report(facts(**changes), [], [], [])
    for name, text in zip(("Triton kernels", "losses go by", "C++ operator"), lines, strict=False):
        name = re.escape(name)
        assert re.search(rf"^  {name} +{text}", said, re.MULTILINE), said
