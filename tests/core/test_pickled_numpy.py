"""NumPy's values in checkpoints: what NumPy writes is read as NumPy reads it, what is forged is refused in one line."""

import argparse
import collections
import json
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ikl_plugins.checkpoints import load_content

pytestmark = pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="needs torch 2.5 or newer")
CODES = ("f8", ">f4", "f2", "i1", ">i8", "u4", "?", "c16", "U3", "S4", "g")


def arrays():
    numbers = np.arange(6).reshape(2, 3)
    made = {code: np.asarray(numbers.astype(np.dtype(code).newbyteorder("=")), dtype=code) for code in CODES}
    shapes = {"empty": np.empty((0, 4)), "no axis": np.array(2.5), "Fortran": np.asfortranarray(numbers)}
    return {**made, **shapes, "view": numbers[:, ::2]}


def test_arrays_numbers_and_dtypes_are_read_as_numpy_has_written_them(tmp_path):
    sound = {
        "arrays": arrays(),
        "numbers": [
            np.float32(1.5),
            np.int64(3),
            np.bool_(True),
            np.complex128(1 + 2j),
            np.str_("ab"),
            np.bytes_(b"c"),
        ],
        "dtypes": (np.dtype("f4"), [np.dtype(">i2")]),
        "namespace": argparse.Namespace(lr=np.float64(0.1), mean=np.ones(3)),
    }
    sound["again"] = sound["arrays"]["f8"]
    torch.save(sound, tmp_path / "sound.pth")
    found = load_content(tmp_path / "sound.pth")
    for name, array in sound["arrays"].items():
        read = found["arrays"][name]
        assert type(read) is np.ndarray
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)
        read[...] = read  # may be written to, as NumPy's own
    assert found["numbers"] == sound["numbers"]
    assert list(map(type, found["numbers"])) == list(map(type, sound["numbers"]))
    assert found["dtypes"] == sound["dtypes"]
    assert found["namespace"].lr == 0.1
    assert type(found["namespace"].mean) is np.ndarray
    assert found["again"] is found["arrays"]["f8"]
    assert not [entry for entry in torch.serialization.get_safe_globals() if "numpy" in str(entry)]


class Forged:
    """Pickles to a call of a function of NumPy, and a state of the result."""

    def __init__(self, function, arguments, state=None):
        self.reduced = function, arguments, *(() if state is None else (state,))

    def __reduce__(self):
        return self.reduced


def dtype(code="f8", state=None, *more):
    return Forged(np.dtype, (code, False, True, *more), state)


rebuild, _, plain = np.ones(2).__reduce__()
scalar = np.float64(1).__reduce__()[0]


def array(state, first=(np.ndarray, (0,), b"b")):
    return Forged(rebuild, first, state)


FORGED = {
    "an item size below 0": dtype("U1", (3, "<", None, None, None, -(2**31), 4, 8)),
    "an item size of its own": dtype("f8", (3, "<", None, None, None, 4096, 8, 0)),
    "flags": dtype("f8", (3, "<", None, None, None, -1, -1, 63)),
    "a subarray": dtype("f8", (3, "<", (np.dtype("f8"), (2**40,)), None, None, -1, -1, 0)),
    "fields": dtype("f8", (3, "<", None, ("a",), {"a": (np.dtype("f8"), 2**40)}, -1, -1, 0)),
    "metadata": dtype("f8", (4, "<", None, None, None, -1, -1, 0, {})),
    "no state of a dtype": dtype("f8", {"a": 1}),
    "objects": dtype("O8", (3, "|", None, None, None, -1, -1, 63)),
    "a structure": dtype("f8,f8"),
    "void": dtype("V9999"),
    "a huge text": dtype("U999999999"),
    "a code that is none": dtype("no such"),
    "an aligned dtype": Forged(np.dtype, ("f8", True, True)),
    "bytes too few": array((1, (4,), np.dtype("f8"), False, bytes(8))),
    "bytes too many": array((1, (1,), np.dtype("f8"), False, bytes(16))),
    "terabytes": array((1, (2**43,), np.dtype("f8"), False, b"")),
    "lengths that wrap": array((1, (2**33, 2**33), np.dtype("f8"), False, b"")),
    "a length below 0": array((1, (-1,), np.dtype("f8"), False, bytes(8))),
    "no dtype": array((1, (1,), "f8", False, bytes(8))),
    "objects of an array": array((1, (1,), np.dtype("f8"), False, [1])),
    "an old state": array(((1,), np.dtype("f8"), False, bytes(8))),
    "no state": array(None),
    "another class": array(plain, (np.recarray, (0,), b"b")),
    "a call of ndarray": Forged(np.ndarray, ((2**40,),)),
    "a number too short": Forged(scalar, (np.dtype("f8"), b"\0")),
    "a number of words": Forged(scalar, (np.dtype("f8"), "words")),
    "a number without a dtype": Forged(scalar, ("f8", bytes(8))),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_is_forged_is_refused_in_one_line(case, tmp_path):
    path = tmp_path / "forged.pth"
    torch.save({"x": FORGED[case]}, path, pickle_protocol=2)
    with pytest.raises(
        ValueError, match=r"^load_content: the checkpoint .*forged\.pth must (be|hold) .*\.$"
    ) as refused:
        load_content(path)
    assert len(str(refused.value).splitlines()) == 1


def text(words):
    return b"X" + struct.pack("<I", len(words)) + words


NAMES = (
    *("numpy dtype", "numpy ndarray", "argparse Namespace", "mmengine.logging.history_buffer HistoryBuffer"),
    *("numpy._core.multiarray scalar", "numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar"),
    *("__builtin__ getattr", "_codecs encode", "collections OrderedDict"),
)
PIECES = [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in NAMES]
PIECES += map(text, (b"f8", b"U3", b"O8", b"<", b"|", b"latin1", b"min", bytes(8)))
PIECES += [b"J" + struct.pack("<i", value) for value in (0, 1, 3, -1, 8, 12, -(2**31), 2**31 - 1)]
# Opcodes: None, booleans, containers, what fills them, what keeps and repeats a value, and thrice a call, a state.
PIECES += [bytes([code]) for code in b"N\x88\x89)]}(t\x85\x86\x87asue" + b"RRRbbb\x81"]
PIECES += [code + bytes([slot]) for code in (b"q", b"h") for slot in range(3)]
DTYPE = PIECES[0] + text(b"f8") + b"\x89\x88\x87R"


def forged_bytes(generator):
    """A file as old torch.save writes it, with a program of random opcodes around NumPy's names."""
    size = struct.pack("<i", generator.choice((-1, 8, -(2**31), 2**20)))
    state = b"(K\x03" + text(b"<") + b"NNNJ" + size + b"J\xff\xff\xff\xffK\x00t"
    likely = (DTYPE, DTYPE + state + b"b")
    steps = [
        generator.choice(generator.choice((likely, PIECES, PIECES, PIECES))) for _ in range(generator.randint(1, 14))
    ]
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + b"\x80\x02" + b"".join(steps) + b"." + pickle.dumps([], 2)


def fuzz(folder, seed, count):
    """Reads so many forged files, and prints how many were read and refused."""
    generator, kinds = random.Random(int(seed)), collections.Counter()
    for number in range(int(count)):
        path = Path(folder, f"{number % 8}.pth")
        path.write_bytes(forged_bytes(generator))
        try:
            repr(load_content(path))
            kinds["read"] += 1
        except ValueError as error:
            kinds["refused" if len(str(error).splitlines()) == 1 else "refused in lines"] += 1
    print(json.dumps(kinds))


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_forged_programs_neither_end_the_process_nor_run_code(count, tmp_path):
    # A process of its own, as what is looked for ends one.
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(random.randrange(2**32)), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (command, done.stderr[-2000:])
    kinds = json.loads(done.stdout)
    assert kinds.keys() == {"read", "refused"}
    assert sum(kinds.values()) == count
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pth"] * 8


if __name__ == "__main__":
    fuzz(*sys.argv[1:])
