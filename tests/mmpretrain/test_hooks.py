"""IKLHook: epochs, class priors, random numbers and checkpoints of real, small runs."""

import os
import random
import shutil

import numpy
import pytest
import torch
from mmengine.dataset import InfiniteSampler, pseudo_collate
from mmengine.hooks import CheckpointHook, EMAHook, SyncBuffersHook
from mmengine.runner import loops
from mmengine.runner.priority import get_priority
from mmpretrain.registry import MODELS
from mmpretrain_runs import Record, distilled_network, loader, network, runner, save_teacher
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ikl_plugins.mmengine import hooks
from ikl_plugins.mmpretrain import DistillationClassifier, IKLHook

PRIOR = "distill_loss.class_prior"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def run_of(teacher, work_dir, **keywords):
    return runner(work_dir, distilled_network(teacher), **keywords)


def prior_of(model):
    return model.distill_loss.class_prior


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def expected_prior(model, data, temperature=1.0):
    """Mean prediction of the teacher by class, written as loops."""
    classes = 3
    sums = torch.zeros(classes, classes, dtype=torch.float64)
    counts = [0] * classes
    for sample in data:
        batch = model.data_preprocessor({"inputs": [sample["inputs"]], "data_samples": None})
        label = int(sample["data_samples"].gt_label)
        with torch.no_grad():
            sums[label] += torch.softmax(model.teacher(batch["inputs"])[0].double() / temperature, 0)
        counts[label] += 1
    return torch.stack([row / count for row, count in zip(sums, counts, strict=True)])


# --- epochs and priors -----------------------------------------------------------------------------------------------


def test_the_classifier_hears_each_epoch(teacher, tmp_path, monkeypatch):
    calls = []
    for name in ("attach", "begin_epoch", "end_iteration", "end_epoch"):
        inner = getattr(DistillationClassifier, name)

        def outer(self, *args, _name=name, _inner=inner):
            calls.append((_name, *(args if _name == "begin_epoch" else ())))
            return _inner(self, *args)

        monkeypatch.setattr(DistillationClassifier, name, outer)
    run_of(teacher, tmp_path).train()
    epoch = ["end_iteration"] * 3
    names = [call[0] for call in calls]
    assert names == ["attach", *["begin_epoch", *epoch, "end_epoch"] * 2]
    assert [call[1:] for call in calls if call[0] == "begin_epoch"] == [(1, 2), (2, 2)]


def test_the_prior_is_rolled_before_the_checkpoint(teacher, tmp_path):
    run = run_of(teacher, tmp_path, epochs=1)
    run.train()
    weights = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    expected = expected_prior(run.model, run.train_dataloader.dataset).float()
    torch.testing.assert_close(weights[f"{PRIOR}.matrix"], expected, atol=1e-6, rtol=0)
    assert weights[f"{PRIOR}.counts"].sum() == 0
    torch.testing.assert_close(prior_of(run.model).matrix, expected, atol=1e-6, rtol=0)


def test_an_epoch_that_begins_anew_forgets_what_it_had_seen(teacher, tmp_path):
    run = run_of(teacher, tmp_path, epochs=1)
    prior_of(run.model).observe(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([2]))
    run.train()
    expected = expected_prior(run.model, run.train_dataloader.dataset).float()
    torch.testing.assert_close(prior_of(run.model).matrix, expected, atol=1e-6, rtol=0)


def by_iteration(iterations, interval, **loaders):
    return {
        "train_dataloader": loader(**loaders),
        "train_cfg": {"by_epoch": False, "max_iters": iterations},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": interval}},
    }


@pytest.mark.filterwarnings("ignore:The length of")
def test_an_iteration_based_loop_has_epochs_too(teacher, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(
        DistillationClassifier, "begin_epoch", lambda self, *epoch: begun.append((*epoch, self.epoch)) or setattr(
            self, "epoch", epoch[0]
        ),
    )  # fmt: skip
    data = loader().dataset
    settings = by_iteration(9, 4, count=12, batch_size=3, sampler=InfiniteSampler(data, seed=0))  # 10 images: 4 batches
    run = run_of(teacher, tmp_path, **settings)
    rolled = []
    ends = Record(after_train_iter=lambda run, *_, **__: rolled.append(int(prior_of(run.model).counts.sum())))
    run.register_hook(ends, priority="BELOW_NORMAL")
    run.train()
    assert [epoch[:2] for epoch in begun] == [(1, 3), (2, 3), (3, 3)]
    assert rolled == [3, 6, 9, 0, 3, 6, 9, 0, 3]
    saved = torch.load(tmp_path / "iter_4.pth", weights_only=False)["state_dict"]
    assert not torch.equal(saved[f"{PRIOR}.matrix"], torch.full((3, 3), 1 / 3))


def test_an_iteration_based_run_goes_on_in_the_middle_of_an_epoch(teacher, tmp_path):
    begun, drawn, drawn_again = [], [], []

    def settings():
        return by_iteration(6, 2, sampler=InfiniteSampler(loader().dataset, shuffle=False))

    whole = run_of(teacher, tmp_path / "whole", **settings())
    whole.register_hook(Record(before_train_iter=lambda *_, **__: drawn.append(float(torch.rand(())))), "LOW")
    whole.train()
    resumed = run_of(
        teacher, tmp_path / "resumed", resume=True, load_from=str(tmp_path / "whole" / "iter_4.pth"), **settings()
    )
    note = Record(before_train_iter=lambda run, *_, **__: begun.append((run.iter, run.model.epoch)))
    resumed.register_hook(note, priority="LOW")
    resumed.register_hook(Record(before_train_iter=lambda *_, **__: drawn_again.append(float(torch.rand(())))), "LOW")
    resumed.train()
    assert drawn_again == drawn[4:]
    assert len(set(drawn)) == 6
    assert begun == [(4, 2), (5, 2)]
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


class Flipped(Dataset):
    """Images that are flipped by chance each time they are read."""

    def __init__(self):
        self.plain = loader().dataset

    def __len__(self):
        return len(self.plain)

    def __getitem__(self, index):
        sample = dict(self.plain[index])
        if numpy.random.rand() < 0.5:
            sample["inputs"] = sample["inputs"].flip(-1)
        return sample


@pytest.mark.skipif(
    hasattr(loops._InfiniteDataloaderIterator, "skip_iter"),
    reason="this MMEngine passes over the data without reading it, so random augmentation is not replayed",
)
@pytest.mark.parametrize("iterations", [2, 4])
def test_an_iteration_based_run_goes_on_with_the_augmentation_it_would_have_had(iterations, teacher, tmp_path):
    def settings():
        data = Flipped()
        flipped = DataLoader(
            data, batch_size=4, sampler=InfiniteSampler(data, shuffle=False), collate_fn=pseudo_collate
        )
        return {**by_iteration(6, 2), "train_dataloader": flipped}

    whole = run_of(teacher, tmp_path / "whole", **settings())
    whole.train()
    path = tmp_path / "whole" / f"iter_{iterations}.pth"
    resumed = run_of(teacher, tmp_path / "resumed", resume=True, load_from=str(path), **settings())
    resumed.train()
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_other_models_are_only_seeded(tmp_path):
    def numbers(hooks):
        drawn = []
        run = runner(tmp_path, network(), hooks=hooks, epochs=2)
        run.register_hook(Record(before_train_iter=lambda *_, **__: drawn.append(float(torch.rand(())))), "LOW")
        run.train()
        return drawn

    assert numbers([{"type": "IKLHook"}]) == numbers([{"type": "IKLHook"}])
    assert len(numbers([])) == 6


# --- random numbers --------------------------------------------------------------------------------------------------


def test_each_epoch_and_rank_has_its_own_random_numbers(tmp_path, monkeypatch):
    def draw(epoch=0, rank=0, seed=0):
        monkeypatch.setattr(hooks, "get_rank", lambda: rank)
        run = type("Run", (), {"seed": seed, "epoch": epoch, "max_epochs": 9, "model": nn.Linear(1, 1)})()
        hook = IKLHook()
        hook.before_train_epoch(run)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    settings = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draw(*setting) for setting in settings]
    assert drawn == [draw(*setting) for setting in settings]
    for kind in zip(*drawn, strict=True):
        assert len(set(kind)) == len(settings)


def test_seeding_can_be_turned_off(tmp_path):
    states = []
    run = runner(tmp_path, network(), hooks=[{"type": "IKLHook", "seed_epochs": False}], epochs=1)
    run.register_hook(Record(before_train_epoch=lambda *_: states.append(torch.get_rng_state())), "HIGHEST")
    run.register_hook(Record(before_train_epoch=lambda *_: states.append(torch.get_rng_state())), "LOWEST")
    run.train()
    assert torch.equal(*states)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_as_the_uninterrupted_one(teacher, tmp_path):
    whole = run_of(teacher, tmp_path / "whole", epochs=3)
    whole.train()
    resumed = run_of(
        teacher, tmp_path / "resumed", epochs=3, resume=True, load_from=str(tmp_path / "whole" / "epoch_2.pth")
    )
    epochs = []
    resumed.register_hook(Record(before_train_iter=lambda run, *_, **__: epochs.append(run.model.epoch)), "LOW")
    resumed.train()
    assert epochs == [3, 3, 3]
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert not torch.equal(prior_of(whole.model).matrix, torch.full((3, 3), 1 / 3))


def test_an_average_never_sees_perturbed_weights(tmp_path):
    """Also where EMAHook is listed first, with the priority that many configs give it, and gradients accumulate."""
    averages = []
    for order in (1, -1):
        torch.manual_seed(0)
        model = network(
            type="AdversarialClassifier",
            attack={"eps": "8/255", "steps": 1, "step_size": "8/255"},
            robust_loss={"type": "KLLoss"},
            awp={"gamma": 0.5, "warmup_epochs": 1},
        )
        ema = {"type": "EMAHook", "momentum": 0.1, "priority": "ABOVE_NORMAL"}
        settings = {"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.05}, "accumulative_counts": 2}}
        run = runner(tmp_path, model, hooks=[ema, {"type": "IKLHook"}][::order], epochs=1, **settings)
        run.train()
        (hook,) = (hook for hook in run.hooks if isinstance(hook, EMAHook))
        averages.append(hook.ema_model.module.state_dict())
    assert_same(*averages)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_the_live_prior_survives_weight_averaging(update_buffers, teacher, tmp_path):
    averaging = {"type": "EMAHook", "momentum": 0.1, "update_buffers": update_buffers}

    def start(name, **keywords):
        return run_of(teacher, tmp_path / name, hooks=[averaging, {"type": "IKLHook"}], **keywords)

    whole = start("whole", epochs=3)
    live = {}
    whole.register_hook(
        Record(
            before_save_checkpoint=lambda run, checkpoint: live.update({run.epoch: prior_of(run.model).matrix.clone()})
        )
    )
    whole.train()
    for epoch in (1, 2, 3):
        saved = torch.load(tmp_path / "whole" / f"epoch_{epoch}.pth", weights_only=False)
        assert torch.equal(saved["state_dict"][f"{PRIOR}.matrix"], live[epoch - 1])
        assert torch.equal(saved["ema_state_dict"][f"module.{PRIOR}.matrix"], live[epoch - 1])
        name = "head.fc.weight"
        assert not torch.equal(saved["state_dict"][name], saved["ema_state_dict"][f"module.{name}"])

    path = str(tmp_path / "whole" / "epoch_2.pth")
    resumed = start("resumed", epochs=3, resume=True, load_from=path)
    resumed.train()
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    loaded = run_of(teacher, tmp_path / "loaded", load_from=path)
    loaded.load_or_resume()
    assert torch.equal(prior_of(loaded.model).matrix, live[1])


def test_statistics_that_averaging_copies_are_those_of_the_model(teacher, tmp_path):
    run = run_of(teacher, tmp_path, hooks=[{"type": "EMAHook"}, {"type": "IKLHook"}], epochs=1)
    run.register_hook(
        Record(after_train_epoch=lambda run: run.model.backbone.bn1.running_mean.fill_(7.0)),  # as SyncBuffersHook
    )
    run.train()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    assert torch.equal(saved["backbone.bn1.running_mean"], torch.full((2,), 7.0))


# --- what is rehearsed -----------------------------------------------------------------------------------------------


def validated(**keywords):
    return {
        "val_dataloader": loader(seed=1),
        "val_cfg": {},
        "val_evaluator": {"type": "Accuracy", "topk": (1,)},
        **keywords,
    }


def saving(**options):
    return {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1, **options}}}


class Unreadable(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise OSError(f"no image {index}")


# What MMEngine would find out after an epoch, and how it is told before.
LATE = {
    "unknown option": (
        saving(max_keep_kpts=3),
        r"unknown option of CheckpointHook `max_keep_kpts`\. Did you mean `max_keep_ckpts`\?",
    ),
    "no such metric": (
        validated(**saving(save_best="accuracy/top11", rule="greater")),
        r"`save_best` of CheckpointHook must be a metric of `val_evaluator`, 'accuracy/top1', got 'accuracy/top11'",
    ),
    "unreadable images": (
        validated(val_dataloader=DataLoader(Unreadable(), collate_fn=pseudo_collate)),
        r"`val_dataloader` must work .* gives OSError: no image",
    ),
    "metric of another task": (
        validated(val_evaluator={"type": "RobustAccuracy"}),
        r"`val_evaluator` must work .* gives ValueError: Robust",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_after_an_epoch_fails_before_the_first_step(case, teacher, tmp_path):
    settings, message = LATE[case]
    run = run_of(teacher, tmp_path, **settings)
    run.register_hook(Record(before_train_iter=lambda *_, **__: pytest.fail("a step was taken")), "LOW")
    with pytest.raises(ValueError, match=f"^IKLHook: {message}"):
        run.train()


def test_half_a_worker_is_refused_before_the_first_step(teacher, tmp_path):
    data = loader(seed=1)
    data.num_workers = 3.5  # as torch takes it without a word
    with pytest.raises(ValueError, match=r"TypeError: `num_workers` must be a whole number, got 3\.5\. Correct"):
        run_of(teacher, tmp_path, **validated(val_dataloader=data)).train()


def test_the_rehearsal_changes_nothing(teacher, tmp_path):
    def trained(name, rehearse):
        hooks_ = [{"type": "IKLHook", "rehearse": rehearse, "seed_epochs": False}]
        data = loader(seed=1, shuffle=True)
        run = run_of(teacher, tmp_path / name, hooks=hooks_, epochs=1, **validated(val_dataloader=data))
        modes = []
        run.register_hook(Record(before_train=lambda run: modes.append(run.model.training)), "LOWEST")
        torch.manual_seed(3)
        run.train()
        return run.model.state_dict(), modes

    ours, plain = trained("with", True), trained("without", False)
    assert_same(ours[0], plain[0])
    assert ours[1] == plain[1] == [True]


def test_validation_data_without_images_are_not_rehearsed(teacher, tmp_path):
    empty = loader(count=0, shuffle=False)
    run = run_of(teacher, tmp_path, epochs=1, **validated(val_dataloader=empty, val_cfg={}))
    steps = []
    run.register_hook(Record(after_train_iter=lambda *_, **__: steps.append(1)), "LOW")
    with pytest.raises(Exception, match=r"^(?!IKLHook)"):  # the host's own, after the epoch
        run.train()
    assert len(steps) == 3


def test_the_rehearsal_can_be_turned_off(teacher, tmp_path):
    settings = validated(**saving(save_best="accuracy/top11", rule="greater"))
    with pytest.raises(KeyError, match="accuracy/top11"):
        run_of(teacher, tmp_path, hooks=[{"type": "IKLHook", "rehearse": False}], **settings).train()


# --- what is verified ------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("way", ["load_from", "resume", "last_checkpoint", "test"])
def test_a_checkpoint_is_verified_before_it_is_read(way, teacher, tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {}, "meta": {}, "x": Bomb(tmp_path / "exploded")}, path)
    (tmp_path / "last_checkpoint").write_text(str(path))
    settings = {
        "load_from": {"load_from": str(path)},
        "resume": {"load_from": str(path), "resume": True},
        "last_checkpoint": {"resume": True},
        "test": {
            "load_from": str(path), "test_dataloader": loader(), "test_cfg": {}, "test_evaluator": {"type": "Accuracy"},
        },
    }[way]  # fmt: skip
    run = run_of(teacher, tmp_path, **settings)
    with pytest.raises(ValueError, match=r"bomb\.pth .* would run code .*Do not trust"):
        run.test() if way == "test" else run.train()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("way", ["last_checkpoint", "load_from"])
def test_a_run_does_not_go_on_from_weights_alone(way, teacher, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": MODELS.build(network()).state_dict(), "meta": {}}, path)
    (tmp_path / "last_checkpoint").write_text(str(path))
    settings = {"load_from": str(path)} if way == "load_from" else {}
    with pytest.raises(
        ValueError, match=r"weights\.pth must be one of MMEngine's .* but lacks 'message_hub'\. To start"
    ):
        run_of(teacher, tmp_path, resume=True, **settings).train()
    run_of(teacher, tmp_path, load_from=str(path)).load_or_resume()


def checkpoint_whose_config_would_run(teacher, tmp_path):
    """A checkpoint of a run; the text of the config in it makes a folder when it is read as Python."""
    run_of(teacher, tmp_path, epochs=1).train()
    path = tmp_path / "epoch_1.pth"
    content = torch.load(path, weights_only=False)
    content["meta"]["cfg"] = content["meta"]["config"] = f"__import__('os').mkdir({str(tmp_path / 'exploded')!r})\n"
    torch.save(content, path)
    return path


def test_the_config_in_a_checkpoint_is_not_run(teacher, tmp_path):
    path = checkpoint_whose_config_would_run(teacher, tmp_path)
    run = run_of(teacher, tmp_path, load_from=str(path), resume=True)
    run.train()
    assert run.iter == 6
    assert not (tmp_path / "exploded").exists()


def test_the_config_of_these_tests_would_run(teacher, tmp_path):
    """MMEngine does it by itself; were it to stop, the hook would have nothing to take out."""
    path = checkpoint_whose_config_would_run(teacher, tmp_path)
    trusting = [{"type": "IKLHook", "verify_checkpoints": False}]
    run_of(teacher, tmp_path, hooks=trusting, load_from=str(path), resume=True).load_or_resume()
    assert (tmp_path / "exploded").is_dir()


def test_a_run_that_was_stopped_while_it_noted_its_last_checkpoint_goes_on(teacher, tmp_path):
    whole = run_of(teacher, tmp_path / "whole", epochs=3)
    whole.train()
    stopped = tmp_path / "stopped"
    run_of(teacher, stopped, epochs=2).train()
    (stopped / "last_checkpoint").write_text("")
    shutil.copy(tmp_path / "whole" / "epoch_3.pth", stopped / "best_accuracy_epoch_9.pth")  # not one to go on from
    left = stopped / "epoch_7.pth"  # of an earlier run in the same folder
    shutil.copy(tmp_path / "whole" / "epoch_3.pth", left)
    os.utime(left, (0, 0))
    resumed = run_of(teacher, stopped, epochs=3, resume=True)
    epochs = []
    resumed.register_hook(Record(before_train_iter=lambda run, *_, **__: epochs.append(run.model.epoch)), "LOW")
    resumed.train()
    assert epochs == [3, 3, 3]
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_note_of_the_last_checkpoint_that_is_empty_is_named(teacher, tmp_path):
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(
        ValueError, match=r"IKLHook: .*last_checkpoint must name .* but is empty, and there is no .* without --resume"
    ):
        run_of(teacher, tmp_path, resume=True).train()


@pytest.mark.parametrize("length", [0, 4, 0.5, 0.999])
def test_a_run_that_was_stopped_while_it_wrote_its_last_checkpoint_again_goes_on(length, teacher, tmp_path):
    """As MMEngine does behind a validation that was the best so far."""
    whole = run_of(teacher, tmp_path / "whole", epochs=3)
    whole.train()
    stopped = tmp_path / "stopped"
    run_of(teacher, stopped, epochs=2).train()
    assert (stopped / "last_checkpoint").read_text().endswith("epoch_2.pth")
    content = (stopped / "epoch_2.pth").read_bytes()
    cut = content[: length if isinstance(length, int) else int(length * len(content))]
    (stopped / "epoch_2.pth").write_bytes(cut)
    resumed = run_of(teacher, stopped, epochs=3, resume=True)
    epochs = []
    resumed.register_hook(Record(before_train_iter=lambda run, *_, **__: epochs.append(run.model.epoch)), "LOW")
    resumed.train()
    assert epochs == [2, 2, 2, 3, 3, 3]
    assert_same(resumed.model.state_dict(), whole.model.state_dict())

    (stopped / "epoch_3.pth").write_bytes(cut)
    for epoch in (1, 2):
        (stopped / f"epoch_{epoch}.pth").unlink()
    with pytest.raises(
        ValueError, match=r"names .*epoch_3\.pth, which was not written to its end, and there is no whole"
    ):
        run_of(teacher, stopped, epochs=3, resume=True).train()


def test_a_last_checkpoint_that_is_damaged_otherwise_is_not_passed_over(teacher, tmp_path):
    run_of(teacher, tmp_path, epochs=2).train()
    path = tmp_path / "epoch_2.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    elsewhere = tmp_path / "elsewhere" / "epoch_2.pth"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(content[:-40])
    for damaged, file in ((content, path), (b"text" * 100, path), (None, elsewhere)):
        if damaged is not None:
            file.write_bytes(damaged)
        (tmp_path / "last_checkpoint").write_text(str(file))
        with pytest.raises(ValueError, match=rf"the checkpoint {file} must hold tensors and plain values, but reading"):
            run_of(teacher, tmp_path, epochs=3, resume=True).train()


def test_verification_can_be_turned_off(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "verify", lambda path, **_: pytest.fail(f"verifies {path}"))
    run_of(teacher, tmp_path, epochs=1).train()  # there is nothing to verify
    settings = {"load_from": str(tmp_path / "epoch_1.pth"), "epochs": 1}
    run_of(teacher, tmp_path, hooks=[{"type": "IKLHook", "verify_checkpoints": False}], **settings).train()
    with pytest.raises(pytest.fail.Exception):
        run_of(teacher, tmp_path, **settings).train()


# --- several ranks: what is refused; a real run of two is in test_train_mmpretrain.py --------------------------------


class Wrapper(nn.Module):
    def __init__(self, module, broadcast_buffers=False):
        super().__init__()
        self.module = module
        self.broadcast_buffers = broadcast_buffers


def several(monkeypatch, model, *, wrapped=True, broadcast_buffers=False, run_hooks=(), iterations=False):
    """The hook's beginning of a training on rank 1 of 2."""
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    monkeypatch.setattr(hooks, "get_rank", lambda: 1)
    monkeypatch.setattr(hooks, "is_model_wrapper", lambda model: isinstance(model, Wrapper))
    loop_class = type("Loop", (hooks.IterBasedTrainLoop,) if iterations else (), {"__init__": lambda self: None})
    loop = loop_class()
    loop.__dict__["dataloader"] = loader()
    run = type("Run", (), {"hooks": list(run_hooks), "val_loop": None})()
    run.train_loop = loop
    run.model = Wrapper(model, broadcast_buffers) if wrapped else model
    hook = IKLHook()
    hook.before_train(run)
    return hook


@pytest.fixture
def student(teacher):
    return MODELS.build(distilled_network(teacher))


def test_ranks_without_a_wrapper_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"model of 2 ranks must be wrapped.*--launcher pytorch"):
        several(monkeypatch, nn.Linear(1, 1), wrapped=False)


def test_a_wrapper_that_broadcasts_buffers_is_refused_with_a_prior(monkeypatch, student):
    with pytest.raises(ValueError, match=r"must have broadcast_buffers=False.*model_wrapper_cfg = dict"):
        several(monkeypatch, student, broadcast_buffers=True)
    several(monkeypatch, nn.Linear(1, 1), broadcast_buffers=True)


def test_averaged_sums_in_the_middle_of_an_epoch_are_refused(monkeypatch, student):
    with pytest.raises(ValueError, match=r"SyncBuffersHook must not be there in an iteration-based loop"):
        several(monkeypatch, student, run_hooks=[SyncBuffersHook()], iterations=True)
    several(monkeypatch, student, run_hooks=[SyncBuffersHook()])
    several(monkeypatch, nn.Linear(1, 1), run_hooks=[SyncBuffersHook()], iterations=True)


def test_only_rank_0_goes_on_with_the_sums_of_a_checkpoint(monkeypatch, student):
    prior = prior_of(student)
    prior.observe(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([2]))
    several(monkeypatch, student)
    assert prior.counts.sum() == prior.sums.sum() == 0


def test_an_epoch_of_an_infinite_sampler_is_shared_by_the_ranks(monkeypatch):
    loader_ = loader(sampler=InfiniteSampler(loader().dataset), batch_size=2)
    assert hooks._iterations_per_epoch(loader_) == 5
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    assert hooks._iterations_per_epoch(loader_) == 3
    assert hooks._iterations_per_epoch(loader(batch_size=3)) == 4


def test_the_hook_comes_before_those_that_save_and_average():
    mine = get_priority(IKLHook.priority)
    assert all(mine < get_priority(other.priority) for other in (EMAHook, SyncBuffersHook, CheckpointHook))
