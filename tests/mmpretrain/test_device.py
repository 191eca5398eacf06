"""What the classifiers do on a device, shown on a CPU: no waits, no graph breaks, nothing lost to an overflow."""

from __future__ import annotations

import logging
import math
import os
from types import SimpleNamespace

import mmengine.optim.optimizer.amp_optimizer_wrapper as amp
import pytest
import torch
import torch._dynamo
import torch.distributed
from mmengine.optim import AmpOptimWrapper
from mmpretrain.registry import MODELS
from mmpretrain_runs import Record, distilled_network, loader, network, prior_of, runner, save_teacher
from no_waits import NoWaits

from ikl_plugins import _value_checks
from ikl_plugins.mmengine.hooks import IKLHook


def adversarial_network(**changes):
    attack = {"eps": "8/255", "steps": 2, "step_size": "2/255", "objective": "ikl"}
    loss = {"type": "IKLLoss", "global_info": True}
    return network(type="AdversarialClassifier", **{"attack": attack, "robust_loss": loss, **changes})


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(tmp_path / "teacher.pth")


def build(config):
    torch.manual_seed(0)
    model = MODELS.build(config).train()
    model.begin_epoch(1, 1)
    return model


def prepared(model, count=4):
    (data,) = loader(count=count, batch_size=count)
    return model.data_preprocessor(data, training=True)


@pytest.mark.parametrize("kind", ["distillation", "adversarial", "weight perturbation"])
def test_a_training_step_does_not_wait(kind, teacher, monkeypatch):
    model = build(
        {
            "distillation": distilled_network(teacher),
            "adversarial": adversarial_network(),
            "weight perturbation": adversarial_network(awp={"warmup_epochs": 0}),
        }[kind]
    )
    data = prepared(model)
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    with NoWaits():
        total, _ = model.parse_losses(model(**data, mode="loss"))
        total.backward()
    _value_checks.read_value_checks()


@pytest.mark.parametrize("model", [distilled_network, adversarial_network])
def test_the_terms_of_an_iteration_are_read_together(model, teacher, tmp_path, monkeypatch):
    """Before anything else asks for them one by one, and to the same numbers."""
    config = model(teacher) if model is distilled_network else model()
    before, after, reads = [], [], []
    numbers = _value_checks.host_numbers
    monkeypatch.setattr("ikl_plugins.mmengine.hooks.host_numbers", lambda groups: reads.append(1) or numbers(groups))
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    run = runner(tmp_path, config, epochs=1)
    run.hooks.insert(0, Record(after_train_iter=lambda *_, outputs, **__: before.append(dict(outputs))))
    run.register_hook(Record(after_train_iter=lambda *_, outputs, **__: after.append(dict(outputs))), "VERY_HIGH")
    run.train()
    assert len(reads) == len(after) == 3
    for terms, read in zip(before, after, strict=True):
        assert {"loss", "loss_ce", "weighted_mse", "soft_cross_entropy"} <= terms.keys()
        assert read == terms
        assert all(read[name] is not term and read[name].dtype == term.dtype for name, term in terms.items())


def test_a_bad_label_on_a_device_stops_the_run_at_its_iteration(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    data = loader()
    data.dataset[0]["data_samples"].set_gt_label(7)
    run = runner(tmp_path, distilled_network(teacher), epochs=1, train_dataloader=data)
    # The head's own cross entropy would refuse it first, on a CPU.
    monkeypatch.setattr("mmpretrain.models.heads.cls_head.ClsHead._get_loss", lambda *_, **__: {})
    with pytest.raises(ValueError, match=r"IKLLoss: `targets` must lie in \[0, 2\], got values from [0-2] to 7"):
        run.train()


def test_the_rehearsal_of_the_validation_reads_what_it_has_found(tmp_path, monkeypatch):
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    data = loader()
    data.dataset[0]["data_samples"].set_gt_label(7)
    validation = {"val_dataloader": data, "val_cfg": {}, "val_evaluator": {"type": "Accuracy"}}
    model = adversarial_network(val_attack={"eps": "8/255", "steps": 1, "step_size": "8/255"})
    run = runner(tmp_path, model, epochs=1, **validation)
    run.register_hook(Record(before_train_iter=lambda *_, **__: pytest.fail("a step was taken")), "LOW")
    with pytest.raises(ValueError, match=r"PGD: `labels` must lie in \[0, 2\], got values from [0-2] to 7"):
        run.train()


@pytest.mark.parametrize("global_info", [False, True])
def test_distillation_compiles_without_a_graph_break(global_info, teacher):
    config = distilled_network(teacher)
    config["distill_loss"]["global_info"] = global_info
    model = build(config)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(**prepared(model), mode="loss")
    assert found.graph_break_count == 0, [reason.reason for reason in found.break_reasons]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch 2.15 about its own compiler
def test_adversarial_training_compiles_and_its_last_batch_may_be_smaller():
    attack = {"eps": "8/255", "steps": 1, "step_size": "2/255", "objective": "ikl"}
    compiled, plain = build(adversarial_network(attack=attack)), build(adversarial_network(attack=attack))
    torch._dynamo.reset()
    step = torch.compile(compiled, backend="eager")
    for count in (4, 3):
        data = prepared(plain, count)
        torch.manual_seed(count)
        expected = plain(**data, mode="loss")
        torch.manual_seed(count)
        found = step(**data, mode="loss")
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("deterministic", "before", "after"), [(True, None, ":4096:8"), (True, ":16:8", ":16:8"), (False, None, None)]
)
def test_deterministic_runs_have_a_cublas_workspace(deterministic, before, after, monkeypatch):
    environment = {} if before is None else {"CUBLAS_WORKSPACE_CONFIG": before}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    IKLHook(verify_checkpoints=False).before_run(SimpleNamespace(_train_loop=None))
    assert environment.get("CUBLAS_WORKSPACE_CONFIG") == after


# --- overflows -------------------------------------------------------------------------------------------------------


class Overflowing:
    """A teacher whose logits of one batch are not finite."""

    def __init__(self, inner, value, batch):
        self.inner, self.value, self.left = inner, value, batch

    def __call__(self, inputs):
        logits = self.inner(inputs)
        self.left -= 1
        return logits + self.value if self.left == 0 else logits

    def apply(self, fn):
        self.inner.apply(fn)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_teacher_batch_that_overflowed_under_amp_costs_one_step(value, teacher, tmp_path, monkeypatch, caplog):
    """AmpOptimWrapper's scaler skips the step; two epochs later weights and prior are finite."""
    monkeypatch.setattr(amp, "is_cuda_available", lambda: True)
    monkeypatch.setattr(amp, "GradScaler", lambda **options: torch.amp.GradScaler("cpu", **options))
    wrapper = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "SGD", "lr": 0.05}}
    run = runner(tmp_path, distilled_network(teacher), epochs=3, optim_wrapper=wrapper)
    model = run.model
    model.teacher = Overflowing(model.teacher, value, batch=2)
    scales = []
    note = Record(after_train_iter=lambda *_, **__: scales.append(run.optim_wrapper.loss_scaler.get_scale()))
    run.register_hook(note, "LOWEST")
    with caplog.at_level(logging.WARNING):
        run.train()
    assert isinstance(run.optim_wrapper, AmpOptimWrapper)
    assert scales[1] == scales[0] / 2  # so that step was skipped
    assert scales[-1] == scales[1]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    prior = prior_of(model)
    assert not torch.equal(prior.matrix, torch.full_like(prior.matrix, 1 / 3))
    assert sum("4 predictions of this epoch were not finite" in message for message in caplog.messages) == 1


def test_a_gradient_that_overflowed_does_not_perturb_the_weights(monkeypatch):
    """Weights, statistics of batch normalisation and prior stay finite, whatever AWP's own pass has met."""
    model = build(adversarial_network(awp={"warmup_epochs": 0, "gamma": 0.1}))
    data = prepared(model)
    weight = model.head.fc.weight
    passes = []

    def overflow(gradient):
        passes.append(gradient)
        return gradient * math.inf if len(passes) == 1 else gradient

    weight.register_hook(overflow)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    total, _ = model.parse_losses(model(**data, mode="loss"))
    assert passes
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    total.backward()
    model.end_iteration()
    model.end_epoch()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_weight_perturbation_of_a_sharded_model_is_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    model = build(adversarial_network(awp={"warmup_epochs": 0}))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"AdversarialClassifier: `awp` must see whole weights, .* FSDP"):
            model.attach(SimpleNamespace(val_loop=None, model=wrapped))
    finally:
        torch.distributed.destroy_process_group()
