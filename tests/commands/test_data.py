"""`ikl data` on generated archives, on scikit-learn's digits, and on the real archives where they are."""

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from ikl_plugins.commands import data as command
from ikl_plugins.commands.data import prepare_cifar10_folder
from ikl_plugins.commands.main import main

Image = pytest.importorskip("PIL.Image", reason="the digits are written with Pillow (extra `data`)")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[2])}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def jpeg(shade):
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (shade % 256, shade // 256, 0)).save(content, "JPEG")
    return content.getvalue()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members_of(split, per_class, classes=CLASSES, prefix=None):
    prefix = f"{split}/" if prefix is None else prefix
    return {
        f"{prefix}{label}/{index:04d}.jpg": jpeg(1000 * (split == "test") + 50 * number + index)
        for number, label in enumerate(classes)
        for index in range(per_class)
    }


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    return [
        write_zip(folder / "a.zip", members_of("train", 6)),
        write_zip(folder / "b.zip", members_of("test", 2)),
    ]


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def snapshot(folder):
    return {name: (folder / name).read_bytes() for name in listing(folder)}


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra `data`)")
    folder = tmp_path_factory.mktemp("data")
    main(["data", "digits", "--data", str(folder)])
    return folder / "digits"


def test_digits_has_every_image_once_in_stratified_splits(digits):
    from sklearn.datasets import load_digits

    paths = list(digits.glob("*/*/*.png"))
    targets = load_digits().target
    assert sorted((int(path.stem), int(path.parent.name)) for path in paths) == list(enumerate(targets.tolist()))
    for split, size in {"train": 1200, "val": 297, "test": 300}.items():
        counts = Counter(int(path.parent.name) for path in paths if path.parts[-3] == split)
        assert counts.total() == size
        assert all(abs(counts[label] - size * (targets == label).mean()) < 2 for label in range(10))


def test_digits_are_the_scikit_learn_images_enlarged(digits):
    import numpy as np
    from sklearn.datasets import load_digits

    originals = load_digits().images.reshape(-1, 64) / 16
    for path in sorted(digits.glob("*/*/*.png"))[::50]:
        with Image.open(path) as image:
            assert image.size == (32, 32)
            assert image.mode == "RGB"
            pixels = np.asarray(image, dtype=float) / 255
        assert (pixels[..., 0] == pixels[..., 2]).all()
        small = pixels[..., 0].reshape(8, 4, 8, 4).mean((1, 3)).reshape(-1)
        distances = ((originals - small) ** 2).sum(1)
        assert distances.argmin() == int(path.stem)
        assert len(np.unique(pixels)) > 17  # the source has 17 shades: interpolated, not repeated


def test_digits_manifest_records_seed_versions_and_checksums(digits):
    manifest = json.loads((digits / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert set(manifest["versions"]) == {"python", "scikit-learn", "pillow", "numpy"}
    sizes = {split: facts["images"] for split, facts in manifest["splits"].items()}
    assert sizes == {"train": 1200, "val": 297, "test": 300}
    whole = hashlib.sha256()
    for path in sorted(digits.glob("val/*/*.png"), key=lambda path: str(path.relative_to(digits))):
        with Image.open(path) as image:
            digest = hashlib.sha256(image.tobytes()).hexdigest()
        whole.update(f"{path.relative_to(digits)} {digest}\n".encode())
    assert manifest["splits"]["val"]["sha256"] == whole.hexdigest()


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    names = {"a": [f"{index}" for index in range(40)], "b": [f"{index}" for index in range(20)]}
    held_out = {"val": 9, "test": 6}
    first = command._split(names, held_out, seed=0)
    assert first == command._split({label: names[label][::-1] for label in "ba"}, held_out, seed=0)
    assert first != command._split(names, held_out, seed=1)
    counts = Counter(f"{label} {split}" for (label, _), split in first.items())
    assert counts == {"a val": 6, "a test": 4, "a train": 30, "b val": 3, "b test": 2, "b train": 15}


# --- the folder appears whole or not at all --------------------------------------------------------------------------


def test_a_second_call_changes_nothing_and_force_makes_it_anew(archives, tmp_path, capsys):
    data = tmp_path / "data"
    target = prepare_cifar10_folder(archives, data, val_images=10)
    before = snapshot(target)
    inode = target.stat().st_ino
    assert prepare_cifar10_folder(archives, data, val_images=10) == target
    assert "already there (train 50, val 10, test 20)" in capsys.readouterr().out
    assert target.stat().st_ino == inode
    prepare_cifar10_folder(archives, data, val_images=10, force=True)
    assert target.stat().st_ino != inode
    assert snapshot(target) == before
    assert sorted(path.name for path in data.iterdir()) == [".cifar10.lock", "cifar10"]


def test_a_folder_made_with_another_recipe_is_refused(archives, tmp_path):
    prepare_cifar10_folder(archives, tmp_path, val_images=10)
    with pytest.raises(ValueError, match=r"was made with seed 0, not 3\. Pass --force to make it anew"):
        prepare_cifar10_folder(archives, tmp_path, val_images=10, seed=3)
    with pytest.raises(ValueError, match="was made with val_images 10, not 20"):
        prepare_cifar10_folder(archives, tmp_path, val_images=20)
    other = write_zip(tmp_path / "other.zip", members_of("test", 3))
    with pytest.raises(ValueError, match="was made with archives_sha256"):
        prepare_cifar10_folder([archives[0], other], tmp_path, val_images=10)


def test_a_folder_with_lost_images_or_a_damaged_manifest_is_refused(archives, tmp_path):
    target = prepare_cifar10_folder(archives, tmp_path, val_images=10)
    next((target / "val").rglob("*.jpg")).unlink()
    with pytest.raises(ValueError, match=r"val must hold 10 images, got 9\. Pass --force"):
        prepare_cifar10_folder(archives, tmp_path, val_images=10)
    (target / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .* Pass --force"):
        prepare_cifar10_folder(archives, tmp_path, val_images=10)
    prepare_cifar10_folder(archives, tmp_path, val_images=10, force=True)
    assert len(list((target / "val").rglob("*.jpg"))) == 10


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(archives, tmp_path, force):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"has no manifest\.json, so it was not made here"):
        prepare_cifar10_folder(archives, tmp_path, val_images=10, force=force)
    assert (tmp_path / "cifar10" / "mine.txt").read_text() == "keep"


def test_a_killed_run_leaves_no_target_and_the_next_call_finishes(tmp_path):
    archives = [
        write_zip(tmp_path / "train.zip", members_of("train", 40)),
        write_zip(tmp_path / "test.zip", members_of("test", 2)),
    ]
    data = tmp_path / "data"
    slow = (
        "import pathlib, sys, time\n"
        "from ikl_plugins.commands import data\n"
        "read = data._read_image\n"
        "data._read_image = lambda entry: (time.sleep(0.02), read(entry))[1]\n"
        f"data.prepare_cifar10_folder(sys.argv[1:], pathlib.Path({str(data)!r}), val_images=100)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", slow, *map(str, archives)], env=ENVIRONMENT)
    partial = data / ".cifar10.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.rglob("*.jpg"))) < 5:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (data / "cifar10").exists()
    assert list(partial.rglob("*.jpg"))
    target = prepare_cifar10_folder(archives, data, val_images=100)
    assert len(listing(target)) == 420 + 1
    assert not partial.exists()


def test_a_data_set_moved_aside_by_a_killed_run_returns(archives, tmp_path):
    target = prepare_cifar10_folder(archives, tmp_path, val_images=10)
    target.rename(tmp_path / ".cifar10.old")
    with pytest.raises(ValueError, match="--val-images must lie"):
        prepare_cifar10_folder(archives, tmp_path, val_images=0, force=True)
    assert len(listing(target)) == 80 + 1


def test_two_processes_at_once_make_one_folder(archives, tmp_path):
    data = tmp_path / "data"
    line = [sys.executable, "-m", "ikl_plugins", "data", "cifar10-folder", "--from", *map(str, archives)]
    line += ["--val-images", "10", "--data", str(data)]
    runs = [subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        _, err = run.communicate(timeout=60)
        assert run.returncode == 0
        assert err in ("", "cifar10: 80 of 80 images\n")  # the other one finds it made
    assert len(listing(data / "cifar10")) == 80 + 1


@pytest.mark.parametrize(
    ("code", "way_out"),
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "Choose a writable folder with --data or IKL_PLUGINS_DATA")],
)
def test_a_full_or_read_only_disk_is_named_and_nothing_stays(archives, tmp_path, monkeypatch, code, way_out):
    data = tmp_path / "data"
    written = []
    write_bytes = Path.write_bytes

    def failing(path, content):
        if len(written) == 7:
            raise OSError(code, os.strerror(code))
        written.append(path)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(OSError, match=rf"cannot write .*cifar10 \({os.strerror(code)}\); nothing .* {way_out}"):
        prepare_cifar10_folder(archives, data, val_images=10)
    assert len(written) == 7
    assert listing(data) == [".cifar10.lock"]


# --- CIFAR-10 archives -----------------------------------------------------------------------------------------------


def test_images_arrive_unchanged_and_validation_is_held_out_of_training(archives, tmp_path, capsys):
    target = prepare_cifar10_folder(archives, tmp_path / "data", val_images=20)
    out = capsys.readouterr().out
    assert "a.zip: 60 images of train" in out
    assert "b.zip: 20 images of test" in out
    found = {}
    for split in ("train", "val", "test"):
        assert sorted(os.listdir(target / split)) == CLASSES
        for path in (target / split).rglob("*.jpg"):
            found.setdefault("train" if split == "val" else split, {})[f"{path.parent.name}/{path.name}"] = (
                path.read_bytes()
            )
    for split, per_class in (("train", 6), ("test", 2)):
        assert found[split] == members_of(split, per_class, prefix="")
    assert all(len(os.listdir(target / "val" / label)) == 2 for label in CLASSES)
    assert all(len(os.listdir(target / "train" / label)) == 4 for label in CLASSES)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("images.zip", "cifar10/train/"), ("images.zip", "a/b/train/"), ("cifar10_Train.zip", "")],
)
def test_the_split_comes_from_the_layout_or_from_the_archive_s_name(archives, tmp_path, name, prefix):
    members = {**members_of("train", 3, prefix=prefix), "__MACOSX/._train": b"x", f"{prefix}cat/.DS_Store": b"x"}
    if prefix:
        members[prefix] = b""
    train = write_zip(tmp_path / name, members)
    target = prepare_cifar10_folder([train, archives[1]], tmp_path / "data", val_images=10)
    assert len(list((target / "train").rglob("*.jpg"))) == 20


def test_one_archive_may_hold_both_splits(tmp_path):
    both = write_zip(tmp_path / "cifar.zip", {**members_of("train", 3), **members_of("test", 1)})
    target = prepare_cifar10_folder([both], tmp_path / "data", val_images=10)
    assert len(list((target / "test").rglob("*.jpg"))) == 10


def entry(name, content=None):
    """Two images of each class and one more."""
    return {**members_of("train", 2), name: jpeg(0) if content is None else content}


def two_of(classes=CLASSES, prefix=None):
    return members_of("train", 2, classes=classes, prefix=prefix)


OUTSIDE = "` leads out of the target folder"
REFUSED = [
    ("images.zip", entry("../../evil.jpg"), OUTSIDE),
    ("images.zip", entry("train/cat/..\\..\\evil.jpg"), OUTSIDE),
    ("images.zip", entry("C:/a/evil.jpg"), OUTSIDE),
    ("images.zip", entry("train/cat/huge.jpg", b"\xff\xd8\xff" + bytes(2**20)), "has 1,048,579 bytes, too many"),
    ("images.zip", entry("train/cat/x.jpg", b"GIF89a.."), "starts with b'GIF89a..'"),
    (
        "images.zip",
        two_of(CLASSES[:9]),
        r"train images must lie in the ten class folders airplane, .*, got 9: airplane",
    ),
    ("images.zip", {"train/cat/readme.txt": b"hello"}, r"`train/cat/readme.txt` is no image \(\.jpg"),
    ("images.zip", {"train/": b""}, "must hold images in class folders, but holds none"),
    ("images.zip", two_of(prefix=""), r"fits neither <split>/<class>/<image> nor"),
    ("train_and_test.zip", two_of(prefix=""), r"fits neither <split>/<class>/<image> nor"),
]


@pytest.mark.parametrize(("name", "members", "message"), REFUSED, ids=[f"{row[0]}: {row[2]}" for row in REFUSED])
def test_archives_that_are_no_cifar10_are_refused(archives, tmp_path, name, members, message):
    train = write_zip(tmp_path / name, members)
    with pytest.raises(ValueError, match=rf"^ikl data: .*{message}"):
        prepare_cifar10_folder([train, archives[1]], tmp_path / "data", val_images=10)
    assert listing(tmp_path / "data") == [".cifar10.lock"]
    assert not list(tmp_path.rglob("evil*"))


def damaged(name, whole):
    """An archive of 60 images with one fault."""
    content = bytearray(whole)
    if name == "cut off":
        return content[: len(whole) // 2]
    if name == "flipped":
        content[200] ^= 0xFF  # inside the first image
    if name == "encrypted":
        content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first entry in the central directory
    if name == "link":
        with zipfile.ZipFile(stream := io.BytesIO(content), "a") as archive:
            link = zipfile.ZipInfo("train/cat/link.jpg")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "/etc/passwd")
        return stream.getvalue()
    if name == "deflated":
        with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            for member, image in two_of().items():
                archive.writestr(member, image)
        content = bytearray(stream.getvalue())
        content[30 + len("train/airplane/0000.jpg")] |= 0b110  # the first block gets a kind that deflate does not have
    return content


DAMAGED = {
    "cut off": "broken.zip must be a whole zip archive",
    "flipped": "reading it gave: Bad CRC-32",
    "encrypted": "is encrypted",
    "link": r"`train/cat/link\.jpg` is a symbolic link",
    "deflated": "reading it gave: Error -3",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_archives_are_refused(archives, tmp_path, name):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(damaged(name, archives[0].read_bytes()))
    with pytest.raises(ValueError, match=DAMAGED[name]):
        prepare_cifar10_folder([broken, archives[1]], tmp_path / "data", val_images=10)
    assert listing(tmp_path / "data") == [".cifar10.lock"]


def test_archives_that_do_not_go_together_are_refused(archives, tmp_path):
    for paths, message in (
        (archives[:1], "--from must give both splits, but no archive holds 'test'"),
        ([*archives, archives[1]], "each image must come once, but test/airplane/0000.jpg is in .*b.zip and"),
        (["nowhere.zip", archives[1]], r"--from nowhere.zip cannot be read \(No such file or directory\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_cifar10_folder(paths, tmp_path / "data", val_images=10)


# --- the command and the real archives -------------------------------------------------------------------------------


def test_the_command(archives, tmp_path, monkeypatch, ikl):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
    done = ikl("data", "cifar10-folder", "--from", archives[0], "--val-images", 5)
    assert done.status.startswith("error: ikl data: --from must give both splits")
    done = ikl("data", "cifar10-folder", "--from", *archives, "--val-images", 10, "--seed", 3)
    assert done.status is None
    manifest = json.loads((tmp_path / "data" / "cifar10" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["val_images"]) == (3, 10)


@pytest.mark.slow
def test_the_real_archives(tmp_path):
    folder = os.environ.get("IKL_PLUGINS_DOWNLOADS")
    if not folder:
        pytest.skip("IKL_PLUGINS_DOWNLOADS names no folder with cifar10-jpeg-train.zip and cifar10-jpeg-test.zip")
    archives = [Path(folder) / f"cifar10-jpeg-{split}.zip" for split in ("train", "test")]
    if not all(path.is_file() for path in archives):
        pytest.skip(f"{folder} does not hold cifar10-jpeg-train.zip and cifar10-jpeg-test.zip")
    target = prepare_cifar10_folder(archives, tmp_path)
    splits = json.loads((target / "manifest.json").read_text())["splits"]
    for split, per_class in (("train", 4500), ("val", 500), ("test", 500)):
        assert splits[split]["per_class"] == dict.fromkeys(CLASSES, per_class)
        assert len(os.listdir(target / split / "ship")) == per_class
    with Image.open(next((target / "val" / "cat").iterdir())) as image:
        assert image.size == (32, 32)
        image.load()
