"""The losses as one C++ operator, for logits on a CPU. Opt-in: it needs a compiler once, and nobody needs it.

``ikl build`` builds the operator and checks it; ``IKL_PLUGINS_NATIVE=1`` in the environment of a training, or
:func:`enable` in its code, makes the losses use it. Values and gradients agree with those of
:mod:`ikl_plugins.functional` within rounding, not to the bit: keep to one of the two in runs that are to be compared.

It serves (N, C) logits on a CPU under Linux. Everything else (other devices, dense logits, ``torch.compile``, second
derivatives, subclasses of tensors) goes the way it goes without it. As long as it is not switched on, no file is read
and no compiler looked for.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import written_aside

__all__ = ["VARIABLE", "build", "disable", "enable", "is_enabled", "library_path"]

VARIABLE = "IKL_PLUGINS_NATIVE"

_SOURCE = Path(__file__).parent / "csrc" / "decoupled_kl.cpp"
_COMPILERS = ("g++", "clang++", "c++")
_WAY_OUT = "Run `ikl build` with this interpreter"
_WITHOUT = "The losses compute the same without the operator"

# What torch itself uses of the processor -> the compiler's names for it. Others get what every processor has.
_PROCESSOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}

_operator: Callable[..., Any] | None = None
_ask_environment = True  # until the first loss, or whoever decides before it
_building = threading.Lock()
# Whoever comes while a thread loads or builds waits for it: else that one's losses and this one's go different ways.
_deciding = threading.RLock()


def build(*, verbose: bool = False) -> Path:
    """Compiles the operator for this release of torch and this kind of processor, unless that has been done.

    A damaged library is replaced. Processes that build at once leave one whole library.

    Args:
        verbose: print the compiler's command.

    Returns:
        The library, see :func:`library_path`. It is not loaded.

    Raises:
        RuntimeError: the system is not Linux, no compiler is found or it does not succeed, or the folder cannot be
            written to.
    """
    caller = "ikl_plugins.native.build"
    if sys.platform != "linux":
        raise RuntimeError(f"{caller}: the system must be Linux, got {sys.platform}. {_WITHOUT}.")
    with _building:
        path = library_path()
        try:
            if not _is_whole(path):
                with written_aside(path) as aside:
                    _compile(caller, aside, verbose=verbose)
                    # The loader would take a truncated library for a whole one, and the process would end in it.
                    content = aside.read_bytes()
                    aside.write_bytes(content + hashlib.sha256(content).digest())
        except OSError as error:
            raise RuntimeError(
                f"{caller}: the folder {path.parent} must be writable, but {error}. Name another one in XDG_CACHE_HOME."
            ) from error
    return path


def library_path() -> Path:
    """Where the operator is, or will be, on this machine: one file for each source, release of torch and processor.

    The folder is ``ikl_plugins`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        RuntimeError: the operator's source is not where the package is installed, or there is no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    try:
        source = _SOURCE.read_text(encoding="utf-8")
    except OSError as error:
        raise RuntimeError(
            f"ikl_plugins.native: the package must hold the operator's source, but {error}. Install it again."
        ) from error
    parts = [source, torch.__version__, platform.machine(), *_flags()]
    return folder / "ikl_plugins" / f"decoupled_kl-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def enable() -> None:
    """Loads the operator that :func:`build` has left; from then on the losses of this process use it.

    Raises:
        RuntimeError: it has not been built, or cannot be loaded.
    """
    global _operator, _ask_environment
    with _deciding:
        # In this order: operator() reads the answer without the lock as soon as there is no question left.
        _operator, _ask_environment = _loaded() or _load(), False


def disable() -> None:
    """The losses of this process go back to :mod:`ikl_plugins.functional`'s own way, whatever the environment says."""
    global _operator, _ask_environment
    with _deciding:
        _operator, _ask_environment = None, False


def is_enabled() -> bool:
    """Whether the losses of this process use the operator, where it serves.

    Raises:
        ValueError: the environment variable has a value that it does not know.
    """
    return operator() is not None


def operator() -> Callable[..., Any] | None:
    """The operator, if it is enabled. The first call does what the environment asks for."""
    if _ask_environment:
        _follow_environment()
    return _operator


def serves(student: Tensor, teacher: Tensor, class_prior: Tensor | None) -> bool:
    """Whether the operator takes these tensors, which fit each other; the operator itself is loaded."""
    return (
        student.device.type == "cpu"
        and student.dim() == 2
        and all(x is None or type(x) is Tensor or type(x) is nn.Parameter for x in (student, teacher, class_prior))
        # Whoever watches or replaces each operation of torch shall see the operations of torch.
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _follow_environment() -> None:
    """What the variable says: 1 uses a built operator, 'build' builds it if need be, 0 and nothing leave it out."""
    global _ask_environment
    with _deciding:
        if not _ask_environment:  # another thread has decided meanwhile
            return
        value = os.environ.get(VARIABLE, "0")
        if value not in ("", "0", "1", "build"):
            raise ValueError(
                f"ikl_plugins.native: the environment variable {VARIABLE} must be '0', '1' or 'build', got {value!r}. "
                f"1 uses a built operator, build compiles a missing one."
            )
        refusal = ""
        if value in ("1", "build"):
            try:
                if value == "build":
                    build()
                enable()
            except RuntimeError as error:
                refusal = str(error)
        _ask_environment = False
    if refusal:
        warnings.warn(
            f"{VARIABLE}={value} fails, the losses go on without the C++ operator. {refusal}",
            RuntimeWarning,
            stacklevel=4,
        )


def _loaded() -> Callable[..., Any] | None:
    """The operator, if this process has loaded it: torch takes one of a name, and ends the process at a second."""
    try:
        found: Callable[..., Any] = torch.ops.ikl_plugins.decoupled_kl.default
    except AttributeError:
        return None
    return found


def _load() -> Callable[..., Any]:
    path = library_path()
    try:
        if not path.exists():
            raise RuntimeError(
                f"ikl_plugins.native.enable: the operator must be built, but there is no {path}. {_WAY_OUT}."
            )
        if not _is_whole(path):
            raise OSError("it is not what was written there")
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        found = _loaded()
        if found is None:
            raise OSError("it holds no operator")
    except OSError as error:
        raise RuntimeError(
            f"ikl_plugins.native.enable: the operator at {path} cannot be loaded: {error}. Delete the file. {_WAY_OUT}."
        ) from error
    return found


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of what is before."""
    size = hashlib.sha256().digest_size
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return len(content) > size and hashlib.sha256(content[:-size]).digest() == content[-size:]


def _compile(caller: str, output: Path, *, verbose: bool) -> None:
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else [found for found in map(shutil.which, _COMPILERS) if found][:1]
    if not compiler:
        raise RuntimeError(
            f"{caller}: it needs a C++ compiler, but none of {', '.join(_COMPILERS)} is on the PATH. "
            f"Install one, or name it in CXX."
        )
    command = [*compiler, *_flags(), str(_SOURCE), "-o", str(output), *_libraries()]
    if verbose:
        print(shlex.join(command), flush=True)
    status, said = _run(command)
    if status != 0 or not output.exists():
        last = "\n".join(said.splitlines()[-20:])
        raise RuntimeError(
            f"{caller}: {compiler[0]} must compile {_SOURCE}, but ended with {status}:\n{last}\n"
            f"Name another compiler in CXX."
        )


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status and errors of a command; of one that cannot be started 127, as from a shell, and why."""
    try:
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stderr


def _flags() -> list[str]:
    headers = Path(torch.__file__).parent / "include"
    # torch's headers want the standard that torch was built with.
    standard = re.search(r"C\+\+ Version: 20(\d\d)", torch.__config__.show())
    return [
        f"-std=c++{standard.group(1) if standard else 17}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *["-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fwrapv", "-ffp-contract=off", "-w"],
        *("-isystem", str(headers), "-isystem", str(headers / "torch" / "csrc" / "api" / "include")),
        *_PROCESSOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()),
    ]


def _libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
