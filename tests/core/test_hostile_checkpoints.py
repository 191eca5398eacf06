"""Checkpoints that are small and ask for much: each is refused in one line, in bounded time, before it is unpacked."""

import functools
import io
import json
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from ikl_plugins import checkpoints
from ikl_plugins.checkpoints import load_content

pytestmark = pytest.mark.skipif(not checkpoints.READS_WEIGHTS_ONLY, reason="needs torch 2.6 or newer")
TERA = 2**40


def saved(content, **options):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, buffer, **options)
    return buffer.getvalue()


legacy = functools.partial(saved, _use_new_zipfile_serialization=False)
PLAIN = saved({"weight": torch.ones(7)})


def rezipped(change=lambda archive: None, method=zipfile.ZIP_STORED, **records):
    """A sound checkpoint with other records, written by another program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(PLAIN)) as sound, zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        found = {name: sound.read(name) for name in sound.namelist()}
        found |= {f"archive/{name.replace('_', '.')}": content for name, content in records.items()}
        for name, content in found.items():
            archive.writestr(name, content)
        change(archive)
    return buffer.getvalue()


def program(*opcodes):
    """A checkpoint with a pickle by hand."""
    return rezipped(data_pkl=b"\x80\x02" + b"".join(opcodes) + b".")


def declaring(length, content):
    """A pickle of 7 numbers which says that they are ``length``."""
    assert content.count(b"K\x07") == 2  # of the storage and of the shape
    return content.replace(b"K\x07", b"\x8a\x06" + length.to_bytes(6, "little"))


def declared(length):
    with zipfile.ZipFile(io.BytesIO(PLAIN)) as archive:
        return rezipped(data_pkl=declaring(length, archive.read("archive/data.pkl")))


def setting(**fields):
    """Changes what an archive declares of its members."""

    def change(archive):
        for info in archive.filelist:
            for name, value in fields.items():
                setattr(info, name, value)

    return change


def overlapping(archive):
    (first,) = (info for info in archive.filelist if info.file_size == 2**20)
    for number in range(300):
        entry = zipfile.ZipInfo(f"archive/data/{number + 2}")
        entry.file_size = entry.compress_size = first.file_size
        entry.CRC, entry.header_offset = first.CRC, first.header_offset
        archive.filelist.append(entry)


def got(slot):
    return b"h" + bytes([slot])


def wide_tuple(depth):
    """Tuples that hold the one before twice."""
    return b")" + b"".join(b"q" + bytes([slot]) + got(slot) + b"\x86" for slot in range(depth))


def wide_list(depth):
    """Lists that hold the next one twice, the outermost filled first."""
    made = b"".join(b"]q" + bytes([slot]) for slot in range(depth))
    return made + b"".join(got(slot - 1) + b"(" + 2 * got(slot) + b"e" for slot in range(1, depth)) + got(0)


def checkpoint_in_itself():
    content = {"state_dict": {"weight": torch.ones(2)}}
    content["ema"] = {"inner": content}
    return saved(content)


def expanded_indices():
    indices = torch.zeros(1, 1, dtype=torch.long).expand(1, 2**33)
    return saved(torch.sparse_coo_tensor(indices, torch.zeros(1).expand(2**33), (9,), check_invariants=False))


def sparse_and_code():
    """torch looks at sparse tensors at the end of a reading, or, if that fails, of the next one."""
    indices = torch.full((1, 1), 5)
    return saved([torch.sparse_coo_tensor(indices, torch.ones(1), (2,), check_invariants=False), Code()])


class Code:
    def __reduce__(self):
        return sys.exit, ()


def nested():
    return saved(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def safetensors(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def shaped(shape, end):
    return safetensors({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})


HUGE = b"\x8a\x06" + TERA.to_bytes(6, "little")
SAVED = "must be one of torch.save, but reading it gave: "
BYTES, GROWTH, VALUES = (f"Set IKL_PLUGINS_MAX_CHECKPOINT_{name} if you" for name in ("BYTES", "GROWTH", "VALUES"))
SAFE = "must be one of safetensors, but reading it gave: "
# what is asked for: the file, what the refusal says
ASKS = {
    "195 KB that become 200 MB": (
        lambda: rezipped(method=zipfile.ZIP_DEFLATED, data_1=bytes(200_000_000)),
        "must unpack to at most 134,217,728 bytes beyond its own size, got 199,",
    ),
    "terabytes that are declared": (lambda: rezipped(setting(file_size=TERA)), BYTES),
    "a record under many names": (lambda: rezipped(overlapping, data_1=bytes(2**20)), GROWTH),
    "an expanded tensor": (lambda: saved(torch.zeros(1).expand(2**36)), BYTES),
    "one in the old format": (lambda: legacy({"a": torch.zeros(1).expand(2**30)}), GROWTH),
    "an expanded parameter": (lambda: saved(torch.nn.Parameter(torch.zeros(1).expand(2**30))), GROWTH),
    "expanded indices": (expanded_indices, BYTES),
    "a wrong sparse tensor and code": (sparse_and_code, "would run code: GLOBAL sys.exit"),
    "many views": (lambda: saved(views()), GROWTH),
    "a storage beyond its record": (lambda: declared(TERA), SAVED + "a tensor of 4,398,046,511,104 bytes, for which"),
    "a storage a little beyond": (lambda: declared(8), SAVED + "a tensor of 32 bytes, for which the file has 28"),
    "a storage beyond an old file": (
        lambda: declaring(TERA, legacy({"weight": torch.ones(7)})),
        SAVED + "tensors of 4,",
    ),
    "a tensor of a size": (lambda: program(b"ctorch\nFloatTensor\n", HUGE, b"\x85R"), SAVED + "a call of torch.Float"),
    "bytes of a size": (lambda: program(b"cbuiltins\nbytearray\n", HUGE, b"\x85R"), SAVED + "a call of builtins.byte"),
    "a deep tuple as a key": (lambda: program(b"})", b"\x85" * 10**6, b"Ns"), SAVED + "values nested more than 100"),
    "a wide tuple as a key": (lambda: program(b"}", wide_tuple(60), b"Ns"), SAVED + "a tuple of 33554430 values, over"),
    "a call of a wide list": (lambda: program(wide_list(60), b")R"), SAVED + "a call of what is no function"),
    "a dtype of a wide list": (
        lambda: program(wide_list(60), b"cnumpy\ndtype\n", got(0), b"\x85R"),
        SAVED + "numpy.dtype of [[",
    ),
    "a wide list": (lambda: program(wide_list(60)), VALUES),
    "a deep list": (lambda: program(b"]" * 20_000, b"a" * 19_999), SAVED + "values nested more than 100 deep"),
    "a list in itself": (lambda: program(b"]q\0h\0a"), SAVED + "a value that holds itself"),
    "a checkpoint in itself": (checkpoint_in_itself, SAVED + "a value that holds itself"),
    "a nested tensor": (nested, "nested"),
    "LZMA": (lambda: rezipped(method=zipfile.ZIP_LZMA), SAVED + "an archive compressed by method 14"),
    "bzip2": (lambda: rezipped(method=zipfile.ZIP_BZIP2), SAVED + "an archive compressed by method 12"),
    "an encrypted archive": (lambda: rezipped(setting(flag_bits=1)), SAVED + "an encrypted archive"),
    "a zip of the future": (lambda: rezipped(setting(extract_version=99)), SAVED + "zip file version 9.9"),
    "a format of the future": (
        lambda: rezipped(version=b"99\n"),
        SAVED + "Attempted to read a PyTorch file with version",
    ),
    "one name twice": (lambda: rezipped(DATA_PKL=b"}."), SAVED + "an archive with a comment, or with one name twice"),
    "a tar": (lambda: b"storages".ljust(257, b"\0") + b"ustar\00000".ljust(800, b"\0"), SAVED),
    "a web page": (lambda: b"\n<!DOCTYPE html><html>", "must be one of torch.save, but it is a web page. It may be"),
    "control characters": (
        lambda: program(b"cos\x1b[31m\xe2\x80\xae\n", b"x" * 9000, b"\n"),
        "would run code: GLOBAL os\\x1b[31m\\u202e.xxx",
    ),
    "a.safetensors, a huge header": (lambda: struct.pack("<Q", 2**62) + b"{}", SAFE),
    "a.safetensors, a huge shape": (lambda: shaped([TERA, TERA], 4), SAFE),
    "a.safetensors, bytes that are not there": (lambda: shaped([TERA], 4 * TERA), SAFE),
}


def views():
    whole = torch.zeros(2**20)
    return [whole[start:] for start in range(64)]


def outcome(path):
    begin = time.perf_counter()
    try:
        load_content(path)
        what = "read"
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else type(error).__name__
    return what, time.perf_counter() - begin


def read_all(folder):
    """Prints what each file gives, and after each whether a sound one is still read."""
    sound = Path(folder, "sound.pth")
    sound.write_bytes(PLAIN)
    for case, (make, _) in ASKS.items():
        path = Path(folder, case.split(",")[0] if ".safe" in case else "hostile.pth")
        path.write_bytes(make())
        print(json.dumps([case, *outcome(path), outcome(sound)[0]]), flush=True)
        path.unlink()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    # A process of its own, which some of these have ended.
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(rows)) == (0, len(ASKS)), (rows[-1:], done.stderr[-1500:])
    return {case: others for case, *others in rows}


@pytest.mark.parametrize("case", ASKS)
def test_what_asks_for_much_is_refused_in_one_line(case, outcomes):
    what, seconds, sound_one = outcomes[case]
    assert ASKS[case][1] in what
    assert what.startswith("load_content: ")
    assert ("a.safetensors" if ".safe" in case else "hostile.pth") in what
    assert what.isprintable()
    assert len(what) < 600
    assert seconds < 20
    assert sound_one == "read"


@pytest.mark.parametrize("form", [saved, legacy])
def test_what_is_shared_or_repeated_in_bounds_is_read(form, tmp_path):
    whole = torch.zeros(2**16)
    tied = {f"tied{number}": whole for number in range(1000)}  # 250 MB if each were one of its own
    expanded = {"expanded": torch.ones(1).expand(2**20), "halves": [whole[: 2**15], whole[2**15 :]]}
    sparse = torch.eye(3).to_sparse()
    kinds = {"sparse": sparse, "complex": torch.ones(2, dtype=torch.cfloat), "meta": torch.ones(2, device="meta")}
    content = {**tied, **expanded, **kinds, "again": [[1, 2]] * 1000, 5: (None, {"deep": [[[[[[[[[[1]]]]]]]]]]})}
    (tmp_path / "sound.pth").write_bytes(form(content))
    found = load_content(tmp_path / "sound.pth")
    assert found["tied7"].data_ptr() == found["tied8"].data_ptr()
    assert found["expanded"].stride() == (0,)
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))


def test_a_cap_is_set_in_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "expanded.pth"
    path.write_bytes(saved(torch.zeros(1).expand(2**20)))
    load_content(path)
    monkeypatch.setenv("IKL_PLUGINS_MAX_CHECKPOINT_GROWTH", "100000")
    with pytest.raises(ValueError, match=r"expanded\.pth must unpack to at most 100,000 bytes beyond its own size"):
        load_content(path)
    monkeypatch.setenv("IKL_PLUGINS_MAX_CHECKPOINT_GROWTH", "10_000_000")
    with pytest.raises(ValueError, match="IKL_PLUGINS_MAX_CHECKPOINT_GROWTH must be a whole number"):
        load_content(path)


if __name__ == "__main__":
    read_all(sys.argv[1])
