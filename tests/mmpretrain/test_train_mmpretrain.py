"""`ikl train` and mmpretrain's test.py as processes, from an empty directory: train, resume, test, two ranks."""

import os
import re
import runpy
import sys
from pathlib import Path

import numpy
import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from mmpretrain_runs import CONFIGS, TRAIN, assert_same, execute, few_images, holding, tool

from ikl_plugins.commands import data as prepare_data
from ikl_plugins.mmpretrain import training

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

DIGITS = CONFIGS / "digits"
TEACHER = Path("runs/mmpretrain/digits/teacher/epoch_10.pth")
PRIOR = "distill_loss.class_prior.matrix"
WATCHED = """
_base_ = {base!r}
custom_imports = dict(imports=["ikl_plugins.mmpretrain", "watch"])
custom_hooks = [dict(type="IKLHook"), dict(type="SyncBuffersHook"), dict(type="WatchHook")]
custom_hooks += [dict(type="RobustEvaluationHook", eps="8/255", n_examples=20, batch_size=7, interval=2)]
default_hooks = dict(checkpoint=dict(save_best=["accuracy/top1", "robust/apgd-ce"]))
train_dataloader = dict(batch_size={batch_size})
train_cfg = dict(max_epochs=3)
param_scheduler = dict(T_max=3)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data folder of a few real digits, an empty directory to work in, and a process that works there."""
    folder = tmp_path_factory.mktemp("processes")
    prepare_data.prepare_digits(folder / "whole")
    few_images(folder / "whole" / "digits", folder / "data" / "digits")
    (folder / "work").mkdir()

    def work(*command, **keywords):
        environment = {
            "IKL_PLUGINS_DATA": str(folder / "data"),
            "PYTHONPATH": str(Path(__file__).parent),
            "WATCH_FOLDER": str(folder / "work"),
        }
        return execute(*command, **{"cwd": folder / "work", **environment, **keywords})

    work.folder = folder / "work"
    return work


@pytest.fixture(scope="module")
def teacher(world):
    """The shipped teacher, trained by the shipped command for as long as it takes to make its checkpoint."""
    world(*TRAIN, DIGITS / "teacher.py", "--cfg-options", "train_dataloader.batch_size=40")
    return world.folder / TEACHER


@pytest.fixture(scope="module")
def robust_teacher(world):
    """In the place of a trained one the weights that its config begins with."""
    config = Config.fromfile(DIGITS / "robust_teacher.py")
    path = world.folder / config.work_dir / "epoch_10.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(MODELS.build(config.model).state_dict(), path)


@pytest.fixture(scope="module")
def distilled(world, teacher):
    """A folder with an uninterrupted run of distill_ikl.py, watched."""
    return watched(world, "whole")


def watched(world, name, *options, base="distill_ikl", batch_size=20, launcher=(), **keywords):
    """Runs a shipped config of the digits with the WatchHook; returns the folder of what it has written."""
    config = world.folder / f"{base}_{batch_size}.py"
    config.write_text(WATCHED.format(base=str(DIGITS / f"{base}.py"), batch_size=batch_size))
    folder = world.folder / name
    folder.mkdir(exist_ok=True)
    world(*launcher, *TRAIN, config, "--work-dir", name, *options, WATCH_FOLDER=str(folder), **keywords)
    return folder


def ends(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pth")


def top1(output, kind="accuracy"):
    return float(re.findall(rf"{kind}/top1: ([\d.]+)", output)[-1])


# --- training and testing --------------------------------------------------------------------------------------------


def test_the_shipped_command_trains(teacher, world):
    assert teacher.is_file()
    names = {path.name for path in teacher.parent.iterdir()}
    assert {"last_checkpoint", "epoch_9.pth", "epoch_10.pth"} <= names
    assert any(name.startswith("best_accuracy_top1") for name in names)
    assert {path.name for path in world.folder.iterdir() if path.is_dir()} >= {"runs"}


def test_a_distilled_checkpoint_is_tested_with_the_plain_config(distilled, world):
    checkpoint = distilled / "epoch_3.pth"
    (log,) = distilled.glob("*/*.log")
    where = ("--cfg-options", "test_dataloader.dataset.data_prefix=val")
    theirs = world(tool("test"), DIGITS / "plain.py", checkpoint, *where)
    assert top1(theirs) == top1(log.read_text())
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert not [name for name in weights if "teacher" in name]
    # The plain model has all it needs; what it cannot place is the class prior.
    assert "missing keys" not in theirs
    (unexpected,) = re.findall(r"unexpected key in source state_dict: (.*)", theirs)
    assert {name.strip().rsplit(".", 1)[0] for name in unexpected.split(",")} == {"distill_loss.class_prior"}


def test_the_teacher_and_the_terms_are_in_the_log(distilled):
    (log,) = distilled.glob("*/*.log")
    text = log.read_text()
    assert re.search(r"the teacher's top-1 accuracy on 30 validation images is \d+\.\d\d %", text)
    (line,) = re.findall(r"Epoch\(train\) +\[3\].*", text)[-1:]
    values = {name: float(re.search(rf"\b{name}: ([\d.]+)", line)[1]) for name in ("loss", "loss_ce", "loss_distill")}
    assert values["loss"] == pytest.approx(values["loss_ce"] + values["loss_distill"], abs=2e-4)
    assert {"weighted_mse", "soft_cross_entropy"} <= set(re.findall(r"(\w+): ", line))


def test_a_robust_metric_is_no_number_of_the_first_view_of_several(world, tmp_path, monkeypatch):
    """mmpretrain's test.py --tta, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(world.folder.parent / "data"))
    torch.save({"state_dict": {}}, "untrained.pth")
    settings = ("model.module.val_attack.steps=1", "test_dataloader.dataset.data_prefix=val")
    words = [str(DIGITS / "adversarial_trades.py"), "untrained.pth", "--tta", "--cfg-options", *settings]
    monkeypatch.setattr(sys, "argv", ["test.py", *words])
    with pytest.raises(ValueError, match=r"^RobustAccuracy: test-time augmentation must be off.*Test without --tta"):
        runpy.run_path(str(tool("test")), run_name="__main__")


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_killed_run_is_resumed_to_the_bit(distilled, world):
    killed = world.folder / "killed"
    watched(world, "killed", code=-9, WATCH_KILL="6")  # the third of four iterations of the second epoch
    assert sorted(path.name for path in killed.glob("epoch_*.pth")) == ["epoch_1.pth"]
    assert not (killed / "rank0.pth").exists()
    watched(world, "killed", "--resume")
    assert_same(ends(killed), ends(distilled))
    for folder in (killed, distilled):
        saved = torch.load(folder / "epoch_3.pth", weights_only=False)["state_dict"]
        assert_same(saved, ends(distilled))
    assert not torch.equal(ends(distilled)[PRIOR], torch.full((10, 10), 0.1))


# --- several processes, other precision ------------------------------------------------------------------------------

TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d")
TWO += ("--rdzv-endpoint=localhost:0",)


def test_two_ranks_stay_equal_and_have_the_prior_of_one(distilled, world):
    cache = ("--cfg-options", "model.teacher_cache.folder=kept", "model.teacher_cache.views=1")
    folder = watched(world, "two", *cache, batch_size=10, launcher=TWO)
    first, second = ends(folder, 0), ends(folder, 1)
    assert_same(first, second)
    torch.testing.assert_close(first[PRIOR], ends(distilled)[PRIOR], atol=1e-6, rtol=0)
    (log,) = folder.glob("*/*.log")  # the teacher is tested on the images of both ranks
    assert "the teacher's top-1 accuracy on 30 validation images" in log.read_text()
    assert log.read_text().count("robust/apgd-ce on 20 of 30 validation images") == 1
    assert len([*folder.glob("best_robust_apgd-ce_epoch_[23].pth")]) == 1
    saved = torch.load(folder / "epoch_3.pth", weights_only=False)["state_dict"]
    assert_same(saved, first)
    (kept,) = world.folder.glob("kept/*/logits.bin")  # of both ranks, whose images are not augmented
    records = numpy.fromfile(kept, "u1").reshape(-1, 44)
    assert len(records) == 80
    assert records.any(axis=1).all()


@pytest.mark.slow
def test_an_adversarial_run_is_resumed_to_the_bit(world):
    options = ("--cfg-options", "model.awp.warmup_epochs=2")
    whole = watched(world, "adversarial", *options, base="adversarial_ikl")
    watched(world, "adversarial_killed", *options, base="adversarial_ikl", code=-9, WATCH_KILL="6")
    killed = watched(world, "adversarial_killed", "--resume", *options, base="adversarial_ikl")
    assert_same(ends(killed), ends(whole))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["distill_ikl", "adversarial_ikl", "robust_distill_rslad_ikl"])
def test_two_ranks_are_resumed_to_the_bit(base, teacher, robust_teacher, world):
    awp = ("--cfg-options", "model.awp.warmup_epochs=2", "model.awp.undo=after_step")
    perturbed = () if base == "distill_ikl" else awp
    options = ("--launcher", "pytorch", *perturbed)
    keywords = {"base": base, "batch_size": 10, "launcher": TWO}
    whole = watched(world, f"two_whole_{base}", *options, **keywords)
    watched(world, f"two_killed_{base}", *options, code=None, WATCH_KILL="6", **keywords)
    killed = watched(world, f"two_killed_{base}", "--resume", *options, **keywords)
    assert_same(ends(whole, 0), ends(whole, 1))
    for rank in (0, 1):
        assert_same(ends(killed, rank), ends(whole, rank))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in DIGITS.glob("*.py") if path.stem != "teacher"))
def test_each_config_of_the_digits_trains_and_tests(name, world, teacher, robust_teacher):
    options = ("--cfg-options", "train_cfg.max_epochs=1", "param_scheduler.T_max=1", "train_dataloader.batch_size=20")
    world(*TRAIN, DIGITS / f"{name}.py", *options)
    folder = world.folder / "runs/mmpretrain/digits" / name
    (best,) = folder.glob("best_*.pth")
    output = world(tool("test"), DIGITS / f"{name}.py", best)
    assert 0 <= top1(output) <= 100
    if name.startswith(("adversarial", "robust")):
        assert 0 <= top1(output, "robust") <= top1(output)


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Puts another program in the place of mmpretrain's script."""

    def replace(text):
        path = tmp_path / "train.py"
        path.write_text(text)
        monkeypatch.setattr(training, "train_script", lambda: path)

    monkeypatch.setattr("sys.argv", [])
    return replace


def test_options_and_exit_codes_are_those_of_the_script(script, capsys):
    assert training.train_script().parts[-4:] == ("mmpretrain", ".mim", "tools", "train.py")
    with pytest.raises(SystemExit) as end:
        training.main([str(DIGITS / "plain.py"), "--no-such-option"])
    assert end.value.code == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
    script("open('no such file')\n")
    with pytest.raises(SystemExit) as end:
        training.main(["config.py"])
    assert end.value.code == 1
    assert "No such file or directory: 'no such file'" in capsys.readouterr().err


def test_without_its_tools_mmpretrain_is_to_be_installed_again(monkeypatch, tmp_path):
    monkeypatch.setattr(training.mmpretrain, "__file__", str(tmp_path / "mmpretrain" / "__init__.py"))
    with pytest.raises(ValueError, match=r"--force-reinstall --no-deps mmpretrain"):
        training.main(["config.py"])


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        ("OSError(28, 'No space left')", ["--work-dir", "runs/mine"], r"runs/mine cannot .*: No space left\. .*Free "),
        ("OSError(28, 'No space left')", [], "runs/of_config cannot be written"),
        ("OSError(30, 'Read-only', 'a.pth')", [], r"a\.pth cannot be written: Read-only\. .*Make it writable"),
    ],
)
def test_a_disk_that_cannot_be_written_is_told_in_one_line(error, options, message, tmp_path, script):
    config = tmp_path / "config.py"
    config.write_text("work_dir = 'runs/of_config'\n")
    script(f"raise {error}\n")
    with pytest.raises(OSError, match=f"^ikl train: {message}"):
        training.main([str(config), *options])


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("of_config", []),
        ("mine", ["--work-dir", "mine"]),
        ("last", ["--work-dir", "mine", "--cfg-options", "work_dir=last", "a=1"]),
    ],
)
def test_a_second_run_in_a_work_dir_is_refused_before_it_writes(place, options, tmp_path, script, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.py").write_text("work_dir = 'of_config'\n")
    script("from pathlib import Path\nprint(*Path('.').rglob('*.lock'))\n")
    with holding(Path(place, "run")) as process:
        with pytest.raises(
            ValueError, match=rf"^ikl train: {place}/run must have .* process {process} on .* does\. Wait"
        ):
            training.main(["config.py", *options])
        assert sorted(os.listdir()) == sorted(["config.py", place, "train.py"])
    training.main(["config.py", *options])  # the other was killed
    assert capsys.readouterr().out == f"{place}/run.lock\n"
    monkeypatch.setenv("RANK", "1")  # of a run whose first rank has it
    training.main(["config.py", *options])
    assert capsys.readouterr().out == "\n"


def test_an_interruption_says_how_to_go_on(tmp_path, script):
    (tmp_path / "config.py").write_text(f"work_dir = {str(tmp_path)!r}\n")
    script("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
        training.main([str(tmp_path / "config.py")])
