"""A library's network behind its own normalisation, how its images are made, and what builds it again."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._robustbench_import import import_robustbench
from ...models.robustbench_zoo import Statistics, check_statistics

__all__ = ["Geometry", "ImageArchitecture", "ImageModel", "probe_images"]

_robustbench = import_robustbench()
_ROOM = "robustbench.model_zoo.architectures.utils_architectures"
# Landscape, portrait, square, small: two geometries that agree on these are one.
_PROBES = ((300, 260), (270, 411), (320, 320), (48, 64))


class Geometry:
    """From a file's RGB image to a model's pixels: what its library does before it normalises.

    Args:
        steps: the library's own, from an RGB ``PIL.Image`` to pixels (3, H, W) in [0, 1].
        words: of the library, for logs. A geometry that RobustBench has a name for is called by that one.

    Attributes:
        name: for logs.
        size: (H, W) of what comes out.
    """

    def __init__(self, steps: Callable[[Any], Tensor], words: str) -> None:
        self._steps = steps
        pairs = [(probe, self(probe)) for probe in probe_images()]
        self.size: tuple[int, int] = (pairs[0][1].shape[1], pairs[0][1].shape[2])
        named = [(name, steps) for name, steps in _robustbench.data.PREPROCESSINGS.items() if name is not None]
        same = [name for name, theirs in named if all(torch.equal(pixels, theirs(probe)) for probe, pixels in pairs)]
        self.name: str = same[0] if same else words

    def __call__(self, image: Any) -> Tensor:
        """Pixels of an RGB ``PIL.Image``: float32, (3, H, W), in [0, 1]."""
        return self._steps(image)

    def __repr__(self) -> str:
        return f"Geometry({self.name!r}, size={self.size})"


def probe_images() -> list[Any]:
    """RGB images of several shapes, always the same."""
    from PIL import Image

    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in _PROBES]


@dataclasses.dataclass(frozen=True)
class ImageArchitecture:
    """What builds a network again, here and in RobustBench's model zoo.

    Attributes:
        library: 'timm', 'torchvision' or 'transformers'.
        name: that the library knows it by.
        options: what it is built with besides the number of classes.
    """

    library: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def expression(
        self, dataset: str, num_classes: int, *, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> str:
        """The normalised network as RobustBench's zoo writes it; it evaluates after :meth:`imports`."""
        named = [f"{name}={value!r}" for name, value in (("num_classes", num_classes), *self.options)]
        if self.library == "timm":
            network = f"timm.create_model({', '.join([repr(self.name), 'pretrained=False', *named])})"
        else:
            network = f"pt_models.{self.name}({', '.join(named)})"
        return f"normalize_model({network}, {tuple(mean or ())!r}, {tuple(std or ())!r})"

    def imports(self, dataset: str, *, mean: Sequence[float] | None = None) -> tuple[str, ...]:
        """The import statements that :meth:`expression` needs."""
        library = "import timm" if self.library == "timm" else "from torchvision import models as pt_models"
        return library, f"from {_ROOM} import normalize_model"

    def build(self, num_classes: int | None) -> nn.Module:
        """The network alone, untrained; None for the library's own number of classes."""
        options = {**dict(self.options), **({} if num_classes is None else {"num_classes": num_classes})}
        network: nn.Module
        if self.library == "timm":
            import timm

            network = timm.create_model(self.name, pretrained=False, **options)
        else:
            import torchvision

            network = torchvision.models.get_model(self.name, weights=None, **options)
        return network


class ImageModel(nn.Sequential):
    """A library's network behind its own normalisation: RobustBench's ``normalize_model``, and where it is from.

    Args:
        network: gives logits of normalised images.
        statistics: mean and std of the three channels of images in [0, 1]; buffers ``normalize.mean`` and
            ``normalize.std`` of the state dict.
        architecture: what builds the network again.
        geometry: how its images are made.
        num_classes: how many logits there are.
        classes: their names where the library says them.
    """

    def __init__(
        self,
        network: nn.Module,
        statistics: Statistics,
        architecture: ImageArchitecture,
        geometry: Geometry,
        num_classes: int,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        mean, std = check_statistics("ImageModel", *statistics, channels=3)
        normalize_model = _robustbench.model_zoo.architectures.utils_architectures.normalize_model
        super().__init__(collections.OrderedDict(normalize_model(network, mean, std).named_children()))
        self.statistics: Statistics = (mean, std)
        self.architecture = architecture
        self.geometry = geometry
        self.num_classes = num_classes
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of RGB images in [0, 1], shape (N, 3, H, W)."""
        if images.dim() != 4 or images.shape[1] != 3:  # broadcasting would make channels of one
            raise ValueError(f"ImageModel: images must have shape (N, 3, H, W), got {tuple(images.shape)}.")
        logits: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return logits
