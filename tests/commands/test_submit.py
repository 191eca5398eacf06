"""tools/robustbench_submit.py: from a checkpoint and its evaluation to the folder."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from ikl_plugins.commands import submit as robustbench_submit
import torch
from ikl_plugins.commands.submit import main

from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.evaluation import evaluate
from ikl_plugins.robustbench.evaluation_log import Evaluation
from ikl_plugins.robustbench.submission import DEMONSTRATION

TOOL = Path(robustbench_submit.__file__)
NAME = "Doe2025Better_WRN-10-1"
PAPER = [
    "--name", NAME, "--title", "Better Networks", "--link", "https://example.org/paper",
    "--authors", "Jane Doe, John Roe", "--venue", "arXiv, Jan 2025", "--licence", "MIT",
]  # fmt: skip
DECLARED = ["--additional-data", "no", "--generated-data", "no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, images, and an evaluation of 12 of them by one attack."""
    folder = tmp_path_factory.mktemp("submit")
    torch.manual_seed(2)
    net = robustbench_network("WideResNet-10-1").eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, folder / "net.pt")
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        labels = net(images / 255).argmax(dim=1)
    np.savez(folder / "images.npz", image=images.permute(0, 2, 3, 1).numpy(), label=labels.numpy())
    evaluate(
        net, images / 255, labels, eps="1/255", attacks=["apgd-ce"], log=folder / "evaluation.json", data="images.npz"
    )
    return folder


@pytest.fixture
def arguments(place, tmp_path):
    return [
        "--checkpoint", str(place / "net.pt"), "--architecture", "WideResNet-10-1", "--data", str(place / "images.npz"),
        "--n-examples", "12", "--evaluation", str(place / "evaluation.json"), *PAPER, *DECLARED,
        "--output", str(tmp_path / "submission"),
    ]  # fmt: skip


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
    main([*arguments, "--demonstration"])
    printed = capsys.readouterr().out
    folder = tmp_path / "submission"
    assert files(folder) == [
        "SHA256SUMS",
        "evaluation.json",
        f"model_info/cifar10/Linf/{NAME}_demonstration.json",
        f"models/cifar10/Linf/{NAME}_demonstration.pt",
        "new_models_form.md",
        "preflight.json",
        "preflight.md",
        "zoo_entry.py",
    ]
    checks = json.loads((folder / "preflight.json").read_text())
    assert checks["passed"]
    assert all(check["passed"] for check in checks["checks"])
    copied = Evaluation.load(folder / "evaluation.json")
    assert (copied.robust_accuracy, copied.adversarial) == (
        Evaluation.load(place / "evaluation.json").robust_accuracy,
        None,
    )
    assert "preflight, deterministic: pass. The same logits under every seed" in printed
    assert f"submission: {folder}\nstill open in new_models_form.md: - **Checkpoint and code**: " in printed
    assert printed.endswith("This is a demonstration: its files say so, and RobustBench would not take it.\n")
    assert DEMONSTRATION in (folder / "new_models_form.md").read_text()


def test_writes_a_submission_of_what_robustbench_evaluates(arguments, place, tmp_path, capsys):
    log = json.loads((place / "evaluation.json").read_text())
    log.update(standard=True, version="standard", data={"name": "cifar10"}, n_examples=10000, eps="8/255")
    (tmp_path / "evaluation.json").write_text(json.dumps(log))
    arguments[arguments.index("--evaluation") + 1] = str(tmp_path / "evaluation.json")
    links = [
        "--checkpoint-link",
        "https://example.org/w",
        "--code-link",
        "https://example.org/c",
        "--gdrive-id",
        "1abc",
    ]
    main(
        [*arguments, *links, "--generated-data", "yes", "--additional-data", "yes", "--footnote", "It uses 5.",
         "--number-forward-passes", "2", "--no-model-zoo", "--licence", "https://example.org/l"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "still open" not in printed
    assert printed.endswith("post the form at https://github.com/RobustBench/robustbench/issues/new\n")
    folder = tmp_path / "submission"
    entry = json.loads((folder / f"model_info/cifar10/Linf/{NAME}.json").read_text())
    assert (entry["additional_data"], entry["footnote"], entry["number_forward_passes"]) == (True, "It uses 5.", 2)
    form = (folder / "new_models_form.md").read_text()
    assert "checkpoint https://example.org/w, code https://example.org/c" in form
    assert "- [ ] I want to add my models to the Model Zoo" in form
    assert "- [x] under a custom license, located here: https://example.org/l" in form
    assert runpy.run_path(str(folder / "zoo_entry.py"))["ENTRY"][1]["gdrive_id"] == "1abc"


def test_an_evaluation_that_is_not_the_benchmark_writes_nothing(arguments, tmp_path):
    message = refused(arguments)
    assert message.startswith(
        "write_submission: `evaluation` must be of standard AutoAttack, got version 'custom' with apgd-ce. "
    )
    assert not (tmp_path / "submission").exists()


def test_a_failed_preflight_writes_nothing_unless_allowed(arguments, place, tmp_path, capsys):
    with np.load(place / "images.npz") as content:
        np.savez(tmp_path / "dark.npz", image=np.zeros_like(content["image"]), label=content["label"])
    arguments[arguments.index("--data") + 1] = str(tmp_path / "dark.npz")
    message = refused([*arguments, "--demonstration"])
    assert message.startswith("write_submission: `preflight` must have passed, but failed. ")
    assert "inputs: The images reach 0 at most." in message
    assert "preflight, inputs: FAIL." in capsys.readouterr().out
    assert not (tmp_path / "submission").exists()
    main([*arguments, "--demonstration", "--allow-failed-preflight"])
    assert "**Preflight failed: " in (tmp_path / "submission" / "new_models_form.md").read_text()


def test_a_claim_above_the_measurement_fails(arguments, capsys):
    message = refused([*arguments, "--demonstration", "--reported", "100"])
    assert "`reported` must not be above the measured " in message
    assert "preflight, claim: FAIL. The claim of 100.00 % is above the measured " in capsys.readouterr().out


def test_a_checkpoint_that_was_not_evaluated_is_refused(arguments, tmp_path):
    torch.manual_seed(3)
    torch.save(robustbench_network("WideResNet-10-1").state_dict(), tmp_path / "other.pt")
    arguments[arguments.index("--checkpoint") + 1] = str(tmp_path / "other.pt")
    message = refused([*arguments, "--demonstration"])
    assert message.startswith("write_submission: `model` must have the weights of the evaluation, whose checksum is ")


def test_an_existing_folder_needs_force(arguments, tmp_path):
    main([*arguments, "--demonstration"])
    assert refused([*arguments, "--demonstration"]).startswith("write_submission: `folder` must be a new one, but ")
    main([*arguments, "--demonstration", "--force", "--name", "Doe2025Better"])
    assert "models/cifar10/Linf/Doe2025Better_demonstration.pt" in files(tmp_path / "submission")


def test_a_name_that_does_not_go_with_the_paper_is_warned_of_on_one_line(arguments, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main([*arguments, "--demonstration", "--name", "Doe2025Worse"])
    assert capsys.readouterr().err == (
        "warning: write_submission: `name` has Worse where RobustBench has the first word of the title, which is "
        "Better.\n"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--mmpretrain", "config.py"],
            "robustbench_submit: the model must be one of RobustBench's own architectures, got --mmpretrain. Train the "
            "network as RobustBenchNetwork (mmpretrain) or ikl_plugins.robustbench_network (torchdistill), and "
            "evaluate and submit it with --checkpoint FILE --architecture NAME.",
        ),
        (
            ["--zoo", "Standard"],
            "robustbench_submit: the model must be one of RobustBench's own architectures, got --zoo",
        ),
        (["--architecture", "resnet20"], "robustbench_submit: unknown architecture `resnet20`."),
        (["--architecture", "WideResNet-16-1"], "load_checkpoint: "),
        (["--checkpoint", "missing.pt"], "load_content: "),
        (
            ["--evaluation", "missing.json"],
            "Evaluation.load: the log must be a file, but there is none at missing.json.",
        ),
        (["--n-examples", "13"], "load_images: `n_examples` must be at most 12"),
        (["--name", "mine"], "write_submission: `name` must be <FamilyName><Year><FirstWordOfTitle>"),
        (["--generated-data", "yes"], "write_submission: `footnote` must say what generated images were trained on"),
    ],
)
def test_errors_are_one_line(changed, message, arguments, tmp_path):
    assert refused([*arguments, *changed, "--demonstration"]).startswith(message)
    assert not (tmp_path / "submission").exists()


@pytest.mark.parametrize("option", ["--additional-data", "--generated-data", "--licence", "--name", "--evaluation"])
def test_what_must_be_declared_has_no_default(option, arguments, capsys):
    index = arguments.index(option)
    del arguments[index : index + 2]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"the following arguments are required: {option}" in capsys.readouterr().err


def test_runs_from_any_folder(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, *arguments, "--demonstration"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "submission" / "SHA256SUMS").is_file()
