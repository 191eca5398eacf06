"""The training recipe for generated data: each piece against its formula or against torch, and all of them in a run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmpretrain.datasets import CIFAR10
from mmpretrain.models import LabelSmoothLoss
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from mmpretrain_runs import CLASSES, Record, loader, network, runner
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from ikl_plugins.mmpretrain import BatchNormMomentumHook, OneCycleMomentum, ResumableOneCycleLR, WarmupEMA


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


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


def test_the_decay_rises_to_its_end():
    averaged = WarmupEMA(nn.Linear(1, 1), momentum=0.005)
    assert [averaged.decay(step) for step in (0, 1, 90, 1789, 1791, 10**6)] == pytest.approx(
        [0.1, 2 / 11, 0.91, 1790 / 1799, 0.995, 0.995]
    )


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


@pytest.mark.parametrize("momentum", [0, 1, -0.1, True, "0.005", None])
def test_a_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=r"^WarmupEMA: `momentum` must be a number between 0 and 1, .*write 0\.005\.$"):
        WarmupEMA(nn.Linear(1, 1), momentum=momentum)


def averaged_run(work_dir, epochs=4, **keywords):
    """A run whose average begins after two epochs of three steps, and what each step has left."""
    hooks = [{"type": "IKLHook"}, {"type": "EMAHook", "ema_type": "WarmupEMA", "momentum": 0.005, "begin_epoch": 3}]
    run = runner(work_dir, network(), hooks=hooks, epochs=epochs, **keywords)
    weights, averages = [], []

    def note(run, *_, **__):
        (hook,) = (hook for hook in run.hooks if isinstance(hook, EMAHook))
        weights.append(state_of(run.model))
        averages.append(state_of(hook.ema_model.module))

    hook = Record(after_train_iter=note)
    run.register_hook(hook, priority="LOWEST")
    run.train()
    return run, weights, averages


def test_the_hook_copies_during_the_warm_up_and_averages_then(tmp_path):
    _, weights, averages = averaged_run(tmp_path)
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


def test_an_average_goes_on_after_a_resume(tmp_path):
    whole, _, averages = averaged_run(tmp_path / "whole")
    for epoch in (1, 3):
        path = str(tmp_path / "whole" / f"epoch_{epoch}.pth")
        resumed, _, again = averaged_run(tmp_path / f"from_{epoch}", resume=True, load_from=path)
        assert_same(again[-1], averages[-1])
        assert_same(resumed.model.state_dict(), whole.model.state_dict())


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
@pytest.mark.parametrize(
    ("steps", "share"),
    [(400, 0.025), (1600, 0.025), (2400, 0.025), (7, 0.3), (10, 0.55), (1, 0.3), (30, 0.025), (5, 1.0)],
)
def test_rate_and_momentum_are_torchs(steps, share, strategy):
    """By epochs, for both groups of parameters."""
    theirs = optimizer_of()
    schedule = OneCycleLR(
        theirs, max_lr=0.2, total_steps=steps, pct_start=share, div_factor=25, final_div_factor=1e4,
        anneal_strategy=strategy,
    )  # fmt: skip
    ours = optimizer_of()
    wrapper, schedulers = scheduled(ours, steps, pct_start=share, anneal_strategy=strategy)
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


def test_the_ends_of_the_published_schedule():
    """lr 0.2 / 25 to 0.2 after 10 of 400 epochs to 0.2 / 25 / 1e4; momentum 0.95, 0.85, 0.95."""
    optimizer = optimizer_of()
    wrapper, schedulers = scheduled(optimizer, 400, pct_start=0.025)
    values = []
    for _ in range(400):
        values.append((optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["momentum"]))
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
    assert values[0] == pytest.approx((0.008, 0.95))
    assert values[9] == pytest.approx((0.2, 0.85))
    assert values[399] == pytest.approx((8e-7, 0.95))
    assert max(rate for rate, _ in values) == values[9][0]


def test_the_first_beta_of_adam_is_its_momentum():
    weight = nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.Adam([weight], betas=(0.9, 0.999)))
    scheduler = OneCycleMomentum(wrapper, end=10, pct_start=0.5)
    assert wrapper.param_groups[0]["betas"] == (0.95, 0.999)
    for _ in range(4):
        wrapper.step()
        scheduler.step()
    assert wrapper.param_groups[0]["betas"] == (pytest.approx(0.85), 0.999)


def test_an_optimizer_step_uses_the_momentum_of_its_epoch():
    """Two epochs of SGD with Nesterov's momentum written out."""
    optimizer = optimizer_of(weight_decay=0.0)
    weight = optimizer.param_groups[0]["params"][0]
    wrapper, schedulers = scheduled(optimizer, 4, pct_start=0.5)
    expected, buffer = weight.detach().double(), None
    for step, (rate, momentum) in enumerate([(0.008, 0.95), (0.2, 0.85)]):
        gradient = torch.tensor([1.0, -2.0, 3.0 + step])
        weight.grad = gradient.clone()
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
        buffer = gradient.double() if buffer is None else momentum * buffer + gradient
        expected = expected - rate * (gradient + momentum * buffer)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_iterations_in_the_place_of_epochs():
    """MMEngine's convert_to_iter_based: 4 epochs of 3 iterations are one cycle of 12."""
    ours, theirs = optimizer_of(), optimizer_of()
    wrapper, schedulers = scheduled(ours, 4, pct_start=0.3, convert_to_iter_based=True)
    schedule = OneCycleLR(theirs, max_lr=0.2, total_steps=12, pct_start=0.3)
    for _ in range(11):
        for optimizer in (wrapper, theirs):
            optimizer.step()
        schedule.step()
        for scheduler in schedulers:
            scheduler.step()
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        assert ours.param_groups[0]["momentum"] == pytest.approx(theirs.param_groups[0]["momentum"], rel=1e-12)


CYCLE = [
    {"type": "ResumableOneCycleLR", "eta_max": 0.2, "pct_start": 0.5},
    {"type": "OneCycleMomentum", "pct_start": 0.5},
]


def test_a_schedule_goes_on_after_a_resume(tmp_path):
    def run(name, **keywords):
        values = []
        run = runner(tmp_path / name, network(), epochs=4, param_scheduler=CYCLE, **keywords)

        def note(run, *_, **__):
            group = run.optim_wrapper.param_groups[0]
            values.append((run.epoch, group["lr"], group["momentum"]))

        run.register_hook(Record(before_train_iter=note))
        run.train()
        return run, values

    whole, values = run("whole")
    resumed, again = run("resumed", resume=True, load_from=str(tmp_path / "whole" / "epoch_2.pth"))
    assert again == values[6:]
    # pct_start of 4 epochs is 2: the peak is in epoch 1, and a cosine leads from there to epoch 3.
    assert [momentum for _, _, momentum in values[::3]] == pytest.approx([0.95, 0.85, 0.9, 0.95])
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_mmengines_own_cycle_cannot_be_resumed(tmp_path):
    """The reason for ours. Where this fails MMEngine's will do."""
    settings = {"param_scheduler": {"type": "OneCycleLR", "eta_max": 0.2}, "epochs": 2}
    runner(tmp_path, network(), **settings).train()
    again = runner(tmp_path, network(), resume=True, load_from=str(tmp_path / "epoch_1.pth"), **settings)
    with pytest.raises(ValueError, match=r"it would run code when it is loaded: .*OneCycleParamScheduler"):
        again.train()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"base_momentum": 1.1}, ValueError, r"`base_momentum` must be from 0 to 1, got 1\.1\. Choose"),
        ({"max_momentum": -1}, ValueError, r"`max_momentum` must be a finite number of at least 0, got -1"),
        ({"pct_start": "0.1"}, TypeError, r"`pct_start` must be a finite number"),
        ({"pct_start": 2}, ValueError, r"`pct_start` must be from 0 to 1, got 2"),
        ({"anneal_strategy": "cosine"}, ValueError, r"unknown `anneal_strategy` `cosine`\. .*Known: cos, linear"),
        ({"total_steps": 0}, ValueError, r"`total_steps` must be the number of steps .* got 0\. Give it, or `end`"),
        ({"end": 10**9}, ValueError, r"`total_steps` must be the number of steps .* got None\. Give it, or `end`"),
        (
            {"pct_start": 0.2},
            ValueError,
            r"`pct_start` of `total_steps` must not be exactly one step, .* there are 5 st",
        ),
    ],
)
def test_settings_of_the_momentum_out_of_range(settings, error, message):
    with pytest.raises(error, match=rf"^OneCycleMomentum: {message}"):
        OneCycleMomentum(OptimWrapper(optimizer_of()), **{"end": 5, **settings})


def test_a_rise_without_a_length():
    with pytest.raises(ValueError, match=r"^ResumableOneCycleLR: `pct_start` of `total_steps` must not be .* 40 steps"):
        ResumableOneCycleLR(OptimWrapper(optimizer_of()), eta_max=0.2, pct_start=0.025, total_steps=40)


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


def test_the_momenta_are_arguments(tmp_path):
    assert momenta(tmp_path, {"momentum": 0.2, "first_momentum": 0.5}, epochs=1) == [{0.5}, {0.2}, {0.2}]


def test_statistics_after_the_first_step_are_those_of_the_batch(tmp_path):
    run = runner(
        tmp_path, network(), epochs=1, train_dataloader=loader(4, 4, shuffle=False),
        hooks=[{"type": "IKLHook"}, {"type": "BatchNormMomentumHook"}],
    )  # fmt: skip
    seen = []
    run.model.backbone.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    run.train()
    (batch,) = seen
    layer = run.model.backbone.bn1
    torch.testing.assert_close(layer.running_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, batch.var((0, 2, 3)))


def test_settings_of_the_hook_out_of_range(tmp_path):
    for name in ("momentum", "first_momentum"):
        with pytest.raises(ValueError, match=rf"`{name}` must be from 0 to 1, got 1\.5\. It is the share"):
            BatchNormMomentumHook(**{name: 1.5})
        with pytest.raises(TypeError, match=rf"`{name}` must be a finite number"):
            BatchNormMomentumHook(**{name: None})
    run = type("Run", (), {"model": nn.Linear(1, 1), "iter": 0})()
    with pytest.raises(ValueError, match=r"the model must have batch normalisation, but it has none\. Take the hook"):
        BatchNormMomentumHook().before_train(run)


# --- what MMEngine and MMPretrain have already ------------------------------------------------------------------------


def test_weight_decay_spares_batch_normalisation_alone():
    """norm_decay_mult=0 goes by the type of the layer: weights and biases of normalisation, no other bias."""
    model = MODELS.build(network())
    wrapper = build_optim_wrapper(
        model,
        {
            "optimizer": {"type": "SGD", "lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            "paramwise_cfg": {"norm_decay_mult": 0.0},
        },
    )
    decay = {id(p): group["weight_decay"] for group in wrapper.param_groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    expected = {
        f"{path}.{name}" if path else name: 0.0 if isinstance(module, nn.BatchNorm2d) else 5e-4
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    assert found == expected
    assert found["head.fc.bias"] == 5e-4
    assert 0.0 in found.values()
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in wrapper.param_groups)


def test_smoothing_over_all_classes_is_the_mode_original():
    """1 - 0.1 on the label and 0.1 / C on all C classes, as torch has it; 'classy_vision' divides by 1 + 0.1."""
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    by_hand = -sum(
        sum((0.9 * (k == labels[n]) + 0.02) * torch.log_softmax(logits[n], 0)[k] for k in range(5)) for n in range(6)
    )
    torch.testing.assert_close(expected, by_hand / 6)
    losses = {
        mode: LabelSmoothLoss(0.1, num_classes=5, mode=mode)(logits, labels) for mode in ("original", "classy_vision")
    }
    torch.testing.assert_close(losses["original"], expected)
    assert abs(losses["classy_vision"] - expected) > 1e-3


def adversarial_network(**keywords):
    return network(
        type="AdversarialClassifier",
        data_preprocessor={"mean": [0.0] * 3, "std": [255.0] * 3, "num_classes": CLASSES},
        attack={
            "eps": "8/255", "steps": 3, "step_size": "2/255", "random_start": "uniform",
            "objective": "soft_cross_entropy", "model_mode": "train",
        },
        robust_loss={"type": "KLLoss", "loss_weight": 5.0},
        label_smoothing=0.1,
        val_attack={"eps": "8/255", "steps": 40, "step_size": "2/255", "objective": "margin"},
        **keywords,
    )  # fmt: skip


def test_an_attack_in_training_mode_leaves_the_statistics_alone():
    """They move in the two training passes, of adversarial and of natural images, and in no step of the attack."""
    model = MODELS.build(adversarial_network()).train()
    layer = model.backbone.bn1
    inputs = []
    layer.register_forward_pre_hook(
        lambda module, args: inputs.append((module.training, module.track_running_stats, args[0].detach()))
    )
    data = list(loader(6).dataset)
    batch = model.data_preprocessor(
        {"inputs": [sample["inputs"] for sample in data], "data_samples": [sample["data_samples"] for sample in data]}
    )
    model.loss(batch["inputs"], batch["data_samples"])
    assert [training for training, _, _ in inputs] == [True] * 6  # natural logits, three steps, two passes
    assert layer.num_batches_tracked == 2
    mean = torch.zeros(2)
    for _, _, activations in inputs[-2:]:
        mean = 0.9 * mean + 0.1 * activations.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, mean)


def test_labels_must_be_there_for_a_margin():
    changes = {"attack": {"eps": "8/255", "steps": 1, "step_size": "2/255", "objective": "margin"}}
    model = MODELS.build({**adversarial_network(), **changes}).train()
    images = torch.rand(2, 3, 8, 8)
    model.loss(images, [DataSample().set_gt_label(0), DataSample().set_gt_label(1)])
    with pytest.raises(
        ValueError, match=r"every data sample must have a `gt_label`, which the objective 'margin' of `a"
    ):
        model.loss(images, [DataSample(), DataSample()])


# --- all of it --------------------------------------------------------------------------------------------------------


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
            {"type": "EMAHook", "ema_type": "WarmupEMA", "momentum": 0.005, "begin_epoch": 2},
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


def test_the_average_is_validated_under_attack_and_the_best_is_kept(tmp_path):
    """MMEngine's EMAHook validates the average, CheckpointHook keeps the best."""
    _, scores = recipe(tmp_path)
    assert sorted(scores) == [1, 2, 3, 4]
    best = max(scores, key=scores.get)  # the first of equals
    (kept,) = tmp_path.glob("best_robust_top1_epoch_*.pth")
    assert kept.name == f"best_robust_top1_epoch_{best}.pth"
    weights = torch.load(kept, weights_only=False)["state_dict"]
    saved = torch.load(tmp_path / f"epoch_{best}.pth", weights_only=False)["state_dict"]
    assert_same(weights, saved)

    model = MODELS.build(adversarial_network()).eval()
    model.load_state_dict(weights)
    data = loader(20).dataset[:6]
    batch = model.data_preprocessor(
        {
            "inputs": [sample["inputs"] for sample in data],
            "data_samples": [copy.deepcopy(s["data_samples"]) for s in data],
        }
    )
    predicted = model.predict(batch["inputs"], batch["data_samples"])
    right = [int(sample.robust_pred_score.argmax()) == int(sample.gt_label) for sample in predicted]
    assert scores[best] == pytest.approx(100 * sum(right) / 6)


def test_the_whole_recipe_goes_on_after_a_resume(tmp_path):
    whole, scores = recipe(tmp_path / "whole")
    resumed, again = recipe(tmp_path / "resumed", resume=True, load_from=str(tmp_path / "whole" / "epoch_2.pth"))
    assert again == {epoch: scores[epoch] for epoch in (3, 4)}
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert all(math.isfinite(value) for value in scores.values())


def documented(heading):
    """The names that the Python block under a heading of the how-to page defines."""
    page = (Path(__file__).parents[2] / "docs" / "generated_data.md").read_text(encoding="utf-8")
    block = page.partition(f"## {heading}\n")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(compile(block, heading, "exec"), names)  # noqa: S102 - our own page
    return {name: value for name, value in names.items() if name != "__builtins__"}


def test_the_documented_recipe_trains(tmp_path):
    """With a small network and few images in the place of CIFAR-10's, and three epochs."""
    random = numpy.random.default_rng(0)
    numpy.savez(
        tmp_path / "1m.npz",
        image=random.integers(256, size=(40, 32, 32, 3), dtype="uint8"),
        label=random.integers(3, size=40),
    )
    data, recipe = documented("In every batch"), documented("The recipe")
    parts = data["train_dataloader"]["dataset"]["datasets"]
    assert [part["type"] for part in parts] == ["CIFAR10", "GeneratedImages"]
    assert parts[0]["indices"] == -48_976
    parts[0].update(type=FewImages, data_root=str(tmp_path), indices=-20)
    parts[1]["data_root"] = str(tmp_path)
    held_out = data["val_dataloader"]["dataset"]
    assert held_out["indices"] == 1024
    held_out.update(type=FewImages, data_root=str(tmp_path), indices=10)
    data["train_dataloader"].update(batch_size=6, num_workers=0)
    data["train_dataloader"]["batch_sampler"]["epoch_size"] = 20
    data["val_dataloader"].update(batch_size=6, num_workers=0)
    recipe["custom_hooks"][3]["begin_epoch"] = 2
    model = network(**recipe["model"])
    model["data_preprocessor"]["num_classes"] = CLASSES
    model["attack"]["steps"] = model["val_attack"]["steps"] = 2
    run = runner(
        tmp_path / "run", model, epochs=3, hooks=recipe["custom_hooks"],
        **{name: data[name] for name in ("train_dataloader", "val_dataloader")},
        **{
            name: recipe[name]
            for name in ("optim_wrapper", "param_scheduler", "val_cfg", "val_evaluator", "default_hooks")
        },
    )  # fmt: skip
    labels = []
    run.register_hook(
        Record(before_train_iter=lambda run, batch_idx, data_batch=None: labels.append(len(data_batch["data_samples"])))
    )
    run.train()
    assert labels == [6] * 12
    assert run.val_dataloader.dataset.get_gt_labels().tolist() == [index % 3 for index in range(10)]
    assert list(tmp_path.glob("run/best_robust_top1_*.pth"))
    assert recipe["train_cfg"]["max_epochs"] * 0.025 + 1 == documented("The recipe")["custom_hooks"][3]["begin_epoch"]


class FewImages(CIFAR10):
    """Images as MMPretrain's CIFAR-10 gives them, without the files."""

    def load_data_list(self):
        return [{"img": numpy.full((32, 32, 3), index, numpy.uint8), "gt_label": index % 3} for index in range(30)]
