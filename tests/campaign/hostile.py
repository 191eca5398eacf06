"""Files that would run code if they were unpickled, and files that are no checkpoints."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import subprocess
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Bomb:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def guises(marker: Path) -> dict[str, bytes]:
    """Files that would make the folder ``marker`` if they were unpickled freely, by what they hide it in."""
    command = f"mkdir {marker}"
    system = Bomb(os.system, command)
    weights = {"layer.weight": torch.zeros(2, 2)}
    objects = np.empty(1, dtype=object)
    objects[0] = system
    namespace = Namespace(seed=0)
    namespace.note = system
    dictionary: OrderedDict[str, Any] = OrderedDict(weights)
    dictionary.note = system  # type: ignore[attr-defined]  # an attribute, which pickle keeps
    found = {f"a pickle of protocol {protocol}": pickle.dumps(system, protocol) for protocol in range(6)}
    found["opcodes by hand"] = b"cos\nsystem\n(S'%s'\ntR." % command.encode()
    found["opcodes by hand, posix"] = b"cposix\nsystem\n(S'%s'\ntR." % command.encode()
    contents: dict[str, Any] = {
        "the whole content": system,
        "a list in a list": [[1, [system]]],
        "among the weights": {**weights, "layer.bias": system},
        "beside the weights": {"state_dict": weights, "meta": {"note": system}},
        "the optimizer": {"model": weights, "optimizer": {"state": {0: {"step": system}}, "param_groups": []}},
        "a key": {"model": weights, system: 1},
        "a namespace": {"model": weights, "args": namespace},
        "an attribute of a dictionary": {"model": dictionary},
        "an array of objects": {"model": weights, "history": objects},
        "eval": Bomb(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "exec": Bomb(exec, f"import os; os.mkdir({str(marker)!r})"),
        "import": [Bomb(__import__, "antigravity"), Bomb(os.mkdir, str(marker))],
        "a process": Bomb(subprocess.Popen, ("mkdir", str(marker))),
        "getattr": Bomb(getattr, Bomb(__import__, "os"), "system"),
        "numpy.load": Bomb(np.load, str(marker), None, True),
        "torch.load": Bomb(torch.load, str(marker)),
        "a folder": Bomb(os.mkdir, str(marker)),
        "a copy": Bomb(shutil.copytree, str(marker.parent), str(marker)),
    }
    for name, content in contents.items():
        for form, zipped in (("zip", True), ("legacy", False)):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found[f"{form}: {name}"] = buffer.getvalue()
    found["tar of old torch"] = _tar(system)
    sound = io.BytesIO()
    torch.save({"model": weights}, sound)
    for name, member in (
        ("a pickle more", "archive/more.pkl"),
        ("a script of TorchScript", "archive/constants.pkl"),
        ("a pickle in another folder", "other/data.pkl"),
    ):
        found[f"zip: {name}"] = _with_member(sound.getvalue(), member, pickle.dumps(system))
    found["zip: a second data.pkl"] = _with_member(sound.getvalue(), "archive/data.pkl", pickle.dumps(system))
    found["numpy file of objects"] = _numpy(np.save, objects)
    found["numpy archive of objects"] = _numpy(np.savez, objects)
    return found


def _tar(content: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            text = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return buffer.getvalue()


def _with_member(archive: bytes, name: str, content: bytes) -> bytes:
    buffer = io.BytesIO(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there already
        with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as opened:
            opened.writestr(name, content)
    return buffer.getvalue()


def _numpy(save: Callable[..., None], content: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, content)
    return buffer.getvalue()


def other_files() -> dict[str, bytes]:
    """Files that are no checkpoints."""
    empty_zip = io.BytesIO()
    with zipfile.ZipFile(empty_zip, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    table = io.BytesIO()
    np.save(table, np.zeros(3))
    return {
        "an empty file": b"",
        "one byte": b"\0",
        "text": b"no checkpoint\n" * 20,
        "zeros": bytes(4096),
        "a zip of text": empty_zip.getvalue(),
        "an array": table.getvalue(),
        "JSON": b'{"state_dict": {}}',
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "a web page": b"<!doctype html><html>404</html>",
        "a pickled list": pickle.dumps([1, 2, 3]),
        "random bytes": random.Random(0).randbytes(3000),
    }
