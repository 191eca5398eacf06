"""NumPy's numbers and arrays in a checkpoint, rebuilt from checked values alone.

NumPy's own classes let a file set their insides: a dtype with an item size of its choice makes every later access leave
the memory of the array. So a checkpoint gets stand-ins under NumPy's names. They take what NumPy writes for plain
dtypes and nothing else, and :func:`resolved` puts the arrays in their place.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import reprlib
from collections.abc import Callable
from typing import Any

import numpy

from ._limits import printable

__all__ = ["numpy_names", "resolved"]

# Numbers, booleans and text; an array of objects may hold anything and stays out.
_CODE = re.compile(r"[?bBhHiIlLqQefdgFDG]|[biufcSU]\d{1,6}")


def _shown(value: object) -> str:
    return printable(reprlib.repr(value), 60)  # one that holds itself many times is as long as it likes


class _DType:
    """What a checkpoint gets for ``numpy.dtype``."""

    def __init__(self, code: object = None, align: object = False, copy: object = True) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code) or align is not False or copy not in (True, False):
            raise pickle.UnpicklingError(f"numpy.dtype of {_shown(code)}; it may be one of numbers, booleans or text")
        self.real = numpy.dtype(code)

    def __setstate__(self, state: object) -> None:
        """Takes the state that NumPy writes for this dtype, in either byte order."""
        own = self.real.__reduce__()[2]
        if (
            not isinstance(state, tuple)
            or state[1:2] not in (("<",), (">",), ("|",))
            or state != (3, state[1], *own[2:])
        ):
            raise pickle.UnpicklingError(f"a state of numpy.dtype, {_shown(state)}; it may be the plain one alone")
        if state[1] != "|":
            self.real = self.real.newbyteorder(state[1])


class _Array:
    """What a checkpoint gets for ``numpy.ndarray``, and what the rebuilding of one gives."""

    real: numpy.ndarray[Any, Any] | None = None

    def __setstate__(self, state: object) -> None:
        """Takes version, shape, dtype, order and bytes, as NumPy writes them."""
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1 or type(state[3]) is not bool:
            raise pickle.UnpicklingError(f"a state of numpy.ndarray, {_shown(state)}; it may be the plain one alone")
        shape, dtype = state[1], _real_dtype(state[2])
        whole = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
        data = _data(state[4], math.prod(shape) * dtype.itemsize if whole else -1)
        self.real = numpy.frombuffer(data, dtype).reshape(shape, order="F" if state[3] else "C").copy(order="K")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    """What a checkpoint gets for ``numpy.core.multiarray._reconstruct``."""
    if kind is not _Array:
        raise pickle.UnpicklingError("numpy's _reconstruct of another class; it may be one of numpy.ndarray")
    return _Array()


def _scalar(dtype: object, data: object) -> Any:
    """What a checkpoint gets for ``numpy.core.multiarray.scalar``."""
    real = _real_dtype(dtype)
    return numpy.frombuffer(_data(data, real.itemsize), real)[0]


def _no_bytes() -> bytes:
    """What a checkpoint gets for ``bytes``, by which pickle writes those of an empty array."""
    return b""


def _real_dtype(dtype: object) -> numpy.dtype[Any]:
    if isinstance(dtype, _DType):
        return dtype.real
    raise pickle.UnpicklingError(f"a number or array of {type(dtype).__name__}; it must have a numpy.dtype")


def _data(data: object, size: int) -> bytes:
    if isinstance(data, bytes) and len(data) == size:
        return data
    found = len(data) if isinstance(data, bytes) else type(data).__name__
    raise pickle.UnpicklingError(f"numpy data of {found} bytes; shape and dtype take {max(size, 0)}")


def numpy_names() -> list[tuple[Callable[..., Any], str]]:
    """Entries for ``torch.serialization.safe_globals``: the stand-ins under the names of NumPy 1 and 2."""
    cores = ("numpy._core.multiarray", "numpy.core.multiarray")
    names: list[tuple[Callable[..., Any], str]] = [(_DType, "numpy.dtype"), (_Array, "numpy.ndarray")]
    names += [(_no_bytes, "builtins.bytes")]
    names += [(_reconstruct, f"{core}._reconstruct") for core in cores]
    return names + [(_scalar, f"{core}.scalar") for core in cores]


def resolved(value: Any, buffers: tuple[type[Any], ...] = (), seen: dict[int, Any] | None = None) -> Any:
    """What a checkpoint holds, with NumPy's arrays and dtypes in place of their stand-ins.

    Args:
        value: of ``torch.load``; its dicts, lists and objects are changed in place.
        buffers: classes of objects whose attributes are looked into, besides ``argparse.Namespace``.
        seen: of the call itself: what has been looked at, by its id.

    Raises:
        UnpicklingError: an array without content, or one where nothing can be put in its place.
    """
    seen = {} if seen is None else seen
    if isinstance(value, (_Array, _DType)):
        if value.real is None:
            raise pickle.UnpicklingError("a numpy.ndarray without content; it must have a state")
        return value.real
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value
    if isinstance(value, dict):
        if any(isinstance(key, (_Array, _DType)) for key in value):
            raise pickle.UnpicklingError("a numpy.dtype as a key; it must be a value")
        for key in value:
            value[key] = resolved(value[key], buffers, seen)
    elif isinstance(value, list):
        value[:] = [resolved(entry, buffers, seen) for entry in value]
    elif type(value) is tuple:
        entries = tuple(resolved(entry, buffers, seen) for entry in value)
        if any(new is not old for new, old in zip(entries, value, strict=True)):
            value = seen[id(value)] = entries
    elif isinstance(value, (set, frozenset)) and any(isinstance(entry, (_Array, _DType)) for entry in value):
        raise pickle.UnpicklingError("a numpy.dtype in a set; it must be a value")
    if isinstance(value, (argparse.Namespace, dict, *buffers)) and hasattr(value, "__dict__"):
        resolved(vars(value), buffers, seen)
    return value
