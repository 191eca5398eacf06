"""The torchdistill half of tools/adopt.py: a distillation YAML with the losses of this package in place of KL.

The text of the file is edited, not dumped anew: whatever is not concerned stays as it is to the character, comments,
anchors, `!join` and `!import_call` among it. Nothing in the file is run; adopt_torchdistill_check.py does that.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from ikl_plugins.commands.adopt.yaml_text import Edits, Entry, Line, Tree, is_empty, number_text, yaml_text

import ikl_plugins
from ikl_plugins import _validation

__all__ = ["Adoption", "Term", "adopt_yaml", "loss_keywords", "num_classes_of", "terms_of"]

CALLER = "adopt"
DEPENDENCY = "ikl_plugins.torchdistill"
PROCESS = "ikl_pre_epoch_process"
_DEFAULT_PROCESSES = ("default_pre_epoch_process_with_teacher",)
_LOGIT_LOSSES = ("KDLoss", "LogitStdKDLoss")
_SOURCES = (*_LOGIT_LOSSES, "KLDivLoss")
_OURS = ("DKLLoss", "IKLLoss", "GKLLoss", "DKL", "IKL", "GKL")
_PLACES = ("student_module_path", "student_module_io", "teacher_module_path", "teacher_module_io")
_SOURCE_KEYWORDS = {
    "KDLoss": (*_PLACES, "temperature", "alpha", "beta", "reduction"),
    "LogitStdKDLoss": (*_PLACES, "temperature", "eps", "alpha", "beta", "reduction"),
    "KLDivLoss": ("reduction", "log_target"),
}
_ORDER = (
    "ce_weight", "alpha", "beta", "gamma", "temperature", "weight_temperature", "global_info", "num_classes",
    "warmup_epochs", "reduction", "check_finite",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adoption:
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


def loss_keywords(loss: str) -> list[str]:
    """The keywords that ``--set`` may give to a loss in a torchdistill config.

    Args:
        loss: 'DKL', 'IKL' or 'GKL'.

    Returns:
        Those of the loss itself, then those that the adapter adds.
    """
    own = inspect.signature(getattr(ikl_plugins, f"{loss}Loss").__init__).parameters
    return [name for name in own if name != "self"] + ["ce_weight", "warmup_epochs"]


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
        settings: keywords of the loss that replace those which follow from the file, see :func:`loss_keywords`.
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
    editor = _Editor(Tree(text, name), loss, settings, student_logits, teacher_logits)
    new = _wrapped(Tree(editor.run(), name))
    return Adoption(new, editor.notes, new != text, editor.claims)


# --- the losses of a config ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A training stage, or the whole training: a mapping that has a criterion."""

    path: tuple[str, ...]
    mapping: Any
    criterion: Entry


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss inside the criterion of a stage.

    Attributes:
        path: keys that lead to it.
        scope: its stage.
        name: name of the term.
        kind: the loss's key.
        parent: node of the term: criterion, criterion_wrapper and weight.
        mapping: node of the loss: key and kwargs.
        wrapper: the criterion_wrapper, if there is one.
    """

    path: tuple[str, ...]
    scope: _Scope
    name: str
    kind: str
    parent: Any
    mapping: Any
    wrapper: Entry | None

    @property
    def place(self) -> tuple[str, ...]:
        """Stage and name, which stay the same when the term is adopted."""
        return (*self.scope.path, self.name)

    @property
    def line(self) -> int:
        """Number of its first line, from 1."""
        return self.mapping.start_mark.line + 1  # type: ignore[no-any-return]


def _block(tree: Tree, parent: Any, key: str, path: str) -> Entry:
    entry = tree.entries(parent).get(key)
    if entry is None or not isinstance(entry.value, yaml.MappingNode):
        what = "none" if entry is None else "something else"
        raise tree.refusal(entry, f"the block `{path}` must be a mapping", what, "Compare configs/torchdistill.")
    return entry


def _scopes(tree: Tree) -> list[_Scope]:
    train = _block(tree, tree.root, "train", "train:").value
    entries = tree.entries(train)
    if "stage1" in entries:
        stages = [(("train", key), _block(tree, train, key, f"train: {key}:").value)
                  for key in entries if key.startswith("stage")]  # fmt: skip
    else:
        stages = [(("train",), train)]
    found = []
    for path, mapping in stages:
        label = ": ".join(path)
        criterion = _block(tree, mapping, "criterion", f"{label}: criterion:")
        inside = tree.entries(criterion.value)
        if "key" not in inside and "type" in inside:
            raise tree.refusal(
                inside["type"], f"`{label}: criterion:` must have the form of torchdistill 1.x, with `key` and "
                f"`kwargs`",
                "`type` of an older form", "Move the config to torchdistill 1.x first.",
            )  # fmt: skip
        found.append(_Scope(path, mapping, criterion))
    return found


def _key_of(tree: Tree, mapping: Any) -> str:
    entry = tree.entries(mapping).get("key")
    return str(entry.value.value) if entry is not None and isinstance(entry.value, yaml.ScalarNode) else ""


def _terms(tree: Tree, scope: _Scope) -> list[Term]:
    """The terms of the scope's criterion whose loss is a mapping with a key."""
    if _key_of(tree, scope.criterion.value) in (*_SOURCES, *_OURS):
        return [_plain_term(tree, scope)]
    path = (*scope.path, "criterion", "kwargs", "sub_terms")
    kwargs = tree.entries(scope.criterion.value).get("kwargs")
    if kwargs is None or not isinstance(kwargs.value, yaml.MappingNode):
        return []
    sub_terms = tree.entries(kwargs.value).get("sub_terms")
    if sub_terms is None or not isinstance(sub_terms.value, yaml.MappingNode):
        return []
    found = []
    for name, entry in tree.entries(sub_terms.value).items():
        if not isinstance(entry.value, yaml.MappingNode):
            continue
        parts = tree.entries(entry.value)
        loss = parts.get("criterion")
        if loss is None or not isinstance(loss.value, yaml.MappingNode):
            continue
        if loss.value.tag == "!import_call":
            key = _key_of(tree, loss.value)
            if key.rpartition(".")[2] in _SOURCES:
                raise tree.refusal(
                    loss, f"`criterion` of the term '{name}' must name its loss by `key` and `kwargs`",
                    f"an `!import_call` of {key}", f"Write key: '{key.rpartition('.')[2]}' and its kwargs.",
                )  # fmt: skip
            continue
        found.append(
            Term(
                (*path, name, "criterion"), scope, name, _key_of(tree, loss.value), entry.value, loss.value,
                parts.get("criterion_wrapper"),
            )
        )  # fmt: skip
    return found


def terms_of(tree: Tree) -> list[Term]:
    """The terms of all stages whose loss is a mapping with a key."""
    return [term for scope in _scopes(tree) for term in _terms(tree, scope)]


def _plain_term(tree: Tree, scope: _Scope) -> Term:
    """The loss that stands where torchdistill 1.x takes a WeightedSumLoss; :func:`_wrapped` will put it into one."""
    block = scope.criterion.value
    others = [entry for entry in tree.own_entries(block) if entry.key.value not in ("key", "kwargs")]
    if scope.criterion.is_alias or block.flow_style or others or tree.anchor(block):
        raise tree.refusal(
            others[0] if others else scope.criterion,
            f"`criterion:` with {_key_of(tree, block)} must be a block of `key` and `kwargs`, to be put into a "
            f"WeightedSumLoss", "another form", "Make it a term of a WeightedSumLoss: torchdistill 1.x needs one.",
        )  # fmt: skip
    return Term((*scope.path, "criterion"), scope, "kd", _key_of(tree, block), block, block, None)


def _wrapped(tree: Tree) -> str:
    """The text with every plain criterion made a term of a WeightedSumLoss."""
    for scope in _scopes(tree):
        block = scope.criterion.value
        if _key_of(tree, block) not in _OURS:
            continue
        first = tree.own_entries(block)[0].key.start_mark
        start, end = tree.line_start(first.index), tree.line_end(tree.content_end(block))
        margin = " " * first.column
        head = ("key: 'WeightedSumLoss'", "kwargs:", "  sub_terms:", "    kd:", "      criterion:")
        lines = [f"{margin}{line}{tree.newline}" for line in head]
        lines += [
            f"{' ' * 8}{line}" if line.strip() else line for line in tree.text[start:end].splitlines(keepends=True)
        ]
        lines += [f"{tree.newline}{margin}      weight: 1.0"]
        return _wrapped(Tree(tree.text[:start] + "".join(lines) + tree.text[end:], tree.name))
    return tree.text


# --- what their settings are in ours ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Value:
    """A keyword of ours: its value, what the comment beside it says, and whether --set gives it."""

    value: Any
    why: str = ""
    given: bool = False


class _Editor:
    """Maps the losses of one config, and collects the edits and what is to be said about them."""

    def __init__(
        self, tree: Tree, loss: str, settings: dict[str, Any], student_logits: str | None, teacher_logits: str | None
    ) -> None:
        self.tree = tree
        self.loss = loss
        self.settings = settings
        self.logits = {"student": student_logits, "teacher": teacher_logits}
        self.notes: list[str] = []
        self.claims: dict[tuple[str, ...], str] = {}
        self._edits = Edits(tree)
        self._adopted: set[tuple[str, ...]] = set()  # paths of the losses that are rewritten
        self._kinds: dict[int, str] = {}  # by the id of kwargs that are rewritten, whose they are
        self._gone: list[tuple[tuple[str, ...], Entry]] = []  # what is taken out, and its path

    def run(self) -> str:
        tree = self.tree
        scopes = _scopes(tree)
        terms = [term for scope in scopes for term in _terms(tree, scope)]
        sources = [term for term in terms if term.kind in _SOURCES]
        ours = [term for term in terms if term.kind in _OURS]
        if not sources and not ours:
            raise tree.refusal(
                scopes[0].criterion, f"the criterion must have a term with one of {', '.join(_SOURCES)}",
                ", ".join(f"{term.kind} (line {term.line})" for term in terms) or "none that is read",
                "Other losses have no counterpart; add a term with ours by hand.",
            )  # fmt: skip
        for role, given in self.logits.items():
            if given is not None and not any(term.kind == "KLDivLoss" for term in sources):
                raise ValueError(
                    f"{CALLER}: --{role}-logits goes with a KLDivLoss in a SimpleLossWrapper, got a config "
                    f"without one. "
                    f"Leave it out: the other losses name the modules themselves."
                )
        for term in terms:
            if term.parent is term.mapping:
                self.notes.append(
                    f"line {term.line}: {term.kind} stands where torchdistill 1.x takes a high-level loss; it "
                    f"becomes the "
                    f"term 'kd' of a WeightedSumLoss, with weight 1"
                )
        self._adopted.update(term.path for term in sources)
        done: dict[int, Term] = {}
        for term in sources:
            first = done.setdefault(id(term.mapping), term)
            if first is term:
                self._adopt(term)
            elif term.wrapper is not None and term.parent is not first.parent:
                raise tree.refusal(
                    term.wrapper, f"the term '{term.name}' must have a loss of its own", "an alias beside a wrapper",
                    "Write the loss out in both places.",
                )  # fmt: skip
            else:
                self.claims[term.place] = self.claims[first.place]
        for term in () if sources else ours:
            if term.kind.removesuffix("Loss") != self.loss:
                self.notes.append(
                    f"line {term.line}: {term.kind} stays, as --loss {self.loss} replaces losses of "
                    f"torchdistill alone; "
                    f"change its `key` by hand"
                )
        self._add_dependency()
        scopes_done: set[int] = set()
        for scope in scopes:
            concerned = [term for term in (*sources, *ours) if term.scope is scope]
            if concerned and id(scope.mapping) not in scopes_done:
                scopes_done.add(id(scope.mapping))
                self._add_process(scope, concerned)
        self._check_anchors()
        return self._edits.applied()

    # --- one loss ---

    def _adopt(self, term: Term) -> None:
        tree, kind = self.tree, term.kind
        parts = tree.entries(term.mapping)
        others = [entry for key, entry in parts.items() if key not in ("key", "kwargs") and not key.startswith("_")]
        if others:
            raise tree.refusal(
                others[0], f"{kind} must have `key` and `kwargs` alone", f"`{others[0].key.value}`", "Take it out."
            )
        for path, line in tree.uses[id(term.mapping)]:
            self._check_use(path, line, f"the {kind} of line {term.line}")
        kwargs = parts.get("kwargs")
        if kwargs is None or not (isinstance(kwargs.value, yaml.MappingNode) or is_empty(kwargs.value)):
            raise tree.refusal(
                kwargs or parts["key"], f"{kind} must have a mapping `kwargs`", "none", "Compare configs/torchdistill."
            )
        given = tree.entries(kwargs.value) if isinstance(kwargs.value, yaml.MappingNode) else {}
        self._check_keywords(kind, given)
        reduction, factor, per_class = self._reduction(term, given)
        places: dict[str, str] = {}
        if kind == "KLDivLoss":
            places = self._wrapped_places(term, given)
            ce_weight, strength, temperature = None, factor, 1.0
            source = f"1{per_class} * KL of log-probabilities that the models give"
            why = f"soft-label cross entropy: KLDivLoss has the weight 1{per_class}"
        else:
            if term.wrapper is not None and not is_empty(term.wrapper.value):
                raise tree.refusal(
                    term.wrapper, f"{kind} must stand without a `criterion_wrapper`", "one",
                    "Take it out: the loss finds its logits itself.",
                )  # fmt: skip
            for keyword in (*_PLACES, "temperature"):
                if keyword not in given:
                    raise tree.refusal(
                        kwargs,
                        f"`kwargs` of {kind} must have `{keyword}`",
                        "none",
                        "Add it: torchdistill 1.x needs it.",
                    )
            ce_weight, strength, temperature, source, why = self._kd_weights(kind, given, factor, per_class)
        values = self._values(kind, ce_weight, strength, temperature, why, reduction)
        self._validate(term, values)
        self._replace_key(term, parts["key"])
        self._replace_kwargs(term, kwargs, given, values, places)
        if kind == "KLDivLoss" and term.wrapper is not None:
            self._gone.append(((*term.path[:-1], "criterion_wrapper"), term.wrapper))
            self._edits.cut(term.wrapper)
        self._explain(term, source, values)

    def _check_use(self, path: tuple[str, ...], line: int, what: str) -> None:
        """Refuses an edit that would reach somebody else through an alias."""
        if path in self._adopted or any(part.startswith("_") for part in path):
            return
        raise ValueError(
            f"{CALLER}: {self.tree.name}, line {line}: {what} must be used by losses that are adopted alone, got "
            f"`{': '.join(path)}` that shares it through an anchor. Write it out there."
        )

    def _check_keywords(self, kind: str, given: Mapping[str, Entry]) -> None:
        known = _SOURCE_KEYWORDS[kind]
        for keyword, entry in given.items():
            if keyword in known:
                continue
            if kind in _LOGIT_LOSSES:
                raise self.tree.refusal(
                    entry, f"`kwargs` of {kind} must be its own to be mapped",
                    f"`{keyword}`, which it hands to CrossEntropyLoss",
                    f"Give the labels a term of their own, CrossEntropyLoss with `{keyword}` in a "
                    f"SimpleLossWrapper, and "
                    f"set alpha: 0 here, with beta * temperature**2 as the `weight` of this term.",
                )  # fmt: skip
            raise self.tree.refusal(
                entry, f"`kwargs` of {kind} must be among {', '.join(known)}", f"`{keyword}`", "Take it out."
            )

    def _number(self, entry: Entry) -> float:
        keyword = entry.key.value
        try:
            value = self.tree.value(entry.value)
        except yaml.YAMLError:
            value = None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            shown = self.tree.text[entry.start : entry.end] or "nothing"
            hint = "Write it out as a number."
            if isinstance(value, str) and _reads_as_number(value):
                hint = f"YAML takes this for a string: write {number_text(float(value))}."
            raise self.tree.refusal(entry, f"`{keyword}` must be a plain number to be mapped", shown, hint)
        if value < 0 or (keyword == "temperature" and value == 0):
            rule = "above 0" if keyword == "temperature" else "at least 0"
            raise self.tree.refusal(entry, f"`{keyword}` must be {rule} to be mapped", f"{value}", "Correct it.")
        return value

    def _reduction(self, term: Term, given: Mapping[str, Entry]) -> tuple[str | None, float, str]:
        """Our reduction where it has to be written, the factor that goes with it, and that factor in words."""
        entry = given.get("reduction")
        default = "mean" if term.kind == "KLDivLoss" else "batchmean"
        reduction = default if entry is None else str(entry.value.value)
        if reduction in ("batchmean", "sum"):
            return None, 1.0, ""
        if reduction != "mean":
            raise self.tree.refusal(
                entry, "`reduction` must be 'batchmean', 'sum' or 'mean'", f"'{reduction}'",
                "Use 'batchmean': a training needs one number.",
            )  # fmt: skip
        classes = self.settings.get("num_classes", num_classes_of(self.tree))
        if classes is None:
            raise self.tree.refusal(
                entry or term.mapping,
                f"`reduction` of {term.kind} must be 'batchmean' or 'sum' where the number of classes is unknown",
                "'mean', which divides by it", "Give it: --set num_classes=100.",
            )  # fmt: skip
        return "batchmean", 1.0 / classes, f" / {classes} classes"

    def _kd_weights(
        self, kind: str, given: Mapping[str, Entry], factor: float, per_class: str
    ) -> tuple[float | None, float, float, str, str]:
        """Weight of the labels, weight of KL, temperature; the whole in words, and the weight of KL in words."""
        alpha, beta = (
            None if keyword not in given or is_empty(given[keyword].value) else self._number(given[keyword])
            for keyword in ("alpha", "beta")
        )
        temperature = self._number(given["temperature"])
        if alpha is None and beta is None:
            raise self.tree.refusal(
                given["temperature"], f"{kind} must have `alpha` or `beta` beside its temperature", "neither",
                "torchdistill itself needs one.",
            )  # fmt: skip
        if not alpha:
            # Without a weight for the labels torchdistill returns the bare KL, whatever beta is.
            source = (
                f"KL at temperature {temperature:g}{per_class}, as without alpha it has no beta and no temperature**2"
            )
            why = f"soft-label cross entropy: without alpha {kind} has neither beta nor temperature**2{per_class}"
            return None, factor, temperature, source, why
        if beta is None:
            beta = 1 - alpha
            if beta < 0:
                raise self.tree.refusal(
                    given["alpha"], "`alpha` must be at most 1 where there is no `beta`, which is 1 - "
                    "alpha", f"{alpha}",
                    "Give `beta`.",
                )  # fmt: skip
        shown = f"{beta:.12g}"
        source = (
            f"{alpha:g} * cross entropy to the labels + {shown} * {temperature:g}**2{per_class} * KL at temperature"
        )
        why = f"soft-label cross entropy: {kind}'s beta {shown} * temperature**2{per_class}"
        return alpha, beta * temperature**2 * factor, temperature, f"{source} {temperature:g}", why

    def _values(
        self, kind: str, ce_weight: float | None, strength: float, temperature: float, why: str, reduction: str | None
    ) -> dict[str, _Value]:
        """The keywords of ours, in the order of the file."""
        values = {"alpha": _Value(float(strength), why), "temperature": _Value(float(temperature))}
        if ce_weight is not None:
            values["ce_weight"] = _Value(ce_weight, f"cross entropy to the labels: {kind}'s alpha")
        if self.loss == "DKL":
            values["beta"] = _Value(float(strength), "weighted MSE: equal to alpha, which gives the gradients of KL")
        else:
            formula = "equal to alpha" if temperature == 1 else "alpha / temperature**2"
            values["beta"] = _Value(strength / temperature**2, f"new: weighted MSE, drives the student; {formula}")
            if temperature != 1:
                values["weight_temperature"] = _Value(float(temperature), "new: of the weights; that of DKL")
        if self.loss == "GKL":
            values["gamma"] = _Value(1.0, "new: power of the weights; 1 is IKL, 0 is uniform")
        if reduction is not None:
            values["reduction"] = _Value(reduction, "mean over samples")
        settings = dict(self.settings)
        if not settings.get("global_info"):
            settings.pop("num_classes", None)  # it served the reduction 'mean'
        elif "num_classes" not in settings:
            classes = num_classes_of(self.tree)
            if classes is None:
                raise ValueError(
                    f"{CALLER}: {self.tree.name}: `num_classes` must be given with global_info=True, got none, and "
                    f"`models: student_model: kwargs:` has none. Add --set num_classes=100."
                )
            values["num_classes"] = _Value(classes, "of the student")
        values.update({name: _Value(value, "given by --set", given=True) for name, value in settings.items()})
        return {name: values[name] for name in _ORDER if name in values}

    def _validate(self, term: Term, values: Mapping[str, _Value]) -> None:
        """Builds the loss, for its own refusals."""
        plain = {name: value.value for name, value in values.items()}
        try:
            for name in ("ce_weight", "warmup_epochs"):
                _validation.check_number(f"{self.loss}Loss", name, plain.pop(name, 0))
            getattr(ikl_plugins, f"{self.loss}Loss")(**plain)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{CALLER}: {self.tree.name}, line {term.line}: for the new loss: {error}") from error

    # --- KLDivLoss and its wrapper ---

    def _wrapped_places(self, term: Term, given: Mapping[str, Entry]) -> dict[str, str]:
        """Where the logits are that belong to what a SimpleLossWrapper hands to KLDivLoss."""
        tree, wrapper = self.tree, term.wrapper
        if wrapper is None or not isinstance(wrapper.value, yaml.MappingNode):
            raise tree.refusal(
                term.mapping, f"KLDivLoss of the term '{term.name}' must stand in a SimpleLossWrapper", "none",
                "Add the `criterion_wrapper`: torchdistill cannot call it otherwise.",
            )  # fmt: skip
        kind = _key_of(tree, wrapper.value)
        if kind != "SimpleLossWrapper":
            raise tree.refusal(
                wrapper, "`criterion_wrapper` of KLDivLoss must be a SimpleLossWrapper to be mapped", f"'{kind}'",
                "For outputs that are dicts name the module that gives the logits, and hook it.",
            )  # fmt: skip
        kwargs = _block(tree, wrapper.value, "kwargs", "criterion_wrapper: kwargs:").value
        found: dict[str, str] = {}
        for side, role in (("input", "student"), ("target", "teacher")):
            block = _block(tree, kwargs, side, f"criterion_wrapper: kwargs: {side}:")
            parts = tree.entries(block.value)
            flag = parts.get("is_from_teacher")
            from_teacher = False if flag is None else tree.value(flag.value) is True
            if "module_path" not in parts or "io" not in parts or from_teacher != (role == "teacher"):
                got = "the labels" if "module_path" not in parts else f"is_from_teacher: {from_teacher}"
                raise tree.refusal(
                    flag or block, f"`{side}` of KLDivLoss must come from the {role} to be mapped", got,
                    "Only KL(teacher || student) has a counterpart here.",
                )  # fmt: skip
            found[f"{role}_module_path"] = str(parts["module_path"].value.value)
            found[f"{role}_module_io"] = str(parts["io"].value.value)
        log_target = "log_target" in given and tree.value(given["log_target"].value) is True
        for role in ("student", "teacher"):
            path, io = found[f"{role}_module_path"], found[f"{role}_module_io"]
            asked = self.logits[role]
            if asked is not None:
                path, _, io = asked.partition(":")
                io = io or "output"
                if not path or io not in ("input", "output"):
                    raise ValueError(
                        f"{CALLER}: --{role}-logits must be MODULE or MODULE:input, got {asked!r}. Write "
                        f"--{role}-logits fc."
                    )
                found[f"{role}_module_path"], found[f"{role}_module_io"] = path, io
            elif role == "teacher" and not log_target:
                example = "fc" if path == "." else f"{path}:input"
                raise tree.refusal(
                    tree.entries(kwargs)["target"], "`target` must lead to logits, of which the loss takes the softmax",
                    f"the {io} of '{path}', the probabilities that KLDivLoss takes",
                    f"Name the module that gives the teacher's logits, for example --teacher-logits {example}.",
                )  # fmt: skip
            else:
                self.notes.append(
                    f"line {wrapper.line}: the {role}'s '{path}' gives log-probabilities; they are logits with "
                    f"the same "
                    f"softmax and the same differences, so it stays"
                )
            self._check_hook(term, role, path, io)
        return found

    def _check_hook(self, term: Term, role: str, path: str, io: str) -> None:
        """Refuses a module whose input or output torchdistill does not record."""
        if path == "." and io == "output":
            return
        tree = self.tree
        block: Any = term.scope.mapping
        for step in (role, "forward_hook", io):
            entry = tree.entries(block).get(step) if isinstance(block, yaml.MappingNode) else None
            block = None if entry is None else entry.value
        recorded = [str(item.value) for item in block.value] if isinstance(block, yaml.SequenceNode) else []
        if path not in recorded:
            raise tree.refusal(
                term.mapping, f"the {io} of the {role}'s module '{path}' must be recorded",
                f"hooks for {recorded}" if recorded else "no hook",
                f"Add to `{': '.join(term.scope.path)}: {role}:` the key `forward_hook:` with `{io}: ['{path}']`.",
            )  # fmt: skip

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
                raise ValueError(
                    f"{CALLER}: {tree.name}, line {line}: the anchor of `key: '{term.kind}'` in line "
                    f"{entry.line} must be "
                    f"used by losses that are adopted alone, got `{': '.join(path)}`. Write '{term.kind}' out there."
                )
        text = tree.text[entry.start : entry.end]
        self._edits.replace(entry.start, entry.end, f"{self.loss}Loss".join(text.rsplit(term.kind, 1)))

    def _replace_kwargs(
        self, term: Term, kwargs: Entry, given: Mapping[str, Entry], values: Mapping[str, _Value],
        places: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Rewrites the keywords where they stand: what is the same stays, with its comments."""
        tree = self.tree
        todo = {name: Line(name, yaml_text(place)) for name, place in places.items()}
        todo.update({name: Line(name, yaml_text(value.value), value.why) for name, value in values.items()})
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
            raise tree.refusal(
                kwargs, f"`kwargs` of {term.kind} must be its own", f"those of a {shared}", "Write them out."
            )
        if done:
            return
        renamed, dropped, last = None, [], None
        for keyword, entry in given.items():
            ours = "ce_weight" if keyword == "alpha" else keyword
            line = todo.pop(ours, None) if keyword in ("alpha", "temperature", "reduction") else None
            if line is None and (keyword == "reduction" or keyword in _PLACES):
                last = entry
                continue
            changed = line is None or ours != keyword or values[ours].given or ours == "reduction"
            if changed and entry.owner is not kwargs.value:
                raise tree.refusal(
                    kwargs, f"`{keyword}` of {term.kind} must stand in its own `kwargs` to be changed",
                    f"a value that is merged from line {entry.line}", "Write it out there.",
                )  # fmt: skip
            if line is None:
                dropped.append(entry)
                continue
            last = entry
            if not changed:
                continue
            if ours != keyword:
                renamed = entry
                self._edits.replace(entry.key.start_mark.index, entry.key.end_mark.index, ours)
            if values[ours].given or ours == "reduction":
                self._gone.append((self._path_of(entry), entry))
                self._edits.replace(entry.start, entry.end, line.text)
            self._edits.comment(entry, line.comment)
        self._gone.extend((self._path_of(entry), entry) for entry in dropped)
        lines = list(todo.values())
        own = [entry for entry in (renamed, last) if entry is not None and entry.owner is kwargs.value]
        if dropped:
            self._edits.put(dropped[0], lines)
            for entry in dropped[1:]:
                self._edits.cut(entry)
        elif own:
            self._edits.insert_after(own[0], lines)
        elif tree.own_entries(kwargs.value):
            self._edits.insert_after(tree.own_entries(kwargs.value)[-1], lines)
        else:
            self._edits.fill(kwargs, lines)

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
                        raise ValueError(
                            f"{CALLER}: {self.tree.name}, line {line}: `*{anchor}` must not depend on "
                            f"`{entry.key.value}` "
                            f"of line {entry.line}, which is mapped to something else, got `{': '.join(path)}`. "
                            f"Write the "
                            f"value out there."
                        )

    # --- dependencies and the pre-epoch process ---

    def _add_dependency(self) -> None:
        tree = self.tree
        entry = tree.entries(tree.root).get("dependencies")
        quoted = f"'{DEPENDENCY}'"
        if entry is None:
            first = tree.own_entries(tree.root)[0]
            end = "" if tree.root.flow_style else tree.newline
            at = first.key.start_mark.index
            self._edits.replace(at, at, f"dependencies: [{quoted}]{end or ', '}")
            return
        node = entry.value
        if entry.is_alias or isinstance(node, yaml.MappingNode):
            raise tree.refusal(
                entry, "`dependencies` must be a list of names, written out", "another form", "Write it out."
            )
        if isinstance(node, yaml.ScalarNode):
            if is_empty(node):
                self._edits.replace_value(entry, f"[{quoted}]")
            elif node.value != DEPENDENCY:
                self._edits.replace_value(entry, f"[{tree.text[entry.start : entry.end]}, {quoted}]")
            return
        if any(self._names_us(item) for item in node.value):
            return
        if node.flow_style:
            close = node.end_mark.index - 1
            inner = tree.text[node.start_mark.index + 1 : close].strip()
            comma = "" if not inner else " " if inner.endswith(",") else ", "
            self._edits.replace(close, close, f"{comma}{quoted}")
            return
        margin = " " * node.start_mark.column
        at = tree.line_end(entry.end)
        self._edits.replace(at, at, f"{tree.newline}{margin}- {quoted}")

    def _names_us(self, item: Any) -> bool:
        """Whether an entry of `dependencies` is ours: a name, [name, package] or name: ..."""
        if isinstance(item, yaml.ScalarNode):
            return bool(item.value == DEPENDENCY)
        if isinstance(item, yaml.SequenceNode):
            return bool(item.value) and self._names_us(item.value[0])
        name = self.tree.entries(item).get("name")
        return name is not None and self._names_us(name.value)

    def _add_process(self, scope: _Scope, terms: Sequence[Term]) -> None:
        tree = self.tree
        entry = tree.entries(scope.mapping).get("pre_epoch_process")
        if entry is None:
            own = tree.own_entries(scope.mapping)
            before = next((item for item in own if item.key.value == "criterion"), own[0])
            self._edits.insert_before(before, Line("pre_epoch_process", f"'{PROCESS}'"))
            self._note_process()
            return
        held = str(getattr(entry.value, "value", ""))
        if held == PROCESS:
            return
        if is_empty(entry.value) or held in _DEFAULT_PROCESSES:
            self._gone.append((self._path_of(entry), entry))
            self._edits.replace_value(entry, f"'{PROCESS}'")
            self._note_process()
            return
        needed = [name for name in ("global_info", "warmup_epochs") if any(self._asks(name, term) for term in terms)]
        if needed:
            raise tree.refusal(
                entry, f"`pre_epoch_process` must be '{PROCESS}', which {' and '.join(needed)} must know the "
                f"epoch from",
                f"'{held}'",
                f"Let your process call ours (from {DEPENDENCY} import {PROCESS}), register it as '{PROCESS}_and_mine' "
                f"or the like, adopt without {' and '.join(needed)}, and add "
                f"{'it' if len(needed) == 1 else 'them'} by hand.",
            )  # fmt: skip
        self.notes.append(
            f"line {entry.line}: your pre_epoch_process '{held}' stays; let it call {PROCESS}, too, which keeps "
            f"a frozen "
            f"teacher in eval mode"
        )

    def _asks(self, name: str, term: Term) -> bool:
        """Whether a loss must know the epoch because of a keyword."""
        if term.kind in _SOURCES:
            return bool(self.settings.get(name))
        kwargs = self.tree.entries(term.mapping).get("kwargs")
        entries = self.tree.entries(kwargs.value) if kwargs and isinstance(kwargs.value, yaml.MappingNode) else {}
        return name in entries and bool(self.tree.value(entries[name].value))

    def _note_process(self) -> None:
        note = (
            f"pre_epoch_process '{PROCESS}': a frozen teacher is in eval mode from now on; torchdistill leaves it in "
            f"training mode, and its BatchNorm statistics drift"
        )
        if note not in self.notes:
            self.notes.append(note)

    def _explain(self, term: Term, source: str, values: Mapping[str, _Value]) -> None:
        """Says what the loss was, what it is, and what is the same."""
        where = f"line {term.line}"
        shown = ", ".join(f"{name} {yaml_text(value.value)}" for name, value in values.items() if name != "reduction")
        self.notes.append(f"{where}: {term.kind} is {source}")
        self.notes.append(f"{where}: {self.loss}Loss has {shown}")
        free = {"check_finite", "gamma", "global_info", "num_classes", "weight_temperature"}
        free |= {"beta"} if self.loss != "DKL" else set()
        changed = [name for name, value in values.items() if value.given and name not in free]
        self.claims[term.place] = "none"
        if term.kind == "LogitStdKDLoss":
            self.notes.append(
                f"{where}: no equivalence holds: LogitStdKDLoss standardises both logits first, so that its "
                f"temperature is "
                f"one of logits with standard deviation 1; ours takes them as they are"
            )
        elif changed:
            self.notes.append(f"{where}: no equivalence holds, as --set gives {', '.join(changed)}")
        elif self.loss == "DKL":
            self.claims[term.place] = "gradients"
            self.notes.append(
                f"{where}: for logits (N, C) the gradients are those of {term.kind}; the value differs, so do "
                f"not compare "
                f"it with earlier logs"
            )
        else:
            self.claims[term.place] = "gradients with beta 0"
            self.notes.append(
                f"{where}: for logits (N, C) and with beta 0 the student's gradients would be those of "
                f"{term.kind}; new is "
                f"beta's term, which in KL drives the teacher alone. Published settings: docs/losses.md, for --set"
            )


def num_classes_of(tree: Tree) -> int | None:
    """The student's number of classes, if the config says it plainly."""
    for steps in (
        ("models", "student_model", "kwargs", "num_classes"),
        ("models", "student_model", "config_kwargs", "num_labels"),
    ):
        node: Any = tree.root
        for step in steps:
            entry = tree.entries(node).get(step) if isinstance(node, yaml.MappingNode) else None
            node = None if entry is None else entry.value
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int":
            return int(tree.value(node))
    return None


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
