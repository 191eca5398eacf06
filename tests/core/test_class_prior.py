"""ClassPrior: what it collects, when it serves it, how it survives checkpoints, copies, devices and ranks."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ikl_plugins import ClassPrior


def _batch(samples: int, classes: int, *places: int) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(torch.randn(samples, classes, *places, dtype=torch.float64), 1).float()
    return probabilities, torch.randint(classes, (samples, *places))


def _mean_of_each_class(batches: list[tuple[Tensor, Tensor]], before: Tensor) -> Tensor:
    """The definition, one prediction at a time, in float64."""
    classes = len(before)
    rows = [[0.0] * classes for _ in range(classes)]
    counts = [0] * classes
    for probabilities, targets in batches:
        flat = probabilities.double().movedim(1, -1).reshape(-1, classes).tolist()
        for row, label in zip(flat, targets.reshape(-1).tolist(), strict=True):
            counts[label] += 1
            rows[label] = [total + entry for total, entry in zip(rows[label], row, strict=True)]
    means = [
        [total / counts[label] for total in rows[label]] if counts[label] else before[label].tolist()
        for label in range(classes)
    ]
    return torch.tensor(means, dtype=torch.float64)


def _filled(classes: int = 4) -> ClassPrior:
    """A prior in the middle of its second epoch."""
    prior = ClassPrior(classes)
    prior.observe(*_batch(50, classes))
    prior.end_epoch()
    prior.observe(*_batch(7, classes))
    return prior


def _same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# --- collecting and serving ------------------------------------------------------------------------------------------


def test_rows_are_uniform_until_an_epoch_has_ended() -> None:
    prior = ClassPrior(4)
    assert torch.equal(prior.prior(torch.tensor([3, 0])), torch.full((2, 4), 0.25))
    prior.observe(*_batch(20, 4))
    assert torch.equal(prior.prior(torch.tensor([3, 0])), torch.full((2, 4), 0.25))


@pytest.mark.parametrize("places", [(), (3,), (2, 3)], ids=str)
def test_an_epoch_gives_the_mean_of_each_class(places: tuple[int, ...]) -> None:
    prior = ClassPrior(5)
    batches = [_batch(samples, 5, *places) for samples in (8, 1, 30)]
    for batch in batches:
        prior.observe(*batch)
    prior.end_epoch()
    expected = _mean_of_each_class(batches, torch.full((5, 5), 0.2))
    torch.testing.assert_close(prior.matrix.double(), expected, rtol=1e-6, atol=1e-7)
    targets = torch.randint(5, (4, *places))
    rows = prior.prior(targets)
    assert rows.shape == (4, 5, *places)
    torch.testing.assert_close(rows.movedim(1, -1), prior.matrix[targets])
    torch.testing.assert_close(rows.sum(1), torch.ones(4, *places))


def test_the_next_epoch_starts_from_nothing() -> None:
    prior = _filled()
    prior.end_epoch()
    batches = [_batch(40, 4)]
    before = prior.matrix.clone()
    prior.observe(*batches[0])
    torch.testing.assert_close(prior.matrix, before, rtol=0, atol=0)
    prior.end_epoch()
    torch.testing.assert_close(prior.matrix.double(), _mean_of_each_class(batches, before), rtol=1e-6, atol=1e-7)


def test_a_class_that_does_not_occur_keeps_its_row() -> None:
    prior = ClassPrior(3)
    prior.observe(torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    prior.end_epoch()
    assert torch.equal(prior.matrix, torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [1 / 3] * 3]))
    prior.observe(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([2]))
    prior.end_epoch()
    assert torch.equal(prior.matrix, torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    prior.end_epoch()  # an epoch without a batch changes nothing
    assert torch.equal(prior.matrix, torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_rows_served_earlier_do_not_change_with_the_epoch() -> None:
    prior = _filled()
    rows = prior.prior(torch.tensor([0, 1]))
    kept = rows.clone()
    prior.end_epoch()
    assert torch.equal(rows, kept)
    assert not torch.equal(prior.prior(torch.tensor([0, 1])), kept)


def test_nothing_carries_gradient() -> None:
    prior = ClassPrior(3)
    logits = torch.randn(6, 3, requires_grad=True)
    prior.observe(logits.softmax(1), torch.tensor([0, 1, 2, 0, 1, 2]))
    prior.end_epoch()
    assert not prior.prior(torch.tensor([0])).requires_grad
    assert list(prior.parameters()) == []


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_every_integer_dtype(dtype: torch.dtype) -> None:
    prior, other = ClassPrior(4), ClassPrior(4)
    probabilities, targets = _batch(20, 4)
    prior.observe(probabilities, targets.to(dtype))
    other.observe(probabilities, targets)
    prior.end_epoch()
    other.end_epoch()
    assert torch.equal(prior.matrix, other.matrix)
    assert torch.equal(prior.prior(targets.to(dtype)), other.prior(targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_predictions_of_every_floating_dtype(dtype: torch.dtype) -> None:
    prior = ClassPrior(4)
    probabilities, targets = _batch(20, 4)
    prior.observe(probabilities.to(dtype), targets)
    prior.end_epoch()
    assert prior.matrix.dtype == torch.float32
    expected = _mean_of_each_class([(probabilities.to(dtype), targets)], torch.full((4, 4), 0.25))
    torch.testing.assert_close(prior.matrix.double(), expected, rtol=1e-6, atol=1e-7)


def test_an_empty_batch_adds_nothing() -> None:
    prior = _filled()
    before = copy.deepcopy(prior)
    prior.observe(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert _same(prior, before)
    assert prior.prior(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


# --- state -----------------------------------------------------------------------------------------------------------


def test_the_state_holds_the_prior_and_the_running_sums() -> None:
    assert {name: tuple(tensor.shape) for name, tensor in ClassPrior(4).state_dict().items()} == {
        "matrix": (4, 4),
        "sums": (4, 4),
        "counts": (4,),
    }


def test_a_resumed_epoch_ends_like_an_uninterrupted_one() -> None:
    uninterrupted = _filled()
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    file.seek(0)
    resumed = ClassPrior(4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert _same(resumed, uninterrupted)
    batch = _batch(9, 4)
    for prior in (uninterrupted, resumed):
        prior.observe(*batch)
        prior.end_epoch()
    assert _same(resumed, uninterrupted)


def test_the_state_dict_goes_on_seeing_the_current_values() -> None:
    prior = _filled()
    state = prior.state_dict()
    prior.end_epoch()
    prior.observe(*_batch(9, 4))
    assert all(torch.equal(state[name], tensor) for name, tensor in prior.state_dict().items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda prior: pickle.loads(pickle.dumps(prior))])  # noqa: S301
def test_copies_are_equal_and_independent(duplicate: object) -> None:
    prior = _filled()
    for _ in range(200):  # what watches for epochs is no part of a copy: of 20,000 batches it would take 50 GB
        prior.observe(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert len(pickle.dumps(prior)) < 10_000
    twin = duplicate(prior)  # type: ignore[operator]
    assert _same(prior, twin)
    assert twin.num_classes == 4
    twin.observe(*_batch(5, 4))
    twin.end_epoch()
    assert not torch.equal(prior.matrix, twin.matrix)
    assert prior.counts.sum() == 7


def test_a_module_saved_whole_before_it_counted_what_is_left_out_still_works() -> None:
    old = ClassPrior(3)
    old.observe(torch.eye(3), torch.arange(3))
    del old._passed, old._buffers["left_out"]
    old._non_persistent_buffers_set.clear()
    prior = pickle.loads(pickle.dumps(old))  # noqa: S301
    prior.check_matrix("test")
    prior.end_epoch()
    assert torch.equal(prior.matrix, torch.eye(3))
    assert list(prior.state_dict()) == ["matrix", "sums", "counts"]


def test_a_copy_is_checked_anew() -> None:
    prior = ClassPrior(3)
    prior.check_matrix("test")
    assert copy.deepcopy(prior)._passed is None


def test_sums_of_a_long_epoch_keep_their_digits() -> None:
    """Two million places of a dense task. Added one by one in float32, a class's sum stops growing as it should."""
    prior = ClassPrior(2)
    row = torch.tensor([[0.1, 0.9]])
    for _ in range(20):
        prior.observe(row[:, :, None].expand(1, 2, 100_000), torch.zeros(1, 100_000, dtype=torch.int64))
    prior.end_epoch()
    torch.testing.assert_close(prior.matrix[0], row[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("classes", "side", "least"), [(2, 6, 5), (5, 5, 1), (7, 3, 1)])
def test_entropy_and_picture_by_their_formulas(classes: int, side: int, least: int) -> None:
    prior = _filled(classes)
    rows = prior.matrix.double().tolist()
    expected = -sum(p * math.log(p) for row in rows for p in row if p) / classes
    assert prior.entropy().item() == pytest.approx(expected, rel=1e-5)
    assert ClassPrior(classes).entropy().item() == pytest.approx(math.log(classes), rel=1e-5)
    picture = prior.picture(least=least, most=3 if classes == 7 else 16)
    assert (picture.dtype, picture.shape) == (torch.uint8, (side, side))
    if classes == 7:  # the means of neighbours: 7 classes in 3 overlapping blocks of 3
        blocks = [range(3), range(2, 5), range(4, 7)]
        wanted = [[sum(rows[j][k] for j in a for k in b) / 9 for b in blocks] for a in blocks]
    else:
        wanted = [[rows[j * classes // side][k * classes // side] for k in range(side)] for j in range(side)]
    for row, own in zip(picture.tolist(), wanted, strict=True):
        assert row == pytest.approx([255 * math.sqrt(p) for p in own], abs=1)


def test_repr_names_the_class_count() -> None:
    assert repr(ClassPrior(7)) == "ClassPrior(num_classes=7)"


# --- ranks -----------------------------------------------------------------------------------------------------------

RANK = """
import sys
import torch, torch.distributed as dist
from ikl_plugins import ClassPrior
rank, store, data, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
prior = ClassPrior(5)
for epoch in torch.load(data, weights_only=True):
    for probabilities, targets in epoch[rank]:
        prior.observe(probabilities, targets)
    prior.end_epoch()
torch.save(prior.state_dict(), f"{out}{rank}")

# Rank 0 alone ends an epoch while rank 1 is elsewhere; later both meet.
refusal, prior.rank_timeout = "", 0.5
if rank == 0:
    try:
        prior.end_epoch()
    except RuntimeError as error:
        refusal = str(error)
dist.barrier()
prior.observe(torch.eye(5)[rank:rank + 1], torch.tensor([4]))
prior.end_epoch()

# DistributedDataParallel around the prior, which by default overwrites the buffers of rank 1 before each batch.
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.prior, self.said = torch.nn.Linear(5, 5), ClassPrior(5), ""

    def forward(self, x):
        logits = self.layer(x)
        try:
            self.prior.observe(logits.softmax(1), torch.arange(len(x)) + rank)
        except ValueError as error:  # both ranks go on: gloo may abort one whose peer leaves
            self.said = str(error)
        return logits.sum()

torch.manual_seed(rank)
said = []
for options in ({"broadcast_buffers": False}, {}):
    net = torch.nn.parallel.DistributedDataParallel(Net(), **options)
    for _ in range(3):
        net(torch.randn(4, 5)).backward()
    said.append(net.module.said)
assert said[0] == ""
torch.save((refusal, prior.matrix[4], said[1]), f"{out}{rank}_messages")
dist.destroy_process_group()
"""


def test_two_ranks_give_the_prior_of_one(tmp_path: Path) -> None:
    """Two epochs; the ranks see different classes, different numbers of batches, and class 4 only rank 1 in epoch 0."""
    epochs = []
    for epoch in range(2):
        zero = [(torch.softmax(torch.randn(8, 5), 1), torch.randint(3, (8,))) for _ in range(3)]
        one = [(torch.softmax(torch.randn(5, 5), 1), torch.randint(1, 5 - epoch, (5,)))]
        epochs.append([zero, one])
    torch.save(epochs, tmp_path / "data")
    command = [sys.executable, "-c", RANK]
    paths = [str(tmp_path / name) for name in ("store", "data", "rank")]
    ranks = [
        subprocess.Popen([*command, str(rank), *paths], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs

    alone = ClassPrior(5)
    matrix = torch.full((5, 5), 0.2)
    for epoch in epochs:
        batches = [batch for rank in epoch for batch in rank]
        for batch in batches:
            alone.observe(*batch)
        alone.end_epoch()
        matrix = _mean_of_each_class(batches, matrix)
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        torch.testing.assert_close(state["matrix"], alone.matrix, rtol=0, atol=1e-6)
        torch.testing.assert_close(state["matrix"].double(), matrix, rtol=0, atol=1e-6)
        assert torch.count_nonzero(state["sums"]) == torch.count_nonzero(state["counts"]) == 0

    ended, overwritten = zip(
        *((state[0], state[2]) for rank in range(2) if (state := torch.load(tmp_path / f"rank{rank}_messages"))),
        strict=True,
    )
    assert re.match(r"ClassPrior\.end_epoch: all 2 ranks must call it, but within 0\.5 s rank 1 did not", ended[0])
    assert ended[1] == ""
    row = torch.load(tmp_path / "rank0_messages")[1]
    torch.testing.assert_close(row, torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]))
    # Rank 0 sees its own sums; it hears of the other's end.
    assert re.search(r"running sums must be each rank's own.*broadcast_buffers=False", overwritten[1])


# --- epochs that nobody ends -----------------------------------------------------------------------------------------


def _passes(labels: Tensor, batch_size: int, passes: int, *, drop_last: bool = False) -> Iterator[Tensor]:
    loader = DataLoader(TensorDataset(labels), batch_size, shuffle=True, drop_last=drop_last)
    for _ in range(passes):
        yield from (batch for (batch,) in loader)


def _cycle(*batches: list[int]) -> Iterator[Tensor]:
    return (torch.tensor(batch) for _ in range(300) for batch in batches)


def _in_turn(batch_size: int, each: int = 1) -> Iterator[Tensor]:
    """What a class-balanced sampler draws: all classes in a new order again and again, ``each`` samples of one."""
    labels = torch.cat([torch.randperm(10).repeat_interleave(each) for _ in range(600)])
    return iter(labels.split(batch_size))


RANDOM = torch.randint(10, (20_000,), generator=torch.Generator().manual_seed(1))
SORTED = RANDOM.sort().values
FEW = RANDOM[:90] % 3
# Label streams: of several passes over the same data, and of what looks like it and is none.
STREAMS: dict[str, tuple[Callable[[], Iterator[Tensor]], int | None]] = {
    "two passes and a bit": (lambda: _passes(RANDOM[:1437], 64, 3), 23),
    "batches that divide the data": (lambda: _passes(RANDOM[:640], 64, 3), 10),
    "dropped last batches": (lambda: _passes(RANDOM[:5000], 64, 6, drop_last=True), 78),
    "three classes": (lambda: _passes(FEW, 8, 12), 12),
    "single samples": (lambda: _passes(RANDOM[:100], 1, 4), 100),
    "one long epoch": (lambda: _passes(RANDOM, 16, 1), None),
    "one sorted epoch": (lambda: iter(SORTED.split(16)), None),
    "random draws": (lambda: (RANDOM[torch.randint(20_000, (16,))] for _ in range(1500)), None),
    "two classes of random draws": (lambda: (torch.randint(2, (8,)) for _ in range(1500)), None),
    "the same classes in every batch": (lambda: (torch.randperm(10) for _ in range(300)), None),
    "the same batch again and again": (lambda: _cycle([0, 1, 1, 4]), None),
    "each class in turn": (lambda: _in_turn(5), None),
    "each class in turn, several times a batch": (lambda: _in_turn(32), None),
    "a few of each class in turn": (lambda: _in_turn(20, each=4), None),
    "one class": (lambda: _cycle([0] * 8), None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_an_epoch_that_nobody_ends_is_warned_about_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    stream, length = STREAMS[name]
    prior = ClassPrior(3 if name == "three classes" else 2 if name.startswith("two classes") else 10)
    for labels in stream():
        prior.observe(torch.full((len(labels), prior.num_classes), 1 / prior.num_classes), labels)
    said = [record.getMessage() for record in caplog.records]
    if length is None:
        assert said == []
    else:
        assert len(said) == 1
        near = int(re.search(r"come again every (\d+) batches, but `end_epoch\(\)` was never called", said[0])[1])  # type: ignore[index]
        assert abs(near - length) <= 0.05 * length


@pytest.mark.parametrize("ended", [True, False])
def test_whoever_ends_epochs_hears_nothing(ended: bool, caplog: pytest.LogCaptureFixture) -> None:
    prior = ClassPrior(10)
    prior.watches_epochs = ended  # what the adapters turn off
    for epoch in range(6):
        for labels in _passes(RANDOM[:640], 64, 1):
            prior.observe(torch.full((len(labels), 10), 0.1), labels)
        if ended and epoch == 0:
            prior.end_epoch()
    assert caplog.records == []


def test_a_group_of_one_rank_changes_nothing() -> None:
    prior = _filled()
    twin = copy.deepcopy(prior)
    prior.end_epoch()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        twin.end_epoch()
    finally:
        torch.distributed.destroy_process_group()
    assert _same(prior, twin)
