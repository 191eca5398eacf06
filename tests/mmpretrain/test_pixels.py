"""The pixel space of a data preprocessor, with MMPretrain's and MMEngine's own preprocessors as the oracle."""

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmpretrain.models import ClsDataPreprocessor

from ikl_plugins.mmpretrain import pixel_space

PREPROCESSORS = {
    "colours": lambda: ClsDataPreprocessor(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    "integers": lambda: ClsDataPreprocessor(mean=[127, 0, 3], std=[1, 2, 255]),
    "one value": lambda: ClsDataPreprocessor(mean=127.5, std=127.5),
    "none": lambda: ClsDataPreprocessor(to_rgb=True),
    "mmengine": lambda: ImgDataPreprocessor(mean=[120.0, 110.0, 100.0], std=[60.0, 55.0, 50.0], bgr_to_rgb=True),
}
FLIPPED = ("colours", "none", "mmengine")


def images(rows=4):
    return torch.randint(256, (rows, 3, 6, 5), dtype=torch.uint8)


def prepared(preprocessor, raw):
    return preprocessor.to(raw.device)({"inputs": raw, "data_samples": None})["inputs"]


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_pixels_are_the_images_in_the_networks_channel_order(name):
    preprocessor = PREPROCESSORS[name]()
    raw = images()
    inputs = prepared(preprocessor, raw)
    space = pixel_space(preprocessor)
    pixels = space.to_pixels(inputs)
    torch.testing.assert_close(pixels, (raw.flip(1) if name in FLIPPED else raw) / 255, rtol=0, atol=1e-6)
    assert space.flips_channels is (name in FLIPPED)
    torch.testing.assert_close(space.to_inputs(pixels), inputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", PREPROCESSORS)
@pytest.mark.parametrize("source", PREPROCESSORS)
def test_a_conversion_gives_what_the_other_preprocessor_makes(source, target):
    raw = images()
    mine, theirs = PREPROCESSORS[source](), PREPROCESSORS[target]()
    convert = pixel_space(mine).conversion_to(pixel_space(theirs))
    if source == target:
        assert convert is None
    else:
        torch.testing.assert_close(convert(prepared(mine, raw)), prepared(theirs, raw), rtol=1e-5, atol=1e-4)


def foreign(**attributes):
    preprocessor = BaseDataPreprocessor()
    preprocessor.__dict__.update(attributes)
    return preprocessor


def twice():
    preprocessor = PREPROCESSORS["colours"]()
    return pixel_space(preprocessor).to_pixels(prepared(preprocessor, prepared(preprocessor, images())))


REFUSED = {
    "normalised twice": (twice, r"must lie in \[0, 255\].*Drop `Normalize`"),
    "divided": (lambda: pixel_space(ClsDataPreprocessor()).to_pixels(torch.rand(1, 3, 9, 9)), r"pixel_range=1\.0"),
    "bytes": (lambda: pixel_space(ClsDataPreprocessor(), 1.0).to_pixels(images().float()), r"must lie in \[0, 1\]"),
    "no settings": (lambda: pixel_space(foreign()), "got BaseDataPreprocessor without"),
    "no mean": (lambda: pixel_space(foreign(_enable_normalize=True)), "got BaseDataPreprocessor without"),
    "std": (lambda: pixel_space(ClsDataPreprocessor(mean=[1.0], std=[0.0])), "`std` must be a finite number above 0"),
    "range": (lambda: pixel_space(ClsDataPreprocessor(), 0), "`pixel_range` must be a finite number above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^pixel_space: .*{message}"):
        call()
