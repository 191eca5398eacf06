"""What is prepared for a GPU runs here on a few images, and its tests are repeated where a device is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evidence import device, miniature
from PIL import Image

TESTS = Path(__file__).parents[1]


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for split, count in (("train", 2), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "data" / "cifar10" / split / f"{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (25 * label, index, 100)).save(folder / f"{index}.png")
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path / "data"))
    miniature.main(["pack", str(tmp_path / "cifar10.pt")])
    return tmp_path / "cifar10.pt"


def test_images_come_back_from_the_packed_file(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = miniature.unpacked(packed, "train", None)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert all(
        torch.equal(image.unique(), torch.tensor([25 * k, i, 100]).unique())
        for image, k, i in zip(images, labels.tolist(), [0, 1] * 10, strict=True)
    )
    assert miniature.unpacked(packed, "train", 10)[1].tolist() == list(range(10))
    monkeypatch.setattr(miniature, "BYTES", 100)
    with pytest.raises(ValueError, match="must have at most 100 bytes"):
        miniature.pack(packed.parent / "data" / "cifar10", packed)


def test_augmented_images_are_windows_of_the_padded_ones() -> None:
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8) + 1
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for _ in range(5):
        for found, whole in zip(miniature.augmented(images), padded, strict=True):
            windows = whole.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
            assert any(torch.equal(found, window) or torch.equal(found.flip(2), window) for window in windows)


def test_the_miniature_runs_through(packed: Path, tmp_path: Path) -> None:
    miniature.main(["run", str(packed), str(tmp_path / "out"), "--device", "cpu", "--quick"])
    found = json.loads((tmp_path / "out" / "miniature.json").read_text())
    assert found["epochs"] == 1
    assert list(found["methods"]) == ["TRADES", "IKL"]
    for method in found["methods"].values():
        assert 0 <= method["robust after apgd-ce"] <= method["natural"] <= 1
    device.main(["collect", str(tmp_path / "out"), "cpu"])
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["miniature"]) == 2


def test_without_an_attack_library_ours_attacks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = [miniature.attack_of(name, torch.nn.Flatten(), torch.device("cpu"))[0] for name in miniature.STANDARD[:2]]
    assert names == ["PGD-50 cross_entropy", "PGD-50 margin"]


def test_tests_are_repeated_on_a_device_that_is_named_and_keep_their_names() -> None:
    def collected(**environment: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/core/test_uses.py", "tests/gpu"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=TESTS.parent,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return {line for line in done.stdout.splitlines() if "::" in line}

    plain, both = collected(), collected(IKL_PLUGINS_TEST_DEVICE="cpu")
    assert plain < both
    assert len(both) == 2 * len(plain)
    assert all("cpu" in name for name in both - plain)
