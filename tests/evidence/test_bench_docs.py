"""The documentation's tables are the measured ones, and change together or not at all."""

import sys
from pathlib import Path

from evidence import bench_docs
import pytest

PAGE = """# Benchmarks

before

<!-- bench: losses -->
old
<!-- /bench -->

between | 1.0 |

<!-- bench: training -->
<!-- /bench -->
after
"""


def _measured(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / f"{name}.md").write_text(f"| {name} \\1 |\n")
        (folder / f"{name}.csv").write_text(f"kind\n{name}\n")
    return folder


def test_blocks_are_filled_and_the_rest_is_left(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text(PAGE)
    source = _measured(tmp_path / "measured", "losses", "training", "other")
    for _ in range(2):  # a second time over its own result
        written = bench_docs.take(source, page, results)
        assert written == [results / "bench_losses.csv", results / "bench_training.csv", page]
        text = page.read_text()
        assert "<!-- bench: losses -->\n\n| losses \\1 |\n\n<!-- /bench -->\n" in text
        assert "<!-- bench: training -->\n\n| training \\1 |\n\n<!-- /bench -->\nafter\n" in text
        assert text.startswith("# Benchmarks\n\nbefore\n\n")
        assert "between | 1.0 |" in text
        assert "old" not in text
        assert (results / "bench_losses.csv").read_text() == "kind\nlosses\n"


def test_nothing_is_written_where_a_table_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text(PAGE)
    source = _measured(tmp_path / "measured", "losses")
    with pytest.raises(ValueError, match=r"lacks .*training\.csv, .*training\.md\. Run `make bench`"):
        bench_docs.take(source, page, results)
    assert page.read_text() == PAGE
    assert not results.exists()
    arguments = ["--from", str(source), "--page", str(page), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["bench_docs.py", *arguments])
    with pytest.raises(SystemExit, match="error: bench_docs: "):
        bench_docs.main()


def test_a_text_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="none for adversarial"):
        bench_docs.filled(PAGE, {"losses": "", "training": "", "adversarial": "x"})


def test_the_command_takes_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text(PAGE)
    source = _measured(tmp_path / "measured", "losses", "training")
    arguments = ["--from", str(source), "--page", str(page), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["bench_docs.py", *arguments])
    bench_docs.main()
    assert capsys.readouterr().out.startswith("Written: ")
    assert "| losses" in page.read_text()


def test_the_shipped_page_has_a_block_for_each_benchmark() -> None:
    page = bench_docs.ROOT / "docs" / "benchmarks.md"
    text = page.read_text()
    assert bench_docs.names(text) == ["losses", "training", "adversarial"]
    for name in bench_docs.names(text):
        assert f"(results/bench_{name}.csv)" in text
