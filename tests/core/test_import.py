"""Importing the core loads torch and itself, and nothing of a host library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOSTS = (
    "autoattack",
    "matplotlib",
    "mmcv",
    "mmengine",
    "mmpretrain",
    "pyautoattack",
    "robustbench",
    "sklearn",
    "timm",
    "torchdistill",
    "torchvision",
)
CORE = {
    "_composed",
    "_files",
    "_fused",
    "_limits",
    "_mse_share",
    "_epoch_watch",
    "_validation",
    "_value_checks",
    "_way",
    "class_prior",
    "functional",
    "kernels",
}
CORE |= {"kernels._launch", "losses", "native", "presets"}


def _loaded_by(statement: str, stubs: Path) -> set[str]:
    """Names in ``sys.modules`` of a fresh process after ``statement``, with an importable stub for every host.

    The stubs make the test mean the same on a machine that has none of the hosts: a guarded import of one succeeds.
    """
    for host in HOSTS:
        (stubs / f"{host}.py").write_text("__version__ = '0'\n")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{statement}\nprint('loaded:', *sys.modules)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(stubs), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.rsplit("loaded:", 1)[1].split()
    assert "torch" in names
    return set(names)


def _hosts(names: set[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names} & set(HOSTS))


def test_importing_the_core_loads_no_host(tmp_path: Path) -> None:
    names = _loaded_by("import ikl_plugins; ikl_plugins.IKLLoss()", tmp_path)
    assert _hosts(names) == []
    assert {name.split(".", 1)[1] for name in names if name.startswith("ikl_plugins.")} == CORE


@pytest.mark.parametrize(
    ("statement", "host"),
    [
        ("import ikl_plugins, mmengine; ikl_plugins.IKLLoss", "mmengine"),
        (
            "import ikl_plugins\nikl_plugins.IKLLoss\ntry: import robustbench.eval\nexcept ImportError: pass",
            "robustbench",
        ),
    ],
)
def test_the_check_notices_a_host(tmp_path: Path, statement: str, host: str) -> None:
    assert _hosts(_loaded_by(statement, tmp_path)) == [host]


def test_the_public_names_are_the_documented_ones() -> None:
    import ikl_plugins

    assert sorted(ikl_plugins.__all__) == [
        "ClassPrior",
        "DKLLoss",
        "GKLLoss",
        "IKLLoss",
        "LossTerms",
        "dkl_loss",
        "gkl_loss",
        "ikl_loss",
        "read_value_checks",
    ]
    assert all(getattr(ikl_plugins, name).__doc__ for name in ikl_plugins.__all__)
    assert ikl_plugins.__version__
