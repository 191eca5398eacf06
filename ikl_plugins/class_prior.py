"""The class-wise mean prediction: the global information of IKL and GKL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import _validation as check
from ._epoch_watch import PassWatch, meet_all_ranks
from ._value_checks import check_values, is_recorded, read_value_checks

__all__ = ["ClassPrior"]

_logger = logging.getLogger(__name__)
_WIDE = (torch.float32, torch.float64)
_DTYPES = {"matrix": _WIDE, "sums": _WIDE, "counts": (torch.int64,)}  # of the entries of a checkpoint
_ROUNDING = 1e-2  # share of a sum of probabilities; those of a bfloat16 softmax lose up to 4e-3
_COMPARED = 8  # batches of several ranks before which the sums are compared with those behind the last one


def in_backward() -> bool:
    """Whether a backward pass runs this: ``torch.utils.checkpoint`` then repeats what has been observed before.

    torch.compile around a checkpoint separates the two itself: what it records runs in the forward pass alone.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _judge_sums(changed: float) -> str | None:
    if not changed:
        return None
    return (
        "ClassPrior: the running sums must be each rank's own, but something overwrites them between batches. "
        "Use DistributedDataParallel(..., broadcast_buffers=False)."
    )


class ClassPrior(nn.Module):
    r"""Mean prediction of each class over the last epoch, one row a class.

    During an epoch :meth:`observe` adds up the predictions by label; :meth:`end_epoch` turns the sums into means, which
    :meth:`prior` then serves for the whole next epoch. Until an epoch has ended every row is uniform, 1 / C.

    Everything is a buffer, the running sums included, so an interruption in the middle of an epoch loses nothing that a
    checkpoint holds. Buffers follow the module to another device, and no cast takes digits from them: ``sums`` stay
    float64 (float32 on MPS) and ``counts`` int64, ``matrix`` is float32 or, after ``.double()``, float64. A checkpoint
    whose entries no class prior of this size can have had is refused, also with ``strict=False``.

    A batch whose forward pass ``torch.utils.checkpoint`` repeats during the backward pass is observed once: within a
    backward pass nothing is. Other repeated passes, those of an LBFGS closure for one, need ``observe=False``.

    A prediction that is not finite, of a batch that overflowed in half precision for one, is left out; the end of the
    epoch says how many were.

    Args:
        num_classes: number of classes C, at least 1.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``num_classes`` is below 1.

    Attributes:
        rank_timeout: seconds that :meth:`end_epoch` waits for the other ranks to call it.
        watches_epochs: warn once where the labels show that a second epoch runs and :meth:`end_epoch` was never called;
            the adapters, which call it themselves, turn that off.

    Note:
        When ``torch.distributed`` is initialised, :meth:`end_epoch` adds the sums of all ranks and must be called by
        all of them. The buffers between two such calls are the rank's own: with ``DistributedDataParallel`` around a
        module that holds a prior set ``broadcast_buffers=False``, or rank 0's sums replace the others'. Sums that
        something has overwritten are refused.

    References:
        Cui et al., Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024, section 3.3 and equation 10.

    Example:
        >>> import torch
        >>> from ikl_plugins import ClassPrior
        >>> prior = ClassPrior(num_classes=2)
        >>> labels = torch.tensor([0, 0])
        >>> prior.observe(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), labels)
        >>> prior.end_epoch()
        >>> prior.prior(torch.tensor([0, 1]))  # class 1 was not seen and keeps its row
        tensor([[0.8000, 0.2000],
                [0.5000, 0.5000]])
    """

    matrix: Tensor
    sums: Tensor
    counts: Tensor
    left_out: Tensor
    rank_timeout: float = 600.0
    watches_epochs: bool = True
    _watch: PassWatch | None = None
    _own_sums: Tensor | None = None  # of this rank, behind its last batch
    _compared = 0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = check.check_num_classes("ClassPrior", num_classes)
        shape = (num_classes, num_classes)
        self.register_buffer("matrix", torch.full(shape, 1.0 / num_classes, dtype=torch.float32))
        # An epoch of a dense task adds up so many predictions that float32 sums would stop growing as they should.
        self.register_buffer("sums", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("left_out", torch.zeros((), dtype=torch.int64), persistent=False)
        self._passed: tuple[int, int] | None = None  # identity and version of the matrix that was checked

    def prior(self, targets: Tensor) -> Tensor:
        """The row of each label.

        Args:
            targets: integer class indices, shape (N,) or (N, d1, ...).

        Returns:
            Shape (N, C) or (N, C, d1, ...): rows that sum to 1, without gradient.

        Raises:
            TypeError: ``targets`` is not an integer tensor.
            ValueError: a label is outside [0, C).
        """
        check.check_targets("ClassPrior.prior", targets, self.num_classes, beside=self.matrix)
        return self.rows(check.safe_index(targets, self.num_classes))

    def rows(self, labels: Tensor) -> Tensor:
        """:meth:`prior` of labels that have been checked, int64."""
        return self.matrix[labels].movedim(-1, 1)

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """The mean entropy of the rows in nats: log C while they are uniform, 0 for rows of one class; 0-dim."""
        entropies: Tensor = torch.special.entr(self.matrix).sum(1)
        return entropies.mean()

    @torch.no_grad()
    def picture(self, *, least: int = 128, most: int = 256) -> Tensor:
        """The rows as an image: a row a label, a column a class, 255 times the root of the probability.

        Args:
            least: fewest pixels of a side; few classes are drawn as squares.
            most: most pixels of a side; of more classes than that the means of neighbours are drawn.

        Returns:
            uint8, shape (side, side), on the CPU.
        """
        shades = self.matrix[None, None].float()
        if self.num_classes > most:
            shades = F.adaptive_avg_pool2d(shades, most)
        pixels = (255 * shades[0, 0].clamp(0, 1).sqrt()).to("cpu", torch.uint8)
        size = -(-least // len(pixels))
        return pixels.repeat_interleave(size, 0).repeat_interleave(size, 1)

    def check_matrix(self, caller: str) -> None:
        """Refuses a matrix with negative or non-finite entries; looks at it again only after it has changed."""
        matrix = self.matrix
        if is_recorded(matrix):
            return
        state = None if matrix.is_inference() else (id(matrix), matrix._version)
        if state is None or state != self._passed:
            check.check_weights(caller, matrix)
            self._passed = state

    def observe(self, probabilities: Tensor, targets: Tensor) -> None:
        """Adds predictions to the running sums of their labels.

        Args:
            probabilities: predictions, shape (N, C) or (N, C, d1, ...), on the prior's device.
            targets: integer class indices, shape (N,) or (N, d1, ...).

        Raises:
            TypeError: ``probabilities`` is not a floating tensor or ``targets`` not an integer tensor.
            ValueError: shapes or devices do not fit, a label is outside [0, C), or a wrapper has cast the sums to half
                precision.

        Note:
            Does nothing within a backward pass, where checkpointing repeats a forward pass.
        """
        caller = "ClassPrior.observe"
        check.check_targets(caller, targets, self.num_classes)
        check.check_floating(caller, "probabilities", probabilities, "Pass a softmax output.")
        expected = (*targets.shape[:1], self.num_classes, *targets.shape[1:])
        if tuple(probabilities.shape) != expected:
            raise ValueError(
                f"{caller}: `probabilities` must have shape {expected} for targets of shape {tuple(targets.shape)}, "
                f"got {tuple(probabilities.shape)}. Set `num_classes` to that of the logits."
            )
        check.check_device(caller, "probabilities", probabilities, self.sums, "the prior's")
        check.check_device(caller, "targets", targets, self.sums, "the prior's")
        if not in_backward():
            self.add(probabilities, check.safe_index(targets, self.num_classes))

    @torch.no_grad()
    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """:meth:`observe` of predictions and labels that have been checked, the latter int64."""
        if self.sums.dtype not in _WIDE:  # FSDP writes to `.data`
            raise ValueError(
                f"ClassPrior: a wrapper must leave the running sums in float64 or float32, got {self.sums.dtype}. "
                f"Use MixedPrecision(buffer_dtype=torch.float32)."
            )
        labels = labels.reshape(-1)
        watched = self._begin_watch()
        rows = probabilities.detach().movedim(1, -1).reshape(-1, self.num_classes)
        finite = rows.sum(1).abs() < torch.inf  # on a device fewer launches than isfinite
        rows = torch.where(finite.unsqueeze(1), rows, 0.0)
        counted = finite.to(self.counts.dtype)
        self.sums.index_add_(0, labels, rows.to(self.sums.dtype))
        self.counts.index_add_(0, labels, counted)
        self.left_out += counted.numel() - counted.sum()
        if watched:
            self._end_watch()

    def _begin_watch(self) -> bool:
        """Refuses sums that are overwritten between batches, as DistributedDataParallel does to buffers."""
        counts = self.counts
        if counts.is_meta or isinstance(counts, FakeTensor) or is_recorded(counts):
            return False
        if self._own_sums is not None and self._own_sums.device == self.sums.device:
            changed = (self.sums.diagonal() != self._own_sums).sum()
            check_values("ClassPrior", "sums", (changed,), _judge_sums)
        if self.watches_epochs and self._watch is None and counts.device.type != "mps":  # which has no float64
            self._watch = PassWatch(counts)
        return True

    def _end_watch(self) -> None:
        """Warns once of a second epoch without an end of the first."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        compared = distributed and self._compared < _COMPARED and torch.distributed.get_world_size() > 1
        self._own_sums = self.sums.diagonal().clone() if compared else None
        self._compared += compared
        if not self.watches_epochs or self._watch is None:
            return
        batches = self._watch.saw(self.counts)
        if batches is not None:
            check_values("ClassPrior", "epochs", (batches,), self._judge_passes)

    def _judge_passes(self, batches: float) -> None:
        if not batches or not self.watches_epochs:
            return
        self.watches_epochs, self._watch = False, None
        _logger.warning(
            "ClassPrior: the same samples seem to come again every %d batches, but `end_epoch()` was never called. "
            "Call it after each epoch, or the weights stay uniform.",
            batches,
        )

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Makes the means of this epoch the prior of the next and starts new sums.

        Classes that no rank has seen keep their row. All ranks must call this. Where the prior lies on a device, it
        waits for that, and reads what checks of values have found there.

        Raises:
            RuntimeError: another rank has not called this within ``rank_timeout`` seconds.
            ValueError: a check of values on a device has failed.
        """
        read_value_checks()
        self.watches_epochs = False
        if not self.left_out.is_meta and (left_out := int(self.left_out)):
            _logger.warning(
                "ClassPrior: %d predictions of this epoch were not finite and are left out of the class prior. "
                "A loss scale that is still falling explains a few.",
                left_out,
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            meet_all_ranks("ClassPrior.end_epoch", self.rank_timeout)
            torch.distributed.all_reduce(self.sums)
            torch.distributed.all_reduce(self.counts)
        seen = (self.counts > 0).unsqueeze(1)
        means = (self.sums / self.counts.clamp(min=1).unsqueeze(1)).to(self.matrix.dtype)
        # In place: whoever holds these buffers, a checkpoint for one, goes on seeing the current values.
        self.matrix.copy_(torch.where(seen, means, self.matrix))
        self.restart_epoch()

    @torch.no_grad()
    def restart_epoch(self) -> None:
        """Forgets what the running epoch has collected; the rows stay."""
        self.sums.zero_()
        self.counts.zero_()
        self.left_out.zero_()
        self._watch = self._own_sums = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform rows and no sums, as built; what ``to_empty`` leaves behind needs this, or a checkpoint."""
        self.matrix.fill_(1.0 / self.num_classes)
        self.restart_epoch()

    @torch.no_grad()
    def check_state(self, caller: str, state: Mapping[str, Any], prefix: str = "") -> None:
        """Refuses a state that no class prior of so many classes can have had.

        Args:
            caller: whom the refusal names.
            state: ``matrix``, ``sums`` and ``counts``; other entries are not looked at.
            prefix: in front of these names.

        Raises:
            ValueError: an entry is missing or of another shape or dtype; a row of ``matrix`` is no distribution; a row
                of ``sums`` is negative or does not add up to its count.
        """

        def refuse(name: str, rule: str, got: str) -> None:
            raise ValueError(
                f"{caller}: the class prior's `{prefix}{name}` must {rule}, got {got}. "
                f"Load another checkpoint, or take the class prior out of it."
            )

        found: dict[str, Any] = {name: state.get(prefix + name) for name in _DTYPES}
        for name, value in found.items():
            own: Tensor = getattr(self, name)
            got = f"a {type(value).__name__}"
            if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
                if value.dtype in _DTYPES[name] and value.shape == own.shape and value.is_meta <= own.is_meta:
                    continue
                got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
            refuse(name, f"be {_DTYPES[name][0]} of shape {tuple(own.shape)}", got)
        matrix, sums, counts = found.values()
        if any(value.is_meta or isinstance(value, FakeTensor) for value in found.values()):
            return
        if (least := int(counts.min())) < 0:
            refuse("counts", "be at least 0", f"{least}")
        for name, values, wanted in (("matrix", matrix, torch.ones_like(counts)), ("sums", sums, counts)):
            lows, totals = values.amin(1), values.sum(1)
            wanted = wanted.to(totals)
            wrong = ~((lows >= 0) & ((totals - wanted).abs() <= _ROUNDING * wanted))  # also where one is NaN
            if wrong.any():
                row = int(wrong.nonzero()[0])
                got = f"{totals[row]:.4g} for {wanted[row]:g} in row {row}, least {lows[row]:.4g}"
                refuse(name, f"be non-negative with rows that sum to {'1' if name == 'matrix' else '`counts`'}", got)

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches from here on: what the watch has noted grows with each batch, and pickled with its square.
        return {**self.__dict__, "_own_sums": None, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._passed = None  # of another matrix: this is a copy
        if "left_out" not in self._buffers:  # pickled by an older release
            self.register_buffer("left_out", torch.zeros_like(self.counts[0]), persistent=False)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Raised and not reported: MMEngine, and torch with strict=False, would go on with a uniform prior.
        if any(prefix + name in state_dict for name in _DTYPES):
            self.check_state("ClassPrior", state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.sums = self.sums.to(_sums_dtype(self.sums.device))  # assigned, perhaps, from an older release
        self._own_sums = None
        # No part of a checkpoint; on the meta device until now, perhaps.
        self.left_out = torch.zeros_like(self.left_out, device=self.counts.device)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassPrior:
        sums = self.sums
        wide = _sums_dtype(fn(torch.empty(0, device=sums.device)).device)

        def moved(buffer: Tensor) -> Tensor:
            """What ``fn`` makes of it, but with the dtype that it must have."""
            if buffer is sums:
                buffer = buffer.to(wide)  # before it moves: not every device knows float64
            made = fn(buffer)
            if made.dtype == buffer.dtype or (buffer is self.matrix and made.dtype in _WIDE):
                return made
            return (made if buffer.is_meta else buffer).to(made.device, buffer.dtype)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if self.sums.device != sums.device:
            self._watch = None  # of the old device
        return self


def _sums_dtype(device: torch.device) -> torch.dtype:
    """float64, but where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
