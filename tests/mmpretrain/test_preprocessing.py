"""Two views through MMPretrain's own pipeline, both collate functions and a step of the classifier."""

from __future__ import annotations

import numpy
import pytest
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmpretrain.datasets import CustomDataset
from mmpretrain.models import ClsDataPreprocessor
from PIL import Image

import ikl_plugins.mmpretrain  # noqa: F401 - registers what the configs name
from ikl_plugins.mmpretrain import TwoViewDataPreprocessor

MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
# The policies of the published runs are a matter of the config; any transform makes a second view.
AUGMENTED = {
    "AutoAugment": {"type": "AutoAugment", "policies": [[{"type": "Invert", "prob": 1.0}]]},
    "Cutout": {"type": "Cutout", "shape": 4, "pad_val": 0, "prob": 1.0},
}


@pytest.fixture
def folder(tmp_path):
    generator = numpy.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            pixels = generator.integers(1, 256, (8, 8, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def dataset(folder, augmented, views=(1, 1)):
    transforms = [[], [AUGMENTED[augmented]], []][: len(views)]
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "MultiView", "num_views": list(views), "transforms": transforms},
        {"type": "PackInputs"},
    ]
    return CustomDataset(data_root=str(folder), pipeline=pipeline)


def plain_images(folder):
    """The images as MMPretrain's own preprocessor prepares them."""
    data = CustomDataset(data_root=str(folder), pipeline=[{"type": "LoadImageFromFile"}, {"type": "PackInputs"}])
    batch = pseudo_collate([data[index] for index in range(4)])
    return ClsDataPreprocessor(mean=MEAN, std=STD, to_rgb=True)(batch, True)["inputs"]


@pytest.mark.parametrize("collate", [pseudo_collate, default_collate], ids=["pseudo", "default"])
@pytest.mark.parametrize("augmented", AUGMENTED)
def test_the_basic_view_is_the_image_and_the_second_the_augmented(folder, augmented, collate):
    data = dataset(folder, augmented)
    torch.manual_seed(0)
    batch = collate([data[index] for index in range(4)])
    prepared = TwoViewDataPreprocessor(mean=MEAN, std=STD, to_rgb=True)(batch, True)
    first, second = prepared["inputs"]
    plain = plain_images(folder)
    assert torch.equal(first, plain)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels, changed = (plain * std + mean).round(), (second * std + mean).round()
    if augmented == "AutoAugment":
        torch.testing.assert_close(changed, 255 - pixels)
    else:
        hole = (changed == 0).all(1)
        assert 0 < hole.sum() <= 4 * 4 * len(pixels)
        assert torch.equal(changed[~hole.unsqueeze(1).expand_as(changed)], pixels[~hole.unsqueeze(1).expand_as(pixels)])
    assert [sample.gt_label.item() for sample in prepared["data_samples"]] == [0, 0, 1, 1]


@pytest.mark.parametrize("collate", [pseudo_collate, default_collate], ids=["pseudo", "default"])
def test_single_images_pass_as_through_the_parent(folder, collate):
    data = CustomDataset(data_root=str(folder), pipeline=[{"type": "LoadImageFromFile"}, {"type": "PackInputs"}])
    prepared = TwoViewDataPreprocessor(mean=MEAN, std=STD, to_rgb=True)(collate([data[index] for index in range(4)]))
    assert torch.equal(prepared["inputs"], plain_images(folder))


def test_both_views_are_padded_and_three_are_refused(folder):
    two, three = (dataset(folder, "Cutout", views=(1,) * count) for count in (2, 3))
    preprocessor = TwoViewDataPreprocessor(mean=MEAN, std=STD, pad_size_divisor=16)
    first, second = preprocessor(pseudo_collate([two[index] for index in range(4)]), True)["inputs"]
    assert first.shape == second.shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match=r"two views of each image, got 3. Set num_views=\[1, 1\]"):
        preprocessor(pseudo_collate([three[index] for index in range(4)]), True)
