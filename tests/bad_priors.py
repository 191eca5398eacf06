"""States that no class prior of four classes can have had; every host must refuse each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def state() -> State:
    """A sound one, in the middle of the second epoch."""
    rows = torch.softmax(torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 1)
    labels = torch.tensor([0, 1, 1, 3, 3, 3, 0])
    sums = torch.zeros(4, 4, dtype=torch.float64).index_add_(0, labels, rows)
    return {"matrix": rows[:4].float(), "sums": sums, "counts": torch.bincount(labels, minlength=4)}


def _with(name: str, change: Callable[[Tensor], Any]) -> Callable[[], State]:
    return lambda: {**(sound := state()), name: change(sound[name].clone())}


def _entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(rows: Tensor) -> Tensor:
        rows.view(-1)[-1] = value
        return rows

    return change


def _other_shape() -> State:
    return {"matrix": torch.full((5, 5), 0.2), "sums": torch.zeros(5, 5).double(), "counts": torch.zeros(5).long()}


# The entry that is refused, and how the state is made.
BAD: dict[str, tuple[str, Callable[[], State]]] = {
    "scaled rows": ("matrix", _with("matrix", lambda rows: 1.46 * rows)),
    "a negative entry": ("matrix", _with("matrix", lambda rows: rows - torch.tensor([1.0, -1.0, 0.0, 0.0]))),
    "NaN": ("matrix", _with("matrix", _entry(torch.nan))),
    "infinite": ("matrix", _with("matrix", _entry(torch.inf))),
    "another shape": ("matrix", _other_shape),
    "half precision": ("matrix", _with("matrix", Tensor.half)),
    "integer rows": ("matrix", _with("matrix", lambda rows: torch.eye(4).long())),
    "a sparse matrix": ("matrix", _with("matrix", Tensor.to_sparse)),
    "a nested matrix": ("matrix", _with("matrix", lambda rows: torch.nested.nested_tensor(list(rows)))),
    "no values": ("matrix", _with("matrix", lambda rows: rows.to("meta"))),
    "a list": ("matrix", _with("matrix", Tensor.tolist)),
    "no matrix": ("matrix", lambda: {name: value for name, value in state().items() if name != "matrix"}),
    "half precision sums": ("sums", _with("sums", Tensor.half)),
    "scaled sums": ("sums", _with("sums", lambda sums: 2 * sums)),
    "sums of a class without samples": ("sums", _with("sums", lambda sums: sums + torch.eye(4)[2:3].T * 0.25)),
    "negative sums": ("sums", _with("sums", lambda sums: sums - torch.tensor([9.0, -9.0, 0.0, 0.0]))),
    "NaN in the sums": ("sums", _with("sums", _entry(torch.nan))),
    "negative counts": ("counts", _with("counts", lambda counts: -counts)),
    "half precision counts": ("counts", _with("counts", Tensor.half)),
    "counts of another shape": ("counts", _with("counts", lambda counts: counts[:3])),
    "no counts": ("counts", lambda: {name: value for name, value in state().items() if name != "counts"}),
}
