"""The one pixel space: against the arithmetic of the hosts' normalisation, typed here."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from ikl_plugins.adversarial import PixelSpace

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], white: float) -> Tensor:
    """What a host does: one channel after the other."""
    channels = [(pixels[:, c] * white - mean[c]) / std[c] for c in range(pixels.shape[1])]
    return torch.stack(channels, 1)


@pytest.mark.parametrize("white", [1.0, 255.0])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (2, 3), (2, 3, 4, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pixels_and_inputs_are_those_of_the_host(white: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mean, std = tuple(white * m for m in MEAN), tuple(white * s for s in STD)
    pixels = torch.rand(shape, dtype=torch.float64)
    pixels.view(-1)[:2] = torch.tensor([0.0, 1.0])
    inputs = normalised(pixels, mean, std, white).to(dtype)
    space = PixelSpace(mean, std, white=white)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    found = space.to_pixels(inputs)
    assert found.dtype == dtype
    assert (found.min(), found.max()) >= (0, 0)
    assert float(found.max()) <= 1
    torch.testing.assert_close(found.double(), pixels, rtol=0, atol=tolerance)
    torch.testing.assert_close(space.to_inputs(pixels.to(dtype)), inputs, rtol=tolerance, atol=8 * tolerance)


def test_without_statistics_pixels_are_the_images_by_white() -> None:
    images = torch.tensor([[[[0.0, 51.0, 255.0]]]])
    space = PixelSpace(white=255.0)
    assert space.to_pixels(images).tolist() == [[[[0.0, pytest.approx(0.2), 1.0]]]]
    assert torch.equal(space.to_inputs(torch.arange(256.0)[None] / 255), torch.arange(256.0)[None])  # the bytes again
    assert not space.normalises
    same = torch.rand(2, 3, 2, 2)
    assert torch.equal(PixelSpace().to_pixels(same), same)
    assert torch.equal(PixelSpace().to_inputs(same), same)


def test_one_number_serves_all_channels() -> None:
    images = torch.rand(2, 3, 2, 2)
    assert torch.equal(PixelSpace([0.5], [0.25]).to_inputs(images), PixelSpace([0.5] * 3, [0.25] * 3).to_inputs(images))


def test_rounding_is_clamped_and_the_tolerance_is_the_given_one() -> None:
    images = torch.tensor([[[[-5e-5, 1 + 5e-5]]]])
    assert PixelSpace().to_pixels(images).tolist() == [[[[0.0, 1.0]]]]
    assert images.tolist() != [[[[0.0, 1.0]]]]  # not in place
    wide = torch.tensor([[[[-0.0035, 1.0035]]]])
    assert PixelSpace(tolerance=1 / 255).to_pixels(wide).tolist() == [[[[0.0, 1.0]]]]
    with pytest.raises(ValueError, match="must lie in"):
        PixelSpace().to_pixels(wide)
    PixelSpace().to_pixels(wide.bfloat16())  # its own rounding is wider


def test_black_and_empty_batches_pass() -> None:
    assert PixelSpace(white=255.0).to_pixels(torch.zeros(1, 3, 2, 2)).max() == 0
    assert PixelSpace(MEAN, STD).to_pixels(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


def test_the_way_back_carries_gradient_and_the_way_in_none() -> None:
    space = PixelSpace(MEAN, STD)
    with torch.inference_mode():
        space.to_inputs(torch.rand(1, 3, 2, 2))
    pixels = torch.rand(1, 3, 2, 2, requires_grad=True)
    space.to_inputs(pixels).sum().backward()
    torch.testing.assert_close(pixels.grad[0, :, 0, 0], 1 / torch.tensor(STD))
    assert not space.to_pixels(space.to_inputs(pixels)).requires_grad


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("white", [1.0, 255.0])
def test_a_conversion_gives_what_the_other_space_makes_of_the_same_images(flip: bool, white: float) -> None:
    images = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    one = PixelSpace(MEAN, STD)
    other = PixelSpace([0.1 * white] * 3, [white, 0.5 * white, 0.25 * white], white=white, flips_channels=flip)
    convert = one.conversion_to(other)
    assert convert is not None
    seen = images.flip(1) if flip else images
    torch.testing.assert_close(convert(one.to_inputs(images)), other.to_inputs(seen), rtol=1e-12, atol=1e-12)
    back = other.conversion_to(one)
    assert back is not None
    torch.testing.assert_close(back(other.to_inputs(seen)), one.to_inputs(images), rtol=1e-12, atol=1e-12)


def test_equal_spaces_need_no_conversion_and_grey_images_no_flip() -> None:
    assert PixelSpace(MEAN, STD).conversion_to(PixelSpace(MEAN, STD)) is None
    assert PixelSpace(MEAN, STD).conversion_to(PixelSpace(MEAN, (0.2, 0.25, 0.31))) is not None
    assert PixelSpace(MEAN, STD).conversion_to(PixelSpace((0.4, 0.5, 0.7), STD)) is not None
    double = PixelSpace([2 * m for m in MEAN], [2 * s for s in STD], white=2.0)
    assert PixelSpace(MEAN, STD).conversion_to(double) is None
    flips = PixelSpace().conversion_to(PixelSpace(flips_channels=True))
    assert flips is not None
    grey = torch.rand(2, 1, 2, 2)
    assert torch.equal(flips(grey), grey)
    bytes_of = PixelSpace().conversion_to(PixelSpace(white=255.0, flips_channels=True))
    assert bytes_of is not None
    assert torch.equal(bytes_of(torch.arange(3.0)[None] / 255), torch.tensor([[2.0, 1.0, 0.0]]))


def test_copies_convert_alike() -> None:
    space = PixelSpace(MEAN, STD, flips_channels=True)
    images = torch.rand(2, 3, 2, 2)
    expected = space.to_inputs(images)
    for twin in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):  # noqa: S301
        assert torch.equal(twin.to_inputs(images), expected)
        assert repr(twin) == repr(space)
