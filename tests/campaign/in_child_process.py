"""A case in a forked process: it shares the imports, and a crash, a hang or a changed registry concerns it alone."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

RETURNED, RAISED, DIED, HUNG = "returned", "raised", "died", "hung"
Tell = Callable[[Any], None]

_FORK = multiprocessing.get_context("fork")


class Answer(NamedTuple):
    """What became of a case."""

    how: str  # 'returned', 'raised', 'died' or 'hung'
    value: Any  # what it returned; of an exception its type's name, message and traceback; else None
    told: list[Any]  # what the case reported on its way


def in_child_process(case: Callable[[Tell], Any], timeout: float) -> Answer:
    """Runs a case, which gets a function to report with; what it reports and returns must pickle.

    After ``timeout`` seconds it is killed. What it prints, warns and logs goes nowhere.
    """
    reader, writer = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_serve, args=(case, writer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, on forks beside threads
        process.start()
    writer.close()
    told: list[Any] = []
    deadline = time.monotonic() + timeout
    answer = Answer(HUNG, None, told)
    with suppress(EOFError):
        while reader.poll(max(0.0, deadline - time.monotonic())):
            answer = Answer(DIED, None, told)
            kind, value = pickle.loads(reader.recv_bytes())  # noqa: S301  # of our own child
            if kind != "told":
                answer = Answer(kind, value, told)
                break
            told.append(value)
            answer = Answer(HUNG, None, told)
    if answer.how == HUNG:
        process.kill()
    process.join()
    return answer


def value_of(case: Callable[[Tell], Any], timeout: float) -> Any:
    """What a case returns that must return; its failure is a RuntimeError here."""
    answer = in_child_process(case, timeout)
    if answer.how != RETURNED:
        raise RuntimeError(f"{answer.how}: {answer.value}")
    return answer.value


def _serve(case: Callable[[Tell], Any], writer: Connection) -> None:
    def send(kind: str, value: Any) -> None:
        writer.send_bytes(pickle.dumps((kind, value)))

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        kind, value = RETURNED, case(lambda what: send("told", what))
    except BaseException as error:  # whatever comes is the answer
        kind, value = RAISED, (type(error).__name__, str(error), traceback.format_exc(limit=-4))
    send(kind, value)
    os._exit(0)  # pytest's own exit is not this process's
