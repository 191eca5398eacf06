"""What criterion and forward process do on a device, shown on a CPU: no waits, and nothing lost to an overflow."""

import math

import pytest
import torch
from no_waits import NoWaits
from torch import nn

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.core.interfaces.registry import get_forward_proc_func
from torchdistill.losses.registry import get_mid_level_loss

from ikl_plugins import _value_checks
from ikl_plugins.torchdistill import adversarial_forward

PLACES = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}


def criterion(**changes):
    keywords = {**PLACES, "global_info": True, "num_classes": 5, "ce_weight": 1.0, **changes}
    loss = get_mid_level_loss({"key": "IKL", "kwargs": keywords})
    loss.begin_epoch(1, 3)
    return loss


def batch():
    return torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))


def call(loss, student, teacher, targets):
    return loss({".": {"output": student}}, {".": {"output": teacher}}, targets)


def test_a_distillation_step_does_not_wait(monkeypatch):
    loss, step = criterion(), batch()
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    with NoWaits():
        call(loss, *step).backward()
    _value_checks.read_value_checks()


def test_an_adversarial_step_does_not_wait(monkeypatch):
    key = adversarial_forward(eps="8/255", steps=2, step_size="2/255", objective="ikl", mean=[0.5] * 3, std=[0.5] * 3)
    process, loss = get_forward_proc_func(key), criterion()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    process = process.in_epoch(2, 3, loss.class_prior)
    images, labels = torch.zeros(6, 3, 4, 4), torch.randint(5, (6,))
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    with NoWaits():
        logits = process(model, images, labels)
        loss({".": {"output": logits}}, {}, labels).backward()
    _value_checks.read_value_checks()


@pytest.mark.parametrize("read", ["last batch", "next epoch"])
def test_a_bad_label_on_a_device_is_refused_by_the_end_of_the_epoch(read, monkeypatch):
    loss, (student, teacher, labels) = criterion(ce_weight=0.0), batch()
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    call(loss, student, teacher, labels + 5)
    with pytest.raises(ValueError, match=r"IKLLoss: `targets` must lie in \[0, 4\]"):  # noqa: PT012
        if read == "next epoch":
            loss.begin_epoch(2, 3)
        for _ in range(2):
            call(loss, student, teacher, labels)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_teacher_batch_that_overflowed_costs_one_step_of_the_scaler(value, caplog):
    """The prior of the next epoch is that of the finite batches."""
    loss, reference = criterion(ce_weight=0.0), criterion(ce_weight=0.0)
    weights = nn.Parameter(torch.zeros(5))
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([weights], lr=0.1)
    batches = [batch() for _ in range(3)]
    for index, (student, teacher, labels) in enumerate(batches):
        before = weights.detach().clone()
        overflowed = teacher + value if index == 1 else teacher
        optimizer.zero_grad()
        scaler.scale(call(loss, student.detach() + weights, overflowed, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights, before) == (index == 1)
        if index != 1:
            call(reference, student, teacher, labels)
    reference.begin_epoch(2, 3)
    assert torch.equal(loss.class_prior.matrix, reference.class_prior.matrix)
    loss.begin_epoch(2, 3)
    assert torch.isfinite(call(loss, *batches[0]))
    assert sum("6 predictions of this epoch were not finite" in message for message in caplog.messages) == 1
