"""Files that are small and become large, never end, or are damaged: refused in one line that names them."""

import io
import json
import os
import struct
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from quick_autoattack import batch, consistent_log, network
from torch.utils.data import ConcatDataset, Subset

from ikl_plugins import _limits
from ikl_plugins.commands import data as command
from ikl_plugins.robustbench import Evaluation, evaluate, load_images
from ikl_plugins.robustbench.evaluation.corruptions import corruption_source
from ikl_plugins.robustbench.evaluation.external import read_external
from ikl_plugins.robustbench.evaluation.log import write_log
from ikl_plugins.robustbench.host_data import host_images
from ikl_plugins.robustbench.torchdistill_data import _path

IMAGES, LABELS = np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1])


def npy(shape, kind="|u1", content=b"", version=b"\x01\x00"):
    """An .npy file that says what its header is told to."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + content


def npz(path, image, how=zipfile.ZIP_STORED, change=lambda content: content):
    """An .npz file with this as its image, and with its bytes changed."""
    label = io.BytesIO()
    np.save(label, LABELS)
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("image.npy", image)
        archive.writestr("label.npy", label.getvalue())
    path.write_bytes(change(path.read_bytes()))
    return path


def stating(size):
    """Lets a zip state another size of its first member."""

    def change(content):
        place = content.index(b"PK\x01\x02")
        return content[: place + 24] + struct.pack("<I", size) + content[place + 28 :]

    return change


def flag(bit):
    """Sets a bit of the flags of the first member, in both of its headers."""

    def change(content):
        place = content.index(b"PK\x01\x02")
        flags = struct.pack("<H", bit)
        return content[:6] + flags + content[8 : place + 8] + flags + content[place + 10 :]

    return change


def future(content):
    place = content.index(b"PK\x01\x02")
    return content[: place + 6] + b"\xff\x00" + content[place + 8 :]


def cut(content):
    return content[:60] + b"\xff" * 9 + content[69:]


GOOD = npy((2, 8, 8, 3), content=IMAGES.tobytes())
# The image of an .npz file, how it is packed and changed -> why it is refused.
NPZ = {
    "terabytes in the header": (npy((10**12, 8, 8, 3)), {}, "smaller than its shape"),
    "beyond int64": (npy((2**40, 2**40, 8, 3)), {}, "smaller than its shape"),
    "negative": (npy((-1, 8, 8, 3)), {}, r"the shape \(-1"),
    "terabytes in the directory": (GOOD, {"change": stating(2**32 - 2)}, "smaller than its shape|ARRAY_BYTES"),
    "deflated, and stating more": (
        npy((2**31, 1, 1, 1)),
        {"how": zipfile.ZIP_DEFLATED, "change": stating(2**31 + 200)},
        "smaller than its shape",
    ),
    "lzma": (GOOD, {"how": zipfile.ZIP_LZMA}, "compressed in a way that NumPy has not"),
    "bz2": (GOOD, {"how": zipfile.ZIP_BZIP2}, "compressed in a way that NumPy has not"),
    "encrypted": (GOOD, {"change": flag(1)}, "encrypted"),
    "of a future version": (GOOD, {"change": future}, "version"),
    "damaged": (GOOD, {"how": zipfile.ZIP_DEFLATED, "change": cut}, "reading it gave"),
    "nested header": (GOOD[:10] + b"(" * 117 + b"\n", {}, "reading it gave"),
    "header of another type": (GOOD[:10] + b"{1: 2, 'a': 3}".ljust(117) + b"\n", {}, "reading it gave"),
    "npy of version 3": (npy((2, 8, 8, 3), version=b"\x03\x00"), {}, "version"),
}


@pytest.mark.parametrize("name", NPZ)
def test_an_npz_that_grows_or_is_damaged_is_refused(name, tmp_path):
    image, options, reason = NPZ[name]
    path = npz(tmp_path / "a.npz", image, **options)
    assert path.stat().st_size < 3000
    with pytest.raises(ValueError, match=rf"load_images: .*a\.npz must .*({reason})"):
        load_images(path)


def test_the_caps_of_arrays_and_archives_can_be_set(tmp_path, monkeypatch):
    path = npz(tmp_path / "a.npz", GOOD, zipfile.ZIP_DEFLATED)
    assert len(load_images(path)) == 2
    for name in ("ARRAY_BYTES", "ARCHIVE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setenv(f"IKL_PLUGINS_MAX_{name}", "500")
            with pytest.raises(
                _limits.LimitError, match=rf"a\.npz must unpack to at most 500 .* IKL_PLUGINS_MAX_{name} "
            ):
                load_images(path)


def test_a_batch_file_that_grows_is_refused(tmp_path):
    model = network()
    images, labels = batch(model, 4)
    log = tmp_path / "evaluation.json"
    evaluate(model, images, labels, eps="8/255", attacks=["apgd-ce"], log=log, progress=False)
    (path,) = (tmp_path / "evaluation_adversarial").glob("natural-*.npz")
    with np.load(path) as content:
        kept = dict(content)
    np.savez(path, **{name: kept[name] for name in kept if name != "predictions"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("predictions.npy", npy((10**12,), "<i8"))
    with pytest.raises(ValueError, match=rf"{path.name} must be the file of a batch, but is damaged .*smaller than"):
        Evaluation.load(log)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy((10**9, 3)), "be whole, but is smaller than its shape"),
        (npy((10**12, 3)), "unpack to at most .* bytes of arrays"),
        (b"text", "be an array that NumPy has saved"),
        (None, "be a regular file, but is a FIFO"),
    ],
)
def test_corrupted_images_are_judged_before_robustbench_reads_them(content, reason, tmp_path):
    source = corruption_source("evaluate_corruptions", "cifar10", "corruptions", tmp_path)
    root = tmp_path / "CIFAR-10-C"
    root.mkdir()
    for name in ("labels", *source.corruptions):
        np.save(root / f"{name}.npy", LABELS)
    source.check_files(offline=True)
    path = root / f"{source.corruptions[1]}.npy"
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"evaluate_corruptions: .*{path.name} must {reason}"):
        source.check_files(offline=True)


def png(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(png(60000, 60000)), "must have at most 100,000,000 pixels, got 3,600,000,000"),
        (lambda path: path.write_bytes(png(12000, 10000)), "must have at most 100,000,000 pixels, got 120,000,000"),
        (os.mkfifo, "must be a regular file, but is a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "must be a regular file, but is a device"),
        (lambda path: path.write_bytes(png(8, 8)), "must be readable"),
        (lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS"), "must be readable, but .* cannot identify"),
    ],
)
def test_an_image_that_grows_or_never_ends_is_refused(make, reason, tmp_path, monkeypatch):
    (tmp_path / "images" / "a").mkdir(parents=True)
    make(tmp_path / "images" / "a" / "x.png")
    with pytest.raises(ValueError, match=f"load_images: .*{reason}"):
        load_images(tmp_path / "images")


def test_files_of_a_host_are_judged_before_it_reads_them(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "large.png").write_bytes(png(60000, 60000))
    for name, reason in (("fifo.png", "is a FIFO"), ("large.png", "got 3,600,000,000")):
        host = SimpleNamespace(positions=lambda: [0], name="x", file=lambda _, name=name: str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"images_of: .*{name}.*{reason}"):
            host_images("images_of", host, None, progress=False)


class Folder(SimpleNamespace):
    """A data set of files."""

    def __len__(self):
        return len(self.samples)


def test_files_of_torchdistills_sets_are_found_inside_their_wrappers():
    one, two = (Folder(samples=[(f"{name}{number}", 0) for number in range(3)]) for name in "ab")
    both = ConcatDataset([one, two])
    assert [_path(both, position) for position in (0, 2, 3, 5)] == ["a0", "a2", "b0", "b2"]
    assert _path(Subset(SimpleNamespace(org_dataset=two), [2, 0]), 1) == "b0"
    assert _path(Folder(samples=[1.0]), 0) is None
    assert _path(SimpleNamespace(), 0) is None


def test_a_log_or_record_of_absurd_size_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    write_log(consistent_log(), path)
    assert Evaluation.load(path).finished
    monkeypatch.setenv("IKL_PLUGINS_MAX_TEXT_BYTES", "1000")
    with pytest.raises(ValueError, match=r"evaluation\.json must have at most 1,000 bytes, got .*MAX_TEXT_BYTES"):
        Evaluation.load(path)
    with pytest.raises(ValueError, match=r"evaluation\.json .*must have at most 1,000 bytes"):
        read_external("submit", path)


def cifar(path, name="train/cat/a.png", how=zipfile.ZIP_STORED, change=lambda content: content):
    content = png(8, 8)
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr(name, content)
        for label in command.CIFAR10_CLASSES:
            for split in ("train", "test"):
                archive.writestr(f"{split}/{label}/z.png", content)
    path.write_bytes(change(path.read_bytes()))
    return path


def damaged(content):
    return content[:60] + bytes(byte ^ 0x5A for byte in content[60:90]) + content[90:]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"how": zipfile.ZIP_LZMA, "change": damaged}, "must be a whole zip archive, but"),
        ({"how": zipfile.ZIP_BZIP2, "change": damaged}, "must be a whole zip archive, but"),
        ({"how": zipfile.ZIP_DEFLATED, "change": damaged}, "must be a whole zip archive, but"),
        ({"change": future}, "must be a whole zip archive, but .*version"),
        ({"change": flag(1)}, "is encrypted"),
        ({"name": "train/cat/\xe9.png", "change": lambda c: c.replace("é".encode(), b"\xff\xfe")}, "but .*decode"),
        ({"name": "train/cat/\x1b[31m\n.png"}, r"`train/cat/\\x1b\[31m\\n\.png` has control characters"),
        ({"name": "train/cat/\u202egnp.png"}, "has control characters"),
        ({"change": stating(2**32 - 2)}, "too many for a 32x32 image"),
    ],
)
def test_an_archive_of_images_that_grows_or_is_damaged_is_refused(options, reason, tmp_path):
    path = cifar(tmp_path / "a.zip", **options)
    with pytest.raises(ValueError, match=rf"ikl data: .*a\.zip.*{reason}"):
        command.prepare_cifar10_folder([path], tmp_path / "data", val_images=1, progress=False)
    assert not (tmp_path / "data" / "cifar10").exists()


def test_kinds_of_files_and_manifests_of_data(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.zip")
    with pytest.raises(ValueError, match=r"fifo\.zip must be a regular file, but is a FIFO"):
        command.prepare_cifar10_folder([tmp_path / "fifo.zip"], tmp_path)
    path = cifar(tmp_path / "a.zip")
    monkeypatch.setenv("IKL_PLUGINS_MAX_ARCHIVE_BYTES", "99")
    with pytest.raises(ValueError, match=r"a\.zip must unpack to at most 99 bytes"):
        command.prepare_cifar10_folder([path], tmp_path)
    (tmp_path / "cifar10").mkdir()
    for content in ("[]", "{}", json.dumps({"splits": 1}), "[" * 100000, "\udcff"):
        (tmp_path / "cifar10" / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"manifest\.json is damaged .*Pass --force"):
            command.prepare_cifar10_folder([path], tmp_path)
