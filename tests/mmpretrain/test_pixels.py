"""Pixels and inputs, with MMPretrain's and MMEngine's own data preprocessors as the oracle."""

import copy

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmpretrain.models import ClsDataPreprocessor

from ikl_plugins.mmpretrain import PixelSpace

PREPROCESSORS = {
    "colours": lambda: ClsDataPreprocessor(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    "integers": lambda: ClsDataPreprocessor(mean=[127, 0, 3], std=[1, 2, 255]),
    "one value": lambda: ClsDataPreprocessor(mean=127.5, std=127.5),
    "none": lambda: ClsDataPreprocessor(to_rgb=True),
    "mmengine": lambda: ImgDataPreprocessor(mean=[120.0, 110.0, 100.0], std=[60.0, 55.0, 50.0], bgr_to_rgb=True),
}


def images(rows=4):
    return torch.randint(256, (rows, 3, 6, 5), dtype=torch.uint8)


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_pixels_are_the_images_in_the_networks_channel_order(name):
    preprocessor = PREPROCESSORS[name]()
    raw = images()
    inputs = preprocessor({"inputs": raw, "data_samples": None})["inputs"]
    space = PixelSpace(preprocessor)
    flips = name in ("colours", "none", "mmengine")
    pixels = space.to_pixels(inputs)
    torch.testing.assert_close(pixels, (raw.flip(1) if flips else raw) / 255, rtol=0, atol=1e-6)
    assert space.flips_channels is flips
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    torch.testing.assert_close(space.to_inputs(pixels), inputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_the_round_trip_is_exact_to_a_millionth(name):
    space = PixelSpace(PREPROCESSORS[name]())
    pixels = torch.rand(4, 3, 6, 5)
    assert (space.to_pixels(space.to_inputs(pixels)) - pixels).abs().max() <= 1e-6


def test_other_pixel_ranges_are_undone():
    space = PixelSpace(ClsDataPreprocessor(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1]), pixel_range=1.0)
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1]))
    torch.testing.assert_close(space.to_inputs(pixels), (pixels - mean) / std)
    torch.testing.assert_close(space.to_pixels((pixels - mean) / std), pixels)


def test_rounding_is_clamped_and_nothing_else():
    space = PixelSpace(ClsDataPreprocessor())
    pixels = space.to_pixels(torch.tensor([[[[-0.02, 255.02]]]]))  # less than 1e-4 of 255 outside
    assert pixels.tolist() == [[[[0.0, 1.0]]]]
    with pytest.raises(ValueError, match=r"values from -0\.03 to 255\."):
        space.to_pixels(torch.tensor([[[[-0.03, 255.0]]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_half_precision_is_allowed(dtype):
    preprocessor = PREPROCESSORS["colours"]()
    inputs = preprocessor({"inputs": images(), "data_samples": None})["inputs"].to(dtype)
    pixels = PixelSpace(preprocessor).to_pixels(inputs)
    assert pixels.dtype == dtype
    assert pixels.max() <= 1


def test_to_inputs_carries_gradient_and_keeps_one_copy_of_its_constants():
    preprocessor = PREPROCESSORS["colours"]()
    space = PixelSpace(preprocessor)
    with torch.inference_mode():
        space.to_inputs(torch.rand(1, 3, 2, 2))  # as a validation may do first
    pixels = torch.rand(1, 3, 2, 2, requires_grad=True)
    space.to_inputs(pixels).sum().backward()
    torch.testing.assert_close(pixels.grad, (255 / preprocessor.std).expand(1, 3, 2, 2))
    assert len(space._to_inputs._copies) == 1
    space.to_inputs(pixels.double())
    assert len(space._to_inputs._copies) == 2
    torch.testing.assert_close(copy.deepcopy(space).to_inputs(pixels), space.to_inputs(pixels))


def test_an_empty_batch_and_a_black_one_are_fine():
    preprocessor = PREPROCESSORS["colours"]()
    space = PixelSpace(preprocessor)
    assert space.to_pixels(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    black = preprocessor({"inputs": torch.zeros(2, 3, 4, 4), "data_samples": None})["inputs"]
    assert space.to_pixels(black).max() <= 1e-6
    dark = preprocessor({"inputs": torch.full((2, 3, 4, 4), 2), "data_samples": None})["inputs"]
    torch.testing.assert_close(space.to_pixels(dark), torch.full((2, 3, 4, 4), 2 / 255), rtol=1e-4, atol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_images_that_are_normalised_twice_are_refused():
    preprocessor = PREPROCESSORS["colours"]()
    once = preprocessor({"inputs": images(), "data_samples": None})["inputs"]
    twice = preprocessor({"inputs": once, "data_samples": None})["inputs"]
    message = r"must lie in \[0, 255\] before.* normalised twice: drop `Normalize` from the pipeline"
    with pytest.raises(ValueError, match=message):
        PixelSpace(preprocessor).to_pixels(twice)
    with pytest.raises(ValueError, match=message):
        PixelSpace(ClsDataPreprocessor()).to_pixels(once)


def test_a_pixel_range_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*or `pixel_range` is not the value of white"):
        PixelSpace(ClsDataPreprocessor(), pixel_range=1.0).to_pixels(images().float())
    with pytest.raises(
        ValueError, match=r"largest value of this batch is 1: it seems to hold images in \[0, 1\]\. Set"
    ):
        PixelSpace(ClsDataPreprocessor()).to_pixels(torch.linspace(0, 1, 12).view(1, 3, 2, 2))
    units = ClsDataPreprocessor(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    inputs = units({"inputs": torch.rand(2, 3, 4, 4), "data_samples": None})["inputs"]
    with pytest.raises(ValueError, match=r"Set pixel_range=1\.0\."):
        PixelSpace(units).to_pixels(inputs)


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="values from nan to nan"):
        PixelSpace(ClsDataPreprocessor()).to_pixels(torch.full((1, 3, 2, 2), float("nan")))


@pytest.mark.parametrize("inputs", [torch.zeros(1, 3, 2, 2, dtype=torch.uint8), None])
def test_inputs_that_are_no_floating_tensor_are_refused(inputs):
    with pytest.raises(
        TypeError, match=r"PixelSpace: `inputs` must be a floating tensor, got (torch\.uint8|NoneType)\."
    ):
        PixelSpace(ClsDataPreprocessor()).to_pixels(inputs)


def test_preprocessors_without_the_settings_are_refused():
    message = r"must have `_enable_normalize` and.*got BaseDataPreprocessor without\. Use ClsDataPreprocessor"
    foreign = BaseDataPreprocessor()
    with pytest.raises(ValueError, match=message):
        PixelSpace(foreign)
    foreign._enable_normalize = True
    with pytest.raises(ValueError, match=message):
        PixelSpace(foreign)


def test_settings_out_of_range_are_refused():
    with pytest.raises(
        ValueError, match=r"must have finite means and stds above 0, got mean=\[1\.0\] and std=\[0\.0\]"
    ):
        PixelSpace(ClsDataPreprocessor(mean=[1.0], std=[0.0]))
    with pytest.raises(ValueError, match=r"PixelSpace: `pixel_range` must be a finite number above 0, got 0\."):
        PixelSpace(ClsDataPreprocessor(), pixel_range=0)


# --- from one preprocessor to another --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", PREPROCESSORS)
@pytest.mark.parametrize("source", PREPROCESSORS)
def test_a_conversion_gives_what_the_other_preprocessor_makes(source, target):
    raw = images()
    mine, theirs = PREPROCESSORS[source](), PREPROCESSORS[target]()
    convert = PixelSpace(mine).conversion_to(PixelSpace(theirs))
    inputs = mine({"inputs": raw, "data_samples": None})["inputs"]
    expected = theirs({"inputs": raw, "data_samples": None})["inputs"]
    if source == target:
        assert convert is None
    else:
        torch.testing.assert_close(convert(inputs), expected, rtol=1e-5, atol=1e-4)


def test_a_conversion_turns_nothing_but_colours():
    mine, theirs = ClsDataPreprocessor(mean=[10.0], std=[5.0], to_rgb=True), ClsDataPreprocessor()
    convert = PixelSpace(mine).conversion_to(PixelSpace(theirs))
    inputs = torch.arange(4.0).view(1, 4, 1, 1)
    torch.testing.assert_close(convert(inputs), 5 * inputs + 10)
