"""`ikl submit`: from a checkpoint and its evaluation to the folder."""

from __future__ import annotations

import json
import re
import runpy
import shlex

import numpy as np
import pytest
import torch
from quick_autoattack import Harmless, Quick, robustbench, write_network_and_images

from ikl_plugins.commands import submit
from ikl_plugins.commands.main import main as ikl
from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench import data, evaluate, load_checkpoint, load_images
from ikl_plugins.robustbench.evaluation.log import Evaluation, write_log
from ikl_plugins.robustbench.known_sets import KNOWN
from ikl_plugins.robustbench.submission import DEMONSTRATION

pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")
NAME = "Doe2025Better_WRN-10-1"
PAPER = shlex.split(
    f"--name {NAME} --title 'Better Networks' --link https://example.org/paper --authors 'Jane Doe, John Roe' "
    "--venue 'arXiv, Jan 2025' --licence MIT"
)
DECLARED = ["--additional-data", "no", "--generated-data", "no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, images, and an evaluation of 12 of them by one attack."""
    folder = tmp_path_factory.mktemp("submit")
    net, images, labels = write_network_and_images(folder, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustbench.eval, "AutoAttack", Quick)
        options = {"eps": "1/255", "attacks": ["apgd-ce"], "data": "images.npz"}
        evaluate(net, images, labels, log=folder / "evaluation.json", **options)
    return folder


@pytest.fixture
def arguments(place, tmp_path):
    model = f"--checkpoint {place}/net.pt --architecture WideResNet-10-1 --data {place}/images.npz --n-examples 12"
    given = f"{model} --evaluation {place}/evaluation.json --output {tmp_path}/submission"
    return [*given.split(), *PAPER, *DECLARED]


def main(arguments):
    ikl(["submit", *arguments])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = str(ended.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message.removeprefix("error: ")


def test_writes_a_marked_demonstration(arguments, place, tmp_path, capsys):
    natural = Evaluation.load(place / "evaluation.json").natural_accuracy
    record = {"attack": "A3", "by": "Jane Doe", "code": "https://example.org", "natural_accuracy": natural}
    record |= {"robust_accuracy": 0.0, "n_examples": 12, "threat_model": "Linf", "eps": "1/255"}
    (tmp_path / "a3.json").write_text(json.dumps(record))
    main([*arguments, "--demonstration", "--external", f"{tmp_path}/a3.json"])
    printed = capsys.readouterr().out
    folder = tmp_path / "submission"
    assert "- **Robust accuracy**: 0.00\n" in (folder / "new_models_form.md").read_text()
    assert f"models/cifar10/Linf/{NAME}_demonstration.pt" in files(folder)
    checks = json.loads((folder / "preflight.json").read_text())
    assert checks["passed"]
    assert all(check["passed"] for check in checks["checks"])
    copied = Evaluation.load(folder / "evaluation.json")
    assert copied.robust_accuracy == Evaluation.load(place / "evaluation.json").robust_accuracy
    assert copied.adversarial is None
    assert "preflight, deterministic: pass" in printed
    assert "still open" in printed
    assert DEMONSTRATION in (folder / "new_models_form.md").read_text()


@pytest.fixture
def cifar(place, monkeypatch):
    """The images of the place as the test set of CIFAR-10."""
    with np.load(place / "images.npz") as content:
        images = torch.from_numpy(content["images"]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(content["labels"])
    kind = robustbench.data.BenchmarkDataset.cifar_10
    loaders = robustbench.data._clean_dataset_loaders
    monkeypatch.setitem(loaders, kind, lambda n, folder, transform: (images[:n], labels[:n]))
    monkeypatch.setattr(data, "cifar_source", lambda name, *_: KNOWN[name].source)
    monkeypatch.setitem(KNOWN, "cifar10", KNOWN["cifar10"]._replace(n_examples=12))
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Harmless)
    return load_images("cifar10")


def evaluated(place, images, folder, **options):
    model = load_checkpoint(place / "net.pt", "WideResNet-10-1")
    log = folder / "evaluation.json"
    evaluate(model, images.images, images.labels, data=images, log=log, progress=False, **options)
    return log


def test_writes_a_submission_of_what_robustbench_evaluates(arguments, place, cifar, tmp_path, capsys):
    arguments[arguments.index("--evaluation") + 1] = str(evaluated(place, cifar, tmp_path, eps="8/255"))
    arguments[arguments.index("--data") + 1] = "cifar10"
    links = "--checkpoint-link https://example.org/w --code-link https://example.org/c --gdrive-id 1abc"
    declared = "--generated-data yes --additional-data yes --number-forward-passes 2 --licence https://example.org/l"
    main([*arguments, *links.split(), *declared.split(), "--footnote", "It uses 5.", "--no-model-zoo"])
    printed = capsys.readouterr().out
    assert "still open" not in printed
    folder = tmp_path / "submission"
    entry = json.loads((folder / f"model_info/cifar10/Linf/{NAME}.json").read_text())
    assert (entry["additional_data"], entry["footnote"], entry["number_forward_passes"]) == (True, "It uses 5.", 2)
    form = (folder / "new_models_form.md").read_text()
    assert "run again on 12 of 12 natural and 0 of 0 adversarial images: as the log says" in form
    assert "checkpoint https://example.org/w, code https://example.org/c" in form
    assert "- [ ] I want to add my models to the Model Zoo" in form
    assert "- [x] under a custom license, located here: https://example.org/l" in form
    assert runpy.run_path(str(folder / "zoo_entry.py"))["ENTRY"][1]["gdrive_id"] == "1abc"


@pytest.mark.parametrize("seal", ["as it was", "renewed"])
def test_a_log_made_better_by_hand_is_no_submission(seal, arguments, place, cifar, tmp_path):
    path = evaluated(place, cifar, tmp_path, eps="8/255")
    log = {**json.loads(path.read_text()), "robust_accuracy": 99.0}
    write_log(log, path) if seal == "renewed" else path.write_text(json.dumps(log))
    arguments[arguments.index("--evaluation") + 1] = str(path)
    message = refused([*arguments, "--demonstration"])
    assert re.match("Evaluation.load: .*robust_accuracy", message), message


def test_a_failed_preflight_writes_nothing_unless_allowed(arguments, place, tmp_path, capsys):
    with np.load(place / "images.npz") as content:
        np.savez(tmp_path / "dark.npz", images=np.zeros_like(content["images"]), labels=content["labels"])
    arguments[arguments.index("--data") + 1] = str(tmp_path / "dark.npz")
    log = evaluated(place, load_images(tmp_path / "dark.npz"), tmp_path, eps="1/255", attacks=["square"])
    arguments[arguments.index("--evaluation") + 1] = str(log)
    message = refused([*arguments, "--demonstration"])
    assert message.startswith("write_submission: `preflight` must have passed, but failed. ")
    assert "inputs: The images reach 0 at most." in message
    assert "preflight, inputs: FAIL." in capsys.readouterr().out
    assert not (tmp_path / "submission").exists()
    main([*arguments, "--demonstration", "--allow-failed-preflight"])
    assert "**Preflight failed: " in (tmp_path / "submission" / "new_models_form.md").read_text()


@pytest.mark.parametrize(("options", "size"), [([], 128), (["--batch-size", "5"], 5)])
def test_the_checks_take_batches_of_the_size_of_the_evaluation(options, size, arguments, monkeypatch):
    def stop(*_, batch_size, **__):
        raise ValueError(f"batches of {batch_size}")

    monkeypatch.setattr("ikl_plugins.robustbench.preflight", stop)
    assert refused([*arguments, "--demonstration", *options]) == f"batches of {size}"


def test_what_needs_no_model_is_checked_before_it_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(submit, "model_from", lambda *_, **__: pytest.fail("the checkpoint is loaded too early"))
    for more, fragment in (
        (["--name", "mine"], "`name` must be"),
        (["--reported", "101"], "`reported` must be in percent"),
        (["--dataset", "cifar100"], "`evaluation` must"),
        ([], "`evaluation` must be of standard AutoAttack"),
    ):
        assert refused([*arguments, *more]).startswith(f"write_submission: {fragment}")


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ("--mmpretrain config.py", "ikl submit: .* got --mmpretrain"),
        ("--zoo Standard", "ikl submit: .* got --zoo"),
        ("--architecture resnet20", "write_submission: unknown architecture `resnet20`"),
        ("--evaluation missing.json", "Evaluation.load: the log must be a file, but there is none at missing.json"),
        ("--generated-data yes", "write_submission: `footnote` must say what generated images were trained on"),
        ("--checkpoint {other}", "write_submission: `model` must have the weights of the evaluation, "),
    ],
)
def test_errors_are_one_line(changed, fragment, arguments, tmp_path):
    torch.save(robustbench_network("WideResNet-10-1").state_dict(), tmp_path / "other.pt")
    message = refused([*arguments, *changed.format(other=tmp_path / "other.pt").split(), "--demonstration"])
    assert re.match(fragment, message), message
    assert not (tmp_path / "submission").exists()


@pytest.mark.parametrize("option", ["--additional-data", "--generated-data", "--licence", "--name", "--evaluation"])
def test_what_must_be_declared_has_no_default(option, arguments, capsys):
    index = arguments.index(option)
    del arguments[index : index + 2]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"the following arguments are required: {option}" in capsys.readouterr().err
