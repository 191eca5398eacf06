"""What must be equal, to the bit, and which files are whole."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two results differ, by the path inside them; NaN equals NaN, tensors are compared bit for bit."""
    if type(ours) is not type(theirs):
        return [path or "(whole)"]
    if isinstance(ours, Tensor):
        kinds = [(one.is_nested, one.layout, one.device, one.dtype) for one in (ours, theirs)]
        same = kinds[0] == kinds[1] and ours.shape == theirs.shape and _bits(ours) == _bits(theirs)
    elif isinstance(ours, np.ndarray):
        same = (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    elif isinstance(ours, dict):
        found = [f"{path}.{key} (one side alone)" for key in ours.keys() ^ theirs.keys()]
        for key in ours.keys() & theirs.keys():
            found += differences(ours[key], theirs[key], f"{path}.{key}")
        return sorted(found)
    elif isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [f"{path} (lengths {len(ours)} and {len(theirs)})"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{path}[{i}]")]
    elif type(ours).__eq__ is object.__eq__ and hasattr(ours, "__dict__"):
        return differences(vars(ours), vars(theirs), path)  # such as MMEngine's log buffers
    else:
        same = bool(ours == theirs) or bool(ours != ours and theirs != theirs)
    return [] if same else [path or "(whole)"]


def _bits(tensor: Tensor) -> bytes:
    bits: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return bits


def half_written(path: Path) -> bool:
    """Whether a file that a process has begun to write is not whole.

    Archives have checksums, JSON a last bracket, a PNG a last chunk, and texts of our writers a last newline. Of other
    files only an empty one is known to be half-written.
    """
    if not path.is_file():
        return False  # renamed since, or removed
    if path.name.startswith(".") or path.suffix == ".partial":
        return True  # written aside, and not renamed
    try:
        return not _WHOLE.get(path.suffix, _has_content)(path)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
        return True


def _has_content(path: Path) -> bool:
    return path.stat().st_size > 0


def _is_archive(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _is_json(path: Path) -> bool:
    json.loads(path.read_bytes())
    return True


def _is_png(path: Path) -> bool:
    return path.read_bytes().endswith(b"\0\0\0\0IEND\xaeB`\x82")


def _is_text(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")


_WHOLE: dict[str, Callable[[Path], bool]] = {
    **dict.fromkeys((".pth", ".pt", ".npz", ".zip"), _is_archive),
    **dict.fromkeys((".md", ".csv", ".py", ".yaml"), _is_text),
    ".json": _is_json,
    ".png": _is_png,
}
