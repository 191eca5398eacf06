"""tools/doctor.py on made-up environments: each trap where it applies and where it does not, each host broken "
"and whole."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ikl_plugins.commands import doctor
import pytest
from ikl_plugins.commands.doctor import Facts, Trap, diagnose, probe

TOOL = Path(doctor.__file__)
ROOT = TOOL.parent.parent

# A machine on which nothing is wrong: upstream's hosts, a GPU, NumPy 1, an old setuptools, a real autoattack.
HEALTHY = Facts(
    python="3.11.7",
    versions={
        "ikl_plugins": "0.1.0", "torch": "2.5.1", "torchvision": "0.20.1", "numpy": "1.26.4", "torchdistill": "1.1.5",
        "setuptools": "81.0.0", "timm": "1.0.9",
    },
    modules={"pkg_resources": True, "autoattack": False, "pyautoattack": False, "ikl_plugins.robustbench": False},
    torch="2.5.1+cu124", cuda="12.4", gpus=("NVIDIA H100",), gpu_driver=True,
)  # fmt: skip
UP = {"mmengine": "0.10.7", "mmpretrain": "1.2.0", "mmcv": "2.2.0"}
FORK = {"onedl-mmengine": "0.10.12", "onedl-mmpretrain": "1.3.6", "onedl-mmcv": "2.3.6"}
NEW_TORCH = {"torch": "2.14.1+cu130"}


def facts(base=HEALTHY, *, versions=None, modules=None, **changes):
    """The healthy machine with changes; a version of None takes a distribution out."""
    merged = {**base.versions, **(versions or {})}
    if "torch" in changes and changes["torch"] is not None:
        merged["torch"] = changes["torch"]
        merged["torchvision"] = f"0.{int(changes['torch'].split('.')[1]) + 15}.0"
        merged.update({name: version for name, version in (versions or {}).items() if name in ("torch", "torchvision")})
    merged = {name: version for name, version in merged.items() if version is not None}
    return dataclasses.replace(base, versions=merged, modules={**base.modules, **(modules or {})}, **changes)


def test_nothing_is_wrong_with_a_healthy_machine():
    assert diagnose(HEALTHY) == []


BENCH = {"robustbench": "1.1.1"}
# Trap: an environment in which it applies, whether it breaks something, whom it concerns, what the cure has; and one,
# as near as can be, in which it does not apply.
CASES = {
    "python": (facts(python="3.9.18"), True, "core", "python3.11 -m venv", facts(python="3.10.0")),
    "torch": (
        facts(torch=None), True, "core", "--force-reinstall torch torchvision", facts(),
    ),
    "torch version": (
        facts(torch="2.3.1"), True, "core", "'torch>=2.4' torchvision", facts(torch="2.4.0"),
    ),
    "torchvision": (
        facts(versions={"torchvision": "0.19.1"}), True, "mmpretrain", "'torchvision==0.20.*' 'torch==2.5.*'", facts(),
    ),
    "torch build": (
        facts(torch="2.5.1+cpu", cuda=None, gpus=()), False, "core", "--index-url https://download.pytorch.org/whl/",
        facts(torch="2.5.1+cpu", cuda=None, gpus=(), gpu_driver=False),
    ),
    "no GPU": (
        facts(gpus=(), gpu_driver=False), False, "core", "tools/train_torchdistill.py CONFIG --device cpu", facts(),
    ),
    "two stacks": (
        facts(versions={**UP, "onedl-mmengine": "0.10.12"}, torch="2.6.0", safe_globals=True), True, "mmpretrain",
        "uninstall --yes mmengine mmpretrain mmcv mmcv-lite onedl-mmengine onedl-mmpretrain onedl-mmcv && "
        "python -m pip "
        "install 'ikl_plugins[mmpretrain]'",
        facts(versions=UP, torch="2.6.0", safe_globals=True),
    ),
    "mmengine missing": (
        facts(versions={"mmpretrain": "1.2.0", "mmcv": "2.2.0"}, torch="2.6.0"), True, "mmpretrain",
        "install 'mmengine>=0.10.7'", facts(versions=UP, torch="2.6.0", safe_globals=True),
    ),
    "mmcv missing": (
        facts(versions={**UP, "mmcv": None}, torch="2.6.0", safe_globals=True), True, "mmpretrain",
        "install 'mmcv-lite>=2.2.0'", facts(versions=UP, torch="2.6.0", safe_globals=True),
    ),
    "mmcv twice": (
        facts(versions={**UP, "mmcv-lite": "2.2.0"}), True, "mmpretrain",
        "uninstall --yes mmcv mmcv-lite && python -m pip install 'mmcv-lite>=2.2.0'", facts(versions=UP),
    ),
    "mmcv-lite": (
        facts(versions={**UP, "mmcv": None, "mmcv-lite": "2.2.0"}), False, "mmpretrain", "install mmcv ",
        facts(versions=UP),
    ),
    "fork": (facts(versions=FORK), False, "mmpretrain", "none; for the other stack", facts(versions=UP)),
    "weights_only": (
        facts(versions=UP, torch="2.6.0", safe_globals=False), False, "mmpretrain",
        "custom_imports = dict(imports=['ikl_plugins.mmpretrain'])",
        facts(versions=UP, torch="2.5.1", safe_globals=False),
    ),
    "numpy 2": (
        facts(versions={**UP, "numpy": "2.4.6"}), False, "mmpretrain", "install 'numpy<2'",
        facts(versions={**FORK, "numpy": "2.4.6"}),
    ),
    "torchdistill version": (
        facts(versions={"torchdistill": "1.1.4"}), True, "torchdistill", "install 'torchdistill>=1.1.5'", facts(),
    ),
    "setuptools": (
        facts(versions={**BENCH, "setuptools": "82.0.0"}, modules={"pkg_resources": False, "autoattack": True}), True,
        "robustbench", "install 'setuptools<82'", facts(versions=BENCH, modules={"autoattack": True}),
    ),
    "autoattack": (
        facts(versions=BENCH), True, "robustbench", "install 'pyautoattack>=0.2.0'",
        facts(versions=BENCH, modules={"autoattack": True}),
    ),
    "tests": (
        facts(versions=BENCH, modules={"autoattack": True}), False, "robustbench", "--import-mode=importlib", facts(),
    ),
}  # fmt: skip


def named(name, found):
    return [trap for trap in found if trap.name == name]


@pytest.mark.parametrize("name", CASES)
def test_a_trap_where_it_applies(name):
    present, breaks, host, cure, _ = CASES[name]
    (trap,) = named(name, diagnose(present))
    assert trap.breaks == breaks
    assert host in trap.hosts
    assert cure in trap.cure
    assert trap.detail.endswith(".")


@pytest.mark.parametrize("name", CASES)
def test_a_trap_where_it_does_not_apply(name):
    assert named(name, diagnose(CASES[name][4])) == []


def test_there_is_a_case_for_every_trap():
    assert len(doctor.TRAPS) == 16
    assert set(re.findall(r'Trap\(\s*"([^"]+)"', TOOL.read_text())) == set(CASES)


def test_traps_that_break_something_come_first():
    found = diagnose(facts(versions={**UP, "onedl-mmcv": "2.3.6", "numpy": "2.0.0"}, gpus=(), torch="2.6.0"))
    assert [(trap.name, trap.breaks) for trap in found] == [
        ("two stacks", True), ("torch build", False), ("numpy 2", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "detail"),
    [
        (facts(versions={"torch": None}, torch=None), "torch is not installed."),
        (facts(torch=None), "torch 2.5.1 cannot be imported."),
    ],
)
def test_a_missing_torch_and_a_broken_one(environment, detail):
    (trap,) = named("torch", diagnose(environment))
    assert trap.detail == detail
    assert ("--force-reinstall" in trap.cure) == ("cannot" in detail)
    assert {found.name for found in diagnose(environment)} == {"torch"}  # nothing is said of builds and GPUs


def test_mmpretrain_needs_a_newer_torch_than_the_rest():
    (trap,) = named("torch version", diagnose(facts(versions=UP, torch="2.5.1")))
    assert trap.hosts == ("mmpretrain",)
    assert "'torch>=2.6'" in trap.cure
    assert named("torch version", diagnose(facts(versions=UP, torch="2.6.0"))) == []


def test_a_gpu_that_torch_does_not_find():
    (trap,) = named("torch build", diagnose(facts(gpus=())))
    assert "built for 12.4, but finds no GPU" in trap.detail
    assert "CUDA_VISIBLE_DEVICES" in trap.cure


def test_what_no_gpu_means_for_each_host():
    alone = facts(versions={"torchdistill": None}, gpus=(), gpu_driver=False)
    (trap,) = named("no GPU", diagnose(alone))
    assert trap.cure == "--device cpu"
    (trap,) = named("no GPU", diagnose(facts(alone, versions=UP)))
    assert "AutocastOptimWrapper" in trap.cure
    assert "ikl_plugins.mmpretrain.cpu_ranks" in trap.cure


def test_setuptools_where_our_adapter_stands_in():
    environment = facts(
        versions={**BENCH, **UP}, modules={"pkg_resources": False, "ikl_plugins.robustbench": True, "autoattack": True}
    )
    (trap,) = named("setuptools", diagnose(environment))
    assert not trap.breaks
    assert "`import ikl_plugins.robustbench` first stands in for it" in trap.detail
    assert "MMEngine needs it for configs named 'mmpretrain::...'" in trap.detail
    assert trap.hosts == ("robustbench", "mmpretrain")
    (trap,) = named("setuptools", diagnose(facts(versions=UP, modules={"pkg_resources": False})))
    assert (trap.breaks, trap.hosts) == (False, ("mmpretrain",))
    assert named("setuptools", diagnose(facts(modules={"pkg_resources": False}))) == []


def test_autoattack_with_pyautoattack_alone():
    environment = facts(versions=BENCH, modules={"pyautoattack": True})
    (trap,) = named("autoattack", diagnose(environment))
    assert (trap.breaks, trap.cure) == (True, "python -m pip install git+https://github.com/fra31/auto-attack")
    (trap,) = named("autoattack", diagnose(facts(environment, modules={"ikl_plugins.robustbench": True})))
    assert not trap.breaks
    assert "behind `import ikl_plugins.robustbench`" in trap.detail


@pytest.mark.parametrize("missing", ["onedl-mmengine", "onedl-mmcv"])
def test_a_fork_that_is_not_whole_is_completed_from_the_fork(missing):
    found = diagnose(facts(versions={**FORK, missing: None}, torch="2.6.0"))
    name = missing.removeprefix("onedl-")
    (trap,) = named(f"{name} missing", found)
    assert f"install '{missing}>=" in trap.cure


def test_the_fork_reads_checkpoints_itself():
    assert named("weights_only", diagnose(facts(versions=FORK, torch="2.14.1", safe_globals=True))) == []


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_a_host_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda program: pytest.fail("it must not be tried"))
    host = probe("mmpretrain", HEALTHY)
    assert (host.installed, host.works, host.detail) == (False, False, "not installed")
    assert host.cure == "python -m pip install 'ikl_plugins[mmpretrain]'"


def test_the_fork_is_mmpretrain_as_well(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda program: (True, "all of it"))
    host = probe("mmpretrain", facts(versions=FORK))
    assert (host.installed, host.works, host.detail, host.cure) == (True, True, "all of it", "")


@pytest.mark.parametrize(
    ("detail", "cure"),
    [
        ("ModuleNotFoundError: No module named 'pkg_resources'", "python -m pip install 'setuptools<82'"),
        (
            "ModuleNotFoundError: No module named 'autoattack'",
            "python -m pip install git+https://github.com/fra31/auto-attack",
        ),
        ("ModuleNotFoundError: No module named 'mmcv.ops'", "python -m pip install 'mmcv-lite>=2.2.0'"),
        ("ModuleNotFoundError: No module named 'ikl_plugins'", "python -m pip install --editable ."),
        ("ModuleNotFoundError: No module named 'einops'", "python -m pip install 'ikl_plugins[robustbench]'"),
        ("AssertionError: MMCV==1.7.0 is used but incompatible.", "python -m pip install 'ikl_plugins[robustbench]'"),
    ],
)
def test_the_cure_of_a_broken_host_follows_from_its_error(monkeypatch, detail, cure):
    monkeypatch.setattr(doctor, "_run", lambda program: (False, detail))
    host = probe("robustbench", facts(versions=BENCH))
    assert (host.installed, host.works, host.detail, host.cure) == (True, False, detail, cure)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('worked: yes')", (True, "yes")),
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
def test_what_is_installed_here_works(name):
    pytest.importorskip("torch" if name == "core" else name)
    versions = {"torchdistill": "1.1.5", "mmpretrain": "1.2.0"}
    host = probe(name, facts(versions=versions))
    assert host.works, host.detail
    assert host.cure == ""


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
    """Runs the tool where only stubs can be imported: no site-packages, and modules that a test writes."""
    site = tmp_path / "site"

    def run(*arguments, modules=None, distributions=None):
        for name, text in {"torch": STUB_TORCH, **(modules or {})}.items():
            path = site / Path(*name.split(".")) / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name, version in {"torch": "2.5.1", **(distributions or {})}.items():
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        # -S leaves out site-packages; the tool's own probes get it by a wrapper that stands for the interpreter.
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
        return subprocess.run(
            [sys.executable, "-S", "-c", f"import sys, runpy; sys.executable = {str(python)!r}; sys.argv[0] = "
            f"'doctor.py'; "
             f"runpy.run_path({str(TOOL)!r}, run_name='__main__')", *arguments],
            capture_output=True, text=True, cwd=tmp_path,
            env={"PYTHONPATH": str(site), "PATH": os.defpath},
        )  # fmt: skip

    return run


WORKS = {
    "ikl_plugins": "", "ikl_plugins.torchdistill": "", "ikl_plugins.mmpretrain": "",
}  # fmt: skip


def test_the_core_that_does_not_work(environment):
    done = environment("--json", modules={"ikl_plugins": "raise ImportError('a broken build')"})
    content = json.loads(done.stdout)
    assert done.returncode == 1
    assert content["works"] is False
    core = content["hosts"][0]
    assert (core["name"], core["works"], core["detail"]) == ("core", False, "ImportError: a broken build")
    assert "does not work here: ikl_plugins itself. Run: python -m pip install --editable ." in done.stderr
    assert content["facts"]["torch"] == "2.5.1+cpu"
    assert content["facts"]["versions"]["torch"] == "2.5.1"
    assert all(host["detail"] == "not installed" for host in content["hosts"][1:])


def test_the_report_of_a_broken_environment(environment):
    done = environment(
        "--for", "mmpretrain, robustbench",
        modules={"mmpretrain": "import mmcv", "mmengine": "", "robustbench": ""},
        distributions={"mmpretrain": "1.2.0", "mmengine": "0.10.7", "robustbench": "1.1.1", "setuptools": "82.0.0"},
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "  mmpretrain        1.2.0" in lines
    assert "  torch             2.5.1+cpu" in lines
    assert "  GPU               none (torch is a CPU build)" in lines
    assert any(line.startswith("  mmpretrain        BROKEN  ") and line.endswith("(asked for)") for line in lines)
    assert any(line.startswith("  torchdistill      absent  not installed") for line in lines)
    for name in ("mmcv missing", "setuptools", "autoattack", "torch version"):
        assert any(line.startswith(f"  ! {name}: ") for line in lines), name
    assert "mmpretrain, robustbench" in done.stderr
    assert done.stderr.startswith("error: doctor: does not work here: ")


def test_two_stacks_are_found_by_their_distributions(environment):
    done = environment(
        "--json", distributions={"mmengine": "0.10.7", "onedl-mmengine": "0.10.12", "mmpretrain": "1.2.0"}
    )
    assert "two stacks" in [trap["name"] for trap in json.loads(done.stdout)["traps"]]


def test_pkg_resources_is_looked_for_not_assumed(environment):
    distributions = {"robustbench": "1.1.1", "setuptools": "82.0.0"}
    done = environment("--json", modules={"robustbench": "", "pkg_resources": ""}, distributions=distributions)
    assert "setuptools" not in [trap["name"] for trap in json.loads(done.stdout)["traps"]]


def test_a_host_that_is_absent_fails_only_if_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: HEALTHY)
    monkeypatch.setattr(doctor, "_run", lambda program: (True, "it runs"))
    doctor.main([])
    out = capsys.readouterr().out
    assert "  torchdistill      works   it runs\n" in out
    assert "  mmpretrain        absent  not installed\n" in out
    assert out.endswith("Traps: none applies\n")
    doctor.main(["--for", "torchdistill"])
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--for", "torchdistill,mmpretrain"])
    assert stop.value.code == (
        "error: doctor: does not work here: mmpretrain. Run: python -m pip install 'ikl_plugins[mmpretrain]'"
    )


def test_traps_of_hosts_that_nobody_has_are_not_mentioned(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: facts(versions=BENCH, modules={"autoattack": True}))
    monkeypatch.setattr(doctor, "_run", lambda program: (True, "it runs"))
    monkeypatch.setattr(doctor, "diagnose", lambda facts: [Trap("a", ("mmpretrain",), True, "Detail.", "cure")])
    doctor.main([])
    assert "Traps: none applies" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["--for", "mmpretrain"])
    assert "  ! a: Detail.\n      cure\n" in capsys.readouterr().out


def test_json_is_the_whole_of_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: facts(versions=UP, torch="2.6.0", safe_globals=False))
    monkeypatch.setattr(doctor, "_run", lambda program: (True, "it runs"))
    doctor.main(["--json", "--for", "mmpretrain"])
    content = json.loads(capsys.readouterr().out)
    assert content["works"] is True
    assert [host["name"] for host in content["hosts"]] == ["core", "torchdistill", "mmpretrain", "robustbench"]
    assert [trap["name"] for trap in content["traps"]] == ["weights_only"]
    assert content["facts"]["gpus"] == ["NVIDIA H100"]


def test_an_unknown_host_is_refused():
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--for", "mmdet"])
    assert stop.value.code == (
        "error: doctor: --for must be among torchdistill, mmpretrain, robustbench, got 'mmdet'. Separate them "
        "by commas."
    )
