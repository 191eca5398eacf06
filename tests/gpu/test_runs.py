"""Whole runs on the device: half precision with a scaler that meets overflows, and equal runs that are equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.gpu
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_torchdistills_criterion_trains_with_a_scaler(dtype: torch.dtype) -> None:
    """An infinite teacher batch costs one step; weights and prior stay finite, and the loss falls."""
    pytest.importorskip("torchdistill")
    from ikl_plugins.torchdistill import IKLLoss

    model, teacher = nn.Linear(16, 5), nn.Linear(16, 5).requires_grad_(False)
    criterion = IKLLoss(".", "output", ".", "output", global_info=True, num_classes=5, ce_weight=0.1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.2), torch.amp.GradScaler("cuda", init_scale=2.0**10)
    images, labels, losses, skipped = torch.randn(64, 16), torch.randint(5, (64,)), [], 0
    for epoch in (1, 2, 3):
        criterion.begin_epoch(epoch, 10)
        for step in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                natural = teacher(images) + (math.inf if (epoch, step) == (1, 4) else 0.0)
                loss = criterion({".": {"output": model(images)}}, {".": {"output": natural}}, labels)
            before = model.weight.detach().clone()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += int(torch.equal(model.weight, before))
            losses.append(loss.item())
    assert skipped == 1
    assert scaler.get_scale() == 2.0**9
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(value).all() for value in [*model.parameters(), criterion.class_prior.matrix])


def adversarial(**changes: Any) -> dict[str, Any]:
    from mmpretrain_runs import network

    attack = {"eps": "8/255", "steps": 2, "step_size": "2/255", "objective": "ikl"}
    loss = {"type": "IKLLoss", "global_info": True}
    return network(type="AdversarialClassifier", attack=attack, robust_loss=loss, **changes)


def trained(folder: Path, kind: str, *, epochs: int = 2, **settings: Any) -> Any:
    """MMEngine's runner after some epochs of a model of MMPretrain, the weights that it began with, and its scales."""
    pytest.importorskip("mmpretrain")
    from mmpretrain_runs import Record, distilled_network, runner, save_teacher

    import ikl_plugins.mmpretrain  # noqa: F401 - registers the classifiers

    with torch.device("cpu"):  # as a user's run is built; the runner moves it
        if kind == "distillation":
            model = distilled_network(save_teacher(folder / "teacher.pth"))
        else:
            model = adversarial(**({"awp": {"warmup_epochs": 0}} if kind == "weight perturbation" else {}))
        run = runner(folder, model, epochs=epochs, **settings)
        before = {name: value.detach().cpu().clone() for name, value in run.model.named_parameters()}
        scales: list[float] = []

        def note(*_: Any, **__: Any) -> None:
            if hasattr(run.optim_wrapper, "loss_scaler"):
                scales.append(run.optim_wrapper.loss_scaler.get_scale())

        run.register_hook(Record(after_train_iter=note), "LOWEST")
        run.train()
    assert next(run.model.parameters()).device.type == "cuda"
    return run.model, before, scales


KINDS = ["distillation", "adversarial", "weight perturbation"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_mmpretrain_trains_in_half_precision(kind: str, dtype: str, tmp_path: Path) -> None:
    """From a scale at which gradients overflow: it falls, and what lasts stays finite."""
    optimizer = {"type": "SGD", "lr": 0.05}
    wrapper = {"type": "AmpOptimWrapper", "dtype": dtype, "loss_scale": {"init_scale": 2.0**20}, "optimizer": optimizer}
    model, before, scales = trained(tmp_path, kind, epochs=6, optim_wrapper=wrapper)
    assert scales[-1] <= 2.0**20
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if scales[-1] == scales[-2]:  # else each step may have overflowed
        assert any(not torch.equal(value.cpu(), before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_runs_are_equal(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # this process may have used cuBLAS before the hook sets it
    try:
        first, second = (
            trained(tmp_path, kind, randomness={"seed": 0, "deterministic": True})[0].state_dict() for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
