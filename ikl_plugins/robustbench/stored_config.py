"""What the config inside a checkpoint of MMPretrain says of its images: mean, std, channel order, white."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..models.robustbench_zoo import Statistics

__all__ = ["check_stored_config"]

_READS_BGR = ("LoadImageFromFile",)
_HIGHEST = 1e6  # beyond it nothing is a grey level
_LONGEST = 2**22  # characters; Python's parser takes hundreds of bytes for each
_ROUNDING = 1e-4  # what writing a mean of 255 grey levels with two digits moves it in [0, 1]


def _typed(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping with a type inside a config, such as data sets and the steps of pipelines."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from _typed(entry)


def _type_name(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    return re.split(r"[./]", kind if isinstance(kind, str) else getattr(kind, "__name__", ""))[-1]


def check_stored_config(
    caller: str, content: Any, path: Path | str, architecture: str, expected: Statistics | None
) -> None:
    """Refuses a checkpoint of MMPretrain whose own config normalises images otherwise than with ``expected``."""
    config = _stored_config(content)
    model = config.get("model")
    if not isinstance(model, Mapping):
        return
    preprocessor = model.get("data_preprocessor") or config.get("data_preprocessor") or {}
    if not isinstance(preprocessor, Mapping):
        return
    white = model.get("pixel_range") or 255.0
    bgr = not preprocessor.get("to_rgb") and any(
        _type_name(step) in _READS_BGR for step in _typed(config.get("test_dataloader"))
    )
    mean, std = (preprocessor.get(key) or [default] * 3 for key, default in (("mean", 0.0), ("std", 1.0)))
    values = [*mean, *std, white] if isinstance(mean, list) and isinstance(std, list) else [None]
    if not all(isinstance(value, (int, float)) and abs(value) < _HIGHEST for value in values):
        return  # what is no number here says nothing
    mean, std = [value / white for value in mean], [value / white for value in std]
    wanted = ([0.0] * 3, [1.0] * 3) if expected is None else expected
    pairs = zip([*mean, *std], [*wanted[0], *wanted[1]], strict=False)
    if len(mean) == len(std) == 3 and not bgr and all(abs(theirs - ours) <= _ROUNDING for theirs, ours in pairs):
        return
    shown = [f"({', '.join(f'{value:.4g}' for value in values)})" for values in (mean, std)]
    ours = "as they are" if expected is None else f"with mean {tuple(expected[0])} and std {tuple(expected[1])}"
    inside = architecture.startswith("DM")  # mean and std would be those inside the network, which the config's precede
    way_out = "" if bgr or inside else f", or give mean={shown[0]}, std={shown[1]}"
    raise ValueError(
        f"{caller}: {architecture} must get RGB images in [0, 1] {ours}, but {path} has "
        f"{'BGR' if bgr else 'RGB'} with mean {shown[0]} and std {shown[1]}. Use from_mmpretrain{way_out}."
    )


def _stored_config(content: Any) -> dict[str, Any]:
    """The plain values of the config that a checkpoint of MMEngine has as text; nothing of it is run."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(text, str) or len(text) > _LONGEST:
        return {}
    try:
        return {
            statement.targets[0].id: _literal(statement.value)
            for statement in ast.parse(text).body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr) -> Any:
    """``dict(...)``, literals and what is made of them; None for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(entry) for entry in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
