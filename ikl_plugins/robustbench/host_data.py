"""Evaluation on what the host saw: images of its own test data, and its own predictions beside ours.

The images are those of the config's test data set after its test pipeline, up to the normalisation, with the labels and
the class order that it has there.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .. import _validation as check
from .._limits import check_image
from .._progress import steps
from .conditions import own_conditions
from .data import Images, check_pixels, content_sha256, spread
from .evaluation.checks import check_class_order, check_data, check_model, natural_predictions
from .mmpretrain_data import MMPretrainData
from .torchdistill_data import TorchdistillData

__all__ = [
    "HostData",
    "HostImages",
    "NaturalCheck",
    "check_natural",
    "host_images",
    "images_of_mmpretrain",
    "images_of_torchdistill",
    "in_class_order",
    "open_host",
]


class HostData(Protocol):
    """The test data of a host's config, and how the host takes them.

    A sample is what the host's loader collates, whatever that is; pixels are (C, H, W) in [0, 1].
    """

    host: str
    name: str
    reads_files: bool

    @property
    def channels(self) -> int | None: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...

    def folders(self) -> tuple[str, ...] | None:
        """The names of the folders that its images lie in by label; None where that is not one a class."""

    def labels(self) -> list[int] | None:
        """Of all images; None where the images would have to be read."""

    def positions(self) -> Sequence[int]:
        """Of the images that the host tests on."""

    def read(self, position: int) -> tuple[Tensor, int]:
        """Pixels and label."""

    def file(self, position: int) -> str | None:
        """Where an image comes from."""

    def own(self, position: int) -> Any:
        """The host's sample."""

    def of_file(self, path: Path) -> tuple[Tensor, Any]:
        """Pixels and the host's sample of any image file."""

    def of_pixels(self, pixels: Tensor) -> Any:
        """The host's sample of an image that its pipeline has sized already."""

    def sized(self, pixels: Tensor) -> Tensor:
        """Pixels after the pipeline's geometry."""

    def predict(self, model: nn.Module, samples: Sequence[Any]) -> Tensor:
        """The host's own predictions, (N,)."""


_ROUNDING = 1e-5  # a resized white of floats is up to 5e-7 above 1
_DECODERS = 8 / 255  # what two of JPEG may be apart
Config: TypeAlias = Any  # a path, MMEngine's Config, the content of a YAML file, or HostData
Progress: TypeAlias = bool | Callable[[tuple[int, int]], None]


def open_host(caller: str, config: Config, channel_order: str | None = None) -> HostData:
    """The test data of a config, whichever host it is of; what is open already is handed back."""
    if isinstance(config, (MMPretrainData, TorchdistillData)):
        return config
    if isinstance(config, Mapping) or (isinstance(config, (str, Path)) and Path(config).suffix in (".yaml", ".yml")):
        return TorchdistillData(caller, config)
    return MMPretrainData(caller, config, channel_order)


@dataclasses.dataclass(frozen=True, eq=False)
class HostImages(Images):
    """Images of a host's own test data.

    Attributes:
        positions: of each image in the test data set.
    """

    positions: tuple[int, ...] = ()


def images_of_mmpretrain(
    config: Any, *, n_examples: int | None = None, channel_order: str | None = None, progress: Progress = True
) -> HostImages:
    """The images that an MMPretrain config tests on, as they come out of its test pipeline.

    Args:
        config: path of a config file, or MMEngine's ``Config``. It is trusted: what it imports is run, and
            ``test_dataloader.dataset`` is built, which may download.
        n_examples: how many, equally many of each class as far as they reach; None for all.
        channel_order: as of :func:`~ikl_plugins.robustbench.from_mmpretrain`.
        progress: True for a bar on a terminal and lines elsewhere, on standard error; False for neither; or a function
            that is called after each image with how many are read, and of how many.

    Returns:
        What the data preprocessor gets, as RGB pixels in [0, 1], or grey ones, or any number of channels; labels and
        class names as the data set has them.

    Raises:
        ImportError: MMPretrain, or a module that the config imports, is not installed.
        TypeError: an argument of the wrong type.
        ValueError: a file or the data are missing; a step of the pipeline that may change pixel values or draws random
            numbers (only loading, geometry and packing are taken); images of several sizes, outside [0, 1] or without
            one label each; fewer images than ``n_examples``.
    """
    caller = "images_of_mmpretrain"
    return host_images(caller, MMPretrainData(caller, config, channel_order), n_examples, progress)


def images_of_torchdistill(config: Any, *, n_examples: int | None = None, progress: Progress = True) -> HostImages:
    """The images that a torchdistill YAML file tests on, after its transform without ``Normalize``.

    Args:
        config: path of the file, or what torchdistill's ``load_yaml_file`` has made of it, which saves reading the data
            sets again. It is trusted: its ``!import_call`` entries are run.
        n_examples: how many, equally many of each class where the data set has ``targets``, else the first ones; None
            for all.
        progress: as of :func:`images_of_mmpretrain`.

    Returns:
        The images of ``test: test_data_loader:`` as pixels in [0, 1] with any number of channels; labels as the data
        set gives them.

    Raises:
        ImportError: torchdistill, or one of the file's ``dependencies``, is not installed.
        TypeError: an argument of the wrong type.
        ValueError: as :func:`images_of_mmpretrain`; a loader with a wrapper of data sets or its own way to collate.
    """
    caller = "images_of_torchdistill"
    return host_images(caller, TorchdistillData(caller, config), n_examples, progress)


def host_images(caller: str, data: HostData, n_examples: int | None, progress: Progress = True) -> HostImages:
    """The images of test data that are open already, see :func:`images_of_mmpretrain`."""
    positions = list(data.positions())
    if n_examples is not None:
        check.check_integer(caller, "n_examples", n_examples, "None takes all.")
        if n_examples > len(positions):
            raise ValueError(
                f"{caller}: `n_examples` must be at most {len(positions)}, the images of {data.name}, got "
                f"{n_examples}. Lower it."
            )
        labels = data.labels()
        positions = (
            positions[:n_examples]
            if labels is None
            else spread(positions, [labels[position] for position in positions], n_examples)
        )
    if not positions:
        raise ValueError(f"{caller}: {data.name} must have at least one image, got none. Check the data.")
    images, found = torch.empty(0), []
    rows = enumerate(steps(caller, positions, len(positions), f"reading {data.name}", "images", progress))
    for row, position in rows:
        pixels, label = _read(caller, data, position)
        if row == 0:  # one block: a stack of a list would take twice the memory
            images = torch.empty(len(positions), *pixels.shape)
        if pixels.dim() != 3 or pixels.shape != images.shape[1:]:
            raise ValueError(
                f"{caller}: images must have one size (C, H, W), got {tuple(images.shape[1:])} and "
                f"{tuple(pixels.shape)} (image {position}). Resize in the test pipeline."
            )
        images[row] = pixels
        found.append(label)
    check_pixels(caller, images)
    targets = torch.tensor(found)
    files = [data.file(position) for position in positions]
    return HostImages(
        images,
        targets,
        data.classes,
        data.name,
        content_sha256(images, targets),
        None if None in files else tuple(map(str, files)),
        positions=tuple(positions),
    )


def _read(caller: str, data: HostData, position: int) -> tuple[Tensor, int]:
    """Pixels and label, without what resizing floats rounds white to."""
    file = data.file(position)
    if file is not None and Path(file).exists():  # else in a store of the host
        check_image(caller, file)
    pixels, label = data.read(position)
    low, high = (bound.item() for bound in torch.aminmax(pixels))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"{caller}: pixels of {data.name} must lie in [0, 1], got {low:.4g} to {high:.4g} (image {position}). "
            "Resize bytes, and read them with 8 bits."
        )
    return pixels.clamp(0, 1), label


# --- images from elsewhere -------------------------------------------------------------------------------------------


def in_class_order(images: Images, model: nn.Module, config: Config) -> Images:
    """Images from elsewhere with the labels of the config's class order.

    Args:
        images: as :func:`~ikl_plugins.robustbench.load_images` gives them.
        model: of :func:`~ikl_plugins.robustbench.from_mmpretrain` or ``from_torchdistill``.
        config: that it is from.

    Returns:
        The images themselves where the order is the same, or where one side has no names (for the config's a warning
        says so, unless each class of its images lies in a folder of its own); else images with other labels and
        ``classes``.

    Raises:
        ValueError: class names that the config does not have; a checkpoint and a config of different classes.
    """
    caller = "in_class_order"
    data = open_host(caller, config)
    known, trained = data.classes, getattr(model, "classes", None)
    if known is not None and trained is not None and known != trained:
        raise ValueError(
            f"{caller}: the config's classes must be the checkpoint's, got {_differing(known, trained)}. Name the "
            "config of its training."
        )
    names = known or trained
    if images.classes is None:
        return images
    folders = data.folders()
    if names and folders and names != folders and set(names) == set(folders):
        raise ValueError(
            f"{caller}: the config's classes must be named as its labels are, got {_differing(names, folders)}. "
            "Leave out --data."
        )
    if images.classes == names:
        return images
    if names is None or _ids(images.classes) != _ids(names):
        if folders is None and names is None:
            warnings.warn(
                f"{caller}: {data.name} names no classes, so labels are those of the folders of {images.name}. Check "
                "their order.",
                UserWarning,
                stacklevel=2,
            )
        if folders == images.classes or (folders is None and len(names or images.classes) == len(images.classes)):
            return images  # with words for names both are in WordNet's order
        names = folders or names or ()
    missing = [name for name in images.classes if name not in names]
    if missing:
        raise ValueError(
            f"{caller}: the classes of {images.name} must be the config's, got {check.first_names(missing)}, which it "
            f"lacks. Rename the folders: {check.first_names(names)}."
        )
    places = torch.tensor([names.index(name) for name in images.classes])
    labels = places[images.labels]
    sha256 = content_sha256(images.images, labels)
    return dataclasses.replace(images, labels=labels, classes=names, sha256=sha256, source=None)


def _differing(ours: Sequence[str], theirs: Sequence[str]) -> str:
    pairs = (pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1])
    first = next(pairs, None)
    return f"{len(ours)} and {len(theirs)}" if first is None else f"{first[0]!r} where it has {first[1]!r}"


def _ids(names: Sequence[str] | None) -> bool:
    """Whether classes are named by WordNet, as the folders of ImageNet: MMPretrain names the same ones in words."""
    return all(name[:1] == "n" and len(name) == 9 and name[1:].isdecimal() for name in names or ())


# --- before an attack ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NaturalCheck:
    """What a model gets right before any attack.

    Attributes:
        n_examples: how many images.
        accuracy: of the model on these images, in percent.
        host: whose own test was run on them; None for no config.
        host_accuracy: of that test, in percent; equal to ``accuracy``.
    """

    n_examples: int
    accuracy: float
    host: str | None = None
    host_accuracy: float | None = None

    def __str__(self) -> str:
        theirs = "" if self.host is None else f", {self.host}'s own test of them {self.host_accuracy:.2f} %"
        return f"natural accuracy on {self.n_examples} images {self.accuracy:.2f} %{theirs}"


@own_conditions()
def check_natural(
    model: nn.Module,
    images: Images,
    config: Config = None,
    *,
    n_examples: int = 128,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
) -> NaturalCheck:
    """Compares a model's predictions with those of the host's own test, image by image.

    The host reads its images anew, through its whole pipeline, data preprocessor and ``predict``; in torchdistill
    through the whole transform and the plain network. It reads the files of a class folder likewise; of other images
    it gets the pixels, whose size must be the one that its pipeline makes.

    Args:
        model: of images in [0, 1] in eval mode; with ``config`` what :func:`~ikl_plugins.robustbench.from_mmpretrain`
            or ``from_torchdistill`` gave for it.
        images: of :func:`images_of_mmpretrain`, :func:`images_of_torchdistill` or
            :func:`~ikl_plugins.robustbench.load_images`.
        config: path, MMEngine's ``Config`` or the content of a YAML file; None for the accuracy alone.
        n_examples: how many images at most, evenly spread over all.
        batch_size: images per batch.
        device: where to compute; the model is moved there.

    Returns:
        Both accuracies.

    Raises:
        TypeError, ValueError: as of :func:`~ikl_plugins.robustbench.evaluate` for ``model`` and ``images``.
        ValueError: predictions that differ; images of another size than the config's pipeline makes, or others than it
            makes of their files; a data set whose images are others when they are read again, or one of torchdistill
            that reads in a way of its own, with images from elsewhere.
    """
    caller = "check_natural"
    if config is not None:
        check_model(caller, model, "standard")
    check_class_order(caller, model, images)
    pixels, labels = check_data(caller, images.images, images.labels)
    check.check_integer(caller, "n_examples", n_examples)
    check.check_integer(caller, "batch_size", batch_size)
    chosen = torch.linspace(0, len(labels) - 1, min(n_examples, len(labels))).long()
    place = torch.device(device)
    model = model.to(place)
    with torch.no_grad():
        ours, _ = natural_predictions(caller, model, pixels[chosen], labels[chosen], batch_size, place)
        accuracy = _percent(ours, labels[chosen])
        done = NaturalCheck(len(chosen), accuracy)
        if config is not None:
            data = open_host(caller, config)
            samples = list(_samples(caller, data, images, chosen.tolist()))
            batches = (samples[start : start + batch_size] for start in range(0, len(samples), batch_size))
            theirs = torch.cat([data.predict(model, batch) for batch in batches])
            _check_equal(caller, data, images, chosen, ours, theirs)
            done = dataclasses.replace(done, host=data.host, host_accuracy=_percent(theirs, labels[chosen]))
    return done


def _percent(predictions: Tensor, labels: Tensor) -> float:
    return 100 * predictions.eq(labels).double().mean().item()


def _samples(caller: str, data: HostData, images: Images, chosen: Sequence[int]) -> Iterator[Any]:
    """The host's own samples of the chosen images, read again."""
    for index in chosen:
        pixels = images.images[index]
        if isinstance(images, HostImages):
            again, _ = _read(caller, data, images.positions[index])
            if not torch.equal(again, pixels):
                raise ValueError(
                    f"{caller}: {data.name} must give the same image each time, but image {index} differs. Take random "
                    "steps out of its test pipeline."
                )
            yield data.own(images.positions[index])
            continue
        if images.files is not None and data.reads_files:
            made, sample = data.of_file(Path(images.name) / images.files[index])
        else:
            made, sample = data.sized(pixels), data.of_pixels(pixels)
        if made.shape != pixels.shape:
            raise ValueError(
                f"{caller}: images must have the size that the config's test pipeline makes, {tuple(made.shape)}, got "
                f"{tuple(pixels.shape)} from {images.name}. Leave out --data, or size them so."
            )
        if images.files is not None and data.reads_files and (made - pixels).abs().max() > _DECODERS:
            raise ValueError(
                f"{caller}: images must be those that the config's test pipeline makes, but {images.files[index]} "
                "differs. Leave out --data."
            )
        yield sample


def _check_equal(caller: str, data: HostData, images: Images, chosen: Tensor, ours: Tensor, theirs: Tensor) -> None:
    differ = ours.ne(theirs).nonzero().flatten().tolist()
    if not differ:
        return
    first = differ[0]
    index = int(chosen[first])
    name = f"image {index}" if images.files is None else images.files[index]
    way_out = "Report the config" if isinstance(images, HostImages) else "Leave out --data"
    raise ValueError(
        f"{caller}: the model must predict what {data.host}'s own test does, but {len(differ)} of {len(chosen)} "
        f"differ, first {name}: {int(ours[first])}, not {int(theirs[first])}. {way_out}."
    )
