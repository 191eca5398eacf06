"""One random change to a config, and configs of both hosts as trees of mappings and lists."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import yaml

KINDS = ("misspelt key", "missing key", "other type", "out of range", "unknown name", "exchanged values")
OUT_OF_RANGE = (-1, 0, 3.5, 1e30, math.nan, math.inf, -math.inf)


class Mutation(NamedTuple):
    """What was changed."""

    kind: str  # one of KINDS
    path: tuple[Any, ...]  # keys and indices down to the place
    old: Any  # key or value that was there
    new: Any  # what is there now; None where nothing is

    def __str__(self) -> str:
        return f"{self.kind}: {'.'.join(map(str, self.path))}: {self.old!r:.100} -> {self.new!r:.100}"


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(tree: dict[Any, Any], rng: np.random.Generator) -> tuple[dict[Any, Any], Mutation]:
    """A copy of the config with one change."""
    tree = copy.deepcopy(tree)
    while True:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        places = list(_places(tree))
        path, parent, key = places[int(rng.integers(len(places)))]
        value = parent[key]
        if kind == "misspelt key" and isinstance(parent, dict) and len(str(key)) > 2:
            new = _misspelt(str(key), rng)
            items = [(new if name == key else name, item) for name, item in parent.items()]
            parent.clear()
            parent.update(items)
            return tree, Mutation(kind, path, key, new)
        if kind == "missing key" and isinstance(parent, dict):
            del parent[key]
            return tree, Mutation(kind, path, key, None)
        if kind == "other type":
            parent[key] = _other_type(value, rng)
            return tree, Mutation(kind, path, value, parent[key])
        if kind == "out of range" and isinstance(value, (int, float)) and not isinstance(value, bool):
            parent[key] = OUT_OF_RANGE[int(rng.integers(len(OUT_OF_RANGE)))]
            return tree, Mutation(kind, path, value, parent[key])
        if kind == "unknown name" and isinstance(value, str) and len(value) > 2:
            parent[key] = _misspelt(value, rng)
            return tree, Mutation(kind, path, value, parent[key])
        if kind == "exchanged values" and isinstance(parent, dict):
            plain = [name for name, item in parent.items() if not isinstance(item, (dict, list, tuple))]
            others = [name for name in plain if name != key and parent[name] != value]
            if others and not isinstance(value, (dict, list, tuple)):
                other = others[int(rng.integers(len(others)))]
                parent[key], parent[other] = parent[other], value
                return tree, Mutation(kind, path, f"{key}={value!r}", f"{other}={parent[key]!r}")


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Every entry of every mapping and list, with its path and its holder."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield (*path, key), tree, key
        yield from _places(value, (*path, key))


def _misspelt(word: str, rng: np.random.Generator) -> str:
    """The word with a letter dropped, doubled or exchanged with its neighbour."""
    while True:
        at = int(rng.integers(1, len(word)))
        way = int(rng.integers(3))
        new = (
            word[:at] + word[at + 1 :]
            if way == 0
            else word[:at] + word[at] + word[at:]
            if way == 1
            else word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
        )
        if new != word and new:
            return new


def _other_type(value: Any, rng: np.random.Generator) -> Any:
    """A value of another type than this one."""
    options: list[Any] = ["several words", 3, 0.5, None, [1, 2], {"some": "thing"}, True, "False"]
    options = [option for option in options if type(option) is not type(value)]
    return options[int(rng.integers(len(options)))]


# --- configs as trees ------------------------------------------------------------------------------------------------


class Tagged(dict[Any, Any]):
    """A mapping of YAML with a tag."""

    tag = ""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct(loader: Any, suffix: str, node: Any) -> Tagged:
    found = Tagged(loader.construct_mapping(node, deep=True))
    found.tag = f"!{suffix}"
    return found


_Loader.add_multi_constructor("!", _construct)
_Dumper.add_representer(Tagged, lambda dumper, data: dumper.represent_mapping(data.tag, dict(data)))


def yaml_tree(text: str) -> Any:
    """A torchdistill config as mappings and lists, its tags kept and nothing run."""
    return copy.deepcopy(yaml.load(text, _Loader))  # noqa: S506  # a safe loader


def yaml_text(tree: Any) -> str:
    """The text of such a tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def python_text(tree: dict[str, Any]) -> str:
    """An MMEngine config file: one assignment a key."""
    return "".join(f"{key} = {_literal(value)}\n" for key, value in tree.items())


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = "".join(f"{_literal(item)}, " for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return f"float({str(value)!r})" if isinstance(value, float) and not math.isfinite(value) else repr(value)
