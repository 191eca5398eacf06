"""GeneratedImages: what NumPy reads from the same files, MMPretrain's pipelines and workers, and memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch
from mmengine.dataset import default_collate
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS
from PIL import Image
from sparse_archive import write_sparse_archive
from torch.utils.data import DataLoader

from ikl_plugins.mmpretrain import GeneratedImages, npz_memmap, unpack_npz

PIPELINE = [
    {"type": "RandomCrop", "crop_size": 32, "padding": 4},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    {"type": "PackInputs"},
]


def arrays(count=7, seed=0, size=32, dtype="int64"):
    random = numpy.random.default_rng(seed)
    return {
        "image": random.integers(256, size=(count, size, size, 3), dtype=numpy.uint8),
        "label": random.integers(10, size=count).astype(dtype),
    }


@pytest.fixture
def saved(tmp_path):
    data = arrays()
    numpy.savez(tmp_path / "generated.npz", **data)
    return tmp_path, data


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", ">i4"])
@pytest.mark.parametrize("form", ["npz", "npy", "long header"])
def test_samples_are_those_of_the_arrays(tmp_path, form, dtype):
    data = arrays(dtype=dtype)
    files = {"data_file": "g.npz"} if form == "npz" else {"data_file": "image.npy", "label_file": "label.npy"}
    numpy.savez(tmp_path / "g.npz", **data)
    for key, value in data.items():
        with (tmp_path / f"{key}.npy").open("wb") as file:
            numpy.lib.format.write_array(file, value, version=(2, 0) if form == "long header" else None)
    dataset = DATASETS.build({"type": "GeneratedImages", "data_root": str(tmp_path), **files})
    assert len(dataset) == 7
    for index in range(7):
        sample = dataset[index]
        assert numpy.array_equal(sample["img"], data["image"][index][:, :, [2, 1, 0]])
        assert sample["img"].flags.c_contiguous
        assert sample["img"].flags.writeable
        assert (sample["img_shape"], sample["ori_shape"]) == ((32, 32), (32, 32))
        assert sample["gt_label"] == data["label"][index]
        assert type(sample["gt_label"]) is int
        assert sample["sample_idx"] == index
        assert dataset.get_cat_ids(index) == [data["label"][index]]
    assert dataset.get_gt_labels().tolist() == data["label"].tolist()
    assert numpy.array_equal(dataset[-1]["img"], dataset[6]["img"])
    assert dataset[-1]["sample_idx"] == 6
    for index in (7, -8):
        with pytest.raises(IndexError, match=rf"^GeneratedImages: sample {index} of 7$"):
            dataset[index]


def test_channels_are_those_of_an_image_that_is_loaded_from_a_file(saved):
    folder, data = saved
    Image.fromarray(data["image"][3]).save(folder / "3.png")
    (folder / "list.txt").write_text("3.png 0\n")
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackInputs"}]
    loaded = CustomDataset(data_root=str(folder), ann_file="list.txt", pipeline=pipeline)[0]
    ours = GeneratedImages(folder / "generated.npz", pipeline=[{"type": "PackInputs"}])[3]
    assert torch.equal(ours["inputs"], loaded["inputs"])
    assert torch.equal(ours["data_samples"].gt_label, torch.tensor([int(data["label"][3])]))
    assert ours["data_samples"].img_shape == loaded["data_samples"].img_shape


def test_parts_follow_one_another(tmp_path):
    parts = [arrays(count, seed) for seed, count in enumerate((3, 1, 4))]
    for index, part in enumerate(parts):
        numpy.savez(tmp_path / f"part{index}.npz", **part)
    dataset = GeneratedImages(["part0.npz", "part1.npz", "part2.npz"], data_root=tmp_path, channel_order="rgb")
    images = numpy.concatenate([part["image"] for part in parts])
    labels = numpy.concatenate([part["label"] for part in parts])
    assert len(dataset) == 8
    assert all(numpy.array_equal(dataset[index]["img"], images[index]) for index in range(8))
    assert [dataset[index]["gt_label"] for index in range(8)] == labels.tolist() == dataset.get_gt_labels().tolist()


@pytest.mark.parametrize(
    ("indices", "kept"),
    [(3, [0, 1, 2]), (-2, [5, 6]), ([4, 0, -1], [4, 0, 6]), (0, []), ([], [])],
)
@pytest.mark.parametrize("way", ["argument", "get_subset", "get_subset_"])
def test_some_of_the_images(saved, indices, kept, way):
    folder, data = saved
    whole = dataset = GeneratedImages(folder / "generated.npz", indices=indices if way == "argument" else None)
    if way == "get_subset":
        dataset = whole.get_subset(indices)
        assert len(whole) == 7
    elif way == "get_subset_":
        dataset.get_subset_(indices)
    labels = data["label"][kept].tolist()
    assert [dataset[index]["gt_label"] for index in range(len(kept))] == labels
    assert dataset.get_gt_labels().tolist() == labels
    if labels:  # a subset of a subset
        assert dataset.get_subset([-1]).get_gt_labels().tolist() == labels[-1:]


def test_nothing_is_opened_before_it_is_needed(saved):
    folder, _ = saved
    dataset = GeneratedImages(folder / "late.npz", lazy_init=True)
    (folder / "generated.npz").rename(folder / "late.npz")
    assert len(dataset) == 7
    shown = repr(dataset)
    assert f"Files: \t{folder / 'late.npz'}" in shown
    assert "Channel order: \tbgr" in shown


# --- the host's pipeline, workers and collation -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_data_loader(saved, workers):
    folder, data = saved
    dataset = GeneratedImages(folder / "generated.npz", pipeline=PIPELINE)
    batches = list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=default_collate))
    assert [tuple(batch["inputs"].shape) for batch in batches] == [(4, 3, 32, 32), (3, 3, 32, 32)]
    assert batches[0]["inputs"].dtype == torch.uint8
    labels = [int(sample.gt_label) for batch in batches for sample in batch["data_samples"]]
    assert labels == data["label"].tolist()


def test_copies_and_pickles_hold_no_images(tmp_path):
    data = arrays(2000)
    numpy.savez(tmp_path / "g.npz", **data)
    dataset = GeneratedImages(tmp_path / "g.npz", channel_order="rgb")
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) < 10_000 < data["label"].nbytes
    for twin in (pickle.loads(content), copy.deepcopy(dataset)):  # noqa: S301 - our own
        assert numpy.array_equal(twin[1999]["img"], data["image"][1999])
        assert twin._parts[0][0]._file is not dataset._parts[0][0]._file


# --- memory -----------------------------------------------------------------------------------------------------------

READER = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy
from ikl_plugins.mmpretrain import GeneratedImages

def resident(name="VmRSS"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

dataset = GeneratedImages(sys.argv[1], channel_order="rgb")
before = resident()
random = numpy.random.default_rng(0)
for index in random.integers(len(dataset), size=int(sys.argv[2])):
    dataset[int(index)]
print(len(dataset), resident() - before, resident("VmHWM"))  # getrusage begins at the parent's peak
for index in map(int, sys.argv[3:]):
    sample = dataset[index]
    print(sample["gt_label"], *sample["img"].ravel()[[0, 1, 3071]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_million_images_in_less_than_a_gibibyte(tmp_path):
    """150 GB that take up nearly nothing on the disk, of which more is read than may stay in memory."""
    count, path = 50_000_000, tmp_path / "50m.npz"
    random = numpy.random.default_rng(3)
    places = [0, 1, 2**31 // 3072, 2**32 // 3072 + 1, 31_234_567, count - 1]
    images = {place: random.integers(256, size=(32, 32, 3), dtype=numpy.uint8) for place in places}
    labels = {place: int(random.integers(100)) for place in places}
    write_sparse_archive(path, count, images, labels)
    assert path.stat().st_size > 150 * 10**9
    assert path.stat().st_blocks * 512 < 10 * 2**20
    with zipfile.ZipFile(path) as archive:  # Python's own reader agrees that it is a zip file
        assert archive.getinfo("image.npy").file_size == 128 + count * 3072

    done = subprocess.run(
        [sys.executable, "-c", READER, str(path), "80000", *map(str, places)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()[-1 - len(places) :]  # the forks print at their import
    (found, growth, peak), *samples = [[int(number) for number in line.split()] for line in lines]
    assert found == count
    assert growth < 128 * 1024  # KiB; the 80,000 images are 240,000, the pages that they lie on 560,000
    assert peak < 2**20
    for place, sample in zip(places, samples, strict=True):
        assert sample == [labels[place], *images[place].ravel()[[0, 1, 3071]].tolist()]


def test_pages_are_given_back_and_read_again(saved, monkeypatch):
    folder, data = saved
    monkeypatch.setattr(npz_memmap, "_READS_KEPT", 2)
    dataset = GeneratedImages(folder / "generated.npz", channel_order="rgb")
    for index in [*range(7), *range(7)]:
        assert numpy.array_equal(dataset[index]["img"], data["image"][index])


# --- compressed files -------------------------------------------------------------------------------------------------


def test_a_compressed_file_is_refused_with_the_command_that_unpacks_it(tmp_path):
    data = arrays()
    numpy.savez_compressed(tmp_path / "packed.npz", **data)
    with pytest.raises(ValueError, match=r"must not be compressed.*'image' in .*packed\.npz is\. Write") as caught:
        GeneratedImages(tmp_path / "packed.npz")
    _, _, command = str(caught.value).partition(' -c "')
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command.rstrip('"')], check=False, timeout=120)
    assert done.returncode == 0
    dataset = GeneratedImages(tmp_path / "packed.unpacked.npz", channel_order="rgb")
    assert all(numpy.array_equal(dataset[index]["img"], data["image"][index]) for index in range(7))
    assert dataset.get_gt_labels().tolist() == data["label"].tolist()


def test_unpacking_keeps_all_arrays_and_takes_little_memory(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    data = {"image": numpy.zeros((40_000, 32, 32, 3), numpy.uint8), "label": numpy.arange(40_000), "more": numpy.eye(3)}
    numpy.savez_compressed(tmp_path / "packed.npz", **data)  # 123 MB
    tracemalloc.start()
    assert unpack_npz(str(tmp_path / "packed.npz"), tmp_path / "new" / "whole.npz") == tmp_path / "new" / "whole.npz"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    with numpy.load(tmp_path / "new" / "whole.npz") as found:
        assert sorted(found) == ["image", "label", "more"]
        assert all(numpy.array_equal(found[key], data[key]) for key in data)


def _offset(content):
    """The place in the file that the directory gives for the first member lies behind its end."""
    place = content.index(b"PK\x01\x02")
    return content[: place + 42] + b"\xff\xff\xff\x7f" + content[place + 46 :]


def _shape(content):
    return content.replace(b"(7, 32, 32, 3)", b"(9**9,32,32,3)")


def _negative(content):
    return content.replace(b"(7, 32, 32, 3)", b"(-7,32, 32, 3)")


def _version(content):
    place = content.index(b"PK\x01\x02")
    return content[: place + 6] + b"\xff" + content[place + 7 :]


@pytest.mark.parametrize("change", [_offset, _shape, _negative, _version])
def test_a_damaged_file_is_named(saved, tmp_path, change):
    path = tmp_path / "odd.npz"
    numpy.savez(path, **arrays())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"GeneratedImages: .*odd\.npz.*Fetch it anew"):
        len(GeneratedImages(path))


@pytest.mark.parametrize("how", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_what_cannot_be_unpacked_is_refused_and_leaves_nothing(tmp_path, how, monkeypatch):
    source, target = tmp_path / "packed.npz", tmp_path / "whole.npz"
    with zipfile.ZipFile(source, "w", how) as archive:
        archive.writestr("image.npy", numpy.random.default_rng(0).bytes(5000))
    whole = source.read_bytes()
    source.write_bytes(whole[:60] + bytes(byte ^ 0x5A for byte in whole[60:90]) + whole[90:])
    with pytest.raises(ValueError, match=r"`source` must be a whole \.npz file, got .*packed\.npz"):
        unpack_npz(source, target)
    source.write_bytes(_version(whole))
    with pytest.raises(ValueError, match=r"`source` must be a whole \.npz file"):
        unpack_npz(source, target)
    source.write_bytes(whole)
    monkeypatch.setenv("IKL_PLUGINS_MAX_ARCHIVE_BYTES", "4999")
    with pytest.raises(ValueError, match=r"packed\.npz must unpack to at most 4,999 bytes, got 5,000\. Set IKL"):
        unpack_npz(source, target)
    assert sorted(tmp_path.iterdir()) == [source]
