"""docs/torchdistill.md and README: their pieces of YAML train better than the labels alone."""

import pytest
import yaml

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

import torch
from examples import BATCH, CLASSES, EPOCHS, accuracy, added, assert_beats, blocks, digits, gains, student, teacher
from torch import nn
from torch.utils.data import TensorDataset
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import get_forward_proc_func
from torchdistill.core.training import get_training_box
from torchdistill_boxes import CPU, stage

from ikl_plugins.adversarial import PGD

PAGE = "docs/torchdistill.md"
MEAN_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # of the page's attack


def train(box):
    for epoch in range(EPOCHS):
        box.pre_epoch_process(epoch=epoch)
        for batch in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(*batch))
        box.post_epoch_process()


def config_of(changed, rate):
    """The `train:` block of a training on digits with what a difference has put there."""
    config = {**stage(epochs=EPOCHS), **changed["train"]}
    config["train_data_loader"]["kwargs"]["batch_size"] = BATCH
    config["optimizer"]["kwargs"]["lr"] = rate
    return config


def test_the_difference_to_kdloss_trains():
    (readme, *_), (page, _) = blocks("README.md", "diff"), blocks(PAGE, "diff")
    changed = yaml.safe_load(added(page))
    assert changed == yaml.safe_load(added(readme))
    assert changed["dependencies"] == ["ikl_plugins.torchdistill"]
    data = {"train": TensorDataset(digits().inputs, digits().labels)}

    def distilled(seed):
        box = get_distillation_box(teacher(), student(seed), data, config_of(changed, 0.02), CPU, None, False, 1)
        train(box)
        return accuracy(box.student_model)

    assert_beats(gains(distilled), 5.0)


def test_adversarial_training_trains(tmp_path):
    eps = "24/255"  # 8/255 hardly changes a digit
    path = tmp_path / "adversarial.yaml"
    path.write_text(added(blocks(PAGE, "diff")[1]).replace("8/255", eps))
    changed = load_yaml_file(str(path))
    attack = get_forward_proc_func(changed["train"]["model"]["forward_proc"]).attack
    assert attack.strength(1, 200) == pytest.approx((24 / 255 / 200, 5, 12 / 255 / 200))
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in MEAN_STD)
    pixels = digits().test_inputs.reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)

    def robust(process):
        """The accuracy under attack, of a training with or without one."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        inputs = digits().inputs.reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        data = {"train": TensorDataset((inputs - mean) / std, digits().labels)}
        config = config_of(changed, 0.02)
        if not process:
            places = {
                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                "target": {"uses_label": True},
            }
            labels = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "weight": 1.0}
            labels["criterion_wrapper"] = {"key": "SimpleLossWrapper", "kwargs": places}
            config["criterion"] = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": labels}}}
            config["model"] = {"forward_proc": "forward_batch_only"}
        train(get_training_box(model, data, config, CPU, None, False, 1))
        model.eval()

        def forward(inputs):
            return model((inputs - mean) / std)

        torch.manual_seed(0)
        attack = PGD(eps=eps, steps=10, step_size="6/255")
        attacked = attack(model, pixels, forward=forward, labels=digits().test_labels)
        return 100 * (forward(attacked).argmax(1) == digits().test_labels).double().mean().item()

    found = robust(False), robust(True)
    assert found[1] > found[0] + 10, found


def test_a_hook_of_a_layer_is_yaml():
    hook, *others = blocks(PAGE, "yaml")
    # Its `...` stands for the lines between `criterion:` and the keywords of a loss.
    assert yaml.safe_load(hook.split("  criterion:")[0])["train"]["student"] == {
        "forward_hook": {"output": ["classifier"]}
    }
    assert all(yaml.safe_load(text.replace("!import_call", "")) for text in others)
