"""Small class folders of generated images, laid out as `ikl data` does, and a process group of one rank."""

import pytest
import torch

SIZES = {"train": 24, "val": 11, "test": 13}  # odd ones do not divide among two processes
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A data folder with `digits` and `cifar10`: coloured noise, a colour per class."""
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image", reason="images are written with Pillow")
    random = numpy.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    for name, labels, suffix in (("digits", "0123456789", "png"), ("cifar10", CIFAR10, "jpg")):
        for split, size in SIZES.items():
            for index in range(size):
                label = index % len(labels)
                pixels = random.integers(0, 120, (32, 32, 3)) + numpy.array([12 * label, 60, 120 - 12 * label])
                path = folder / name / split / labels[label] / f"{index}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.fromarray(pixels.astype("uint8")).save(path)
    return folder


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
