"""The losses as one C++ operator, for logits on a CPU. It needs a compiler once; nobody needs it.

``ikl build`` builds the operator and checks it; from then on the losses use it where it serves: (N, C) logits on a CPU
under Linux. Everything else (other devices, dense logits, ``torch.compile``, second derivatives, subclasses of tensors)
goes the way it goes without it. ``IKL_PLUGINS_KERNEL=walk`` in the environment of a training, or :func:`disable` in its
code, leaves the operator out. Values and gradients agree with the other ways within rounding, not to the bit: keep to
one of them in runs that are to be compared.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ._composed import Settings, compute_dtype
from ._files import written_aside
from ._fused import Result
from ._way import named_way

__all__ = ["build", "disable", "enable", "is_enabled", "library_path"]

# See ikl_plugins._fused.fused_loss, whose arguments and results are an operator's.
Operator = Callable[[Tensor, Tensor, Tensor | None, Settings, tuple[bool, bool], bool], Result]

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SOURCE = Path(__file__).parent / "csrc" / "decoupled_kl.cpp"
_COMPILERS = ("g++", "clang++", "c++")

_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fwrapv", "-ffp-contract=off", "-w")
# What torch itself uses of the processor -> the compiler's names for it. Others get what every processor has.
_PROCESSOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}

# struct Call of the source, and its enumerations.
_CALL = struct.Struct("=3q12q6d8q")
_TYPES = {torch.float64: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
_NOTHING = (0, 0, 0, 0)
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float64, torch.float32)}
_REDUCTIONS = {"batchmean": 0, "sum": 1, "none": 2}

_loaded: Operator | None = None
_operator: Operator | None = None  # what the losses use
_undecided = True  # until the first loss, or whoever decides before it
_forked = False
_building = threading.Lock()
# Whoever comes while a thread loads waits for it: else that one's losses and this one's go different ways.
_deciding = threading.RLock()


def build(*, verbose: bool = False) -> Path:
    """Compiles the operator for this kind of processor, unless that has been done.

    A damaged library, or one that another user could have written, is replaced. Processes that build at once leave one
    whole library. Its folder is made for this user alone.

    Args:
        verbose: print the compiler's command.

    Returns:
        The library, see :func:`library_path`. It is not loaded.

    Raises:
        RuntimeError: the system is not Linux, no compiler is found or it does not succeed, or the folder cannot be
            written to, or others can write to it.
    """
    caller = "ikl_plugins.native.build"
    if sys.platform != "linux":
        raise RuntimeError(f"{caller}: the system must be Linux, got {sys.platform}. The losses need no operator.")
    with _building:
        path = library_path()
        try:
            for folder in reversed((path.parent, *path.parent.parents)):  # whatever the umask
                folder.mkdir(mode=0o700, exist_ok=True)
            path.parent.chmod(0o700)  # what an older release has made; refused where another user owns it
            reason = _refusal(path)
            if not reason:
                return path
            path.unlink(missing_ok=True)  # else the new one would have its mode, or be where a link leads
            with written_aside(path) as aside, tempfile.TemporaryDirectory() as scratch:
                compiled = Path(scratch, path.name)
                _compile(caller, compiled, verbose=verbose)
                # The loader would take a truncated library for a whole one, and the process would end in it.
                content = compiled.read_bytes()
                aside.write_bytes(content + hashlib.sha256(content).digest())
                aside.chmod(0o600)
            reason = _refusal(path)
        except OSError as error:
            raise RuntimeError(f"{caller}: {path.parent} must be writable: {error}. Set XDG_CACHE_HOME.") from error
        if reason:
            raise RuntimeError(
                f"{caller}: {path} would not be loaded: {reason}. Set XDG_CACHE_HOME to a folder of yours."
            )
    return path


def library_path() -> Path:
    """Where the operator is, or will be, on this machine: one file for each source and kind of processor.

    The folder is ``ikl_plugins`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        RuntimeError: the operator's source is not where the package is installed, or there is no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    try:
        source = _SOURCE.read_text(encoding="utf-8")
    except OSError as error:
        raise RuntimeError(f"ikl_plugins.native: the package lacks its C++ source: {error}. Reinstall it.") from error
    parts = [source, platform.machine(), *_flags()]
    return folder / "ikl_plugins" / f"decoupled_kl-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def enable() -> None:
    """Loads the operator that :func:`build` has left; the losses of this process use it, whatever the environment says.

    Raises:
        RuntimeError: it has not been built, cannot be loaded, or others than this user may have written it.
    """
    global _operator, _undecided
    with _deciding:
        # In this order: operator() reads the answer without the lock as soon as there is no question left.
        _operator, _undecided = _load(), False


def disable() -> None:
    """The losses of this process do without the operator, whatever the environment says."""
    global _operator, _undecided
    with _deciding:
        _operator, _undecided = None, False


def is_enabled() -> bool:
    """Whether the losses of this process use the operator, where it serves.

    Raises:
        ValueError: the environment names a way that there is not.
    """
    return operator() is not None


def operator() -> Operator | None:
    """The operator, if the losses shall use it. The first call loads it where it has been built."""
    if _undecided:
        _decide()
    return _operator


def serves(student: Tensor, teacher: Tensor, class_prior: Tensor | None) -> bool:
    """Whether the operator takes these tensors, which fit each other. It sees their memory alone."""
    return (
        student.is_cpu
        and student.dim() == 2
        and _is_plain(student)
        and _is_plain(teacher)
        and (class_prior is None or _is_plain(class_prior))
        # Whoever watches or replaces each operation of torch shall see the operations of torch.
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor)
    return (kind is Tensor or kind is nn.Parameter) and not tensor.is_neg() and not tensor._is_zerotensor()


def _decide() -> None:
    """What the environment says; by default an operator that has been built is used."""
    global _operator, _undecided
    with _deciding:
        if not _undecided:  # another thread has decided meanwhile
            return
        named, refusal = named_way(), ""
        found: Operator | None = None
        if named == "native" or (named is None and _is_built()):
            try:
                found = _load()
            except RuntimeError as error:
                refusal = str(error)
        _operator, _undecided = found, False
    if refusal:
        warnings.warn(f"The losses go on without the C++ operator. {refusal}", RuntimeWarning, stacklevel=4)


def _is_built() -> bool:
    try:
        return sys.platform == "linux" and library_path().exists()
    except (OSError, RuntimeError):
        return False


def _load() -> Operator:
    global _loaded
    if _loaded is not None:
        return _loaded
    caller = "ikl_plugins.native.enable"
    path = library_path()
    if not path.exists():
        raise RuntimeError(f"{caller}: there is no {path}. Run `ikl build` with this interpreter.")
    try:
        # Nobody else can rename or write anything on the way to the path, so it stays what has been checked.
        function = ctypes.CDLL(str(_checked(path))).decoupled_kl
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{caller}: cannot load {path}: {error}. Delete it and run `ikl build`.") from error
    function.argtypes = (ctypes.c_char_p,)
    _loaded = _calling(function)
    return _loaded


def _calling(function: Callable[[bytes], int]) -> Operator:
    """The library's function as an operator on tensors that it serves."""

    def decoupled_kl(
        student: Tensor,
        teacher: Tensor,
        class_prior: Tensor | None,
        settings: Settings,
        needs: tuple[bool, bool],
        with_terms: bool,
    ) -> Result:
        rows, classes = shape = student.shape
        dtype = compute_dtype(student, teacher)
        like = student if student.dtype is dtype and student.is_contiguous() else student.new_empty(shape, dtype=dtype)
        # empty_like: torch takes twice as long to read the arguments of new_empty.
        loss = like.new_empty(rows) if settings.reduction == "none" else torch.empty_like(_SCALARS[dtype])
        terms = (torch.empty_like(loss), torch.empty_like(loss)) if with_terms else None
        student_gradient = torch.empty_like(like) if needs[0] else None
        teacher_gradient = torch.empty_like(like) if needs[1] else None
        call = _CALL.pack(
            rows,
            classes,
            1 if _forked else torch.get_num_threads(),
            *_array(student),
            *_array(teacher),
            *(_NOTHING if class_prior is None else _array(class_prior)),
            settings.alpha,
            settings.beta,
            settings.temperature,
            settings.weight_temperature,
            settings.gamma,
            settings.mse_temperature,
            settings.student_in_mse,
            settings.divide_by_pairs,
            _REDUCTIONS[settings.reduction],
            loss.data_ptr(),
            0 if terms is None else terms[0].data_ptr(),
            0 if terms is None else terms[1].data_ptr(),
            0 if student_gradient is None else student_gradient.data_ptr(),
            0 if teacher_gradient is None else teacher_gradient.data_ptr(),
        )
        if function(call):
            raise MemoryError("ikl_plugins.native: no memory for the C++ operator.")
        return loss, terms, (student_gradient, teacher_gradient)

    return decoupled_kl


def _array(tensor: Tensor) -> tuple[int, int, int, int]:
    row_stride, class_stride = tensor.stride()
    return tensor.data_ptr(), row_stride, class_stride, _TYPES[tensor.dtype]


def _after_fork() -> None:
    """A forked process lacks the threads that the operator's runtime has started, and would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def refusal() -> str:
    """Why a library that is there would not be loaded; '' where there is none, or nothing is wrong with it."""
    return _refusal(library_path()) if _is_built() else ""


def _refusal(path: Path) -> str:
    try:
        _checked(path)
    except OSError as error:
        return str(error)
    return ""


def _checked(path: Path) -> Path:
    """The library's path without links.

    Raises:
        OSError: it is missing or not whole; another user owns it or its folder, or can write to one of them or to a
            folder above.
    """
    path = path.resolve(strict=True)
    _check_owner(path.parent, path.parent.stat())
    for folder in path.parent.parents:
        facts = folder.stat()
        if facts.st_uid != 0 and facts.st_uid != os.geteuid():
            raise OSError(f"another user owns {folder}")
        # Of a sticky folder, as /tmp, others cannot rename what is in it.
        if facts.st_mode & _OTHERS_WRITE and not facts.st_mode & stat.S_ISVTX:
            raise OSError(f"others can write to {folder}")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as library:
        _check_owner(path, os.fstat(library.fileno()))
        content, size = library.read(), hashlib.sha256().digest_size
    # It ends with the digest of what is before.
    if len(content) <= size or hashlib.sha256(content[:-size]).digest() != content[-size:]:
        raise OSError("it is damaged")
    return path


def _check_owner(path: Path, facts: os.stat_result) -> None:
    if facts.st_uid != os.geteuid():
        raise OSError(f"another user owns {path}")
    if facts.st_mode & _OTHERS_WRITE:
        raise OSError(f"others can write to {path}")


def _compile(caller: str, output: Path, *, verbose: bool) -> None:
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else [found for found in map(shutil.which, _COMPILERS) if found][:1]
    if not compiler:
        raise RuntimeError(
            f"{caller}: it needs a C++ compiler, but none of {', '.join(_COMPILERS)} is on the PATH. Set CXX."
        )
    command = [*compiler, *_flags(), str(_SOURCE), "-o", str(output)]
    if verbose:
        print(shlex.join(command), flush=True)
    status, said = _run(command)
    if status != 0 or not output.exists():
        last = "\n".join(said.splitlines()[-20:])
        raise RuntimeError(f"{caller}: {compiler[0]} ended with {status}:\n{last}\nName another compiler in CXX.")


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status and errors of a command; of one that cannot be started 127, as from a shell, and why."""
    try:
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stderr


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_PROCESSOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
