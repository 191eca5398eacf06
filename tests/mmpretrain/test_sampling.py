"""GeneratedBatchSampler: batches counted by hand, ranks side by side, and runs of MMEngine's runner."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
import torch
from mmengine.dataset import ConcatDataset, DefaultSampler
from mmengine.runner import Runner
from mmpretrain_runs import Record, network, runner

from ikl_plugins.mmpretrain import GeneratedBatchSampler, GeneratedImages, sampling

REAL, GENERATED = 50, 30
PACK = [{"type": "PackInputs"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = numpy.random.default_rng(0)
    for name, count in (("real", REAL), ("generated", GENERATED), ("more", 12)):
        images = random.integers(256, size=(count, 8, 8, 3), dtype=numpy.uint8)
        numpy.savez(folder / f"{name}.npz", image=images, label=numpy.arange(count) % 3)
    return folder


def concatenated(files, *names, **keywords):
    parts = [GeneratedImages(files / f"{name}.npz", pipeline=PACK, **keywords) for name in names]
    return ConcatDataset(parts)


def sampler_of(dataset, batch_size=8, seed=0, epoch=0, **keywords):
    inner = DefaultSampler(dataset, shuffle=True, seed=seed)
    inner.set_epoch(epoch)
    return GeneratedBatchSampler(inner, batch_size, **{"fraction": 0.7, **keywords})


@pytest.fixture
def both(files):
    return concatenated(files, "real", "generated")


def split(batch):
    return [index for index in batch if index < REAL], [index for index in batch if index >= REAL]


# --- one rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "batch_size", "generated"),
    [
        (0.7, 8, 5),
        (0.7, 10, 7),
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.0, 8, 0),
        (0.99, 8, 7),
        (1 / 3, 9, 2),
    ],
)
def test_every_batch_has_the_fraction(both, fraction, batch_size, generated):
    sampler = sampler_of(both, batch_size, fraction=fraction)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-REAL // batch_size)
    for batch in batches:
        assert all(type(index) is int for index in batch)
        real, made = split(batch)
        assert (len(real), len(made)) == (batch_size - generated, generated)
        assert all(0 <= index < REAL + GENERATED for index in batch)


@pytest.mark.parametrize(("fraction", "epoch_size", "real"), [(0.7, 80, 30), (0.25, 100, 78)])
def test_real_images_come_again_once_all_have_come_and_generated_ones_at_any_time(both, fraction, epoch_size, real):
    """10 steps of 3 real and 5 generated images, or 13 steps of 6 and 2."""
    batches = list(sampler_of(both, 8, fraction=fraction, epoch_size=epoch_size))
    order = [index for batch in batches for index in split(batch)[0]]
    made = [index for batch in batches for index in split(batch)[1]]
    assert (len(order), len(order) + len(made)) == (real, 8 * len(batches))
    assert len(set(order[:50])) == min(real, 50)
    assert max(Counter(order[50:]).values(), default=1) == 1
    assert order[50:] != order[: max(real - 50, 0)] or real < 50
    assert fraction < 0.5 or len(set(made)) < len(made)


def test_generated_images_are_drawn_evenly_from_all_parts(files):
    dataset = concatenated(files, "real", "generated", "more")
    made = Counter(
        index for epoch in range(200) for batch in sampler_of(dataset, 10, epoch=epoch) for index in split(batch)[1]
    )
    assert sorted(made) == list(range(50, 92))
    expected = 200 * 5 * 7 / 42
    chi_squared = sum((count - expected) ** 2 / expected for count in made.values())
    assert chi_squared < 80.1  # 41 degrees of freedom: a chance of 1 in 4,000


def test_seed_and_epoch_decide(both):
    def batches(seed, epoch):
        return list(sampler_of(both, seed=seed, epoch=epoch))

    drawn = [batches(*key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert drawn == [batches(*key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(one != other for index, one in enumerate(drawn) for other in drawn[:index])


def test_global_random_numbers_have_no_part(both):
    state = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    first = list(sampler_of(both))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == numpy.random.get_state()[1].tolist()
    torch.manual_seed(99)
    numpy.random.seed(99)
    assert list(sampler_of(both)) == first


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "batch_size"), [(2, 6), (3, 4), (4, 3)])
def test_ranks_together_draw_what_one_would_and_share_it_evenly(both, monkeypatch, world, batch_size):
    whole = list(sampler_of(both, 12))
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(sampling, "get_dist_info", lambda rank=rank: (rank, world))
        ranks.append(list(sampler_of(both, batch_size)))
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(index for share in shares for index in share)
        assert {len(share) for share in shares} == {batch_size}
        counts = [len(split(share)[1]) for share in shares]
        assert max(counts) - min(counts) <= 1


# --- MMEngine's runner ------------------------------------------------------------------------------------------------


def loader_config(files, collate="default_collate", workers=0, **keywords):
    def part(name):
        return {"type": "GeneratedImages", "data_file": str(files / f"{name}.npz"), "pipeline": PACK}

    return {
        "batch_size": 8,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "dataset": {
            "type": "ConcatDataset",
            "ignore_keys": "classes",
            "datasets": [{**part("real"), "classes": ["a", "b", "c"]}, part("generated")],
        },
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "batch_sampler": {"type": "GeneratedBatchSampler", "fraction": 0.7},
        "collate_fn": {"type": collate},
        **keywords,
    }


def indices(batch):
    """Which samples a batch has, of either collation; those of the generated part counted from REAL again."""
    return [sample.sample_idx for sample in batch["data_samples"]]


@pytest.mark.parametrize("collate", ["default_collate", "pseudo_collate"])
def test_a_loader_that_the_runner_builds(files, collate):
    loader = Runner.build_dataloader(loader_config(files, collate), seed=5)
    assert isinstance(loader.batch_sampler, GeneratedBatchSampler)
    assert (len(loader), loader.batch_sampler.batch_size, loader.batch_sampler.sampler.seed) == (7, 8, 5)
    assert loader.dataset.metainfo["classes"] == ("a", "b", "c")
    batches = list(loader)
    expected = list(sampler_of(concatenated(files, "real", "generated"), seed=5))
    for batch, drawn in zip(batches, expected, strict=True):
        assert len(batch["inputs"]) == 8
        assert indices(batch) == [index % REAL if index >= REAL else index for index in drawn]
    assert isinstance(batches[0]["inputs"], torch.Tensor) == (collate == "default_collate")


def recorded(files, work_dir, epochs=3, workers=0, iterations=None, **keywords):
    """A run, and which images each of its steps had by epoch."""
    seen = {}
    if iterations is not None:
        keywords["train_cfg"] = {"by_epoch": False, "max_iters": iterations}
        keywords["default_hooks"] = {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 100}}
    run = runner(work_dir, network(), epochs=epochs, train_dataloader=loader_config(files, workers=workers), **keywords)

    def note(run, batch_idx, data_batch=None):
        seen.setdefault(run.epoch if iterations is None else run.iter // 7, []).append(indices(data_batch))

    run.register_hook(Record(before_train_iter=note))
    run.train()
    return seen, run.model.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_runner_says_which_epoch_it_is_also_when_it_goes_on(files, tmp_path, workers):
    """DistSamplerSeedHook finds the sampler behind ours, with workers that live on as well."""
    whole, weights = recorded(files, tmp_path / "whole", workers=workers)
    dataset = concatenated(files, "real", "generated")
    for epoch in range(3):
        expected = list(sampler_of(dataset, epoch=epoch))
        assert whole[epoch] == [[index % REAL if index >= REAL else index for index in batch] for batch in expected]
    path = str(tmp_path / "whole" / "epoch_1.pth")
    resumed, same = recorded(files, tmp_path / "again", workers=workers, resume=True, load_from=path)
    assert resumed == {epoch: whole[epoch] for epoch in (1, 2)}
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_an_iteration_based_run_goes_through_epochs(files, tmp_path, monkeypatch):
    monkeypatch.setattr("mmengine.runner.loops.time.sleep", lambda _: None)
    seen, _ = recorded(files, tmp_path, iterations=16)
    by_epoch, _ = recorded(files, tmp_path / "epochs")
    assert seen[0] == by_epoch[0]
    assert seen[1] == by_epoch[1]
    assert seen[2] == by_epoch[2][:2]
