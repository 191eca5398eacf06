"""Weights that no network of plain tensors can take are refused in one line that names the file."""

import os
import warnings

import pytest
import torch
from torch import nn

from ikl_plugins import checkpoints
from ikl_plugins.checkpoints import load_content, load_weights
from ikl_plugins.models.weights import load_strictly, without_normaliser

pytestmark = pytest.mark.skipif(not checkpoints.READS_WEIGHTS_ONLY, reason="needs torch 2.6 or newer")
NUMBERS = torch.ones(2, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer torch calls them outdated
    QUANTISED = torch.quantize_per_tensor(NUMBERS, 0.1, 0, torch.qint8)
# what it is: the weight, how a refusal calls it
ODD_TENSORS = {
    "sparse": (NUMBERS.to_sparse(), r"is of the layout torch\.sparse_coo"),
    "quantised": (QUANTISED, "is quantised"),
    "meta": (NUMBERS.to("meta"), "is without values, on the meta device"),
}
ODD_NAMES = {
    "number": (5, "got a int"),
    "tuple": ((1, ("a", 2)), "got a tuple"),
    "none": (None, "got a NoneType"),
    "long": ("a\x1b" * 10**6, r"got a\\x1ba"),
    "dotted": (".".join("ema" * 10**5), r"got e\.m\.a"),
    "average": ("ema." * 10**5 + "\n", r"got ema\.ema\."),
}


def loaded(path):
    return load_strictly("load_checkpoint", nn.Linear(3, 2), load_weights(path), path, "the network")


@pytest.mark.parametrize("case", ODD_TENSORS)
def test_a_tensor_that_is_not_dense_is_refused(case, tmp_path):
    weight, kind = ODD_TENSORS[case]
    path = tmp_path / "odd.pth"
    with pytest.raises(ValueError, match=rf"^load_checkpoint: the checkpoint a\.pth must hold dense .*'weight' {kind}"):
        load_strictly("load_checkpoint", nn.Linear(3, 2), {"weight": weight}, "a.pth", "the network")
    sets = [{"weight": weight, "bias": torch.ones(2)}]
    sets += [{"state_dict": sets[0]}, {"state_dict": sets[0], "model_ema": sets[0], "ema": sets[0]}]
    for content in sets:
        torch.save(content, path)
        load_content(path)
        with pytest.raises(
            ValueError, match=rf"odd\.pth must (hold dense tensors, but 'weight' {kind}|leave no doubt)"
        ):
            load_weights(path)


@pytest.mark.parametrize("case", ODD_NAMES)
@pytest.mark.parametrize("key", [None, "state_dict", "ema"])
def test_a_name_that_is_no_short_text_is_refused(case, key, tmp_path):
    name, shown = ODD_NAMES[case]
    weights = {name: NUMBERS}
    path = tmp_path / "odd.pth"
    torch.save(weights if key is None else {key: weights}, path)
    with pytest.raises(
        ValueError, match=rf"odd\.pth must (name weights by texts of at most 500 .*{shown}|hold weights)"
    ):
        load_weights(path)


class Subclass(torch.Tensor):
    pass


def test_others_are_named_by_the_strict_load():
    network = nn.Linear(3, 2)
    weights = network.state_dict()
    for odd, what in ((NUMBERS.as_subclass(Subclass), "is a Subclass"), (NUMBERS.cfloat(), "is complex")):
        with pytest.raises(ValueError, match=rf"^test: the checkpoint a\.pth must hold .*weight.* {what}"):
            load_strictly("test", network, {**weights, "weight": odd}, "a.pth", "the network")
    with pytest.raises(ValueError, match=r"unexpected: \\x1b\[31m\\nx{67}\.\.\.\. Name") as refused:
        load_strictly("test", network, {**weights, "\x1b[31m\n" + "x" * 99: NUMBERS}, "a.pth", "the network")
    assert len(str(refused.value)) < 300
    for mean, std in (
        (torch.ones(0), torch.ones(0)),
        (torch.ones(1).cfloat(), torch.ones(1)),
        (torch.ones(1), NUMBERS),
    ):
        rest, found = without_normaliser("test", {"mean": mean, "std": std}, "a.pth")
        assert (found, len(rest)) == (None, 2)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    kept = tmp_path / "checkpoints" / "fifo-0123abcd.pth"
    kept.parent.mkdir()
    os.mkfifo(kept)
    for source in (kept, "http://127.0.0.1:9/fifo-0123abcd.pth"):
        with pytest.raises(ValueError, match=r"fifo-0123abcd\.pth must be a regular file, but is a FIFO"):
            load_weights(source)
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="there is none at"):
            load_weights(path)
