"""Every file that a tool generates is what it generates, and the tools' command lines refuse what they must."""

import shutil

import pytest
from evidence import bench, make_configs, report, reproduce
from evidence.cache import TOOLS

DOCS = TOOLS.parent / "docs"
CHECKS = {
    "make_configs": (make_configs.main, ["--check"]),
    "bench docs": (bench.main, ["docs", "--check"]),
    "reproduce distill": (reproduce.main, ["distill", "--check"]),
    "reproduce adversarial": (reproduce.main, ["adversarial", "--check"]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_files_are_what_the_tool_generates(name):
    main, arguments = CHECKS[name]
    main(arguments)


@pytest.mark.parametrize("experiment", reproduce.EXPERIMENTS)
def test_another_number_in_a_table_is_found(experiment, tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    for suffix in (".json", ".md"):
        shutil.copy(DOCS / "results" / f"{experiment}{suffix}", results)
    shutil.copy(DOCS / "results.md", tmp_path)
    monkeypatch.setattr(reproduce, "DOCS", tmp_path)
    reproduce.main([experiment, "--check"])
    page, table = tmp_path / "results.md", results / f"{experiment}.md"
    text = table.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| IKL "))
    changed = row.replace("IKL ", "GKL ", 1)
    page.write_text(page.read_text().replace(row, changed))
    with pytest.raises(SystemExit, match=rf"the table of docs/results\.md .* is not that of {experiment}\.md"):
        reproduce.main([experiment, "--check"])
    table.write_text(text.replace(row, changed))
    with pytest.raises(SystemExit, match=rf"{experiment}\.md: missing or not as generated"):
        reproduce.main([experiment, "--check"])


@pytest.mark.parametrize(("accuracy", "images", "margin"), [(100, 300, 0.46), (0, 300, 0.46), (50, 300, 5.66)])
def test_the_margin_of_an_accuracy_never_claims_certainty(accuracy, images, margin):
    assert report.binomial_margin([accuracy], images) == pytest.approx(margin, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--processes", "0"], "--processes: must be a whole number of at least 1, got '0'"),
        (["distill", "--threads", "two"], "--threads: must be a whole number of at least 1, got 'two'"),
        (["other"], "invalid choice: 'other'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(arguments)
    assert said in capsys.readouterr().err
