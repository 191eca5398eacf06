"""What the recipes need beside torchvision and torchdistill: class folders, lists, shares of a batch, a schedule."""

import math
import os
import pickle
import re

import pytest
import torch

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from PIL import Image
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torchdistill.common.yaml_util import load_yaml_file

from ikl_plugins.torchdistill import ImageList, WarmupCosine, image_folder, share_of_batch


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """`data/mine/train` with two classes of two images, and the list `lists/some.txt` of three, one with blanks."""
    listed = ((0, "images/train/b/0.png"), (100, "images/train/a a/1.png"), (200, "images/val/2.png"))
    classes = ((10 * index, f"mine/train/{label}/{index}.png") for label in "ba" for index in range(2))
    for value, name in (*listed, *classes):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
    for folder in ("lists", "mine/empty", "mine/hollow/a"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "data/lists/some.txt").write_text("train/b/0.png 7\n\nval/2.png\t0\ntrain/a a/1.png 999\n")
    (tmp_path / "data/lists/blank.txt").write_text("\n \n")
    monkeypatch.delenv("IKL_PLUGINS_DATA", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@pytest.mark.parametrize("from_environment", [False, True])
def test_images_and_labels(data, monkeypatch, from_environment):
    if from_environment:
        monkeypatch.setenv("IKL_PLUGINS_DATA", str(data))
        monkeypatch.chdir("/")
    folder, listed = image_folder("mine/train"), ImageList("lists/some.txt", "images")
    assert folder.classes == ["a", "b"]
    assert folder[0][0] is not folder[0][0]  # read anew unless asked to keep
    assert [(image.getpixel((0, 0))[0], label) for image, label in folder] == [(0, 0), (10, 0), (0, 1), (10, 1)]
    assert len(listed) == 3
    assert listed.targets == [7, 0, 999]
    found = [(image.mode, image.getpixel((0, 0))[0], label) for image, label in (listed[n] for n in range(3))]
    assert found == [("RGB", 0, 7), ("RGB", 200, 0), ("RGB", 100, 999)]


def test_in_memory_reads_each_file_once_and_transforms_it_every_time(data):
    calls = []

    def transform(image):
        calls.append(image)
        return len(calls)

    listed = ImageList("lists/some.txt", "images", transform)
    assert [listed[0], listed[1], listed[0]] == [(1, 7), (2, 0), (3, 7)]
    dataset = image_folder("mine/train", transform, in_memory=True)
    assert [sample for sample, _ in dataset] == [4, 5, 6, 7]
    for path in data.rglob("*.png"):
        path.unlink()
    assert [sample for sample, _ in dataset] == [8, 9, 10, 11]
    assert calls[3] is calls[7]


def test_a_fifo_among_the_images_is_refused_at_once(data):
    name = data / "mine" / "train" / "a" / "fifo.png"
    name.parent.mkdir(exist_ok=True)
    os.mkfifo(name)
    for held in (image_folder("mine/train"), image_folder("mine/train", in_memory=True)):
        index = next(index for index, (path, _) in enumerate(held.samples) if path.endswith("fifo.png"))
        with pytest.raises(ValueError, match=r"fifo\.png must be a regular file, but is a FIFO"):
            held[index]


def test_they_travel_to_worker_processes():
    sets = image_folder("mine/train", in_memory=True), ImageList("lists/some.txt", "images", torch.nn.Identity())
    folder, listed = pickle.loads(pickle.dumps(sets))  # noqa: S301
    assert [label for _, label in folder] == [0, 0, 1, 1]
    assert listed[2][1] == 999


def test_a_yaml_file_calls_it(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "train: !import_call\n  key: 'ikl_plugins.torchdistill.image_folder'\n"
        "  init:\n    kwargs:\n      split_dir: 'mine/train'\n"
    )
    assert len(load_yaml_file(str(tmp_path / "one.yaml"))["train"]) == 4


# what is made, the fragment that matters; a TypeError where what is given is no path
MISSING = [
    (lambda: image_folder("digits/train"), "no such folder. Run: ikl data digits, or set IKL_PLUGINS"),
    (lambda: image_folder("cifar10/val"), "Run: ikl data cifar10-folder --from ZIP..."),
    (lambda: image_folder("other/train"), "data/other/train: no such folder. Put one folder per class"),
    (lambda: image_folder("mine/empty"), "no images in class folders (Couldn't find any class"),
    (lambda: image_folder("mine/hollow"), "no images in class folders (Found no valid file"),
    (lambda: image_folder(True), "`split_dir` must be the path of a folder, got True"),
    (lambda: image_folder(None), "`split_dir` must be the path of a folder, got None"),
    (lambda: ImageList("lists/x.txt", "images"), "got data/lists/x.txt: no such"),
    (lambda: ImageList("lists", "images"), "got data/lists: no such file"),
    (lambda: ImageList("lists/blank.txt", "images"), "`list_file` must list images, but data/lists/bl"),
    (lambda: ImageList("lists/some.txt", "lists"), "got 'lists': there is no data/lists/train/b/0.png"),
]


@pytest.mark.parametrize(("make", "message"), MISSING, ids=[message for _, message in MISSING])
def test_data_that_is_not_there_is_refused(make, message):
    with pytest.raises(TypeError if "path of a folder" in message else ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("line", ["a/0.png", "a/0.png seven", "a/0.png -1", "a/0.png 1.0", " 7"])
def test_a_malformed_line_is_refused_by_its_number(data, line):
    (data / "lists/some.txt").write_text(f"train/b/0.png 7\n\n{line}\n")
    with pytest.raises(ValueError, match=re.escape("data/lists/some.txt, line 3, must be") + f".*got {line!r}"):
        ImageList("lists/some.txt", "images")


@pytest.mark.parametrize(
    ("processes", "share"), [(None, 512), ("", 512), ("1", 512), ("2", 256), ("8", 64), ("512", 1)]
)
def test_the_share_of_a_process(monkeypatch, processes, share):
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert share_of_batch(512) == share


@pytest.mark.parametrize(
    ("processes", "total", "error"),
    [("3", 512, ValueError), ("1", 0, ValueError), ("1", -512, ValueError)]
    + [("1", total, TypeError) for total in (512.0, "512", True, None)],
)
def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, processes, total, error):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(error, match=rf"`total` must be .*got {total!r}"):
        share_of_batch(total)


# --- WarmupCosine ----------------------------------------------------------------------------------------------------


def rates(scheduler_class, epochs, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = scheduler_class(optimizer, **kwargs)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_warm_up_and_the_cosine():
    """By hand for 6 epochs, the first 2 of which warm up: 1/2, 1, then cos of 1/5, 2/5, 3/5 and 4/5 of pi."""
    factor = WarmupCosine(epochs=6, warmup_epochs=2)
    cosines = [0.8090169944, 0.3090169944, -0.3090169944, -0.8090169944]
    assert [factor(epoch) for epoch in range(6)] == pytest.approx([0.5, 1.0, *(0.5 * (1 + c) for c in cosines)])


def test_without_a_warm_up_it_is_one_epoch_ahead_of_torchs_cosine():
    ours = rates(LambdaLR, 20, lr_lambda=WarmupCosine(epochs=20))
    assert ours == pytest.approx(rates(CosineAnnealingLR, 21, T_max=21)[1:])
    assert ours[-1] == pytest.approx(0.1 * (1 + math.cos(math.pi * 20 / 21)))


def test_a_scheduler_with_it_is_saved_as_plain_values(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torch.save(LambdaLR(optimizer, WarmupCosine(epochs=9, warmup_epochs=3)).state_dict(), tmp_path / "some.pt")
    state = torch.load(tmp_path / "some.pt", weights_only=True)
    assert state["lr_lambdas"] == [{"epochs": 9, "warmup_epochs": 3}]


@pytest.mark.parametrize(
    ("epochs", "warmup", "error", "message"),
    [
        (0, 0, ValueError, r"`epochs` must be an integer of at least 1, got 0"),
        (9.0, 0, TypeError, r"`epochs` must be an integer of at least 1, got 9\.0"),
        (True, 0, TypeError, r"`epochs` must be an integer of at least 1, got True"),
        (9, -1, ValueError, r"`warmup_epochs` must be an integer of at least 0, got -1"),
        (9, None, TypeError, r"`warmup_epochs` must be an integer of at least 0, got None"),
        (9, 9, ValueError, r"`warmup_epochs` must be below the 9 epochs"),
    ],
)
def test_epochs_out_of_range_are_refused(epochs, warmup, error, message):
    with pytest.raises(error, match=message):
        WarmupCosine(epochs, warmup)
