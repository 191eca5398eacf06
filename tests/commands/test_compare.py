"""`ikl compare`: what it prints and writes; the numbers are tested beside :mod:`ikl_plugins.robustbench.compare`."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

# By its companion: the folder tests/robustbench would be found under its own name.
if None in (importlib.util.find_spec("pyautoattack"), importlib.util.find_spec("matplotlib")):
    pytest.skip("needs robustbench and matplotlib (extra `demo`)", allow_module_level=True)

from quick_autoattack import Quick, batch, network, robustbench

from ikl_plugins.robustbench import compare, evaluate


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(robustbench.eval, "AutoAttack", Quick)
    model = network()
    pixels, labels = batch(model)
    for name, eps in (("a", "1/255"), ("b", "1/255"), ("far", "4/255")):
        evaluate(model, pixels, labels, eps=eps, attacks=["apgd-ce"], log=tmp_path / f"{name}.json")
        with torch.no_grad():
            model[-1].bias.add_(0.02 * torch.randn(10))
    return tmp_path


def test_the_comparison_is_printed_and_written(ikl, logs):
    done = ikl("compare", logs / "a.json", logs / "b.json", "--output", logs / "c.json", "--plot", logs / "c.png")
    assert done.status is None
    assert done.out.startswith(str(compare(logs / "a.json", logs / "b.json")))
    assert json.loads((logs / "c.json").read_text())["robust"]["both"] > 0
    assert (logs / "c.png").stat().st_size > 1000


@pytest.mark.filterwarnings("always:compare")
def test_other_attacks_are_refused_unless_allowed(ikl, logs):
    words = ["compare", logs / "a.json", logs / "far.json"]
    assert "must have the same settings, but differ in eps" in ikl(*words).status
    done = ikl(*words, "--allow-differences")
    assert 'warning: compare: the evaluations are not comparable in eps, "1/255" and "4/255".' in done.err
    assert "robust" in done.out
    natural = ikl(*words, "--natural")
    assert (natural.err, natural.status) == ("", None)
    assert "robust" not in natural.out
