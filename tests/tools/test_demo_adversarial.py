"""The adversarial part of the demo: its report, its pictures, its processes and its attack."""

import re
import sys
from pathlib import Path

import demo_adversarial
import pytest
from demo_adversarial_results import made_up_adversarial_results

torch = pytest.importorskip("torch")
for package, extra in (("mmpretrain", "mmpretrain"), ("matplotlib", "demo")):
    pytest.importorskip(package, reason=f"tools/demo.py needs {package} (extra `{extra}`)")


def test_the_report_has_the_numbers_and_says_what_they_are():
    report = demo_adversarial.markdown(made_up_adversarial_results(), threads=1)
    rows = [line for line in report.splitlines() if re.match(r"\| (natural|TRADES|IKL) ", line)]
    cells = [[cell.strip() for cell in row.split("|")[3:-1]] for row in rows]
    # The fifth radius is that of the training: 15, 10 and 5 points less for each radius.
    assert cells == [["99.00", "39.00", "10"], ["98.00", "58.00", "11"], ["97.00", "77.00", "12"]]
    assert "PGD-20: 20 steps of 0.25 eps up the cross entropy" in report
    assert "eps = 16/255, that of the training, on 300 test images" in report
    assert "accuracy/top1 for natural, robust/top1 for" in report
    assert "upper bound of the robust accuracy" in report
    assert "no AutoAttack" in report
    # The widest of the margins is that of 58 %: 1.96 sqrt(.58 * .42 / 300) = 5.59 %.
    assert "One seed on 300 test images orders nothing that lies closer than about ±5.6 points" in report


def test_the_pictures_are_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for draw in (demo_adversarial.draw_images, demo_adversarial.draw_robust_accuracy):
        path = tmp_path / f"{draw.__name__}.png"
        draw(made_up_adversarial_results(), path)
        with image.open(path) as drawn:
            assert drawn.format == "PNG"
            assert drawn.height > 400
            assert len(drawn.convert("RGB").getcolors(2**24)) > 20
    assert not list(tmp_path.glob(".*"))


def test_the_log_of_a_training_is_its_progress(tmp_path):
    lines = ["Epoch(train) [1][ 5/10] loss: 1", "Epoch(val) [1][1/1] accuracy/top1: 50", "Epoch(train) [2][10/10]"]
    code = f"for line in {lines!r}: print(line)"
    seen = []
    ended = demo_adversarial._follow(
        [sys.executable, "-c", code], {}, tmp_path / "log", 2, lambda step, total, text: seen.append((step, total))
    )
    assert ended == 0
    assert seen == [(0.0, 2), (0.5, 2), (1, 2), (2.0, 2)]
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_a_training_that_fails_names_its_log(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    runs = demo_adversarial.AdversarialRuns(tmp_path / "out", tmp_path / "digits", {})
    monkeypatch.setattr(demo_adversarial, "_follow", lambda *args: 1)
    with pytest.raises(ValueError, match=r"training of natural failed: its process ended with 1\. Its log is .*\.log"):
        runs.run({}, lambda name: lambda *args: None, lambda *args: None)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(demo_adversarial.metadata, "packages_distributions", dict)
    with pytest.raises(ImportError, match="mmengine is missing"):
        demo_adversarial.package_versions()


def test_all_methods_train_one_network_and_the_first_without_an_attack():
    from mmengine.config import Config

    configs = {
        name: Config.fromfile(demo_adversarial.CONFIGS / f"{name}.py", import_custom_modules=False)
        for name in demo_adversarial.METHODS
    }
    natural = configs[demo_adversarial.NATURAL]
    assert natural.model.type == "ImageClassifier"
    for config in configs.values():
        assert config.model.backbone == natural.model.backbone
        assert config.model.head == natural.model.head


def test_pictures_survive_their_text_form():
    pixels = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    text = demo_adversarial._to_hex(pixels)
    drawn = torch.from_numpy(demo_adversarial._from_hex(text, [3, 4, 5]).copy())
    torch.testing.assert_close(drawn.permute(2, 0, 1).float(), pixels, rtol=0, atol=0.5 / 255 + 1e-6)


def test_the_tools_lie_beside_each_other():
    assert demo_adversarial.CONFIGS.is_dir()
    assert (Path(demo_adversarial.__file__).parent / "train_mmpretrain.py").is_file()
