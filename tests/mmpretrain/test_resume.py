"""What IKLHook does for runs that go on: the same run to the bit, from a checkpoint that is whole and only data."""

import os
import re
import shutil

import numpy
import pytest
import torch
from mmengine.dataset import InfiniteSampler, pseudo_collate
from mmengine.runner import loops
from mmpretrain.registry import MODELS
from mmpretrain_runs import (
    Bomb,
    Record,
    assert_same,
    by_iteration,
    distilled_network,
    loader,
    network,
    prior_of,
    runner,
)
from torch.utils.data import DataLoader, Dataset

from ikl_plugins.mmengine import hooks


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """Folder and final state of a run of three epochs."""
    folder = tmp_path_factory.mktemp("whole")
    run = runner(folder, distilled_network(teacher), epochs=3)
    run.train()
    assert not torch.equal(prior_of(run.model).matrix, torch.full((3, 3), 1 / 3))
    return folder, run.model.state_dict()


@pytest.fixture
def stopped(whole, tmp_path):
    """The folder of the same run, stopped after two epochs."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    for epoch in (1, 2):
        shutil.copy(whole[0] / f"epoch_{epoch}.pth", folder)
    (folder / "last_checkpoint").write_text(str(folder / "epoch_2.pth"))
    return folder


@pytest.fixture
def start(teacher, tmp_path):
    """A run, in the folder `work` if no other is named."""
    return lambda folder=None, **keywords: runner(
        folder or tmp_path / "work", distilled_network(teacher), **{"epochs": 3, **keywords}
    )


def resumed(run):
    """Trains; gives the epochs of its iterations and the final state."""
    epochs = []
    run.register_hook(Record(before_train_iter=lambda run, *_, **__: epochs.append(run.model.epoch)), "LOW")
    run.train()
    return epochs, run.model.state_dict()


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noted", [True, False])
def test_a_resumed_run_ends_as_the_uninterrupted_one(noted, whole, stopped, start):
    """Also where it was stopped while it noted its last checkpoint."""
    if not noted:
        (stopped / "last_checkpoint").write_text("")
        for name in ("best_accuracy_epoch_9.pth", "epoch_7.pth"):  # not one to go on from; of an earlier run
            shutil.copy(whole[0] / "epoch_3.pth", stopped / name)
        os.utime(stopped / "epoch_7.pth", (0, 0))
    epochs, state = resumed(start(stopped, resume=True))
    assert epochs == [3, 3, 3]
    assert_same(state, whole[1])


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
def test_an_iteration_based_run_goes_on_with_the_numbers_it_would_have_drawn(iterations, start, tmp_path):
    """In the middle of an epoch of three iterations or at its beginning, augmentation and validation included."""

    def trained(folder, **keywords):
        data = Flipped()
        sampler = InfiniteSampler(data, shuffle=False)
        flipped = DataLoader(data, batch_size=4, sampler=sampler, collate_fn=pseudo_collate)
        validated = DataLoader(data, batch_size=4, collate_fn=pseudo_collate)
        settings = {**by_iteration(6, 2), "train_dataloader": flipped, "val_dataloader": validated}
        settings |= {"val_cfg": {}, "val_evaluator": {"type": "Accuracy"}}
        settings["train_cfg"]["val_interval"] = 2
        run = start(folder, **settings, **keywords)
        drawn = []
        run.register_hook(Record(before_train_iter=lambda *_, **__: drawn.append(float(torch.rand(())))), "LOW")
        return drawn, *resumed(run)

    drawn, _, state = trained(tmp_path / "whole")
    path = tmp_path / "whole" / f"iter_{iterations}.pth"
    again, epochs, same = trained(tmp_path / "resumed", resume=True, load_from=str(path))
    assert len(set(drawn)) == 6
    assert again == drawn[iterations:]
    assert epochs == [1, 1, 1, 2, 2, 2][iterations:]
    assert_same(same, state)


# --- going on with something else ------------------------------------------------------------------------------------


def sgd(**keywords):
    return {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9, **keywords}}


def ikl(**keywords):
    return {"distill_loss": {"type": "IKLLoss", "beta": 4.0, "global_info": True, **keywords}}


SMOOTH = {"head": {**network()["head"], "loss": {"type": "LabelSmoothLoss", "label_smooth_val": 0.1}}}
LONGER = {"epochs": 4, "param_scheduler": {"type": "MultiStepLR", "milestones": [3]}}
QUIET = {"train_dataloader": loader(num_workers=1), "log_processor": {"window_size": 3}}
# What the model and the runner have, the fields that are refused, and what they are.
CHANGES = {
    "another loss": (ikl(type="GKLLoss"), {}, {"losses.distill_loss.type": "GKLLoss"}),
    "another temperature": (ikl(temperature=2.0), {}, {"losses.distill_loss.temperature": 2.0}),
    "another factor": (ikl(loss_weight=2.0), {}, {"losses.distill_loss.loss_weight": 2.0}),
    "other weights": (
        {"distill_weight": 2.0, "ce_weight": 0.5},
        {},
        {"model.distill_weight": 2.0, "model.ce_weight": 0.5},
    ),
    "another ramp": ({"warmup_epochs": 9}, {}, {"model.warmup_epochs": 9}),
    "a head's loss": (SMOOTH, {}, {"losses.head.loss_module.type": "LabelSmoothLoss"}),
    "another batch size": ({}, {"train_dataloader": loader(batch_size=5)}, {"batch_size": 5}),
    "other images": ({}, {"train_dataloader": loader(count=12)}, {"train_images": 12}),
    "another rate": ({}, {"optim_wrapper": sgd(lr=0.5)}, {"optimizer.lr": 0.5}),
    "another decay": ({}, {"optim_wrapper": sgd(weight_decay=0.5)}, {"optimizer.weight_decay": 0.5}),
    "accumulated": (
        {},
        {"optim_wrapper": sgd() | {"accumulative_counts": 3}},
        {"optim_wrapper.accumulative_counts": 3},
    ),
    "clipped": (
        {},
        {"optim_wrapper": sgd() | {"clip_grad": {"max_norm": 1.0}}},
        {"optim_wrapper.clip_grad": {"max_norm": 1.0}},
    ),
    "autocast": (
        {},
        {"optim_wrapper": sgd() | {"type": "AutocastOptimWrapper"}},
        {"optim_wrapper.type": "AutocastOptimWrapper"},
    ),
    "another seed": ({}, {"randomness": {"seed": 1}}, {"seed": 1}),
    "what says nothing": ({"teacher_val_batches": 0}, QUIET, {}),
    "longer": ({}, LONGER, {}),
}


class StoppedError(Exception):
    pass


def stop(*_, **__):
    raise StoppedError


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_goes_on_with_its_settings_unless_asked_for(case, teacher, stopped, caplog):
    model, _, fields = CHANGES[case]

    def goes_on(**hook):
        # MMEngine writes the seed of the checkpoint into what it was given.
        settings = {name: dict(value) if isinstance(value, dict) else value for name, value in CHANGES[case][1].items()}
        config = {**distilled_network(teacher), **model}
        hooks = [{"type": "IKLHook", **hook}]
        run = runner(stopped, config, resume=True, hooks=hooks, **{"epochs": 3, **settings})
        run.register_hook(Record(before_train_epoch=stop), "VERY_LOW")
        run.logger.addHandler(caplog.handler)
        with pytest.raises(StoppedError):
            run.train()

    if fields:
        with pytest.raises(ValueError, match=r"^IKLHook: .*keep its settings.*allow_changes=True") as refusal:
            goes_on()
        for field, value in fields.items():
            assert re.search(rf"{re.escape(field)} \(was .*, is {re.escape(repr(value))}\)", str(refusal.value))
    caplog.clear()
    goes_on(allow_changes=bool(fields))
    said = {message.split(": ")[1] for message in caplog.messages if ": was " in message}
    assert said >= {*fields, *({"epochs", "schedule.0"} if case == "longer" else ())}
    assert bool(said) is (case != "what says nothing")


def test_a_teacher_is_known_by_its_weights_and_old_checkpoints_go_on(teacher, stopped, start, tmp_path):
    content = torch.load(teacher)
    moved, other = tmp_path / "moved.pth", tmp_path / "other.pth"
    torch.save({"state_dict": content}, moved)
    torch.save({**content, "head.fc.bias": content["head.fc.bias"] + 1}, other)
    with pytest.raises(ValueError, match=r"settings, but others are model\.teacher\.weights \(was '"):
        runner(stopped, distilled_network(other), resume=True, epochs=3).train()
    epochs, _ = resumed(runner(stopped, distilled_network(moved), resume=True, epochs=3))
    assert epochs == [3, 3, 3]
    path = stopped / "epoch_2.pth"
    old = torch.load(path, weights_only=False)
    assert old["meta"].pop("ikl_plugins")["losses"]["distill_loss"]["beta"] == 4.0
    torch.save(old, path)
    resumed(runner(stopped, distilled_network(other), resume=True, load_from=str(path), epochs=3))


# --- a run that was stopped while it wrote ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 4, 0.5, 0.999])
def test_a_run_that_was_stopped_while_it_wrote_its_last_checkpoint_again_goes_on(length, whole, stopped, start):
    """As MMEngine does behind a validation that was the best so far."""
    content = (stopped / "epoch_2.pth").read_bytes()
    cut = content[: length if isinstance(length, int) else int(length * len(content))]
    (stopped / "epoch_2.pth").write_bytes(cut)
    epochs, state = resumed(start(stopped, resume=True))
    assert epochs == [2, 2, 2, 3, 3, 3]
    assert_same(state, whole[1])


@pytest.mark.parametrize(("note", "what"), [("", "is empty"), ("epoch_2.pth", "which was not written to its end")])
def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(note, what, stopped, start):
    (stopped / "epoch_1.pth").unlink()
    (stopped / "epoch_2.pth").write_bytes(b"")
    (stopped / "last_checkpoint").write_text(note and str(stopped / note))
    with pytest.raises(ValueError, match=rf"IKLHook: .*last_checkpoint must .*{what}.*without --resume"):
        start(stopped, resume=True).train()


def test_a_last_checkpoint_that_is_damaged_otherwise_is_not_passed_over(stopped, start, tmp_path):
    path, elsewhere = stopped / "epoch_2.pth", tmp_path / "epoch_2.pth"
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 200)  # more than the padding between two records
    content[middle] = bytes(255 - byte for byte in content[middle])
    elsewhere.write_bytes(content[:-40])
    for damaged, file in ((content, path), (b"text" * 100, path), (None, elsewhere)):
        if damaged is not None:
            file.write_bytes(damaged)
        (stopped / "last_checkpoint").write_text(str(file))
        with pytest.raises(ValueError, match=rf"the checkpoint {file} must (hold plain values|be one of torch)"):
            start(stopped, resume=True).train()


# --- what is verified ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["load_from", "resume", "last_checkpoint", "test"])
def test_a_checkpoint_is_verified_before_it_is_read(way, start, tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {}, "meta": {}, "x": Bomb(tmp_path / "exploded")}, path)
    (tmp_path / "last_checkpoint").write_text(str(path))
    tested = {"test_dataloader": loader(), "test_cfg": {}, "test_evaluator": {"type": "Accuracy"}}
    settings = {
        "load_from": {"load_from": str(path)},
        "resume": {"load_from": str(path), "resume": True},
        "last_checkpoint": {"resume": True},
        "test": {"load_from": str(path), **tested},
    }[way]
    run = start(tmp_path, **settings)
    with pytest.raises(ValueError, match=r"bomb\.pth .* would run code"):
        run.test() if way == "test" else run.train()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("way", ["last_checkpoint", "load_from"])
def test_a_run_does_not_go_on_from_weights_alone(way, start, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": MODELS.build(network()).state_dict(), "meta": {}}, path)
    (tmp_path / "last_checkpoint").write_text(str(path))
    settings = {"load_from": str(path)} if way == "load_from" else {}
    with pytest.raises(ValueError, match=r"weights\.pth must be .* but lacks 'message_hub'"):
        start(tmp_path, resume=True, **settings).train()
    start(load_from=str(path)).load_or_resume()


@pytest.mark.parametrize("resume", [False, True])
def test_a_class_prior_that_is_none_is_refused_and_not_left_out(resume, stopped, start):
    """MMEngine loads with strict=False, and would leave out what has another shape."""
    path = stopped / "epoch_2.pth"
    content = torch.load(path, weights_only=False)
    entry = "distill_loss.class_prior.matrix"
    for matrix in (1.46 * torch.full((3, 3), 1 / 3), torch.full((5, 5), 0.2)):
        content["state_dict"][entry] = matrix
        torch.save(content, path)
        with pytest.raises(
            ValueError, match=rf"^ClassPrior: the class prior's `{entry}` must .*, got .*\. Load another"
        ):
            start(load_from=str(path), resume=resume).load_or_resume()


@pytest.mark.parametrize("verifies", [True, False])
def test_the_config_in_a_checkpoint_is_not_run(verifies, stopped, start, tmp_path):
    """MMEngine runs it; were it to stop, the hook would have nothing to take out."""
    path = stopped / "epoch_2.pth"
    content = torch.load(path, weights_only=False)
    content["meta"]["cfg"] = content["meta"]["config"] = f"__import__('os').mkdir({str(tmp_path / 'exploded')!r})\n"
    torch.save(content, path)
    hook = {"type": "IKLHook", "verify_checkpoints": verifies}
    run = start(hooks=[hook], load_from=str(path), resume=True)
    run.train()
    assert run.iter == 9
    assert (tmp_path / "exploded").exists() is not verifies


def test_verification_can_be_turned_off(whole, start, monkeypatch):
    monkeypatch.setattr(hooks, "verify", lambda path, **_: pytest.fail(f"verifies {path}"))
    settings = {"load_from": str(whole[0] / "epoch_1.pth"), "epochs": 1}
    start(epochs=1).train()  # there is nothing to verify
    start(hooks=[{"type": "IKLHook", "verify_checkpoints": False}], **settings).train()
    with pytest.raises(pytest.fail.Exception):
        start(**settings).train()
