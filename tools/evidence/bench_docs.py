"""Takes what `make bench` has measured into the documentation: `python tools/bench_docs.py`.

Each block of docs/benchmarks.md between `<!-- bench: NAME -->` and `<!-- /bench -->` becomes the text of NAME.md, and
NAME.csv goes beside it as docs/results/bench_NAME.csv. Nothing is changed at all if one of the files is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ikl_plugins._files import written_aside

CALLER = "bench_docs"
ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->\n)", re.DOTALL)


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with its blocks filled.

    Args:
        page: the page's text.
        texts: what goes into the blocks, by their names.

    Raises:
        ValueError: a text has no block.
    """
    unknown = sorted(set(texts) - set(names(page)))
    if unknown:
        raise ValueError(
            f"{CALLER}: the page must have a block for each table, but has none for {', '.join(unknown)}. "
            f"Add `<!-- bench: {unknown[0]} -->` and `<!-- /bench -->`."
        )
    return _BLOCK.sub(lambda found: f"{found[1]}\n{texts[found[2]].strip()}\n\n{found[3]}", page)


def names(page: str) -> list[str]:
    """The names of the page's blocks, in order."""
    return [found[2] for found in _BLOCK.finditer(page)]


def take(source: Path, page: Path, results: Path) -> list[Path]:
    """Fills the page and copies the CSV files.

    Returns:
        The files written.

    Raises:
        ValueError: a file of a block is missing.
    """
    text = page.read_text(encoding="utf-8")
    found = names(text)
    missing = [str(path) for name in found for path in _sources(source, name) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{CALLER}: {source} must hold what has been measured for each block, but lacks {', '.join(missing)}. Run "
            f"`make bench`."
        )
    contents = {results / f"bench_{name}.csv": _sources(source, name)[0].read_text(encoding="utf-8") for name in found}
    contents[page] = filled(text, {name: _sources(source, name)[1].read_text(encoding="utf-8") for name in found})
    for path, content in contents.items():
        with written_aside(path) as aside:
            aside.write_text(content, encoding="utf-8")
    return list(contents)


def _sources(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.csv", folder / f"{name}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("runs/bench"), help="folder that was measured")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    try:
        written = take(args.source, args.page, args.results)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("Written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
