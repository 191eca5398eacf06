"""Attack and weight perturbation in half precision: small gradients are not lost, overflows do no harm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ikl_plugins.adversarial import PGD, AdversarialWeightPerturbation, attack


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)).eval()


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The pixel gradients of each step."""
    seen: list[Tensor] = []
    step = PGD._step

    def noting(self: PGD, adversarial: Tensor, gradient: Tensor, *rest: object) -> Tensor:
        seen.append(gradient)
        return step(self, adversarial, gradient, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PGD, "_step", noting)
    return seen


def run(dtype: torch.dtype | None, objective: str = "soft_cross_entropy", **settings: object) -> Tensor:
    model = network()
    torch.manual_seed(1)
    images = torch.rand(8, 3, 16, 16)
    pgd = PGD(eps="8/255", steps=3, step_size="2/255", random_start="normal", objective=objective, **settings)  # type: ignore[arg-type]
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return pgd(model, images, labels=torch.zeros(8, dtype=torch.long))


def zeros(gradients: list[Tensor]) -> float:
    return max((gradient == 0).float().mean().item() for gradient in gradients)


@pytest.mark.parametrize("objective", ["soft_cross_entropy", "ikl", "cross_entropy"])
def test_float16_keeps_the_gradients_that_float32_has(
    objective: str, gradients: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(None, objective)
    assert zeros(gradients) == 0
    gradients.clear()
    run(torch.float16, objective)
    assert zeros(gradients) < 0.02
    if objective == "cross_entropy":  # whose gradients are not so small
        return
    gradients.clear()
    monkeypatch.setattr(attack, "_FIRST_SCALE", 1.0)
    run(torch.float16, objective)
    assert zeros(gradients) > 0.1  # so the network is one that shows it


def test_autocast_inside_the_model_is_float16_too(gradients: list[Tensor]) -> None:
    model = network()

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(images)  # type: ignore[no-any-return]

    pgd = PGD(eps="8/255", steps=3, step_size="2/255", random_start="normal", objective="soft_cross_entropy")
    pgd(model, torch.rand(8, 3, 16, 16), forward=forward)
    assert zeros(gradients) < 0.02


def test_a_device_without_autocast_is_not_asked_for_it() -> None:
    """MPS in older releases of torch is one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to("meta")
    images = torch.empty(4, 3, 2, 2, device="meta")
    pgd = PGD(eps=0.1, steps=2, step_size=0.1)
    assert pgd(model, images, labels=torch.empty(4, dtype=torch.long, device="meta")).shape == images.shape


def test_bfloat16_is_not_scaled(gradients: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    run(torch.bfloat16)
    expected = [gradient.clone() for gradient in gradients]
    gradients.clear()
    monkeypatch.setattr(attack, "_FIRST_SCALE", 2.0)
    run(torch.bfloat16)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_scale_that_overflows_is_lowered(norm: str, gradients: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a factor with which the first gradient overflows; the later ones are those of a factor that fits."""
    monkeypatch.setattr(attack, "_FIRST_SCALE", 2.0**40)
    monkeypatch.setattr(attack, "_LOWER_SCALE", 2.0**-28)
    adversarial = run(torch.float16, norm=norm)
    assert torch.isfinite(adversarial).all()
    assert zeros(gradients[:1]) > 0.1
    assert zeros(gradients[1:]) < 0.02
    assert max(gradient.abs().max() for gradient in gradients[1:]) < 100


def test_a_network_that_overflows_is_still_refused() -> None:
    model = network()
    nn.init.constant_(model[-1].bias, math.inf)
    pgd = PGD(eps="8/255", steps=2, step_size="2/255")
    images = torch.rand(2, 3, 16, 16)
    with torch.autocast(images.device.type, torch.float16), pytest.raises(ValueError, match="must stay finite"):
        pgd(model, images, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_gradient_that_never_is_finite_is_refused_though_the_value_is(steps: int) -> None:
    """Of few steps the last one is not scaled up where the one before it overflowed: it is then the network's fault."""

    def forward(images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :3]
        return logits + (logits - logits).abs().sqrt()

    pgd = PGD(eps="8/255", steps=steps, step_size="2/255")
    with pytest.raises(ValueError, match="must stay finite"):
        pgd(nn.Identity(), torch.rand(2, 3, 4, 4).half(), forward=forward, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_overflowed_perturbs_nothing(bad: float) -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(4, 3, 16, 16)
    one = torch.tensor([1])
    handle = model[3].weight.register_hook(lambda gradient: gradient.index_fill(0, one, bad))
    awp = AdversarialWeightPerturbation(gamma=0.1)
    loss = model.eval()(images).square().sum()
    with awp.perturbed(model, loss):
        handle.remove()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        model.train()(images).sum().backward()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    with awp.perturbed(model, model(images).square().sum()):  # and the next step is perturbed again
        assert not torch.equal(model[3].weight, before["3.weight"])


def test_weights_may_lie_on_several_devices() -> None:
    with FakeTensorMode():
        weights = [torch.zeros(2, 3, device=device) for device in ("cpu", "cuda", "cpu")]
        awp = AdversarialWeightPerturbation(gamma=0.1)
        awp._move(weights, [torch.ones_like(weight) for weight in weights])
        awp.restore()
    assert [weight.device.type for weight in weights] == ["cpu", "cuda", "cpu"]


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("kind", ["wrapper", "wrapper with flat parameters", "composable"])
def test_sharded_weights_are_refused(kind: str) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        if kind == "composable":
            shard = getattr(fsdp, "fully_shard", None) or pytest.skip("this torch has no fully_shard")
            shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        else:
            options = {"use_orig_params": kind == "wrapper", "device_id": torch.device("cpu")}
            model = fsdp.FullyShardedDataParallel(model, **options)
        loss = model(torch.ones(1, 4)).sum()
        with pytest.raises(ValueError, match="whole weights, got one sharded by FSDP"):
            AdversarialWeightPerturbation(gamma=0.1).perturb(model, loss)
    finally:
        torch.distributed.destroy_process_group()
