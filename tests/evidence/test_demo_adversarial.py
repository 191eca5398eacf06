"""The adversarial part of the demo: its report, its pictures, its processes and its attack."""

import pytest
import torch
from demo import adversarial

from ikl_plugins.commands.data import prepare_digits

# --- what is kept, and what is made anew -----------------------------------------------------------------------------


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
