"""Cases in forked processes: they share the imports, and a crash, a hang or a changed registry concerns one alone."""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Answer", "each", "one"]

RETURNED, RAISED, DIED, HUNG = "returned", "raised", "died", "hung"


class Answer(NamedTuple):
    """What became of a case.

    Attributes:
        how: 'returned', 'raised', 'died' or 'hung'.
        value: what it returned; of an exception its type's name, message and traceback; else None.
        told: what the case reported on its way.
    """

    how: str
    value: Any
    told: list[Any]


def one(function: Callable[[Callable[[Any], None]], Any], timeout: float) -> Answer:
    """Runs ``function`` in a forked process.

    Args:
        function: gets a function with which it reports on its way; what it reports and returns must pickle.
        timeout: in seconds; then it is killed.
    """
    return next(each([function], timeout))


def each(cases: Sequence[Callable[[Callable[[Any], None]], Any]], timeout: float) -> Iterator[Answer]:
    """Runs the cases one after the other in a forked process, and in a new one behind a case that ends it."""
    at = 0
    while at < len(cases):
        for answer in _batch(cases[at:], timeout):
            at += 1
            yield answer


def _batch(cases: Sequence[Callable[[Callable[[Any], None]], Any]], timeout: float) -> Iterator[Answer]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _serve(cases, writer)
        os._exit(0)
    os.close(writer)
    buffer, told, answered = b"", [], 0
    deadline = time.monotonic() + timeout
    how = DIED
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while answered < len(cases):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                how = HUNG
                break
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                break
            buffer += chunk
            while len(buffer) >= 8 and len(buffer) >= 8 + int.from_bytes(buffer[:8], "big"):
                size = int.from_bytes(buffer[:8], "big")
                kind, value = pickle.loads(buffer[8 : 8 + size])  # noqa: S301  # of our own child
                buffer = buffer[8 + size :]
                if kind == "told":
                    told.append(value)
                    continue
                answered += 1
                yield Answer(kind, value, told)
                told, deadline = [], time.monotonic() + timeout
    os.close(reader)
    if how == HUNG:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if answered < len(cases):
        yield Answer(how, None, told)


def _serve(cases: Sequence[Callable[[Callable[[Any], None]], Any]], writer: int) -> None:
    def send(kind: str, value: Any) -> None:
        content = pickle.dumps((kind, value))
        content = len(content).to_bytes(8, "big") + content
        while content:
            content = content[os.write(writer, content) :]

    # What the hosts print goes nowhere; their exceptions are the answer.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for case in cases:
        try:
            kind, value = RETURNED, case(lambda what: send("told", what))
        except SystemExit as error:
            kind, value = RAISED, ("SystemExit", str(error), "")
        except BaseException as error:  # whatever comes is the answer
            kind, value = RAISED, (type(error).__name__, str(error), traceback.format_exc(limit=-4))
        send(kind, value)
