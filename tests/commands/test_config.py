"""`ikl config`: the shipped configs by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ikl_plugins.commands import config
from ikl_plugins.commands.main import main

NAMES = config.names()
INHERITING = "mmpretrain/digits/distill_ikl.py"


def test_every_file_that_trains_is_listed_and_no_base() -> None:
    folder = config.configs_folder()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".py", ".yaml")}
    assert set(NAMES) == {name for name in files if "/_base_/" not in name}


def test_a_word_narrows_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "list", "IMAGENET_LT"])
    listed = capsys.readouterr().out.split()
    assert listed == [name for name in NAMES if "imagenet_lt" in name]
    assert listed


@pytest.mark.parametrize("given", ["digits/kd.yaml", "torchdistill/digits/kd", "configs/torchdistill/digits/kd.yaml"])
def test_the_end_of_a_name_finds_its_config(given: str) -> None:
    assert config.find(given) == config.configs_folder() / "torchdistill/digits/kd.yaml"


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("torchdistill/digits/kd.yaml")
    assert config.config_path(name) == config.configs_folder() / name
    name.parent.mkdir(parents=True)
    name.touch()
    assert config.config_path(name) == name


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "show", INHERITING])
    assert capsys.readouterr().out == (config.configs_folder() / INHERITING).read_text(encoding="utf-8")


ONE_OF_EACH_FOLDER = {str(Path(name).parent): name for name in NAMES if name.startswith("mmpretrain/")}


@pytest.mark.parametrize("name", ONE_OF_EACH_FOLDER.values())
def test_a_copy_holds_the_same_config_as_the_shipped_file(name: str, tmp_path: Path) -> None:
    mmengine = pytest.importorskip("mmengine.config")
    copied, *_ = config.copy(name, tmp_path)
    assert tmp_path in copied.parents
    found, shipped = (
        mmengine.Config.fromfile(path, import_custom_modules=False) for path in (copied, config.configs_folder() / name)
    )
    moved = repr(dict(shipped)).replace(str(config.configs_folder() / "mmpretrain"), str(tmp_path))
    assert repr(dict(found)).replace(str(copied.parent), "@") == moved.replace(str(copied.parent), "@")


def test_a_copy_brings_the_bases_and_the_config_of_the_teacher(tmp_path: Path) -> None:
    config.copy(INHERITING, tmp_path)
    assert (tmp_path / "digits" / "teacher.py").is_file()
    assert (tmp_path / "_base_" / "runtime.py").is_file()
    assert not (tmp_path / "_base_" / "imagenet_data.py").exists()


def test_a_changed_file_is_written_over_only_by_force(tmp_path: Path) -> None:
    (copied,) = config.copy("torchdistill/digits/kd.yaml", tmp_path)
    config.copy("torchdistill/digits/kd.yaml", tmp_path)  # the same content once more
    copied.write_text("mine")
    with pytest.raises(ValueError, match="--force"):
        config.copy("torchdistill/digits/kd.yaml", tmp_path)
    assert copied.read_text() == "mine"
    config.copy("torchdistill/digits/kd.yaml", tmp_path, force=True)
    assert copied.read_text() != "mine"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["show", "torchdistill/digits/kdd.yaml"], "Did you mean `torchdistill/digits/kd.yaml`"),
        (["show", "distill_ikl"], "must fit one config"),
        (["show", "../setup.cfg"], "unknown config"),
        (["list", "no_such_word"], "no config"),
    ],
)
def test_refusals(words: list[str], fragment: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["config", *words])
    assert fragment in str(end.value.code)
