"""The torchdistill driver and the configs that it trains in seconds, on generated images."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill_boxes import PLACES

from ikl_plugins._files import configs_folder, locked
from ikl_plugins.commands.main import main as ikl
from ikl_plugins.models import resnet8, resnet56
from ikl_plugins.torchdistill import training, yaml_config
from ikl_plugins.torchdistill.training import last_path, load_checkpoint, load_config, run

CONFIGS = configs_folder() / "torchdistill"
FOLDERS = ("digits", "cifar10_folder", "cifar10_miniature")
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for folder in FOLDERS for path in (CONFIGS / folder).glob("*.yaml"))
IKL = CONFIGS / "digits" / "ikl.yaml"
IKL_PATH = Path("runs/torchdistill/digits/ikl/ikl.pt")
ADVERSARIAL = CONFIGS / "digits" / "adversarial_ikl.yaml"
TAUGHT = CONFIGS / "digits" / "robust_distill_rslad_ikl.yaml"
TAUGHT_PATH = Path("runs/torchdistill/digits/robust_distill_rslad_ikl/robust_distill_rslad_ikl.pt")
ADVERSARIAL_PATH = Path("runs/torchdistill/digits/adversarial_ikl/adversarial_ikl.pt")


@pytest.fixture(autouse=True)
def _data(data_folder, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(data_folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of child processes: what is compared to the bit needs it
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="session")
def teachers(data_folder, tmp_path_factory):
    """A `runs` folder that holds the teachers of the shipped configs, trained for an epoch."""
    folder = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IKL_PLUGINS_DATA", str(data_folder))
        patch.chdir(folder)
        public = Path("runs/torchdistill/cifar10_miniature/public_resnet56.pt")  # stands in for a download
        public.parent.mkdir(parents=True)
        torch.save({"model": resnet56(num_classes=10).state_dict()}, public)
        for dataset in FOLDERS:
            run(shrink(load_config(CONFIGS / dataset / "teacher.yaml")))
        run(shrink(load_config(CONFIGS / "digits" / "robust_teacher.yaml")))
    return folder / "runs"


@pytest.fixture
def workplace(teachers, tmp_path, monkeypatch):
    """An empty working directory with the teachers in it."""
    shutil.copytree(teachers, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shrink(config, *, epochs=1, batch_size=8):
    """A shipped config, made small: its own epochs, batches and workers would take minutes."""
    train = config["train"]
    train["num_epochs"] = epochs
    for loader in (train["train_data_loader"], train["val_data_loader"], config["test"]["test_data_loader"]):
        loader["kwargs"] = {"batch_size": batch_size, "num_workers": 0}
    return config


def ikl_config(epochs=3):
    return shrink(load_config(IKL), epochs=epochs)


def weights(path):
    return load_checkpoint(path)["model"]


def record(path):
    (found,) = load_checkpoint(path)["optimizer"]["param_groups"][0]["ikl_plugins"].values()
    return found["matrix"]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def replaced(text, *changes):
    """Text after changes of which each must find something."""
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text)
        assert count, pattern
    return text


# --- the shipped configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED)
def test_each_shipped_config_trains(path, workplace):
    result = run(shrink(load_config(CONFIGS / path)))
    (row,) = result["history"]
    assert {"epoch", "lr", "train_loss", "val_accuracy", "seconds_per_step"} <= row.keys()
    assert row["train_loss"] > 0
    assert 0 <= result["test_accuracy"] <= 100
    dataset, name = path.removesuffix(".yaml").split("/")
    best = load_checkpoint(Path("runs/torchdistill") / dataset / name / f"{name}.pt")
    assert set(best) == {"model", "optimizer", "lr_scheduler", "best_value", "args"}
    # In the style of the recipes, IKL on CIFAR has no class prior.
    term = name.removeprefix("adversarial_").removeprefix("robust_distill_")
    term = term.removesuffix("_no_prior").removesuffix("_cached")
    kind = {"rslad": "dkl", "rslad_ikl": "ikl", "robust_teacher": "dkl"}.get(term, term)
    term = "trades" if name == "robust_teacher" else term
    without = ("cifar10_folder/ikl.yaml", "cifar10_miniature/ikl_no_prior.yaml")
    assert set(result["class_prior"]) == ({term} if kind in ("ikl", "gkl") and path not in without else set())
    assert (f"{term}/weighted_mse" in row) is (kind in ("dkl", "ikl", "gkl"))


@pytest.mark.parametrize("path", SHIPPED)
def test_upstreams_script_runs_the_shipped_configs(path, workplace):
    script = os.environ.get("IKL_PLUGINS_UPSTREAM_SCRIPT")
    if not script:
        pytest.skip("set IKL_PLUGINS_UPSTREAM_SCRIPT to torchdistill's examples/torchvision/image_classification.py")
    Path("config.yaml").write_text(replaced((CONFIGS / path).read_text(), (r"num_epochs: \d+", "num_epochs: 2")))
    command = [sys.executable, script, "--config", "config.yaml", "--device", "cpu", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    dataset, name = path.removesuffix(".yaml").split("/")
    content = load_checkpoint(f"runs/torchdistill/{dataset}/{name}/{name}.pt")
    if name == "gkl":
        assert content["optimizer"]["param_groups"][0]["ikl_plugins"]["gkl"]["matrix"].shape == (10, 10)


# --- going on where a run has stopped --------------------------------------------------------------------------------


def stages(config):
    """The config as two stages, the second one with an optimizer and a loss of its own."""
    train = config["train"]
    first, second = dict(train, num_epochs=2), dict(train, num_epochs=2)
    del second["val_data_loader"]
    config["train"] = {"log_freq": 10, "stage1": first, "stage2": second}
    return config


def accumulate(config):
    config["train"]["optimizer"]["grad_accum_step"] = 2  # of three steps an epoch: one gradient waits
    return config


def adversarial(config):
    return shrink(load_config(ADVERSARIAL), epochs=3)  # eps is another in each of them


def taught(config):
    return shrink(load_config(TAUGHT), epochs=3)


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("change", "stop"),
    [(dict, 2), (accumulate, 1), (stages, 1), (stages, 2), (stages, 3), (adversarial, 1), (taught, 1)],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(workplace, change, stop):
    path = {adversarial: ADVERSARIAL_PATH, taught: TAUGHT_PATH}.get(change, IKL_PATH)
    term = "rslad_ikl" if change is taught else "ikl"
    whole = run(change(ikl_config()), seed=5)
    shutil.move(path.parent, "whole")

    def interrupt(step, steps, text):
        if step == 3 * stop + 2:  # in the middle of an epoch
            raise StopError

    with pytest.raises(StopError):
        run(change(ikl_config()), seed=5, progress=interrupt)
    assert load_checkpoint(last_path(path))["epoch"] == stop
    resumed = run(change(ikl_config()), seed=5, start_epoch=stop)

    assert torch.equal(resumed["class_prior"][term], whole["class_prior"][term])
    assert not torch.equal(whole["class_prior"][term], torch.full((10, 10), 0.1))
    for name in (path.name, last_path(path).name):
        assert_same(weights(path.with_name(name)), weights(Path("whole") / name))
    assert len(resumed["history"]) == (4 if change is stages else 3)
    for ours, theirs in zip(resumed["history"], whole["history"], strict=True):
        ours.pop("seconds_per_step")
        assert ours.items() <= theirs.items()
    assert resumed["test_accuracy"] == whole["test_accuracy"]


KILLED = f"""
import os
from ikl_plugins.commands.main import main
from ikl_plugins.torchdistill import training, yaml_config

def until_killed(self, epoch, progress):
    return train_epoch(self, epoch, lambda step, *_: step == 5 and os.kill(os.getpid(), {signal.SIGKILL}))

train_epoch, training.Trainer.train_epoch = training.Trainer.train_epoch, until_killed
main("train some.yaml --device cpu --seed 5 --run_log logs/some.txt".split())
"""


def test_a_killed_command_is_resumed(workplace):
    text = replaced(IKL.read_text(), (r"num_epochs: \d+", "num_epochs: 3"), ("batch_size: 64", "batch_size: 8"))
    Path("some.yaml").write_text(text)
    whole = run(load_config("some.yaml"), seed=5)
    shutil.move(IKL_PATH.parent, "whole")
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert re.search(r"epoch: 0 .* ikl/weighted_mse: \d", Path("logs/some.txt").read_text())
    assert load_checkpoint(last_path(IKL_PATH))["args"].seed == 5
    assert not torch.equal(record(last_path(IKL_PATH)), torch.full((10, 10), 0.1))
    resumed = run(load_config("some.yaml"), seed=5, start_epoch=1)
    assert torch.equal(resumed["class_prior"]["ikl"], whole["class_prior"]["ikl"])
    assert_same(weights(last_path(IKL_PATH)), weights(Path("whole") / last_path(IKL_PATH).name))


def test_the_seed_decides_and_a_finished_run_may_be_tested_again(workplace, monkeypatch):
    results, calls = [], []
    for seed in (5, 6, 5):
        first = run(ikl_config(1), seed=seed, progress=lambda *call: calls.append(call))
        results.append(weights(IKL_PATH))
        monkeypatch.setattr(training, "dry_run", lambda box, config: None)  # it changes nothing
    assert calls == [(step, 3, "epoch 1/1") for step in (1, 2, 3)] * 3
    assert_same(results[0], results[2])
    assert not torch.equal(results[0]["fc.weight"], results[1]["fc.weight"])
    again = run(ikl_config(1), seed=5, start_epoch=1)
    assert (again["test_accuracy"], again["history"]) == (first["test_accuracy"], first["history"])


def change_at(*path, **values):
    """A change of a config: the block at a path gets values; None takes a key away."""

    def change(config):
        block = config
        for key in path:
            block = block[key]
        for key, value in values.items():
            if value is None:
                del block[key]
            else:
                block[key] = value
        return config

    return change


STUDENT = ("models", "student_model")
TERM = ("train", "criterion", "kwargs", "sub_terms", "ikl", "criterion")
# What the config becomes, the options, and what is said.
MISFITS = {
    "another epoch": (dict, {"start_epoch": 2}, r"Use --start_epoch 1\."),
    "beyond the epochs": (dict, {"start_epoch": 4}, r"between 0 and the 3 epochs, got 4"),
    "below 0": (dict, {"start_epoch": -1}, r"between 0 and the 3 epochs, got -1"),
    "another seed": (dict, {"seed": 9}, r"from .*ikl_last\.pt must keep .* seed \(was 0, is 9\)"),
    "another batch size": (change_at("train", "train_data_loader", kwargs={"batch_size": 4}), {}, r"\(was 8, is 4\)"),
    "another loss": (
        change_at(*TERM, key="GKLLoss", kwargs={**PLACES, "temperature": 2.0}),
        {},
        r"losses\.ikl\.type \(was 'IKLLoss', is 'GKLLoss'\).*add --allow_changes",
    ),
    "another network": (change_at(*STUDENT, key="ikl_plugins.resnet14"), {}, r"fit the model 'ikl_plugins\.resnet14'"),
    "another optimizer": (
        change_at("train", "optimizer", module_wise_configs=[{"module": "fc"}]),
        {},
        r"ikl_last\.pt must fit the config's optimizer and scheduler",
    ),
    "checkpoints of stages": (
        lambda config: change_at("train", student={"dst_ckpt": "stage.pt"})(stages(config)),
        {},
        r"`train: student: dst_ckpt:` cannot be resumed",
    ),
}


SPARSE = torch.eye(2).to_sparse()
# What a last checkpoint holds in place of what this driver saves, and what is said.
ODD_FIELDS = [
    ({"epoch": torch.ones(2)}, "`epoch` of .* got a Tensor"),
    ({"history": [1]}, "`history` of .* got a list"),
    ({"gradients": [SPARSE]}, "must hold dense tensors, but 'gradient 0'"),
    ({"gradients": [torch.ones(9)]}, "must have gradients of the config's model"),
    ({"modules": [1]}, "`modules` of .* got a list"),
    (
        {"optimizer": {"state": {0: {"momentum_buffer": SPARSE}}, "param_groups": None}},
        "must fit the config's optimizer",
    ),
    ({"args": None}, "`args` of .* got a NoneType"),
    ({"model": {5: torch.ones(1)}}, "must name weights by texts"),
    ({"lr_scheduler": 5}, "must fit the config's optimizer and scheduler"),
]


def test_resuming_needs_what_fits(workplace):
    with pytest.raises(ValueError, match=r"^ikl train: --start_epoch 1 needs .*none at .*ikl_last\.pt"):
        run(ikl_config(), start_epoch=1)
    run(ikl_config(1))
    for change, options, message in MISFITS.values():
        with pytest.raises(ValueError, match=f"^ikl train: .*{message}"):
            run(change(ikl_config()), **{"start_epoch": 1, **options})
    sound = torch.load(last_path(IKL_PATH), weights_only=False)
    for fields, message in ODD_FIELDS:
        torch.save({**sound, **fields}, last_path(IKL_PATH))
        with pytest.raises(ValueError, match=f"^ikl train: .*ikl_last.*{message}|^ikl train: {message}") as refused:
            run(ikl_config(), start_epoch=1)
        assert "ikl_last.pt" in str(refused.value)
    shutil.copy(IKL_PATH, last_path(IKL_PATH))
    with pytest.raises(ValueError, match="lacks epoch, history, modules, grad_count, gradients"):
        run(ikl_config(), start_epoch=1)


def test_what_is_asked_for_goes_on_and_is_said(workplace, caplog):
    """Longer with another batch size, best checkpoint and teacher in another place; as it is without a record."""
    run(ikl_config(1))
    teacher = Path(shutil.move("runs/torchdistill/digits/teacher/teacher.pt", "moved.pt"))
    config = change_at("models", "teacher_model", src_ckpt=str(teacher))(ikl_config())
    batches = change_at("train", "train_data_loader", kwargs={"batch_size": 4, "num_workers": 1})(config)
    assert len(run(batches, start_epoch=1, allow_changes=True)["history"]) == 3
    lines = [record.message for record in caplog.records if ": was " in record.message]
    assert lines == ["ikl train: batch_size: was 8, is 4", "ikl train: epochs: was 1, is 3"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_checkpoint_that_is_none_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ([1, 2], {"model": Evil()}):
        torch.save(content, "some.pt")
        with pytest.raises(ValueError, match=r"some\.pt"):
            load_checkpoint("some.pt")
    assert not Path("hacked").exists()


def test_what_is_found_out_in_training(workplace):
    """A loss that is not finite, a network without logits; and that a bare state dict gives initial weights."""
    with pytest.raises(training.DivergenceError, match=r"must stay finite, got \S+ in epoch 0, step \d"):
        run(change_at("train", "optimizer", "kwargs", lr=1e30)(ikl_config()))
    bare = weights("runs/torchdistill/digits/teacher/teacher.pt")
    torch.save(bare, "bare.pt")
    config = change_at("models", "teacher_model", src_ckpt="bare.pt")(ikl_config())
    trainer = training.Trainer(config, torch.device("cpu"), 0)
    assert_same(trainer.box.teacher_model.state_dict(), bare)
    trainer.model.forward = lambda images: {"out": images}
    with pytest.raises(ValueError, match=r"must return a tensor of logits, got dict"):
        trainer.accuracy(config["test"]["test_data_loader"])


@pytest.mark.parametrize(
    "written",
    [
        lambda last, other: {"meta": {}, "state_dict": {f"backbone.{name}": value for name, value in last.items()}},
        lambda last, other: {"state_dict": {"distill_loss.class_prior.matrix": torch.ones(10, 10), **last}},
        lambda last, other: {"state_dict": other, "state_dict_ema": last, "arch": "timm's"},
        lambda last, other: {"model": {f"module._orig_mod.{name}": value for name, value in last.items()}},
        lambda last, other: {"net": {f"student_model.{name}": value for name, value in last.items()}},
    ],
)
def test_src_ckpt_is_read_whoever_has_written_it(written, tmp_path):
    block = {"key": "ikl_plugins.resnet8", "kwargs": {"num_classes": 10}, "src_ckpt": str(tmp_path / "a.pt")}
    last, other = ({name: value + 1 for name, value in resnet8(10).state_dict().items()} for _ in range(2))
    torch.save(written(last, other), tmp_path / "a.pt")
    assert_same(yaml_config.build_model(block, "student", torch.device("cpu"), False).state_dict(), last)
    torch.save({"model": last, "best": other}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must leave no doubt .*'model', 'best'"):
        yaml_config.build_model(block, "student", torch.device("cpu"), False)


def test_a_failed_write_leaves_the_old_file(workplace, monkeypatch):
    run(ikl_config(1))
    before = last_path(IKL_PATH).read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{IKL_PATH}'"):
        run(ikl_config(1))
    assert last_path(IKL_PATH).read_bytes() == before
    assert sorted(path.name for path in IKL_PATH.parent.iterdir()) == ["ikl.pt", "ikl_last.pt"]


# --- the config and the command --------------------------------------------------------------------------------------

REST = "train: {}\ntest: {test_data_loader: {}}"
# text: the fragment that matters
YAML = {
    "a: [1": "must be a YAML file, but it is not",
    "[1]": "must hold a mapping, got list",
    f"models: {{}}\n{REST}": "must have the block `datasets:`",
    "datasets: {}\nmodels: {}\ntrain: {}\ntest: {}": "must have the block `test: test_data_loader:`",
    f"datasets: {{}}\nmodels: {{}}\n{REST}": "must have `student_model:` or `model:`",
    f"datasets: {{}}\nmodels: {{model: {{}}}}\n{REST}": "must have `dst_ckpt:`",
    f"datasets: {{}}\nmodels: {{teacher_model: 3}}\n{REST}": "`models: teacher_model:` must be a mapping, got 3",
}


def test_a_config_without_what_it_needs_is_refused(tmp_path):
    path = tmp_path / "some.yaml"
    with pytest.raises(ValueError, match="must be a YAML file, but there is none at"):
        load_config(path)
    for text, message in YAML.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(path)


@pytest.mark.parametrize("line", ["", "dependencies: ['ikl_plugins.torchdistill']\n"])
def test_a_config_without_the_import_is_warned_about(line, tmp_path, caplog):
    path = tmp_path / "some.yaml"
    terms = "{ikl: {criterion: {key: 'IKL'}}}"
    train = f"train: {{pre_epoch_process: 'ikl_pre_epoch_process', criterion: {{kwargs: {{sub_terms: {terms}}}}}}}\n"
    models = "models: {student_model: {key: 'resnet8', dst_ckpt: 'a.pt'}}\n"
    path.write_text(f"{line}datasets: {{}}\n{models}{train}test: {{test_data_loader: {{}}}}\n")
    load_config(path)
    assert ("names IKL, ikl_pre_epoch_process, but does not import them" in caplog.text) is (line == "")


def add_words(config):
    config["datasets"]["digits/val"].transform.transforms.append("several words")


def no_transform(config):
    config["datasets"]["digits/val"].transform = None


def later_stage(config):
    stages(config)["train"]["stage2"]["val_data_loader"] = {"dataset_id": "digits/vla", "kwargs": {}}


TEST, SCHEDULE = ("test", "test_data_loader"), ("train", "scheduler", "kwargs")
TEACHER = ("models", "teacher_model")
# What a run would find out after an epoch or at its end, and how it is told before.
LATE = {
    "no such validation set": (
        change_at("train", "val_data_loader", dataset_id="digits/vla"),
        r"`train: val_data_loader: dataset_id:` must be one of .*'digits/train', .*, got 'digits/vla'",
    ),
    "one of a later stage": (later_stage, r"`train: stage2: val_data_loader: dataset_id:` must be one of"),
    "no such test set": (change_at(*TEST, dataset_id=3), r"`test: test_data_loader: dataset_id:` must be .* got 3"),
    "no name of the test set": (change_at(*TEST, dataset_id=None), r"`test: test_data_loader:` must name"),
    "no validation": (change_at("train", val_data_loader=None), r"`train: val_data_loader:` must name .*, got None"),
    "half a worker": (
        change_at(*TEST, kwargs={"batch_size": 8, "num_workers": 3.5}),
        r"`test: test_data_loader:` with .*'num_workers': 3\.5.* must give batches .* TypeError",
    ),
    "arguments that are none": (change_at(*TEST, kwargs="words"), r"must .* have `kwargs:`, got .*'words'"),
    "images as pictures": (
        no_transform,
        r"`train: val_data_loader:` .* must give .*'digits/val' .*`transform:`\.",
    ),
    "a transform of words": (add_words, r"`train: val_data_loader:` .* `transforms:` step 3, 'several words', .* Ty"),
    "a schedule of words": (change_at(*SCHEDULE, T_max="words"), r"`train: scheduler:` must .*'words'.* TypeError in"),
    "a schedule of 0 epochs": (change_at(*SCHEDULE, T_max=0), r"`train: scheduler:` must .* ZeroDivisionError in its"),
    "epochs without end": (change_at("train", num_epochs=1e30), r"num_epochs:` must be a whole .*, got 1e\+30"),
    "no epochs": (change_at("train", num_epochs=0), r"num_epochs:` must be a whole number of at least 1, got 0"),
    "no loss": (change_at("train", "criterion", kwargs=None), r"criterion:` must give a loss, got 0\. .*sub_terms"),
    "no network": (change_at(*STUDENT, key=None), r"the student must have a network's name as `key:`"),
    "no arguments": (change_at(*STUDENT, kwargs=None), r"the student must have .* arguments as `kwargs:`"),
    "arguments of words": (change_at(*TEACHER, kwargs="words"), r"the teacher must have .* `kwargs:`, got .*'words'"),
    "another teacher": (change_at(*TEACHER, key="ikl_plugins.resnet32"), r"teacher\.pt must fit the model 'ikl_.*32'"),
    "weights in a device": (
        change_at(*TEACHER, src_ckpt="/dev/zero"),
        r"/dev/zero must be a regular file, but is a dev",
    ),
    "weights of words": (change_at(*TEACHER, src_ckpt="words"), r"none at words\. Train it first, or correct the path"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_late_fails_before_the_first_step(workplace, case):
    config = ikl_config()
    change, message = LATE[case]
    change(config)
    with pytest.raises(ValueError, match=rf"^ikl train: .*{message}"):
        run(config, progress=pytest.fail)
    assert not IKL_PATH.exists()


def test_the_command_says_in_one_line_what_to_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .* Train it first: ikl train torchdistill/digits/teacher\.yaml\.$"):
        ikl(["train", "torchdistill/digits/ikl.yaml", "--device", "cpu"])
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^error: ikl train: .*: image_folder: .* Run: ikl data digits"):
        ikl(["train", "torchdistill/digits/ikl.yaml"])


def test_an_interruption_says_how_to_go_on(workplace, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "train_epoch", stop)
    with pytest.raises(SystemExit) as end:
        ikl(["train", str(IKL), "--device", "cpu"])
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted; go on with --start_epoch\n")


def test_a_second_run_is_refused_before_it_writes_anything(workplace, monkeypatch):
    Path("run.log").write_text("of the first")
    with locked("ikl train", IKL_PATH, ""):
        files = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
        for second in (lambda: run(ikl_config()), lambda: ikl(["train", str(IKL), "--run_log", "run.log"])):
            with pytest.raises((ValueError, SystemExit), match=rf"ikl\.pt must have .* process {os.getpid()} on"):
                second()
        assert {path: path.stat().st_mtime_ns for path in workplace.rglob("*")} == files
    with pytest.raises(LookupError):
        run(ikl_config(), progress=lambda *_: [].pop())
    assert not IKL_PATH.with_name("ikl.pt.lock").exists()


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(teachers, data_folder, tmp_path_factory):
    """What two processes end with, by the names of the YAML files: (rank 0's, rank 1's)."""
    folder = tmp_path_factory.mktemp("two_ranks")
    shutil.copytree(teachers, folder / "runs")
    small = [("batch_size: 64", "batch_size: 4"), (r"num_epochs: \d+", "num_epochs: 2")]
    text = replaced(IKL.read_text(), *small)
    files = {"one": text, "adversarial": replaced(ADVERSARIAL.read_text(), *small)}
    files["taught"] = replaced(TAUGHT.read_text(), *small)
    files["drift"] = replaced(
        text,
        (r" +(pre_epoch_process|global_info|warmup_epochs):.*\n", ""),
        ("/ikl/ikl.pt", "/drift/drift.pt"),
    )
    # Stage by stage: a hook on the student, some of it frozen in the first stage and trained in the second.
    head, rest = text.replace("/ikl/ikl.pt", "/stages/stages.pt").split("\ntrain:\n")
    train, test = rest.split("\ntest:\n")
    train = replaced(train, (r"student_module_path: '\.'", "student_module_path: 'fc'"), ("epochs: 2", "epochs: 1"))
    hook = "    forward_hook:\n      output: ['fc']\n"
    frozen = "    frozen_modules: ['conv1', 'layer1']\n"
    parts = [train.replace("  student:\n", f"  student:\n{extra}") for extra in (hook + frozen, hook)]
    parts[1] = re.sub(r"&(\w+)", "", parts[1])  # its anchors are set in the first
    blocks = [f"  stage{n}:\n" + re.sub("^", "  ", part, flags=re.MULTILINE) for n, part in enumerate(parts, 1)]
    files["two_stages"] = f"{head}\ntrain:\n" + "\n".join(blocks) + f"\ntest:\n{test}"
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)

    worker = str(Path(__file__).with_name("two_ranks.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, *files]
    environment = {**os.environ, "IKL_PLUGINS_DATA": str(data_folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, {name: [torch.load(folder / f"{name}{rank}.pt") for rank in (0, 1)] for name in files}


@pytest.mark.parametrize("name", ["one", "two_stages", "adversarial", "taught"])
def test_two_processes_stay_in_step(two_ranks, monkeypatch, name):
    folder, ends = two_ranks
    monkeypatch.chdir(folder)
    first, second = ends[name]
    assert_same(first["end"], second["end"])
    (matrix,) = first["result"]["class_prior"].values()
    assert torch.equal(matrix, *second["result"]["class_prior"].values())
    assert not torch.equal(matrix, torch.full((10, 10), 0.1))
    for ours, theirs in zip(first["result"]["history"], second["result"]["history"], strict=True):
        assert all(ours.get(name) == theirs.get(name) for name in ("val_accuracy", "robust_accuracy"))
    if name == "adversarial":
        robust = ADVERSARIAL_PATH.with_name("adversarial_ikl_best_robust.pt")
        assert load_checkpoint(robust)["best_value"] == first["result"]["history"][-1]["robust_accuracy"]
    path = {"one": IKL_PATH, "adversarial": ADVERSARIAL_PATH, "taught": TAUGHT_PATH}.get(
        name, Path("runs/torchdistill/digits/stages/stages.pt")
    )
    last = weights(last_path(path))
    assert all(torch.equal(value, last[name]) for name, value in first["end"].items())
    assert torch.equal(matrix, record(last_path(path)))
    # Also the modules that are frozen in the first of two stages have moved.
    config = load_config(f"{name}.yaml")
    trainer = training.Trainer(config, torch.device("cpu"), 3)
    assert not torch.equal(trainer.model.conv1.weight, first["end"]["conv1.weight"])
    # 11 and 13 images do not divide among two ranks, and each counts once.
    if name == "one":
        trainer.model.load_state_dict(weights(path))
        loaders = config["train"]["val_data_loader"], config["test"]["test_data_loader"]
        found = [first["result"][name] for name in ("best_val_accuracy", "test_accuracy")]
        assert found == pytest.approx([trainer.accuracy(loader) for loader in loaders])


def test_two_processes_find_the_prior_of_one_and_drift_apart_without_our_process(two_ranks, workplace):
    folder, ends = two_ranks
    drifted = [rank["end"] for rank in ends["drift"]]
    assert any(not torch.equal(value, drifted[1][name]) for name, value in drifted[0].items())
    alone = run(load_config(folder / "one.yaml"), seed=3)  # teacher and images are the same
    for name in ("one", "two_stages"):
        shared = ends[name][0]["result"]["class_prior"]["ikl"]
        torch.testing.assert_close(shared, alone["class_prior"]["ikl"], rtol=1e-6, atol=1e-6)


# --- adversarial training on the real digits -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readmes_commands_train_a_network_that_resists(tmp_path, monkeypatch, capsys):
    """The commands of configs/torchdistill/digits/README.md, with a few epochs."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (CONFIGS / "digits" / "README.md").read_text(), re.DOTALL | re.M)
    Path("robust.py").write_text(snippet)
    few = replaced(ADVERSARIAL.read_text(), (r"num_epochs: \d+", "num_epochs: 3"), ("T_max: 10", "T_max: 3"))
    Path("few.yaml").write_text(few)
    ikl(["data", "digits"])
    ikl(["config", "copy", "torchdistill/digits/ce.yaml"])
    ikl(["train", "few.yaml", "--device", "cpu", "--seed", "0"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["robust.py", str(last_path(ADVERSARIAL_PATH))])
    runpy.run_path("robust.py")
    natural, robust = map(float, capsys.readouterr().out.split())
    assert natural > 70
    assert robust > 10  # of a network trained on natural images alone 0 remain
