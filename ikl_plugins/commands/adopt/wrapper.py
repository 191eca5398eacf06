"""A KLDivLoss in torchdistill's SimpleLossWrapper: where the logits are that belong to what it takes."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from .messages import CALLER
from .terms import Term, block, key_of
from .yaml_text import Entry, Tree

__all__ = ["logit_places"]


def logit_places(
    tree: Tree, term: Term, given: Mapping[str, Entry], asked: Mapping[str, str | None]
) -> tuple[dict[str, str], list[str]]:
    """Module paths and their input or output, by our keywords.

    Args:
        tree: the config.
        term: the KLDivLoss.
        given: its keywords.
        asked: by 'student' and 'teacher' what --student-logits and --teacher-logits say: ``PATH`` or ``PATH:input``.

    Returns:
        The keywords, and what is to be said about them.

    Raises:
        ValueError: no such wrapper, another divergence, or a module that torchdistill does not record.
    """
    wrapper = term.wrapper
    if wrapper is None or not isinstance(wrapper.value, yaml.MappingNode):
        rule = f"KLDivLoss of the term '{term.name}' must stand in a SimpleLossWrapper, got none."
        raise tree.refusal(term.mapping, f"{rule} Add the `criterion_wrapper`.")
    kind = key_of(tree, wrapper.value)
    if kind != "SimpleLossWrapper":
        rule = f"`criterion_wrapper` of KLDivLoss must be a SimpleLossWrapper, got '{kind}'."
        raise tree.refusal(wrapper, f"{rule} Of outputs that are dicts hook the module that gives the logits.")
    sides = block(tree, wrapper.value, "kwargs", "criterion_wrapper: kwargs:").value
    found: dict[str, tuple[str, str]] = {}
    for side, role in (("input", "student"), ("target", "teacher")):
        parts = tree.entries(block(tree, sides, side, f"criterion_wrapper: kwargs: {side}:").value)
        flag = parts.get("is_from_teacher")
        from_teacher = flag is not None and tree.value(flag.value) is True
        if "module_path" not in parts or "io" not in parts or from_teacher != (role == "teacher"):
            got = "the labels" if "module_path" not in parts else f"is_from_teacher: {from_teacher}"
            rule = f"`{side}` of KLDivLoss must come from the {role}, got {got}."
            raise tree.refusal(
                flag or tree.entries(sides)[side], f"{rule} Only KL(teacher || student) has a counterpart."
            )
        found[role] = str(parts["module_path"].value.value), str(parts["io"].value.value)
    log_target = "log_target" in given and tree.value(given["log_target"].value) is True
    places: dict[str, str] = {}
    notes = []
    for role, (path, io) in found.items():
        answer = asked[role]
        if answer is not None:
            path, _, io = answer.partition(":")
            io = io or "output"
            if not path or io not in ("input", "output"):
                rule = f"--{role}-logits must be MODULE or MODULE:input, got {answer!r}."
                raise ValueError(f"{CALLER}: {rule} Write --{role}-logits fc.")
        elif role == "teacher" and not log_target:
            example = "fc" if path == "." else f"{path}:input"
            rule = f"`target` must lead to logits, got the probabilities that are the {io} of '{path}'."
            way_out = f"Name the module that gives the teacher's logits, for example --teacher-logits {example}."
            raise tree.refusal(tree.entries(sides)["target"], f"{rule} {way_out}")
        else:
            notes.append(
                f"line {wrapper.line}: the {role}'s '{path}' gives log-probabilities; they are logits with the same "
                f"softmax and the same differences, so it stays"
            )
        _check_hook(tree, term, role, path, io)
        places |= {f"{role}_module_path": path, f"{role}_module_io": io}
    return places, notes


def _check_hook(tree: Tree, term: Term, role: str, path: str, io: str) -> None:
    """Refuses a module whose input or output torchdistill does not record."""
    node = tree.at(term.scope.mapping, role, "forward_hook", io)
    recorded = [str(item.value) for item in node.value] if isinstance(node, yaml.SequenceNode) else []
    if path not in recorded and (path, io) != (".", "output"):
        got = f"hooks for {recorded}" if recorded else "no hook"
        rule = f"the {io} of the {role}'s module '{path}' must be recorded, got {got}."
        way_out = f"Add to `{term.scope.label}: {role}: forward_hook:` the key `{io}: ['{path}']`."
        raise tree.refusal(term.mapping, f"{rule} {way_out}")
