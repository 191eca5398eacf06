"""tools/train_torchdistill.py and the shipped configs, on generated images."""

import argparse
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from ikl_plugins.torchdistill import training as train_torchdistill
from ikl_plugins.torchdistill.training import last_path, load_checkpoint, load_config, main, run

from ikl_plugins.models import resnet56

TOOL = Path(train_torchdistill.__file__)
CONFIGS = TOOL.parent.parent / "configs" / "torchdistill"
SHIPPED = sorted(
    str(path.relative_to(CONFIGS))
    for folder in ("digits", "cifar10_folder", "cifar10_miniature")
    for path in (CONFIGS / folder).glob("*.yaml")
)
IKL = CONFIGS / "digits" / "ikl.yaml"
IKL_PATH = Path("runs/torchdistill/digits/ikl/ikl.pt")
ADVERSARIAL = CONFIGS / "digits" / "adversarial_ikl.yaml"
ADVERSARIAL_PATH = Path("runs/torchdistill/digits/adversarial_ikl/adversarial_ikl.pt")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is compared to the bit must not depend on how work is split
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _data(data_folder, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(data_folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(TOOL.parent))


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
        for path in SHIPPED:
            if Path(path).name == "teacher.yaml":
                run(shrink(load_config(CONFIGS / path)))
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


def ikl_config(**kwargs):
    return shrink(load_config(IKL), **{"epochs": 3, **kwargs})


def weights(path):
    return load_checkpoint(path)["model"]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --- the shipped configs ---------------------------------------------------------------------------------------------


def test_there_are_the_promised_configs():
    assert {f"digits/{name}.yaml" for name in ("teacher", "ce", "kd", "dkl", "ikl", "gkl", "adversarial_ikl")} <= set(
        SHIPPED
    )
    assert {f"cifar10_folder/{name}.yaml" for name in ("teacher", "ce", "kd", "ikl", "gkl")} <= set(SHIPPED)
    miniature = ("teacher", "ce", "kd", "dkl", "ikl_no_prior", "ikl", "gkl")
    assert {f"cifar10_miniature/{name}.yaml" for name in miniature} <= set(SHIPPED)
    for folder in CONFIGS.iterdir():
        assert (folder / "README.md").is_file()


@pytest.mark.parametrize("path", SHIPPED)
def test_each_shipped_config_trains(path, workplace):
    result = run(shrink(load_config(CONFIGS / path)))
    (row,) = result["history"]
    assert {"epoch", "lr", "train_loss", "val_accuracy", "seconds_per_step"} <= row.keys()
    assert row["train_loss"] > 0
    assert 0 <= result["test_accuracy"] <= 100
    dataset, name = path.removesuffix(".yaml").split("/")
    best = Path("runs/torchdistill") / dataset / name / f"{name}.pt"
    assert set(load_checkpoint(best)) == {"model", "optimizer", "lr_scheduler", "best_value", "args"}
    # In the style of the recipes, IKL on CIFAR has no class prior.
    term = name.removeprefix("adversarial_").removesuffix("_no_prior")
    with_prior = term in ("ikl", "gkl") and path not in (
        "cifar10_folder/ikl.yaml",
        "cifar10_miniature/ikl_no_prior.yaml",
    )
    assert set(result["class_prior"]) == ({term} if with_prior else set())
    assert (f"{term}/weighted_mse" in row) is (term in ("dkl", "ikl", "gkl"))


@pytest.mark.parametrize("path", SHIPPED)
def test_the_shipped_configs_share_one_shape(path):
    text = (CONFIGS / path).read_text()
    blocks = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert blocks == ["dependencies", "datasets", "models", "train", "test"]
    assert f"python tools/train_torchdistill.py configs/torchdistill/{path}\n" in text
    (written,) = re.findall(r"dst_ckpt: '(.*)'", text)
    dataset, name = path.removesuffix(".yaml").split("/")
    assert written == f"runs/torchdistill/{dataset}/{name}/{name}.pt"


@pytest.mark.parametrize("path", SHIPPED)
def test_upstreams_script_runs_the_shipped_configs(path, workplace):
    script = os.environ.get("IKL_PLUGINS_UPSTREAM_SCRIPT")
    if not script:
        pytest.skip("set IKL_PLUGINS_UPSTREAM_SCRIPT to torchdistill's examples/torchvision/image_classification.py")
    text, changes = re.subn(r"num_epochs: \d+", "num_epochs: 2", (CONFIGS / path).read_text())
    assert changes == 1
    Path("config.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, script, "--config", "config.yaml", "--device", "cpu", "--seed", "0"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
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


def as_it_is(config):
    return config


@pytest.mark.parametrize(
    ("change", "stop", "epochs"), [(as_it_is, 2, 3), (accumulate, 1, 3), (stages, 1, 4), (stages, 2, 4), (stages, 3, 4)]
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(workplace, change, stop, epochs):
    whole = run(change(ikl_config()), seed=5)
    shutil.move(IKL_PATH.parent, "whole")

    class StopError(Exception):
        pass

    def interrupt(step, steps, text):
        if step == 3 * stop + 2:  # in the middle of an epoch
            raise StopError

    with pytest.raises(StopError):
        run(change(ikl_config()), seed=5, progress=interrupt)
    assert load_checkpoint(last_path(IKL_PATH))["epoch"] == stop
    resumed = run(change(ikl_config()), seed=5, start_epoch=stop)

    assert torch.equal(resumed["class_prior"]["ikl"], whole["class_prior"]["ikl"])
    assert not torch.equal(whole["class_prior"]["ikl"], torch.full((10, 10), 0.1))
    for name in (IKL_PATH.name, last_path(IKL_PATH).name):
        assert_same(weights(IKL_PATH.with_name(name)), weights(Path("whole") / name))
    assert len(resumed["history"]) == epochs
    for ours, theirs in zip(resumed["history"], whole["history"], strict=True):
        ours.pop("seconds_per_step")
        assert ours.items() <= theirs.items()
    assert resumed["test_accuracy"] == whole["test_accuracy"]


def test_a_resumed_adversarial_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def adversarial(start_epoch=0, progress=None):
        run(shrink(load_config(ADVERSARIAL), epochs=3), seed=5, start_epoch=start_epoch, progress=progress)
        return load_checkpoint(last_path(ADVERSARIAL_PATH))

    whole = adversarial()

    class StopError(Exception):
        pass

    def interrupt(step, steps, text):
        if step == 5:  # in the middle of the second epoch, in which eps is another than in the first
            raise StopError

    with pytest.raises(StopError):
        adversarial(progress=interrupt)
    assert load_checkpoint(last_path(ADVERSARIAL_PATH))["epoch"] == 1
    resumed = adversarial(start_epoch=1)
    assert_same(resumed["model"], whole["model"])
    records = [content["optimizer"]["param_groups"][0]["ikl_plugins"]["ikl"] for content in (resumed, whole)]
    assert torch.equal(records[0]["matrix"], records[1]["matrix"])
    for ours, theirs in zip(resumed["history"], whole["history"], strict=True):
        ours.pop("seconds_per_step")
        assert ours.items() <= theirs.items()


def test_a_killed_process_is_resumed(workplace):
    whole = run(ikl_config(), seed=5)
    shutil.move(IKL_PATH.parent, "whole")
    Path("killed.py").write_text(
        "import os, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from train_torchdistill import load_config, run\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_train_torchdistill import ikl_config\n"
        "def kill(step, steps, text):\n"
        "    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(ikl_config(), seed=5, progress=kill)\n"
    )
    done = subprocess.run([sys.executable, "killed.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = load_checkpoint(last_path(IKL_PATH))
    assert last["epoch"] == 1
    record = last["optimizer"]["param_groups"][0]["ikl_plugins"]["ikl"]
    assert not torch.equal(record["matrix"], torch.full((10, 10), 0.1))

    resumed = run(ikl_config(), seed=5, start_epoch=1)
    assert torch.equal(resumed["class_prior"]["ikl"], whole["class_prior"]["ikl"])
    assert_same(weights(last_path(IKL_PATH)), weights(Path("whole") / last_path(IKL_PATH).name))


def test_without_the_record_the_prior_would_be_lost(workplace):
    """What the resume tests guard: take the record out of the checkpoint, and the run ends differently."""
    run(ikl_config(), seed=5)
    whole = weights(last_path(IKL_PATH))
    run(ikl_config(epochs=1), seed=5)
    content = load_checkpoint(last_path(IKL_PATH))
    del content["optimizer"]["param_groups"][0]["ikl_plugins"]
    torch.save(content, last_path(IKL_PATH))
    run(ikl_config(), seed=5, start_epoch=1)
    assert any(not torch.equal(value, whole[name]) for name, value in weights(last_path(IKL_PATH)).items())


def test_the_seed_decides(workplace):
    results = []
    for seed in (5, 5, 6):
        run(ikl_config(epochs=1), seed=seed)
        results.append(weights(IKL_PATH))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["fc.weight"], results[2]["fc.weight"])


def test_a_finished_run_may_be_tested_again(workplace):
    first = run(ikl_config(epochs=1))
    again = run(ikl_config(epochs=1), start_epoch=1)
    assert again["test_accuracy"] == first["test_accuracy"]
    assert again["history"] == first["history"]


def test_resuming_needs_what_fits(workplace):
    def refused(message, config=None, **kwargs):
        with pytest.raises(ValueError, match=message):
            run(config or ikl_config(), **kwargs)

    refused(
        r"--start_epoch 2 needs the last checkpoint.*none at .*ikl_last\.pt\. Start with --start_epoch 0", start_epoch=2
    )
    run(ikl_config(epochs=1))
    refused(r"--start_epoch must lie between 0 and the 3 epochs of the config, got 4", start_epoch=4)
    refused(r"--start_epoch must lie between 0 and the 3 epochs of the config, got -1", start_epoch=-1)
    refused(r"number of finished epochs, 1 in .*, got 2\. Use --start_epoch 1", start_epoch=2)
    refused(r"must have the seed of .*ikl_last\.pt, 0, got 9", start_epoch=1, seed=9)

    other = ikl_config()
    other["models"]["student_model"]["key"] = "ikl_plugins.resnet14"
    refused(r"ikl_last\.pt must fit the model 'ikl_plugins\.resnet14'", other, start_epoch=1)
    other = ikl_config()
    other["train"]["optimizer"] = {"key": "SGD", "kwargs": {"lr": 0.1}, "module_wise_configs": [{"module": "fc"}]}
    refused(r"ikl_last\.pt must fit the optimizer and scheduler of the config", other, start_epoch=1)
    other = stages(ikl_config())
    other["train"]["student"] = {"dst_ckpt": "stage.pt"}
    refused(r"keeps a checkpoint of each stage \(`train: student: dst_ckpt:`\) cannot be resumed", other, start_epoch=1)

    shutil.copy(IKL_PATH, last_path(IKL_PATH))
    refused(r"must be a last checkpoint of this driver, but lacks epoch, history, modules, gradients", start_epoch=1)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "garbage", "pickle", "evil", "list"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some.pt"
    torch.save({"model": {}, "args": argparse.Namespace(a=1)}, path)
    assert load_checkpoint(path)["args"].a == 1
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint" * 50)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"model": Evil()}))
    elif damage == "evil":
        torch.save({"model": Evil()}, path)
    else:
        torch.save([1, 2], path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_checkpoint(path)
    assert not (tmp_path / "hacked").exists()


def test_a_failed_write_leaves_the_old_file(workplace, monkeypatch):
    run(ikl_config(epochs=1))
    before = last_path(IKL_PATH).read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{IKL_PATH}'"):
        run(ikl_config(epochs=1))
    assert last_path(IKL_PATH).read_bytes() == before
    assert sorted(path.name for path in IKL_PATH.parent.iterdir()) == ["ikl.pt", "ikl_last.pt"]


def test_a_missing_teacher_names_the_config_that_trains_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = (
        "`src_ckpt` of the teacher must be a checkpoint file, but there is none at runs/torchdistill/digits/teacher/"
        "teacher.pt. Train it first: python tools/train_torchdistill.py configs/torchdistill/digits/teacher.yaml."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(ikl_config())
    config = ikl_config()
    config["models"]["teacher_model"]["src_ckpt"] = "elsewhere.pt"
    with pytest.raises(ValueError, match=r"none at elsewhere\.pt\. Train it first, or correct the path\."):
        run(config)


def test_a_teacher_of_another_kind_is_refused(workplace):
    config = ikl_config()
    config["models"]["teacher_model"]["key"] = "ikl_plugins.resnet32"
    with pytest.raises(ValueError, match=r"teacher\.pt must fit the model 'ikl_plugins\.resnet32'"):
        run(config)


def test_a_bare_state_dict_gives_initial_weights(workplace):
    torch.save(weights("runs/torchdistill/digits/teacher/teacher.pt"), "bare.pt")
    config = ikl_config(epochs=1)
    config["models"]["teacher_model"]["src_ckpt"] = "bare.pt"
    assert run(config)["history"]


# --- the config and the command --------------------------------------------------------------------------------------


def test_a_missing_data_folder_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"digits/train: no such folder\. Run: python tools/prepare_data\.py digits"):
        load_config(IKL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the config must be a YAML file, but there is none at"),
        ("a: [1", "must be a YAML file, but it is not"),
        ("[1]", "must hold a mapping, got list"),
        ("models: {}\ntrain: {}\ntest: {test_data_loader: {}}", "must have the block `datasets:`"),
        ("datasets: {}\nmodels: {}\ntrain: {}\ntest: {}", "must have the block `test: test_data_loader:`"),
        ("datasets: {}\nmodels: {}\ntrain: {}\ntest: {test_data_loader: {}}", "must have `student_model:` or `model:`"),
        ("datasets: {}\nmodels: {model: {}}\ntrain: {}\ntest: {test_data_loader: {}}", "must say with `dst_ckpt:`"),
        (
            "datasets: {}\nmodels: {model: {dst_ckpt: a}, teacher_model: 3}\ntrain: {}\ntest: {test_data_loader: {}}",
            "`models: teacher_model:` must be a mapping, got 3",
        ),
    ],
)
def test_a_config_without_what_it_needs_is_refused(tmp_path, text, message):
    path = tmp_path / "some.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_misspelled_keyword_ends_the_command_with_one_line(workplace):
    Path("wrong.yaml").write_text(IKL.read_text().replace("weight_temperature:", "weigth_temperature:"))
    with pytest.raises(
        SystemExit, match=r"^error: IKLLoss: unknown keyword `weigth_temperature`\. Did you mean `weight_temp"
    ):
        main(["wrong.yaml", "--device", "cpu"])


def no_transform(config):
    config["datasets"]["digits/val"].transform = None


# What a run would find out after an epoch or at its end, and how it is told before.
LATE = {
    "no such validation set": (
        lambda config: config["train"]["val_data_loader"].update(dataset_id="digits/vla"),
        r"`train: val_data_loader: dataset_id:` must be one of `datasets:`, 'digits/train', .*, got 'digits/vla'",
    ),
    "no such test set": (
        lambda config: config["test"]["test_data_loader"].update(dataset_id=None),
        r"`test: test_data_loader: dataset_id:` must be one of `datasets:`, .*, got None",
    ),
    "no name of the test set": (
        lambda config: config["test"]["test_data_loader"].pop("dataset_id"),
        r"`test: test_data_loader:` must name a data set as `dataset_id:`",
    ),
    "no validation": (
        lambda config: config["train"].pop("val_data_loader"),
        r"`train: val_data_loader:` must name a data set as `dataset_id:` and have `kwargs:`, got None",
    ),
    "half a worker": (
        lambda config: config["test"]["test_data_loader"].update(kwargs={"batch_size": 8, "num_workers": 3.5}),
        r"`test: test_data_loader:` with .*'num_workers': 3\.5.* must give batches .* TypeError",
    ),
    "arguments that are none": (
        lambda config: config["test"]["test_data_loader"].update(kwargs="several words"),
        r"`test: test_data_loader:` must .* have `kwargs:`, got .*'several words'",
    ),
    "images as pictures": (
        no_transform,
        r"`train: val_data_loader:` .* must give batches .*'digits/val' .* are None\.",
    ),
    "a transform of words": (
        lambda config: config["datasets"]["digits/val"].transform.transforms.append("several words"),
        r"`train: val_data_loader:` .* TypeError: .* whose `transforms:` are Compose\((\s.*)*several words",
    ),
    "a network without arguments": (
        lambda config: config["models"]["student_model"].pop("kwargs"),
        r"the student must have .* its arguments as `kwargs:`",
    ),
    "a schedule of words": (
        lambda config: config["train"]["scheduler"]["kwargs"].update(T_max="several words"),
        r"`train: scheduler:` must be a schedule .*'T_max': 'several words'.* TypeError in its first step",
    ),
    "a schedule of 0 epochs": (
        lambda config: config["train"]["scheduler"]["kwargs"].update(T_max=0),
        r"`train: scheduler:` must be a schedule .*'T_max': 0.* ZeroDivisionError in its first step",
    ),
    "epochs without end": (
        lambda config: config["train"].update(num_epochs=1e30),
        r"`train: num_epochs:` must be a whole number of at least 1, got 1e\+30",
    ),
    "no epochs": (lambda config: config["train"].update(num_epochs=0), r"`train: num_epochs:` must .*, got 0\. "),
    "no loss": (
        lambda config: config["train"]["criterion"].pop("kwargs"),
        r"`train: criterion:` must give a loss as a tensor, got 0\. .*sub_terms",
    ),
    "a network without a name": (
        lambda config: config["models"]["student_model"].pop("key"),
        r"the student must have the name of a network as `key:`",
    ),
    "a network with words": (
        lambda config: config["models"]["teacher_model"].update(kwargs="several words"),
        r"the teacher must have .* its arguments as `kwargs:`, got .*'several words'",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_after_an_epoch_fails_before_the_first_step(workplace, case):
    config = ikl_config()
    change, message = LATE[case]
    change(config)
    with pytest.raises(ValueError, match=rf"^train_torchdistill: .*{message}"):
        run(config, progress=pytest.fail)
    assert not IKL_PATH.exists()


def test_the_rehearsal_changes_nothing(workplace, monkeypatch):
    rehearsed = run(ikl_config())
    content = load_checkpoint(last_path(IKL_PATH))
    monkeypatch.setattr(train_torchdistill.Trainer, "rehearse", lambda self: None)
    assert [row["lr"] for row in run(ikl_config())["history"]] == [row["lr"] for row in rehearsed["history"]]
    plain = load_checkpoint(last_path(IKL_PATH))
    assert_same(content["model"], plain["model"])
    assert content["lr_scheduler"] == plain["lr_scheduler"]


def test_a_loss_that_is_not_finite_ends_the_run(workplace):
    config = ikl_config()
    config["train"]["optimizer"]["kwargs"]["lr"] = 1e30
    with pytest.raises(ValueError, match=r"the loss must stay finite, got \S+ in epoch 0, step \d"):
        run(config)


def test_a_model_that_returns_no_logits_is_refused(workplace):
    config = ikl_config(epochs=1)
    config["models"]["student_model"] |= {"key": "googlenet", "kwargs": {"num_classes": 10, "init_weights": False}}
    trainer = train_torchdistill.Trainer(config, torch.device("cpu"), 0)
    trainer.model.forward = lambda images: {"out": images}
    with pytest.raises(ValueError, match=r"'googlenet' must return a tensor of logits to be evaluated, got dict"):
        trainer.accuracy(config["test"]["test_data_loader"])


def test_progress_counts_every_step(workplace):
    calls = []
    run(ikl_config(epochs=2), progress=lambda *call: calls.append(call))
    assert calls == [(step, 6, f"epoch {1 + (step > 3)}/2") for step in range(1, 7)]


def test_the_command_trains_and_writes_its_log(workplace):
    text, changes = re.subn(r"num_epochs: \d+", "num_epochs: 1", IKL.read_text())
    assert changes == 1
    Path("one.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, str(TOOL), "one.yaml", "--device", "cpu", "--seed", "4", "--run_log", "logs/one.txt"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = Path("logs/one.txt").read_text()
    assert "ikl/weighted_mse: " in log
    assert re.search(r"test accuracy of the best checkpoint: \d", log)
    assert load_checkpoint(IKL_PATH)["args"].seed == 4


# --- two processes ---------------------------------------------------------------------------------------------------


def launch(*names):
    """What two processes end with, by the names of the YAML files here: (rank 0's, rank 1's)."""
    worker = str(Path(__file__).with_name("two_ranks.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, *names],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: [torch.load(f"{name}{rank}.pt") for rank in (0, 1)] for name in names}


@pytest.fixture
def two_ranks(workplace):
    """One process pair's runs of three configs."""
    text = IKL.read_text().replace("batch_size: 64", "batch_size: 4")
    text = re.sub(r"num_epochs: \d+", "num_epochs: 2", text)
    Path("one.yaml").write_text(text)
    Path("drift.yaml").write_text(
        re.sub(r" +(pre_epoch_process|global_info|warmup_epochs):.*\n", "", text).replace(
            "/ikl/ikl.pt", "/drift/drift.pt"
        )
    )
    # Stage by stage: a hook on the student, some of it frozen in the first stage and trained in the second.
    head, rest = text.replace("/ikl/ikl.pt", "/stages/stages.pt").split("\ntrain:\n")
    train, test = rest.split("\ntest:\n")
    train = train.replace("student_module_path: '.'", "student_module_path: 'fc'").replace(
        "num_epochs: 2", "num_epochs: 1"
    )
    hook = "    forward_hook:\n      output: ['fc']\n"
    frozen = "    frozen_modules: ['conv1', 'layer1']\n"
    stages = [train.replace("  student:\n", f"  student:\n{extra}") for extra in (hook + frozen, hook)]
    anchors = re.compile(r"&(\w+)")
    stages[1] = anchors.sub("", stages[1])
    blocks = [f"  stage{n}:\n" + re.sub("^", "  ", stage, flags=re.MULTILINE) for n, stage in enumerate(stages, 1)]
    Path("two_stages.yaml").write_text(head + "\ntrain:\n" + "\n".join(blocks) + "\ntest:\n" + test)

    return launch("one", "two_stages", "drift")


def test_two_processes_stay_in_step_and_find_the_prior_of_one(two_ranks):
    for name in ("one", "two_stages"):
        first, second = two_ranks[name]
        assert_same(first["end"], second["end"])
        assert torch.equal(first["result"]["class_prior"]["ikl"], second["result"]["class_prior"]["ikl"])
        for ours, theirs in zip(first["result"]["history"], second["result"]["history"], strict=True):
            assert ours["val_accuracy"] == theirs["val_accuracy"]
    drifted = [rank["end"] for rank in two_ranks["drift"]]
    assert any(not torch.equal(value, drifted[1][name]) for name, value in drifted[0].items())  # without our process

    first = two_ranks["one"][0]
    last = load_checkpoint(last_path(IKL_PATH))
    assert all(torch.equal(value, last["model"][name]) for name, value in first["end"].items())
    assert torch.equal(
        first["result"]["class_prior"]["ikl"], last["optimizer"]["param_groups"][0]["ikl_plugins"]["ikl"]["matrix"]
    )
    # The frozen modules of the first stage were trained in the second.
    start = train_torchdistill.Trainer(load_config("one.yaml"), torch.device("cpu"), 3).model
    assert not torch.equal(start.conv1.weight, two_ranks["two_stages"][0]["end"]["conv1.weight"])

    # Each image is counted once: 11 and 13 images do not divide among two ranks.
    best = load_checkpoint(IKL_PATH)["model"]
    config = load_config("one.yaml")
    trainer = train_torchdistill.Trainer(config, torch.device("cpu"), 0)
    trainer.model.load_state_dict(best)
    for accuracy, loader, images in (
        (first["result"]["best_val_accuracy"], config["train"]["val_data_loader"], 11),
        (first["result"]["test_accuracy"], config["test"]["test_data_loader"], 13),
    ):
        assert accuracy * images / 100 == pytest.approx(round(accuracy * images / 100), abs=1e-9)
        assert accuracy == pytest.approx(trainer.accuracy(loader))

    # Teacher and images are the same, so the prior of one process is.
    alone = run(load_config("one.yaml"), seed=3)
    for name in ("one", "two_stages"):
        shared = two_ranks[name][0]["result"]["class_prior"]["ikl"]
        torch.testing.assert_close(shared, alone["class_prior"]["ikl"], rtol=1e-6, atol=1e-6)


def test_two_processes_stay_in_step_in_adversarial_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ADVERSARIAL.read_text().replace("batch_size: 64", "batch_size: 4")
    Path("adversarial.yaml").write_text(re.sub(r"num_epochs: \d+", "num_epochs: 2", text))
    first, second = launch("adversarial")["adversarial"]
    assert_same(first["end"], second["end"])
    matrix = first["result"]["class_prior"]["ikl"]
    assert torch.equal(matrix, second["result"]["class_prior"]["ikl"])
    torch.testing.assert_close(matrix.sum(1), torch.ones(10))
    assert not torch.equal(matrix, torch.full((10, 10), 0.1))
    # Each rank has attacked its own images, with its own draws.
    last = load_checkpoint(last_path(ADVERSARIAL_PATH))
    assert all(torch.equal(value, last["model"][name]) for name, value in first["end"].items())
    start = train_torchdistill.Trainer(load_config("adversarial.yaml"), torch.device("cpu"), 3).model
    assert not torch.equal(start.conv1.weight, first["end"]["conv1.weight"])


# --- adversarial training on the real digits -------------------------------------------------------------------------


def test_the_readmes_commands_train_a_network_that_resists(tmp_path, monkeypatch):
    """The commands of configs/torchdistill/digits/README.md, with a few epochs."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (CONFIGS / "digits" / "README.md").read_text(), re.DOTALL | re.M)
    (tmp_path / "robust.py").write_text(snippet)
    for folder in ("tools", "configs"):
        (tmp_path / folder).symlink_to(TOOL.parent.parent / folder)
    text, changes = re.subn(r"num_epochs: \d+", "num_epochs: 3", ADVERSARIAL.read_text())
    assert changes == 1
    (tmp_path / "few.yaml").write_text(text.replace("T_max: 10", "T_max: 3"))

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    command("tools/prepare_data.py", "digits")
    command("tools/train_torchdistill.py", "few.yaml", "--device", "cpu", "--seed", "0")
    natural, robust = map(float, command("robust.py", str(last_path(ADVERSARIAL_PATH))).split())
    assert natural > 70
    assert robust > 10  # of a network trained on natural images alone 0 remain
