"""The losses of a torchdistill config: which there are, and where they stand."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from ikl_plugins.losses import LOSSES

from .yaml_text import Entry, Tree

__all__ = [
    "PLACES",
    "SOURCES",
    "Scope",
    "Term",
    "block",
    "is_ours",
    "key_of",
    "num_classes_of",
    "scopes",
    "terms_of",
    "wrapped",
]

PLACES = ("student_module_path", "student_module_io", "teacher_module_path", "teacher_module_io")
# The losses of torchdistill that are replaced, and the keywords that have a counterpart in ours.
SOURCES = {
    "KDLoss": (*PLACES, "temperature", "alpha", "beta", "reduction"),
    "LogitStdKDLoss": (*PLACES, "temperature", "eps", "alpha", "beta", "reduction"),
    "KLDivLoss": ("reduction", "log_target"),
}


class Scope(NamedTuple):
    """A training stage, or the whole training: a mapping that has a criterion."""

    path: tuple[str, ...]
    mapping: Any
    criterion: Entry

    @property
    def label(self) -> str:
        """Its keys, as messages show them."""
        return ": ".join(self.path)


class Term(NamedTuple):
    """A loss inside the criterion of a stage."""

    path: tuple[str, ...]  # keys that lead to it
    scope: Scope
    name: str
    kind: str  # the loss's key
    parent: Any  # node of the term: criterion, criterion_wrapper and weight
    mapping: Any  # node of the loss: key and kwargs
    wrapper: Entry | None

    @property
    def place(self) -> tuple[str, ...]:
        """Stage and name, which stay the same when the term is adopted."""
        return (*self.scope.path, self.name)

    @property
    def line(self) -> int:
        """Number of its first line, from 1."""
        return int(self.mapping.start_mark.line) + 1


def is_ours(kind: str) -> bool:
    """Whether a key names a loss of this package: IKLLoss, or IKL for short."""
    return kind in LOSSES or f"{kind}Loss" in LOSSES


def block(tree: Tree, parent: Any, key: str, path: str) -> Entry:
    """A mapping below a key; ``path`` is what messages call it."""
    entry = tree.entries(parent).get(key)
    if entry is None or not isinstance(entry.value, yaml.MappingNode):
        got = "none" if entry is None else "something else"
        raise tree.refusal(entry, f"`{path}` must be a mapping, got {got}. Compare configs/torchdistill.")
    return entry


def key_of(tree: Tree, mapping: Any) -> str:
    """The text of a mapping's `key`, empty without one."""
    node = tree.at(mapping, "key")
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def scopes(tree: Tree) -> list[Scope]:
    """The training stages of a config, or its one training."""
    train = block(tree, tree.root, "train", "train:").value
    names = [key for key in tree.entries(train) if key.startswith("stage")]
    stages: list[tuple[tuple[str, ...], Any]] = [(("train",), train)]
    if "stage1" in names:
        stages = [(("train", key), block(tree, train, key, f"train: {key}:").value) for key in names]
    found = []
    for path, mapping in stages:
        criterion = block(tree, mapping, "criterion", f"{': '.join(path)}: criterion:")
        inside = tree.entries(criterion.value)
        if "key" not in inside and "type" in inside:
            rule = f"`{': '.join(path)}: criterion:` must have `key` and `kwargs`, got the older `type`."
            raise tree.refusal(inside["type"], f"{rule} Move the config to torchdistill 1.x first.")
        found.append(Scope(path, mapping, criterion))
    return found


def terms_of(tree: Tree) -> list[Term]:
    """The terms of all stages whose loss is a mapping with a key."""
    return [term for scope in scopes(tree) for term in _terms(tree, scope)]


def _terms(tree: Tree, scope: Scope) -> list[Term]:
    criterion = scope.criterion.value
    if key_of(tree, criterion) in SOURCES or is_ours(key_of(tree, criterion)):
        return [_plain_term(tree, scope)]
    found = []
    for name, entry in tree.entries(tree.at(criterion, "kwargs", "sub_terms")).items():
        parts = tree.entries(entry.value)
        loss = parts.get("criterion")
        if loss is None or not isinstance(loss.value, yaml.MappingNode):
            continue
        kind = key_of(tree, loss.value)
        if loss.value.tag != "!import_call":
            path = (*scope.path, "criterion", "kwargs", "sub_terms", name, "criterion")
            wrapper = parts.get("criterion_wrapper")
            found.append(Term(path, scope, name, kind, entry.value, loss.value, wrapper))
        elif kind.rpartition(".")[2] in SOURCES:
            rule = f"the term '{name}' must name its loss by `key` and `kwargs`, got an `!import_call` of {kind}."
            raise tree.refusal(loss, f"{rule} Write key: '{kind.rpartition('.')[2]}' and its kwargs.")
    return found


def _plain_term(tree: Tree, scope: Scope) -> Term:
    """The loss that stands where torchdistill 1.x takes a WeightedSumLoss, into which :func:`wrapped` puts it."""
    node = scope.criterion.value
    kind = key_of(tree, node)
    others = [entry for entry in tree.own_entries(node) if entry.key.value not in ("key", "kwargs")]
    if scope.criterion.is_alias or node.flow_style or others or tree.anchor(node):
        raise tree.refusal(
            others[0] if others else scope.criterion,
            f"`criterion:` with {kind} must be a block of `key` and `kwargs` alone. "
            f"Make it a term of a WeightedSumLoss, which torchdistill 1.x needs.",
        )
    return Term((*scope.path, "criterion"), scope, "kd", kind, node, node, None)


def wrapped(tree: Tree) -> str:
    """The text with every plain criterion of ours made a term of a WeightedSumLoss."""
    for scope in scopes(tree):
        node = scope.criterion.value
        if not is_ours(key_of(tree, node)):
            continue
        first = tree.own_entries(node)[0].key.start_mark
        start, end = tree.line_start(first.index), tree.line_end(tree.content_end(node))
        margin = " " * first.column
        head = ("key: 'WeightedSumLoss'", "kwargs:", "  sub_terms:", "    kd:", "      criterion:")
        lines = [f"{margin}{line}{tree.newline}" for line in head]
        inner = tree.text[start:end].splitlines(keepends=True)
        lines += [f"{' ' * 8}{line}" if line.strip() else line for line in inner]
        lines += [f"{tree.newline}{margin}      weight: 1.0"]
        return wrapped(Tree(tree.text[:start] + "".join(lines) + tree.text[end:], tree.name))
    return tree.text


def num_classes_of(tree: Tree) -> int | None:
    """The student's number of classes, if the config says it plainly."""
    for keys in (("kwargs", "num_classes"), ("config_kwargs", "num_labels")):
        node = tree.at(tree.root, "models", "student_model", *keys)
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int":
            return int(tree.value(node))
    return None
