"""Files that are there whole or not at all, files with one writer, texts of configs, and where the shipped ones are."""

from __future__ import annotations

import codecs
import contextlib
import errno
import locale
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ._limits import check_limit, limit, printable

if sys.platform != "win32":
    import fcntl

__all__ = ["check_config_text", "check_yaml", "configs_folder", "folder_aside", "holds", "locked"]
__all__ += ["InUseError", "naming", "settle", "written_aside"]

_TAKEN = (errno.EACCES, errno.EAGAIN)
_PATIENCE = 0.5  # seconds, for a holder that is about to let go
_held: dict[int, Path] = {}  # files that this process has locked, by descriptor


class InUseError(ValueError):
    """Another process, or another part of this one, has what is asked for locked."""


@contextlib.contextmanager
def written_aside(path: Path | str, *, first: bool = False) -> Iterator[Path]:
    """A place to write a file, which takes the name of ``path`` once everything is written.

    Args:
        path: where the file shall be; missing folders are made.
        first: leave a file that is there by then, of another process that was faster, as it is.

    A link stays one, and the file that it leads to is replaced; a file that is replaced leaves its mode and, where the
    system lets it, its owner to the new one. Its other hard links keep the old content. What a process that was killed
    has left of the same file is removed; what another user or a process that runs has there is not.

    Yields:
        The path of an empty file beside it, with the same ending. If the block raises or writes nothing, or the process
        ends in it, the file at ``path`` stays as it was.

    Raises:
        OSError: it cannot be written; see :func:`naming`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "log.json")
        >>> with written_aside(path) as aside:
        ...     _ = aside.write_text("{}")
        >>> path.read_text()
        '{}'
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial(path)
        aside, descriptor = _new_aside(path)
        try:
            yield aside
            with aside.open("rb+") as written:
                os.fsync(written.fileno())
                if not os.fstat(written.fileno()).st_size:
                    raise FileNotFoundError(errno.ENOENT, "nothing was written", str(aside))
            if not first or not _linked(aside, path):
                _take_mode(aside, path)
                os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):  # on a read-only disk; what is told is why it was not written
                aside.unlink(missing_ok=True)
            _let_go(descriptor)


def _new_aside(path: Path) -> tuple[Path, int | None]:
    """An empty file beside another, locked, so that who finds it knows whether its writer runs."""
    while True:
        # One per process, on several machines too: two that write the same file leave one whole file of either.
        aside = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")
        if sys.platform == "win32":  # an open file cannot be renamed there
            aside.touch()
            return aside, None
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a disk without locks; what is left there stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(aside)):
                _held[descriptor] = aside
                return aside, descriptor
        os.close(descriptor)  # another process took it for one that was left


def _remove_partial(path: Path) -> None:
    """Removes what killed processes of this user have left of a file."""
    if sys.platform == "win32":
        return
    ours = re.compile(rf"\.{re.escape(path.stem)}\.\d+-[0-9a-f]{{8}}\.partial{re.escape(path.suffix)}")
    for name in filter(ours.fullmatch, os.listdir(path.parent)):
        with contextlib.suppress(OSError):  # another process is faster, or works on it
            descriptor = os.open(path.parent / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path.parent / name)
            finally:
                os.close(descriptor)


def _take_mode(aside: Path, path: Path) -> None:
    """Gives a file the mode and the owner of that which it replaces."""
    with contextlib.suppress(OSError):  # there is none, or this user may not
        old = path.stat()
        aside.chmod(stat.S_IMODE(old.st_mode))
        new = aside.stat()
        if sys.platform != "win32" and (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.chown(aside, old.st_uid, old.st_gid)
            aside.chmod(stat.S_IMODE(old.st_mode))  # a change of the owner clears some bits


def _let_go(descriptor: int | None) -> None:
    if descriptor is not None and _held.pop(descriptor, None) is not None:
        os.close(descriptor)


def _let_all_go() -> None:
    """In a child process: else a worker that outlives its parent would hold the locks."""
    for descriptor in [*_held]:
        _let_go(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_all_go)


def _linked(aside: Path, path: Path) -> bool:
    """Gives a file its name unless that is taken; False where the disk has no links."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(caller: str, path: Path | str, way_out: str) -> Iterator[None]:
    """Makes this process the only one that works on a file, from whichever machine, for as long as the block runs.

    The lock is a file beside it, or beside the file that a link leads to, with the ending .lock, which says who holds
    it. It is the system's (``flock``), so that it is gone with the process, however that ends, also while child
    processes live on. On disks that are shared it holds between machines where the disk has locks, as NFS does. Where
    there are none (Windows; some disks, with a warning) nothing is locked.

    Args:
        caller: whom a refusal names.
        path: what is locked; it need not exist. Missing folders are made, and removed if they stay empty.
        way_out: the last sentence of a refusal.

    Raises:
        InUseError: another block has it, of this process or another.
        OSError: no file can be made there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "log.json")
        >>> with locked("evaluate", path, "Wait for it."):
        ...     sorted(file.name for file in path.parent.iterdir())
        ['log.json.lock']
        >>> sorted(path.parent.iterdir())
        []
    """
    lock = _lock_of(path)
    new = [folder for folder in lock.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _taken(caller, Path(path), lock, way_out)
    try:
        yield
    finally:
        if descriptor in _held:  # and not in a child process that leaves the block
            with contextlib.suppress(OSError):
                lock.unlink()  # before it is free: who takes it then looks whether the file is still there
                for folder in new:
                    folder.rmdir()  # of a block that has written nothing
            _let_go(descriptor)


def holds(path: Path | str) -> bool:
    """Whether this process is in a block of :func:`locked` for a file."""
    return _lock_of(path) in _held.values()


def _lock_of(path: Path | str) -> Path:
    path = Path(os.path.realpath(path))
    return path.with_name(f"{path.name}.lock")


def _taken(caller: str, path: Path, lock: Path, way_out: str) -> int | None:
    if sys.platform == "win32":
        return None
    until = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in _TAKEN:
                lock.unlink(missing_ok=True)
                warnings.warn(
                    f"{caller}: {path} cannot be locked here ({error.strerror}). Run one process at a time.",
                    UserWarning,
                    stacklevel=4,
                )
                return None
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise InUseError(
                f"{caller}: {path} must have one process that writes it, but {holder or 'another process'} does. "
                f"{way_out}"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                _held[descriptor] = lock
                with contextlib.suppress(OSError):  # on a full disk it is nameless
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # its holder has just let go, and removed the file


@contextlib.contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name of ``folder`` once everything is written; for who has it :func:`locked`.

    Args:
        folder: where it shall be. One that is there is replaced.

    Yields:
        A new folder beside it. If the block raises, or the process ends in it, the old one is there as it was, where
        the process was killed between two renames after the next :func:`settle`.

    Raises:
        OSError: it cannot be written; see :func:`naming`.
    """
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        settle(folder)
        aside, old = _beside(folder)
        try:
            aside.mkdir()
            yield aside
            if os.path.lexists(folder):
                os.rename(folder, old)
            os.rename(aside, folder)
        finally:
            settle(folder)


def settle(folder: Path) -> None:
    """Removes what :func:`folder_aside` leaves when its process is killed; an old folder that was not replaced is back.

    Args:
        folder: the one that was to be written; the caller has it :func:`locked`.
    """
    aside, old = _beside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    if os.path.lexists(old) and not os.path.lexists(folder):
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Names ``path`` in an error that says that a write has failed and not of what, such as that of a full disk.

    Args:
        path: the file or folder that the block writes.

    Raises:
        OSError: in place of one without a file's name, and of the RuntimeError with which ``torch.save`` ends.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        # torch.save met the error of the disk, and then one of its own, as its archive is not whole.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:  # where it writes the file by itself
            first = str(error).strip().splitlines()[0]
            raise OSError(errno.EIO, f"a write failed, the disk may be full ({first})", str(path)) from error
        raise OSError(cause.errno, cause.strerror or str(cause), cause.filename or str(path)) from error


def configs_folder() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}  # behind UTF-32, whose marks begin alike
# What a config inherits from: a path in `_base_`, or a relative import inside `read_base`.
_BASE = re.compile(
    r"""['"]([^'"\n]+\.(?:py|ya?ml|json))['"]|^\s+from\s+(\.[\w.]*)\s+import|[:-]\s+([^\s'"#]+\.(?:py|ya?ml|json))\s*$""",
    re.MULTILINE,
)
_LEVELS = 100  # of a YAML or JSON: readers go down one by one, and Python's stack ends


def check_config_text(caller: str, path: Path | str) -> None:
    """Refuses a config, or one that it inherits from, whose host would fail on its bytes, take them for other text or
    never end.

    Args:
        caller: whom a refusal names.
        path: a YAML file of torchdistill, or a config of MMEngine in Python, YAML or JSON; nothing happens where there
            is no such file.

    Raises:
        ValueError: the file is not in UTF-8, or torchdistill would read it in another encoding, that of the system; it
            is larger than the cap of texts; see also :func:`check_yaml`.
    """
    waiting, seen = [Path(path).expanduser()], set()
    while waiting:
        file = waiting.pop().absolute()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = _utf8(caller, file)
        if file.suffix != ".py":
            check_yaml(caller, file, text)  # JSON is YAML, but for tabs
        for quoted, module, bare in _BASE.findall(text) if file.suffix == ".py" or "_base_" in text else ():
            steps = len(module) - len(module.lstrip("."))
            relative = quoted or bare or f"{'../' * (steps - 1)}{module.strip('.').replace('.', '/')}.py"
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # a name that no disk has
                waiting.append((file.parent / relative).resolve())


def check_yaml(caller: str, name: Path | str, text: str) -> None:
    """Refuses a YAML text that is small and becomes large: its values are counted as whoever walks through them does.

    Nothing is built, and nothing is said of what is no YAML: its reader says where.

    Args:
        caller: whom a refusal names.
        name: of the file.
        text: its content.

    Raises:
        ValueError: more values than the cap, those of an alias counted each time; an alias inside its own anchor; more
            than 100 levels.
    """
    try:
        import yaml
    except ImportError:  # then nobody here reads it
        return
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor of each collection, and the count where it began
    count = 0
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            anchor = getattr(event, "anchor", None)
            if isinstance(event, yaml.AliasEvent):
                if anchor in (held for held, _ in opened):
                    rule = f"must have no alias inside its own anchor, got `*{printable(anchor)}`"
                    raise ValueError(f"{caller}: {name} {rule}. Write it out.")
                count += sizes.get(str(anchor), 1)
            elif isinstance(event, yaml.CollectionStartEvent):
                opened.append((anchor, count))
                count += 1
                if len(opened) > _LEVELS:
                    raise ValueError(f"{caller}: {name} must have at most {_LEVELS} levels, but has more.")
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                sizes[str(anchor)] = count - before
            elif isinstance(event, yaml.ScalarEvent):
                count += 1
                sizes[str(anchor)] = 1
            if count > limit("YAML_NODES"):
                check_limit(caller, name, "YAML_NODES", count)


def _utf8(caller: str, file: Path) -> str:
    with file.open("rb") as opened:
        content = opened.read(limit("TEXT_BYTES") + 1)
    check_limit(caller, file, "TEXT_BYTES", len(content))
    rule = f"{caller}: {file} must be text in UTF-8"
    mark = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if mark is not None or b"\0" in content:
        raise ValueError(f"{rule}, but is in {mark or 'UTF-16 or no text'}. Save it as UTF-8.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{rule}, but line {line} has the byte {content[error.start]:#x}. Save it as UTF-8."
        ) from error
    if file.suffix == ".py" and content.startswith(codecs.BOM_UTF8):
        raise ValueError(f"{rule} without a byte order mark, but begins with one. Save it as plain UTF-8.")
    encoding = locale.getpreferredencoding(False)
    if file.suffix != ".py" and not text.isascii() and codecs.lookup(encoding).name != "utf-8":
        raise ValueError(f"{caller}: {file} is in UTF-8, but torchdistill reads it as {encoding}. Set PYTHONUTF8=1.")
    return text
