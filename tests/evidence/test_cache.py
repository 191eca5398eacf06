"""evidence.cache: what is done once, in this process and in others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from evidence import cache
from evidence.cache import Job, exclusive, remembered, run_jobs

WORK = """
    import os, time

    def double(settings, folder):
        with (folder / "calls").open("a") as calls:
            calls.write("x")
        return {"doubled": 2 * settings["number"], "native": os.environ["IKL_PLUGINS_KERNEL"],
                "threads": os.environ["OMP_NUM_THREADS"]}

    def fail(settings, folder):
        raise ValueError("no such luck")

    def slow(settings, folder):
        progress = folder / "progress"
        begun = progress.is_file()
        progress.touch()
        if not begun:
            time.sleep(60)
        return {"resumed": begun}
"""
SLOW = Job("slow", "work_for_jobs:slow", {})
STARTER = """
    import sys
    from pathlib import Path
    from evidence.cache import Job, ended_by_signals, run_jobs

    with ended_by_signals():
        run_jobs([Job("slow", "work_for_jobs:slow", {})], Path(sys.argv[1]))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module of functions that a job's process can import."""
    (tmp_path / "work_for_jobs.py").write_text(textwrap.dedent(WORK))
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    # A job imports torch to set its threads, which takes seconds that these jobs have no need of.
    (tmp_path / "torch.py").write_text("def set_num_threads(number): pass\n")
    return tmp_path / "jobs"


def doubles(*numbers):
    return [Job(f"double-{number}", "work_for_jobs:double", {"number": number}) for number in numbers]


def quietly(jobs, folder, **options):
    return run_jobs(jobs, folder, report=lambda line: None, **options)


# --- in this process -------------------------------------------------------------------------------------------------


def test_what_was_asked_before_is_not_made_again(tmp_path):
    folder, made = tmp_path / "part", []

    def part(asked, **options):
        return remembered(folder, asked, lambda: made.append(asked) or {"made": len(made)}, **options)

    assert part({"a": (1, 2)}) == ({"made": 1}, False)
    assert part({"a": [1, 2]}) == ({"made": 1}, True)
    assert part({"a": [1, 2]}, valid=lambda found: found["made"] == 2) == ({"made": 2}, False)
    (folder / "left").touch()
    assert part({"a": [3]}) == ({"made": 3}, False)
    assert not (folder / "left").exists()  # of other settings
    (folder / "result.json").write_text('{"res')
    assert part({"a": [3]}) == ({"made": 4}, False)


def test_interrupted_work_goes_on_in_its_folder(tmp_path):
    def make():
        if not (tmp_path / "progress").exists():
            (tmp_path / "progress").touch()
            raise KeyboardInterrupt
        return {"resumed": True}

    with pytest.raises(KeyboardInterrupt):
        remembered(tmp_path, "asked", make)
    assert remembered(tmp_path, "asked", make) == ({"resumed": True}, False)


# --- in processes of their own ---------------------------------------------------------------------------------------


def test_results_come_in_order_and_are_computed_once(work, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_KERNEL", "native")
    lines = []
    files = {"config": "1", "data": "2"}
    options = {"processes": 2, "threads": 1, "sources": lambda job: files, "report": lines.append}
    first = run_jobs(doubles(3, 1), work, **options)
    assert [found["result"]["doubled"] for found in first.values()] == [6, 2]
    assert list(first) == ["double-3", "double-1"]
    assert len(lines) == 4
    assert lines[-1].endswith("(2 of 2)")
    assert first["double-3"]["versions"]["torchvision"]
    assert first["double-3"]["sources"] == files
    again = run_jobs(doubles(3, 1, 5), work, **options)
    assert again["double-5"]["result"] == {"doubled": 10, "native": "walk", "threads": "1"}
    assert (work / "double-3" / "calls").read_text() == "x"
    assert again["double-3"] == first["double-3"]


@pytest.mark.parametrize(
    ("number", "options", "other"),
    [
        (4, {}, "settings"),
        (1, {"threads": 2}, "threads"),
        (1, {"sources": {"config": "3", "data": "2"}}, "config"),
        (1, {"sources": {}}, "config, data"),
    ],
)
def test_a_job_of_other_settings_or_files_is_refused(work, number, options, other):
    (work / "double-1").mkdir(parents=True)
    asked = {"function": "work_for_jobs:double", "settings": {"number": 1}, "threads": 1}
    asked["sources"] = {"config": "1", "data": "2"}
    (work / "double-1" / "job.json").write_text(json.dumps(asked))
    files = options.pop("sources", asked["sources"])
    with pytest.raises(
        ValueError, match=rf"job\.json was made with other {other}\. Choose another --output, or delete"
    ):
        quietly(
            [Job("double-1", "work_for_jobs:double", {"number": number})], work, sources=lambda job: files, **options
        )


def test_a_failure_is_named_and_the_others_finish(work):
    with pytest.raises(RuntimeError, match=r"bad failed; .*log\.txt says why"):
        quietly([Job("bad", "work_for_jobs:fail", {}), *doubles(1)], work)
    assert "no such luck" in (work / "bad" / "log.txt").read_text()
    assert (work / "double-1" / "result.json").is_file()
    assert not (work / "bad" / "result.json").exists()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_no_two_processes_do_the_same_job(work, signal_number):
    path = os.pathsep.join([str(cache.TOOLS), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-c", textwrap.dedent(STARTER), str(work)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while not (work / "slow" / "progress").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(process.pid, signal_number)
        process.wait()
        if signal_number == signal.SIGTERM:  # it has taken the job's process with it
            assert quietly([SLOW], work)["slow"]["result"] == {"resumed": True}
        else:  # the job's process lives on, and holds its folder
            with pytest.raises(RuntimeError, match=r"slow failed; .*log\.txt says why"):
                quietly([SLOW], work)
            assert "another process works in" in (work / "slow" / "log.txt").read_text()
            os.killpg(process.pid, signal.SIGKILL)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(ValueError), exclusive(work / "slow"):
                    break
            assert quietly([SLOW], work)["slow"]["result"] == {"resumed": True}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# --- what a result depends on, and files -----------------------------------------------------------------------------


def test_the_data_is_known_by_its_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"^reproduce: CIFAR-10 must be in .*, but there is no manifest\.json\."):
        cache.data_checksum()
    (tmp_path / "cifar10").mkdir()

    def checksum(content):
        (tmp_path / "cifar10" / "manifest.json").write_text(json.dumps(content))
        return cache.data_checksum()

    splits = {"train": {"sha256": "1"}}
    assert checksum({"splits": splits, "versions": {"python": "3.11"}}) == checksum({"splits": splits})
    assert checksum({"splits": {"train": {"sha256": "2"}}}) != checksum({"splits": splits})
