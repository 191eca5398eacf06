"""Python configs: what they hold, in which line a key is set, and how a value is written."""

from __future__ import annotations

import ast
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .messages import CALLER, first_line

__all__ = ["Code", "assignment", "find", "is_lazy", "read", "relative", "shown", "type_name", "where"]

_WIDTH = 110  # of a line of the new file


class Code(str):
    """Text that stands in the new file as it is."""


def is_lazy(path: Path) -> bool:
    """Whether a config is in the lazy style (``read_base``)."""
    try:
        return bool(Config._is_lazy_import(str(path)))
    except SyntaxError as error:
        rule = f"the config must be Python, but {error.msg}. Correct it."
        raise ValueError(f"{CALLER}: {path}, line {error.lineno}: {rule}") from error
    except Exception as error:  # MMEngine's own refusals, of mixed styles for one
        raise ValueError(f"{CALLER}: {path} must be an MMEngine config, but {first_line(error)}") from error


def read(path: Path) -> Any:
    """A config's content; its custom imports are not imported."""
    try:
        return Config.fromfile(str(path), import_custom_modules=False)
    except Exception as error:  # a config is a program
        raise ValueError(f"{CALLER}: {path} must be an MMEngine config, but {first_line(error)}") from error


def type_name(kind: Any) -> str:
    """The bare name of a `type`: 'mmpretrain.ImageClassifier' and the class itself are ImageClassifier."""
    if kind is None:
        return ""
    return kind.rpartition(".")[2] if isinstance(kind, str) else str(getattr(kind, "__name__", kind))


def find(value: Any, key: str) -> tuple[str, ...] | None:
    """Where inside a config a key is true."""
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        if name == key and inner is True:
            return (name,)
        found = find(inner, key)
        if found is not None:
            return (str(name), *found)
    return None


def where(path: Path, keys: tuple[str, ...]) -> str:
    """File and line in which a key of a config is set: in the file itself, or in one that it inherits from."""
    for length in range(len(keys), 0, -1):
        found = _line_of(path, keys[:length], set())
        if found is not None:
            return found
    return str(path)


def _line_of(path: Path, keys: tuple[str, ...], seen: set[Path]) -> str | None:
    if path in seen or not path.is_file():
        return None
    seen.add(path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None
    bases: list[str] = []
    line = None
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name = statement.targets[0].id
        if name == "_base_":
            with contextlib.suppress(ValueError):
                held = ast.literal_eval(statement.value)
                bases = [held] if isinstance(held, str) else list(held)
        elif name == keys[0]:
            line = _line_in(statement.value, keys[1:], statement.lineno) or line
    if line is not None:
        return f"{path}, line {line}"
    places = (_line_of(Path(os.path.normpath(path.parent / base)), keys, seen) for base in bases)
    return next((place for place in places if place is not None), None)


def _line_in(value: ast.expr, keys: tuple[str, ...], line: int) -> int | None:
    if not keys:
        return line
    pairs: list[tuple[Any, ast.expr, int]] = []
    if isinstance(value, ast.Call):
        pairs = [(word.arg, word.value, word.lineno) for word in value.keywords]
    elif isinstance(value, ast.Dict):
        entries = zip(value.keys, value.values, strict=True)
        pairs = [(key.value, inner, key.lineno) for key, inner in entries if isinstance(key, ast.Constant)]
    for name, inner, number in pairs:
        if name == keys[0]:
            return _line_in(inner, keys[1:], number)
    return None


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, with slashes; absolute where there is no way, as between drives."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def assignment(name: str, value: Any) -> str:
    """``name = value`` as Python, over several lines where it is long."""
    return f"{name} = {shown(value, 0, len(name) + 3)}"


def shown(value: Any, depth: int, used: int) -> str:
    """A value as Python: on one line where it fits behind ``used`` characters, else one entry a line."""
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        entries = [(f"{key}=", inner) for key, inner in value.items()]
        opening, closing = "dict(", ")"
    elif isinstance(value, (list, tuple)):
        entries = [("", inner) for inner in value]
        opening, closing = "[", "]"
    else:
        return repr(value)
    flat = opening + ", ".join(f"{key}{shown(inner, 0, 0)}" for key, inner in entries) + closing
    if "\n" not in flat and used + len(flat) <= _WIDTH:
        return flat
    margin = "    " * (depth + 1)
    lines = (f"{margin}{key}{shown(inner, depth + 1, len(margin) + len(key) + 1)},\n" for key, inner in entries)
    return f"{opening}\n{''.join(lines)}{'    ' * depth}{closing}"
