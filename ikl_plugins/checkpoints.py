"""Checkpoints are data: reading one runs none of what it holds, whichever library has written it.

Since version 2.6 torch reads with ``weights_only=True``. Some files need a few names that torch does not know, and get
these and no others: NumPy's plain arrays and numbers, the ``argparse.Namespace`` of torchdistill's scripts, and the log
buffers of MMEngine. MMEngine itself is not needed; where it is not imported a stand-in takes the place of its buffer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import re
import sys
import threading
import urllib.parse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.serialization
from torch import Tensor

from . import _validation as check
from ._checkpoint_size import check_content, check_file
from ._download import DownloadError, check_digest, digest_in, download, is_web_page
from ._files import written_aside
from ._limits import LimitError, check_limit, check_regular_file, printable
from ._pickled_numpy import numpy_names, resolved

__all__ = ["check_dense", "fetch", "is_address", "load_content", "load_weights", "plain_name", "weights_in"]

_STATISTICS = ("min", "max", "current", "mean")
_BUFFER = ("mmengine.logging.history_buffer", "HistoryBuffer")
_WEIGHTS = ("state_dict", "model", "model_state_dict")
_WAY_OUT = f"Pass a state dict, or a checkpoint that has one under {', '.join(map(repr, _WEIGHTS))}."
_LONGEST_NAME = 500  # in characters
# How an average is called; with DOTALL no name makes the search go back over and over.
_AVERAGE = re.compile(r"(?:.*[._])?(?:ema|swa|avg|averaged?)(?:[._].*)?", re.IGNORECASE | re.DOTALL)
# Beside these of DM-Improves-AT and Lightning's WeightAveraging what has the common name is the average.
_LAST = ("unaveraged_model_state_dict", "current_model_state")
# What torch.compile, data parallel wrappers and activation checkpointing put into names, wherever the wrapped part is.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
READS_WEIGHTS_ONLY = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
# torch's list of allowed names is the process's own, and a reading takes away at its end what it has added.
_reading = threading.Lock()


class _LogBuffer:
    """Stands in for MMEngine's HistoryBuffer: keeps what the file has for one, and computes nothing."""

    min = max = current = mean = staticmethod(lambda *_: None)


def _buffer() -> type[Any]:
    # Looked up and not imported: reading a file must not load a library.
    return getattr(sys.modules.get(_BUFFER[0]), _BUFFER[1], _LogBuffer)


def _statistic(owner: Any, name: str) -> Any:
    """What a checkpoint gets for ``builtins.getattr``: the four statistics of a log buffer."""
    if any(owner is buffer for buffer in (_LogBuffer, _buffer())) and name in _STATISTICS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"getattr of {name!r}; it may ask for {', '.join(_STATISTICS)} of a HistoryBuffer")


def load_content(path: Path | str, map_location: Any = "cpu") -> Any:
    """Reads a checkpoint file without running what it holds.

    Args:
        path: the file, as torch.save or one of the training libraries has written it, or a ``.safetensors``.
        map_location: as of ``torch.load``.

    Returns:
        What the file holds; for a checkpoint of MMEngine a mapping with 'state_dict', 'meta' and others, for one of
        torchdistill a mapping with 'model', 'args' and others.

    Raises:
        ValueError: the file is missing, truncated or damaged, or holds more than tensors, arrays and plain values; it
            is a FIFO, socket or device; it would unpack to more than a cap (:mod:`ikl_plugins._limits`), is nested more
            than 100 deep or in itself, or has a nested tensor.

    Note:
        Checksums are compared, which torch itself does not do. A file that was saved without them, with
        ``torch.serialization.set_crc32_options(False)``, counts as damaged. The log buffers of MMEngine are its own
        where it is imported, else objects that hold the numbers alone.
    """
    path = Path(path).expanduser()
    check_regular_file("load_content", path)
    if not os.path.isfile(path):
        what = "that is a folder" if os.path.isdir(path) else "there is none"
        raise ValueError(f"load_content: a checkpoint must be a file, but {what} at {path}. Check the path.")
    return _read(path, str(path), map_location)


def plain_name(name: str, wrappers: frozenset[str] = _WRAPPERS) -> str:
    """The name of a weight without the parts that wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def load_weights(path: Path | str, *, averaged: bool = True) -> dict[str, Tensor]:
    """The weights of a checkpoint, whoever has written it.

    Args:
        path: a file, or an http(s) address. What is fetched stays in torch's hub folder, as ``name.<digest>.pth`` with
            the first digits of the address's SHA-256. A ``name-<digest>.pth``, torch's own way to say that the digest
            is the content's, stays what it is called; 8 or more hex digits count as one, decimal ones alone do not.
        averaged: of a checkpoint that also has the average of its weights, take the average and not the last ones.

    Returns:
        As :func:`weights_in`.

    Raises:
        ValueError: as :func:`load_content` and :func:`weights_in`; the address cannot be read.
    """
    content = fetch(str(path), name=_kept_name(str(path))) if is_address(path) else load_content(path)
    return weights_in(content, path, averaged=averaged)


def weights_in(content: Any, path: Path | str, *, averaged: bool = True) -> dict[str, Tensor]:
    """The weights in what a checkpoint file holds.

    Args:
        content: of :func:`load_content`.
        path: where it comes from, for messages.
        averaged: as in :func:`load_weights`.

    Returns:
        Tensors by parameter and buffer name, on the CPU: what the checkpoint has under 'state_dict', 'model' or
        'model_state_dict', or under the one key that holds weights, else the checkpoint itself. Of two sets with the
        same names the one whose key says that it is an average, as 'state_dict_ema', 'model_ema', 'ema' and
        'swa_state_dict' do; with ``averaged=False`` the other one. Under 'state_dict' MMEngine's EMAHook and
        Lightning's WeightAveraging have the average, and DM-Improves-AT under 'model_state_dict'. A 'module.' in front
        of every name is taken off, and the counter of torch's AveragedModel with it.

    Raises:
        ValueError: the checkpoint holds no weights, or some that are no tensors; it holds several sets, and which one
            is the average is not certain; there is no average to be told apart, or it has averaged nothing yet.
    """
    weights = _chosen(content, path, averaged)
    check_dense("load_weights", weights, path)
    if not isinstance(weights, Mapping) or not weights:
        what = "an empty mapping" if isinstance(weights, Mapping) else f"a {type(weights).__name__}"
        raise ValueError(f"load_weights: the checkpoint {path} must hold weights by name, got {what}. {_WAY_OUT}")
    others = [
        f"'{printable(name)}' ({type(value).__name__})"
        for name, value in weights.items()
        if not isinstance(value, Tensor)
    ]
    if others:
        found = check.first_names(others, shown=5)
        raise ValueError(
            f"load_weights: the checkpoint {path} must hold tensors alone, but these are none: {found}. {_WAY_OUT}"
        )
    if any(name.rpartition(".")[2] == "n_averaged" and not count.any() for name, count in weights.items()):
        raise ValueError(
            f"load_weights: the average in {path} must be one of weights, but n_averaged is 0. "
            f"Take the last weights, with averaged=False or in a file of their own."
        )
    rest = {name: value for name, value in weights.items() if name != "n_averaged"}
    while rest and all(name.startswith("module.") for name in rest):
        weights = rest = {name.removeprefix("module."): value for name, value in rest.items()}
    return dict(weights)


def check_dense(caller: str, weights: Any, path: Path | str) -> None:
    """Refuses weights by names that are no short text, and tensors that no network of plain ones can take.

    Args:
        caller: whom the refusal names.
        weights: by name; values that are no tensors, and what is no mapping, are left to the caller.
        path: where they come from.

    Raises:
        ValueError: a name, or a sparse, quantised or nested tensor, one without values, or one of a subclass.
    """
    for name, value in _mapping(weights).items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            shown = printable(name, 40) if isinstance(name, str) else f"a {type(name).__name__}"
            raise ValueError(
                f"{caller}: the checkpoint {path} must name weights by texts of at most {_LONGEST_NAME} characters, "
                f"got {shown}. {_WAY_OUT}"
            )
        if isinstance(value, Tensor) and (kind := _odd_kind(value)):
            raise ValueError(
                f"{caller}: the checkpoint {path} must hold dense tensors, but '{printable(name)}' is {kind}. "
                f"Save plain tensors."
            )


def _odd_kind(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "nested" if tensor.is_nested else f"of the layout {tensor.layout}"
    return "quantised" if tensor.is_quantized else "without values, on the meta device" if tensor.is_meta else None


def _chosen(content: Any, path: Path | str, averaged: bool) -> Any:
    """Of what a checkpoint holds the one set of weights that is asked for."""
    sets = _sets(content)
    averages = [key for key in sets if _AVERAGE.fullmatch(key)]
    last = [key for key in sets if key in _LAST]
    plain = [key for key in sets if key not in (*averages, *last)]
    plain = [key for key in plain if key in _WEIGHTS] or plain
    # The same network once more, under a name that says nothing, is another candidate.
    plain += [key for key in sets if key not in (*averages, *last, *plain) and _alike(sets[key], sets[plain[0]])]
    if averages and "state_dict" in plain and "mmengine_version" in _mapping(content.get("meta")):
        last = averages  # its EMAHook exchanges the two
    doubtful = False
    if last:
        averages, plain = plain, last
    elif averages and plain:
        doubtful = averaged and not _alike(sets[averages[0]], sets[plain[0]])
    if not averaged and not (averages and plain):
        raise ValueError(
            f"load_weights: the checkpoint {path} must have weights beside their average, but it has one set alone. "
            f"Leave `averaged` out."
        )
    wanted = averages if averages and averaged else plain
    if not wanted:
        return content
    first = sets[wanted[0]]
    if doubtful or any(not _same(sets[key], first) for key in wanted[1:]):
        found = check.first_names([f"'{printable(key)}'" for key in (*plain, *averages)], shown=5)
        raise ValueError(
            f"load_weights: the checkpoint {path} must leave no doubt which weights to take, but has {found}. "
            f"Save those that you want in a file of their own."
        )
    # MMEngine has the average's own counter among the weights.
    return {name: value for name, value in first.items() if name != "steps"} if last and not averaged else first


def _sets(content: Any) -> dict[str, Any]:
    """What may be a network's weights in a checkpoint, by key; an average that is there in another form is empty."""
    found: dict[str, Any] = {}
    for key, value in _mapping(content).items():
        if isinstance(value, Tensor) or not isinstance(key, str) or "optim" in key.lower():
            continue
        if isinstance(value, Mapping) and (key in (*_WEIGHTS, *_LAST) or _is_network(value)):
            found[key] = value
        elif key == "callbacks":  # of Lightning; its StochasticWeightAveraging has no statistics of BatchNorm there
            found.update({inner: {} for inner in _inside(key, value)})
        elif _AVERAGE.fullmatch(key):
            found.update(_inside(key, value))
    return found


def _inside(key: str, value: Any) -> dict[str, Any]:
    """The averages in the state of what averages, by the keys that lead to them."""
    entries = value if isinstance(value, (list, tuple)) else list(_mapping(value).values())
    if any(isinstance(entry, Tensor) and entry.dim() for entry in entries):
        return {key: _mapping(value)} if _AVERAGE.fullmatch(key) else {}
    found: dict[str, Any] = {}
    for name, entry in _mapping(value).items():
        found.update(_inside(f"{key}.{name}", entry))
    return found


def _is_network(value: Mapping[Any, Any]) -> bool:
    tensors = list(value.values())
    return all(isinstance(tensor, Tensor) for tensor in tensors) and any(tensor.dim() > 1 for tensor in tensors)


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets have the same names, whatever wraps them."""
    names = ({plain_name(str(name)) for name in weights} - {"n_averaged", "steps"} for weights in (one, other))
    return len(set(map(frozenset, names))) == 1


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        all(isinstance(tensor, Tensor) and not _odd_kind(tensor) for tensor in (value, other[name]))
        and torch.equal(value, other[name])
        for name, value in one.items()
    )


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def is_address(path: Path | str) -> bool:
    """Whether ``path`` is an http(s) address."""
    return isinstance(path, str) and path.startswith(("http://", "https://"))


def _kept_name(address: str) -> str:
    """A name in the hub folder that is no other address's: many a run calls its file best.pth."""
    path = Path(_file_name(address))
    if digest_in(path.name):
        return path.name
    return f"{path.stem}.{hashlib.sha256(address.encode()).hexdigest()[:8]}{path.suffix}"


def _file_name(address: str) -> str:
    try:
        name = Path(urllib.parse.urlparse(address).path).name
    except ValueError:  # brackets that are no IPv6 address
        name = ""
    if name in ("", "..") or not is_address(address):
        raise ValueError(f"load_weights: an address must be http(s) and end with a name, got {address}. Name a file.")
    return name


def fetch(address: str, *, name: str | None = None, map_location: Any = "cpu") -> Any:
    """Reads what lies at an address as :func:`load_content` reads a file.

    Args:
        address: http(s). Torch's hub folder keeps what is fetched, and is looked at first.
        name: of the file there; None for the last part of the address. Torch and MMEngine look under that one, and
            read what is there from whatever address it has come: it is the file to check before they read it.
        map_location: as of ``torch.load``.

    Returns:
        As :func:`load_content`.

    Raises:
        ValueError: as :func:`load_content`; the address cannot be read, or ends early; the content has another SHA-256
            than its name; it is larger than the cap of a checkpoint.

    Note:
        Only what has been read without a refusal is kept. What is kept, and is refused all the same, has to be deleted.
    """
    rule = f"load_weights: the checkpoint {address}"
    last = _file_name(address)
    kept = name or last
    cached = Path(torch.hub.get_dir(), "checkpoints", kept)
    try:
        if cached.exists():
            way_out = f"Delete {cached}, or name a file of your own."
            check_regular_file("load_weights", cached)
            check_digest(cached, address, way_out)
            return _read(cached, f"{address} (kept as {cached})", map_location, way_out)
        with written_aside(cached, first=True) as aside:
            download(address, aside)
            way_out = "It is not kept: check the address, or name a file."
            check_digest(aside, address, way_out, kept)
            return _read(aside, address, map_location, way_out)
    except DownloadError as error:
        raise ValueError(f"{rule} cannot be fetched: {error}. Check the address, or name a file.") from error
    except OSError as error:
        raise ValueError(f"{rule} cannot be kept: {error}. Set TORCH_HOME to a folder that can be written.") from error


def _read(path: Path, where: str, map_location: Any = "cpu", way_out: str = "Copy or make it anew.") -> Any:
    if not READS_WEIGHTS_ONLY:
        raise ValueError(
            f"load_content: reading a checkpoint safely takes torch 2.6 or newer, this is {torch.__version__}. "
            f"Run: python -m pip install 'torch>=2.6'"
        )
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, where)
        check_file("load_content", path, where)
        buffer = _buffer()
        ours: list[Any] = [
            *numpy_names(),
            (buffer, ".".join(_BUFFER)),
            (_statistic, "builtins.getattr"),
            argparse.Namespace,
        ]
        with _reading:
            # The context takes away at its end what it is given, so it gets what is not there for good.
            present = torch.serialization.get_safe_globals()
            with (
                warnings.catch_warnings(),
                torch.serialization.safe_globals([entry for entry in ours if entry not in present]),
            ):
                warnings.simplefilter("ignore", UserWarning)  # of torch's own parts; what is wrong is told below
                try:
                    content = torch.load(path, map_location=map_location, weights_only=True)
                except Exception:
                    _forget_sparse_tensors()
                    raise
        check_content("load_content", content, path.stat().st_size, where, (buffer,))
        return resolved(content, (buffer,))
    except LimitError:
        raise
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        found = re.search(r"(?:GLOBAL|class|getattr of) [^\s,;]+|attempted to call \S+|REDUCE[^\n]*", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ValueError(
                f"load_content: the checkpoint {where} must hold plain values, but it would run code: "
                f"{printable(found[0])}. Allow a class of your own with torch.serialization.add_safe_globals([...])."
            ) from error
        text = str(error).rpartition("WeightsUnpickler error: ")[2]  # torch puts its advice around the reason
        text = re.sub(r"^\[enforce fail at [^]]*\][. ]*", "", text.strip())
        reason = text.split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        kind = "safetensors" if path.suffix == ".safetensors" else "torch.save"
        what = "it is a web page" if is_web_page(path) else f"reading it gave: {printable(reason, 200)}"
        raise ValueError(
            f"load_content: the checkpoint {where} must be one of {kind}, but {what}. It may be damaged. {way_out}"
        ) from error


def _forget_sparse_tensors() -> None:
    """Has torch let go of the sparse tensors of a file that it refused; it would blame the next file for them."""
    empty = io.BytesIO()
    torch.save([], empty)
    empty.seek(0)
    with contextlib.suppress(Exception):
        torch.load(empty, weights_only=True)


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    """Of the Hugging Face hub: tensors by name and nothing else."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"load_content: reading {where} takes safetensors, which is missing. Run: python -m pip install safetensors"
        ) from error
    # It is as large as its tensors, which its reader compares.
    check_limit("load_content", where, "CHECKPOINT_BYTES", path.stat().st_size)
    found: dict[str, Tensor] = load_file(path)
    return found
