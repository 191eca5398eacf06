"""mmpretrain's own train.py and test.py as processes, from an empty directory: train, resume, test, two ranks."""

import os
import re
from pathlib import Path

from ikl_plugins.commands import data as prepare_data
import pytest
import torch
from ikl_plugins.mmpretrain import training as train_mmpretrain
from mmpretrain_runs import CONFIGS, TOOL, execute, few_images, tool

from ikl_plugins.mmpretrain import checkpoints

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

DIGITS = CONFIGS / "digits"
FORK = hasattr(checkpoints.mmengine.runner.checkpoint, "get_torch_safe_globals")
TEACHER = Path("runs/mmpretrain/digits/teacher/epoch_10.pth")
PRIOR = "distill_loss.class_prior.matrix"
WATCHED = """
_base_ = {base!r}
custom_imports = dict(imports=["ikl_plugins.mmpretrain", "ikl_plugins.mmpretrain.cpu_ranks", "watch"])
custom_hooks = [dict(type="IKLHook"), dict(type="SyncBuffersHook"), dict(type="WatchHook")]
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
    world(TOOL, DIGITS / "teacher.py", "--cfg-options", "train_dataloader.batch_size=40")
    return world.folder / TEACHER


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
    world(*launcher, tool("train"), config, "--work-dir", name, *options, WATCH_FOLDER=str(folder), **keywords)
    return folder


def ends(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pth")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


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


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("way", ["resume", pytest.param("test", marks=pytest.mark.slow)])
def test_the_processes_refuse_a_checkpoint_that_runs_code(way, distilled, world, tmp_path):
    path = tmp_path / "bomb.pth"
    content = torch.load(distilled / "epoch_2.pth", weights_only=False)
    content["meta"]["note"] = Bomb(tmp_path / "exploded")
    torch.save(content, path)
    command = (
        (tool("train"), DIGITS / "distill_ikl.py", "--work-dir", tmp_path / "w", "--resume", path)
        if way == "resume"
        else (tool("test"), DIGITS / "distill_ikl.py", path)
    )
    output = world(*command, code=None)
    assert re.search(r"ValueError: load_content: the checkpoint .*bomb\.pth .* would run code .*mkdir", output)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_resumed(distilled, world, tmp_path):
    path = tmp_path / "damaged.pth"
    content = bytearray((distilled / "epoch_2.pth").read_bytes())
    content[len(content) // 2] ^= 1
    for cut, name in ((len(content), "flipped"), (len(content) // 2, "truncated")):
        path.write_bytes(content[:cut])
        output = world(
            tool("train"), DIGITS / "distill_ikl.py", "--work-dir", tmp_path / name, "--resume", path, code=1
        )
        assert re.search(r"ValueError: load_content: .*damaged\.pth .*truncated or damaged", output)


# --- several processes, other precision ------------------------------------------------------------------------------

TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d")


def test_two_ranks_stay_equal_and_have_the_prior_of_one(distilled, world):
    launcher = (*TWO, "--rdzv-endpoint=localhost:0")
    folder = watched(world, "two", "--launcher", "pytorch", batch_size=10, launcher=launcher)
    first, second = ends(folder, 0), ends(folder, 1)
    assert_same(first, second)
    torch.testing.assert_close(first[PRIOR], ends(distilled)[PRIOR], atol=1e-6, rtol=0)
    (log,) = folder.glob("*/*.log")  # the teacher is tested on the images of both ranks
    assert "the teacher's top-1 accuracy on 30 validation images" in log.read_text()
    saved = torch.load(folder / "epoch_3.pth", weights_only=False)["state_dict"]
    assert_same(saved, first)


@pytest.mark.slow
def test_two_adversarial_ranks_stay_equal(world):
    launcher = (*TWO, "--rdzv-endpoint=localhost:0")
    options = ("--launcher", "pytorch", "--cfg-options", "model.awp.warmup_epochs=2")
    folder = watched(world, "two_adversarial", *options, base="adversarial_ikl", batch_size=10, launcher=launcher)
    assert_same(ends(folder, 0), ends(folder, 1))


@pytest.mark.slow
def test_an_adversarial_run_is_resumed_to_the_bit(world):
    options = ("--cfg-options", "model.awp.warmup_epochs=2")
    whole = watched(world, "adversarial", *options, base="adversarial_ikl")
    watched(world, "adversarial_killed", *options, base="adversarial_ikl", code=-9, WATCH_KILL="6")
    killed = watched(world, "adversarial_killed", "--resume", *options, base="adversarial_ikl")
    assert_same(ends(killed), ends(whole))


@pytest.mark.slow
def test_two_ranks_are_resumed_to_the_bit(distilled, world):
    keywords = {"batch_size": 10, "launcher": (*TWO, "--rdzv-endpoint=localhost:0")}
    whole = watched(world, "two_whole", "--launcher", "pytorch", **keywords)
    watched(world, "two_killed", "--launcher", "pytorch", code=None, WATCH_KILL="6", **keywords)
    killed = watched(world, "two_killed", "--launcher", "pytorch", "--resume", **keywords)
    for rank in (0, 1):
        assert_same(ends(killed, rank), ends(whole, rank))


@pytest.mark.slow
def test_ranks_without_a_launcher_are_refused(world, teacher):
    launcher = (*TWO, "--rdzv-endpoint=localhost:0")
    output = world(*launcher, tool("train"), DIGITS / "plain.py", "--work-dir", "alone", code=None)
    assert re.search(r"IKLHook: the model of 2 ranks must be wrapped.*--launcher pytorch", output)


@pytest.mark.slow
def test_a_run_in_bfloat16_trains(distilled, world):
    folder = watched(world, "bf16", "--cfg-options", "optim_wrapper.type=AutocastOptimWrapper")
    weights = ends(folder)
    assert not torch.equal(weights["head.fc.weight"], ends(distilled)["head.fc.weight"])
    assert weights["backbone.conv1.weight"].dtype == torch.float32
    torch.testing.assert_close(weights[PRIOR].sum(1), torch.ones(10))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in DIGITS.glob("*.py") if path.stem != "teacher"))
def test_each_config_of_the_digits_trains_and_tests(name, world, teacher):
    options = ("--cfg-options", "train_cfg.max_epochs=1", "param_scheduler.T_max=1", "train_dataloader.batch_size=20")
    world(tool("train"), DIGITS / f"{name}.py", *options)
    folder = world.folder / "runs/mmpretrain/digits" / name
    (best,) = folder.glob("best_*.pth")
    output = world(tool("test"), DIGITS / f"{name}.py", best)
    assert 0 <= top1(output) <= 100
    if name.startswith("adversarial"):
        assert 0 <= top1(output, "robust") <= top1(output)


# --- the tool --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tool_gives_the_help_of_the_script(world):
    assert "usage: train.py" in world(TOOL, "--help")


def test_the_tool_passes_options_and_exit_codes_on(world):
    output = world(TOOL, DIGITS / "plain.py", "--no-such-option", code=2)
    assert "unrecognized arguments: --no-such-option" in output
    assert "usage: train.py" in output


def test_the_tool_says_where_the_script_is(capsys):
    train_mmpretrain.main(["--where"])
    path = Path(capsys.readouterr().out.strip())
    assert path == train_mmpretrain.train_script()
    assert path.parts[-4:] == ("mmpretrain", ".mim", "tools", "train.py")


@pytest.mark.parametrize("origin", [None, "namespace"])
def test_without_mmpretrain_the_tool_has_the_pip_line(origin, monkeypatch):
    spec = None if origin is None else type("Spec", (), {"origin": None})()
    monkeypatch.setattr(train_mmpretrain.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match=r"mmpretrain is missing\. Run: .*pip install 'ikl_plugins\[mmpretrain\]'"):
        train_mmpretrain.main(["config.py"])


def test_without_its_tools_mmpretrain_is_to_be_installed_again(monkeypatch, tmp_path):
    spec = type("Spec", (), {"origin": str(tmp_path / "mmpretrain" / "__init__.py")})()
    monkeypatch.setattr(train_mmpretrain.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match=r"there is no .*train\.py\. Run: .*--force-reinstall --no-deps mmpretrain"):
        train_mmpretrain.main(["config.py"])


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (
            'OSError(28, "No space left on device")', ["--work-dir", "runs/mine"],
            "runs/mine must be there to write to, but: No space left on device. What was whole before is as it was. "
            "Free some space, and go on with --resume.",
        ),
        ('OSError(28, "No space left on device")', [], "runs/of_config must be there to write to, but: No space"),
        (
            'OSError(30, "Read-only file system", "runs/mine/a.pth")', [],
            "runs/mine/a.pth must be there to write to, but: Read-only file system. What was whole before is as it "
            "was. Make it writable, or name another --work-dir, and go on with --resume.",
        ),
    ],
)  # fmt: skip
def test_a_disk_that_cannot_be_written_ends_the_tool_with_one_line(error, options, message, tmp_path, monkeypatch):
    script, config = tmp_path / "train.py", tmp_path / "config.py"
    script.write_text(f"raise {error}\n")
    config.write_text("work_dir = 'runs/of_config'\n")
    monkeypatch.setattr(train_mmpretrain, "train_script", lambda: script)
    monkeypatch.setattr("sys.argv", [])
    with pytest.raises(SystemExit, match=f"^error: train_mmpretrain: {re.escape(message)}"):
        train_mmpretrain.main([str(config), *options])


def test_an_error_that_is_not_of_the_disk_is_the_scripts_own(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("open('no such file')\n")
    monkeypatch.setattr(train_mmpretrain, "train_script", lambda: script)
    monkeypatch.setattr("sys.argv", [])
    with pytest.raises(FileNotFoundError):
        train_mmpretrain.main(["config.py"])
