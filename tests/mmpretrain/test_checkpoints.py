"""Checkpoints: what MMEngine writes is read, what would run code is not."""

import functools
import hashlib
import http.server
import os
import pickle
import re
import threading
from pathlib import Path

import numpy
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from mmpretrain_runs import Bomb

from ikl_plugins import checkpoints as neutral
from ikl_plugins.mmengine import checkpoints
from ikl_plugins.mmengine.checkpoints import allow_mmengine_checkpoints, load_content, load_weights, verify

FORK = hasattr(checkpoints.mmengine.runner.checkpoint, "get_torch_safe_globals")


class Attribute:
    """Pickles to a call of getattr."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


@pytest.fixture
def mmengine_checkpoint(tmp_path):
    """A file with all that a checkpoint of MMEngine holds beyond weights."""
    hub = MessageHub.get_instance("test_checkpoints")
    hub.update_scalar("train/loss", 0.5)
    hub.update_scalar("train/loss", 1.5)
    hub.update_info("iter", 3)
    path = tmp_path / "epoch_1.pth"
    weights = {"head.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save({"meta": {"epoch": 1, "seed": 0}, "state_dict": weights, "message_hub": hub.state_dict()}, path)
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_mmengine_is_read_and_leaves_the_allow_list_as_it_was(mmengine_checkpoint):
    before = set(torch.serialization.get_safe_globals())
    history = load_content(mmengine_checkpoint)["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    assert (history.mean(), history.statistics("max")) == (1.0, 1.5)
    verify(mmengine_checkpoint, resume=True)
    assert set(torch.serialization.get_safe_globals()) == before
    content = checkpoints.mmengine.runner.checkpoint.load_checkpoint(torch.nn.Linear(3, 2), str(mmengine_checkpoint))
    assert content["meta"]["epoch"] == 1  # as the host reads it


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_arrays_are_read_whichever_numpy_has_written_them(core, mmengine_checkpoint):
    plain = torch.load(mmengine_checkpoint, weights_only=False)
    path = mmengine_checkpoint.with_name("legacy.pth")
    torch.save(plain, path, _use_new_zipfile_serialization=False)  # not zipped, so that a name can be replaced
    content = path.read_bytes()
    assert b"cnumpy._core.multiarray\n" in content
    path.write_bytes(content.replace(b"cnumpy._core.multiarray\n", f"c{core}.multiarray\n".encode()))
    assert load_content(path)["message_hub"]["log_scalars"]["train/loss"].current() == 1.5


def test_torch_itself_may_load_no_more_than_before(mmengine_checkpoint):
    assert allow_mmengine_checkpoints() is not FORK
    listed = {entry[1] if isinstance(entry, tuple) else entry for entry in torch.serialization.get_safe_globals()}
    assert not listed & {"numpy.dtype", "builtins.getattr", numpy.dtype, numpy.ndarray, HistoryBuffer}
    loaded = CheckpointLoader.load_checkpoint(str(mmengine_checkpoint), "cpu")
    assert loaded["message_hub"]["log_scalars"]["train/loss"].current() == 1.5


def test_without_weights_only_by_default_nothing_is_listed(monkeypatch):
    monkeypatch.setattr(neutral, "READS_WEIGHTS_ONLY", False)
    monkeypatch.setattr(CheckpointLoader, "register_scheme", pytest.fail)
    assert allow_mmengine_checkpoints() is False
    with pytest.raises(ValueError, match=r"takes torch 2\.6 or newer, this is .*pip install 'torch>=2\.6'"):
        load_content(__file__)


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["meta", "state_dict", "optimizer"])
@pytest.mark.parametrize("read", [load_content, load_weights, verify])
@pytest.mark.parametrize("function", [os.mkdir, os.system, exec, eval, pickle.loads])
def test_a_checkpoint_that_runs_code_is_refused(place, read, function, tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {"weight": torch.ones(2)}, place: {"x": Bomb(tmp_path / "exploded", function)}}, path)
    with pytest.raises(
        ValueError, match=rf"the checkpoint .*bomb\.pth .* would run code: .*{function.__name__}\. Allow"
    ):
        read(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(HistoryBuffer, "__init__"), (HistoryBuffer, "__globals__"), (torch.Tensor, "mean"), (dict, "get")],
)
def test_getattr_gives_a_checkpoint_four_statistics_and_nothing_else(owner, name, tmp_path):
    path = tmp_path / "attribute.pth"
    for allowed in ("min", "max", "current", "mean"):
        torch.save({"x": Attribute(HistoryBuffer, allowed)}, path)
        assert load_content(path) == {"x": getattr(HistoryBuffer, allowed)}
    torch.save({"x": Attribute(owner, name)}, path)
    with pytest.raises(ValueError, match=r"would run code"):
        load_content(path)


def test_the_host_refuses_code_too(tmp_path):
    if FORK:
        pytest.skip("this MMEngine reads such a file a second time and runs it; IKLHook verifies it before")
    torch.save({"state_dict": {}, "x": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="would run code"):
        checkpoints.mmengine.runner.checkpoint.load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share, mmengine_checkpoint):
    content = mmengine_checkpoint.read_bytes()
    mmengine_checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"epoch_1\.pth must be one of .* may be damaged"):
        verify(mmengine_checkpoint)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_flipped_bit_is_never_taken_for_weights(place, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(4096)}, path)
    load_weights(path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth must be one of .* may be damaged"):
        load_weights(path)


# content: what a run to go on with lacks
ALONE = [
    ({"weight": torch.ones(1)}, "'meta', 'message_hub', 'state_dict'"),
    ({"state_dict": {"weight": torch.ones(1)}, "meta": {}}, "'message_hub'"),
    ([torch.ones(1)], "'meta', 'message_hub', 'state_dict'"),
]
# content: how it is no weights
NO_WEIGHTS = [
    ([torch.ones(1)], r"weights by name, got a list\."),
    ({}, r"weights by name, got an empty mapping\."),
    ({"epoch": 3, "weight": torch.ones(1)}, r"these are none: 'epoch' \(int\)\."),
    ({"state_dict": dict.fromkeys("abcdefg", 1)}, r"'a' \(int\), .*'e' \(int\) and 2 more\."),
]


def test_what_is_not_what_it_is_read_for_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError, match=r"none at .*a\.pth\. Check the path"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"that is a folder at"):
        verify(tmp_path)
    for content, what in NO_WEIGHTS:
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"the checkpoint .*a\.pth must hold .*{what}"):
            load_weights(path)
    for content, missing in ALONE:
        torch.save(content, path)
        verify(path)
        with pytest.raises(ValueError, match=rf"^verify: .*a\.pth must be .* lacks {missing}\. .*`load_from`"):
            verify(path, resume=True)
    for key, value in (("meta", [1]), ("message_hub", torch.ones(2)), ("state_dict", {5: torch.ones(1)})):
        torch.save({"meta": {}, "message_hub": {}, "state_dict": {}, key: value}, path)
        with pytest.raises(
            ValueError, match=rf"^verify: '{key}' of the checkpoint .*a\.pth must hold values by name\."
        ):
            verify(path, resume=True)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_whoever_saved_them(key, prefix, tmp_path):
    weights = {"head.fc.weight": torch.arange(6.0), "backbone.bn.num_batches_tracked": torch.tensor(3)}
    saved = {prefix + name: value for name, value in weights.items()}
    torch.save(saved if key is None else {key: saved, "epoch": 3}, tmp_path / "a.pth")
    found = load_weights(tmp_path / "a.pth")
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("names", [("module.a", "b"), ("model", "state_dict")])
def test_a_prefix_that_some_names_lack_stays_and_a_weight_called_like_a_key_is_a_weight(names, tmp_path):
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pth")
    assert tuple(load_weights(tmp_path / "a.pth")) == names


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A local server's address of ``served``; torch's hub folder is a temporary one."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()
        thread.join()


def test_what_is_verified_at_an_address_is_what_is_read(address, mmengine_checkpoint):
    url, served = address
    mmengine_checkpoint.rename(served / "a.pth")
    assert list(load_weights(f"{url}/a.pth")) == ["head.weight"]
    verify(f"{url}/a.pth")
    (served / "a.pth").write_bytes(b"another one")
    read = checkpoints.mmengine.runner.checkpoint.load_from_http
    for one in (read, CheckpointLoader.load_checkpoint):
        assert one(f"{url}/a.pth", map_location="cpu")["meta"]["epoch"] == 1


def test_files_of_one_name_at_two_addresses_are_two(address):
    url, served = address
    for number, folder in enumerate("xy"):
        (served / folder).mkdir()
        torch.save({"weight": torch.full((1,), number)}, served / folder / "best.pth")
    for number, folder in [*enumerate("xy"), *enumerate("xy")]:
        assert load_weights(f"{url}/{folder}/best.pth")["weight"].item() == number
    for name in ("best.pth?of=x", "best.pth?of=y"):
        assert load_weights(f"{url}/x/{name}")["weight"].item() == 0
    assert len(list(Path(torch.hub.get_dir(), "checkpoints").iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("best.pth", r"best\.[0-9a-f]{8}\.pth"),
        ("best", r"best\.[0-9a-f]{8}"),
        ("best.pth.tar", r"best\.pth\.[0-9a-f]{8}\.tar"),
        ("best-abc.pth", r"best-abc\.[0-9a-f]{8}\.pth"),
        ("best-20240131.pth", r"best-20240131\.[0-9a-f]{8}\.pth"),  # a day
        ("resnet50-DIGEST8.pth", None),
        ("resnet50-DIGEST12.pth.tar", None),
        ("resnet50_20240131-DIGEST8.pth", None),
    ],
)
def test_the_name_of_what_is_kept_is_of_its_address_or_its_content(name, kept, address):
    url, served = address
    torch.save({"weight": torch.ones(1)}, served / "file")
    digest = hashlib.sha256((served / "file").read_bytes()).hexdigest()
    name = name.replace("DIGEST12", digest[:12]).replace("DIGEST8", digest[:8])
    (served / "file").rename(served / name)
    load_weights(f"{url}/{name}")
    (served / name).unlink()
    load_weights(f"{url}/{name}")  # from the hub folder
    (path,) = Path(torch.hub.get_dir(), "checkpoints").iterdir()
    assert re.fullmatch(kept or re.escape(name), path.name)


def test_an_address_gets_no_more_trust_than_a_file(address, tmp_path):
    url, served = address
    torch.save({"state_dict": {}, "x": Bomb(tmp_path / "exploded")}, served / "bomb.pth")
    torch.save({"weight": torch.ones(1)}, served / "weights.pth")
    for read in (load_weights, verify, *([] if FORK else [CheckpointLoader.load_checkpoint])):
        with pytest.raises(ValueError, match=rf"{url}/bomb\.pth must hold .*run code"):
            read(f"{url}/bomb.pth")
    assert not list(Path(torch.hub.get_dir()).rglob("*bomb*"))
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match=rf"{url}/weights\.pth must be .*'meta'"):
        verify(f"{url}/weights.pth", resume=True)
    with pytest.raises(ValueError, match=rf"{url}/no\.pth cannot be fetched: .*404"):
        verify(f"{url}/no.pth")


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8", "bool", "U3"])
def test_numbers_of_numpy_are_plain_values_and_objects_are_none(dtype, tmp_path):
    """A metric may give them, and MMEngine keeps the best one in the checkpoint."""
    value = numpy.ones(1, dtype=dtype)
    torch.save({"state_dict": {}, "best": value[0], "all": value}, tmp_path / "best.pth")
    content = load_content(tmp_path / "best.pth")
    assert content["best"] == value[0]
    assert content["all"].dtype == value.dtype
    torch.save({"all": value.astype(object)}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"objects\.pth must (hold plain values|be one of torch)"):
        load_content(tmp_path / "objects.pth")
