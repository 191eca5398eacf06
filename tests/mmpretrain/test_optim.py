"""AutocastOptimWrapper and cpu_ranks."""

import sys

import pytest
import torch
import torch.distributed
from mmengine.registry import OPTIM_WRAPPERS
from mmpretrain_runs import Record, distilled_network, runner
from torch import nn

from ikl_plugins.mmpretrain import AutocastOptimWrapper, cpu_ranks, training


class Precisions(nn.Module):
    """Remembers the dtype of its logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        self.seen = self.layer(inputs)
        return self.seen.float().square().sum()


def wrapper_of(model, **keywords):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return OPTIM_WRAPPERS.build({"type": "AutocastOptimWrapper", "optimizer": optimizer, **keywords})


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_forward_pass_is_in_bfloat16_and_nothing_else(dtype):
    """Gradients are accumulated as in the stock wrapper."""
    model = Precisions()
    before = model.layer.weight.detach().clone()
    wrapper = wrapper_of(model, dtype=dtype, accumulative_counts=2)
    assert type(wrapper) is AutocastOptimWrapper
    wrapper.initialize_count_status(model, 0, 2)
    for step in range(2):
        with wrapper.optim_context(model):
            loss = model(torch.ones(4, 3))
        assert model.seen.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        wrapper.update_params(loss)
        assert model.layer.weight.dtype == torch.float32
        assert torch.equal(model.layer.weight, before) is (step == 0)
    model(torch.ones(4, 3))
    assert model.seen.dtype == torch.float32


def test_a_run_in_bfloat16_computes_its_losses_in_float32(teacher, tmp_path):
    run = runner(
        tmp_path,
        distilled_network(teacher),
        epochs=1,
        optim_wrapper={"type": "AutocastOptimWrapper", "optimizer": {"type": "SGD", "lr": 0.05}},
    )
    dtypes = set()
    run.model.head.fc.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    run.model.distill_loss.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    losses = []
    run.register_hook(Record(after_train_iter=lambda run, outputs, **_: losses.append(outputs["loss"])))
    run.train()
    assert dtypes == {torch.bfloat16, torch.float32}
    assert all(torch.isfinite(torch.as_tensor(loss)) for loss in losses)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert run.model.distill_loss.class_prior.matrix.dtype == torch.float32


# --- cpu_ranks: what it leaves alone; a real group is in test_train_mmpretrain.py ------------------------------------


@pytest.fixture
def two_ranks(monkeypatch):
    """The environment of torchrun, without CUDA; returns what the group was begun with."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    begun = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args: begun.append(args))
    return begun


def test_ranks_on_cpus_join_a_gloo_group(two_ranks):
    assert cpu_ranks.join() is True
    assert two_ranks == [("gloo",)]


CONFIG = "custom_hooks = [dict(type='IKLHook')]\n"
IMPORTED = CONFIG + "custom_imports = dict(imports=['ikl_plugins.mmengine'])\n"
OWN = CONFIG + "model_wrapper_cfg = dict(type='MMDistributedDataParallel')\n"
TOGETHER = ["--launcher", "pytorch"]
NO_DEVICE = "model_wrapper_cfg.device_ids=None"
WRAPPED = [NO_DEVICE, *(f"model_wrapper_cfg.{name}" for name in ("type=MMDistributedDataParallel",))]
WRAPPED += ["model_wrapper_cfg.broadcast_buffers=False", "model_wrapper_cfg.find_unused_parameters=False"]
# What a user writes under torchrun on CPUs, and the options that mmpretrain's script gets.
UNDER_TORCHRUN = {
    "bare": (IMPORTED, [], [*TOGETHER, "--cfg-options", *WRAPPED]),
    "launcher": (IMPORTED, TOGETHER, [*TOGETHER, "--cfg-options", *WRAPPED]),
    "options": (IMPORTED, ["--cfg-options", "a=1"], [*TOGETHER, "--cfg-options", *WRAPPED, "a=1"]),
    "own wrapper": (OWN, [], [*TOGETHER, "--cfg-options", NO_DEVICE]),
    "apart": (IMPORTED, ["--launcher=none"], ["--launcher=none"]),
    "broken": ("a = = 1\n", [], TOGETHER),
}


@pytest.mark.parametrize("case", UNDER_TORCHRUN)
def test_ikl_train_lets_ranks_on_cpus_train_together(case, two_ranks, tmp_path, monkeypatch, capsys):
    text, words, expected = UNDER_TORCHRUN[case]
    (path := tmp_path / "config.py").write_text(text)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("runpy.run_path", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", [])
    training.main([str(path), *words])
    assert sys.argv[1:] == [str(path), *expected]
    assert two_ranks == ([("gloo",)] if case not in ("apart", "broken") else [])
    # Here the names are known anyway; elsewhere a config without the import is not.
    said = capsys.readouterr().err
    assert ("names IKLHook, but does not import them" in said) is (case == "own wrapper")


@pytest.mark.parametrize("reason", ["cuda", "group", "single", "no launcher"])
def test_everything_else_is_left_alone(reason, two_ranks, monkeypatch):
    if reason == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    elif reason == "group":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif reason == "single":
        monkeypatch.setenv("WORLD_SIZE", "1")
    else:
        monkeypatch.delenv("MASTER_PORT")
    assert cpu_ranks.join() is False
    assert two_ranks == []
