"""Preflight: images in another range, and models that normalise them twice or not at all."""

from __future__ import annotations

import pytest
import torch
from preflight_models import (
    CLASSES,
    MEAN,
    STD,
    Around,
    Brightness,
    Inline,
    Normalise,
    brightnesses,
    run,
    sound,
    to_pixels,
)
from torch import nn

from ikl_plugins.models.robustbench_zoo import robustbench_network
from ikl_plugins.robustbench.loading import Normalised

N = 40
PIXELS = tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)


# Of networks that were not trained, or get images that they were not trained on.
pytestmark = pytest.mark.filterwarnings("ignore:.* are right, no more than by chance:UserWarning")


@pytest.fixture
def labels():
    return torch.arange(N) % CLASSES


@pytest.fixture
def images():
    return brightnesses(N)[0]


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "best"),
    [
        (Around(before=lambda x: x / 255), "Multiplying by 255"),
        (Brightness(MEAN, STD), "Normalising by the given mean and std before the model"),
        (nn.Sequential(Inline(), Inline(), Brightness(MEAN, STD)), "Undoing a normalisation by the given mean and std"),
    ],
    ids=["pixels", "not normalised", "normalised twice"],
)
def test_catches_inputs_that_the_model_was_not_trained_with(model, best, images, labels):
    report = run(model.eval(), images, labels, mean=MEAN, std=STD)
    assert report.failed == ("normalisation",)
    assert report["normalisation"].why.startswith(f"{best} gives 100.0 % accuracy and the images in [0, 1] ")


def test_tries_the_normalisations_in_common_use(images, labels):
    imagenet = Brightness((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    why = run(imagenet.eval(), images, labels)["normalisation"].why
    assert why.startswith("Normalising by ImageNet's mean and std before the model gives 100.0 % accuracy")


@pytest.mark.parametrize(
    ("channels", "mean", "std", "given", "words"),
    [
        (1, 0.1307, 0.3081, {}, "MNIST's"),
        (1, 0.5, 0.5, {}, "0.5 and 0.5"),
        (2, 0.5, 0.5, {}, "0.5 and 0.5"),
        (4, 0.3, 0.2, {"mean": (0.3,), "std": (0.2,)}, "the given"),
    ],
)
def test_any_number_of_channels_may_be_normalised(channels, mean, std, given, words, images, labels):
    images = images[:, :1].repeat(1, channels, 1, 1)
    classifier = Brightness((mean,) * channels, (std,) * channels)
    sound(run(Normalised(classifier, (mean,), (std,)).eval(), images, labels, **given))
    why = run(classifier.eval(), images, labels, **given)["normalisation"].why
    assert why.startswith(f"Normalising by {words} mean and std before the model gives 100.0 %")


def test_catches_a_swapped_channel_order(images, labels):
    class Red(Brightness):
        def forward(self, x):
            return -60 * (x[:, :1].mean(dim=(2, 3)) - self.templates[:, 0]).square()

    images[:, 1:] = torch.rand(N, 2, 1, 1)
    assert run(Red().eval(), images, labels).passed
    report = run(Red().eval(), images.flip(1), labels)
    assert report.failed == ("normalisation",)
    assert report["normalisation"].why.startswith("Turning RGB into BGR gives 100.0 % accuracy")


@pytest.mark.parametrize(
    ("count", "wrong", "failed"),
    [
        (40, 8, ("normalisation",)),  # 20 points, 3 standard errors
        (40, 3, ()),  # 7.5 points, less than 2 standard errors
        (200, 8, ()),  # nearly 3 standard errors, but 4 points
    ],
)
def test_only_a_clear_difference_in_accuracy_is_a_failure(count, wrong, failed):
    class NearlyRight(Brightness):
        """Right on all images times 255, and wrong on some of those in [0, 1]."""

        def forward(self, x):
            if x.max() > 2:
                return super().forward(x / 255)
            some = torch.isin(x.detach()[:, 0, 0, 0], marked)
            return torch.where(some[:, None], -1, 1) * super().forward(x)

    labels = torch.arange(count) % CLASSES
    images = ((labels + 0.5) / CLASSES).view(-1, 1, 1, 1) + 0.01 * torch.rand(count, 3, 8, 8)
    marked = images[:wrong, 0, 0, 0].clone()
    report = run(NearlyRight().eval(), images, labels)
    assert report.failed == failed, report.markdown()


OTHER = (0.5,) * 3


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Sequential(Normalise(), Normalise(), Brightness(MEAN, STD)), "`1` normalises what `0`"),
        (
            lambda: nn.Sequential(Normalise(), nn.Identity(), Normalise(OTHER, OTHER), Brightness()),
            "`2` normalises what `0`",
        ),
        (lambda: nn.Sequential(to_pixels(), Normalise(*PIXELS), Normalise(), Brightness()), "`2` normalises what `1`"),
        (lambda: nn.Sequential(Normalise(), robustbench_network("DMWideResNet-10-1-SiLU")), "`1` normalises what `0`"),
    ],
)
def test_catches_two_normalising_layers_without_labels(build, names):
    report = run(build().eval(), torch.rand(4, 3, 32, 32), None)
    assert report.failed == ("normalisation",)
    assert report["normalisation"].why.startswith(names)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x * 255, "Divide by 255."),
        (lambda x: (x - 0.5) / 0.25, "Leave the normalisation to the model."),
        (lambda x: x / 255, "reach 0.0039 at most. Divide 8-bit images by 255 only once."),
    ],
)
def test_catches_images_outside_0_to_1(change, why, images):
    report = run(Brightness().eval(), change(images), None)
    assert report.failed == ("inputs",)
    assert report["inputs"].why.endswith(why)
