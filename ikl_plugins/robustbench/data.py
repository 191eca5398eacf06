"""Images to evaluate on: RobustBench's data sets, a folder of class folders, or an .npz file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import _validation as check
from .._archives import opened_npz
from .._limits import LimitError, check_image, printable
from .._robustbench_import import import_robustbench
from .known_sets import KNOWN, cifar_source, imagenet_source

__all__ = ["DATASETS", "Images", "check_pixels", "content_sha256", "file_sha256", "load_images", "spread"]

DATASETS = tuple(KNOWN)  # RobustBench's names
_CALLER = "load_images"
_IMAGENET_CLASSES = 1000
_IMAGENET_IMAGES = KNOWN["imagenet"].n_examples  # as many as RobustBench's list names
_IMAGENET_PREPROCESSING = "Res256Crop224"  # that of its loader
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_KEYS = (("image", "images"), ("label", "labels"))
_CHUNK = 1 << 20
# What torchvision and MMCV turn into the same RGB bytes, alpha and all frames but the first left out.
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
# What ImageFolder takes by its name. For others Pillow may run a program, as Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # of Exif, as the next of TIFF
_BITS_PER_SAMPLE = 258

Array = np.ndarray[Any, Any]
_Sample = TypeVar("_Sample")
_robustbench = import_robustbench()


class Preprocessing(Protocol):
    """From a file's RGB image to pixels (C, H, W) in [0, 1], under a name for logs."""

    name: str

    def __call__(self, image: Any) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their labels, and what identifies them.

    Attributes:
        images: float32, shape (N, C, H, W), pixels in [0, 1]; C is 3 for RGB, 1 for grey.
        labels: class indices, int64, shape (N,).
        classes: names of the classes by index, or None.
        name: of the data set, or the path.
        sha256: checksum of these images and labels, see :func:`content_sha256`.
        files: where each image came from, or None.
        preprocessing: name of the geometry that was applied, or None.
        source: what makes them the first images of the test set that ``name`` says, such as the file with its MD5; None
            for images of any other origin or order.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] | None
    name: str
    sha256: str
    files: tuple[str, ...] | None = None
    preprocessing: str | None = None
    source: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def load_images(
    source: str | Path,
    *,
    data_dir: str | Path = "data",
    n_examples: int | None = None,
    offline: bool = False,
    preprocessing: str | Preprocessing | None = None,
    channels: int | None = None,
) -> Images:
    """Loads images with pixels in [0, 1].

    Files of a class folder become the RGB bytes to which torchvision's ``ImageFolder`` and MMCV's
    ``LoadImageFromFile`` both decode them: grey levels three times, palettes as their colours, without alpha, of
    several frames the first. What the two read differently is refused: grey levels of more than 8 bits, floating
    values, CMYK, an Exif orientation that turns the image, and rare kinds of TIFF and PPM.

    Args:
        source: 'cifar10', 'cifar100' or 'imagenet', read by RobustBench's own loaders; or a folder with a folder of
            images per class; or an .npz file with ``image`` or ``images``, ``label`` or ``labels`` (class indices) and
            maybe ``classes`` (their names).
            Its images are uint8, (N, H, W, C), or floats in [0, 1], (N, C, H, W), with no more channels than rows or
            columns; or (N, H, W), which is one channel. A folder of a data set's name is written ./cifar10.
        data_dir: where the data sets lie, or are downloaded to; for ImageNet the folder that has ``val``.
        n_examples: how many; None for all (of ImageNet RobustBench's 5,000). Of a data set or a file the first ones; of
            a class folder equally many of each class, as far as they reach.
        offline: never download.
        preprocessing: name of one of RobustBench's geometries, such as 'Res256Crop224', or the ``geometry`` of a model;
            None for the images as they are; ImageNet is then given 'Res256Crop224'. Not for an .npz file.
        channels: 1 to read a class folder as one grey channel, from files without colour; None for RGB, and for an
            .npz file as it is.

    Returns:
        The images, those of a class folder in the order of its class and file names.

    Raises:
        TypeError: ``n_examples`` or ``channels`` is no integer, or arrays have a wrong dtype.
        ValueError: an unknown source or preprocessing; data that is missing (the message says which files belong
            where), empty, unreadable or read differently by the hosts (named), of differing sizes, of another number
            of ``channels`` or outside [0, 1]; fewer images than ``n_examples``.
    """
    if n_examples is not None:
        check.check_integer(_CALLER, "n_examples", n_examples, "None takes all.")
    named = _robustbench.data.PREPROCESSINGS
    if isinstance(preprocessing, str) and preprocessing not in named:
        known = [name for name in named if name is not None]
        raise ValueError(check.unknown_name_message(_CALLER, "preprocessing", preprocessing, known))
    if channels is not None:
        check.check_integer(_CALLER, "channels", channels)
    path = Path(source).expanduser()
    if (source in DATASETS and channels not in (None, 3)) or (path.is_dir() and channels not in (None, 1, 3)):
        raise _other_channels(channels, 3, source)
    if source in DATASETS:
        return _load_dataset(str(source), Path(data_dir).expanduser(), n_examples, offline, preprocessing)
    if path.is_dir():
        return _load_folder(path, n_examples, preprocessing, "L" if channels == 1 else "RGB")
    if path.suffix == ".npz":
        return _load_npz(path, n_examples, preprocessing, channels)
    raise ValueError(
        f"{_CALLER}: `source` must be {', '.join(map(repr, DATASETS))}, a folder of classes or an .npz, "
        f"got {str(source)!r} in {Path.cwd()}."
    )


def content_sha256(images: Tensor, labels: Tensor) -> str:
    """The SHA-256 of shapes, float32 pixels and int64 labels, in this order; images are (N, C, H, W), labels (N,)."""
    digest = hashlib.sha256(f"{tuple(images.shape)} {tuple(labels.shape)}\n".encode())
    for start in range(0, len(images), 256):
        digest.update(images[start : start + 256].detach().cpu().float().contiguous().numpy().tobytes())
    digest.update(labels.detach().cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --- RobustBench's data sets -----------------------------------------------------------------------------------------


def _geometry(preprocessing: str | Preprocessing | None) -> tuple[Callable[[Any], Tensor], str | None]:
    """What makes pixels of an image, and its name."""
    if preprocessing is None or isinstance(preprocessing, str):
        return _robustbench.data.PREPROCESSINGS[preprocessing], preprocessing
    return preprocessing, preprocessing.name


def _load_dataset(
    name: str, data_dir: Path, n_examples: int | None, offline: bool, preprocessing: str | Preprocessing | None
) -> Images:
    samples: list[tuple[str, int]] = []
    if name == "imagenet":
        preprocessing = preprocessing or _IMAGENET_PREPROCESSING
        n_examples = _IMAGENET_IMAGES if n_examples is None else n_examples
        if n_examples > _IMAGENET_IMAGES:
            raise _too_many(n_examples, _IMAGENET_IMAGES, "RobustBench's list of ImageNet images")
        samples = _imagenet_samples(data_dir, n_examples)
    elif offline:
        check_cifar(_CALLER, name, data_dir)
    kind = _robustbench.data.BenchmarkDataset(name)
    transform, geometry = _geometry(preprocessing)
    images, labels = _robustbench.data.load_clean_dataset(kind, n_examples, str(data_dir), transform)
    if n_examples is not None and len(images) < n_examples:
        raise _too_many(n_examples, len(images), name)
    labels = labels.long()
    if name == "imagenet":
        read = _robustbench.loaders.pil_loader
        source = imagenet_source(samples, data_dir / "val", lambda file: transform(read(file)), images, labels)
    else:
        source = None if preprocessing else cifar_source(name, data_dir, images, labels)
    return _images(images, labels, _class_names(name, data_dir), name, None, geometry, source)


def check_cifar(caller: str, name: str, data_dir: Path) -> None:
    """Refuses a folder in which torchvision would not find every file of CIFAR with its checksum."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        kind(str(data_dir), train=False, download=False)
    except RuntimeError as error:
        files = ", ".join(file for file, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")])
        raise ValueError(
            f"{caller}: {name} must lie in {data_dir / _CIFAR_FOLDERS[name]} to be read offline, unchanged: "
            f"{files}. Unpack {kind.url} in {data_dir}."
        ) from error


def _class_names(name: str, data_dir: Path) -> tuple[str, ...] | None:
    """The names of the classes, if the files that say them are there."""
    from torchvision.datasets import CIFAR10, CIFAR100

    if name == "imagenet":
        return tuple(sorted(entry.name for entry in os.scandir(data_dir / "val") if entry.is_dir()))
    try:
        return tuple({"cifar10": CIFAR10, "cifar100": CIFAR100}[name](str(data_dir), train=False).classes)
    except RuntimeError:
        return None  # a loader of one's own reads from elsewhere; the numbers need no names


def _imagenet_samples(data_dir: Path, n_examples: int) -> list[tuple[str, int]]:
    """RobustBench's list of files and labels; a folder that lacks one of the first ``n_examples`` is refused."""
    root = data_dir / "val"
    way_out = "Put ILSVRC2012_img_val there, a folder per class (n01440764, ...); data_dir is the folder above."
    if not root.is_dir():
        raise ValueError(f"{_CALLER}: imagenet must lie in {root}, but there is no such folder. {way_out}")
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    if len(folders) != _IMAGENET_CLASSES:  # a label is a folder's place among all of them
        raise ValueError(
            f"{_CALLER}: imagenet in {root} must have {_IMAGENET_CLASSES:,} class folders and no other, got "
            f"{len(folders):,}. {way_out}"
        )
    try:
        samples: list[tuple[str, int]] = _robustbench.data.CustomImageFolder(str(root)).samples
    except KeyError as error:
        raise ValueError(f"{_CALLER}: imagenet in {root} must have the folder {error.args[0]}. {way_out}") from error
    for file, _ in samples[:n_examples]:
        if not Path(file).is_file():
            raise ValueError(f"{_CALLER}: imagenet must have RobustBench's images, but {file} is missing. {way_out}")
        check_image(_CALLER, file)
    return samples


# --- folders and files -----------------------------------------------------------------------------------------------


def _load_folder(path: Path, n_examples: int | None, preprocessing: str | Preprocessing | None, mode: str) -> Images:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{_CALLER}: `source` must have images in a folder per class and no empty one, but reading {path} gave: "
            f"{str(error).rstrip('.')}. Name one split."
        ) from error
    samples = folder.samples
    if n_examples is not None:
        if n_examples > len(samples):
            raise _too_many(n_examples, len(samples), path)
        samples = spread(samples, folder.targets, n_examples)
    transform, geometry = _geometry(preprocessing)
    images: list[Tensor] = []
    for file, _ in samples:
        images.append(transform(_read(file, mode)))
        if images[-1].shape != images[0].shape:
            known = ", ".join(name for name in _robustbench.data.PREPROCESSINGS if name is not None)
            raise ValueError(
                f"{_CALLER}: images must have one size, got {tuple(images[0].shape[1:])} ({samples[0][0]}) and "
                f"{tuple(images[-1].shape[1:])} ({file}). Choose a `preprocessing`: {known}."
            )
    labels = torch.tensor([label for _, label in samples])
    files = tuple(str(Path(file).relative_to(path)) for file, _ in samples)
    return _images(torch.stack(images), labels, tuple(folder.classes), str(path), files, geometry)


def spread(samples: Sequence[_Sample], labels: Sequence[int], n_examples: int) -> list[_Sample]:
    """``n_examples`` samples: from each class in turn, given in their old order."""
    seen: Counter[int] = Counter()
    turns = []
    for index, label in enumerate(labels):
        turns.append((seen[label], index))
        seen[label] += 1
    return [samples[index] for index in sorted(index for _, index in sorted(turns)[:n_examples])]


def _read(file: str, mode: str) -> Any:
    """An image as RGB, or as one channel ("L") if it has no colour."""
    from PIL import Image

    check_image(_CALLER, file)
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            reason = _read_differently(opened)  # before it is decoded: then Pillow forgets how
            image = opened.convert("RGB")
    except Exception as error:  # Pillow raises nearly any on a damaged file
        raise ValueError(f"{_CALLER}: every image must be readable, but {file} is not: {error}.") from error
    if reason is not None:
        what, way_out = reason
        raise ValueError(
            f"{_CALLER}: torchvision and MMCV must read a file alike, but {file} {what}. {way_out} in a copy of the "
            "folder."
        )
    if mode == "RGB":
        return image
    red, green, blue = image.split()
    if not red.tobytes() == green.tobytes() == blue.tobytes():  # the hosts weigh colours differently
        raise ValueError(f"{_CALLER}: with channels=1 images must be grey, but {file} has colour. Leave it out.")
    return red


def _read_differently(image: Any) -> tuple[str, str] | None:
    """What torchvision and MMCV make different pixels of, and the way out; None where they agree."""
    tiff = image.format == "TIFF"
    bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) if tiff else 8
    way_out = "Save it as 8-bit RGB or grey PNG"
    if image.mode not in _MODES or bits > 8 or (tiff and image.mode == "RGBA"):
        return f"is {image.format} of mode {image.mode}{f', {bits} bits' if bits > 8 else ''}", way_out
    if image.format == "PPM" and image.tile and image.tile[0][0] != "raw":
        return "has other levels than bytes from 0 to 255", way_out
    if not tiff and image.getexif().get(_ORIENTATION) in range(2, 9):  # both turn a TIFF
        return "has an Exif orientation, which MMCV alone follows", "Turn it with PIL.ImageOps.exif_transpose"
    return None


def _load_npz(
    path: Path, n_examples: int | None, preprocessing: str | Preprocessing | None, channels: int | None
) -> Images:
    if preprocessing is not None:
        raise ValueError(
            f"{_CALLER}: `preprocessing` must be None for an .npz file, got {preprocessing!r}. Store images "
            "of the network's size."
        )
    if not path.is_file():
        raise ValueError(f"{_CALLER}: `source` must be a file, but there is none at {path} in {Path.cwd()}.")
    pixels, labels, classes = _read_npz(path)
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        raise TypeError(
            f"{_CALLER}: images of {path} must be uint8 or floats, got {pixels.dtype}. Convert grey levels to uint8."
        )
    shape = pixels.shape
    if pixels.ndim == 3:  # grey
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.dtype == np.uint8:
        pixels = pixels.transpose(0, 3, 1, 2)
    # More channels than rows or columns is the other layout.
    if pixels.ndim != 4 or pixels.shape[1] > min(pixels.shape[2:]):
        raise ValueError(
            f"{_CALLER}: images of {path} must be (N, H, W, C) as uint8 or (N, C, H, W) as floats, or (N, H, W), got "
            f"{shape} as {pixels.dtype}."
        )
    if channels not in (None, pixels.shape[1]):
        raise _other_channels(channels, pixels.shape[1], path)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{_CALLER}: labels of {path} must be integer class indices, got {labels.dtype}.")
    if labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{_CALLER}: {path} must hold a label per image, got shape {labels.shape} for {len(pixels)} images."
        )
    if n_examples is not None:
        if n_examples > len(pixels):
            raise _too_many(n_examples, len(pixels), path)
        pixels, labels = pixels[:n_examples], labels[:n_examples]
    images = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    if pixels.dtype == np.uint8:
        images = images.div(255)
    return _images(images, torch.from_numpy(labels.astype(np.int64)), classes, str(path), None, None)


def _read_npz(path: Path) -> tuple[Array, Array, tuple[str, ...] | None]:
    try:
        with opened_npz(_CALLER, path) as file:
            there = list(file)
            chosen = [[key for key in keys if key in there] for keys in _KEYS]
            arrays = [file[keys[0]] for keys in chosen if len(keys) == 1]
            names = file["classes"] if "classes" in there else np.empty(0)
    except LimitError:
        raise
    except Exception as error:  # a damaged archive makes the readers raise nearly anything
        raise ValueError(
            f"{_CALLER}: {path} must be an .npz file of plain arrays, but reading it gave: {error}."
        ) from error
    for keys, found in zip(_KEYS, chosen, strict=True):
        if len(found) != 1:
            raise ValueError(
                f"{_CALLER}: {path} must hold either `{keys[0]}` or `{keys[1]}`, but has "
                f"{check.first_names([*map(printable, there)]) or 'nothing'}."
            )
    return arrays[0], arrays[1], tuple(names.tolist()) if names.dtype.kind == "U" and names.size else None


# --- what all of them share ------------------------------------------------------------------------------------------


def _images(
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...] | None,
    name: str,
    files: tuple[str, ...] | None,
    preprocessing: str | None,
    source: dict[str, str] | None = None,
) -> Images:
    check_pixels(_CALLER, images)
    return Images(images, labels, classes, name, content_sha256(images, labels), files, preprocessing, source)


def check_pixels(caller: str, images: Tensor) -> None:
    """Refuses no images at all, and pixels outside [0, 1]."""
    if len(images) == 0:
        raise ValueError(f"{caller}: there must be at least one image, got none. Check the data.")
    low, high = (bound.item() for bound in torch.aminmax(images))
    if not (low >= 0 and high <= 1):  # so that NaN is refused
        raise ValueError(
            f"{caller}: pixels must lie in [0, 1], got values from {low:.4g} to {high:.4g}. Divide grey levels by 255."
        )
    if 0 < high <= 1 / 255:
        raise ValueError(f"{caller}: pixels must reach 1, but the brightest is {high:.4g}, as if divided by 255 twice.")


def _other_channels(wanted: int | None, there: int, where: object) -> ValueError:
    return ValueError(f"{_CALLER}: `channels` must be {there}, those of {where}, got {wanted}. Leave it out.")


def _too_many(wanted: int, there: int, where: object) -> ValueError:
    return ValueError(
        f"{_CALLER}: `n_examples` must be at most {there}, the images of {where}, got {wanted}. "
        f"Lower it, or leave it out for all."
    )
