"""image_folder: class folders found by environment variable or in the working directory, or a clear refusal."""

import pickle
import re

import pytest

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from PIL import Image
from torchdistill.common.yaml_util import load_yaml_file

from ikl_plugins.torchdistill import image_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for label in ("b", "a"):
        for index in range(2):
            path = tmp_path / "data" / "mine" / "train" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (10 * index, 0, 0)).save(path)
    monkeypatch.delenv("IKL_PLUGINS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "mine" / "train"


@pytest.mark.parametrize("from_environment", [False, True])
def test_images_and_labels(folder, monkeypatch, tmp_path, from_environment):
    if from_environment:
        monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
        monkeypatch.chdir("/")
    dataset = image_folder("mine/train")
    assert dataset.classes == ["a", "b"]
    assert [label for _, label in dataset] == [0, 0, 1, 1]
    assert [image.getpixel((0, 0)) for image, _ in dataset] == [(0, 0, 0), (10, 0, 0)] * 2


def test_in_memory_reads_each_file_once_and_transforms_it_every_time(folder):
    calls = []

    def transform(image):
        calls.append(image)
        return len(calls)

    dataset = image_folder("mine/train", transform, in_memory=True)
    assert [sample for sample, _ in dataset] == [1, 2, 3, 4]
    for path in folder.rglob("*.png"):
        path.unlink()
    assert [sample for sample, _ in dataset] == [5, 6, 7, 8]
    assert calls[0] is calls[4]


def test_it_travels_to_worker_processes(folder):
    dataset = pickle.loads(pickle.dumps(image_folder("mine/train", in_memory=True)))  # noqa: S301
    assert [label for _, label in dataset] == [0, 0, 1, 1]


def test_a_yaml_file_calls_it(folder, tmp_path):
    (tmp_path / "one.yaml").write_text(
        "train: !import_call\n  key: 'ikl_plugins.torchdistill.image_folder'\n"
        "  init:\n    kwargs:\n      split_dir: 'mine/train'\n"
    )
    assert len(load_yaml_file(str(tmp_path / "one.yaml"))["train"]) == 4


@pytest.mark.parametrize(
    ("split_dir", "way_out"),
    [
        ("digits/train", "Run: python tools/prepare_data.py digits, or set IKL_PLUGINS_DATA to the folder that"),
        ("cifar10/val", "Run: python tools/prepare_data.py cifar10-folder --from ZIP..., or set IKL_PLUGINS_DATA"),
        (
            "other/train",
            "Put one folder per class there, or set IKL_PLUGINS_DATA to the folder that holds 'other/train'",
        ),
    ],
)
def test_a_missing_folder_is_refused_with_the_command(folder, split_dir, way_out):
    with pytest.raises(
        ValueError, match=rf"got '{split_dir}', which is data/{split_dir}: no such folder\. {re.escape(way_out)}"
    ):
        image_folder(split_dir)


def test_a_folder_without_images_is_refused(folder):
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in class folders \(Couldn't find any class folder"):
        image_folder("mine/empty")
    (folder.parent / "empty" / "a").mkdir()
    with pytest.raises(ValueError, match=r"no images in class folders \(Found no valid file for the classes a"):
        image_folder("mine/empty")


@pytest.mark.parametrize("split_dir", [True, None, [1, 2]], ids=repr)
def test_a_split_that_is_no_path_is_refused(split_dir):
    with pytest.raises(TypeError, match=r"^image_folder: `split_dir` must be the path of a folder, got .* of type "):
        image_folder(split_dir)
