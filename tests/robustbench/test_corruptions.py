"""Evaluations under corruptions: RobustBench's own numbers, from its own loaders, with a log to go on from."""

import csv

import numpy as np
import pytest
import torch
from quick_autoattack import Interruption, message, without_times
from torch import nn

from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.robustbench.data import Images, content_sha256
from ikl_plugins.robustbench.evaluation.corruptions import evaluate_corruptions
from ikl_plugins.robustbench.evaluation.log import Evaluation

robustbench = import_robustbench()
BenchmarkDataset, ThreatModel = robustbench.data.BenchmarkDataset, robustbench.data.ThreatModel
CORRUPTIONS = robustbench.data.CORRUPTIONS


# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """CIFAR-10-C of 4x4 pixels, with 10,000 images per severity as RobustBench's loader wants it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "CIFAR-10-C").mkdir()
    random = np.random.default_rng(0)
    for corruption in CORRUPTIONS:
        pixels = random.integers(0, 256, (50000, 4, 4, 3), dtype=np.uint8)
        np.save(folder / "CIFAR-10-C" / f"{corruption}.npy", pixels)
    np.save(folder / "CIFAR-10-C" / "labels.npy", random.integers(0, 10, 50000))
    return folder


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """A working directory with RobustBench's table, and AlexNet in it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_info" / "cifar10" / "corruptions" / "unaggregated_results.csv"
    path.parent.mkdir(parents=True)
    columns = [(corruption, severity) for corruption in CORRUPTIONS for severity in range(1, 6)]
    random = np.random.default_rng(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *(corruption for corruption, _ in columns)])
        writer.writerow(["", *(severity for _, severity in columns)])
        writer.writerow(["Other", *random.random(75)])
        writer.writerow(["AlexNet", *random.random(75)])
    return path


def theirs(model, folder, monkeypatch, count):
    """RobustBench's own function. It calls its CIFAR loader with a keyword that the loader does not have."""
    loaders = robustbench.data.CORRUPTION_DATASET_LOADERS[BenchmarkDataset.cifar_10]
    load = robustbench.data.load_cifar10c
    with monkeypatch.context() as patch:
        patch.setitem(loaders, ThreatModel.corruptions, lambda *args, prepr, **named: load(*args, **named))
        return robustbench.eval.corruptions_evaluation(
            32,
            str(folder),
            BenchmarkDataset.cifar_10,
            ThreatModel.corruptions,
            torch.device("cpu"),
            model,
            count,
            False,
            None,
            "ours",
        )


def test_accuracy_under_corruptions_is_robustbenchs(corrupted, alexnet, monkeypatch, capsys):
    model = linear()
    accuracy, mce = theirs(model, corrupted, monkeypatch, 100)
    images, labels = torch.rand(30, 3, 4, 4), torch.arange(30) % 10
    natural = Images(images, labels, None, "made up", "not read")
    made = []
    found = evaluate_corruptions(
        model, "cifar10", data_dir=corrupted, n_examples=100, natural=natural, batch_size=32, progress=made.append
    )
    assert found.robust_accuracy == pytest.approx(100 * accuracy)
    assert found.log["corruptions_mce"] == pytest.approx(100 * mce)
    assert found.log["corruptions_mce_note"] is None
    with torch.no_grad():
        expected = 100 * model(images).argmax(1).eq(labels).float().mean().item()
    assert found.natural_accuracy == pytest.approx(expected)
    entries = found.log["corruptions"]
    assert [(entry["corruption"], entry["severity"]) for entry in entries] == [
        (corruption, severity) for corruption in CORRUPTIONS for severity in range(1, 6)
    ]
    pixels = np.load(corrupted / "CIFAR-10-C" / "snow.npy")[20000:20100].transpose(0, 3, 1, 2) / np.float32(255)
    true = np.load(corrupted / "CIFAR-10-C" / "labels.npy")[:100]
    entry = entries[5 * CORRUPTIONS.index("snow") + 2]
    with torch.no_grad():
        right = model(torch.from_numpy(pixels.astype(np.float32))).argmax(1).numpy() == true
    assert entry["accuracy"] == pytest.approx(100 * right.mean())
    assert entry["sha256"] == content_sha256(torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(true))
    log = found.log
    assert (log["threat_model"], log["dataset"], log["eps"], log["standard"]) == ("corruptions", "cifar10", None, False)
    assert (log["robust"], log["fell_to"], log["attacks"], log["finished"]) == (None, None, [], True)
    assert [(event.attack, event.batch, event.batches, event.n_examples) for event in made[:2]] == [
        ("shot_noise/1", 1, 75, 100),
        ("shot_noise/2", 2, 75, 100),
    ]
    assert [event.standing for event in made] == [round(entry["accuracy"]) for entry in entries]


def test_interrupted_corruptions_go_on(corrupted, alexnet, tmp_path, monkeypatch):
    model, path = linear(), tmp_path / "log.json"
    options = {"data_dir": corrupted, "n_examples": 20}
    whole = evaluate_corruptions(model, "cifar10", log=tmp_path / "whole.json", **options)

    def stop(event):
        if event.batch == 7:
            raise Interruption

    with pytest.raises(Interruption):
        evaluate_corruptions(model, "cifar10", log=path, progress=stop, **options)
    partial = Evaluation.load(path)
    assert (partial.finished, len(partial.log["corruptions"])) == (False, 7)
    made = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # neither reaches it
        resumed = evaluate_corruptions(model, "cifar10", log=path, progress=made.append, **options)
    assert len(made) == 68
    assert without_times(resumed.log) == without_times(whole.log)
    assert without_times(Evaluation.load(path).log) == without_times(whole.log)
    assert whole.log["corruptions_mce"] is not None
    with message("has other weights. Name another file"):
        evaluate_corruptions(linear(1), "cifar10", log=path, **options)
    with message("has other n_examples 20 instead of 21"):
        evaluate_corruptions(model, "cifar10", log=path, data_dir=corrupted, n_examples=21)
    load = robustbench.data.load_cifar10c
    loaders = robustbench.data.CORRUPTION_DATASET_LOADERS[BenchmarkDataset.cifar_10]
    monkeypatch.setitem(loaders, ThreatModel.corruptions, lambda *args: (load(*args)[0] / 2, load(*args)[1]))
    with message("has other data (shot_noise, severity 1)"):
        evaluate_corruptions(model, "cifar10", log=path, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_examples": 10001}, "`n_examples` must be at most 10000"),
        ({"n_examples": 0}, "`n_examples` must be"),
        ({"dataset": "cifar11"}, "unknown data set `cifar11`. Did you mean `cifar10`?"),
        ({"threat_model": "corruptions_3d"}, "unknown threat model of cifar10 `corruptions_3d`. Did you mean"),
        ({"model": linear().train()}, "`model` must be in eval mode"),
    ],
)
def test_bad_input_for_corruptions_is_refused(corrupted, options, text):
    given = {"model": linear(), "dataset": "cifar10", "data_dir": corrupted, **options}
    with message(text):
        evaluate_corruptions(**given)


def test_corruptions_that_are_not_there_are_refused(tmp_path, monkeypatch):
    root = tmp_path / "CIFAR-10-C"
    text = f"the corrupted images of cifar10 must lie in {root}, but {root / 'labels.npy'}, {root / 'shot_noise.npy'}, "
    with message(text) as caught:
        evaluate_corruptions(linear(), "cifar10", data_dir=tmp_path, offline=True)
    assert "and 13 more missing" in str(caught.value)
    assert "CIFAR-10-C.tar of https://zenodo.org/records/2535967" in str(caught.value)

    def no_network(*_, **__):
        raise AssertionError("this would download")

    monkeypatch.setattr(robustbench.data, "zenodo_download", no_network)
    with pytest.raises(AssertionError, match="this would download"):
        evaluate_corruptions(linear(), "cifar10", data_dir=tmp_path)
    root.mkdir()
    with message(text):  # RobustBench downloads a missing folder, and nothing into one that is there
        evaluate_corruptions(linear(), "cifar10", data_dir=tmp_path)
    root = tmp_path / "ImageNet-3DCC"
    with message(f"the corrupted images of imagenet must lie in {root}, but {root / 'near_focus' / '1'}, "):
        evaluate_corruptions(linear(), "imagenet", data_dir=tmp_path, threat_model="corruptions_3d")
