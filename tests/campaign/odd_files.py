"""Files that a reader must take as they are or refuse by name: odd contents, forged states, more than a file may hold.

What a file would unpack to is never made here: archives deflate zeros, and headers say what is not there.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from campaign.hostile import Bomb
from ikl_plugins.checkpoints import load_content

Content = bytes | Callable[[Path], object]  # what a file holds, or what makes it
TOO_LARGE = 200 * 2**20  # bytes that a file of a few hundred kilobytes unpacks to
NESTED = 100_000


def odd_files(sound: Path) -> dict[str, Content]:
    """Odd files in place of a sound one, by what they are."""
    found: dict[str, Content] = {
        "a FIFO": os.mkfifo,
        "a socket": _socket,
        "a link to a device without end": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path),
    }
    makers = {".json": _texts, ".yaml": _yamls, ".png": _pngs, ".npz": _arrays}
    content = sound.read_bytes()
    found.update(makers.get(sound.suffix, _checkpoints)(sound))
    if zipfile.is_zipfile(sound):
        found.update({f"zip: {what}": of for what, of in _archives(content).items()})
    return found


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # a path of its own is too long for a socket
    os.close(folder)


# --- archives --------------------------------------------------------------------------------------------------------


def _archives(sound: bytes) -> dict[str, bytes]:
    """The sound archive packed otherwise."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    largest = max(members, key=lambda member: len(member[1]))[0]
    packed = {"lzma": zipfile.ZIP_LZMA, "bz2": zipfile.ZIP_BZIP2, "deflated": zipfile.ZIP_DEFLATED}
    found = {what: _zip(members, method) for what, method in packed.items()}
    for what, whole in list(found.items()):
        found[f"{what}, damaged"] = _with_byte(whole, whole.index(largest.encode()) + len(largest) + 20, 0xFF)
    stored = _zip(members)
    found["behind other bytes"] = b"MZ" * 100 + stored
    found["encrypted"] = _in_headers(stored, local=6, central=8, value=1)
    found["of a later version"] = _in_headers(stored, local=4, central=6, value=99)
    found["of an unknown method"] = _in_headers(stored, local=8, central=10, value=77)
    found["says 4 GB of each member"] = _in_headers(stored, local=22, central=24, value=2**32 - 2, size="<I")
    found["says 1 TB of a member"] = _zip([(name, text, 2**40) for name, text in members])
    found["grows to 200 MB"] = _zip([*members[:-1], (members[-1][0], bytes(TOO_LARGE))], zipfile.ZIP_DEFLATED)
    found["has 200 MB beside"] = _zip([*members, ("more", bytes(TOO_LARGE))], zipfile.ZIP_DEFLATED)
    found["has 70,000 members more"] = _zip([*members, *((f"more/{number}", b"") for number in range(70_000))])
    found["has a member of a bad name"] = _zip([*members, ("../\x1b[31m\n.png", b"")])
    return found


def _zip(members: list[Any], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of (name, content) or (name, content, what its directory says for a size)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, text, *_ in members:
            archive.writestr(name, text)
        for name, _, *said in members:
            for size in said:
                archive.getinfo(name).file_size = archive.getinfo(name).compress_size = size
    return buffer.getvalue()


def _with_byte(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + bytes([content[place] ^ value]) + content[place + 1 :]


def _in_headers(archive: bytes, *, local: int, central: int, value: int, size: str = "<H") -> bytes:
    """The archive with one field of all its members' headers changed."""
    found = bytearray(archive)
    for mark, field in ((b"PK\3\4", local), (b"PK\1\2", central)):
        place = found.find(mark)
        while place >= 0:
            struct.pack_into(size, found, place + field, value)
            place = found.find(mark, place + 4)
    return bytes(found)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoints(sound: Path) -> dict[str, bytes]:
    """The sound checkpoint with one thing that is odd."""
    content = load_content(sound)
    zipped = zipfile.is_zipfile(sound)
    weights = next((content[key] for key in ("state_dict", "model") if key in content), content)
    name, good = next((name, value) for name, value in weights.items() if value.is_floating_point() and value.dim() > 1)
    found: dict[str, bytes] = {}

    def with_(what: str, *, weight: Any = good, key: Any = None, beside: Any = None) -> None:
        odd = {**weights, name: weight, **({} if key is None else {key: good})}
        whole = odd if weights is content else {**content, "state_dict" if "state_dict" in content else "model": odd}
        if beside is not None:
            whole = {**whole, **beside}
        buffer = io.BytesIO()
        torch.save(whole, buffer, _use_new_zipfile_serialization=zipped)
        found[what] = buffer.getvalue()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is in beta
        for what, weight in odd_weights(good).items():
            with_(f"a weight: {what}", weight=weight)
    for key in (3, None, ("a", 1), 2.5, "", "a\nb\x1b[2J", "\ud800", "k" * 2**20, b"k", True):
        with_(f"a key: {key!r:.20}", key=key) if key is not None else with_("a key: None", beside={None: 1})
        with_(f"a key beside: {key!r:.20}", beside={key: 1})
    cycle: list[Any] = []
    cycle.append(cycle)
    circle: dict[str, Any] = {}
    circle["itself"] = circle
    with_("a list in itself", beside={"extra": cycle})
    with_("a mapping in itself", beside={"extra": circle})
    with_("a mapping in itself for weights", beside={"model": circle, "state_dict": circle})
    for what, pickled in _pickles().items():
        if zipped:
            with zipfile.ZipFile(sound) as archive:
                members = [(name, archive.read(name)) for name in archive.namelist()]
            replaced = [(name, pickled if name.endswith("/data.pkl") else text) for name, text in members]
            found[f"a pickle: {what}"] = _zip(replaced)
        else:
            found[f"a pickle: {what}"] = pickled
    for what, forged in _forged().items():
        with_(f"forged: {what}", beside={"extra": forged})
    return found


def odd_weights(good: Tensor) -> dict[str, Any]:
    """The same numbers as tensors of other kinds, and what is no weight of this shape."""
    rows = torch.ones(len(good), dtype=torch.float64), torch.zeros(len(good), dtype=torch.int64)
    return {
        "sparse": good.to_sparse(),
        "sparse rows": good.flatten(1).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(good, 0.1, 0, torch.qint8),
        "quantised by rows": torch.quantize_per_channel(good, *rows, 0, torch.quint8),
        "nested": torch.nested.nested_tensor(list(good)),
        "complex": good.to(torch.complex64),
        "without values": good.to("meta"),
        "a parameter": nn.Parameter(good),
        "float8": good.to(torch.float8_e4m3fn),
        "bool": good > 0,
        "expanded to 4 TB": torch.zeros(1).expand(10**6, 10**6),
        "one number": good.sum(),
        "no number": good[:0],
        "another shape": good[:1],
        "a number of Python": 1.0,
        "a list": good.tolist(),
        "text": "weights",
        "an array": good.numpy(),
        "complex array": good.numpy().astype(np.complex128),
    }


def _pickles() -> dict[str, bytes]:
    """Opcodes by hand."""
    return {
        "lists in lists": b"\x80\x02" + b"]" * NESTED + b"a" * (NESTED - 1) + b".",
        "tuples in tuples": b"\x80\x02)" + b"\x85" * NESTED + b".",
        "mappings in mappings": b"\x80\x02" + b"}K\1" * NESTED + b"}" + b"s" * NESTED + b".",
        "protocol 9": b"\x80\x09}.",
        "no end": b"\x80\x02}",
        "pops nothing": b"\x80\x020000.",
        "a string of 1 TB": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
        "a number of 1 GB": b"\x80\x02\x8b" + struct.pack("<I", 2**30) + b"abc.",
        "puts at 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
        "an unknown opcode": b"\x80\x02\xff.",
        "a storage of no kind": b"\x80\x02(U\x07storageNNNNtQ.",
    }


def _forged() -> dict[str, Any]:
    """NumPy's dtypes, numbers and arrays with states of which NumPy writes none."""
    scalar, rebuild = (function.__reduce__()[0] for function in (np.float64(0), np.zeros(1)))
    plain, size = (3, "<", None, None, None, -1, -1, 0), 8
    states: dict[str, Any] = {f"item size {size}": (3, "|", None, None, None, size, 1, 0) for size in _SIZES}
    states |= {f"alignment {size}": (3, "|", None, None, None, 8, size, 0) for size in _SIZES}
    states |= {f"flags {flags}": (3, "|", None, None, None, 8, 1, flags) for flags in (1, 63, 255, -1)}
    states |= {"fields": (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 27), "no state": None, "short": (3,)}
    found: dict[str, Any] = {}
    for what, state in states.items():
        for code in ("V8", "f8"):
            dtype = _Built(np.dtype, (code, False, True), state)
            found[f"a dtype {code}, {what}"] = dtype
            found[f"a number of {code}, {what}"] = Bomb(scalar, dtype, bytes(8))
    for code in ("f8", "O", "V1000000", "U9", "M8[ns]"):
        found[f"a number of {code} and 3 bytes"] = Bomb(scalar, np.dtype(code), b"abc")
    for shape in ((2**40,), (-1,), (2**62, 2**62), (3,), ()):
        state = (1, shape, np.dtype("f8"), False, bytes(size))
        found[f"an array of shape {shape} and 8 bytes"] = _Built(rebuild, (np.ndarray, (0,), b"b"), state)
    found["an array of objects"] = _Built(rebuild, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, [plain]))
    return found


_SIZES = (-(2**31), -1, 0, 1, 2**20, 2**31 - 1)


class _Built:
    """Pickles to a call whose result gets a state."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self.call = function, arguments, state

    def __reduce__(self) -> Any:
        return self.call


# --- arrays, images and texts ----------------------------------------------------------------------------------------


def _arrays(sound: Path) -> dict[str, bytes]:
    """The sound archive of NumPy with its first array replaced, by what its header says."""
    with np.load(sound) as archive:
        arrays = dict(archive)
    first, good = max(arrays.items(), key=lambda pair: pair[1].nbytes)
    headers = {
        "says a shape of 8 TB": {"shape": (2**40,)},
        "says a shape of 2^124": {"shape": (2**62, 2**62)},
        "says a negative shape": {"shape": (-1, *good.shape[1:])},
        "says more than there is": {"shape": (10**6, *good.shape[1:])},
        "says no shape": {"shape": None},
        "says objects": {"descr": "|O"},
        "says void": {"descr": "|V3"},
        "says a size of 2 GB": {"descr": "<U536870911"},
        "says code": {"descr": "__import__('os').getcwd()"},
        "says complex": {"descr": "<c16"},
        "says an unknown key": {"more": 1},
    }
    plain = {"descr": np.lib.format.dtype_to_descr(good.dtype), "fortran_order": False, "shape": good.shape}
    changed = {what: _npy({**plain, **said}, good.tobytes()) for what, said in headers.items()}
    changed["a header of 1 MB"] = _npy(plain, good.tobytes(), padding=2**20)
    changed["version 9"] = b"\x93NUMPY\x09\x00" + _npy(plain, good.tobytes())[8:]
    changed["a pickle"] = b"\x80\x04N."
    changed["200 MB of zeros"] = _npy({**plain, "descr": "|u1", "shape": (TOO_LARGE,)}, bytes(TOO_LARGE))
    found = {}
    for what, text in changed.items():
        members = [(f"{name}.npy", text if name == first else _npy_of(array)) for name, array in arrays.items()]
        found[what] = _zip(members, zipfile.ZIP_DEFLATED if len(text) > 2**27 else zipfile.ZIP_STORED)
    found["one array twice"] = _zip(
        [(f"{name}.npy", _npy_of(array)) for name, array in [*arrays.items(), (f"{first}.npy", good)]]
    )
    return found


def _npy(header: dict[str, Any], data: bytes, padding: int = 0) -> bytes:
    text = f"{header!r}".encode() + b" " * (padding + 64) + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + data


def _npy_of(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _pngs(sound: Path) -> dict[str, bytes]:
    """Images that say more than they hold, or are of another format than their name says."""

    def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, colour: int = 2) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
        rows = zlib.compress(bytes(min(height * (width * 3 + 1), 2**16)))
        every = [(b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in every)

    grown = zlib.compress(bytes(TOO_LARGE))
    return {
        "60000 x 60000": png(60_000, 60_000),
        "2147483647 x 1": png(2**31 - 1, 1),
        "0 x 0": png(0, 0),
        "of 16 bits": png(8, 8, bits=16),
        "of no colour type": png(8, 8, colour=5),
        "text of 200 MB": png(8, 8, (b"zTXt", b"note\0\0" + grown)),
        "a profile of 200 MB": png(8, 8, (b"iCCP", b"note\0\0" + grown)),
        "a chunk of 2 GB": sound.read_bytes()[:33] + struct.pack(">I", 2**31 - 1) + b"zTXt" + bytes(100),
        "a GIF of 65535 x 65535": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
        "a BMP of 40000 x 40000": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 40_000, 40_000, 1, 24, *[0] * 6),
        "a TIFF in itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nquit\n",
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _texts(sound: Path) -> dict[str, bytes]:
    """JSON."""
    text = sound.read_text()
    first = text.index(":") + 1
    odd = {
        "lists in lists": "[" * NESTED + "]" * NESTED,
        "a number of 100,000 digits": "1" * 100_000,
        "1e999": "1e999",
        "NaN": "NaN",
        "a lone surrogate": '"\\ud800"',
        "control characters": '"\\u001b[31m\\n| a |"',
        "a text of 70 MB": f'"{"a" * 70 * 2**20}"',
    }
    found = {what: f'{text[:first]} {value}, "more":{text[first:]}'.encode() for what, value in odd.items()}
    found |= {f"{what} alone": value.encode() for what, value in odd.items()}
    found["keys twice"] = (text.rstrip()[:-1] + f", {text.strip()[1:]}").encode()
    return {**found, **_encodings(text)}


def _encodings(text: str) -> dict[str, bytes]:
    return {
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32"),
        "Latin-1": text.encode() + b"\n# \xe9\xff\n",
        "zero bytes": text.encode() + bytes(10),
        "a mark before it": b"\xef\xbb\xbf" + text.encode(),
    }


def _yamls(sound: Path) -> dict[str, bytes]:
    text = sound.read_text()
    laughs = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    merged = "".join(f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 12))
    odd = {
        "anchors that explode": f"l0: &l0 [lol, lol]\n{laughs}",
        "merged keys that explode": f"m0: &m0 {{a: 1}}\n{merged}",
        "a list in itself": "loop: &loop [*loop]\n",
        "a mapping in itself": "loop: &loop {itself: *loop}\n",
        "a mapping merged into itself": "loop: &loop\n  <<: *loop\n",
        "a mapping for a key": "? {a: 1}\n: 2\n",
        "lists in lists": f"deep: {'[' * 10_000}{']' * 10_000}\n",
        "mappings in mappings": "deep:\n" + "".join(f"{' ' * depth}a:\n" for depth in range(1, 3000)),
        "an unknown anchor": "more: *nowhere\n",
        "an unknown tag": "more: !no_such_tag 1\n",
        "a number of 100,000 digits": f"more: {'1' * 100_000}\n",
        "a date that is none": "more: 2025-13-45\n",
        "two documents": "---\nmore: 1\n",
        "control characters": "more: \x01\x1b[31m\n",
        "a tab": "more:\n\t- 1\n",
        "a text of 70 MB": f"more: {'a' * 70 * 2**20}\n",
    }
    found = {what: (text + value).encode() for what, value in odd.items()}
    found |= {f"{what} alone": value.encode() for what, value in odd.items()}
    return {**found, **_encodings(text)}


def odd_names() -> Iterator[bytes]:
    """Names of folders that Linux has and that print or decode badly."""
    yield from (b"\xff\xfe", b"\xed\xa0\x80", b"a\nb", b"\x1b[2J", b"\xe2\x80\xae.gnp", b"| a | b |", b"<b>&amp;", b" ")
    yield b"n" * 200
