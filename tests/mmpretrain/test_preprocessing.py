"""Two views through MMPretrain's own pipeline and both collate functions, and the authors' augmentations."""

from __future__ import annotations

import numpy
import pytest
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmpretrain.datasets import CustomDataset
from mmpretrain.models import ClsDataPreprocessor
from PIL import Image
from torchvision.transforms import functional as tv

from ikl_plugins.mmpretrain import CIFAR10AutoAugment, ClippedCutout, TwoViewDataPreprocessor

MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
AUGMENTED = {"Invert": {"type": "Invert", "prob": 1.0}, "Cutout": {"type": "ClippedCutout", "size": 4}}


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
    if augmented == "Invert":
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


# --- the authors' augmentations: values typed from what is known of their code, operations of NumPy and torchvision ---

PHOTO = numpy.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
COLUMN = numpy.broadcast_to(4 * numpy.arange(32, dtype=numpy.uint8)[:, None, None], (32, 32, 3)).copy()
GREY = 128


def moved(image, rows=0, columns=0):
    """Moved down and right, grey behind."""
    expected = numpy.full_like(image, GREY)
    height, width = image.shape[:2]
    expected[max(rows, 0) : height + rows, max(columns, 0) : width + columns] = image[
        max(-rows, 0) : height - rows, max(-columns, 0) : width - columns
    ]
    return expected


def by_torchvision(name, *values):
    return lambda image: numpy.asarray(getattr(tv, name)(Image.fromarray(image), *values))


def solarized(level):
    return lambda image: numpy.where(image >= numpy.linspace(256, 0, 10)[level], 255 - image, image)


# name, level | what may come out
OPERATIONS = {
    ("Solarize", 2): [solarized(2)],  # from 199.1 up; torchvision from 198.3
    ("Solarize", 5): [solarized(5)],
    ("Posterize", 7): [lambda image: image & 0b11111000],  # round(8 - 7 * 4 / 9) = 5 bits
    ("TranslateX", 9): [lambda image: moved(image, columns=15), lambda image: moved(image, columns=-15)],  # 14.502
    ("TranslateX", 8): [lambda image: moved(image, columns=13), lambda image: moved(image, columns=-13)],  # 12.89
    ("TranslateY", 3): [lambda image: moved(image, rows=5), lambda image: moved(image, rows=-5)],  # 4.83
    ("Rotate", 2): [by_torchvision("rotate", 20 / 3, tv.InterpolationMode.NEAREST, False, None, [GREY] * 3)],
    ("Color", 3): [by_torchvision("adjust_saturation", 1.3), by_torchvision("adjust_saturation", 0.7)],
    ("Brightness", 9): [by_torchvision("adjust_brightness", 1.9), by_torchvision("adjust_brightness", 0.1)],
    ("Contrast", 7): [by_torchvision("adjust_contrast", 1.7), by_torchvision("adjust_contrast", 0.3)],
    ("Sharpness", 5): [by_torchvision("adjust_sharpness", 1.5), by_torchvision("adjust_sharpness", 0.5)],
    ("AutoContrast", None): [by_torchvision("autocontrast")],
    ("Equalize", None): [by_torchvision("equalize")],
    ("Invert", None): [lambda image: 255 - image],
}


def drawn(policies, image=PHOTO, order="rgb", count=40):
    """What comes out, seed by seed."""
    transform = CIFAR10AutoAugment(order)
    transform.policies = policies
    for seed in range(count):
        numpy.random.seed(seed)
        result = transform.transform({"img": image.copy()})["img"]
        assert result.flags.writeable  # PackInputs makes a tensor of its memory
        yield result


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize(("name", "level"), OPERATIONS)
def test_operations_are_the_authors(name, level, order):
    turn = -1 if order == "bgr" else 1
    allowed = [operation(PHOTO)[..., ::turn].tobytes() for operation in OPERATIONS[name, level]]
    found = {one.tobytes() for one in drawn([[(name, 1.0, level)]], PHOTO[..., ::turn], order)}
    assert found == set(allowed)


def test_shears_and_rotations_go_where_theirs_do():
    """A slope of 4 a row, sheared by 0.3 * 8 / 9 of a row for each column, up or down."""
    both = {one.tobytes(): one[..., 0] for one in drawn([[("ShearY", 1.0, 8)]], COLUMN)}
    for sign, found in zip((-1, 1), sorted(both.values(), key=lambda one: one[16, 8]), strict=True):
        expected = COLUMN[..., 0] + sign * 4 * 0.3 / 9 * 8 * (numpy.arange(32) + 0.5)
        inside = (expected > 8) & (expected < 4 * 31 - 8)
        assert abs(found[inside] - expected[inside]).max() < 1.5  # Pillow cuts off
        assert (found[(expected < -4) | (expected > 4 * 31 + 4)] == GREY).all()
    right = numpy.zeros_like(PHOTO)
    right[16, 28] = 255
    (turned,) = drawn([[("Rotate", 1.0, 9)]], right, count=1)
    assert turned[:14].max() == 255  # counterclockwise: what was right of the centre is now above it


def test_one_of_the_pairs_is_drawn_and_each_probability_holds():
    inverted, untouched = (255 - PHOTO).tobytes(), PHOTO.tobytes()
    seen = [one.tobytes() for one in drawn([[("Invert", 0.3, None), ("Invert", 0.0, None)]], count=1000)]
    assert seen.count(inverted) + seen.count(untouched) == 1000
    assert 250 < seen.count(inverted) < 350
    three = [[("Solarize", 1.0, level)] for level in (2, 5, 8)]
    seen = [one.tobytes() for one in drawn(three, count=600)]
    assert all(160 < seen.count(solarized(level)(PHOTO).astype(numpy.uint8).tobytes()) < 240 for level in (2, 5, 8))
    policies = CIFAR10AutoAugment().policies
    assert len(policies) == 25
    assert tuple(policies[1]) == (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9))
    with pytest.raises(ValueError, match=r"unknown `channel_order` `grb`\. Did you mean `rgb`"):
        CIFAR10AutoAugment("grb")


def test_the_hole_is_clipped_at_the_edges():
    """A centre on any of 32 x 32 pixels: sides of 8 to 16, 14 on average, and so 196 pixels."""
    numpy.random.seed(0)
    image = numpy.ones((32, 32, 3), numpy.uint8)
    holes = [1 - ClippedCutout().transform({"img": image})["img"] for _ in range(4000)]
    assert image.all()
    sides = numpy.array([[hole.any((1 - axis, 2)).sum() for axis in (0, 1)] for hole in holes])
    assert (numpy.unique(sides) == range(8, 17)).all()
    assert numpy.array([hole[..., 0].sum() for hole in holes]).mean() == pytest.approx(196, abs=4)
    with pytest.raises(ValueError, match="`size` must be an integer of at least 1, got 0"):
        ClippedCutout(0)
