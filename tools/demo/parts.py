"""The demo's pieces of work: each is kept in a folder of its own, and moves one bar."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evidence.cache import remembered

Progress = Callable[[float, int, str], None]  # step, steps, what goes on


class Parts:
    """Does each part once, and says so.

    Args:
        output: gets a folder for each part.
        total: how many parts there will be.
        fresh: forget what an earlier call has left.
    """

    def __init__(self, output: Path, total: int, *, fresh: bool) -> None:
        from tqdm import tqdm

        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.total = total
        self.fresh = fresh
        self.done = 0
        self.kept = 0
        form = "{desc:<34} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=total, bar_format=form, disable=None, leave=False)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(
        self,
        name: str,
        asked: Any,
        make: Callable[[Path, Progress], dict[str, Any]],
        *,
        title: str,
        line: Callable[[dict[str, Any]], str],
        valid: Callable[[dict[str, Any]], bool] = bool,
    ) -> dict[str, Any]:
        """One part.

        Args:
            name: of its folder.
            asked: all that its result depends on.
            make: does it in a folder, and tells its progress.
            title: of the part, on the bar.
            line: tells the result.
            valid: says of a kept result whether its files are still there.
        """
        folder = self.output / name
        if self.fresh:
            shutil.rmtree(folder, ignore_errors=True)

        def progress(step: float, steps: int, text: str) -> None:
            self._bar.n = self.done + step / steps
            self._bar.set_description_str(f"[{self.done + 1}/{self.total}] {title}, {text}", refresh=False)
            self._bar.update(0)

        result, kept = remembered(folder, asked, lambda: make(folder, progress), valid=valid)
        self.done += 1
        self.kept += kept
        self._bar.n = self.done
        told = "   (kept from an earlier call)" if kept else ""
        self._bar.write(f"[{self.done:2}/{self.total}] {title:18} {line(result)}{told}")
        self._bar.refresh()
        found: dict[str, Any] = result
        return found
