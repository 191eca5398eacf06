"""YAML files as text with places: what ``ikl adopt`` finds by key and rewrites where it stands.

PyYAML composes the nodes; nothing in a file is constructed, so no tag of it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from ikl_plugins._files import check_yaml

from .messages import CALLER

__all__ = ["Edits", "Entry", "Line", "Tree", "is_empty", "number_text", "yaml_text"]

_STEP = 2  # spaces that a new block is indented
_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"


class Line(NamedTuple):
    """A ``key: value`` to be written, and the comment that goes with it."""

    key: str
    text: str
    comment: str = ""

    def shown(self, margin: str = "") -> str:
        """The line as it stands in a block."""
        return f"{margin}{self.key}: {self.text}" + (f"  # {self.comment}" if self.comment else "")


def _flow(lines: Sequence[Line]) -> str:
    """The lines as they stand in a flow mapping, which has no room for comments."""
    return ", ".join(f"{line.key}: {line.text}" for line in lines)


class _Composer(yaml.SafeLoader):
    """Composes nodes and remembers where aliases stand, which PyYAML's nodes do not tell."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.alias_spans: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.anchor_names: dict[int, str] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        is_alias = isinstance(event, yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias:
            place = index if isinstance(index, int) else id(index)
            span = event.start_mark.index, event.end_mark.index, event.start_mark.line + 1
            self.alias_spans[id(parent), place] = span
        elif event.anchor is not None:
            self.anchor_names[id(node)] = event.anchor
        return node


class Entry(NamedTuple):
    """One ``key: value`` of a mapping; the value of an alias is the node of its anchor."""

    key: Any
    value: Any
    owner: Any  # node of the mapping that the entry stands in
    start: int  # where the value begins in the text; of an alias, the alias
    end: int
    is_alias: bool

    @property
    def line(self) -> int:
        """Number of the line, from 1."""
        return int(self.key.start_mark.line) + 1

    @property
    def margin(self) -> str:
        """The spaces before the key."""
        return " " * int(self.key.start_mark.column)


class Tree:
    """A YAML text and its nodes.

    Args:
        text: the file.
        name: what messages call it.

    Raises:
        ValueError: no YAML of one document that holds a mapping; see also :func:`ikl_plugins._files.check_yaml`.

    Attributes:
        root: node of the whole.
        uses: by the id of a node, each place that it is a value at: path of keys, and line. Aliases are places, too.
        home: by the id of a node, the path at which it is written out.
        newline: how lines end.
    """

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.newline = "\r\n" if "\r\n" in text else "\n"
        check_yaml(CALLER, name, text)
        try:
            self._composer = _Composer(text)
            self.root: Any = self._composer.get_single_node()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f", line {mark.line + 1}"
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ValueError(f"{CALLER}: {name}{where}: the file must be one YAML document, but {problem}.") from error
        if not isinstance(self.root, yaml.MappingNode):
            raise self.refusal(None, "the file must hold a mapping. Compare configs/torchdistill.")
        self.uses: dict[int, list[tuple[tuple[str, ...], int]]] = {}
        self.home: dict[int, tuple[str, ...]] = {}
        self._walk(self.root, ())

    def _walk(self, node: Any, path: tuple[str, ...]) -> None:
        self.home[id(node)] = path
        children: list[tuple[str, Any, bool, int]] = []
        if isinstance(node, yaml.MappingNode):
            for entry in self.own_entries(node):
                line = self._composer.alias_spans.get((id(node), id(entry.key)), (0, 0, entry.line))[2]
                children.append((str(entry.key.value), entry.value, entry.is_alias, line))
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                span = self._composer.alias_spans.get((id(node), number))
                line = item.start_mark.line + 1 if span is None else span[2]
                children.append((str(number), item, span is not None, line))
        for key, child, is_alias, line in children:
            self.uses.setdefault(id(child), []).append(((*path, key), line))
            if not is_alias:
                self._walk(child, (*path, key))

    def own_entries(self, mapping: Any) -> list[Entry]:
        """The entries that stand in the mapping itself."""
        found = []
        for key, value in mapping.value:
            span = self._composer.alias_spans.get((id(mapping), id(key)))
            start, end = (value.start_mark.index, self.content_end(value)) if span is None else span[:2]
            found.append(Entry(key, value, mapping, start, end, span is not None))
        return found

    def entries(self, mapping: Any) -> dict[str, Entry]:
        """All entries by key, those that `<<` merges in included; the mapping's own go first. None of another node."""
        found: dict[str, Entry] = {}
        merged: list[Any] = []
        for entry in self.own_entries(mapping) if isinstance(mapping, yaml.MappingNode) else ():
            if entry.key.tag == _MERGE:
                parts = entry.value.value if isinstance(entry.value, yaml.SequenceNode) else [entry.value]
                merged.extend(part for part in parts if isinstance(part, yaml.MappingNode))
            else:
                found.setdefault(str(entry.key.value), entry)
        for part in merged:
            for key, entry in self.entries(part).items():
                found.setdefault(key, entry)
        return found

    def at(self, node: Any, *keys: str) -> Any:
        """The value that keys lead to, None where one of them is missing."""
        for key in keys:
            entry = self.entries(node).get(key)
            if entry is None:
                return None
            node = entry.value
        return node

    def anchor(self, node: Any) -> str | None:
        """The name of a node's anchor, None without one."""
        return self._composer.anchor_names.get(id(node))

    def value(self, node: Any) -> Any:
        """The value of a node; a yaml.YAMLError where it has a tag of torchdistill."""
        return self._composer.construct_object(node, deep=True)

    def content_end(self, node: Any) -> int:
        """Where the text of a node ends. PyYAML lets a block end where the next token begins, behind all comments."""
        if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            if isinstance(node, yaml.MappingNode):
                return self.own_entries(node)[-1].end
            span = self._composer.alias_spans.get((id(node), len(node.value) - 1))
            return self.content_end(node.value[-1]) if span is None else span[1]
        return int(node.end_mark.index)

    def written_out(self, node: Any) -> Iterator[Any]:
        """A node and all nodes that are written out inside it; aliases are not."""
        yield node
        if isinstance(node, yaml.MappingNode):
            for entry in self.own_entries(node):
                if not entry.is_alias:
                    yield from self.written_out(entry.value)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                if (id(node), number) not in self._composer.alias_spans:
                    yield from self.written_out(item)

    def line_start(self, index: int) -> int:
        """Where the line of a character begins."""
        return self.text.rfind("\n", 0, index) + 1

    def line_end(self, index: int) -> int:
        """Where the line ends, before its line break."""
        end = self.text.find("\n", index)
        end = len(self.text) if end < 0 else end
        return end - 1 if self.text[end - 1 : end] == "\r" else end

    def refusal(self, where: Any, message: str) -> ValueError:
        """An error that names the line; ``where`` is an entry, a node, the number of a line or None."""
        line = where if isinstance(where, int) else getattr(where, "line", None)
        if line is None and where is not None:
            line = where.start_mark.line + 1
        place = self.name if line is None else f"{self.name}, line {line}"
        return ValueError(f"{CALLER}: {place}: {message}")


def number_text(number: float) -> str:
    """A number that YAML 1.1 reads as one: it takes 1e-05 for a string."""
    text = repr(float(f"{number:.12g}"))
    return text if "." in text or "e" not in text else text.replace("e", ".0e")


def yaml_text(value: Any) -> str:
    """A plain value as YAML writes it."""
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, str):
        return f"'{value}'"
    return "null" if value is None else str(value)


def is_empty(node: Any) -> bool:
    """Whether a node is a null."""
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL


class Edits:
    """Collects edits of a tree's text, and makes them all at once; the tree stays as it is."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._edits: list[tuple[int, int, str]] = []

    def replace(self, start: int, end: int, new: str) -> None:
        """Puts ``new`` where ``start`` to ``end`` is."""
        self._edits.append((start, end, new))

    def insert(self, at: int, new: str) -> None:
        """Puts ``new`` before a character."""
        self.replace(at, at, new)

    def _behind_colon(self, entry: Entry) -> int:
        return self.tree.text.index(":", entry.key.end_mark.index) + 1

    def replace_value(self, entry: Entry, new: str) -> None:
        """Puts a value on the line of the key, one space behind the colon, where the old one is or would be."""
        colon = self._behind_colon(entry)
        self.replace(colon, max(entry.end, colon), f" {new}")

    def put(self, entry: Entry, lines: Sequence[Line]) -> None:
        """Writes lines in the place of an entry. What the user says beside it stays above, with what it was said of."""
        tree = self.tree
        start, end = entry.key.start_mark.index, entry.end
        if entry.owner.flow_style:
            self.replace(start, end, _flow(lines))
            return
        beside = tree.text[end : tree.line_end(end)]
        if beside.strip():
            old = " ".join(tree.text[start:end].split())
            self.insert(tree.line_start(start), f"{entry.margin}# was: {old}{beside}{tree.newline}")
        self.replace(start, end + len(beside), lines[0].shown())
        if lines[1:]:
            self.insert_after(entry, lines[1:])

    def insert_after(self, entry: Entry, lines: Sequence[Line]) -> None:
        """Writes lines behind an entry of the same mapping."""
        if entry.owner.flow_style:
            self.insert(entry.end, "".join(f", {_flow([line])}" for line in lines))
            return
        at = self.tree.line_end(entry.end)
        self.insert(at, "".join(self.tree.newline + line.shown(entry.margin) for line in lines))

    def insert_before(self, entry: Entry, line: Line) -> None:
        """Writes a line before an entry of the same mapping, and before the comments that belong to it."""
        tree, at = self.tree, entry.key.start_mark.index
        if entry.owner.flow_style:
            self.insert(at, f"{_flow([line])}, ")
            return
        start = tree.line_start(at)
        while start > 0 and tree.text[tree.line_start(start - 1) : start].startswith(f"{entry.margin}#"):
            start = tree.line_start(start - 1)
        self.insert(start, line.shown(entry.margin) + tree.newline)

    def fill(self, entry: Entry, lines: Sequence[Line]) -> None:
        """Gives lines to a key that has none: `key:` or `key: {}`."""
        tree = self.tree
        if entry.owner.flow_style:
            self.replace_value(entry, f"{{{_flow(lines)}}}")
            return
        colon = self._behind_colon(entry)
        end = max(entry.end, colon)
        self.replace(colon, end, "")
        margin = entry.margin + " " * _STEP
        self.insert(tree.line_end(end), "".join(tree.newline + line.shown(margin) for line in lines))

    def comment(self, entry: Entry, text: str) -> None:
        """Writes a comment beside an entry, or above it where there is one already; none into flow mappings."""
        tree = self.tree
        if entry.owner.flow_style or not text:
            return
        if not tree.text[entry.end : tree.line_end(entry.end)].strip():
            self.insert(entry.end, f"  # {text}")
        else:
            self.insert(tree.line_start(entry.key.start_mark.index), f"{entry.margin}# {text}{tree.newline}")

    def cut(self, entry: Entry) -> None:
        """Takes an entry out: its lines in a block, itself and a comma in a flow mapping."""
        tree = self.tree
        start, end = entry.key.start_mark.index, entry.end
        if not entry.owner.flow_style:
            after = tree.text.find("\n", end)
            self.replace(tree.line_start(start), len(tree.text) if after < 0 else after + 1, "")
            return
        siblings = tree.own_entries(entry.owner)
        place = next(number for number, sibling in enumerate(siblings) if sibling.key is entry.key)
        if place + 1 < len(siblings):
            end = siblings[place + 1].key.start_mark.index
        elif place:
            start = siblings[place - 1].end
        self.replace(start, end, "")

    def applied(self) -> str:
        """The text with all edits."""
        text, last = self.tree.text, len(self.tree.text)
        # From the end on. Of several at one place the one that was asked for first comes first in the text.
        order = sorted(range(len(self._edits)), key=lambda number: (*self._edits[number][:2], number), reverse=True)
        for number in order:
            start, end, new = self._edits[number]
            if end > last:
                raise RuntimeError(f"two edits of one place, at character {start}")
            text = text[:start] + new + text[end:]
            last = start
        return text
