"""The examples of README and docs that need torch alone, trained on real digits."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import (
    CLASSES,
    EPOCHS,
    ROOT,
    accuracy,
    assert_beats,
    blocks,
    descend,
    digits,
    gains,
    loader,
    student,
    teacher,
)
from torch import Tensor, nn

LABELLED = 40


def script(page: str, heading: str, **names: Any) -> dict[str, Any]:
    """The names that the script of a section leaves behind."""
    (text,) = blocks(page, after=heading)
    names["__name__"] = "example"
    exec(compile(text, f"{page}: {heading}", "exec"), names)  # noqa: S102 - our own page
    return names


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_python_on_a_page_is_whole_lines_and_no_tuple_by_a_comma(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert all(line.lstrip().startswith("```") for line in lines if "```" in line)
    for statement in (part for text in blocks(page) for part in ast.parse(text).body):
        value = getattr(statement, "value", None)
        assert not (isinstance(value, ast.Tuple) and len(value.elts) == 1), ast.unparse(statement)


def test_the_presets_of_the_page() -> None:
    exec(blocks("docs/choosing.md")[0], {})  # noqa: S102 - our own page


def test_the_own_loop_of_readme() -> None:
    def distilled(seed: int) -> float:
        model = student(seed)
        names = {"student": model, "teacher": teacher(), "optimizer": descend(model), "loader": loader()}
        script("README.md", "In your own loop", epochs=EPOCHS, **names)
        return accuracy(model)

    assert_beats(gains(distilled), 5.0)


# --- few labels, many images -----------------------------------------------------------------------------------------


def shifted(inputs: Tensor) -> Tensor:
    """The strong view: moved by up to a pixel, a tenth of the pixels black."""
    down, right = torch.randint(3, (2,)).tolist()
    padded = F.pad(inputs.reshape(-1, 1, 8, 8), (1, 1, 1, 1))
    return padded[:, :, down : down + 8, right : right + 8].reshape(-1, 64) * (torch.rand_like(inputs) > 0.1)


def with_few_labels(seed: int, way: str) -> float:
    """Trains on 40 labels and the other images without them; the accuracy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    names = {} if way == "alone" else script("docs/uses.md", way)
    torch.manual_seed(seed)  # the page's script has its own
    if way == "Mean teacher":
        average = names["AveragedModel"](model, multi_avg_fn=names["get_ema_multi_avg_fn"](0.95)).eval()
    labelled, others = torch.randperm(1200).tensor_split([LABELLED])
    for _ in range(40):
        for index in others[torch.randperm(len(others))].split(100):
            chosen = labelled[torch.randint(LABELLED, (32,))]
            images, labels, weak = digits().inputs[chosen], digits().labels[chosen], digits().inputs[index]
            if way == "Mean teacher":
                names["train_step"](
                    model, average, optimizer, names["criterion"], (images, labels, weak, shifted(weak))
                )
                continue
            loss = F.cross_entropy(model(images), labels)
            if way == "FixMatch":
                with torch.no_grad():
                    logits = model(weak)
                loss = loss + names["fixmatch_loss"](model(shifted(weak)), logits, threshold=0.7)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return accuracy(model)


@pytest.mark.slow
def test_fixmatch_and_mean_teacher() -> None:
    """They use what the labels alone leave: the images without one."""
    alone = lru_cache(lambda seed: with_few_labels(seed, "alone"))
    for way in ("FixMatch", "Mean teacher"):
        found = gains(lambda seed, way=way: with_few_labels(seed, way), alone)  # type: ignore[misc]
        assert sum(found) > 0, (way, found)


# --- a label for each pixel ------------------------------------------------------------------------------------------


def pixels(images: Tensor) -> Tensor:
    return images.reshape(-1, 1, 8, 8)


def pixel_labels(images: Tensor, labels: Tensor) -> Tensor:
    """The digit where there is ink, 255 elsewhere."""
    return torch.where(images.reshape(-1, 8, 8) > 0.25, labels[:, None, None], 255)


def convolutions(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 7, padding=3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, CLASSES, 1)
    )


def segment(model: nn.Module, epochs: int, criterion: Any = None, teacher: nn.Module | None = None) -> float:
    """Trains, with a loss to a teacher or without; the share of pixels with ink that are right, in percent."""
    optimizer = descend(model)
    names = script("docs/uses.md", "Segmentation")
    for _ in range(epochs):
        for images, labels in loader():
            targets, logits = pixel_labels(images, labels), model(pixels(images))
            loss = F.cross_entropy(logits, targets, ignore_index=255)
            if teacher is not None:
                with torch.no_grad():
                    reference = teacher(pixels(images))
                loss = loss + names["segmentation_loss"](criterion, logits, reference, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if criterion is not None:
            criterion.end_epoch()
    with torch.no_grad():
        guesses = model(pixels(digits().test_inputs)).argmax(1)
    targets = pixel_labels(digits().test_inputs, digits().test_labels)
    return 100.0 * (guesses == targets)[targets != 255].double().mean().item()


@pytest.mark.slow
def test_segmentation() -> None:
    torch.manual_seed(100)
    reference = convolutions(64)
    segment(reference, 8)

    def run(seed: int, distilled: bool) -> float:
        criterion = type(script("docs/uses.md", "Segmentation")["criterion"])
        torch.manual_seed(seed)
        model = convolutions(4)
        if not distilled:
            return segment(model, EPOCHS)
        loss = criterion.preset("start", global_info=True, num_classes=CLASSES)
        return segment(model, EPOCHS, loss, reference)

    assert_beats(gains(lambda seed: run(seed, True), lambda seed: run(seed, False)), 0.0)
