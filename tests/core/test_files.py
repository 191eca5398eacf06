"""Files are there whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ikl_plugins._files import locked, naming, written_aside


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


def test_leaves_the_old_file_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text("old")
    code = (
        "import os, signal, sys\n"
        "from ikl_plugins._files import written_aside\n"
        "with written_aside(sys.argv[1]) as aside:\n"
        "    aside.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"


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


def test_where_a_disk_has_no_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said = pytest.warns(UserWarning, match=r"cannot be locked here \(No locks available\). Run one process at a time")
    with said, locked("run", tmp_path / "log.json", ""):
        assert os.listdir(tmp_path) == []
