"""A torchdistill YAML with the losses of this package in place of KL.

The text of the file is edited, not dumped anew: whatever is not concerned stays as it is to the character, comments,
anchors, `!join` and `!import_call` among it. Nothing in the file is run; :mod:`.torchdistill_check` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ikl_plugins import _validation

from .messages import CALLER
from .objective import Value, has_weights_of_kl, loss_keywords, objective_of, values_of
from .terms import PLACES, SOURCES, Scope, Term, is_ours, num_classes_of, scopes, terms_of, wrapped
from .wrapper import logit_places
from .yaml_text import Edits, Entry, Line, Tree, is_empty, yaml_text

__all__ = ["Adoption", "adopt_yaml"]

DEPENDENCY = "ikl_plugins.torchdistill"
PROCESS = "ikl_pre_epoch_process"
_DEFAULT_PROCESSES = ("default_pre_epoch_process_with_teacher",)
_NEEDS_THE_EPOCH = ("global_info", "warmup_epochs")


class Adoption(NamedTuple):
    """What :func:`adopt_yaml` makes of a config.

    Attributes:
        text: the new content of the file; the old one where there was nothing to do.
        notes: what was mapped to what, which equivalence holds, what is new; a line each.
        changed: whether ``text`` differs from what was given.
        claims: by stage and name of the term, what the check holds it to: 'gradients' for those of the loss before,
            'gradients with beta 0', 'none'.
    """

    text: str
    notes: list[str]
    changed: bool
    claims: Mapping[tuple[str, ...], str]


def adopt_yaml(
    text: str,
    loss: str,
    *,
    name: str = "the config",
    settings: Mapping[str, Any] | None = None,
    student_logits: str | None = None,
    teacher_logits: str | None = None,
) -> Adoption:
    """A torchdistill config in which every distillation loss of logits is one of this package.

    Args:
        text: the YAML file.
        loss: 'DKL', 'IKL' or 'GKL'.
        name: what messages call the file.
        settings: keywords of the loss that replace those which follow from the file.
        student_logits: for ``KLDivLoss``: the module that gives the student's logits, ``PATH`` or ``PATH:input``.
        teacher_logits: the same for the teacher.

    Returns:
        The new text. Of a file that is adopted already the same text, ``changed`` False.

    Raises:
        ValueError: no YAML; no loss that can be adopted; a setting that cannot be mapped, by line and key.
        TypeError: a setting of the wrong type.
    """
    settings = dict(settings or {})
    known = loss_keywords(loss)
    for keyword in settings:
        if keyword not in known:
            raise ValueError(_validation.unknown_name_message(CALLER, f"keyword of {loss}Loss", keyword, known))
    editor = _Editor(Tree(text, name), loss, settings, {"student": student_logits, "teacher": teacher_logits})
    new = wrapped(Tree(editor.run(), name))
    return Adoption(new, editor.notes, new != text, editor.claims)


class _Editor:
    """Collects the edits of one config, and what is to be said about them."""

    def __init__(self, tree: Tree, loss: str, settings: dict[str, Any], logits: dict[str, str | None]) -> None:
        self.tree = tree
        self.loss = loss
        self.settings = settings
        self.logits = logits
        self.notes: list[str] = []
        self.claims: dict[tuple[str, ...], str] = {}
        self._edits = Edits(tree)
        self._adopted: set[tuple[str, ...]] = set()  # paths of the losses that are rewritten
        self._kinds: dict[int, str] = {}  # by the id of kwargs that are rewritten, whose they are
        self._gone: list[tuple[tuple[str, ...], Entry]] = []  # what is taken out, and its path

    def _note(self, where: Entry | Term, text: str) -> None:
        self.notes.append(f"line {where.line}: {text}")

    def run(self) -> str:
        terms = terms_of(self.tree)
        sources = [term for term in terms if term.kind in SOURCES]
        ours = [term for term in terms if is_ours(term.kind)]
        self._check_terms(terms, sources, ours)
        for term in terms:
            if term.parent is term.mapping:
                self._note(
                    term, f"{term.kind} becomes the term 'kd' of a WeightedSumLoss, which torchdistill 1.x needs"
                )
        self._adopted.update(term.path for term in sources)
        done: dict[int, Term] = {}
        for term in sources:
            first = done.setdefault(id(term.mapping), term)
            if first is term:
                self._adopt(term)
            elif term.wrapper is not None and term.parent is not first.parent:
                rule = f"the term '{term.name}' must have a loss of its own, got an alias beside a wrapper."
                raise self.tree.refusal(term.wrapper, f"{rule} Write the loss out in both places.")
            else:
                self.claims[term.place] = self.claims[first.place]
        for term in () if sources else ours:
            if term.kind.removesuffix("Loss") != self.loss:
                self._note(term, f"{term.kind} stays: --loss replaces torchdistill's losses; change its `key` by hand")
        self._add_dependency()
        done_scopes: set[int] = set()
        for scope in scopes(self.tree):
            concerned = [term for term in (*sources, *ours) if term.scope.path == scope.path]
            if concerned and id(scope.mapping) not in done_scopes:
                done_scopes.add(id(scope.mapping))
                self._add_process(scope, concerned)
        self._check_anchors()
        return self._edits.applied()

    def _check_terms(self, terms: Sequence[Term], sources: Sequence[Term], ours: Sequence[Term]) -> None:
        if not sources and not ours:
            got = ", ".join(f"{term.kind} (line {term.line})" for term in terms) or "none that is read"
            rule = f"the criterion must have a term with one of {', '.join(SOURCES)}, got {got}."
            raise self.tree.refusal(scopes(self.tree)[0].criterion, f"{rule} Add a term with ours by hand.")
        if any(term.kind == "KLDivLoss" for term in sources):
            return
        for role, given in self.logits.items():
            if given is not None:
                rule = f"--{role}-logits goes with a KLDivLoss in a SimpleLossWrapper, got a config without one."
                raise ValueError(f"{CALLER}: {rule} Leave it out.")

    # --- one loss ---

    def _adopt(self, term: Term) -> None:
        tree, kind = self.tree, term.kind
        parts = tree.entries(term.mapping)
        for key, entry in parts.items():
            if key not in ("key", "kwargs") and not key.startswith("_"):
                raise tree.refusal(entry, f"{kind} must have `key` and `kwargs` alone, got `{key}`. Take it out.")
        for path, line in tree.uses[id(term.mapping)]:
            self._check_use(path, line, f"the {kind} of line {term.line}")
        kwargs = parts.get("kwargs")
        if kwargs is None or not (isinstance(kwargs.value, yaml.MappingNode) or is_empty(kwargs.value)):
            rule = f"{kind} must have a mapping `kwargs`, got none. Compare configs/torchdistill."
            raise tree.refusal(kwargs or parts["key"], rule)
        given = tree.entries(kwargs.value)
        places: dict[str, str] = {}
        num_classes = self.settings.get("num_classes", num_classes_of(tree))
        if kind == "KLDivLoss":
            objective = objective_of(tree, term, given, num_classes)
            places, notes = logit_places(tree, term, given, self.logits)
            self.notes += notes
        else:
            if term.wrapper is not None and not is_empty(term.wrapper.value):
                rule = f"{kind} must stand without a `criterion_wrapper`, as it finds its logits itself. Take it out."
                raise tree.refusal(term.wrapper, rule)
            for keyword in (*PLACES, "temperature"):
                if keyword not in given:
                    rule = f"`kwargs` of {kind} must have `{keyword}`, got none."
                    raise tree.refusal(kwargs, f"{rule} Add it: torchdistill 1.x needs it.")
            objective = objective_of(tree, term, given, num_classes)
        values = values_of(tree, term, objective, self.loss, self.settings)
        self._replace_key(term, parts["key"])
        self._replace_kwargs(term, kwargs, values, places)
        if kind == "KLDivLoss" and term.wrapper is not None:
            self._gone.append(((*term.path[:-1], "criterion_wrapper"), term.wrapper))
            self._edits.cut(term.wrapper)
        self._explain(term, objective.source, values)

    def _check_use(self, path: tuple[str, ...], line: int, what: str) -> None:
        """Refuses an edit that would reach somebody else through an alias."""
        if path not in self._adopted and not any(part.startswith("_") for part in path):
            rule = f"{what} must be used by losses that are adopted alone, got `{': '.join(path)}`."
            raise self.tree.refusal(line, f"{rule} Write it out there.")

    # --- edits ---

    def _replace_key(self, term: Term, entry: Entry) -> None:
        """Renames the loss, and leaves quotes and an anchor as they are."""
        tree = self.tree
        key_paths = {(*path, "key") for path in self._adopted}
        if entry.is_alias:
            if tree.uses[id(entry.value)][0][0] not in key_paths:
                self._edits.replace(entry.start, entry.end, f"'{self.loss}Loss'")
            return  # else the anchor stands at another loss that is adopted
        for path, line in tree.uses[id(entry.value)]:
            if path not in key_paths:
                rule = f"`key: '{term.kind}'` of line {entry.line} must be used by losses that are adopted alone"
                raise tree.refusal(line, f"{rule}, got `{': '.join(path)}`. Write '{term.kind}' out there.")
        text = tree.text[entry.start : entry.end]
        self._edits.replace(entry.start, entry.end, f"{self.loss}Loss".join(text.rsplit(term.kind, 1)))

    def _replace_kwargs(
        self, term: Term, kwargs: Entry, values: Mapping[str, Value], places: Mapping[str, str]
    ) -> None:
        """Rewrites the keywords where they stand: what is the same stays, with its comments."""
        tree = self.tree
        given = tree.entries(kwargs.value)
        todo = {name: Line(name, yaml_text(place)) for name, place in places.items()}
        todo |= {name: Line(name, yaml_text(value.value), value.why) for name, value in values.items()}
        if "temperature" not in given and not values["temperature"].given:
            del todo["temperature"]  # 1, the default
        if isinstance(kwargs.value, yaml.ScalarNode):
            self._edits.fill(kwargs, list(todo.values()))
            return
        for path, line in tree.uses[id(kwargs.value)]:
            owner = path[:-1] if path[-1] == "kwargs" else path
            self._check_use(owner, line, f"the kwargs of {term.kind} in line {kwargs.line}")
        done = id(kwargs.value) in self._kinds
        shared = self._kinds.setdefault(id(kwargs.value), term.kind)
        if shared != term.kind:
            rule = f"`kwargs` of {term.kind} must be its own, got those of a {shared}. Write them out."
            raise tree.refusal(kwargs, rule)
        if done:
            return
        renamed, dropped, last = None, [], None
        for keyword, entry in given.items():
            ours = "ce_weight" if keyword == "alpha" else keyword
            line_of_it = todo.pop(ours, None) if keyword in ("alpha", "temperature", "reduction") else None
            if line_of_it is None and (keyword == "reduction" or keyword in PLACES):
                last = entry
                continue
            rewritten = line_of_it is not None and (values[ours].given or ours == "reduction")
            if line_of_it is None or ours != keyword or rewritten:
                self._check_own(term, kwargs, entry)
            if line_of_it is None:
                dropped.append(entry)
                continue
            last = entry
            if ours != keyword:
                renamed = entry
                self._edits.replace(entry.key.start_mark.index, entry.key.end_mark.index, ours)
            if rewritten:
                self._gone.append((self._path_of(entry), entry))
                self._edits.replace(entry.start, entry.end, line_of_it.text)
            if ours != keyword or rewritten:
                self._edits.comment(entry, line_of_it.comment)
        self._gone.extend((self._path_of(entry), entry) for entry in dropped)
        lines = list(todo.values())
        own = [entry for entry in (renamed, last) if entry is not None and entry.owner is kwargs.value]
        own += tree.own_entries(kwargs.value)[-1:]
        if dropped:
            self._edits.put(dropped[0], lines)
            for entry in dropped[1:]:
                self._edits.cut(entry)
        elif own:
            self._edits.insert_after(own[0], lines)
        else:
            self._edits.fill(kwargs, lines)

    def _check_own(self, term: Term, kwargs: Entry, entry: Entry) -> None:
        """Refuses to change a keyword that `<<` merges in."""
        if entry.owner is not kwargs.value:
            rule = f"`{entry.key.value}` of {term.kind} must stand in its own `kwargs` to be changed"
            got = f"got a value that is merged from line {entry.line}"
            raise self.tree.refusal(kwargs, f"{rule}, {got}. Write it out there.")

    def _path_of(self, entry: Entry) -> tuple[str, ...]:
        return (*self.tree.home[id(entry.owner)], str(entry.key.value))

    def _check_anchors(self) -> None:
        """Refuses to take an anchor out that somebody else needs."""
        gone = [path for path, _ in self._gone]
        for _, entry in self._gone:
            for node in () if entry.is_alias else self.tree.written_out(entry.value):
                anchor = self.tree.anchor(node)
                for path, line in self.tree.uses[id(node)] if anchor else ():
                    if not any(path[: len(prefix)] == prefix for prefix in gone):
                        rule = f"`*{anchor}` must not depend on `{entry.key.value}` of line {entry.line}, which changes"
                        raise self.tree.refusal(line, f"{rule}, got `{': '.join(path)}`. Write the value out there.")

    # --- dependencies and the pre-epoch process ---

    def _add_dependency(self) -> None:
        tree, edits = self.tree, self._edits
        entry = tree.entries(tree.root).get("dependencies")
        quoted = f"'{DEPENDENCY}'"
        if entry is None:
            end = ", " if tree.root.flow_style else tree.newline
            edits.insert(tree.own_entries(tree.root)[0].key.start_mark.index, f"dependencies: [{quoted}]{end}")
            return
        node = entry.value
        if entry.is_alias or isinstance(node, yaml.MappingNode):
            raise tree.refusal(entry, "`dependencies` must be a list of names, got another form. Write it out.")
        if any(map(self._names_us, [node] if isinstance(node, yaml.ScalarNode) else node.value)):
            return
        if is_empty(node):
            edits.replace_value(entry, f"[{quoted}]")
        elif isinstance(node, yaml.ScalarNode):
            edits.replace_value(entry, f"[{tree.text[entry.start : entry.end]}, {quoted}]")
        elif node.flow_style:
            close = node.end_mark.index - 1
            inner = tree.text[node.start_mark.index + 1 : close].strip()
            comma = "" if not inner else " " if inner.endswith(",") else ", "
            edits.insert(close, f"{comma}{quoted}")
        else:
            edits.insert(tree.line_end(entry.end), f"{tree.newline}{' ' * node.start_mark.column}- {quoted}")

    def _names_us(self, item: Any) -> bool:
        """Whether an entry of `dependencies` is ours: a name, [name, package] or name: ..."""
        if isinstance(item, yaml.ScalarNode):
            return bool(item.value == DEPENDENCY)
        if isinstance(item, yaml.SequenceNode):
            return bool(item.value) and self._names_us(item.value[0])
        name = self.tree.at(item, "name")
        return name is not None and self._names_us(name)

    def _add_process(self, scope: Scope, terms: Sequence[Term]) -> None:
        tree = self.tree
        entry = tree.entries(scope.mapping).get("pre_epoch_process")
        held = "" if entry is None else str(getattr(entry.value, "value", ""))
        if held == PROCESS:
            return
        if entry is None:
            own = tree.own_entries(scope.mapping)
            before = next((item for item in own if item.key.value == "criterion"), own[0])
            self._edits.insert_before(before, Line("pre_epoch_process", f"'{PROCESS}'"))
        elif is_empty(entry.value) or held in _DEFAULT_PROCESSES:
            self._gone.append((self._path_of(entry), entry))
            self._edits.replace_value(entry, f"'{PROCESS}'")
        else:
            needed = " and ".join(name for name in _NEEDS_THE_EPOCH if any(self._asks(name, term) for term in terms))
            if needed:
                rule = (
                    f"`pre_epoch_process` must be '{PROCESS}', from which {needed} must know the epoch, got '{held}'."
                )
                way_out = (
                    f"Adopt without {needed}, register a process of yours that calls ours, and add {needed} by hand."
                )
                raise tree.refusal(entry, f"{rule} {way_out}")
            self._note(
                entry,
                f"your pre_epoch_process '{held}' stays; let it call {PROCESS}, which keeps a frozen teacher in eval",
            )
            return
        note = (
            f"pre_epoch_process '{PROCESS}': a frozen teacher is in eval mode from now on; torchdistill leaves it in "
            f"training mode, and its BatchNorm statistics drift"
        )
        if note not in self.notes:
            self.notes.append(note)

    def _asks(self, name: str, term: Term) -> bool:
        """Whether a loss must know the epoch because of a keyword."""
        if term.kind in SOURCES:
            return bool(self.settings.get(name))
        node = self.tree.at(term.mapping, "kwargs", name)
        return node is not None and bool(self.tree.value(node))

    def _explain(self, term: Term, source: str, values: Mapping[str, Value]) -> None:
        """Says what the loss was, what it is, and what is the same."""
        shown = ", ".join(f"{name} {yaml_text(value.value)}" for name, value in values.items() if name != "reduction")
        self._note(term, f"{term.kind} is {source}")
        self._note(term, f"{self.loss}Loss has {shown}")
        free = {"check_finite", "gamma", "global_info", "num_classes", "weight_temperature"}
        free |= set() if has_weights_of_kl(self.loss) else {"beta"}
        changed = [name for name, value in values.items() if value.given and name not in free]
        claim = "none"
        if term.kind == "LogitStdKDLoss":
            text = "no equivalence holds: LogitStdKDLoss standardises both logits first, ours takes them as they are"
        elif changed:
            text = f"no equivalence holds, as --set gives {', '.join(changed)}"
        elif has_weights_of_kl(self.loss):
            claim = "gradients"
            text = (
                f"for logits (N, C) the gradients are those of {term.kind}; the value differs, so do not compare it "
                f"with earlier logs"
            )
        else:
            claim = "gradients with beta 0"
            text = (
                f"for logits (N, C) and with beta 0 the student's gradients would be those of {term.kind}; new is "
                f"beta's term, which in KL drives the teacher alone. Published settings: docs/losses.md, for --set"
            )
        self.claims[term.place] = claim
        self._note(term, text)
