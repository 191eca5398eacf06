"""Files are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ikl_plugins._files import folder_aside, holds, locked, naming, settle, written_aside


@pytest.mark.parametrize("old", [True, False])
def test_takes_the_name_once_all_is_written(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "deep" / "log.json"
    if old:
        path.parent.mkdir()
        path.write_text("old")
    with written_aside(path if old else str(path)) as aside:
        assert aside.suffix == ".json"
        assert aside.parent == path.parent
        aside.write_text("new")
        assert path.read_text() == "old" if old else not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["log.json"]


def test_two_processes_of_one_number_write_aside_apart(tmp_path: Path) -> None:
    with written_aside(tmp_path / "log.json") as first, written_aside(tmp_path / "log.json") as second:
        assert first != second  # containers of two machines on a shared disk
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "log.json").read_text() == "first"


def test_leaves_the_old_file_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text("old")

    def write_to_a_full_disk() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*log\.json'"):
        write_to_a_full_disk()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["log.json"]


WRITES = (
    "import os, signal, sys\n"
    "from ikl_plugins._files import written_aside\n"
    "with written_aside(sys.argv[1]) as aside:\n"
    "    aside.write_text('half')\n"
)
KILLED = WRITES + "    os.kill(os.getpid(), signal.SIGKILL)\n"


def test_what_a_killed_process_leaves_goes_with_the_next_write_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = {*os.listdir(tmp_path)} - {"log.json"}
    others = {f"{left}.bak", left.replace("log", "log2"), ".log.notes.partial.json", left.replace(".json", ".txt")}
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".log.1-00000000.partial.json").mkdir()  # no file
    others.add(".log.1-00000000.partial.json")
    with written_aside(path) as running:  # a process that runs, as a lock on its file tells
        assert {*os.listdir(tmp_path)} == {"log.json", running.name, *others}
        running.write_text("first")
        with written_aside(path) as aside:
            aside.write_text("second")
        assert (running.read_text(), path.read_text()) == ("first", "second")
    assert {*os.listdir(tmp_path)} == {"log.json", *others}


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and modes")
def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    real, link, hard, dangling = (tmp_path / name for name in ("deep/real.json", "log.json", "hard.json", "no.json"))
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("deep/real.json")
    os.link(real, hard)
    dangling.symlink_to("deep/new.json")
    for path in (link, dangling):
        with written_aside(path) as aside:
            aside.write_text("new")
    assert (os.readlink(link), os.readlink(dangling)) == ("deep/real.json", "deep/new.json")
    assert (real.read_text(), hard.read_text(), dangling.read_text()) == ("new", "old", "new")
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(real.parent)) == ["new.json", "real.json"]


REPLACES = (
    "import os, signal, sys\n"
    "from pathlib import Path\n"
    "from ikl_plugins._files import folder_aside, locked\n"
    "rename, calls, at = os.rename, [], int(sys.argv[2])\n"
    "def killed(*names):\n"
    "    calls.append(names)\n"
    "    if len(calls) > abs(at):\n"
    "        rename(*names) if at < 0 else None\n"
    "        os.kill(os.getpid(), signal.SIGKILL)\n"
    "    rename(*names)\n"
    "os.rename = killed\n"
    "with locked('submit', sys.argv[1], ''), folder_aside(Path(sys.argv[1])) as aside:\n"
    "    for name in 'ab': (aside / name).write_text('new')\n"
)


@pytest.mark.parametrize(("at", "found"), [(0, "old"), (1, "old"), (-1, "new")])
def test_a_folder_is_the_old_or_the_new_one_wherever_its_process_is_killed(at: int, found: str, tmp_path: Path) -> None:
    folder = tmp_path / "submission"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("old")
    assert subprocess.run([sys.executable, "-c", REPLACES, folder, str(at)], check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) >= 3  # the lock, and what it was about to rename
    with locked("submit", folder, ""):
        settle(folder)
    assert os.listdir(tmp_path) == ["submission"]
    assert [(folder / name).read_text() for name in "ab"] == [found] * 2
    with folder_aside(folder) as aside:
        (aside / "c").touch()
    assert os.listdir(folder) == ["c"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "log.json"):
        pass
    assert os.listdir(tmp_path) == []


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_write_that_fails_is_named_unless_it_has_a_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.bin'") as caught, naming(tmp_path / "a.bin"):
        raise FULL
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError, match="another"), naming(tmp_path / "a.bin"):
        (tmp_path / "another").read_bytes()


def test_what_torch_says_of_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    class Full:
        """A file on a full disk, to which torch writes through Python."""

        def write(self, content: bytes) -> int:
            raise FULL

        def flush(self) -> None:
            """There is nothing."""

    with pytest.raises(OSError, match=r"No space left on device: '.*a\.bin'"), naming(tmp_path / "a.bin"):
        torch.save({"weight": torch.zeros(9)}, Full())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_what_torch_says_of_a_file_that_it_writes_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"the disk may be full .*: '.*a\.bin'"), naming(tmp_path / "a.bin"):
        torch.save({"weight": torch.zeros(1_000_000)}, tmp_path / "a.bin")


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    behind = RuntimeError("there is no compiler")
    behind.__context__ = OSError(errno.ENOENT, "No such file or directory")
    for error in (RuntimeError("shapes"), ValueError("values"), behind):
        with pytest.raises(type(error)) as caught, naming(tmp_path / "a.bin"):
            raise error
        assert caught.value is error


def test_the_first_of_several_writers_keeps_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "natural.npz"
    for text in ("first", "second"):
        with written_aside(path, first=True) as aside:
            aside.write_text(text)
    assert (path.read_text(), os.listdir(tmp_path)) == ("first", ["natural.npz"])

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with written_aside(tmp_path / "other", first=True) as aside:
        aside.write_text("text")
    assert (tmp_path / "other").read_text() == "text"


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.json"
    code = (
        "import sys\n"
        "from ikl_plugins._files import locked\n"
        "with locked('train', sys.argv[1], ''):\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        why = rf"^run: {path} must have one process that writes it, but process {holder.pid} on \S+ does. Wait for it.$"
        with pytest.raises(ValueError, match=why), locked("run", path, "Wait for it."):
            pass
        holder.kill()
    assert (tmp_path / "deep" / "log.json.lock").exists()  # which nobody holds
    mine = pytest.raises(ValueError, match=f"but process {os.getpid()} on")
    with locked("run", path, ""), mine, locked("run", path, ""):
        pass
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_that_outlives_its_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from ikl_plugins._files import locked, written_aside\n"
        "with locked('train', sys.argv[1], ''), written_aside(sys.argv[1]):\n"
        "    if worker := os.fork():\n"
        "        print(worker, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            assert parent.wait() == -signal.SIGKILL
            with locked("train", tmp_path / "run", ""), written_aside(tmp_path / "run") as aside:
                aside.write_text("text")
        finally:
            os.kill(worker, signal.SIGKILL)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_lock_is_that_of_the_file_behind_a_link_and_never_writes_through_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    again = pytest.raises(ValueError, match="link must have one process")
    with locked("run", tmp_path / "real", ""), again, locked("run", tmp_path / "link", ""):
        pass
    assert not holds(tmp_path / "link")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "real.lock").symlink_to("mine")
    with pytest.raises(OSError, match=re.escape("real.lock")), locked("run", tmp_path / "real", ""):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_lock_leaves_no_empty_folder(tmp_path: Path) -> None:
    with locked("run", tmp_path / "deep" / "deeper" / "log.json", ""):
        assert holds(tmp_path / "deep" / "deeper" / "log.json")
    assert os.listdir(tmp_path) == []


def test_where_a_disk_has_no_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said = pytest.warns(UserWarning, match=r"cannot be locked here \(No locks available\). Run one process at a time")
    with said, locked("run", tmp_path / "log.json", ""):
        assert os.listdir(tmp_path) == []
