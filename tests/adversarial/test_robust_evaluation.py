"""RobustEvaluation against AutoAttack itself, and what it leaves untouched."""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("pyautoattack", reason="the oracle is AutoAttack")

from few_steps import FewSteps

from ikl_plugins._autoattack import AutoAttack
from ikl_plugins.adversarial.robust_evaluation import RobustEvaluation


@pytest.fixture
def model():
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def data(model):
    """Images, and labels that the model gives them but for the first three."""
    images = torch.rand(23, 3, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    return images, labels


@pytest.mark.parametrize(
    ("norm", "eps", "radius", "kind"),
    [
        ("Linf", "12/255", 12 / 255, AutoAttack),
        ("Linf", 0.05, 0.05, FewSteps),
        ("L2", 0.4, 0.4, FewSteps),
        ("L1", 1.0, 1.0, FewSteps),
    ],
)
def test_the_accuracy_is_that_of_autoattack(model, data, norm, eps, radius, kind):
    evaluation = RobustEvaluation(eps=eps, norm=norm, batch_size=6, seed=3)
    assert evaluation._autoattack.__name__ == "AutoAttack"
    evaluation._autoattack = kind
    found = evaluation.accuracies(model, model, *data)
    expected = FewSteps.apgd_ce.__func__(kind, model, *data, 6, norm=norm, eps=radius, seed=3)
    assert found == (100.0 * 20 / 23, expected)
    assert 0 < found.robust < found.natural


def test_the_accuracy_is_that_of_evaluate(model, data, monkeypatch):
    """Which takes the parameters of version 'custom': five restarts."""
    reason = "RobustBench is not installed"
    robustbench = pytest.importorskip("ikl_plugins.robustbench", reason=reason, exc_type=ImportError)
    monkeypatch.setattr(sys.modules["robustbench"].eval, "AutoAttack", FewSteps)
    evaluation = RobustEvaluation(eps="8/255", batch_size=6, n_restarts=5)
    evaluation._autoattack = FewSteps
    log = robustbench.evaluate(model, *data, eps="8/255", attacks=["apgd-ce"], batch_size=6, progress=None).log
    found = evaluation.accuracies(model, model, *data)
    assert found == pytest.approx((log["natural_accuracy"], log["robust_accuracy"]))


def test_nothing_of_the_training_moves(model, data):
    model.append(torch.nn.BatchNorm1d(10)).train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    with torch.inference_mode():
        RobustEvaluation(eps="8/255").accuracies(model, model, *data)
    assert (torch.rand(1), random.random()) == expected
    assert [module.training for module in model] == [False, True, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("labels", "length", "count", "expected"),
    [
        ([0, 0, 0, 0, 1, 1, 2], 7, 4, [0, 1, 4, 6]),
        ([0, 1, 0, 1, 0, 1], 6, 4, [0, 1, 2, 3]),
        (None, 10, 4, [0, 2, 5, 7]),
        (None, 3, 9, [0, 1, 2]),
    ],
)
def test_images_are_spread_over_the_classes(labels, length, count, expected):
    assert RobustEvaluation(eps=0.1, n_examples=count).chosen(labels, length) == expected


def test_it_is_due_every_so_many_epochs_and_at_the_end():
    evaluation = RobustEvaluation(eps=0.1, interval=3)
    assert [epoch for epoch in range(1, 8) if evaluation.due(epoch, 7)] == [3, 6, 7]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"norm": "linf"}, "Did you mean `Linf`"),
        ({"eps": 8}, "at most 1 for Linf"),
        ({"n_examples": 0}, "`n_examples` must be an integer of at least 1"),
        ({"interval": 0}, "`interval` must be"),
        ({"n_restarts": 0}, "`n_restarts` must be"),
    ],
)
def test_what_cannot_be_is_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        RobustEvaluation(**{"eps": "8/255", **keywords})


def test_a_missing_autoattack_is_told_before_the_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", None)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.delitem(sys.modules, "ikl_plugins._autoattack", raising=False)
    with pytest.raises(ImportError, match="Run: pip install pyautoattack"):
        RobustEvaluation(eps="8/255")


RANK = """
import sys
import torch, torch.distributed as dist
from ikl_plugins.adversarial.robust_evaluation import RobustEvaluation
torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10), torch.nn.BatchNorm1d(10)).eval()
images = torch.rand(23, 3, 4, 4)
labels = model(images).argmax(1)
evaluation = RobustEvaluation(eps="12/255", batch_size=6)
alone = evaluation.accuracies(model, model, images, labels)
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
model[-1].running_mean += 0.05 * rank * torch.arange(10)  # of its own batches; rank 0's count
own = model[-1].running_mean.clone()
together = evaluation.accuracies(model, model, images, labels)
assert together == alone and torch.equal(model[-1].running_mean, own), (together, alone)
print(0 < together.robust < together.natural)
"""


def test_two_ranks_find_what_one_finds(tmp_path):
    command = [sys.executable, "-c", RANK]
    options = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **options) for rank in (0, 1)]
    assert [process.communicate(timeout=120)[0].strip() for process in ranks] == ["True", "True"]
