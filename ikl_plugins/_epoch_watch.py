"""How a class prior notices that epochs pass and ranks part, where no adapter tells it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PassWatch", "meet_all_ranks"]

_PROJECTIONS = 16
_FIRST_LOOK, _GROWTH, _LAST_LOOK = 12, 1.25, 50_000  # batches
_LEAST_DRAWS = 12  # of a pass: samples whose class the others of their batch do not fix
_EXACT, _CLOSE = 9, 24  # independent comparisons that must agree to the last sample, or but for a dropped last batch
_DROPPED = 0.05  # share of the variance of as many random draws
_SHUFFLED = 0.25  # share of that variance; batches below it are made to have about the same classes
_EVEN, _FEW = 0.15, 50  # deviation between the classes, and samples of each, in the cycle of a class-balanced sampler


class PassWatch:
    """Recognises by the class counts that the same samples come again.

    An epoch draws each sample once, so two epochs hold equally many samples of each class, where as many random draws
    differ by about the root of their number. The counts are noted per batch in 16 projections onto random signs; now
    and then it is looked whether, for any P, the first P batches and those behind them agree in all of these. Nothing
    is said where a sampler balances the classes: of batches with about the same classes, and of short cycles with
    equally many samples of each.

    Args:
        counts: samples of each class (C,) before the first batch.
    """

    def __init__(self, counts: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (len(counts), _PROJECTIONS)
        signs = torch.randint(2, shape, generator=generator, device="cpu") * 2 - 1
        self._signs = signs.to(counts.device, torch.float64)  # exact, also under autocast
        self._dimensions = min(len(counts) - 1, _PROJECTIONS)
        self._start = counts.clone()
        self._trail = [self._projected(counts)]
        self._next_look = _FIRST_LOOK

    def saw(self, counts: Tensor) -> Tensor | None:
        """Takes the counts behind another batch, those of all batches (C,).

        Returns:
            None, or now and then, on the device of ``counts``, the number of batches of a pass of which a second one is
            recognised, 0 where there is none.
        """
        batches = len(self._trail)
        if self._dimensions == 0 or batches > _LAST_LOOK:
            self._trail = self._trail[:1]
            self._dimensions = 0
            return None
        self._trail.append(self._projected(counts))
        if batches < self._next_look:
            return None
        self._next_look = max(batches + 1, int(batches * _GROWTH))
        return self._length_of_a_pass(counts - self._start)

    def _projected(self, counts: Tensor) -> Tensor:
        return counts.to(self._signs.dtype) @ self._signs

    def _length_of_a_pass(self, seen: Tensor) -> Tensor:
        totals = torch.stack(self._trail)
        self._trail = list(totals)  # one block of memory in place of many
        place = totals.device
        totals = totals - totals[0]
        squares = torch.cat([totals[:1], totals.diff(dim=0).square().cumsum(0)])
        none = len(totals)
        share = seen.to(totals.dtype) / seen.sum().clamp(min=1)
        batch_size = seen.sum() / (none - 1)
        shuffled = _SHUFFLED * batch_size * (1 - share.square().sum())  # variance of a batch
        shortest = torch.full((), none, device=place)
        for agreement, tolerance in ((_EXACT, 0.0), (_CLOSE, _DROPPED)):
            passes = 1 + -(-agreement // self._dimensions)
            if len(totals) <= passes:
                continue
            lengths = torch.arange(1, (len(totals) - 1) // passes + 1, device=place)
            sums = totals[lengths.unsqueeze(1) * torch.arange(passes + 1, device=place)].diff(dim=1)
            differences = (sums[:, 1:] - sums[:, :1]).square().mean((1, 2))
            batches = passes * lengths
            variances = (squares[batches] - totals[batches].square() / batches.unsqueeze(1)).mean(1) / batches
            drawn = lengths * variances  # each adds 1 to the variance of a projection
            found = (drawn >= _LEAST_DRAWS) & (differences <= tolerance * 2 * drawn) & (variances >= shuffled)
            shortest = torch.minimum(shortest, torch.where(found, lengths, none).min())
        balanced = (share.std() <= _EVEN * share.mean()) & (shortest * batch_size < _FEW * len(share))
        return torch.where((shortest < none) & ~balanced, shortest, 0)


def meet_all_ranks(caller: str, seconds: float) -> None:
    """Returns as soon as all ranks of the default group have called this as often as this rank.

    It asks the group's store and no collective, so that a rank that does something else is not met by mistake.

    Raises:
        RuntimeError: some have not, within ``seconds``.
    """
    from torch.distributed import distributed_c10d  # not in every build of torch

    world_size, store = dist.get_world_size(), distributed_c10d._get_default_store()
    if world_size < 2 or store is None:
        return
    meeting = store.add(f"ikl_plugins/{dist.get_rank()}", 1)
    arrived = f"ikl_plugins/meeting/{meeting}"
    deadline = time.monotonic() + seconds
    pause = 1e-4
    here = store.add(arrived, 1)
    while here < world_size and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
        here = store.add(arrived, 0)
    if here < world_size:
        late = [str(rank) for rank in range(world_size) if store.add(f"ikl_plugins/{rank}", 0) < meeting]
        store.add(arrived, -1)  # whoever comes later meets nobody
        store.add(f"ikl_plugins/{dist.get_rank()}", -1)
        raise RuntimeError(
            f"{caller}: all {world_size} ranks must call it, but within {seconds:g} s rank {', '.join(late)} did not. "
            f"Call it on every rank, or raise ClassPrior.rank_timeout."
        )
