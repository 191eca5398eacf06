"""RobustEvaluationHook in runs of MMEngine's runner: its metric is AutoAttack's, and the training that without it."""

import re
from types import SimpleNamespace

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain_runs import Record, assert_same, by_iteration, loader, network, runner

pytest.importorskip("pyautoattack", reason="the oracle is AutoAttack")

from few_steps import FewSteps

from ikl_plugins.adversarial import robust_evaluation as evaluation
from ikl_plugins.mmpretrain import robust_evaluation

METRIC = "robust/apgd-ce"
VAL = {"val_dataloader": loader(15, 4, seed=1, shuffle=False), "val_cfg": {}, "val_evaluator": {"type": "Accuracy"}}
ADVERSARIAL = {
    "type": "AdversarialClassifier",
    "attack": {"eps": "8/255", "steps": 1, "step_size": "8/255"},  # from a random start
    "robust_loss": {"type": "KLLoss"},
}
EMA = {"type": "EMAHook", "momentum": 0.3, "priority": "ABOVE_NORMAL"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(evaluation, "_autoattack", lambda caller: FewSteps)


def hook(**changes):
    return {"type": "RobustEvaluationHook", "eps": "2/255", "batch_size": 4, "n_examples": 9, **changes}


def keeps_best(*metrics):
    return {"checkpoint": {"type": "CheckpointHook", "save_best": list(metrics), "rule": "greater", "interval": 1}}


def made(folder, hooks, model=None, **settings):
    torch.manual_seed(0)
    return runner(folder, model or network(**ADVERSARIAL), hooks=hooks, **{**VAL, **settings})


def autoattack(model):
    """AutoAttack's own robust accuracy on the first images of the validation data, spread over the classes."""
    images = torch.stack([sample["inputs"] for sample in VAL["val_dataloader"].dataset]).float()[chosen()] / 255
    labels = torch.arange(15)[chosen()] % 3
    settings = {"norm": "Linf", "eps": 2 / 255, "seed": 0}
    return FewSteps.apgd_ce(
        lambda pixels: model.eval()((pixels * 255 - 120) / 60, mode="tensor"), images, labels, 4, **settings
    )


def chosen():
    return [index * 15 // 9 for index in range(9)]  # a list has no `get_gt_labels`


@pytest.mark.parametrize("average", [False, True])
def test_the_metric_is_autoattacks_of_the_weights_that_are_saved(tmp_path, average):
    run = made(tmp_path, [*([EMA] if average else []), hook()], epochs=3)
    run.train()
    model = MODELS.build(network())
    model.load_state_dict(torch.load(tmp_path / "epoch_3.pth", weights_only=False)["state_dict"])
    found = run.message_hub.get_scalar(f"val/{METRIC}").current()
    assert found == pytest.approx(autoattack(model))
    assert 0 < found < 100
    if average:
        assert not torch.equal(model.head.fc.weight, run.model.head.fc.weight)


AUTOCAST = {"optim_wrapper": {"type": "AutocastOptimWrapper", "optimizer": {"type": "SGD", "lr": 0.05}}}


@pytest.mark.parametrize("settings", [{}, by_iteration(3, 3), AUTOCAST], ids=["epochs", "iterations", "autocast"])
def test_a_training_with_it_is_the_training_without_it(tmp_path, settings):
    ends = []
    for name, hooks in (("without", []), ("with", [hook()])):
        run = made(tmp_path / name, [*hooks, EMA], **settings)
        run.train()
        ends.append({**run.model.state_dict(), "random": torch.get_rng_state()})
    assert_same(*ends)


def test_the_best_checkpoint_is_the_best_and_a_resumed_run_keeps_it(tmp_path):
    values = {}

    def note(run, metrics=None):
        values[run.epoch] = metrics[METRIC]

    def train(resume, epochs):
        recorded = Record(after_val_epoch=note)
        recorded.priority = "LOWEST"
        hooks = [{"type": "IKLHook"}, hook(interval=2), recorded]
        kept = keeps_best(METRIC, "accuracy/top1")
        run = made(tmp_path, hooks, epochs=epochs, default_hooks=kept, resume=resume, log_level="INFO")
        run.train()
        return run

    train(False, 4)
    assert [epoch for epoch, value in values.items() if value is not None] == [2, 4]
    run = train(True, 7)
    assert [epoch for epoch, value in values.items() if value is not None] == [2, 4, 6, 7]
    best = max((value, -epoch) for epoch, value in values.items() if value is not None)
    (path,) = tmp_path.glob("best_robust_apgd-ce_epoch_*.pth")
    assert path.stem.endswith(f"_{-best[1]}")
    assert run.message_hub.get_info(f"best_score_{METRIC}") == best[0]
    text = "".join(log.read_text() for log in tmp_path.glob("*/*.log"))
    shown = {int(epoch): METRIC in line for epoch, line in re.findall(r"Epoch\(val\) \[(\d)\](.*)", text)}
    assert [epoch for epoch in range(1, 8) if shown[epoch]] == [2, 4, 6, 7]  # no line shows that of an earlier epoch
    assert "not defined in message_hub" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_dataloader": None, "val_cfg": None, "val_evaluator": None}, "must have a `val_dataloader`"),
        ({"hooks": [hook(), {**EMA, "priority": 5}]}, "EMAHook must come later"),
        ({"hooks": [hook(pixel_range=1.0)]}, "RobustEvaluationHook: `mean` must hold numbers"),
        ({"model": network(head={"type": "MultiLabelLinearClsHead", "num_classes": 3, "in_channels": 4})}, "a softmax"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        made(tmp_path, **{"hooks": [hook()], **changes}).train()


def test_test_data_are_no_validation_data(monkeypatch):
    warned = []
    logger = SimpleNamespace(warning=lambda text, *_: warned.append(text))
    monkeypatch.setattr(robust_evaluation.MMLogger, "get_current_instance", lambda: logger)
    data = {"dataset": {"type": "CustomDataset", "data_root": "test"}}
    for other in ({"dataset": {"type": "CustomDataset", "data_root": "val"}}, data):
        robust_evaluation._warn_of_test_data({"val_dataloader": other, "test_dataloader": data})
    (text,) = warned
    assert "Hold training images out" in text
