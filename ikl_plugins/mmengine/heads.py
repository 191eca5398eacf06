"""Heads whose logits no softmax is meant for: the losses of this package do not go with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

__all__ = ["HeadFault", "head_fault"]

_SEVERAL_LABELS = "has several labels for an image"
_HEADS = {
    "ConformerHead": "has two sets of logits",
    "MultiTaskHead": "has logits of several tasks",
    "MultiLabelClsHead": _SEVERAL_LABELS,
    "MultiLabelLinearClsHead": _SEVERAL_LABELS,
    "CSRAClsHead": _SEVERAL_LABELS,
}
# Losses that take a sigmoid of each logit unless `use_sigmoid` says otherwise.
_SIGMOID = {"AsymmetricLoss", "FocalLoss", "BCELoss", "BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"}


class HeadFault(NamedTuple):
    """Why a head is refused.

    Attributes:
        keys: where in the head's config; empty for a head that is built.
        got: the head or its loss, and what is wrong with it.
    """

    keys: tuple[str, ...]
    got: str


def head_fault(head: Mapping[str, Any] | nn.Module) -> HeadFault | None:
    """What speaks against distilling or attacking a head: no single set of logits, several labels, or a sigmoid.

    Args:
        head: its config, or the head itself.

    Returns:
        None for a head with one softmax.
    """
    for keys, names, settings in _parts_of_module(head) if isinstance(head, nn.Module) else _parts(head, ()):
        for name in names:
            if name in _HEADS:
                return HeadFault((*keys, "type"), f"{name}, which {_HEADS[name]}")
        if settings.get("mode") == "multi_label":
            return HeadFault((*keys, "mode"), f"{names[0]} with mode='multi_label'")
        sigmoid = settings.get("use_sigmoid")
        if sigmoid or (sigmoid is None and not _SIGMOID.isdisjoint(names)):
            key = "type" if sigmoid is None else "use_sigmoid"
            return HeadFault((*keys, key), f"{names[0]}, which takes a sigmoid of each logit")
    return None


def _parts(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str], Any]]:
    kind = config.get("type")
    name = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "a part without type")
    yield keys, [name], config
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _parts(value, (*keys, key))


def _parts_of_module(head: nn.Module) -> Iterator[tuple[tuple[str, ...], list[str], Any]]:
    for module in head.modules():
        yield (), [kind.__name__ for kind in type(module).__mro__], vars(module)
