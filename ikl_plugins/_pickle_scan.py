"""Follows the pickle of a checkpoint without making anything of it, before torch does.

What a few hundred bytes can ask for is refused here: storages that are larger than what the file has for them, tensors
larger than their storage, calls with a size, and tuples in tuples, whose hash takes Python's own stack or forever. The
opcodes are those of torch's reader, which ends at any other.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Sequence
from struct import unpack
from typing import Any, NamedTuple

from ._limits import limit, printable

__all__ = ["DEEPEST", "Scan"]

DEEPEST = 100  # containers in each other; what training libraries save has about ten


class _Name(str):
    """A class or function that the file names."""


class _Storage(NamedTuple):
    key: str
    size: int  # in bytes
    itemsize: int


class _Tuple:
    def __init__(self, entries: Sequence[Any]) -> None:
        self.entries = entries
        inner = [entry for entry in entries if isinstance(entry, _Tuple)]
        self.depth: int = 1 + max((entry.depth for entry in inner), default=0)
        self.count: int = len(entries) + sum(entry.count for entry in inner)


_OTHER = object()  # a value that does not matter here
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_EMPTY = (pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET)
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_TAKEN = {pickle.APPEND: 1, pickle.SETITEM: 2, pickle.BUILD: 1}  # from the stack, into what lies below
_INTEGERS = {pickle.BININT: ("<i", 4), pickle.BININT1: ("<B", 1), pickle.BININT2: ("<H", 2)}
_PUT = {pickle.BINPUT: ("<B", 1), pickle.LONG_BINPUT: ("<I", 4)}
_GET = {pickle.BINGET: ("<B", 1), pickle.LONG_BINGET: ("<I", 4)}
# In bytes, of the storages of torch; its newer dtypes are in untyped ones.
_ITEMSIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "ComplexDouble": 16, "ComplexFloat": 8}
_ITEMSIZES |= {"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "Untyped": 1}
_ITEMSIZES |= {"QInt32": 4, "QInt8": 1, "QUInt8": 1, "QUInt4x2": 1, "QUInt2x4": 1}


class Scan:
    """What the pickles of one file declare.

    Args:
        records: the size in bytes of what the file has for each storage, by its key; None in torch's old format, where
            all of them stand behind the pickles.

    Attributes:
        storages: bytes by key.
    """

    def __init__(self, records: dict[str, int] | None) -> None:
        self.records = records
        self.storages: dict[str, int] = {}
        self._most = limit("CHECKPOINT_VALUES")
        self._views: dict[str, set[tuple[object, ...]]] = {}
        self._bytes: dict[str, int] = {}

    @property
    def excess(self) -> int:
        """The bytes that tensors have beyond their storages, as an expanded one does."""
        return sum(max(0, size - self.storages[key]) for key, size in self._bytes.items())

    def pickled(self, file: Any) -> bool:
        """Follows one pickle, to its end or to where torch's reader would end.

        Returns:
            Whether it has an end.

        Raises:
            UnpicklingError: it asks for what is refused here.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        read: Callable[[int], bytes] = file.read
        try:
            while self._step(opcode := read(1), read, file.readline):
                pass
        except (LookupError, ValueError, struct.error) as error:
            raise pickle.UnpicklingError(f"a damaged pickle, {type(error).__name__}") from error
        return opcode == pickle.STOP

    def _step(self, opcode: bytes, read: Callable[[int], bytes], readline: Callable[[], bytes]) -> bool:
        """Follows one opcode; False for the last one and for what torch does not know."""
        stack = self.stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_OTHER)
        elif opcode == pickle.EMPTY_TUPLE:
            stack.append(_Tuple(()))
        elif opcode in _INTEGERS:
            kind, size = _INTEGERS[opcode]
            stack.append(unpack(kind, read(size))[0])
        elif opcode == pickle.LONG1:
            stack.append(pickle.decode_long(read(read(1)[0])))
        elif opcode == pickle.BINFLOAT:
            stack.append(unpack(">d", read(8))[0])
        elif opcode in (pickle.BINUNICODE, pickle.SHORT_BINSTRING):
            long = opcode == pickle.BINUNICODE
            text = read(unpack("<I", read(4))[0] if long else read(1)[0])
            stack.append(str(text, "utf-8" if long else "latin-1", "surrogatepass"))
        elif opcode == pickle.GLOBAL:
            module, name = (str(readline()[:-1], "utf-8") for _ in range(2))
            stack.append(_Name(f"{module}.{name}"))
        elif opcode in _PUT:
            kind, size = _PUT[opcode]
            self.memo[unpack(kind, read(size))[0]] = stack[-1]
        elif opcode in _GET:
            kind, size = _GET[opcode]
            stack.append(self.memo[unpack(kind, read(size))[0]])
        elif opcode == pickle.MARK:
            self.below.append(stack)
            self.stack = []
        elif opcode == pickle.TUPLE:
            self._tuple(self._marked())
        elif opcode in _TUPLES:
            self._tuple([stack.pop() for _ in range(_TUPLES[opcode])][::-1])
        elif opcode in _TAKEN:
            self._kept([stack.pop() for _ in range(_TAKEN[opcode])])
        elif opcode in (pickle.APPENDS, pickle.SETITEMS):
            self._kept(self._marked())
        elif opcode in (pickle.REDUCE, pickle.NEWOBJ):
            arguments, function = stack.pop(), stack.pop()
            self._call(function, arguments)
            stack.append(_OTHER)
        elif opcode == pickle.BINPERSID:
            stack.append(self._storage(stack.pop()))
        elif opcode == pickle.PROTO:
            read(1)
        else:
            return False
        return True

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _tuple(self, entries: list[Any]) -> None:
        made = _Tuple(entries)
        if made.depth > DEEPEST:
            raise pickle.UnpicklingError(f"values nested more than {DEEPEST} deep")
        if made.count > self._most:
            raise pickle.UnpicklingError(f"a tuple of {made.count} values, over IKL_PLUGINS_MAX_CHECKPOINT_VALUES")
        self._tensor(entries)
        self.stack.append(made)

    def _kept(self, values: list[Any]) -> None:
        # As arguments of a call a list would hide what `_tensor` looks for.
        if any(isinstance(value, _Storage) for value in values):
            raise pickle.UnpicklingError("a storage that is part of no tensor")

    def _call(self, function: object, arguments: object) -> None:
        if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
            raise pickle.UnpicklingError("a call of what is no function")
        _, _, name = function.rpartition(".")
        sized = name.endswith("Tensor") or (
            name == "bytearray" and isinstance(next(iter(arguments.entries), None), int)
        )
        if sized and arguments.entries:
            raise pickle.UnpicklingError(f"a call of {printable(function)} with a size")

    def _storage(self, entry: object) -> _Storage:
        entries = entry.entries if isinstance(entry, _Tuple) else ()
        if len(entries) not in (5, 6) or not isinstance(entries[1], _Name):
            raise pickle.UnpicklingError("a tensor without a storage")
        _, kind, key, _, length = entries[:5]
        itemsize = _ITEMSIZES.get(kind.rpartition(".")[2].removesuffix("Storage"))
        if not isinstance(key, str) or type(length) is not int or length < 0 or itemsize is None:
            raise pickle.UnpicklingError("a storage of no known kind and size")
        size = length * itemsize
        held = size if self.records is None else self.records.get(key.lower(), -1)
        if size != held or self.storages.setdefault(key, size) != size:
            raise pickle.UnpicklingError(f"a tensor of {size:,} bytes, for which the file has {max(held, 0):,}")
        return _Storage(key, size, itemsize)

    def _tensor(self, entries: Sequence[Any]) -> None:
        """Counts a tensor: its storage, its offset, its shape and its strides stand in one tuple."""
        if not entries or not isinstance(entries[0], _Storage):
            return
        storage, shape = entries[0], entries[2] if len(entries) > 2 else None
        lengths = shape.entries if isinstance(shape, _Tuple) else (None,)
        if any(type(length) is not int or length < 0 for length in lengths):
            raise pickle.UnpicklingError("a tensor without a shape")
        strides = entries[3].entries if len(entries) > 3 and isinstance(entries[3], _Tuple) else ()
        view = (entries[1], *lengths, None, *strides)
        if all(one is None or isinstance(one, int) for one in view) and view not in (
            seen := self._views.setdefault(storage.key, set())
        ):
            seen.add(view)  # one that is there twice, as tied weights are, is one
            size = math.prod(lengths) * storage.itemsize
            self._bytes[storage.key] = self._bytes.get(storage.key, 0) + size
