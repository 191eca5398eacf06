"""On a device no step waits for a value, and what a check finds there is not lost."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from no_waits import NoWaits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ikl_plugins import ClassPrior, DKLLoss, GKLLoss, IKLLoss, _value_checks, ikl_loss, read_value_checks
from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation, PixelSpace


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU treated as a device: its values are looked at later."""
    monkeypatch.setattr(_value_checks, "on_host", lambda number: False)
    yield
    _value_checks.take_findings()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(6, 5, requires_grad=True), torch.ones(6, 5), torch.full((6,), 2)


def losses() -> Iterator[Tensor]:
    for make in (DKLLoss, IKLLoss, GKLLoss):
        yield make(check_finite=True)(*batch())
    for loss in (IKLLoss(global_info=True, num_classes=5), GKLLoss(gamma=0.5, global_info=True, num_classes=5)):
        for _ in range(2):
            yield loss(*batch())
    student, teacher, labels = batch()
    prior = ClassPrior(5)
    prior.observe(teacher.softmax(1), labels)
    yield ikl_loss(student, teacher, class_prior=prior.prior(labels))


def test_no_loss_waits(device: None) -> None:
    with NoWaits():
        for loss in losses():
            loss.backward()
    read_value_checks()


def test_losses_run_on_fake_cuda() -> None:
    """A fake tensor has no value to wait for, and refuses operands of two devices."""
    if torch.version.cuda is not None and not torch.cuda.is_available() and torch.__version__ < "2.6":
        pytest.skip("this release asks for a driver even where tensors are fake")
    with FakeTensorMode(), torch.device("cuda"):
        for loss in losses():
            assert loss.device.type == "cuda"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin", "soft_cross_entropy", "ikl"])
def test_no_attack_waits(device: None, objective: str, norm: str) -> None:
    attack = PGD(eps=0.1, steps=2, step_size=0.05, objective=objective, norm=norm)
    space = PixelSpace([0.5] * 3, [0.5] * 3)
    with NoWaits():
        model, images = network(), space.to_pixels(torch.zeros(6, 3, 8, 8))
        prior = torch.full((6, 5), 0.2) if attack.uses_prior else None
        space.to_inputs(attack(model, images, labels=torch.full((6,), 2), class_prior=prior))
    read_value_checks()


def test_weight_perturbation_does_not_wait(device: None) -> None:
    with NoWaits():
        model, images = network(), torch.full((6, 3, 8, 8), 0.5)
        with AdversarialWeightPerturbation(gamma=0.01).perturbed(model, model(images).sum()):
            model(images).sum().backward()


def test_the_watch_of_epochs_does_not_wait(device: None, caplog: pytest.LogCaptureFixture) -> None:
    prior, labels = ClassPrior(10), torch.randint(10, (640,), generator=torch.Generator().manual_seed(0))
    with NoWaits():
        for part in 4 * labels.split(64):
            prior.observe(torch.full((64, 10), 0.1), part)
    assert caplog.records == []
    read_value_checks()
    assert [record.args for record in caplog.records] == [(10,)]


def test_the_guard_itself_refuses() -> None:
    with NoWaits(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "label too large": (
        lambda: IKLLoss(global_info=True, num_classes=5)(*batch()[:2], torch.tensor([0, 1, 2, 3, 4, 5])),
        "IKLLoss: `targets` must lie in [0, 4], got values from 0 to 5",
    ),
    "label below 0": (
        lambda: ClassPrior(5).observe(torch.full((2, 5), 0.2), torch.tensor([-1, 0])),
        "ClassPrior.observe: `targets` must lie in [0, 4], got values from -1 to 0",
    ),
    "prior": (
        lambda: ikl_loss(*batch()[:2], class_prior=torch.full((6, 5), -1.0)),
        "`class_prior` must hold finite weights of at least 0, got values from -1.0",
    ),
    "logits": (
        lambda: ikl_loss(torch.zeros(2, 3), torch.tensor([[0, 0, 0], [0, math.nan, 0]]), check_finite=True),
        "`teacher_logits` must be finite with check_finite=True, but 1 of 6 are not, the first at index (1, 1)",
    ),
    "images": (
        lambda: PGD(eps=0.1, steps=1, step_size=0.1)(
            network(), torch.full((1, 3, 8, 8), 2.0), labels=torch.tensor([0])
        ),
        "PGD: `images` must lie in [0, 1], got values from 2 to 2",
    ),
    "attacked label": (
        lambda: PGD(eps=0.1, steps=1, step_size=0.1)(network(), torch.ones(1, 3, 8, 8), labels=torch.tensor([5])),
        "PGD: `labels` must lie in [0, 4], got values from 5 to 5",
    ),
    "objective": (
        lambda: PGD(eps=0.1, steps=1, step_size=0.1)(
            network().apply(lambda part: nn.init.constant_(part.bias, math.nan) if hasattr(part, "bias") else None),
            torch.ones(1, 3, 8, 8),
            labels=torch.tensor([0]),
        ),
        "PGD: objective 'cross_entropy' and its gradient must stay finite, got the value nan",
    ),
    "pixels": (
        lambda: PixelSpace(caller="Somebody").to_pixels(torch.full((1, 3, 2, 2), 3.0)),
        "Somebody: images must lie in [0, 1], got values from 3 to 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_was_found_is_read_later(device: None, case: str) -> None:
    call, fragment = BAD[case]
    call()
    with pytest.raises(ValueError, match=re.escape(fragment) + ".*Batch [0-9]+ of this check on cpu"):
        read_value_checks()
    read_value_checks()  # once


@pytest.mark.parametrize("case", BAD)
def test_the_variable_stops_at_once(device: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IKL_PLUGINS_CHECKS", "immediate")
    call, fragment = BAD[case]
    with pytest.raises(ValueError, match=re.escape(fragment)):
        call()


def test_an_unknown_mode_is_refused(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IKL_PLUGINS_CHECKS", "never")
    with pytest.raises(ValueError, match="must be one of 'deferred', 'immediate', got 'never'"):
        ClassPrior(5).prior(torch.tensor([0]))


def test_the_message_names_the_batch_and_how_many_failed(device: None) -> None:
    prior = ClassPrior(5)
    prior.prior(torch.tensor([4]))
    before = _value_checks._calls["ClassPrior.prior", "targets"]
    prior.prior(torch.tensor([5]))
    prior.prior(torch.tensor([6]))
    with pytest.raises(ValueError, match=rf"from 5 to 5\..*Batch {before + 1} .*1 later checks failed as well"):
        read_value_checks()


def test_enough_findings_are_read_without_being_asked(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_value_checks, "_READ_EVERY", 3)
    prior = ClassPrior(5)
    prior.prior(torch.tensor([5]))
    prior.prior(torch.tensor([0]))
    with pytest.raises(ValueError, match="from 5 to 5"):
        prior.prior(torch.tensor([1]))


def test_the_end_of_an_epoch_reads(device: None) -> None:
    prior = ClassPrior(5)
    prior.prior(torch.tensor([5]))
    with pytest.raises(ValueError, match=r"from 5 to 5\..* at once\.\)$"):
        prior.end_epoch()


def test_the_labels_of_a_batch_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the attack, the prior of its objective, the loss and its prior; a changed tensor is another one."""
    looks = []
    original = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda values: looks.append(values.shape) or original(values))
    loss, labels = IKLLoss(global_info=True, num_classes=5), torch.full((6,), 2)
    model, images = network(), torch.full((6, 3, 8, 8), 0.5)

    def train() -> None:
        attack = PGD(eps=0.1, steps=2, step_size=0.05)
        adversarial = attack(model, images, labels=labels)
        assert loss.class_prior is not None
        loss.class_prior.prior(labels)
        loss(model(adversarial), model(images), labels)

    train()
    assert looks == [images.shape, labels.shape, (5, 5)]  # and the matrix of the prior, until it changes
    looks.clear()
    labels += 1
    train()
    assert looks == [images.shape, labels.shape]
    looks.clear()
    loss.end_epoch()
    train()
    assert looks == [images.shape, (5, 5)]
    labels += 7
    with pytest.raises(ValueError, match="got values from 10 to 10"):
        train()


def test_a_recorded_step_keeps_bad_labels(device: None) -> None:
    """Nobody reads a finding there, so that the nearest class must not stand for them."""
    loss = IKLLoss(global_info=True, num_classes=5)
    step = torch.compile(loss, backend="eager")
    with pytest.raises(IndexError, match="index 7 is out of bounds"):
        step(*batch()[:2], torch.full((6,), 7))


def test_findings_need_no_wide_numbers(device: None) -> None:
    """Not every device has float64, and float32 would round large integers."""

    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            assert not isinstance(result, Tensor) or result.dtype is not torch.float64
            return result

    large = 2**24 + 1
    numbers = [(torch.tensor(large), torch.tensor(0.5)), (torch.tensor(7, dtype=torch.int32),)]
    with NoDoubles():
        assert _value_checks.host_numbers(numbers) == [[large, 0.5], [7]]


def test_findings_of_several_threads_are_read_once_each(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(list):  # type: ignore[type-arg]
        def copy(self) -> list[Any]:
            taken = super().copy()
            time.sleep(1e-4)
            return taken

    prior, read = ClassPrior(5), []
    monkeypatch.setattr(_value_checks, "_READ_EVERY", 10_000)
    monkeypatch.setattr(_value_checks, "_findings", Slow())

    def work() -> None:
        for _ in range(200):
            prior.prior(torch.tensor([0]))
            read.extend(_value_checks.take_findings())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read += _value_checks.take_findings()
    assert len(read) == len(set(map(id, read))) == 800


# --- predictions that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("places", [(), (3,)])
def test_a_batch_that_overflowed_leaves_the_prior_finite(
    bad: float, places: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """The prior is that of the finite predictions alone, and the end of the epoch says how many were left out."""
    torch.manual_seed(0)
    with_bad, without = (IKLLoss(global_info=True, num_classes=4) for _ in range(2))
    logits, labels = torch.randn(8, 4, *places), torch.randint(4, (8, *places))
    without(logits, logits, labels)
    overflowed = logits.clone()
    overflowed[:, 1] = bad
    with_bad(logits, logits, labels)
    with_bad(logits, overflowed, labels)
    expected = 0
    if bad == -math.inf:  # a probability of 0, and finite
        without(logits, overflowed, labels)
    else:
        expected = labels.numel()
    for loss in (with_bad, without):
        loss.end_epoch()
    assert with_bad.class_prior is not None
    assert without.class_prior is not None
    assert torch.isfinite(with_bad.class_prior.matrix).all()
    assert torch.equal(with_bad.class_prior.matrix, without.class_prior.matrix)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (1 if expected else 0)
    assert not expected or f"ClassPrior: {expected} predictions" in said[0]
    with_bad(logits, logits, labels)
    with_bad.end_epoch()
    assert len(caplog.records) == len(said)  # counted anew in each epoch


def test_one_bad_row_of_a_batch_is_left_out() -> None:
    prior, other = ClassPrior(2), ClassPrior(2)
    rows, labels = torch.tensor([[0.25, 0.75], [math.nan, 0.5], [1.0, 0.0]]), torch.tensor([0, 0, 0])
    prior.observe(rows, labels)
    other.observe(rows[[0, 2]], labels[[0, 2]])
    assert torch.equal(prior.sums, other.sums)
    assert torch.equal(prior.counts, other.counts)
