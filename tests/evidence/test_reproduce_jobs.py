"""tools/reproduce_jobs.py and the command line of tools/reproduce.py."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from evidence import reproduce
from evidence import reproduce_jobs
from evidence.reproduce_jobs import Job, exclusive, run_jobs

WORK = """
    import os, time
    from pathlib import Path

    def double(settings, folder):
        with (folder / "calls").open("a") as calls:
            calls.write("x")
        return {"doubled": 2 * settings["number"], "threads": os.environ["OMP_NUM_THREADS"]}

    def environment(settings, folder):
        return os.environ["IKL_PLUGINS_NATIVE"]

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


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module of functions that a job's process can import."""
    (tmp_path / "work_for_jobs.py").write_text(textwrap.dedent(WORK))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "jobs"


def doubles(*numbers):
    return [Job(f"double-{number}", "work_for_jobs:double", {"number": number}) for number in numbers]


def test_results_come_in_order_and_are_computed_once(work):
    lines = []
    first = run_jobs(doubles(3, 1, 2), work, processes=2, threads=1, report=lines.append)
    assert [found["result"]["doubled"] for found in first.values()] == [6, 2, 4]
    assert list(first) == ["double-3", "double-1", "double-2"]
    assert len(lines) == 6
    assert lines[-1].endswith("(3 of 3)")
    assert first["double-3"]["versions"]["torch"]
    again = run_jobs(doubles(3, 1, 2, 5), work, report=lines.append)
    assert again["double-5"]["result"] == {"doubled": 10, "threads": "1"}
    assert (work / "double-3" / "calls").read_text() == "x"
    assert again["double-3"] == first["double-3"]


def test_a_job_of_other_settings_is_refused(work):
    run_jobs(doubles(1), work, report=lambda line: None)
    with pytest.raises(
        ValueError,
        match=r"^reproduce: `output` must hold jobs of the same settings and files, but .*job\.json has other "
        r"settings\. Choose another --output, or delete .*double-1\.$",
    ):
        run_jobs([Job("double-1", "work_for_jobs:double", {"number": 4})], work)
    with pytest.raises(ValueError, match=r"has other threads\."):
        run_jobs(doubles(1), work, threads=2)


def test_a_job_of_other_files_is_refused(work):
    files = {"config": "1", "data": "2"}
    run_jobs(doubles(1), work, sources=lambda job: files, report=lambda line: None)
    again = run_jobs(doubles(1), work, sources=lambda job: dict(files), report=lambda line: None)
    assert again["double-1"]["sources"] == files
    with pytest.raises(ValueError, match=r"job\.json has other config\. Choose another --output, or delete "):
        run_jobs(doubles(1), work, sources=lambda job: {**files, "config": "3"})
    with pytest.raises(ValueError, match=r"job\.json has other data\."):
        run_jobs(doubles(1), work, sources=lambda job: {**files, "data": "3"})
    with pytest.raises(ValueError, match=r"job\.json has other config, data\."):
        run_jobs(doubles(1), work)


def test_the_data_is_known_by_its_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"^reproduce: CIFAR-10 must be in .*, but there is no manifest\.json\."):
        reproduce_jobs.data_checksum()
    (tmp_path / "cifar10").mkdir()

    def checksum(content):
        (tmp_path / "cifar10" / "manifest.json").write_text(json.dumps(content))
        return reproduce_jobs.data_checksum()

    splits = {"train": {"sha256": "1"}}
    assert checksum({"splits": splits, "versions": {"python": "3.11"}}) == checksum({"splits": splits})
    assert checksum({"splits": {"train": {"sha256": "2"}}}) != checksum({"splits": splits})


def test_a_failure_is_named_and_the_others_finish(work):
    jobs = [Job("bad", "work_for_jobs:fail", {}), *doubles(1)]
    with pytest.raises(RuntimeError, match=r"^reproduce: bad failed; .*log\.txt says why\. The same command goes on"):
        run_jobs(jobs, work, report=lambda line: None)
    assert "no such luck" in (work / "bad" / "log.txt").read_text()
    assert (work / "double-1" / "result.json").is_file()
    assert not (work / "bad" / "result.json").exists()


def test_a_killed_job_goes_on_in_its_folder(work):
    script = (
        "import sys; from pathlib import Path; from reproduce_jobs import Job, run_jobs\n"
        "run_jobs([Job('slow', 'work_for_jobs:slow', {})], Path(sys.argv[1]))"
    )
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(reproduce_jobs.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", script, str(work)], env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (work / "slow" / "progress").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = run_jobs([Job("slow", "work_for_jobs:slow", {})], work, report=lambda line: None)
    assert found["slow"]["result"] == {"resumed": True}


STARTS = """
    import sys
    from pathlib import Path

    from evidence import reproduce
    from evidence.reproduce_jobs import Job, run_jobs

    jobs = [Job("slow", "work_for_jobs:slow", {})]
    reproduce.EXPERIMENTS["distill"] = lambda args, folder, results: [*run_jobs(jobs, folder)]
    reproduce.main(["distill", "--output", sys.argv[1]])
"""


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_no_two_processes_do_the_same_job(work, signal_number):
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(reproduce_jobs.__file__).parent)])
    command = [sys.executable, "-c", textwrap.dedent(STARTS), str(work)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (work / "slow" / "progress").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(process.pid, signal_number)
        process.wait()
        job = [Job("slow", "work_for_jobs:slow", {})]
        if signal_number == signal.SIGTERM:  # it has taken the job's process with it
            assert run_jobs(job, work, report=lambda line: None)["slow"]["result"] == {"resumed": True}
        else:  # the job's process lives on, and holds its folder
            with pytest.raises(RuntimeError, match=r"slow failed; .*log\.txt says why"):
                run_jobs(job, work, report=lambda line: None)
            assert "another process works in" in (work / "slow" / "log.txt").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_jobs_go_without_the_operator(work, monkeypatch):
    monkeypatch.setenv("IKL_PLUGINS_NATIVE", "1")
    found = run_jobs([Job("asks", "work_for_jobs:environment", {})], work, report=lambda line: None)
    assert found["asks"]["result"] == "0"


def test_a_folder_is_held_by_one_process(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(ValueError, match=r"^reproduce: `output` must be free, but another process works in "),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--processes", "0"], "argument --processes: must be a whole number of at least 1, got '0'. Use 1"),
        (["distill", "--threads", "two"], "argument --threads: must be a whole number of at least 1, got 'two'. Use 1"),
        (["other"], "invalid choice: 'other'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_weights_of_the_teacher_name_the_way_out(tmp_path, monkeypatch):
    pytest.importorskip("torchdistill")
    monkeypatch.delenv("IKL_PLUGINS_DOWNLOADS", raising=False)
    with pytest.raises(SystemExit) as caught:
        reproduce.main(["distill", "--quick", "--output", str(tmp_path / "out")])
    assert re.fullmatch(
        r"error: reproduce: `teacher_weights` must be the file resnet56-4bfd9763\.th, got None\. Download it from "
        r"https://\S+ \(pretrained_models\) and name it with --teacher-weights\.",
        str(caught.value.code),
    )


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "one.json"
    reproduce_jobs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        reproduce_jobs.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


def test_versions_that_differ_among_the_jobs_are_all_told():
    jobs = [{"versions": {"torch": "2.14.1", "processor": name}} for name in ("A", "B", "A")]
    assert reproduce_jobs.all_versions(jobs) == {"torch": "2.14.1", "processor": "A and B"}


def test_the_page_of_results_shows_the_measured_tables():
    docs = Path(reproduce.__file__).parent.parent / "docs"
    measured = {
        line
        for name in ("distill", "adversarial")
        for line in (docs / "results" / f"{name}.md").read_text().splitlines()
    }
    page = (docs / "results.md").read_text()
    for heading, rows in (("## Distillation", 6), ("## Adversarial training", 10)):
        section = page[page.index(heading) :]
        table = section[section.index("\n| loss ") + 1 :].split("\n\n")[0].splitlines()
        assert len(table) == 2 + rows
        assert set(table) <= measured
