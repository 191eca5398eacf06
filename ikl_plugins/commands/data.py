"""Writes real images as class folders, the layout torchvision's ImageFolder and every other tool can read.

    ikl data digits
    ikl data cifar10-folder --from cifar10-train.zip cifar10-test.zip

The result is <data>/<data set>/{train,val,test}/<class>/<image> and a manifest.json that records the seed of the split,
the versions and a checksum of each split. <data> is --data, else the environment variable IKL_PLUGINS_DATA, else
`data` in the working directory.

A data set appears whole or not at all: it is written aside and renamed when complete. A second call finds it and
returns at once; --force makes it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import platform
import stat
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .._archives import opened_zip
from .._files import folder_aside
from .._limits import LimitError, check_regular_file, printable, read_text
from .._progress import steps

try:
    import fcntl
except ImportError:  # not POSIX: no lock, so do not prepare one data set from two processes at once there
    fcntl = None  # type: ignore[assignment]

__all__ = ["configure", "data_folder", "prepare_cifar10_folder", "prepare_digits", "run"]

INTERRUPTED = "nothing was left behind, run it again"
CALLER = "ikl data"

SPLITS = ("train", "val", "test")
DIGITS_SIZES = {"train": 1200, "val": 297, "test": 300}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = {".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff", ".png": b"\x89PNG\r\n\x1a\n"}
LARGEST_IMAGE = 2**20  # bytes; a 32x32 image has a thousand, so more than this is no such image
FORMAT = 1  # of the manifest; a change of what is written raises it


def data_folder() -> Path:
    """The folder that holds the data sets: IKL_PLUGINS_DATA, or `data` in the working directory."""
    return Path(os.environ.get("IKL_PLUGINS_DATA") or "data")


# --- the two data sets -----------------------------------------------------------------------------------------------


def prepare_digits(
    data: Path | None = None,
    *,
    seed: int = 0,
    force: bool = False,
    progress: bool | Callable[[tuple[int, int]], None] = True,
) -> Path:
    """Scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 RGB PNG files; returns their folder.

    Args:
        data: folder of all data sets; None for :func:`data_folder`.
        seed: of the stratified split into 1,200, 297 and 300 images.
        force: make it anew if it is there.
        progress: True for a bar on a terminal and lines elsewhere, on standard error; False for neither; or a function
            that is called after each image with how many are written, and of how many.

    Raises:
        ImportError: scikit-learn or Pillow is missing.
        OSError: the folder cannot be written.
        ValueError: the folder holds something else than this data set with this seed.
    """
    recipe = {"dataset": "digits", "seed": seed, "sizes": DIGITS_SIZES}

    def write(folder: Path) -> dict[str, Any]:
        try:
            from PIL import Image
            from sklearn.datasets import load_digits
        except ImportError as error:
            rule = f"digits needs scikit-learn and Pillow, but `{error.name}` is missing."
            raise ImportError(f"{CALLER}: {rule} Run: python -m pip install scikit-learn pillow") from error
        digits = load_digits()
        names = [f"{index:04d}.png" for index in range(len(digits.target))]
        members = defaultdict(list)
        for name, label in zip(names, digits.target, strict=True):
            members[str(label)].append(name)
        split_of = _split(members, {split: DIGITS_SIZES[split] for split in ("val", "test")}, seed)
        sums = _Checksums()
        rows = zip(names, digits.images, digits.target, strict=True)
        for name, image, label in steps(CALLER, rows, len(names), "digits", "images", progress):
            # The images hold counts of 0 to 16 dark pixels.
            grey = Image.fromarray((image * (255 / 16)).round().astype("uint8"))
            colour = grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
            place = PurePosixPath(split_of[str(label), name], str(label), name)
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            colour.save(path)
            sums.add(place, colour.tobytes())
        return {
            "source": "sklearn.datasets.load_digits, 8x8 grey enlarged to 32x32 RGB (bicubic)",
            "checksum": "sha256 over the sorted paths and sha256 of the RGB pixels",
            "versions": _versions("scikit-learn", "pillow", "numpy"),
            **sums.report(),
        }

    return _make(data, "digits", recipe, write, force=force)


def prepare_cifar10_folder(
    archives: Iterable[Path | str],
    data: Path | None = None,
    *,
    seed: int = 0,
    val_images: int = 5000,
    force: bool = False,
    progress: bool | Callable[[tuple[int, int]], None] = True,
) -> Path:
    """CIFAR-10 from zip archives of images in class folders; returns the folder of the data set.

    A validation split is held out of the training images. An archive holds ``<split>/<class>/<image>`` with the splits
    'train' and 'test', under any outer folder, or ``<class>/<image>`` when its file name says 'train' or 'test'. Images
    are copied as they are.

    Args:
        archives: the zip files; together they hold both splits.
        data: folder of all data sets; None for :func:`data_folder`.
        seed: of the choice of the validation images.
        val_images: how many training images are held out, the same share of each class.
        force: make it anew if it is there.
        progress: as for :func:`prepare_digits`.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an archive is missing, damaged, unsafe or of another layout, or the folder holds something else.
    """
    paths = [Path(archive) for archive in archives]
    sums_of_archives = sorted(_archive_sha256(path) for path in paths)
    recipe = {"dataset": "cifar10", "seed": seed, "val_images": val_images, "archives_sha256": sums_of_archives}

    def write(folder: Path) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            entries = _read_layouts([_open_archive(path, stack) for path in paths])
            split_of = _hold_out(entries, val_images, seed)
            for split, label in {(split, entry.label) for entry, split in zip(entries, split_of, strict=True)}:
                (folder / split / label).mkdir(parents=True)
            sums = _Checksums()
            pairs = zip(entries, split_of, strict=True)
            for entry, split in steps(CALLER, pairs, len(entries), "cifar10", "images", progress):
                content = _read_image(entry)
                place = PurePosixPath(split, entry.label, entry.name)
                (folder / place).write_bytes(content)
                sums.add(place, content)
        return {
            "source": sorted(path.name for path in paths),
            "checksum": "sha256 over the sorted paths and sha256 of the files",
            "versions": _versions(),
            **sums.report(),
        }

    return _make(data, "cifar10", recipe, write, force=force)


# --- splits and checksums --------------------------------------------------------------------------------------------


def _split(members: dict[str, list[str]], held_out: dict[str, int], seed: int) -> dict[tuple[str, str], str]:
    """The split of each (class, name): ``held_out`` images a split in the classes' proportions, the rest 'train'.

    The order within a class is that of a hash of seed and name, so it depends on no library's random numbers.
    """
    total = sum(map(len, members.values()))
    split_of = {}
    taken = dict.fromkeys(members, 0)
    orders = {
        label: sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{label}/{name}".encode()).digest())
        for label, names in members.items()
    }
    for split, size in held_out.items():
        shares = {label: size * len(names) / total for label, names in members.items()}
        counts = {label: int(share) for label, share in shares.items()}
        # Whole images by the largest remainder; ties go to the first name.
        by_remainder = sorted(shares, key=lambda label: (counts[label] - shares[label], label))
        for label in by_remainder[: size - sum(counts.values())]:
            counts[label] += 1
        for label, order in orders.items():
            for name in order[taken[label] : taken[label] + counts[label]]:
                split_of[label, name] = split
            taken[label] += counts[label]
    for label, order in orders.items():
        for name in order[taken[label] :]:
            split_of[label, name] = "train"
    return split_of


class _Checksums:
    """Collects what the manifest says about each split."""

    def __init__(self) -> None:
        self._digests: dict[str, dict[str, str]] = {split: {} for split in SPLITS}

    def add(self, place: PurePosixPath, content: bytes) -> None:
        self._digests[place.parts[0]][str(place)] = hashlib.sha256(content).hexdigest()

    def report(self) -> dict[str, Any]:
        splits = {}
        for split, digests in self._digests.items():
            per_class: dict[str, int] = defaultdict(int)
            whole = hashlib.sha256()
            for place, digest in sorted(digests.items()):
                per_class[PurePosixPath(place).parts[1]] += 1
                whole.update(f"{place} {digest}\n".encode())
            splits[split] = {"images": len(digests), "per_class": dict(per_class), "sha256": whole.hexdigest()}
        return {"splits": splits}


def _versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}


# --- archives --------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """One image of an archive."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    split: str
    label: str
    name: str


def _archive_sha256(path: Path) -> str:
    check_regular_file(f"{CALLER} --from", path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"{CALLER}: --from {path} cannot be read ({error.strerror}). Check the path.") from error


def _open_archive(path: Path, stack: contextlib.ExitStack) -> zipfile.ZipFile:
    try:
        return stack.enter_context(opened_zip(CALLER, path))
    except LimitError:
        raise
    except Exception as error:  # a damaged archive makes the readers raise nearly anything
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{CALLER}: {path} must be a whole zip archive, but reading it gave: {error}. Fetch it again.")


def _read_layouts(archives: list[zipfile.ZipFile]) -> list[_Entry]:
    """All images of the archives, after every rule on names, classes and splits has been checked."""
    entries: list[_Entry] = []
    for archive in archives:
        found = [_entry(archive, info) for info in archive.infolist() if not _is_clutter(info)]
        path = _path(archive)
        if not found:
            rule = f"{path} must hold images in class folders, but holds none."
            raise ValueError(f"{CALLER}: {rule} Pass archives of the layout <split>/<class>/<image>.")
        counts = {split: sum(entry.split == split for entry in found) for split in ("train", "test")}
        print(
            f"{printable(path.name, None)}: "
            + ", ".join(f"{count:,} images of {split}" for split, count in counts.items() if count)
        )
        entries += found

    for split in ("train", "test"):
        labels = sorted({entry.label for entry in entries if entry.split == split})
        if not labels:
            rule = f"--from must give both splits, but no archive holds {split!r}."
            raise ValueError(f"{CALLER}: {rule} Add the archive with the {split} images.")
        if labels != list(CIFAR10_CLASSES):
            rule = f"the {split} images must lie in the ten class folders {', '.join(CIFAR10_CLASSES)}"
            raise ValueError(f"{CALLER}: {rule}, got {len(labels)}: {', '.join(labels[:12])}. Pass CIFAR-10 archives.")
    places: dict[tuple[str, str, str], _Entry] = {}
    for entry in entries:
        place = entry.split, entry.label, entry.name
        if place in places:
            both = f"{_path(places[place].archive)} and again in {_path(entry.archive)}"
            rule = f"each image must come once, but {'/'.join(place)} is in {both}."
            raise ValueError(f"{CALLER}: {rule} Pass each archive once.")
        places[place] = entry
    return entries


def _path(archive: zipfile.ZipFile) -> Path:
    return Path(archive.filename or "")


def _is_clutter(info: zipfile.ZipInfo) -> bool:
    """Folders, and what file managers leave behind."""
    name = PurePosixPath(info.filename)
    return info.is_dir() or name.parts[:1] == ("__MACOSX",) or name.name in (".DS_Store", "Thumbs.db")


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Entry:
    """Split, class and name of one file of an archive; whatever does not fit is refused by name."""
    path = _path(archive)

    def refusal(rule: str, way_out: str) -> ValueError:
        return ValueError(f"{CALLER}: {path}: `{printable(info.filename)}` {rule}. {way_out}")

    if printable(info.filename, None) != info.filename:
        raise refusal("has control characters in its name", "Do not trust this archive.")
    parts = PurePosixPath(info.filename).parts
    if info.filename.startswith("/") or "\\" in info.filename or ":" in info.filename or ".." in parts:
        raise refusal("leads out of the target folder", "Do not trust this archive.")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise refusal("is a symbolic link", "Do not trust this archive.")
    if info.flag_bits & 1:
        raise refusal("is encrypted", "Pass an archive without a password.")
    if PurePosixPath(info.filename).suffix.lower() not in IMAGE_SUFFIXES:
        raise refusal(f"is no image ({', '.join(IMAGE_SUFFIXES)})", "Pass an archive of images alone.")
    if info.file_size > LARGEST_IMAGE:
        raise refusal(f"has {info.file_size:,} bytes, too many for a 32x32 image", "Pass CIFAR-10 archives.")
    if len(parts) >= 3 and parts[-3] in ("train", "test"):
        split = parts[-3]
    else:
        named = [split for split in ("train", "test") if split in path.stem.lower()]
        if len(parts) != 2 or len(named) != 1:
            rule = "fits neither <split>/<class>/<image> nor <class>/<image> in an archive named train or test"
            raise refusal(rule, "Repack or rename the archive.")
        split = named[0]
    return _Entry(archive, info, split, parts[-2], parts[-1])


def _hold_out(entries: list[_Entry], val_images: int, seed: int) -> list[str]:
    """The final split of each entry."""
    members = defaultdict(list)
    for entry in entries:
        if entry.split == "train":
            members[entry.label].append(entry.name)
    available = sum(map(len, members.values()))
    if not 0 < val_images < available:
        rule = f"--val-images must lie between 1 and {available - 1}, got {val_images}"
        raise ValueError(f"{CALLER}: {rule}, as there are {available} training images. Choose a number in that range.")
    split_of = _split(members, {"val": val_images}, seed)
    return [split_of[entry.label, entry.name] if entry.split == "train" else "test" for entry in entries]


def _read_image(entry: _Entry) -> bytes:
    path = _path(entry.archive)
    try:
        content = entry.archive.read(entry.info)
    except Exception as error:  # as above
        raise _damaged(path, error) from error
    if not content.startswith(IMAGE_SUFFIXES[PurePosixPath(entry.name).suffix.lower()]):
        rule = f"`{entry.info.filename}` must be an image of the kind its name says, but starts with {content[:8]!r}."
        raise ValueError(f"{CALLER}: {path}: {rule} Fetch the archive again.")
    return content


# --- all or nothing --------------------------------------------------------------------------------------------------


def _make(
    data: Path | None, name: str, recipe: dict[str, Any], write: Callable[[Path], dict[str, Any]], *, force: bool
) -> Path:
    """Lets ``write`` fill a folder aside and renames it to ``data/name``, unless that is there already."""
    data = data_folder() if data is None else Path(data)
    target = data / name
    recipe = {**recipe, "format": FORMAT}
    if not force and _is_made(target, recipe):
        print(f"{printable(target, None)}: already there ({_summary(target)})")
        return target
    if force and target.exists() and not (target / "manifest.json").is_file():
        raise _not_ours(target)
    try:
        data.mkdir(parents=True, exist_ok=True)
        with _lock(data / f".{name}.lock"):
            if not force and _is_made(target, recipe):  # by the process that held the lock
                return target
            with folder_aside(target) as aside:
                manifest = {**recipe, **write(aside)}
                (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "Free some space" if full else "Choose a writable folder with --data or IKL_PLUGINS_DATA"
        rule = f"cannot write {target} ({error.strerror or error}); nothing was left behind."
        raise OSError(error.errno, f"{CALLER}: {rule} {way_out}") from error
    print(f"{printable(target, None)}: written ({_summary(target)})")
    return target


def _is_made(target: Path, recipe: dict[str, Any]) -> bool:
    """Whether ``target`` holds what ``recipe`` asks for; what holds something else is refused."""
    if not target.exists():
        return False
    try:
        manifest = json.loads(read_text(CALLER, target / "manifest.json"))
        manifest["splits"].items()
    except FileNotFoundError as error:
        raise _not_ours(target) from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{CALLER}: {target / 'manifest.json'} is damaged ({error}). Pass --force.") from error
    for key, wanted in recipe.items():
        if manifest.get(key) != wanted:
            rule = f"{target} was made with {key} {manifest.get(key)}, not {wanted}."
            raise ValueError(f"{CALLER}: {rule} Pass --force to make it anew, or another folder with --data.")
    for split, facts in manifest["splits"].items():
        count = sum(len(files) for _, _, files in os.walk(target / split))
        if count != facts["images"]:
            rule = f"{target / split} must hold {facts['images']:,} images, got {count:,}."
            raise ValueError(f"{CALLER}: {rule} Pass --force to make it anew.")
    return True


def _not_ours(target: Path) -> ValueError:
    rule = f"{target} has no manifest.json, so it was not made here and is left alone."
    return ValueError(f"{CALLER}: {rule} Move it away, or choose another folder with --data.")


def _summary(target: Path) -> str:
    splits = json.loads((target / "manifest.json").read_text())["splits"]
    return ", ".join(f"{split} {facts['images']:,}" for split, facts in splits.items())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keeps a second process waiting until the first has finished."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- the command -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, help="folder of all data sets (default: IKL_PLUGINS_DATA, else `data`)")
    common.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    common.add_argument("--force", action="store_true", help="make the data set anew if it is there")
    commands = parser.add_subparsers(dest="data_set", required=True)
    commands.add_parser("digits", parents=[common], help="scikit-learn's 1,797 handwritten digits")
    cifar10 = commands.add_parser("cifar10-folder", parents=[common], help="CIFAR-10 from zip archives of images")
    cifar10.add_argument("--from", dest="archives", nargs="+", type=Path, required=True, metavar="ZIP")
    cifar10.add_argument("--val-images", type=int, default=5000, help="held out of the training images (default: 5000)")


def run(arguments: argparse.Namespace) -> None:
    """Prepares the data set that the command line names."""
    if arguments.data_set == "digits":
        prepare_digits(arguments.data, seed=arguments.seed, force=arguments.force)
    else:
        options = {"seed": arguments.seed, "val_images": arguments.val_images, "force": arguments.force}
        prepare_cifar10_folder(arguments.archives, arguments.data, **options)
