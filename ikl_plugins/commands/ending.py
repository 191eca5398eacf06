"""How a command ends that is interrupted, or whose output nobody reads any more."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO

__all__ = ["interrupted", "tidy"]

_INTERRUPTED, _CLOSED = 130, 141  # as shells count what ends by SIGINT and by SIGPIPE


@contextlib.contextmanager
def tidy(way_out: Callable[[], str], *, own_process: bool) -> Iterator[None]:
    """Ends a command without a traceback on Ctrl-C, and when nobody reads its output any more, as in ``... | head``.

    Standard output and standard error are replaced where they are pipes, for good. Other pipes, such as those to
    workers, break as ever.

    Args:
        way_out: gives the second half of the line for Ctrl-C, unless the KeyboardInterrupt has words of its own.
        own_process: the process, and those that it forks, do nothing else.

    Raises:
        SystemExit: with 130 after Ctrl-C, and with 141 without a reader.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper) and _is_pipe(stream):
            setattr(sys, name, _Watched(stream))
    pressed, process = False, os.getpid()

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if os.getpid() != process:  # a worker, which the first process ends
            return
        pressed = True
        signal.default_int_handler(signal_number, frame)

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:  # it came in a callback, such as one of a fork
            threading.Timer(0.05, os.kill, (process, signal.SIGINT)).start()
        elif not pressed:  # what is half made complains when it is removed
            sys.__unraisablehook__(unraisable)

    if own_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = dropped
    try:
        yield
        _flush()
    except KeyboardInterrupt as stop:
        interrupted(str(stop) or way_out(), own_process=own_process)
    except BaseException as error:
        if pressed and isinstance(error, Exception | SystemExit):  # imports in C make another error of Ctrl-C
            interrupted(way_out(), own_process=own_process)
        try:
            _flush()
        except SystemExit:
            if isinstance(error, SystemExit) and error.code in (None, 0):
                raise
        raise


def interrupted(way_out: str, *, own_process: bool = False) -> NoReturn:
    """Ends the process after Ctrl-C: one line, of several ranks that of the first, and the exit code 130."""
    if own_process and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it at once
    with contextlib.suppress(SystemExit):
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted; {way_out}", file=sys.stderr)
        _flush()
    exec("")  # noqa: S102  # else Python would end by SIGINT, where that came in the middle of another `exec`
    raise SystemExit(_INTERRUPTED) from None


def _flush() -> None:
    """Writes what waits to be written: when Python does so at its end, an error shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _is_pipe(stream: TextIO) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class _Watched(io.TextIOWrapper):
    """A stream like the one it replaces, both over one buffer, but for what happens when its reader has gone."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for what is in the buffer still
        os.close(nowhere)
        raise SystemExit(_CLOSED) from None
