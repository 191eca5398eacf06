"""A submission: field by field as RobustBench has it, loaded by RobustBench itself, refused where it must be."""

from __future__ import annotations

import collections
import copy
import dataclasses
import errno
import json
import os
import re
import runpy
import subprocess
import warnings

import numpy as np
import pytest
import torch
from quick_autoattack import Harmless, consistent_log, robustbench

from ikl_plugins import models
from ikl_plugins._files import locked
from ikl_plugins.models.robustbench_zoo import parse_architecture, robustbench_network
from ikl_plugins.robustbench import Images, evaluate
from ikl_plugins.robustbench.evaluation.log import Evaluation, weights_sha256
from ikl_plugins.robustbench.known_sets import KNOWN
from ikl_plugins.robustbench.leaderboard import entries
from ikl_plugins.robustbench.loading import Normalised
from ikl_plugins.robustbench.preflight import CHECKS, Check, Preflight
from ikl_plugins.robustbench.submission import DEMONSTRATION, check_name, model_info, write_submission
from ikl_plugins.robustbench.submission.form import worded
from ikl_plugins.robustbench.submittable import network_obstacle, submission_obstacles

# An entry of RobustBench's model_info/cifar100/Linf, as it is there.
CUI = """{
  "link": "https://arxiv.org/abs/2305.13948",
  "name": "Decoupled Kullback-Leibler Divergence Loss",
  "authors": "Jiequan Cui, Zhuotao Tian, Zhisheng Zhong, Xiaojuan Qi, Bei Yu, Hanwang Zhang",
  "additional_data": false,
  "number_forward_passes": 1,
  "dataset": "cifar100",
  "venue": "NeurIPS 2024",
  "architecture": "WideResNet-28-10",
  "eps": "8/255",
  "clean_acc": "73.85",
  "reported": "39.18",
  "autoattack_acc": "39.18",
  "unreliable": false,
  "footnote": "It uses additional 50M synthetic images in training."
}"""
NAME = "Doe2025Better_WRN-10-1"
PAPER = {
    "title": "Better Networks from Smaller Ones",
    "link": "https://example.org/paper",
    "authors": "Jane Doe, John Roe",
    "venue": "arXiv, Jan 2025",
}
PASSED = Preflight(tuple(Check(name, True, "Fine.") for name in CHECKS))
FAILED = Preflight((Check("output", True, "Fine."), Check("gradients", False, "All are zero.")))


def too_early():
    raise AssertionError("the preflight runs before a refusal that does not need it")


pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
COUNT = 6  # of a test set, here


@pytest.fixture(scope="module", autouse=True)
def _small_benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Harmless)
        for name in ("cifar10", "cifar100"):
            patch.setitem(KNOWN, name, KNOWN[name]._replace(n_examples=COUNT))
        yield


def images_of(network, name="cifar10", count=COUNT):
    """Images that a network gets right but for one, under the name of a test set."""
    pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(pixels)
    labels = logits.argmax(1)
    labels[:1] = (labels[:1] + 1) % logits.shape[1]
    source = KNOWN[name].source if name in KNOWN else None
    return Images(pixels, labels, None, name, "not read", source=source)


def evaluation_of(network, name="cifar10", count=COUNT, **options):
    """5 of 6 images stand: 83.33 %."""
    data = images_of(network, name, count)
    options = {"eps": "8/255", "data": data, "progress": False, **options}
    return evaluate(network, data.images, data.labels, **options)


def edited(evaluation, **changes):
    return dataclasses.replace(evaluation, log={**evaluation.log, **changes})


def corruptions(network, accuracy=50.0, **changes):
    """Of all corruptions, half of the images right."""
    said = evaluation_of(network).log
    none = ("predictions", "robust", "fell_to", "eps", "eps_value", "version", "n_target_classes", "adversarial")
    empty = ("attacks", "dropped", "progress")
    entry = {"accuracy": accuracy, "n_examples": COUNT, "sha256": "0" * 64, "seconds": 1.0}
    kinds = robustbench.data.CORRUPTIONS
    changes = {
        "corruptions": [{"corruption": kind, "severity": level, **entry} for kind in kinds for level in range(1, 6)],
        "corruptions_mce": None,
        "corruptions_mce_baseline": None,
        "corruptions_mce_note": "not computed",
        "threat_model": "corruptions",
        "dataset": "cifar10",
        "standard": False,
        "robust_accuracy": accuracy,
        **changes,
    }
    return Evaluation({**said, **dict.fromkeys(none), **{key: [] for key in empty}, **changes})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    net = robustbench_network("WideResNet-10-1").eval()
    with torch.no_grad():  # statistics that are not the initial ones
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return net


@pytest.fixture(scope="module")
def evaluated(network):
    return evaluation_of(network)


@pytest.fixture
def write(tmp_path, network, evaluated):
    """Writes a sound submission but for what is said."""

    def call(**changes):
        options = {
            "name": NAME,
            "model": network,
            "architecture": "WideResNet-10-1",
            "dataset": "cifar10",
            "preflight": PASSED,
            **PAPER,
            "additional_data": False,
            "generated_data": False,
            "licence": "MIT",
            **changes,
        }
        net, name = options["model"], options["dataset"]
        if "evaluation" not in options:
            options["evaluation"] = evaluated if net is network or isinstance(net, dict) else evaluation_of(net)
        options.setdefault("images", lambda: images_of(net, name))
        return write_submission(options.pop("folder", tmp_path / "submission"), **options)

    return call


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- the entry -------------------------------------------------------------------------------------------------------


def test_the_entry_equals_one_of_robustbench_field_by_field(network):
    expected = json.loads(CUI)
    entry = model_info(
        consistent_log(10000, 7385, 3918, classes=100),
        architecture="WideResNet-28-10",
        dataset="cifar100",
        title=expected["name"],
        link=expected["link"],
        authors=["Jiequan Cui", "Zhuotao Tian", "Zhisheng Zhong", "Xiaojuan Qi", "Bei Yu", "Hanwang Zhang"],
        venue="NeurIPS 2024",
        additional_data=False,
        footnote="It uses additional 50M synthetic images in training.",
    )
    for field, value in expected.items():
        assert (entry[field], type(entry[field])) == (value, type(value)), field
    assert list(entry) == list(expected)
    assert json.dumps(entry, indent=2) == CUI


def test_the_fields_are_those_that_robustbench_writes(network):
    from robustbench.utils import ModelInfo

    known = {field.name for field in dataclasses.fields(ModelInfo)}
    assert len(known) == 17
    facts = {"architecture": "A", "dataset": "cifar10", **PAPER, "additional_data": True, "footnote": "f"}
    linf = model_info(consistent_log(robust=5700), **facts, reported=56.5, number_forward_passes=3)
    common = model_info(corruptions(network, corruptions_mce=10.0), **facts)
    # `unreliable` is in its files, and not in the class that its benchmark writes them with.
    assert set(linf) | set(common) == known - {"corruptions_acc_3d", "corruptions_mce_3d"} | {"unreliable"}
    assert (common["eps"], common["corruptions_acc"], common["corruptions_mce"]) == (None, "50.00", "10.00")
    assert (linf["clean_acc"], linf["autoattack_acc"], linf["reported"]) == ("85.30", "57.00", "56.50")
    assert (linf["additional_data"], linf["number_forward_passes"]) == (True, 3)


def test_robustbench_makes_a_leaderboard_of_the_entry(write, monkeypatch, capsys):
    """Its own list, which reads model_info in the working directory."""
    import robustbench.utils as rb
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    monkeypatch.chdir(write())
    monkeypatch.setitem(rb.all_models[BenchmarkDataset.cifar_10][ThreatModel.Linf], NAME, {})
    rb.list_available_models("cifar10", "Linf")
    assert f"**{NAME}**" in capsys.readouterr().out


# --- the folder ------------------------------------------------------------------------------------------------------


def texts(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pt"]


def test_the_folder_has_everything(write):
    folder = write()
    entry, weights = f"model_info/cifar10/Linf/{NAME}.json", f"models/cifar10/Linf/{NAME}.pt"
    ours = ["new_models_form.md", "preflight.json", "preflight.md", "zoo_entry.py"]
    assert files(folder) == ["SHA256SUMS", "evaluation.json", entry, weights, *ours]
    assert [path.name for path in folder.parent.iterdir()] == ["submission"]
    assert f"{Evaluation.load(folder / 'evaluation.json').log['robust_accuracy']:.2f}" == "83.33"
    assert json.loads((folder / "preflight.json").read_text()) == json.loads(PASSED.to_json())
    assert (folder / "preflight.md").read_text() == PASSED.markdown()
    assert not any("emonstration" in path.name or "emonstration" in path.read_text() for path in texts(folder))
    form = (folder / "new_models_form.md").read_text()
    for fragment in (
        "- [x] I want to add",
        "- [x] I agree to release",
        "- [ ] under a custom",
        "TO BE FILLED IN",
        "83.33",
        "Warnings of AutoAttack**: none\n",
        "Log against the model**: run again on 6 of 6 natural and 0 of 0 adversarial images: as the log says; 0 of 5 ",
    ):
        assert fragment in form, fragment
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sorted(sums) == [name for name in files(folder) if name != "SHA256SUMS"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def load(folder, dataset, threat_model, monkeypatch, name=NAME):
    """Through RobustBench alone, with our entry in its zoo."""
    import robustbench
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    found, entry = runpy.run_path(str(folder / "zoo_entry.py"))["ENTRY"]
    assert found == name
    zoo = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)]
    assert isinstance(zoo, collections.OrderedDict)
    monkeypatch.setitem(zoo, name, entry)
    return robustbench.load_model(name, model_dir=folder / "models", dataset=dataset, threat_model=threat_model)


@pytest.mark.parametrize(
    ("architecture", "dataset", "threat_model", "statistics"),
    [
        ("WideResNet-10-1", "cifar10", "Linf", {}),
        ("DMWideResNet-10-1-SiLU", "cifar100", "Linf", {}),
        ("DMWideResNet-10-1-Swish", "cifar10", "L2", {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}),
        ("PreActResNet-18", "cifar10", "corruptions", {}),
    ],
)
def test_robustbench_loads_the_checkpoint_strictly(architecture, dataset, threat_model, statistics, write, monkeypatch):
    classes = {"cifar10": 10, "cifar100": 100}[dataset]
    net = robustbench_network(architecture, classes, dataset=dataset, **statistics).eval()
    evaluation = {
        "Linf": lambda: evaluation_of(net, dataset),
        "L2": lambda: evaluation_of(net, dataset, norm="L2", eps="0.5"),
        "corruptions": lambda: corruptions(net),
    }[threat_model]()
    folder = write(model=net, architecture=architecture, dataset=dataset, evaluation=evaluation, **statistics)
    loaded = load(folder, dataset, threat_model, monkeypatch)
    assert type(loaded) is type(net)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(net.state_dict())
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))
    state = torch.load(folder / "models" / dataset / threat_model / f"{NAME}.pt", weights_only=True)
    assert not any("module." in key or "model." in key for key in state)


def test_leaves_the_network_as_it_was(write, network):
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    write()
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    network.eval()


@pytest.mark.parametrize(
    ("architecture", "statistics"),
    [
        ("DMWideResNet-10-1-ReLU", {}),
        ("DMWideResNet-10-1-SiLU", {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}),
        ("DMWideResNet-10-1-SiLU", {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2, 0.2, 0.2)}),
    ],
)
def test_refuses_what_the_weights_do_not_tell_but_the_logits_do(architecture, statistics, write, tmp_path):
    net = robustbench_network("DMWideResNet-10-1-SiLU").eval()
    with pytest.raises(ValueError, match=r"`model` must give the logits of the zoo entry"):
        write(model=net, architecture=architecture, evaluation=evaluation_of(net), **statistics)
    assert list(tmp_path.iterdir()) == []


WORDED = {
    "WideResNet-28-10": "WideResNet-28-10",
    "DMWideResNet-28-10-SiLU": "WideResNet-28-10",
    "ResNet-50": "ResNet-50",
}


@pytest.mark.parametrize(("name", "expected"), WORDED.items())
def test_the_architecture_is_worded_as_on_the_leaderboard(name, expected):
    assert worded(parse_architecture(name)) == expected
    assert expected in {entry.architecture for board in ("Linf", "corruptions") for entry in entries("cifar10", board)}


# --- the form --------------------------------------------------------------------------------------------------------


def test_the_form_says_what_was_declared(write):
    folder = write(
        additional_data=True,
        generated_data=True,
        footnote="It uses additional 1M synthetic images in training.",
        licence="https://example.org/licence",
        checkpoint_link="https://example.org/weights",
        code_link="https://example.org/code",
        gdrive_id="1abc'",
        model_zoo=False,
        reported=56.0,
    )
    form = (folder / "new_models_form.md").read_text()
    for fragment in (
        "56.00",
        "Additional data**: true",
        "Generated data**: true",
        "checkpoint https://example.org/weights, code https://example.org/code",
        "- [ ] I want to add",
        "- [x] under a custom license, located here: https://example.org/licence",
    ):
        assert fragment in form, fragment
    entry = json.loads((folder / f"model_info/cifar10/Linf/{NAME}.json").read_text())
    assert entry["footnote"] == "It uses additional 1M synthetic images in training."
    assert (entry["additional_data"], entry["reported"], entry["autoattack_acc"]) == (True, "56.00", "83.33")
    assert runpy.run_path(str(folder / "zoo_entry.py"))["ENTRY"][1]["gdrive_id"] == "1abc'"


# --- demonstrations and failed checks --------------------------------------------------------------------------------


def test_a_demonstration_takes_little_and_marks_every_file(write, network, monkeypatch):
    data = images_of(network, "data/digits/test", 3)
    small = evaluation_of(network, "data/digits/test", 3, attacks=["apgd-ce"], eps="1/255")
    folder = write(evaluation=small, images=data, demonstration=True)
    marked = f"{NAME}_demonstration"
    assert f"models/cifar10/Linf/{marked}.pt" in files(folder)
    assert f"model_info/cifar10/Linf/{marked}.json" in files(folder)
    for path in texts(folder):
        text = path.read_text()
        assert DEMONSTRATION in text or (path.name == "SHA256SUMS" and "_demonstration.pt" in text), path
    assert Evaluation.load(folder / "evaluation.json").log["demonstration"] == DEMONSTRATION
    assert json.loads((folder / "preflight.json").read_text())["demonstration"] == DEMONSTRATION
    entry = json.loads((folder / f"model_info/cifar10/Linf/{marked}.json").read_text())
    assert entry["footnote"] == DEMONSTRATION
    load(folder, "cifar10", "Linf", monkeypatch, name=marked)


def test_a_failed_preflight_is_named_where_it_is_allowed(write):
    folder = write(preflight=FAILED, allow_failed_preflight=True)
    for name in ("new_models_form.md", "zoo_entry.py", "preflight.md"):
        assert re.search("[Pp]reflight.*gradients", (folder / name).read_text()), name


def test_what_the_log_tells_need_not_be_checked(write):
    write(preflight=Preflight((Check("eps", None, "No radius."), Check("claim", None, "No."))))


@pytest.mark.parametrize("options", [{"reported": 83.338}, {"reported": 83.39, "allow_failed_preflight": True}])
def test_a_claim_may_be_rounded_or_allowed(options, write):
    write(**options)


# --- the place -------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_left_alone_unless_forced(write, tmp_path):
    folder = write()
    before = (folder / "SHA256SUMS").read_text()
    with pytest.raises(ValueError, match=r"`folder` must be new"):
        write(name="Doe2025Better_new")
    assert (folder / "SHA256SUMS").read_text() == before
    (folder / "left_over.txt").write_text("old")
    write(name="Doe2025Better_new", force=True)
    assert "models/cifar10/Linf/Doe2025Better_new.pt" in files(folder)
    assert "left_over.txt" not in files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["submission"]


def test_force_replaces_no_other_folder(write, tmp_path):
    folder = tmp_path / "submission"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (folder / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match=r"`folder` must be new or a submission"):
        write(force=True)
    assert files(folder) == ["SHA256SUMS", "thesis.tex"]


@pytest.mark.parametrize("failing", ["torch.save", "os.rename"])
def test_a_full_disk_leaves_what_was_there(failing, write, tmp_path, monkeypatch):
    folder = write()
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    rename, calls = os.rename, []

    def fail(*arguments, **options):
        calls.append(arguments)
        if failing == "os.rename" and len(calls) != 2:  # the second one is of the new folder, the old one being aside
            return rename(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="No space left on device"):
            write(name="Doe2025Better_new", force=True)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["submission"]


def test_a_submission_has_one_writer_and_a_killed_one_is_repaired(write, tmp_path):
    folder = write()
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    held = pytest.raises(
        ValueError, match=rf"submission must have one process .* process {os.getpid()} on .* Wait for it"
    )
    with locked("write_submission", folder, ""), held:
        write(force=True)
    folder.rename(tmp_path / ".submission.old")  # killed between the two renames
    (tmp_path / ".submission.partial").mkdir()
    with pytest.raises(ValueError, match=r"`folder` must be new"):
        write(name="Doe2025Better_new")
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["submission"]


# --- names -----------------------------------------------------------------------------------------------------------

BASELINES = {"Standard", "Standard_R50", "AlexNet", "Geirhos2018_SIN", "Geirhos2018_SIN_IN", "Geirhos2018_SIN_IN_IN"}


def test_the_pattern_is_that_of_the_leaderboards():
    from ikl_plugins.robustbench.leaderboard import _table

    others = set()
    for row in _table()["entries"]:
        try:
            check_name(row["id"])
        except ValueError:
            others.add(row["id"])
    assert others == BASELINES


@pytest.mark.parametrize(
    ("name", "title", "author"),
    [
        ("Cui2023Decoupled_WRN-28-10", "Decoupled Kullback-Leibler Divergence Loss", "Jiequan Cui"),
        ("Jia2022LAS-AT_34_10", "LAS-AT: Adversarial Training with Learnable Attack Strategy", "Xiaojun Jia"),
        ("RodriguezMunoz2024Characterizing_Swin-B", "Characterizing Model Robustness", "Adrián Rodríguez-Muñoz"),
        ("Moosavi-Dezfooli2019Robustness", "Robustness via curvature regularization", "Seyed-Mohsen Moosavi-Dezfooli"),
        ("Calian2021Defending", "Defending Against Image Corruptions", "Dan A. Calian"),
        ("Modas2021PRIMEResNet18", "PRIME: A Few Primitives Can Boost Robustness", "Apostolos Modas"),
    ],
)
def test_names_of_real_entries_go_with_their_papers(name, title, author):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_name(name, title=title, authors=[author, "Somebody Else"])


BAD_NAMES = "cui2023Decoupled Cui23Decoupled Cui2023 Cui2023decoupled Cui2023_Decoupled Cui2023Decoupled_"


@pytest.mark.parametrize(
    "name", [*BAD_NAMES.split(), "Cui2023Decoupled WRN", "Cui2023Decoupled_WRN/28", "../Cui2023Decoupled", ""]
)
def test_refuses_names_of_another_pattern(name):
    with pytest.raises(ValueError, match=f"^check_name: `name` .* got '{name}'"):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("Cui2023Loss", "`name` has Loss .* Decoupled"),
        ("Tian2023Decoupled", "`name` has Tian .* Cui"),
    ],
)
def test_warns_of_a_name_that_does_not_go_with_the_paper(name, fragment):
    with pytest.warns(UserWarning, match=f"^check_name: {fragment}") as caught:
        check_name(name, title="Decoupled Kullback-Leibler Divergence Loss", authors=["Jiequan Cui"])
    assert caught[0].filename == __file__


def test_warns_of_a_name_that_is_taken(write):
    name = "Cui2023Decoupled_WRN-34-10"
    with pytest.warns(UserWarning, match=f"`name` {name}"):
        write(name=name, title="Decoupled Loss", authors=["Jiequan Cui", "Zhuotao Tian"])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "fragment"),
    [
        ({"name": "mine"}, ValueError, "`name` .* got 'mine'"),
        ({"name": None}, TypeError, "`name` must be text, got NoneType"),
        ({"title": " "}, ValueError, "`title` .* got ' '"),
        ({"venue": "a\nb"}, ValueError, r"`venue` .* got 'a\\nb'"),
        ({"footnote": ""}, ValueError, "`footnote` .* got ''"),
        ({"link": None}, TypeError, "`link` must be text, got NoneType"),
        ({"link": "arxiv"}, ValueError, r"`link` .* got 'arxiv'"),
        ({"licence": "GPL"}, ValueError, "`licence` .* got 'GPL'"),
        ({"authors": ""}, ValueError, "`authors` .* got ''"),
        ({"authors": []}, ValueError, r"`authors` .* got \[\]"),
        ({"authors": "Jane Doe,"}, ValueError, "`authors` .* got 'Jane Doe,'"),
        ({"authors": ["Jane\nDoe"]}, ValueError, "`authors` .* got .'Jane"),
        ({"authors": [1]}, ValueError, r"`authors` .* got \[1\]"),
        ({"title": "\udcff"}, ValueError, "`title` must be one line"),
        ({"additional_data": None}, TypeError, "`additional_data` must be declared .* got None"),
        ({"generated_data": "no"}, TypeError, "`generated_data` must be declared .* got 'no'"),
        ({"generated_data": True}, ValueError, "`footnote` must say what generated images"),
        ({"number_forward_passes": 0}, ValueError, "`number_forward_passes` .* got 0"),
        ({"number_forward_passes": "2"}, TypeError, "`number_forward_passes` .* got '2'"),
        ({"number_forward_passes": True}, TypeError, "`number_forward_passes` .* got True"),
        ({"dataset": "cifar11"}, ValueError, "unknown data set `cifar11`. Did you mean `cifar10`"),
        ({"dataset": "imagenet"}, ValueError, "`evaluation` must be on the test images of imagenet"),
        ({"architecture": "WRN-10-1"}, ValueError, "unknown architecture `WRN-10-1`"),
        ({"evaluation": 3}, TypeError, "`evaluation` .* got int"),
        ({"evaluation": "no.json"}, ValueError, "`evaluation` .* none at no.json"),
        ({"preflight": None}, TypeError, "`preflight` .* got NoneType"),
        ({"preflight": FAILED}, ValueError, "`preflight` must have passed.* gradients"),
        ({"preflight": Preflight((Check("batch", None, "Not."),))}, ValueError, "`preflight` .* not: batch"),
        ({"model": {}}, TypeError, "`model` .* got dict"),
        ({"reported": 5709}, ValueError, "`reported` .* got 5709"),
        ({"reported": 83.34}, ValueError, "`reported` must not be above the measured 83.33 %"),
        ({"acknowledge_unreliable": "So."}, ValueError, "`acknowledge_unreliable` must be None, as AutoAttack"),
        ({"acknowledge_unreliable": " "}, ValueError, "`acknowledge_unreliable` must be one line"),
    ],
)
def test_refuses_bad_input(changes, error, fragment, write, tmp_path):
    with pytest.raises(error, match=f"^write_submission: {fragment}"):
        write(**{"preflight": too_early, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"name": "./cifar10"}, "be on .* got './cifar10'"),
        ({"source": None}, "be on .* got 'images named cifar10'"),
        ({"count": COUNT - 1}, f"have all {COUNT} .* got {COUNT - 1}"),
        ({"attacks": ["apgd-ce"]}, "be of standard AutoAttack"),
        ({"eps": "4/255"}, "be at eps 8/255.* got 4/255"),
        ({"threat_model": "corruptions", "dataset": "cifar100"}, "have all 75 .* of cifar100"),
    ],
)
def test_an_evaluation_that_is_not_the_benchmark_is_for_demonstrations(options, fragment, write, network):
    data = images_of(network, options.pop("name", "cifar10"), options.pop("count", COUNT))
    if "source" in options:
        data = dataclasses.replace(data, source=options.pop("source"))
    if "threat_model" in options:
        evaluation = corruptions(network, **options)
    else:
        options = {"eps": "8/255", "data": data, "progress": False, **options}
        evaluation = evaluate(network, data.images, data.labels, **options)
    given = {"evaluation": evaluation, "images": data}
    with pytest.raises(ValueError, match=f"^write_submission: `evaluation` must {fragment}.*demonstration=True"):
        write(**given, preflight=too_early)
    write(**given, preflight=lambda: PASSED, demonstration=True)


@pytest.mark.parametrize("demonstration", [False, True])
@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"finished": False}, "`evaluation` must be finished"),
        ({"eps": "0.031", "eps_value": 0.031}, "`evaluation` must be at .* got .*0.031"),
        ({"robust_accuracy": 57.09}, "`robust_accuracy` of the log must follow from `robust`"),
        ({"weights_sha256": "0" * 64}, "`model` must have the weights of the evaluation"),
    ],
)
def test_refuses_in_a_demonstration_too(changes, fragment, demonstration, write, evaluated):
    with pytest.raises(ValueError, match=f"^write_submission: {fragment}"):
        write(evaluation=edited(evaluated, **changes), demonstration=demonstration, preflight=too_early)


def test_refuses_corruptions_without_a_natural_accuracy(write, network):
    none = ("data", "labels", "natural_predictions", "natural_correct", "natural_accuracy")
    with pytest.raises(ValueError, match=r"`evaluation` must have natural and robust accuracy, got None and 50.0"):
        write(evaluation=corruptions(network, **dict.fromkeys(none)), demonstration=True, preflight=too_early)


def test_refuses_other_images_and_an_edited_prediction(write, evaluated, network):
    other = images_of(network)
    other = dataclasses.replace(other, images=other.images.flip(3))
    with pytest.raises(ValueError, match=r"^verify: `data.sha256` of the log is .* Pass the images that were"):
        write(images=other, preflight=too_early)
    log = evaluated.log
    forged = [(label + 1) % 10 for label in log["natural_predictions"][:1]]  # from one wrong class to another
    forged = [forged[0] if forged[0] != log["labels"][0] else (forged[0] + 1) % 10, *log["natural_predictions"][1:]]
    given = edited(evaluated, natural_predictions=forged, predictions=forged)
    with pytest.raises(ValueError, match=r"^verify: `progress\[0\].keys\[0\]` of the log"):
        write(evaluation=given, preflight=too_early)


def test_a_flag_of_autoattack_must_be_acknowledged_and_is_said_everywhere(write, evaluated):
    warning = "there are 3 points with zero gradient!"
    flagged = edited(evaluated, warnings=[warning], unreliable=True)
    with pytest.raises(
        ValueError, match=f"^write_submission: `evaluation` may be unreliable: {warning} Run an adaptive"
    ):
        write(evaluation=flagged, preflight=too_early)
    folder = write(evaluation=flagged, acknowledge_unreliable="APGD with 1,000 steps found no more.")
    form = (folder / "new_models_form.md").read_text()
    assert f"- **Warnings of AutoAttack**: {warning}\n" in form
    assert "- **Potentially unreliable**: APGD with 1,000 steps found no more.\n" in form
    for name in ("preflight.md", "preflight.json", "evaluation.json"):
        assert warning in (folder / name).read_text(), name
    assert json.loads((folder / f"model_info/cifar10/Linf/{NAME}.json").read_text())["unreliable"] is True
    assert Evaluation.load(folder / "evaluation.json").log["unreliable"] is True


def test_an_external_evaluation_counts_by_its_images_and_lowers_the_claim(write, tmp_path):
    network = robustbench_network("WideResNet-10-1")
    with torch.no_grad():
        for _ in range(30):  # until its statistics let it tell images apart
            network(torch.rand(8, 3, 32, 32))
    network.eval()
    evaluation = evaluation_of(network)
    data, record, stated = images_of(network), tmp_path / "a3.json", tmp_path / "stated.json"
    made = data.images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(network(made), data.labels, reduction="sum").backward()
    made = torch.cat([(made + 8 / 255 * made.grad.sign()).clamp(0, 1).detach()[:5], data.images[5:]])
    with torch.no_grad():
        right = network(made).argmax(1).eq(data.labels) & network(data.images).argmax(1).eq(data.labels)
    lowest = f"{100 * right.sum().item() / COUNT:.2f}"
    assert 0 < float(lowest) < 80
    np.savez(tmp_path / "a3.npz", image=made.numpy(), label=data.labels.numpy())
    facts = {"by": "Jane Doe", "code": "https://example.org/a3", "natural_accuracy": 83.33, "n_examples": COUNT}
    facts |= {"threat_model": "Linf", "eps": "8/255", "robust_accuracy": 83.0}  # more than it is
    record.write_text(json.dumps({**facts, "attack": "A3", "adversarial": "a3.npz"}))
    stated.write_text(json.dumps({**facts, "attack": "B4"}))
    with pytest.raises(ValueError, match=r"`reported` must not be above the measured 83\.00 %"):
        write(model=network, evaluation=evaluation, external=[stated], reported=83.33, preflight=too_early)
    with pytest.raises(ValueError, match=f"`reported` must not be above the measured {lowest} %"):
        write(model=network, evaluation=evaluation, external=[record], reported=82.9)
    folder = write(model=network, evaluation=evaluation, external=[stated, record])
    entry = json.loads((folder / f"model_info/cifar10/Linf/{NAME}.json").read_text())
    assert (entry["external"], entry["reported"], entry["autoattack_acc"]) == (lowest, lowest, "83.33")
    form = (folder / "new_models_form.md").read_text()
    said = rf"External evaluations\*\*: B4 by Jane Doe .*; as stated\. A3 .*: {lowest} % of {COUNT} images, .*run again"
    assert re.search(said, form)
    assert f"- **Robust accuracy**: {lowest}\n" in form
    fooled = [each["fooled"] for each in json.loads((folder / "external.json").read_text())]
    assert fooled == [None, COUNT - 1 - right.sum().item()]
    assert "external.json" in (folder / "SHA256SUMS").read_text()
    without = write(folder=tmp_path / "without", reported=80.0)  # a paper's own number is no external one
    assert "external" not in json.loads((without / f"model_info/cifar10/Linf/{NAME}.json").read_text())


def defended(network):
    class Defended(type(network)):
        def forward(self, x):
            return super().forward(x.round())

    return Defended(depth=10, num_classes=10, widen_factor=1, sub_block1=False)


def with_a_buffer_more(network):
    grown = copy.deepcopy(network)
    grown.register_buffer("extra", torch.zeros(1))
    return grown


@pytest.mark.parametrize(
    ("other", "fragment"),
    [
        (with_a_buffer_more, "a WideResNet-10-1.*unexpected: extra"),
        (lambda _: robustbench_network("DMWideResNet-16-2-SiLU"), "a WideResNet-10-1.*unexpected: init_conv.*DMWide"),
        (lambda network: robustbench_network("WideResNet-10-2"), "a WideResNet-10-1.*WideResNet-10-2"),
        (lambda network: Normalised(network, (0.5,) * 3, (0.25,) * 3), ".* got a Normalised"),
        (defended, ".* got Defended"),
        (lambda network: copy.deepcopy(network).half(), "float32 weights, got float16"),
    ],
    ids=["buffer", "architecture", "width", "normalisation", "subclass", "half"],
)
def test_refuses_another_network_and_says_so_before_the_attacks(other, fragment, write, network, evaluated, tmp_path):
    net = other(network)
    fragment = f"`model` must (?:be|have) {fragment}"
    with pytest.raises(ValueError, match=f"^write_submission: {fragment}"):
        write(model=net, evaluation=edited(evaluated, weights_sha256=weights_sha256(net)), preflight=too_early)
    assert list(tmp_path.iterdir()) == []
    (reason,) = submission_obstacles(net, "cifar10", architecture="WideResNet-10-1", eps="8/255")
    assert re.match(fragment, reason), reason
    for sound in (network, torch.compile(network, backend="eager")):
        assert submission_obstacles(sound, "cifar10", architecture="WideResNet-10-1", eps="8/255") == ()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({}, None),
        ({"eps": "16/510"}, None),
        ({"threat_model": "corruptions", "eps": None}, None),
        ({"dataset": "cifar100"}, "The evaluation must be of a model with 100 classes, got 10."),
        ({"dataset": "imagenet"}, "`model` must be of timm or torchvision for imagenet, got WideResNet. Use"),
        ({"threat_model": "corruptions_3d"}, "`threat_model` must be 'Linf', 'L2' or 'corruptions', got"),
        ({"dataset": "cifar100", "threat_model": "L2"}, "`threat_model` must have a leaderboard"),
        ({"data": "digits/test"}, "The evaluation must be on the test images of cifar10, got 'digits/test'."),
        ({"n_examples": 5}, "The evaluation must have all 6 test images, got 5."),
        ({"eps": 0.031}, "The evaluation must be at eps 8/255, that of the leaderboard, got 0.031."),
        (
            {"attacks": ["apgd-ce"]},
            "The evaluation must be of standard AutoAttack, got apgd-ce",
        ),
        ({"version": "plus"}, "The evaluation must be of standard AutoAttack, got AutoAttack plus."),
    ],
)
def test_what_an_evaluation_lacks_is_known_before_it_runs(plan, reason, network):
    plan = {"dataset": "cifar10", "eps": "8/255", **plan}
    found = submission_obstacles(network, plan.pop("dataset"), **plan)
    assert (reason is None and found == ()) or found[0].startswith(reason)


def test_a_class_that_robustbench_lacks_is_told_without_a_name(network):
    assert network_obstacle(network) is None
    assert network_obstacle(robustbench_network("DMWideResNet-16-2-SiLU")) is None
    for model, words in (
        (Normalised(network, (0.5,), (0.5,)), "got a Normalised around one. Train a DMWideResNet."),
        (models.resnet20(num_classes=10), "got ResNet. Its weights look like resnet20."),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10)), "got Sequential. Train one that it lists."),
    ):
        assert words in network_obstacle(model)
        assert submission_obstacles(model, "cifar10", eps="8/255") == (network_obstacle(model),)


def test_refuses_a_threat_model_without_leaderboard(write):
    net = robustbench_network("WideResNet-10-1", 100).eval()
    with pytest.raises(ValueError, match=r"`threat_model` .* got 'L2'"):
        write(model=net, dataset="cifar100", evaluation=evaluation_of(net, "cifar100", norm="L2", eps="0.5"))


@pytest.mark.parametrize("eps", ["8/255", "16/510", "8/255.0"])
def test_the_radius_counts_however_it_is_written(eps, network, write):
    folder = write(evaluation=evaluation_of(network, eps=eps))
    (path,) = (folder / "model_info").rglob("*.json")
    assert json.loads(path.read_text())["eps"] == "8/255"
