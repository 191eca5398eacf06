"""The package as `pip install` leaves it, run from an empty directory: every command, one config of each host.

The new environments see the libraries of the one that runs the tests, and no line of the checkout: the wheel and the
sdist are built from a copy of it, which is deleted before they are used.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.installed

ROOT = Path(__file__).resolve().parents[2]


def pip(*words: object, python: Path | str = sys.executable) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "--quiet", *map(str, words)], check=True)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of the checkout, its sdist, and the wheel that the sdist builds."""
    folder = tmp_path_factory.mktemp("distributions")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    clone = folder / "clone"
    for name in filter(None, listed):
        target = clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder / "both", clone], check=True, capture_output=True)
    pip("wheel", "--no-deps", "--wheel-dir", folder / "direct", clone)
    shutil.rmtree(clone)
    return {
        "sdist": next((folder / "both").glob("*.tar.gz")),
        "wheel of the sdist": next((folder / "both").glob("*.whl")),
        "wheel": next((folder / "direct").glob("*.whl")),
    }


class Installed:
    """An environment with the package in it, and an empty directory to work in."""

    def __init__(self, folder: Path, what: object, *options: str) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.bin = folder / "venv" / "bin"
        libraries = next((folder / "venv" / "lib").glob("python*")) / "site-packages" / "libraries.pth"
        libraries.write_text(f"{sysconfig.get_path('purelib')}\n")  # a path alone: its own .pth files are not read
        pip("install", "--no-deps", *options, what, python=self.bin / "python")
        self.folder = folder / "empty"
        self.folder.mkdir()

    def ikl(self, *words: str, **variables: str) -> str:
        """The standard output of a command that must succeed."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "IKL_"))}
        done = subprocess.run(
            [self.bin / "ikl", *words],
            cwd=self.folder,
            env={**environment, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"ikl {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def wheel(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    installed = Installed(tmp_path_factory.mktemp("wheel"), distributions["wheel"])
    installed.ikl("data", "digits")
    return installed


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_builds_the_same_wheel(distributions: dict[str, Path]) -> None:
    assert contents(distributions["wheel of the sdist"]) == contents(distributions["wheel"])


def test_the_wheel_holds_all_of_the_package_and_the_configs(distributions: dict[str, Path]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "ikl_plugins", "configs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {f"ikl_plugins/{name}" if name.startswith("configs/") else name for name in listed}
    assert expected <= set(contents(distributions["wheel"]))


def test_configs_are_listed_shown_and_copied(wheel: Installed) -> None:
    names = wheel.ikl("config", "list").split()
    assert {"torchdistill/digits/ikl.yaml", "mmpretrain/digits/distill_ikl.py"} <= set(names)
    assert wheel.ikl("config", "show", "torchdistill/digits/ikl.yaml").endswith("\n")
    wheel.ikl("config", "copy", "torchdistill/digits/kd.yaml", "copied")
    shown = wheel.ikl("config", "show", "torchdistill/digits/kd.yaml")
    assert (wheel.folder / "copied" / "kd.yaml").read_text() == shown


def test_doctor_finds_every_host(wheel: Installed) -> None:
    found = json.loads(wheel.ikl("doctor", "--json", "--for", "torchdistill,mmpretrain,robustbench"))
    assert found["works"]


def test_the_operator_is_built_from_the_installed_source(wheel: Installed, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler here: `ikl build` was not run")
    assert "Gradients agree" in wheel.ikl("build", TORCH_EXTENSIONS_DIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))


def test_a_torchdistill_yaml_is_copied_adopted_and_trained(wheel: Installed) -> None:
    wheel.ikl("config", "copy", "torchdistill/digits/teacher.yaml", "td")
    wheel.ikl("config", "copy", "torchdistill/digits/kd.yaml", "td")
    for name in ("teacher", "kd"):
        path = wheel.folder / "td" / f"{name}.yaml"
        path.write_text(path.read_text().replace("num_epochs: 10", "num_epochs: 1"))
    wheel.ikl("train", "td/teacher.yaml", "--device", "cpu")
    wheel.ikl("adopt", "td/kd.yaml", "--loss", "IKL", "--output", "td/ikl.yaml", "--check")
    wheel.ikl("train", "td/ikl.yaml", "--device", "cpu")
    assert "IKLLoss" in (wheel.folder / "td" / "ikl.yaml").read_text()


def test_an_mmpretrain_config_is_trained_evaluated_ranked_and_submitted(wheel: Installed) -> None:
    wheel.ikl("config", "copy", "mmpretrain/digits/adversarial_ikl.py", "mm")
    config = "mm/digits/adversarial_ikl.py"
    wheel.ikl("train", config, "--work-dir", "runs", "--cfg-options", "train_cfg.max_epochs=1", "attack.steps=1")
    network = ("--checkpoint", "runs/epoch_1.pth", "--architecture", "WideResNet-10-1", "--data", "data/digits/test")
    few = ("--n-examples", "8", "--batch-size", "8", "--device", "cpu")
    wheel.ikl("evaluate", *network, *few, "--eps", "8/255", "--attacks", "apgd-ce", "--output", "evaluated")
    log = json.loads((wheel.folder / "evaluated/evaluation.json").read_text())
    assert log["n_examples"] == 8
    assert "of" in wheel.ikl("rank", "--dataset", "cifar10", "--robust", "70", "--natural", "90")
    claims = ("--name", "Author2026Trial", "--additional-data", "no", "--generated-data", "no", "--demonstration")
    paper = (
        "--title",
        "Trial",
        "--link",
        "https://example.org",
        "--authors",
        "A. Author",
        "--venue",
        "arXiv, May 2026",
    )
    entry = (
        "--licence",
        "MIT",
        "--evaluation",
        "evaluated/evaluation.json",
        "--allow-failed-preflight",
        "--output",
        "entry",
    )
    wheel.ikl("submit", *network, *few, *claims, *paper, *entry)
    assert list((wheel.folder / "entry").iterdir())


@pytest.mark.parametrize("config", ["torchdistill/digits/teacher.yaml", "mmpretrain/digits/plain.py"])
def test_two_ranks_on_cpus_train(wheel: Installed, config: str) -> None:
    wheel.ikl("config", "copy", config, "two", "--force")
    copied = next((wheel.folder / "two").rglob(Path(config).name))
    short = "num_epochs: 1" if copied.suffix == ".yaml" else "train_cfg = dict(max_epochs=1)"
    text = copied.read_text().replace("num_epochs: 10", short)
    copied.write_text(text if copied.suffix == ".yaml" else f"{text}\n{short}\n")
    ranks = [wheel.bin / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "IKL_"))}
    done = subprocess.run(
        [*ranks, "-m", "ikl_plugins", "train", copied],
        cwd=wheel.folder,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_an_editable_install_works_from_an_empty_directory(tmp_path: Path) -> None:
    installed = Installed(tmp_path, ROOT, "--editable")
    assert "torchdistill/digits/kd.yaml" in installed.ikl("config", "list", "digits").split()
    installed.ikl("config", "copy", "torchdistill/digits/kd.yaml")
    assert filecmp.cmp(installed.folder / "kd.yaml", ROOT / "configs/torchdistill/digits/kd.yaml", shallow=False)
