"""The training recipe for generated data: each piece against its formula or torch's, and all of them in a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import PARAM_SCHEDULERS
from mmpretrain.registry import MODELS
from mmpretrain_runs import CLASSES, Record, assert_same, loader, network, runner
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from ikl_plugins.mmpretrain import OneCycleMomentum, WarmupEMA


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- the average ------------------------------------------------------------------------------------------------------


def published_average(weights, start, warmup, tau):
    """From the weights after each step to the averages, in float64: copies for ``warmup`` steps, then the formula."""
    average, averages = start.double(), []
    for step, weight in enumerate(weights):
        if step < warmup:
            average = weight.double()
        else:
            d = step - warmup
            decay = min(tau, (1 + d) / (10 + d))
            average = decay * average + (1 - decay) * weight.double()
        averages.append(average)
    return averages


@pytest.mark.parametrize("momentum", [0.005, 0.4])
def test_the_average_is_that_of_the_formula(momentum):
    """The final decay 1 - 0.4 is reached within these steps, 0.995 is not."""
    model = nn.Linear(3, 2)
    start = model.weight.detach().clone()
    averaged = ROOT_MODELS.build({"type": "WarmupEMA", "momentum": momentum}, default_args={"model": model})
    assert type(averaged) is WarmupEMA
    weights, found = [], []
    for _ in range(30):
        nn.init.normal_(model.weight)
        averaged.update_parameters(model)
        weights.append(model.weight.detach().clone())
        found.append(averaged.module.weight.double())
    for ours, expected in zip(found, published_average(weights, start, 0, 1 - momentum), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert not averaged.module.weight.requires_grad


@pytest.mark.parametrize("update_buffers", [False, True])
def test_buffers_are_those_of_the_model_that_is_trained(update_buffers):
    model = nn.BatchNorm1d(2)
    averaged = WarmupEMA(model, update_buffers=update_buffers)
    model.running_mean.fill_(5.0)
    averaged.update_parameters(model)
    assert averaged.module.running_mean.tolist() == ([4.5, 4.5] if update_buffers else [5.0, 5.0])
    model.num_batches_tracked.fill_(7)
    averaged.update_parameters(model)
    assert averaged.module.num_batches_tracked == (0 if update_buffers else 7)


def test_the_hook_copies_during_the_warm_up_and_averages_then(tmp_path):
    """Two epochs of three steps before the average begins, two with it."""
    hooks = [{"type": "IKLHook"}, {"type": "EMAHook", "ema_type": "WarmupEMA", "momentum": 0.005, "begin_epoch": 3}]
    run = runner(tmp_path, network(), hooks=hooks, epochs=4)
    weights, averages = [], []

    def note(run, *_, **__):
        (hook,) = (hook for hook in run.hooks if isinstance(hook, EMAHook))
        weights.append(state_of(run.model))
        averages.append(state_of(hook.ema_model.module))

    run.register_hook(Record(after_train_iter=note), priority="LOWEST")
    run.train()
    assert len(weights) == 12
    for name, tensor in weights[0].items():
        steps = [state[name] for state in weights]
        found = [state[name] for state in averages]
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            expected = steps  # those of the model that is trained
        else:
            expected = published_average(steps, tensor, warmup=6, tau=0.995)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


# --- one cycle --------------------------------------------------------------------------------------------------------


def optimizer_of(**keywords):
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, **keywords}
    return torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], **settings)


def scheduled(optimizer, steps, **keywords):
    wrapper = OptimWrapper(optimizer)
    rate = {"type": "ResumableOneCycleLR", "eta_max": 0.2, "end": steps, **keywords}
    momentum = {"type": "OneCycleMomentum", "end": steps, **keywords}
    arguments = {"optimizer": wrapper, "epoch_length": 3}
    return wrapper, [PARAM_SCHEDULERS.build(settings, default_args=arguments) for settings in (rate, momentum)]


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize(
    ("steps", "share"),
    [(400, 0.025), (1600, 0.025), (2400, 0.025), (7, 0.3), (10, 0.55), (1, 0.3), (30, 0.025), (5, 1.0)],
)
def test_rate_and_momentum_are_torchs(steps, share, strategy, by_epoch):
    """For both groups of parameters; MMEngine's convert_to_iter_based makes of epochs three iterations each."""
    ours, theirs = optimizer_of(), optimizer_of()
    keywords = {"pct_start": share, "anneal_strategy": strategy}
    wrapper, schedulers = scheduled(ours, steps, **keywords, **({} if by_epoch else {"convert_to_iter_based": True}))
    steps *= 1 if by_epoch else 3
    schedule = OneCycleLR(theirs, max_lr=0.2, total_steps=steps, **keywords)  # div_factor 25 and 1e4 are torch's own
    for step in range(steps):
        for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(other["lr"], rel=1e-12, abs=1e-15), step
            assert mine["momentum"] == pytest.approx(other["momentum"], rel=1e-12), step
            assert mine["nesterov"] is True
        for optimizer in (wrapper, theirs):
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if step < steps - 1:
            schedule.step()


def test_the_first_beta_of_adam_is_its_momentum():
    weight = nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.Adam([weight], betas=(0.9, 0.999)))
    scheduler = OneCycleMomentum(wrapper, end=10, pct_start=0.5)
    assert wrapper.param_groups[0]["betas"] == (0.95, 0.999)
    for _ in range(4):
        wrapper.step()
        scheduler.step()
    assert wrapper.param_groups[0]["betas"] == (pytest.approx(0.85), 0.999)


CYCLE = [
    {"type": "ResumableOneCycleLR", "eta_max": 0.2, "pct_start": 0.5},
    {"type": "OneCycleMomentum", "pct_start": 0.5},
]


# --- batch normalisation ----------------------------------------------------------------------------------------------


def momenta(work_dir, hook=None, epochs=2, **keywords):
    seen = []
    hooks = [{"type": "IKLHook"}, {"type": "BatchNormMomentumHook", **(hook or {})}]
    run = runner(work_dir, network(), hooks=hooks, epochs=epochs, **keywords)

    def note(run, *_, **__):
        layers = [module for module in run.model.modules() if isinstance(module, nn.BatchNorm2d)]
        seen.append({layer.momentum for layer in layers})

    run.register_hook(Record(before_train_iter=note), priority="LOWEST")
    run.train()
    return seen


def test_the_first_batch_counts_whole_and_each_other_a_hundredth(tmp_path):
    assert momenta(tmp_path) == [{1.0}, *[{0.01}] * 5]
    # A resumed run has no first step.
    assert momenta(tmp_path / "again", resume=True, load_from=str(tmp_path / "epoch_1.pth")) == [{0.01}] * 3
    settings = {"momentum": 0.2, "first_momentum": 0.5}
    assert momenta(tmp_path / "others", settings, epochs=1) == [{0.5}, {0.2}, {0.2}]


def test_statistics_after_the_first_step_are_those_of_the_batch(tmp_path):
    hooks = [{"type": "IKLHook"}, {"type": "BatchNormMomentumHook"}]
    run = runner(tmp_path, network(), epochs=1, train_dataloader=loader(4, 4, shuffle=False), hooks=hooks)
    seen = []
    run.model.backbone.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    run.train()
    (batch,) = seen
    layer = run.model.backbone.bn1
    torch.testing.assert_close(layer.running_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, batch.var((0, 2, 3)))


# --- all of it --------------------------------------------------------------------------------------------------------


ATTACK = {"eps": "8/255", "steps": 3, "step_size": "2/255", "random_start": "uniform"}


def adversarial_network(**keywords):
    return network(
        type="AdversarialClassifier",
        data_preprocessor={"mean": [0.0] * 3, "std": [255.0] * 3, "num_classes": CLASSES},
        attack={**ATTACK, "objective": "soft_cross_entropy", "model_mode": "train"},
        robust_loss={"type": "KLLoss", "loss_weight": 5.0},
        label_smoothing=0.1,
        val_attack={**ATTACK, "steps": 40, "objective": "margin"},
        **keywords,
    )


def prepared(model, data):
    batch = {name: [copy.deepcopy(sample[name]) for sample in data] for name in ("inputs", "data_samples")}
    return model.data_preprocessor(batch)


def recipe(work_dir, epochs=4, **keywords):
    """The recipe on random images: 20 real ones, of which 6 are held out."""
    held_out = loader(20).dataset[:6]
    settings = {
        "param_scheduler": CYCLE,
        "optim_wrapper": {
            "optimizer": {"type": "SGD", "lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            "paramwise_cfg": {"norm_decay_mult": 0.0},
        },
        "hooks": [
            {"type": "IKLHook"},
            {"type": "BatchNormMomentumHook", "momentum": 0.01},
            {"type": "EMAHook", "ema_type": "WarmupEMA", "momentum": 0.005, "begin_epoch": 3},
        ],
        "val_dataloader": torch.utils.data.DataLoader(held_out, batch_size=6, collate_fn=loader().collate_fn),
        "val_cfg": {},
        "val_evaluator": [{"type": "Accuracy"}, {"type": "RobustAccuracy"}],
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "interval": 1, "save_best": "robust/top1", "rule": "greater"}
        },
        **keywords,
    }
    torch.manual_seed(0)
    run = runner(work_dir, adversarial_network(), epochs=epochs, **settings)
    scores = {}
    run.register_hook(
        Record(after_val_epoch=lambda run, metrics=None: scores.update({run.epoch: metrics["robust/top1"]})),
        priority="LOWEST",
    )
    run.train()
    return run, scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder, final state and scores of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run, scores = recipe(folder)
    return folder, run.model.state_dict(), scores


def test_the_average_is_validated_under_attack_and_the_best_is_kept(whole):
    """MMEngine's EMAHook validates the average, CheckpointHook keeps the best."""
    folder, _, scores = whole
    assert sorted(scores) == [1, 2, 3, 4]
    best = max(scores, key=scores.get)  # the first of equals
    (kept,) = folder.glob("best_robust_top1_epoch_*.pth")
    assert kept.name == f"best_robust_top1_epoch_{best}.pth"
    weights = torch.load(kept, weights_only=False)["state_dict"]
    saved = torch.load(folder / f"epoch_{best}.pth", weights_only=False)["state_dict"]
    assert_same(weights, saved)

    model = MODELS.build(adversarial_network()).eval()
    model.load_state_dict(weights)
    batch = prepared(model, loader(20).dataset[:6])
    predicted = model.predict(batch["inputs"], batch["data_samples"])
    right = [int(sample.robust_pred_score.argmax()) == int(sample.gt_label) for sample in predicted]
    assert scores[best] == pytest.approx(100 * sum(right) / 6)


@pytest.mark.parametrize("epoch", [1, 3])
def test_the_whole_recipe_goes_on_after_a_resume(epoch, whole, tmp_path):
    """Cycle, batch normalisation and average, before the average has begun and after."""
    folder, state, scores = whole
    resumed, again = recipe(tmp_path, resume=True, load_from=str(folder / f"epoch_{epoch}.pth"))
    assert again == {later: scores[later] for later in range(epoch + 1, 5)}
    assert_same(resumed.model.state_dict(), state)
    averages = [torch.load(path / "epoch_4.pth", weights_only=False)["state_dict"] for path in (folder, tmp_path)]
    assert_same(*averages)


def documented(heading):
    """The names that the Python block under a heading of the how-to page defines."""
    page = (Path(__file__).parents[2] / "docs" / "generated_data.md").read_text(encoding="utf-8")
    block = page.partition(f"## {heading}\n")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(compile(block, heading, "exec"), names)  # noqa: S102 - our own page
    return names


def missing(part, whole, where=""):
    """The places where a config does not have what a piece of one says."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from missing(value, whole.get(key), f"{where}.{key}")
    elif isinstance(part, list) and isinstance(whole, list) and len(part) == len(whole):
        for index, value in enumerate(part):
            yield from missing(value, whole[index], f"{where}.{index}")
    elif part != whole:
        yield where, part, whole


def test_the_documented_recipe_is_the_shipped_one(load):
    """Which test_recipe_steps trains."""
    config = load("cifar10_generated/wrn_28_10_1m-kl.py").to_dict()
    names = ("model", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg", "val_evaluator", "custom_hooks")
    piece = {name: documented("The recipe")[name] for name in (*names, "default_hooks")}
    piece |= {name: documented("In every batch")[name] for name in ("train_dataloader", "val_dataloader")}
    assert list(missing(piece, config)) == []
