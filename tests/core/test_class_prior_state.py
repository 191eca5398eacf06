"""The buffers of ClassPrior: casts, the meta device, checkpoints that are none, forward passes that are repeated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bad_priors
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ikl_plugins import ClassPrior, DKLLoss, GKLLoss, IKLLoss

DTYPES = {"matrix": torch.float32, "sums": torch.float64, "counts": torch.int64, "left_out": torch.int64}


def _network() -> nn.Module:
    """A layer, and a class prior in the middle of its second epoch."""
    network = nn.Sequential(nn.Linear(2, 4), IKLLoss(global_info=True, num_classes=4))
    network[1].class_prior.load_state_dict(bad_priors.state())
    return network


def _prior(network: nn.Module) -> ClassPrior:
    return next(part for part in network.modules() if isinstance(part, ClassPrior))


def _dtypes(prior: ClassPrior) -> dict[str, torch.dtype]:
    return {name: buffer.dtype for name, buffer in prior.named_buffers()}


# --- casts -----------------------------------------------------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda network: network.half(),
    "bfloat16": lambda network: network.bfloat16(),
    "to half": lambda network: network.to(torch.float16),
    "to a half tensor": lambda network: network.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type half": lambda network: network.type(torch.float16),
    "type integer": lambda network: network.type(torch.int32),
    "to float8": lambda network: network.to(torch.float8_e4m3fn),
    "apply": lambda network: network.apply(lambda part: part.type(torch.bfloat16)),
    "twice": lambda network: copy.deepcopy(network.half()).type(torch.float64).half().float(),
    "shared": lambda network: network.half().share_memory(),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASTS)
def test_no_cast_takes_digits(name: str) -> None:
    network = CASTS[name](_network().requires_grad_(False) if name == "type integer" else _network())
    prior, sound = _prior(network), bad_priors.state()
    assert _dtypes(prior) == DTYPES
    assert all(torch.equal(prior.state_dict()[key], value) for key, value in sound.items())
    if name == "shared":
        assert all(buffer.is_shared() for buffer in prior.buffers())
    prior.end_epoch()
    seen = sound["counts"] > 0
    means = (sound["sums"] / sound["counts"].unsqueeze(1))[seen].float()
    assert torch.equal(prior.matrix[seen], means)


def test_double_widens_the_rows_alone_and_float_narrows_them() -> None:
    prior = _prior(_network().double())
    assert _dtypes(prior) == {**DTYPES, "matrix": torch.float64}
    assert prior.half().matrix.dtype == torch.float64
    assert _dtypes(prior.float()) == DTYPES


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda network: network.to("meta"),
    "to half": lambda network: network.to(device="meta", dtype=torch.float16),
    "half there": lambda network: network.to("meta").half().type(torch.bfloat16),
    "to_empty": lambda network: network.half().to_empty(device="meta"),
}


@pytest.mark.parametrize("name", MOVES)
def test_buffers_follow_the_module_to_a_device(name: str) -> None:
    prior = _prior(_network())
    for _ in range(2):
        prior.observe(torch.eye(4), torch.arange(4))
    moved = MOVES[name](prior)
    assert moved is prior
    assert _dtypes(prior) == DTYPES
    assert {buffer.device.type for buffer in prior.buffers()} == {"meta"}
    assert prior._watch is None  # it would compare counts of two devices


def test_buffers_that_a_wrapper_has_cast_are_refused() -> None:
    prior = _prior(_network())
    for buffer in prior.buffers():  # as FSDP and DistributedDataParallel do, past every method of the module
        if buffer.is_floating_point():
            buffer.data = buffer.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"sums in float64 or float32, got torch\.bfloat16.*buffer_dtype"):
        prior.observe(torch.eye(4), torch.arange(4))


def test_a_half_precision_default_leaves_the_dtypes() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        prior = ClassPrior(3)
        prior.half()
    finally:
        torch.set_default_dtype(torch.float32)
    assert _dtypes(prior) == DTYPES
    torch.testing.assert_close(prior.matrix, torch.full((3, 3), 1 / 3), rtol=1e-7, atol=0)


# --- the meta device -------------------------------------------------------------------------------------------------

BUILT: dict[str, Callable[[], nn.Module]] = {
    "prior": lambda: ClassPrior(4),
    "IKL": lambda: IKLLoss(global_info=True, num_classes=4),
    "GKL": lambda: GKLLoss(global_info=True, num_classes=4),
    "inside": lambda: nn.Sequential(nn.Linear(4, 4), IKLLoss(global_info=True, num_classes=4)),
    "DKL": DKLLoss,
    "IKL without a prior": IKLLoss,
}


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "each part"])
def test_reset_after_meta_is_as_built(name: str, whole: bool) -> None:
    with torch.device("meta"):
        module = BUILT[name]()
    module.to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.fill_(7)  # whatever the memory held
    # FSDP resets the parts that have tensors of their own; others ask every module.
    for part in module.modules() if whole else [part for part in module.modules() if [*part.buffers(recurse=False)]]:
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    built = BUILT[name]()
    assert all(torch.equal(one, other) for one, other in zip(module.buffers(), built.buffers(), strict=True))
    assert [buffer.dtype for buffer in module.buffers()] == [buffer.dtype for buffer in built.buffers()]


def test_reset_forgets_what_was_collected() -> None:
    loss = GKLLoss(global_info=True, num_classes=4)
    for _ in range(3):
        loss(torch.randn(4, 4), torch.randn(4, 4), torch.arange(4))
    loss.end_epoch()
    loss(torch.randn(4, 4), torch.full((4, 4), torch.nan), torch.arange(4))
    loss.reset_parameters()
    assert loss.last_terms is None
    assert all(torch.equal(*pair) for pair in zip(loss.buffers(), ClassPrior(4).buffers(), strict=True))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("narrow_sums", [False, True])  # of MPS, and of the first release
def test_a_prior_made_on_meta_takes_a_checkpoint(
    assign: bool, narrow_sums: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        prior = ClassPrior(4)
    if not assign:
        prior.to_empty(device="cpu").left_out.fill_(7)  # whatever the memory held
    state = bad_priors.state()
    prior.load_state_dict({**state, "sums": state["sums"].float()} if narrow_sums else state, assign=assign)
    assert _dtypes(prior) == DTYPES
    prior.observe(torch.eye(4), torch.arange(4))
    prior.end_epoch()
    assert not caplog.records
    state = bad_priors.state()  # with `assign` the other was the prior's own
    rows = (state["sums"] + torch.eye(4)) / (state["counts"] + 1).unsqueeze(1)
    torch.testing.assert_close(prior.matrix, rows.float(), rtol=1e-6, atol=0)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True, "strict": False}], ids=str)
@pytest.mark.parametrize("name", bad_priors.BAD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_state_that_is_no_class_prior_is_refused(name: str, options: dict[str, Any]) -> None:
    entry, make = bad_priors.BAD[name]
    network = _network()
    before = {key: value.clone() for key, value in _prior(network).state_dict().items()}
    state = {f"1.class_prior.{key}": value for key, value in make().items()}
    with pytest.raises(ValueError, match=rf"ClassPrior: the class prior's `1\.class_prior\.{entry}` must .*, got .*\."):
        network.load_state_dict(state, **options)
    after = _prior(network).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_what_half_precision_has_rounded_is_a_class_prior() -> None:
    prior, other = ClassPrior(300), ClassPrior(300)
    for _ in range(5):
        prior.observe(torch.softmax(torch.randn(300, 300), 1).bfloat16(), torch.arange(300))
    other.load_state_dict(prior.state_dict())
    prior.end_epoch()
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.matrix, prior.matrix)


def test_a_checkpoint_without_a_class_prior_leaves_it_as_it_is() -> None:
    network = _network()
    before = _prior(network).matrix.clone()
    network.load_state_dict({"0.bias": torch.zeros(4)}, strict=False)
    assert torch.equal(_prior(network).matrix, before)
    with pytest.raises(RuntimeError, match=r"Missing key.*class_prior\.matrix"):
        network.load_state_dict({"0.bias": torch.zeros(4)})


# --- repeated forward passes -----------------------------------------------------------------------------------------


def _checkpointed(reentrant: bool, *, compiled: bool = False) -> Callable[..., None]:
    def run(observe: Callable[..., Tensor], logits: Tensor) -> None:
        def forward(logits: Tensor) -> Any:
            # What follows keeps torch from stopping the second pass before the batch is observed.
            return checkpoint(lambda inputs: observe(2 * inputs).square(), logits, use_reentrant=reentrant)

        torch.compiler.reset()
        (torch.compile(forward, backend="aot_eager") if compiled else forward)(logits).backward()

    return run


def _lbfgs(observe: Callable[..., Tensor], logits: Tensor) -> None:
    """As docs/losses.md shows it."""
    first = True

    def closure() -> Tensor:
        nonlocal first
        value = observe(2 * logits, observe=first)
        first = False
        value.backward()
        return value

    torch.optim.LBFGS([logits], max_iter=4).step(closure)


PASSES: dict[str, Callable[..., None]] = {
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
    "checkpoint, compiled": _checkpointed(False, compiled=True),
    "reentrant checkpoint, compiled": _checkpointed(True, compiled=True),
    "LBFGS": _lbfgs,
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::DeprecationWarning")
def test_a_batch_whose_forward_is_repeated_is_observed_once(name: str) -> None:
    """Two batches before a step, as in gradient accumulation: each counts, and once."""
    loss, expected = IKLLoss(global_info=True, num_classes=5), ClassPrior(5)
    for _ in range(2):
        teacher, targets = torch.randn(6, 5), torch.randint(5, (6,))

        def of_batch(student: Tensor, teacher: Tensor = teacher, targets: Tensor = targets, **options: Any) -> Tensor:
            value: Tensor = loss(student, teacher, targets, **options)
            return value

        PASSES[name](of_batch, torch.randn(6, 5, requires_grad=True))
        expected.observe(torch.softmax(teacher, 1), targets)
    assert torch.equal(loss.class_prior.counts, expected.counts)
    torch.testing.assert_close(loss.class_prior.sums, expected.sums)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_prior_of_its_own_observes_once_under_checkpointing(reentrant: bool) -> None:
    prior, targets = ClassPrior(5), torch.arange(5)

    def forward(logits: Tensor) -> Tensor:
        prior.observe(logits.softmax(1), targets)
        return logits.sin().sum()

    for _ in range(2):
        checkpoint(forward, torch.randn(5, 5, requires_grad=True), use_reentrant=reentrant).backward()
    assert torch.equal(prior.counts, torch.full((5,), 2))
