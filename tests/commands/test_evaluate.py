"""`ikl evaluate`, and what its command line shares with `ikl submit` and `ikl rank`."""

import argparse
import collections
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick_autoattack import write_network_and_images
from torch import nn

# By its companion: the folder tests/robustbench would be found under its own name.
if None in (importlib.util.find_spec("pyautoattack"), importlib.util.find_spec("matplotlib")):
    pytest.skip("needs robustbench and matplotlib (extra `demo`)", allow_module_level=True)

from ikl_plugins._files import configs_folder
from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.commands import evaluate as command
from ikl_plugins.commands import model_options
from ikl_plugins.commands.main import main as ikl
from ikl_plugins.commands.model_options import (
    LoadedModel,
    add_data_arguments,
    add_model_arguments,
    images_from,
    model_from,
)
from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench import data, evaluation, image_models, loading, mmpretrain_data, torchdistill_data
from ikl_plugins.robustbench.evaluation import curve, evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation

pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
robustbench = import_robustbench()
ATTACKS = "apgd-ce,apgd-t"


class Quick(robustbench.eval.AutoAttack):
    """AutoAttack with few steps: what it finds is tested elsewhere."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter, attack.n_iter_2, attack.n_iter_min = 3, 1, 1
        self.apgd_targeted.n_target_classes = 2
        self.fab.n_iter = 2
        self.square.n_queries = 5


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small WideResNet, images that it gets right but for one, and the same images as class folders."""
    folder = tmp_path_factory.mktemp("files")
    model, images, labels = write_network_and_images(folder, 6, wrong=1)
    for label in range(10):
        (folder / "folder" / f"class{label}").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "folder" / f"class{label}" / "0.png")
    return collections.namedtuple("Files", "folder model images labels")(folder, model, images, labels)


def line(files, output, *more):
    place = files.folder
    model = f"--checkpoint {place}/net.pt --architecture WideResNet-10-1 --data {place}/images.npz"
    return [*f"{model} --eps 1/255 --device cpu --output {output}".split(), *more]


def main(*arguments):
    ikl(["evaluate", *(str(argument) for argument in arguments)])


def failure(*arguments):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    text = caught.value.code
    assert isinstance(text, str)
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_evaluates_and_reports(files, tmp_path, capsys):
    main(*line(files, tmp_path, "--attacks", ATTACKS, "--batch-size", "4", "--seed", "3"))
    direct = evaluate(
        files.model, files.images, files.labels, eps="1/255", attacks=ATTACKS.split(","), batch_size=4, seed=3
    )
    log = json.loads((tmp_path / "evaluation.json").read_text())
    for key in ("predictions", "natural_predictions", "robust", "fell_to", "attacks", "eps", "weights_sha256", "seed"):
        assert log[key] == direct.log[key], key
    assert (log["model"], log["checkpoint"]["name"], log["finished"]) == ("WideResNet-10-1", "net.pt", True)
    assert log["data"]["name"] == str(files.folder / "images.npz")
    loaded = Evaluation.load(tmp_path / "evaluation.json")
    assert torch.equal(loaded.adversarial_images(files.images), direct.adversarial_images(files.images))
    assert 0 < len(loaded.adversarial) < 5
    assert (tmp_path / "report.md").read_text().startswith("# Robustness of WideResNet-10-1")
    shown, progress = capsys.readouterr()
    for entry in log["progress"]:
        assert f"{entry['attack']}: {entry['standing']} of 6 standing" in progress
    refused = [line for line in shown.splitlines() if line.startswith("RobustBench would not take the result: ")]
    (line_on_attacks,) = refused  # and none on the network, which is RobustBench's own
    assert "be of standard AutoAttack" in line_on_attacks
    assert shown.index(line_on_attacks) < shown.index("robust accuracy")
    assert f"natural accuracy 83.33 %, robust accuracy {direct.robust_accuracy:.2f} %" in shown


def test_adversarial_images_are_exported_and_another_evaluation_reads_them(files, tmp_path, capsys):
    exported = tmp_path / "adversarial.npz"
    main(*line(files, tmp_path / "a", "--attacks", "apgd-ce", "--export", exported))
    assert f"adversarial images: {exported}" in capsys.readouterr().out
    again = line(files, tmp_path / "b", "--attacks", "apgd-ce")
    again[again.index("--data") + 1] = exported
    main(*again)
    robust, natural = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert natural["natural_correct"] == robust["robust"]
    assert "must end with .npz or .pt, got images.pth" in failure(*again, "--export", "images.pth")
    corrupted = ["--threat-model", "corruptions", "--export", "a.pt"]
    words = [
        word for word in line(files, tmp_path) if word not in ("--eps", "1/255", "--data", f"{files.folder}/images.npz")
    ]
    assert "--threat-model corruptions does not read --export" in failure(*words, *corrupted)


def test_a_second_run_reads_what_the_first_has_found(files, tmp_path, monkeypatch, capsys):
    arguments = line(files, tmp_path, "--attacks", ATTACKS, "--curve", "1/510,4/255")
    main(*arguments)
    before = (tmp_path / "evaluation.json").read_text()
    expected = curve(files.model, files.images, files.labels, ["1/510", "4/255"], attacks=ATTACKS.split(","))
    assert json.loads(before)["curve"] == expected
    output = capsys.readouterr().err
    assert re.search(r"^eps 1/510, apgd-ce: \d of 6 standing", output, re.MULTILINE)
    assert (tmp_path / "robust_accuracy.png").exists()
    assert (tmp_path / "curve" / "eps_1-510.json").exists()
    (tmp_path / "report.md").unlink()

    with monkeypatch.context() as patch:  # no attack runs again
        patch.setattr(type(Quick(files.model, norm="Linf", eps=0.1, verbose=False).apgd), "perturb", None)
        main(*arguments)
    assert (tmp_path / "evaluation.json").read_text() == before
    assert (tmp_path / "report.md").exists()
    main(*arguments[:-1], "4/255")
    points = json.loads((tmp_path / "evaluation.json").read_text())["curve"]
    assert [point["eps"] for point in points] == ["4/255"]


def test_standard_l2_and_a_folder(files, tmp_path, capsys):
    arguments = line(files, tmp_path, "--threat-model", "L2", "--n-examples", "4")
    arguments[arguments.index("--data") + 1] = str(files.folder / "folder")
    arguments[arguments.index("--eps") + 1] = "0.5"
    main(*arguments)
    log = json.loads((tmp_path / "evaluation.json").read_text())
    assert (log["threat_model"], log["eps"], log["standard"], log["version"]) == ("L2", "0.5", True, "standard")
    assert (log["n_examples"], log["labels"]) == (4, [0, 1, 2, 3])
    assert log["classes"] == [f"class{label}" for label in range(10)]
    assert "(L2, eps 0.5, standard AutoAttack)" in capsys.readouterr().out


def test_attacks_of_others_and_a_quick_look(files, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "robustbench.md").read_text(encoding="utf-8")
    (attack,) = re.findall(r"^```python\n(def attack\(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine_of_test.py").write_text(f"import torch\n\n\n{attack}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    surrogate = ("--surrogate-checkpoint", files.folder / "net.pt", "--surrogate-architecture", "WideResNet-10-1")
    names = "apgd-ce,transfer-apgd-dlr,mine_of_test:attack"
    look = ("--precision", "bfloat16", "--channels-last", "--batch-size", "auto")
    main(*line(files, tmp_path, "--attacks", names, "--set", "apgd-ce.n_iter=2", *surrogate, *look))
    parameters = {"apgd-ce": {"n_iter": 2}}
    log = json.loads((tmp_path / "evaluation.json").read_text())
    direct = evaluate(
        files.model,
        files.images,
        files.labels,
        eps="1/255",
        attacks=names.split(","),
        parameters=parameters,
        surrogate=files.model,
        precision="bfloat16",
        channels_last=True,
    ).log
    for key in ("predictions", "fell_to", "attacks", "parameters", "surrogate", "precision", "own_attacks"):
        assert log[key] == direct[key], key
    assert (log["parameters"], log["precision"]) == (parameters, "bfloat16, channels_last")
    assert log["batch_size"] in (16, 32, 64, 128, 256, 512, 1024)
    shown = capsys.readouterr().out
    with_all = f"{names.replace(',', ', ')}, with apgd-ce.n_iter=2, in bfloat16, channels_last"
    assert f"(Linf, eps 1/255, not standard: {with_all})" in shown
    assert f"The evaluation must be of standard AutoAttack, got {with_all}" in shown


BAD_ATTACKS = [
    ("--set square.n_queries", "argument --set: must be such as square.n_queries=20000, got 'square.n_queries'"),
    ("--set n_queries=3", "argument --set: must be such as"),
    ("--set square.queries=3", "evaluate: unknown parameter of square `queries`. Did you mean `n_queries`?"),
    ("--attacks apgd", "ikl evaluate: unknown attack `apgd`. Did you mean `apgd-t`?"),
    ("--attacks transfer-square", "`surrogate` is what transfer attacks are computed on"),
    ("--surrogate-checkpoint a.pt", "--surrogate-checkpoint and --surrogate-architecture go together"),
    ("--batch-size big", "argument --batch-size: must be a number or auto, got 'big'"),
    ("--precision half", "argument --precision: invalid choice: 'half'"),
]


@pytest.mark.parametrize(("more", "text"), BAD_ATTACKS)
def test_what_is_no_attack_or_parameter_is_refused(more, text, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(*line(files, tmp_path), *more.split())
    assert text in f"{caught.value.code} {capsys.readouterr().err}"


def test_what_autoattack_warns_of_is_printed(files, tmp_path, monkeypatch, capsys):
    model = nn.Sequential(files.model, nn.Softmax(1)).eval()
    loaded = LoadedModel(model, "soft", None)
    monkeypatch.setattr(command, "model_from", lambda args, caller: loaded)
    main(*line(files, tmp_path, "--attacks", "apgd-ce"))
    shown = capsys.readouterr().out
    assert "AutoAttack warns: it seems that the output is a probability distribution" in shown
    assert "AutoAttack's own checks say that this evaluation may be unreliable." in shown


@pytest.fixture
def corrupted(tmp_path, monkeypatch):
    """CIFAR-10 and two kinds of CIFAR-10-C, 4x4 pixels, and a model for them."""
    kinds = robustbench.data.BenchmarkDataset.cifar_10, robustbench.data.ThreatModel.corruptions
    monkeypatch.setitem(robustbench.data.CORRUPTIONS_DICT[kinds[0]], kinds[1], ("fog", "snow"))
    images, labels = torch.rand(20, 3, 4, 4), torch.arange(20) % 10
    table = robustbench.data._clean_dataset_loaders
    monkeypatch.setitem(table, kinds[0], lambda n, folder, transform: (images[:n], labels[:n]))
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("fog", "snow"):
        np.save(folder / f"{name}.npy", random.integers(0, 256, (50000, 4, 4, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", random.integers(0, 10, 50000))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    loaded = LoadedModel(model, "linear", None)
    monkeypatch.setattr(command, "model_from", lambda args, caller: loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_corruptions(corrupted, capsys):
    main("--threat-model", "corruptions", "--n-examples", "20", "--output", "out")
    log = json.loads((corrupted / "out" / "evaluation.json").read_text())
    assert [(entry["corruption"], entry["severity"]) for entry in log["corruptions"]] == [
        (name, severity) for name in ("fog", "snow") for severity in range(1, 6)
    ]
    assert log["robust_accuracy"] == pytest.approx(np.mean([entry["accuracy"] for entry in log["corruptions"]]))
    assert f"robust accuracy {log['robust_accuracy']:.2f} %" in capsys.readouterr().out
    assert "## Corruptions" in (corrupted / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "more",
    [
        *("--eps 8/255", "--attacks square", "--curve 1/255", "--version plus", "--data cifar10"),
        *("--set square.n_queries=9", "--precision bfloat16", "--channels-last", "--surrogate-checkpoint a.pt"),
        "--batch-size auto",
    ],
)
def test_corruptions_refuse_what_is_for_attacks(more):
    text = failure("--threat-model", "corruptions", "--output", "out", *more.split())
    assert f"ikl evaluate: --threat-model corruptions does not read {more.split()[0]}" in text


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--eps": None}, "ikl evaluate: --threat-model Linf needs a radius"),
        ({"--checkpoint": None}, "ikl evaluate: a model must be named, but there is no --checkpoint"),
        ({"--architecture": None}, "ikl evaluate: --checkpoint needs its network"),
        ({"--checkpoint": "none.pt"}, "none.pt"),
        ({"--data": "cifar10", "--data-dir": "none", "--offline": ""}, "cifar10 must lie in none/cifar-10"),
        ({"--curve": "2/255,4/510"}, "ikl evaluate --curve: `radii` must be different"),
        ({"--device": "none"}, "Expected one of cpu, cuda"),
        ({"--zoo": "Cui2023Decoupled_WRN-28-10"}, "ikl evaluate: --zoo does not read --checkpoint"),
    ],
)
def test_errors_are_one_line_and_write_nothing(files, tmp_path, monkeypatch, changes, text):
    monkeypatch.chdir(tmp_path)
    arguments = line(files, "out")
    given = {**dict(zip(arguments[::2], arguments[1::2], strict=True)), **changes}
    flat = [part for name, value in given.items() if value is not None for part in (name, value) if part]
    assert text in failure(*flat)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_too_little_memory_names_the_way_out(files, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(evaluation, "evaluate", out_of_memory)
    text = failure(*line(files, tmp_path))
    assert "cpu has too little memory (CUDA out of memory.). Lower --batch-size." in text


def test_matplotlib_is_asked_for_before_the_attacks(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert "pip install matplotlib" in failure(*line(files, tmp_path))


# --- the shared arguments --------------------------------------------------------------------------------------------


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_data_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("function", "arguments", "positional", "named", "name"),
    [
        (
            "load_checkpoint",
            "--checkpoint c.pt --architecture resnet20 --dataset cifar100 --num-classes 7 --mean .1,.2,.3 --std 1,2,3",
            ["c.pt", "resnet20", "cifar100"],
            {"num_classes": 7, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "averaged": True},
            "resnet20",
        ),
        (
            "load_checkpoint",
            "--checkpoint c.pt --architecture WideResNet-34-10 --weights last",
            ["c.pt", "WideResNet-34-10", "cifar10"],
            {"num_classes": None, "mean": None, "std": None, "averaged": False},
            "WideResNet-34-10",
        ),
        (
            "from_mmpretrain",
            "--mmpretrain a/b.py --checkpoint c.pth --weights last --channel-order bgr",
            ["a/b.py", "c.pth"],
            {"averaged": False, "channel_order": "bgr"},
            "b",
        ),
        ("from_torchdistill", "--torchdistill a/b.yaml --checkpoint c.pt", ["a/b.yaml", "c.pt"], {}, "b"),
        (
            "from_torchdistill",
            "--torchdistill torchdistill/digits/kd.yaml --checkpoint c.pt",
            [str(configs_folder() / "torchdistill/digits/kd.yaml"), "c.pt"],
            {},
            "kd",
        ),
        (
            "from_timm",
            "--timm resnet18 --checkpoint c.pt --mean .1,.2,.3 --std 1,2,3 --weights last --image-size 32",
            ["resnet18"],
            {
                "checkpoint": Path("c.pt"),
                "averaged": False,
                "offline": False,
                "image_size": 32,
                "mean": (0.1, 0.2, 0.3),
                "std": (1.0, 2.0, 3.0),
            },
            "resnet18",
        ),
        (
            "from_torchvision",
            "--torchvision resnet50 --weights-name IMAGENET1K_V2 --offline",
            ["resnet50"],
            {
                "checkpoint": None,
                "averaged": True,
                "offline": True,
                "weights_name": "IMAGENET1K_V2",
                "mean": None,
                "std": None,
            },
            "resnet50",
        ),
        ("from_huggingface", "--huggingface google/vit", ["google/vit"], {"offline": False}, "google/vit"),
    ],
)
def test_every_way_to_a_model_gets_its_arguments(monkeypatch, function, arguments, positional, named, name):
    room = loading if hasattr(loading, function) else image_models
    real, called, model = getattr(room, function), [], nn.Identity()

    def fake(*args, **kwargs):
        called.append(([str(arg) for arg in args], kwargs))
        return model

    inspect.signature(real).bind(*positional, **named)  # the real one would take them
    monkeypatch.setattr(room, function, fake)
    for module, name_of_class in ((mmpretrain_data, "MMPretrainData"), (torchdistill_data, "TorchdistillData")):
        monkeypatch.setattr(module, name_of_class, lambda caller, config, *_: config)
    loaded = model_from(parsed(*arguments.split()), caller="x")
    assert called == [(positional, named)]
    assert (loaded.model, loaded.name) == (model, name)
    assert getattr(loaded.checkpoint, "stem", None) == ("c" if "--checkpoint" in arguments else None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "a model must be named, but there is no --checkpoint"),
        ("--mmpretrain a.py", "a model must be named, but --mmpretrain comes without --checkpoint"),
        ("--torchdistill a --mmpretrain b --checkpoint c", "one model must be named, got --mmpretrain and --torch"),
        ("--checkpoint c --mmpretrain a --architecture b", "--mmpretrain does not read --architecture"),
        ("--checkpoint c --torchdistill a --weights last", "--torchdistill does not read --weights"),
        ("--timm a --torchvision b", "one model must be named, got --timm and --torchvision"),
        ("--timm a --architecture b", "--timm does not read --architecture"),
        ("--torchvision a --image-size 32", "--torchvision does not read --image-size"),
        ("--huggingface a --checkpoint c", "--huggingface does not read --checkpoint"),
        ("--checkpoint c --architecture a --weights-name b", "--checkpoint does not read --weights-name"),
        ("--checkpoint c --architecture a --channel-order rgb", "--checkpoint does not read --channel-order"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, text):
    with pytest.raises(ValueError, match=f"^ikl x: {text}"):
        model_from(parsed(*arguments.split()), caller="ikl x")


def test_the_names_are_those_of_the_room():
    """The command lists them again, as it is not to import torch for --help."""
    assert model_options.ATTACKS == evaluation.ATTACKS
    assert model_options.NORMS == evaluation.checks.NORMS
    assert model_options.PRECISIONS == evaluation.precision.PRECISIONS
    assert model_options.VERSIONS == evaluation.VERSIONS
    assert model_options.DATASETS == data.DATASETS
    assert set(model_options.THREAT_MODELS) == {kind.value for kind in robustbench.data.ThreatModel}


def test_the_data_are_those_of_the_data_set(files, monkeypatch):
    images, labels = torch.rand(5, 3, 4, 4), torch.arange(5)
    table = robustbench.data._clean_dataset_loaders
    kind = robustbench.data.BenchmarkDataset.cifar_100
    monkeypatch.setitem(table, kind, lambda n, folder, transform: (images[:n], labels[:n]))
    found = images_from(parsed("--dataset", "cifar100", "--n-examples", "3"), caller="x")
    assert (found.name, len(found)) == ("cifar100", 3)
    assert len(images_from(parsed("--data", files.folder / "folder"), caller="x")) == 10


@pytest.fixture
def zoo(files, monkeypatch):
    """A small model among RobustBench's."""
    kinds = robustbench.data.BenchmarkDataset.cifar_10, robustbench.data.ThreatModel.L2
    entry = {"model": lambda: robustbench_network("WideResNet-10-1"), "gdrive_id": "abc"}
    monkeypatch.setitem(robustbench.data.all_models[kinds[0]][kinds[1]], "Small2024Test", entry)

    def no_network(*_, **__):
        raise AssertionError("this would download")

    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", no_network)


def zoo_arguments(name, folder, *more, threat_model="L2"):
    args = parsed("--zoo", name, "--model-dir", folder, *more)
    args.threat_model = threat_model
    return args


def test_a_model_of_the_zoo_from_disk(files, zoo, tmp_path):
    path = tmp_path / "cifar10" / "L2" / "Small2024Test.pt"
    path.parent.mkdir(parents=True)
    torch.save(files.model.state_dict(), path)
    loaded = model_from(zoo_arguments("Small2024Test", tmp_path, "--offline"), caller="x")
    assert (loaded.name, loaded.checkpoint) == ("Small2024Test", path)
    with torch.no_grad():
        assert torch.equal(loaded.model(files.images), files.model(files.images))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=re.escape(f"{path} must be the checkpoint of Small2024Test, but loading it")):
        model_from(zoo_arguments("Small2024Test", tmp_path), caller="x")


def test_a_model_of_the_zoo_that_is_not_there(zoo, tmp_path):
    path = tmp_path / "cifar10" / "L2" / "Small2024Test.pt"
    text = f"ikl x: --zoo Small2024Test with --offline needs its file, but there is none at {path}."
    with pytest.raises(ValueError, match=re.escape(text)):
        model_from(zoo_arguments("Small2024Test", tmp_path, "--offline"), caller="ikl x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="this would download"):
        model_from(zoo_arguments("Small2024Test", tmp_path), caller="ikl x")
    with pytest.raises(ValueError, match=r"unknown cifar10 Linf model .* Did you mean `Cui2023Decoupled_WRN-28-10`"):
        model_from(zoo_arguments("Cui2023Decoupled_WRN-28-11", tmp_path, threat_model="Linf"), caller="ikl x")
    name = "Diffenderfer2021Winning_LRR_CARD_Deck"
    args = zoo_arguments(name, tmp_path, "--offline", threat_model="corruptions")
    with pytest.raises(ValueError, match=re.escape(f"there is none at {tmp_path}/cifar10/corruptions/{name}.pt_m0.pt")):
        model_from(args, caller="ikl x")
