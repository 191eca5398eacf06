"""One log of what shards have found in folders of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .batches import Batches, Natural, natural_facts, natural_path, read_natural
from .log import Evaluation, batch_folder, read_log
from .record import Record, differing
from .shards import Shard

__all__ = ["merge"]

_CALLER = "merge"


def merge(logs: Sequence[str | Path], output: str | Path) -> Evaluation:
    """Brings together what shards of one evaluation have found on disks that are not shared.

    Args:
        logs: the paths that the shards were given as ``log``. The first shard has written its own; of the others the
            files of their batches are read, from the folders beside.
        output: the path of the log to write, with all batches in the folder beside it. It may be one of ``logs``.

    Returns:
        The evaluation, which is finished once all batches of all attacks were there. Otherwise the shards go on from a
        copy of what was written: its ``progress`` says of which attack it lacks which batches.

    Raises:
        ValueError: none of the paths has a log; one of them is of another evaluation (the message says in what), has no
            batches, or a damaged file; another process writes ``output``.
    """
    paths, output = [Path(path) for path in logs], Path(output)
    there = [path for path in paths if path.exists()]
    if not there:
        raise ValueError(f"{_CALLER}: one folder must have the log of shard 1, but none has. Add its folder.")
    first = read_log(_CALLER, there[0])
    for path in there[1:]:
        found = differing(read_log(_CALLER, path), first)
        if found:
            raise _refusal(path, there[0], found)
    starts = [_start(path, there[0], first) for path in paths]
    start = starts[paths.index(there[0])]
    with Shard(_CALLER, 1, 1, None, print).alone(output):
        fresh = {
            **first,
            "predictions": start.predictions.tolist(),
            "fell_to": [None] * first["n_examples"],
            "progress": [],
            "warnings": start.warnings,
        }
        record = Record(_CALLER, fresh, output)
        places = [batch_folder(path) for path in paths]
        sources = [Batches(_CALLER, place, record.log, start.digests) for place in places]
        target = Batches(_CALLER, record.folder, record.log, start.digests)
        start.write(natural_path(batch_folder(output), record.log))
        for attack in record.log["attacks"]:
            parts = record.parts()
            entry = record.begin(attack, parts)
            for number, index in enumerate(parts):
                at = (attack, number, index)
                batch = next(filter(None, (source.read(*at) for source in [target, *sources])), None)
                if batch is not None:
                    target.write(attack, number, batch)
                    record.note(number, target.key(attack, index), batch)
            if entry["batches_done"] < len(parts):
                break
        else:
            record.finish()
        record.save()
    return Evaluation(record.log, record.adversarial)


def _start(path: Path, other: Path, log: dict[str, Any]) -> Natural:
    """What the shard with this log began from."""
    folder, ours = batch_folder(path), natural_facts(log)
    wanted = natural_path(folder, log)
    if wanted.exists():
        return read_natural(_CALLER, wanted)
    found = [read_natural(_CALLER, file).facts for file in sorted(folder.glob("natural-*.npz"))]
    if not found:
        raise ValueError(f"{_CALLER}: {folder} must have batches of a shard, but has none. Leave it out.")
    differ = [
        [f"{name} {facts.get(name)} instead of {ours[name]}" for name in ours if facts.get(name) != ours[name]]
        for facts in found
    ]
    raise _refusal(folder, other, min(differ, key=len))


def _refusal(path: Path, other: Path, found: Sequence[str]) -> ValueError:
    return ValueError(
        f"{_CALLER}: all folders must be of the evaluation of {other}, but {path} has other {'; '.join(found)}. "
        "Leave it out."
    )
