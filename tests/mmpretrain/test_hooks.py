"""IKLHook: epochs, class priors, random numbers, averages, ranks and the dry run, in real, small runs."""

import json
import random

import cv2
import numpy
import pytest
import torch
from mmengine.dataset import Compose, InfiniteSampler, pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, SyncBuffersHook
from mmengine.model import BaseModel
from mmpretrain.registry import MODELS
from mmpretrain_runs import (
    Record,
    assert_same,
    by_iteration,
    distilled_network,
    holding,
    images,
    loader,
    network,
    prior_of,
    runner,
)
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ikl_plugins.mmengine import hooks
from ikl_plugins.mmengine.hooks import run_lock
from ikl_plugins.mmpretrain import IKLHook, IKLLoss

PRIOR = "distill_loss.class_prior"


def run_of(teacher, work_dir, **keywords):
    return runner(work_dir, distilled_network(teacher), **keywords)


def expected_prior(model, data):
    """Mean prediction of the teacher by class, image by image."""
    rows = [[] for _ in range(3)]
    for sample in data:
        batch = model.data_preprocessor({"inputs": [sample["inputs"]], "data_samples": None})
        with torch.no_grad():
            rows[int(sample["data_samples"].gt_label)].append(torch.softmax(model.teacher(batch["inputs"])[0], 0))
    return torch.stack([torch.stack(some).mean(0) for some in rows])


# --- epochs and priors -----------------------------------------------------------------------------------------------


def test_the_prior_of_an_epoch_is_rolled_before_the_checkpoint(teacher, tmp_path):
    run = run_of(teacher, tmp_path, epochs=1)
    # What an epoch had seen before it was cut short is forgotten: it begins anew.
    prior_of(run.model).observe(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([2]))
    run.train()
    assert (run.model.epoch, run.model.epochs, run.model.attached) == (1, 1, True)
    weights = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    expected = expected_prior(run.model, run.train_dataloader.dataset)
    torch.testing.assert_close(weights[f"{PRIOR}.matrix"], expected, atol=1e-6, rtol=0)
    assert weights[f"{PRIOR}.counts"].sum() == 0
    torch.testing.assert_close(prior_of(run.model).matrix, expected, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The length of")
def test_an_iteration_based_loop_has_epochs_too(teacher, tmp_path):
    data = loader().dataset  # 10 images: 4 batches
    settings = by_iteration(9, 4, count=12, batch_size=3, sampler=InfiniteSampler(data, seed=0))
    run = run_of(teacher, tmp_path, **settings)
    begun, rolled = [], []
    run.register_hook(
        Record(
            before_train_iter=lambda run, *_, **__: begun.append((run.model.epoch, run.model.epochs)),
            after_train_iter=lambda run, *_, **__: rolled.append(int(prior_of(run.model).counts.sum())),
        ),
        priority="BELOW_NORMAL",
    )
    run.train()
    assert begun == [(1, 3)] * 4 + [(2, 3)] * 4 + [(3, 3)]
    assert rolled == [3, 6, 9, 0, 3, 6, 9, 0, 3]
    saved = torch.load(tmp_path / "iter_4.pth", weights_only=False)["state_dict"]
    assert not torch.equal(saved[f"{PRIOR}.matrix"], torch.full((3, 3), 1 / 3))


class Foreign(BaseModel):
    """A model of somebody else's that has one of our losses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 3)
        self.criterion = IKLLoss(global_info=True, num_classes=3)

    def forward(self, inputs, data_samples, mode):
        logits = self.layer(torch.stack(inputs).flatten(1) / 255)
        labels = torch.cat([sample.gt_label for sample in data_samples])
        return {"loss": self.criterion(logits, logits.detach().flip(0), labels)}


@pytest.mark.parametrize("settings", [{}, by_iteration(3, 3)], ids=["epochs", "iterations"])
def test_the_priors_of_any_model_are_rolled(settings, tmp_path):
    run = runner(tmp_path, Foreign(), epochs=1, **settings)
    run.train()
    prior = run.model.criterion.class_prior
    assert prior.counts.sum() == 0
    assert not torch.equal(prior.matrix, torch.full((3, 3), 1 / 3))


def test_a_work_dir_has_one_training_process(tmp_path):
    run = runner(tmp_path, Foreign(), epochs=1)
    with holding(tmp_path / "run") as process, pytest.raises(ValueError, match=rf"^IKLHook: .* process {process} on"):
        run.train()
    assert not list(tmp_path.glob("*.pth"))
    with run_lock("ikl train", tmp_path):  # as `ikl train` does in the same process
        runner(tmp_path, Foreign(), epochs=1).train()
        assert (tmp_path / "run.lock").exists()
    run = runner(tmp_path, Foreign(), epochs=1)
    run.train()
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("ours", [True, False])
def test_terms_prior_and_its_picture_are_in_the_hosts_log(ours, teacher, tmp_path):
    run = run_of(teacher, tmp_path) if ours else runner(tmp_path, Foreign())
    run.train()
    (path,) = tmp_path.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["prior_entropy" in row for row in rows] == [False, True]  # behind the first epoch
    assert all(row["weighted_mse"] > 0 and row["soft_cross_entropy"] > 0 for row in rows)
    prior = (prior_of(run.model) if ours else run.model.criterion.class_prior).matrix
    if ours:  # a frozen teacher's prior is the same in each epoch
        prior = expected_prior(run.model, run.train_dataloader.dataset)
        assert rows[1]["prior_entropy"] == pytest.approx(float(-(prior * prior.log()).sum(1).mean()), rel=1e-4)
    picture = cv2.imread(str(path.with_name("vis_image") / "class_prior_2.png"))
    assert picture.shape == (129, 129, 3)
    for label, guess in ((0, 0), (2, 1)):
        pixel = picture[43 * label + 20, 43 * guess + 20]
        assert pixel.tolist() == pytest.approx([255 * float(prior[label, guess]) ** 0.5] * 3, abs=1)


# --- random numbers --------------------------------------------------------------------------------------------------


def test_each_epoch_and_rank_has_its_own_random_numbers(monkeypatch):
    def draw(epoch=0, rank=0, seed=0):
        monkeypatch.setattr(hooks, "get_rank", lambda: rank)
        run = type("Run", (), {"seed": seed, "epoch": epoch, "max_epochs": 9, "model": nn.Linear(1, 1)})()
        IKLHook().before_train_epoch(run)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    settings = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draw(*setting) for setting in settings]
    assert drawn == [draw(*setting) for setting in settings]
    for kind in zip(*drawn, strict=True):
        assert len(set(kind)) == len(settings)


@pytest.mark.parametrize("seed_epochs", [True, False])
def test_other_models_are_seeded_and_seeding_can_be_turned_off(seed_epochs, tmp_path):
    states = []
    note = Record(before_train_epoch=lambda *_: states.append(torch.get_rng_state()))
    run = runner(tmp_path, network(), hooks=[{"type": "IKLHook", "seed_epochs": seed_epochs}], epochs=1)
    run.hooks.insert(0, note)  # before IKLHook
    run.register_hook(note, "LOWEST")
    run.train()
    assert torch.equal(*states) is not seed_epochs


# --- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undo", ["before_step", "after_step"])
def test_an_average_never_sees_perturbed_weights(undo, tmp_path):
    """Also where EMAHook is listed first, with the priority that many configs give it, and gradients accumulate."""
    averages = []
    for order, resume in ((1, False), (-1, False), (1, True)):
        torch.manual_seed(0)
        model = network(
            type="AdversarialClassifier",
            attack={"eps": "8/255", "steps": 1, "step_size": "8/255"},
            robust_loss={"type": "KLLoss"},
            awp={"gamma": 0.5, "warmup_epochs": 1, "undo": undo},
        )
        ema = {"type": "EMAHook", "momentum": 0.1, "priority": "ABOVE_NORMAL"}
        optimizer = {"type": "SGD", "lr": 0.05, "weight_decay": 0.1}
        settings = {"optim_wrapper": {"optimizer": optimizer, "accumulative_counts": 2}, "train_dataloader": loader(16)}
        settings |= {"resume": True, "load_from": str(tmp_path / "epoch_1.pth")} if resume else {}
        run = runner(tmp_path, model, hooks=[ema, {"type": "IKLHook"}][::order], **settings)
        run.train()
        (hook,) = (hook for hook in run.hooks if isinstance(hook, EMAHook))
        averages.append(hook.ema_model.module.state_dict())
    assert_same(*averages[:2])
    assert_same(averages[0], averages[2])


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


# --- the dry run -----------------------------------------------------------------------------------------------------


def validated(**keywords):
    settings = {"val_dataloader": loader(seed=1), "val_cfg": {}, "val_evaluator": {"type": "Accuracy", "topk": (1,)}}
    return {**settings, **keywords}


def saving(**options):
    return {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1, **options}}}


class Unreadable(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise OSError(f"no image {index}")


def half_a_worker():
    data = loader(seed=1)
    data.num_workers = 3.5  # as torch takes it without a word
    return data


# What MMEngine would find out after an epoch, and how it is told before.
WRONG = saving(save_best="accuracy/top11", rule="greater")
UNREADABLE = DataLoader(Unreadable(), collate_fn=pseudo_collate)


class Piped(Unreadable):
    """A data set with a pipeline, one step of which cannot work."""

    pipeline = Compose([{"type": "CenterCrop", "crop_size": 8}, {"type": "mmpretrain.Resize", "scale": 0.5}])

    def __getitem__(self, index):
        return self.pipeline({"img": numpy.zeros((16, 16, 3), numpy.uint8)})


def scheduled(**options):
    return {"param_scheduler": [{"type": "CosineAnnealingLR", "by_epoch": True, **options}]}


LATE = {
    "unknown option": (saving(max_keep_kpts=3), r"`max_keep_kpts`\. Did you mean `max_keep_ckpts`"),
    "no such metric": (validated(**WRONG), "'accuracy/top1', got 'accuracy/top11'"),
    "unreadable images": (validated(val_dataloader=UNREADABLE), "`val_dataloader` must work .* OSError: no image"),
    "a step of the pipeline": (
        validated(val_dataloader=DataLoader(Piped(), collate_fn=pseudo_collate)),
        r"`val_dataloader` must work .* `pipeline` step 1, Resize\(scale=0\.5, .* gives ",
    ),
    "a schedule": (scheduled(T_max={"some": "thing"}), "`param_scheduler: CosineAnnealingLR` must work .* TypeError"),
    "metric of another task": (
        validated(val_evaluator={"type": "RobustAccuracy"}),
        "`val_evaluator` .* ValueError: Rob",
    ),
    "half a worker": (validated(val_dataloader=half_a_worker()), r"TypeError: `num_workers` must .* got 3\.5\. Corr"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_after_an_epoch_fails_before_the_first_step(case, teacher, tmp_path):
    settings, message = LATE[case]
    run = run_of(teacher, tmp_path, **settings)
    run.register_hook(Record(before_train_iter=lambda *_, **__: pytest.fail("a step was taken")), "LOW")
    with pytest.raises(ValueError, match=f"^IKLHook: .*{message}"):
        run.train()


def test_the_dry_run_changes_nothing(teacher, tmp_path):
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


class Area(BaseMetric):
    """The area under the ROC curve of class 0, of scikit-learn, which wants samples of it and of others."""

    default_prefix = "area"

    def process(self, data_batch, data_samples):
        self.results += [(float(sample["pred_score"][0]), int(sample["gt_label"]) == 0) for sample in data_samples]

    def compute_metrics(self, results):
        scores, own = zip(*results, strict=True)
        if len(set(own)) == 1:
            raise ValueError("Only one class is present in y_true.")
        return {"auc": roc_auc_score(own, scores), "count": len(results)}


@pytest.mark.parametrize("save_best", ["area/auc", "accuracy/top1"])
def test_a_metric_that_one_batch_cannot_compute_is_warned_about_and_starts_anew(save_best, teacher, tmp_path):
    data = DataLoader(sorted(images(10, 1), key=lambda image: int(image["data_samples"].gt_label)), 4, shuffle=False)
    data.collate_fn = pseudo_collate  # the first batch is of class 0 alone, as those of folders of classes
    metrics = [Area(), {"type": "Accuracy", "topk": (1,)}]
    best = {**saving(save_best=save_best, rule="greater"), "log_level": "INFO"}
    run = run_of(teacher, tmp_path, epochs=1, **validated(val_dataloader=data, val_evaluator=metrics), **best)
    found = []
    run.register_hook(Record(after_val_epoch=lambda run, metrics: found.append(metrics)))
    run.train()
    assert found[0]["area/count"] == 10  # none of the rehearsal is left
    assert 0 <= found[0]["area/auc"] <= 1
    (log,) = tmp_path.glob("*/*.log")
    assert "Area of `val_evaluator` gives no value of one batch (ValueError: Only one class" in log.read_text()


def test_a_metric_may_ask_the_message_hub_during_the_rehearsal(teacher, tmp_path):
    run = run_of(teacher, tmp_path, epochs=1, **validated())
    (metric,) = run.val_loop.evaluator.metrics
    told = []
    process = metric.process

    def asking(*args, **kwargs):
        told.append([run.message_hub.get_info(name) for name in ("epoch", "max_epochs", "max_iters")])
        return process(*args, **kwargs)

    metric.process = asking
    run.train()
    assert told[0] == [0, 1, 3]


@pytest.mark.parametrize("rehearse", [True, False])
def test_without_images_or_when_turned_off_the_host_finds_out_itself(rehearse, teacher, tmp_path):
    settings = validated(val_dataloader=loader(count=0, shuffle=False)) if rehearse else validated(**WRONG)
    run = run_of(teacher, tmp_path, hooks=[{"type": "IKLHook", "rehearse": rehearse}], epochs=1, **settings)
    steps = []
    run.register_hook(Record(after_train_iter=lambda *_, **__: steps.append(1)), "LOW")
    with pytest.raises(Exception, match=r"^(?!IKLHook)"):  # the host's own, after the epoch
        run.train()
    assert len(steps) == 3


# --- several ranks: what is refused; a real run of two is in test_train_mmpretrain.py --------------------------------


class Wrapper(nn.Module):
    def __init__(self, module, broadcast_buffers=False):
        super().__init__()
        self.module = module
        self.broadcast_buffers = broadcast_buffers


@pytest.fixture
def begin(monkeypatch):
    """The hook's beginning of a training on rank 1 of 2."""
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    monkeypatch.setattr(hooks, "get_rank", lambda: 1)
    monkeypatch.setattr(hooks, "is_model_wrapper", lambda model: isinstance(model, Wrapper))

    def before_train(model, *, wrapped=True, broadcast_buffers=False, run_hooks=(), iterations=False):
        loop_class = type("Loop", (hooks.IterBasedTrainLoop,) if iterations else (), {"__init__": lambda self: None})
        loop = loop_class()
        loop.__dict__["dataloader"] = loader()
        run = type("Run", (), {"hooks": list(run_hooks), "val_loop": None, "param_schedulers": None})()
        run.train_loop = loop
        run.model = Wrapper(model, broadcast_buffers) if wrapped else model
        IKLHook().before_train(run)

    return before_train


def test_what_would_train_ranks_apart_is_refused(begin, teacher):
    student, plain = MODELS.build(distilled_network(teacher)), nn.Linear(1, 1)
    averaging = {"run_hooks": [SyncBuffersHook()], "iterations": True}
    for model, settings, message in (
        (plain, {"wrapped": False}, r"model of 2 ranks must be wrapped.*--launcher pytorch"),
        (student, {"broadcast_buffers": True}, "broadcast_buffers=False"),
        (student, averaging, "SyncBuffersHook .* iteration-based loop"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(model, **settings)
    begin(plain, broadcast_buffers=True)
    begin(plain, **averaging)
    # Only rank 0 goes on with the sums of a checkpoint.
    prior = prior_of(student)
    prior.observe(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([2]))
    begin(student, run_hooks=[SyncBuffersHook()])
    assert prior.counts.sum() == prior.sums.sum() == 0


def test_an_epoch_of_an_infinite_sampler_is_shared_by_the_ranks(monkeypatch):
    loader_ = loader(sampler=InfiniteSampler(loader().dataset), batch_size=2)
    assert hooks._iterations_per_epoch(loader_) == 5
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    assert hooks._iterations_per_epoch(loader_) == 3
    assert hooks._iterations_per_epoch(loader(batch_size=3)) == 4
