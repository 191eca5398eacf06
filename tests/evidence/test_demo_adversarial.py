"""The adversarial part of the demo: its report, its pictures, its processes and its attack."""

import re
import shutil
import sys

import pytest
import torch
from demo import adversarial
from demo.parts import Parts
from demo_adversarial_results import made_up_adversarial_results

from ikl_plugins.commands.data import prepare_digits


def test_the_report_has_the_numbers_and_says_what_they_are():
    report = adversarial.markdown(made_up_adversarial_results(), threads=1)
    rows = [line for line in report.splitlines() if re.match(r"\| (natural|TRADES|IKL) ", line)]
    cells = [[cell.strip() for cell in row.split("|")[3:-1]] for row in rows]
    # The fifth radius is that of the training: 15, 10 and 5 points less for each radius.
    assert cells == [["99.00", "39.00", "10"], ["98.00", "58.00", "11"], ["97.00", "77.00", "12"]]
    assert "eps = 16/255" in report
    assert "(accuracy/top1 for natural, robust/top1 for TRADES and IKL)" in report
    # The widest of the margins is that of 58 %: 1.96 sqrt(.58 * .42 / 300) = 5.59 %.
    assert "One seed on 300 test images orders nothing that lies closer than about ±5.6 points" in report


def test_the_pictures_are_images(tmp_path):
    from PIL import Image

    for draw in (adversarial.draw_images, adversarial.draw_robust_accuracy):
        path = tmp_path / f"{draw.__name__}.png"
        draw(made_up_adversarial_results(), path)
        with Image.open(path) as drawn:
            assert drawn.format == "PNG"
            assert drawn.height > 400
            assert len(drawn.convert("RGB").getcolors(2**24)) > 20


def test_the_log_of_a_training_is_its_progress(tmp_path):
    lines = ["Epoch(train) [1][ 5/10] loss: 1", "Epoch(val) [1][1/1] accuracy/top1: 50", "Epoch(train) [2][10/10]"]
    code = f"for line in {lines!r}: print(line)"
    seen = []
    ended = adversarial._follow(
        [sys.executable, "-c", code], {}, tmp_path / "log", 2, lambda step, total, text: seen.append((step, total))
    )
    assert ended == 0
    assert seen == [(0.0, 2), (0.5, 2), (1, 2), (2.0, 2)]
    assert (tmp_path / "log").read_text().splitlines() == lines


# --- what is kept, and what is made anew -----------------------------------------------------------------------------


class FakeRuns:
    """AdversarialRuns whose trainings and attacks are made up and counted."""

    def __init__(self, monkeypatch, folder):
        self.folder = folder
        self.calls = []

        def train(runs, method, place, progress):
            self.calls.append(method)
            (place / "best.pth").write_bytes(b"")
            return {"checkpoint": "best.pth", "best_score": 90.0, "score": "accuracy/top1"}

        def evaluate(configs, checkpoints, data, eps, progress):
            self.calls.append("attack")
            assert all(path.is_file() for path in checkpoints.values())
            return {"eps": eps}

        monkeypatch.setattr(adversarial.AdversarialRuns, "_train", train)
        monkeypatch.setattr(adversarial, "evaluate", evaluate)

    def __call__(self, common=None, epochs=None):
        self.calls.clear()
        with Parts(self.folder / "out", adversarial.PARTS, fresh=False) as parts:
            runs = adversarial.AdversarialRuns(parts, self.folder / "digits", common or {"data": "a"}, epochs=epochs)
            self.found = runs.run()
        return list(self.calls)


def test_finished_runs_are_kept_until_what_decides_them_changes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path))  # MMEngine logs that a config reads it
    fake = FakeRuns(monkeypatch, tmp_path)
    everything = [*adversarial.METHODS, "attack"]
    assert fake() == everything
    assert fake.found["evaluation"]["eps"] == "16/255"
    out, err = capfd.readouterr()
    assert (len(out.splitlines()), err) == (adversarial.PARTS, "")  # nothing but the demo's own lines
    assert fake() == []
    assert fake(epochs=1) == everything
    assert fake({"data": "b"}, epochs=1) == everything

    # A checkpoint that is gone is made anew, and so is what was found with all of them only if a run differs.
    (tmp_path / "out/adversarial/adversarial_ikl/best.pth").unlink()
    assert fake({"data": "b"}, epochs=1) == ["adversarial_ikl"]

    configs = tmp_path / "configs"
    shutil.copytree(adversarial.CONFIGS.parent, configs)
    monkeypatch.setattr(adversarial, "CONFIGS", configs / "digits")
    assert fake({"data": "b"}, epochs=1) == []  # the same settings elsewhere
    base = configs / "_base_/digits_adversarial.py"
    assert base.read_text().count("gamma=5e-3") == 1
    base.write_text(base.read_text().replace("gamma=5e-3", "gamma=4e-3"))
    assert fake({"data": "b"}, epochs=1) == ["adversarial_trades", "adversarial_ikl", "attack"]
    with (configs / "digits/adversarial_ikl.py").open("a") as config:
        config.write('\nmodel["attack"] = dict(eps="8/255")\n')
    with pytest.raises(ValueError, match=r"must attack with the same eps, got 16/255, 8/255"):
        fake()


# --- the attack ------------------------------------------------------------------------------------------------------


def test_the_plain_network_gives_what_the_trained_classifier_gives(tmp_path, monkeypatch):
    """Without training, but with statistics and a class prior of its own; natural accuracy is mmpretrain's."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner
    from mmpretrain.evaluation import Accuracy
    from mmpretrain.registry import MODELS

    data = prepare_digits(tmp_path)
    for folder in (data / "test").iterdir():
        for path in sorted(folder.iterdir())[3:]:
            path.unlink()
    monkeypatch.setenv("IKL_PLUGINS_DATA", str(tmp_path))
    monkeypatch.setattr(adversarial, "FRACTIONS", (0.0, 1.0))
    monkeypatch.setattr(adversarial, "STEPS", 1)
    configs = {name: Config.fromfile(adversarial.CONFIGS / f"{name}.py") for name in adversarial.METHODS}
    checkpoints, expected = {}, {}
    for name, config in configs.items():
        config.model.pop("val_attack", None)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            model = MODELS.build(config.model)
            (batch,) = Runner.build_dataloader(config.test_dataloader)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            inputs = model.data_preprocessor(batch)["inputs"]
            model.train()(inputs)  # statistics; with them and no mean logits the predictions differ
            model.eval()
            model.backbone.fc.bias -= model(inputs, mode="tensor").mean(0)
        checkpoints[name] = tmp_path / f"{name}.pth"
        torch.save({"meta": {}, "state_dict": model.state_dict()}, checkpoints[name])
        samples = model.eval().test_step(batch)
        predicted = torch.stack([sample.pred_score for sample in samples])
        labels = torch.cat([sample.gt_label for sample in samples])
        assert len(predicted.argmax(1).unique()) > 2
        expected[name] = (predicted.argmax(1), Accuracy.calculate(predicted, labels, topk=(1,))[0][0].item())
    assert any("class_prior" in name for name in torch.load(checkpoints["adversarial_ikl"])["state_dict"])

    steps = []
    found = adversarial.evaluate(configs, checkpoints, data, "16/255", lambda *seen: steps.append(seen[:2]))
    assert found["images"] == len(labels) == 30
    assert steps == [(step, 6) for step in range(1, 7)]
    assert found["training_eps"] == found["eps"][1] == pytest.approx(16 / 255)
    for name, (_, accuracy) in expected.items():
        assert found["accuracy"][name][0] == pytest.approx(accuracy)
        assert found["accuracy"][name][1] <= found["accuracy"][name][0]
    shape = found["examples"]["shape"]
    for digit in found["examples"]["digits"]:
        natural = adversarial._from_hex(digit["natural"], shape)
        for name in adversarial.SHOWN:
            attacked = adversarial._from_hex(digit["models"][name]["adversarial"], shape)
            assert 0 < abs(attacked - natural).max() <= (16 + 1) / 255  # each is rounded to 1/255


def test_the_examples_are_of_different_classes_and_fall_where_there_are_such():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    natural = torch.tensor([0, 0, 0, 1, 5, 2, 2])
    fallen = torch.tensor([0, 8, 8, 8, 8, 2, 2])  # 1, 2 and 3 fall; 4 was wrong before
    pixels = torch.arange(7 * 3).reshape(7, 3, 1, 1) / 255
    seen = {}
    for method in adversarial.SHOWN:
        seen |= {f"{method}/0": (natural, pixels), f"{method}/1": (fallen, pixels)}
    examples = adversarial._examples(labels, seen)
    order = [bytes.fromhex(digit["natural"])[0] // 3 for digit in examples["digits"]]
    assert order == [1, 3, 2, 0, 4, 5]
    assert examples["fall"] == 3
