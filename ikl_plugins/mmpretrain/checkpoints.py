"""Checkpoints are data: reading one runs none of what it holds.

Since version 2.6 torch reads with ``weights_only=True``. A checkpoint of MMEngine then needs a few names that torch
does not know: the log buffers of its message hub and the NumPy arrays in them. :func:`allow_mmengine_checkpoints` lists
these names and no others, so that ``--resume`` and tools/test.py read such a file and refuse one that names anything
else. :func:`verify` gives the same protection where the host's own loader would go on to run the file.
"""

from __future__ import annotations

import pickle
import re
import urllib.parse
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import numpy
import torch
import torch.serialization
from mmengine.logging import HistoryBuffer
from torch import Tensor

__all__ = ["allow_mmengine_checkpoints", "load_content", "load_weights", "verify"]

_PLAIN_DTYPES = numpy.typecodes["AllInteger"] + numpy.typecodes["AllFloat"] + "?SU"
_STATISTICS = ("min", "max", "current", "mean")
_WEIGHTS = ("state_dict", "model", "model_state_dict")
_READS_WEIGHTS_ONLY = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


def _statistic(owner: Any, name: str) -> Any:
    """What a checkpoint gets for ``builtins.getattr``: the four statistics of a HistoryBuffer."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"getattr of {name!r}; it may ask for {', '.join(_STATISTICS)} of a HistoryBuffer")


def _safe_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Every name that a checkpoint of MMEngine may hold beyond those that torch knows."""
    multiarray = getattr(numpy, "_core", None) or numpy.core
    reconstruct, scalar = multiarray.multiarray._reconstruct, multiarray.multiarray.scalar
    return [
        HistoryBuffer,
        # NumPy 2 has renamed its core; a checkpoint has the name of the version that wrote it.
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),
        numpy.ndarray,
        numpy.dtype,
        # Numbers, booleans and text; an array of objects may hold anything and stays out.
        *dict.fromkeys(type(numpy.dtype(code)) for code in _PLAIN_DTYPES),
        (_statistic, "builtins.getattr"),
    ]


def allow_mmengine_checkpoints() -> bool:
    """Adds what a checkpoint of MMEngine holds to the names that torch may load. A second call changes nothing.

    The list holds no function that does more than rebuild arrays and log buffers; ``getattr`` stands in it as one that
    knows four methods of the log buffer.

    Returns:
        Whether the list is needed: False where torch is older than 2.6, or where MMEngine's loader brings its own.
    """
    if not _READS_WEIGHTS_ONLY or hasattr(mmengine.runner.checkpoint, "get_torch_safe_globals"):
        return False
    torch.serialization.add_safe_globals(_safe_globals())
    return True


def load_content(path: Path | str) -> Any:
    """Reads a checkpoint file onto the CPU without running what it holds.

    Args:
        path: the file, as torch.save or MMEngine has written it.

    Returns:
        What the file holds; for a checkpoint of MMEngine a mapping with 'state_dict', 'meta' and others.

    Raises:
        ValueError: the file is missing, truncated or damaged, or holds more than tensors, arrays and plain values.

    Note:
        Checksums are compared, which torch itself does not do. A file that was saved without them, with
        ``torch.serialization.set_crc32_options(False)``, counts as damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "that is a folder" if path.is_dir() else "there is none"
        raise ValueError(f"load_content: a checkpoint must be a file, but {what} at {path}. Check the path.")
    return _read(path, str(path))


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The weights of a checkpoint, whoever has written it.

    Args:
        path: a file, or an http(s) address; what is fetched stays in torch's hub folder.

    Returns:
        Tensors by parameter and buffer name, on the CPU: what the checkpoint has under 'state_dict', 'model' or
        'model_state_dict', else the checkpoint itself. A 'module.' in front of every name is taken off.

    Raises:
        ValueError: as :func:`load_content`; the address cannot be read; the checkpoint holds no weights, or some that
            are no tensors.
    """
    content = _fetch(str(path)) if _is_address(path) else load_content(path)
    weights = content
    if isinstance(content, Mapping):
        weights = next((content[key] for key in _WEIGHTS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(weights, Mapping) or not weights:
        what = "an empty mapping" if isinstance(weights, Mapping) else f"a {type(weights).__name__}"
        raise ValueError(
            f"load_weights: the checkpoint {path} must hold weights by name, got {what}. Pass a state dict, or a "
            f"checkpoint that has one under {', '.join(map(repr, _WEIGHTS))}."
        )
    others = [f"{name!r} ({type(value).__name__})" for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        more = "" if len(others) <= 5 else f" and {len(others) - 5} more"
        raise ValueError(
            f"load_weights: the checkpoint {path} must hold tensors alone, but these are none: "
            f"{', '.join(others[:5])}{more}. Pass a state dict, or a checkpoint that has one under "
            f"{', '.join(map(repr, _WEIGHTS))}."
        )
    prefix = "module."
    strip = len(prefix) if all(name.startswith(prefix) for name in weights) else 0
    return {name[strip:]: value for name, value in weights.items()}


def verify(path: Path | str) -> None:
    """Refuses a checkpoint that the host must not read, before the host reads it.

    MMEngine fetches addresses without ``weights_only``, and some versions of it read a file a second time and run what
    it holds when the first, careful reading fails.

    Args:
        path: a file, or an http(s) address; what is fetched stays in torch's hub folder, where MMEngine looks for it.

    Raises:
        ValueError: as :func:`load_content`; the address cannot be read, or has another scheme.
    """
    if _is_address(path):
        _fetch(str(path))
        return
    scheme = re.match(r"[\w+.-]+(?=://)", str(path))
    if scheme:
        raise ValueError(
            f"verify: a checkpoint must be a file or an http(s) address to be checked before it is loaded, got {path}. "
            f"Fetch it and name the file, or trust what {scheme[0]}:// gives: "
            f"custom_hooks = [dict(type='IKLHook', verify_checkpoints=False)]."
        )
    load_content(path)


def _is_address(path: Path | str) -> bool:
    return isinstance(path, str) and path.startswith(("http://", "https://"))


def _fetch(address: str) -> Any:
    """What lies at an address; torch's hub folder keeps it, and is looked at first."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urllib.parse.urlparse(address).path).name)
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(cached), progress=False)
        except OSError as error:
            raise ValueError(
                f"load_weights: the checkpoint {address} cannot be fetched: {error}. Check the address, or fetch it "
                f"yourself and name the file."
            ) from error
    return _read(cached, f"{address} (kept as {cached})")


def _read(path: Path, where: str) -> Any:
    if not _READS_WEIGHTS_ONLY:
        raise ValueError(
            f"load_content: reading a checkpoint safely takes torch 2.6 or newer, this is {torch.__version__}. "
            f"Run: python -m pip install 'torch>=2.6'"
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch does not compare the checksums of tensors
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        # The context takes away at its end what it is given, so it gets what is not there for good.
        present = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([entry for entry in _safe_globals() if entry not in present]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        found = re.search(r"(?:GLOBAL|class|getattr of) [^\s,;]+|attempted to call \S+|REDUCE[^\n]*", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ValueError(
                f"load_content: the checkpoint {where} must hold tensors and plain values, but it would run code when "
                f"it is loaded: {found[0]}. Do not trust a file that is not yours; train it anew, or have it saved as "
                f"a state dict. Of your own, allow the class: torch.serialization.add_safe_globals([...]) in a module "
                f"that `custom_imports` names."
            ) from error
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"load_content: the checkpoint {where} must hold tensors and plain values, but reading it gave: {reason}. "
            f"It is truncated or damaged; copy or make it anew."
        ) from error
