"""The stand-in for autoattack: pyautoattack's results under the original's interface."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import Tensor, nn

pyautoattack = pytest.importorskip("pyautoattack")
from ikl_plugins._autoattack import AutoAttack  # noqa: E402

EPS = 16 / 255
SOME = ("apgd-ce", "square")


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        return images, model(images).argmax(1)


def _few_queries(attack: pyautoattack.AutoAttack) -> None:
    attack.square.n_queries = 20


def test_has_the_arguments_of_the_original_in_its_order() -> None:
    # Of https://github.com/fra31/auto-attack, autoattack/autoattack.py.
    wanted = "self, model, norm, eps, seed, verbose, attacks_to_run, version, is_tf_model, device, log_path"
    assert ", ".join(inspect.signature(AutoAttack.__init__).parameters) == wanted
    method = inspect.signature(AutoAttack.run_standard_evaluation).parameters
    assert list(method)[:6] == ["self", "x_orig", "y_orig", "bs", "return_labels", "state_path"]


def test_equals_pyautoattack(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    ours = AutoAttack(model, "Linf", EPS, seed=3, verbose=False, attacks_to_run=SOME, version="custom")
    theirs = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, seed=3, attacks=list(SOME), version="custom")
    _few_queries(ours)
    _few_queries(theirs)
    images, predictions = ours.run_standard_evaluation(*batch, bs=4, return_labels=True)
    wanted_images, wanted_predictions = theirs.run_standard_evaluation(*batch, batch_size=4)
    assert torch.equal(images, wanted_images)
    assert torch.equal(predictions, wanted_predictions)
    assert not torch.equal(images, batch[0])  # something fell
    assert torch.equal(ours.run_standard_evaluation(*batch, bs=4), wanted_images)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_versions_have_the_attacks_of_pyautoattack(model: nn.Module, batch: object, version: str) -> None:
    del batch  # it has given the lazy layer its shape
    ours = AutoAttack(model, version=version)
    theirs = pyautoattack.AutoAttack(model, version=version)
    assert ours.attacks_to_run == theirs.attacks_to_run
    assert ours.apgd_targeted.n_target_classes == theirs.apgd_targeted.n_target_classes


def test_attacks_on_the_device_of_the_model(model: nn.Module, batch: object) -> None:
    del batch
    assert torch.device(AutoAttack(model).device) == torch.device("cpu")
    assert AutoAttack(nn.Flatten()).device == "cpu"
    assert AutoAttack(model.to("meta")).device == torch.device("meta")


def test_leaves_a_debugger_in_place_and_prints_nothing_when_not_verbose(
    model: nn.Module, batch: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    def tracer(*_: object) -> None: ...

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        attack = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=["apgd-ce"], version="custom")
        attack.run_standard_evaluation(*batch, bs=6)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer
    assert capsys.readouterr().out == ""
