"""What the recipes need beside torchvision and torchdistill: lists of images, shares of a batch, a schedule."""

import math
import pickle
import re

import pytest
import torch

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from PIL import Image
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ikl_plugins.torchdistill import ImageList, WarmupCosine, share_of_batch

# --- ImageList -------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch):
    """The list `data/lists/some.txt` of three images under `data/images`, one with blanks in its path."""
    for value, name in ((0, "train/b/0.png"), (100, "train/a a/1.png"), (200, "val/2.png")):
        path = tmp_path / "data" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
    listed = tmp_path / "data" / "lists" / "some.txt"
    listed.parent.mkdir()
    listed.write_text("train/b/0.png 7\n\nval/2.png\t0\ntrain/a a/1.png 999\n")
    monkeypatch.delenv("IKL_PLUGINS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return listed


@pytest.mark.parametrize("from_environment", [False, True])
def test_the_listed_images_and_labels(images, monkeypatch, tmp_path, from_environment):
    if from_environment:
        monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
        monkeypatch.chdir("/")
    dataset = ImageList("lists/some.txt", "images")
    assert len(dataset) == 3
    assert dataset.targets == [7, 0, 999]
    found = [(image.mode, image.getpixel((0, 0))[0], label) for image, label in (dataset[n] for n in range(3))]
    assert found == [("RGB", 0, 7), ("RGB", 200, 0), ("RGB", 100, 999)]


def test_the_transform_sees_every_image_every_time(images):
    calls = []
    dataset = ImageList("lists/some.txt", "images", lambda image: calls.append(image) or len(calls))
    assert [dataset[0], dataset[1], dataset[0]] == [(1, 7), (2, 0), (3, 7)]


def test_it_travels_to_worker_processes(images):
    dataset = pickle.loads(pickle.dumps(ImageList("lists/some.txt", "images", torch.nn.Identity())))  # noqa: S301
    assert dataset.targets == [7, 0, 999]
    assert dataset[2][1] == 999


def test_a_missing_list_is_refused(images):
    message = (
        "`list_file` must be a text file of images and class indices, got 'lists/x.txt', which is data/lists/x.txt: no"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageList("lists/x.txt", "images")
    with pytest.raises(
        ValueError, match=r"got 'lists', which is data/lists: no such file\. Put it there, or set IKL_PLU"
    ):
        ImageList("lists", "images")


def test_a_list_without_images_is_refused(images):
    images.write_text("\n \n")
    with pytest.raises(
        ValueError, match=r"`list_file` must list images, but data/lists/some\.txt is empty\. Get the file"
    ):
        ImageList("lists/some.txt", "images")


@pytest.mark.parametrize(
    "line", ["train/b/0.png", "train/b/0.png seven", "train/b/0.png -1", "train/b/0.png 1.0", "7", " 7"]
)
def test_a_malformed_line_is_refused_by_its_number(images, line):
    images.write_text(f"train/b/0.png 7\n\n{line}\n")
    message = f"data/lists/some.txt, line 3, must be a path, a blank and a class index, got {line!r}. Correct the line."
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageList("lists/some.txt", "images")


def test_a_wrong_folder_is_refused(images):
    message = (
        "`image_dir` must be the folder that the paths of 'lists/some.txt' start from, got 'images/train': there is no "
        "data/images/train/train/b/0.png. Correct it, or put the images there."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageList("lists/some.txt", "images/train")


# --- share_of_batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "share"), [(None, 512), ("", 512), ("1", 512), ("2", 256), ("8", 64), ("512", 1)]
)
def test_the_share_of_a_process(monkeypatch, processes, share):
    if processes is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert share_of_batch(512) == share


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = r"`total` must be a multiple of the number of processes, 3, got 512\. Start another number of processes"
    with pytest.raises(ValueError, match=message):
        share_of_batch(512)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for total in (0, -512):
        with pytest.raises(
            ValueError, match=rf"`total` must be a multiple of the number of processes, 1, got {total}\."
        ):
            share_of_batch(total)
    for total in (512.0, "512", True, None):
        with pytest.raises(
            TypeError, match=r"`total` must be an integer of at least 1, got .* of type \w+\. Pass the num"
        ):
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
    assert ours[-1] > 0


def test_a_scheduler_with_it_is_saved_as_plain_values(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, WarmupCosine(epochs=9, warmup_epochs=3))
    torch.save(scheduler.state_dict(), tmp_path / "some.pt")
    state = torch.load(tmp_path / "some.pt", weights_only=True)
    assert state["lr_lambdas"] == [{"epochs": 9, "warmup_epochs": 3}]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"epochs": 0}, ValueError, r"`epochs` must be an integer of at least 1, got 0\. Choose a value in that range"),
        (
            {"epochs": 9.0},
            TypeError,
            r"`epochs` must be an integer of at least 1, got 9\.0 of type float\. Pass a whole",
        ),
        ({"epochs": True}, TypeError, r"`epochs` must be an integer of at least 1, got True of type bool"),
        ({"epochs": 9, "warmup_epochs": -1}, ValueError, r"`warmup_epochs` must be an integer of at least 0, got -1\."),
        (
            {"epochs": 9, "warmup_epochs": None},
            TypeError,
            r"`warmup_epochs` must be an integer of at least 0, got None",
        ),
        (
            {"epochs": 9, "warmup_epochs": 9},
            ValueError,
            r"`warmup_epochs` must be below the 9 epochs .* got 9\. Shorten",
        ),
    ],
)
def test_epochs_out_of_range_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        WarmupCosine(**kwargs)
