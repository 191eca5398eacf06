"""ikl_plugins.robustbench.data: images from RobustBench's data sets, class folders and .npz files."""

import dataclasses
import hashlib
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from quick_autoattack import write_imagenet
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import CenterCrop, Compose, Grayscale, Resize, ToTensor

from ikl_plugins._robustbench_import import import_robustbench
from ikl_plugins.robustbench.data import content_sha256, file_sha256, load_images
from ikl_plugins.robustbench.evaluation.log import data_facts
from ikl_plugins.robustbench.known_sets import KNOWN, KnownSet

robustbench = import_robustbench()
BenchmarkDataset = robustbench.data.BenchmarkDataset

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def message(text):
    return pytest.raises(ValueError, match=re.escape(text))


def save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- class folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Five images of `cat`, two of `dog`, three of `owl`."""
    for label, count in (("cat", 5), ("dog", 2), ("owl", 3)):
        for number in range(count):
            save_image(tmp_path / "images" / label / f"{number}.png", noise(8, 6, 3, seed=100 * count + number))
    return tmp_path / "images"


def test_a_class_folder_is_read_in_the_order_of_its_names(folder):
    found = load_images(folder)
    assert found.files == tuple(
        [f"cat/{n}.png" for n in range(5)] + [f"dog/{n}.png" for n in range(2)] + [f"owl/{n}.png" for n in range(3)]
    )
    assert found.labels.tolist() == [0] * 5 + [1] * 2 + [2] * 3
    assert found.labels.dtype == torch.int64
    assert found.classes == ("cat", "dog", "owl")
    assert (found.name, found.preprocessing, len(found)) == (str(folder), None, 10)
    pixels = [np.asarray(Image.open(folder / name)) for name in found.files]
    expected = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images, expected)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1, 0, 0]), (3, [1, 1, 1]), (5, [2, 2, 1]), (8, [3, 2, 3]), (10, [5, 2, 3])]
)
def test_some_images_of_a_folder_come_from_all_classes(folder, count, expected):
    found = load_images(folder, n_examples=count)
    assert torch.bincount(found.labels, minlength=3).tolist() == expected
    assert list(found.files) == sorted(found.files)
    assert torch.equal(found.images, load_images(folder, n_examples=count).images)


def test_grey_images_become_three_channels_or_one(tmp_path):
    mmcv = pytest.importorskip("mmcv")
    pixels = noise(4, 4)
    save_image(tmp_path / "a" / "0.png", pixels)
    save_image(tmp_path / "a" / "1.png", np.repeat(pixels[..., None], 3, axis=2))
    expected = torch.from_numpy(pixels / np.float32(255))
    assert torch.equal(load_images(tmp_path).images, expected.expand(2, 3, 4, 4))
    # What torchvision's Grayscale and MMCV's color_type="grayscale" make of such files.
    found = load_images(tmp_path, channels=1).images
    for number in range(2):
        file = str(tmp_path / "a" / f"{number}.png")
        assert torch.equal(found[number], ToTensor()(Grayscale()(pil_loader(file))))
        assert np.array_equal(found[number].mul(255).round().numpy().squeeze(0), mmcv.imread(file, "grayscale"))
    with message("`channels` must be 3, those of"):
        load_images(tmp_path, channels=2)
    save_image(tmp_path / "a" / "2.png", noise(4, 4, 3))
    with message(f"with channels=1 images must be grey, but {tmp_path / 'a' / '2.png'} has colour"):
        load_images(tmp_path, channels=1)


def png(path, depth, color_type, row, extra=b""):
    """A PNG of one row of two pixels, which Pillow itself would not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 2, 1, depth, color_type, 0, 0, 0)
    row = zlib.compress(b"\0" + bytes(row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", row) + chunk(b"IEND", b""))


COLOURS = Image.fromarray(noise(6, 5, 3))
GREY = COLOURS.getchannel(0)
DEEP = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (6, 5)).astype(np.uint16))
CLEAR = Image.merge("RGBA", (*COLOURS.split(), GREY))
PALETTE = COLOURS.quantize(8)
FRAMES = {"save_all": True, "append_images": [COLOURS.transpose(Image.Transpose.ROTATE_180)]}
# Each file, and what its refusal says; None for one that both hosts decode to the same bytes.
KINDS = {
    "grey.png": (GREY, {}, None),
    "grey.jpg": (GREY, {}, None),
    "one_bit.png": (GREY.point(lambda level: 255 * (level > 128), "1"), {}, None),
    "grey_alpha.png": (Image.merge("LA", (GREY, COLOURS.getchannel(1))), {}, None),
    "alpha.png": (CLEAR, {}, None),
    "alpha.webp": (CLEAR, {"lossless": True}, None),
    "palette.png": (PALETTE, {}, None),
    "clear_palette.png": (PALETTE, {"transparency": bytes([0, 128, 255, 3, 4, 5, 6, 7])}, None),
    "clear_colour.png": (COLOURS, {"transparency": COLOURS.getpixel((0, 0))}, None),
    "palette.bmp": (PALETTE, {}, None),
    "colours.jpg": (COLOURS.resize((37, 23)), {"quality": 75, "subsampling": 2, "progressive": True}, None),
    "lossy.webp": (COLOURS.resize((37, 23)), {"quality": 75}, None),
    "frames.png": (COLOURS, FRAMES, None),
    "frames.webp": (COLOURS, {**FRAMES, "lossless": True}, None),
    "frames.tiff": (COLOURS, FRAMES, None),
    "colours.ppm": (COLOURS, {}, None),
    "upright.jpg": (COLOURS, {"orientation": 1}, None),
    "turned.tiff": (COLOURS, {"orientation": 6}, None),
    "turned.jpg": (COLOURS, {"orientation": 6}, "has an Exif orientation, which MMCV alone follows. Turn it with"),
    "mirrored.jpg": (COLOURS, {"orientation": 2}, "has an Exif orientation"),
    "turned.png": (COLOURS, {"orientation": 8}, "has an Exif orientation"),
    "turned.webp": (COLOURS, {"orientation": 3, "lossless": True}, "has an Exif orientation"),
    "deep.png": (DEEP, {}, "is PNG of mode I;16. Save it as 8-bit RGB or grey PNG in a copy of the folder."),
    "deep.tiff": (DEEP, {}, "is TIFF of mode I;16, 16 bits"),
    "floats.tiff": (GREY.convert("F"), {}, "is TIFF of mode F, 32 bits"),
    "alpha.tiff": (CLEAR, {}, "is TIFF of mode RGBA"),
    "ink.jpg": (COLOURS.resize((37, 23)).convert("CMYK"), {}, "is JPEG of mode CMYK"),
    "lab.tiff": (COLOURS.convert("LAB"), {}, "is TIFF of mode LAB"),
    "two_levels.pgm": (b"P5 2 1 100\n\x0a\x64", {}, "has other levels than bytes"),
    "deep.ppm": (b"P6 1 1 65535\n\x0a\x14\xc8\x1e\x01\x02", {}, "has other levels than bytes"),
    "four_bits.png": ((4, 0, [0x1F]), {}, None),
    "deep_colours.png": ((16, 2, [0, 255, 1, 255, 2, 128, 3, 127, 254, 255, 100, 200]), {}, None),
    "deep_alpha.png": ((16, 4, range(1, 9)), {}, None),
    "gamma.png": ((8, 2, range(10, 70, 10), b"\0\0\0\4gAMA\0\1\x86\xa01\xe8\x96_"), {}, None),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency expressed in bytes:UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_read_as_both_hosts_read_it_or_refused_by_name(tmp_path, name):
    mmcv = pytest.importorskip("mmcv")
    source, options, refusal = KINDS[name]
    path = tmp_path / "a" / name
    path.parent.mkdir()
    if isinstance(source, bytes):
        path.write_bytes(source)
    elif isinstance(source, tuple):
        png(path, *source)
    else:
        if "orientation" in options:
            exif = Image.Exif()
            exif[0x0112] = options["orientation"]
            options = {**{key: value for key, value in options.items() if key != "orientation"}, "exif": exif}
        source.save(path, **options)
    theirs = np.asarray(pil_loader(str(path)))
    mmcvs = mmcv.imread(str(path)) if name != "floats.tiff" else None  # which MMCV cannot read at all
    alike = mmcvs is not None and theirs.shape == mmcvs.shape and np.array_equal(theirs, mmcvs[..., ::-1])
    # An older OpenCV turns JPEG alone, so that the answer depends on its version.
    assert alike == (refusal is None) or name in ("turned.png", "turned.webp"), "the hosts have changed"
    if refusal is None:
        assert torch.equal(load_images(tmp_path).images[0], ToTensor()(Image.fromarray(theirs)))
    else:
        with message(f"torchvision and MMCV must read a file alike, but {path} {refusal}"):
            load_images(tmp_path)


def test_preprocessing_is_robustbenchs(tmp_path):
    for number, size in enumerate(((300, 280, 3), (260, 400, 3))):
        save_image(tmp_path / "a" / f"{number}.png", noise(*size))
    geometry = Compose([Resize(256), CenterCrop(224), ToTensor()])
    expected = torch.stack([geometry(Image.open(tmp_path / "a" / f"{number}.png")) for number in range(2)])
    found = load_images(tmp_path, preprocessing="Res256Crop224")
    assert torch.equal(found.images, expected)
    assert found.preprocessing == "Res256Crop224"


def test_images_of_different_sizes_are_refused_with_the_ways_to_one_size(folder):
    save_image(folder / "dog" / "1.png", noise(8, 7, 3))
    with pytest.raises(
        ValueError, match=r"one size, got \(8, 6\) .* and \(8, 7\) \(.*dog/1\.png\).*Res256Crop224, Crop"
    ):
        load_images(folder)


@pytest.mark.parametrize("content", [b"", b"no image at all", "half"])
def test_an_image_that_cannot_be_read_is_named(folder, content):
    path = folder / "owl" / "1.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with message(f"load_images: every image must be readable, but {path} is not: "):
        load_images(folder)


def test_a_folder_of_another_layout_is_refused(folder, tmp_path):
    with message("no empty one, but reading"):
        load_images(folder / "cat")
    for name in ("ape", "bat"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    with message("Found no valid file for the classes ape, bat"):
        load_images(tmp_path / "empty")


# --- .npz files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images_key", "labels_key"), [("image", "label"), ("images", "labels"), ("image", "labels")])
def test_grey_levels_of_a_file(tmp_path, images_key, labels_key):
    pixels = noise(7, 5, 4, 3)
    np.savez(tmp_path / "a.npz", **{images_key: pixels, labels_key: np.arange(7, dtype=np.uint8)})
    found = load_images(tmp_path / "a.npz", n_examples=6)
    assert torch.equal(found.images, torch.stack([ToTensor()(image) for image in pixels[:6]]))
    assert found.labels.tolist() == list(range(6))
    assert found.labels.dtype == torch.int64
    assert (found.classes, found.files, found.name) == (None, None, str(tmp_path / "a.npz"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, None])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_file_has_any_number_of_channels(tmp_path, count, dtype):
    pixels = noise(3, 6, 5) if count is None else noise(3, 6, 5, count)
    expected = torch.stack([ToTensor()(image) for image in pixels])
    if dtype == np.float32:
        pixels = expected.numpy() if count else expected.numpy()[:, 0]
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(3))
    assert torch.equal(load_images(tmp_path / "a.npz", channels=count).images, expected)
    with message(f"`channels` must be {count or 1}, those of"):
        load_images(tmp_path / "a.npz", channels=7)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_a_file(tmp_path, dtype):
    pixels = np.random.default_rng(0).random((3, 3, 5, 4)).astype(dtype)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([2, 0, 1]))
    found = load_images(str(tmp_path / "a.npz"))
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images, torch.tensor(pixels.astype(np.float32)))


def arrays(**changes):
    return {"images": noise(4, 5, 5, 3), "labels": np.arange(4), **changes}


SHAPE = "(N, H, W, C) as uint8 or (N, C, H, W) as floats, or (N, H, W), got "
NO_FILE = [
    (arrays(images=noise(4, 3, 5, 5)), ValueError, f"{SHAPE}(4, 3, 5, 5) as uint8"),
    (arrays(images=noise(4, 5)), ValueError, f"{SHAPE}(4, 5) as uint8"),
    (arrays(images=np.zeros((4, 5, 5, 3))), ValueError, f"{SHAPE}(4, 5, 5, 3) as float64"),
    (arrays(images=np.zeros((4, 5, 5, 1))), ValueError, f"{SHAPE}(4, 5, 5, 1) as float64"),
    (arrays(images=np.zeros((4, 3, 5, 5), int)), TypeError, "must be uint8 or floats, got int64"),
    (arrays(images=np.full((4, 3, 5, 5), 1.01)), ValueError, "pixels must lie in [0, 1], got values from 1.01"),
    (arrays(images=np.full((4, 3, 5, 5), -0.01)), ValueError, "got values from -0.01 to -0.01"),
    (arrays(images=np.full((4, 3, 5, 5), np.nan)), ValueError, "got values from nan to nan"),
    (arrays(images=np.full((4, 3, 5, 5), 200 / 255 / 255)), ValueError, "as if divided by 255 twice"),
    (arrays(images=noise(0, 5, 5, 3), labels=np.arange(0)), ValueError, "at least one image, got none"),
    (arrays(labels=np.arange(3)), ValueError, "a label per image, got shape (3,) for 4 images"),
    (arrays(labels=np.zeros((4, 10), int)), ValueError, "a label per image, got shape (4, 10)"),
    (arrays(labels=np.zeros(4)), TypeError, "must be integer class indices, got float64"),
    (arrays(labels=np.array([None] * 4)), ValueError, "plain arrays, but reading it gave: Object arrays cannot"),
    ({"images": noise(4, 5, 5, 3)}, ValueError, "must hold either `label` or `labels`, but has images."),
    ({"x": noise(4, 5, 5, 3)}, ValueError, "must hold either `image` or `images`, but has x."),
    (arrays(image=noise(4, 5, 5, 3)), ValueError, "`image` or `images`, but has images, labels, image."),
]


@pytest.mark.parametrize(("content", "kind", "text"), NO_FILE, ids=[text[-20:] for _, _, text in NO_FILE])
def test_a_file_that_does_not_hold_images_is_refused(tmp_path, content, kind, text):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(kind, match=re.escape(text)):
        load_images(tmp_path / "a.npz")


class Payload:
    """Would tell of itself if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_runs_nothing(tmp_path):
    victim = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", images=noise(1, 5, 5, 3), labels=np.array([Payload(victim)]))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Payload(victim)))
    for name in ("a.npz", "b.npz"):
        with message("must be an .npz file of plain arrays, but reading it gave: "):
            load_images(tmp_path / name)
    assert not victim.exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["labels"]
    assert victim.exists()  # the payload works


@pytest.mark.parametrize("cut", [0, 10, 60, -30])
def test_a_truncated_file_is_refused(tmp_path, cut):
    np.savez(tmp_path / "a.npz", **arrays())
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:cut])
    with message(f"load_images: {tmp_path / 'b.npz'} must be an .npz file of plain arrays, but reading it gave: "):
        load_images(tmp_path / "b.npz")
    with (tmp_path / "c.npz").open("wb") as file:
        np.save(file, noise(4, 5, 5, 3))
    with message("gave: File is not a zip file"):
        load_images(tmp_path / "c.npz")


# --- RobustBench's data sets -----------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Generated files of CIFAR-10's layout, ten images each, that torchvision takes for the real ones."""
    kind = torchvision.datasets.CIFAR10
    root = tmp_path / kind.base_folder
    root.mkdir()
    sums = {}
    for number, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        content = {"data": noise(10, 3072, seed=number), "labels": [(3 * index) % 10 for index in range(10)]}
        (root / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest()
    (root / kind.meta["filename"]).write_bytes(pickle.dumps({"label_names": list(NAMES)}))
    meta = hashlib.md5((root / kind.meta["filename"]).read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta})
    known = KnownSet(10, {"file": "cifar-10-batches-py/test_batch", "md5": sums["test_batch"]})
    monkeypatch.setitem(KNOWN, "cifar10", known)

    def no_network(*args, **kwargs):
        raise AssertionError("this would download")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    return tmp_path


@pytest.mark.parametrize("offline", [False, True])
def test_cifar10_is_what_robustbench_reads(cifar, offline):
    found = load_images("cifar10", data_dir=cifar, n_examples=7, offline=offline)
    images, labels = robustbench.data.load_cifar10(7, str(cifar))
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    assert found.labels.tolist() == [0, 3, 6, 9, 2, 5, 8]
    assert (found.classes, found.name, found.files) == (NAMES, "cifar10", None)
    assert found.source == KNOWN["cifar10"].source
    facts = data_facts(found, found.images[:4], found.labels[:4])
    assert (facts["name"], facts["source"]) == ("cifar10", found.source)
    assert len(load_images("cifar10", data_dir=cifar, offline=offline)) == 10


def test_the_sums_of_known_sets_are_those_that_torchvision_states():
    for name, kind in (("cifar10", torchvision.datasets.CIFAR10), ("cifar100", torchvision.datasets.CIFAR100)):
        ((file, md5),) = kind.test_list
        assert KNOWN[name] == (10000, {"file": f"{kind.base_folder}/{file}", "md5": md5})


def _swapped(x):
    return x[[1, 0, *range(2, len(x))]]


@pytest.mark.parametrize("case", ["one grey level", "order", "label", "sum", "geometry", "text", "class order"])
def test_other_images_have_no_right_to_the_name_of_a_known_set(case, cifar, monkeypatch):
    images, labels = robustbench.data.load_cifar10(10, str(cifar))
    given = {
        "one grey level": (images + (torch.arange(images.numel()).view_as(images) == 9).float() / 255, labels),
        "order": (_swapped(images), _swapped(labels)),
        "label": (images, labels.roll(1)),
    }.get(case, (images, labels))
    kind = robustbench.data.BenchmarkDataset.cifar_10
    monkeypatch.setitem(robustbench.data._clean_dataset_loaders, kind, lambda n, folder, transform: given)
    if case == "sum":
        monkeypatch.setitem(KNOWN, "cifar10", KnownSet(10, {**KNOWN["cifar10"].source, "md5": "0" * 32}))
    found = load_images("cifar10", data_dir=cifar, preprocessing="Res224" if case == "geometry" else None)
    assert (found.source is None) == (case not in ("text", "class order")), found.source
    if case == "class order":
        found = dataclasses.replace(found, labels=found.labels.roll(1))
    facts = data_facts("cifar10" if case == "text" else found, found.images, labels)
    assert (facts["name"], facts["source"]) == ("images named cifar10", None)


def test_offline_refuses_what_would_be_downloaded(cifar, tmp_path):
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    with message(
        f"cifar10 must lie in {cifar / 'cifar-10-batches-py'} to be read offline, unchanged: data_batch_1, data_"
    ):
        load_images("cifar10", data_dir=cifar, offline=True)
    with pytest.raises(AssertionError, match="this would download"):
        load_images("cifar10", data_dir=cifar)
    with message("cifar100 must lie in"):
        load_images("cifar100", data_dir=tmp_path / "elsewhere", offline=True)
    assert not (tmp_path / "elsewhere").exists()


def test_more_images_than_there_are_is_refused(cifar, folder_of_two, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    for source, there in (("cifar10", 10), (folder_of_two, 2), (tmp_path / "a.npz", 4)):
        with message(f"`n_examples` must be at most {there}, the images of {source}, got {there + 1}"):
            load_images(source, data_dir=cifar, n_examples=there + 1)


@pytest.fixture
def folder_of_two(tmp_path):
    for number in range(2):
        save_image(tmp_path / "two" / "a" / f"{number}.png", noise(4, 4, 3))
    return tmp_path / "two"


@pytest.fixture
def imagenet(tmp_path):
    """The class folders of ImageNet, and the first three images of RobustBench's list."""
    return tmp_path, write_imagenet(tmp_path, 3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")  # RobustBench asks for them
def test_imagenet_is_what_robustbench_reads(imagenet):
    root, names = imagenet
    found = load_images("imagenet", data_dir=root, n_examples=3)
    images, labels = robustbench.data.load_imagenet(3, str(root))
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    assert [found.classes[label] for label in found.labels] == [name.split("/")[0] for name in names[:3]]
    assert (len(found.classes), found.preprocessing, found.images.shape) == (1000, "Res256Crop224", (3, 3, 224, 224))
    assert found.source == KNOWN["imagenet"].source
    (root / "val" / "n02066245").rename(root / "val" / "z")  # a class that is not in the list, so that labels move
    assert load_images("imagenet", data_dir=root, n_examples=3).source is None


def test_imagenet_that_is_not_whole_is_refused(imagenet, tmp_path):
    root, names = imagenet
    with message(f"{root / 'val' / names[3]} is missing"):
        load_images("imagenet", data_dir=root)
    with message("`n_examples` must be at most 5000, the images of"):
        load_images("imagenet", data_dir=root, n_examples=6000)
    label = names[1].split("/")[0]
    (root / "val" / label).rename(root / "val" / "other")
    with message(f"imagenet in {root / 'val'} must have the folder {label}."):
        load_images("imagenet", data_dir=root, n_examples=3)
    (root / "val" / "other").rename(root / "other")
    with message("1,000 class folders and no other, got 999"):
        load_images("imagenet", data_dir=root, n_examples=3)
    with message(f"imagenet must lie in {tmp_path / 'none' / 'val'}, but there is no such folder"):
        load_images("imagenet", data_dir=tmp_path / "none")


# --- names, numbers, checksums ---------------------------------------------------------------------------------------


NO_SOURCE = [
    ("cifar11", {}, ValueError, "`source` must be"),
    ("none.npz", {}, ValueError, "there is none at none.npz"),
    ("a.npz", {"preprocessing": "Res224"}, ValueError, "got 'Res224'"),
    ("images", {"preprocessing": "Res225"}, ValueError, "preprocessing `Res225`. Did you mean `Res224`?"),
    *(("images", {"n_examples": count}, ValueError, f"got {count}") for count in (0, -1)),
    *(("images", {"n_examples": count}, TypeError, f"got {count!r}") for count in (1.0, "3", True)),
]


@pytest.mark.parametrize(("source", "keywords", "error", "text"), NO_SOURCE)
def test_a_source_or_number_that_is_none_is_refused(folder, source, keywords, error, text, monkeypatch):
    monkeypatch.chdir(folder.parent)
    np.savez("a.npz", **arrays())
    with pytest.raises(error, match=re.escape(text)):
        load_images(source, **keywords)


def test_the_checksum_is_of_the_pixels_and_labels_used(folder):
    whole, part = load_images(folder), load_images(folder, n_examples=3)
    expected = hashlib.sha256(b"(10, 3, 8, 6) (10,)\n")
    expected.update(whole.images.numpy().tobytes())
    expected.update(whole.labels.numpy().tobytes())
    assert whole.sha256 == expected.hexdigest() == content_sha256(whole.images, whole.labels)
    assert part.sha256 != whole.sha256
    changed = whole.images.clone()
    changed[9, 2, 7, 5] += 1e-6
    assert content_sha256(changed, whole.labels) != whole.sha256
    assert content_sha256(whole.images, whole.labels.flip(0)) != whole.sha256
    assert content_sha256(whole.images.transpose(2, 3), whole.labels) != whole.sha256
    assert content_sha256(whole.images.double(), whole.labels.int()) == whole.sha256


def test_the_checksum_of_many_images_is_that_of_all_their_bytes():
    images, labels = torch.rand(600, 3, 2, 2), torch.arange(600)
    expected = hashlib.sha256(b"(600, 3, 2, 2) (600,)\n" + images.numpy().tobytes() + labels.numpy().tobytes())
    assert content_sha256(images, labels) == expected.hexdigest()


def test_the_checksum_of_a_file(tmp_path):
    content = bytes(range(256)) * 8192  # 2 MiB
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
