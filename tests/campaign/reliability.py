"""The reliability campaign: kill -9, generated inputs, mutated configs, hostile checkpoints, full disks.

    python tools/reliability.py all
    python tools/reliability.py inputs --seed 1 --output runs/more
    python tools/reliability.py all --quick

    python tools/reliability.py inputs_native

The last is no part of `all`: the generated inputs once more, with the losses' C++ operator, which takes a compiler.

Each part writes its counts and every failure in full to a JSON file in the output folder, and goes on from there after
an interruption. At the end reliability.json has all finished parts and reliability.md their tables, which
docs/reliability.md shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ikl_plugins._files import written_aside

__all__ = ["PARTS", "main", "run_part"]

CALLER = "reliability"
PARTS = ("inputs", "checkpoints", "disk", "configs", "kills")
WITH_COMPILER = ("inputs_native",)


def run_part(part: str, output: Path, *, seed: int, quick: bool) -> dict[str, Any]:
    """Runs one part, or what an earlier call has left of it.

    Args:
        part: one of :data:`PARTS` or :data:`WITH_COMPILER`.
        output: the folder of the results.
        seed: of everything that is drawn.
        quick: few cases.

    Returns:
        The content of its JSON file.

    Raises:
        ValueError: the folder has results of other settings, versions or sources of the package.
    """
    import importlib

    from campaign.record import Record

    from ikl_plugins import native

    record = Record(output / f"{part}.json", part, {"seed": seed, "quick": quick})
    if not record.finished:
        if part not in WITH_COMPILER:
            native.disable()  # whatever the environment says: what is tried is the losses' own way
        module = importlib.import_module(f"reliability_{part}")
        module.run(record, output / "work" / part, seed=seed, quick=quick)
    return record.content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=(*PARTS, *WITH_COMPILER, "all"))
    parser.add_argument("--quick", action="store_true", help="few cases, to see that the machinery works")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/reliability"), metavar="FOLDER")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; it exits with 1 if anything failed."""
    args = _parser().parse_args(arguments)
    try:
        import torch
        from campaign.record import merge
        from campaign.tables import render

        torch.set_num_threads(1)
        output = args.output.absolute()
        failures = 0
        for part in PARTS if args.part == "all" else (args.part,):
            content = run_part(part, output, seed=args.seed, quick=args.quick)
            failures += len(content["failures"])
            print(f"{part}: {len(content['failures'])} failures", flush=True)
        merged = merge(output, (*PARTS, *WITH_COMPILER))
        with written_aside(output / "reliability.json") as aside:
            aside.write_text(json.dumps(merged, indent=1) + "\n")
        with written_aside(output / "reliability.md") as aside:
            aside.write_text(render(merged))
        print(f"written: {output / 'reliability.json'} and reliability.md")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
