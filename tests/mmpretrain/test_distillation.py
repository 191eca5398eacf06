"""DistillationClassifier: its losses by their formulas, its teacher out of reach, and an ImageClassifier otherwise."""

import copy
import logging
import pickle
import random
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy
import oracles
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_state_dict
from mmpretrain.models import ImageClassifier
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.structures import DataSample
from mmpretrain_runs import assert_same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ikl_plugins import IKLLoss, _validation, losses
from ikl_plugins.mmengine import class_priors
from ikl_plugins.mmengine.heads import head_fault
from ikl_plugins.mmpretrain import AdversarialClassifier, DistillationClassifier


@pytest.fixture
def teacher(small_network):
    module = ImageClassifier(**small_network(channels=3))
    module.train()
    module(torch.randn(8, 3, 16, 16))  # BatchNorm statistics of their own
    return module


@pytest.fixture
def make(small_network, teacher):
    """The classifier, its teacher a copy of `teacher`; keywords as in a config."""

    def build(network=None, **keywords):
        keywords.setdefault("teacher", copy.deepcopy(teacher))
        return DistillationClassifier(**(network or small_network()), **keywords)

    return build


def labels_of(samples):
    return torch.cat([sample.gt_label for sample in samples])


def prepared(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return data["inputs"], data["data_samples"]


@torch.no_grad()
def plain_logits(model, inputs):
    """Student's and teacher's logits in the modes of a training step, without its traces."""
    student = copy.deepcopy(model).train()
    return student.head(student.extract_feat(inputs)), model.teacher.module.eval()(inputs)


@pytest.fixture
def said(caplog):
    """What MMEngine's logger says."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [None, 1, 3])
def test_the_total_is_the_labels_and_the_ramped_formula(make, small_batch, epoch):
    keywords = {"alpha": 2.0, "beta": 3.0, "temperature": 4.0, "weight_temperature": 2.0}
    warmup = 0 if epoch is None else 4
    model = make(distill_loss={"type": "IKLLoss", **keywords}, distill_weight=0.5, ce_weight=0.25, warmup_epochs=warmup)
    if epoch is not None:
        model.begin_epoch(epoch, 10)
    inputs, samples = prepared(model, small_batch())
    student, teacher = plain_logits(model, inputs)
    losses = model.train()(inputs, samples, mode="loss")

    exact = oracles.decoupled("ikl", student, teacher, **keywords)
    scale = 0.5 * (1.0 if epoch is None else epoch / 4)
    expected = {
        "loss_ce": 0.25 * F.cross_entropy(student, labels_of(samples)).double(),
        "loss_distill": scale * exact.loss("batchmean"),
        "weighted_mse": scale * exact.weighted_mse.mean(),
        "soft_cross_entropy": scale * exact.cross_entropy.mean(),
    }
    found = {name: value.double() for name, value in losses.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not losses["weighted_mse"].requires_grad
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(total, losses["loss_ce"] + losses["loss_distill"])  # the terms are not counted twice
    assert list(log) == ["loss", *expected]


def test_the_default_is_the_start_of_ikl_with_weight_one(make):
    model = make()
    assert type(model.distill_loss).__name__ == "IKLLoss"
    assert model.distill_loss.settings() == IKLLoss.preset("start").settings()
    assert (model.distill_weight, model.ce_weight, model.warmup_epochs) == (1.0, 1.0, 0)


def test_kl_is_a_term_without_parts(make, small_batch):
    model = make(distill_loss={"type": "KLLoss", "temperature": 4.0, "scale_by_temperature_squared": True})
    inputs, samples = prepared(model, small_batch())
    student, teacher = plain_logits(model, inputs)
    losses = model.train().loss(inputs, samples)
    expected = 16 * F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    torch.testing.assert_close(losses["loss_distill"], expected, rtol=1e-4, atol=1e-6)
    assert set(losses) == {"loss_ce", "loss_distill"}


def test_accuracies_of_the_head_stay_as_they_are(make, small_network, small_batch):
    network = small_network()
    network["head"].update(cal_acc=True, topk=(1, 2))
    model = make(network, ce_weight=0.0)
    inputs, samples = prepared(model, small_batch())
    student, _ = plain_logits(model, inputs)
    losses = model.train().loss(inputs, samples)
    right = 100 * (student.argmax(1) == labels_of(samples)).float().mean()
    torch.testing.assert_close(losses["accuracy_top-1"][0].squeeze(), right)
    assert "accuracy_top-2" in losses
    assert losses["loss_ce"] == 0


def test_a_head_with_a_way_of_its_own_is_asked_for_the_whole_way(make, small_network, small_batch):
    network = small_network()
    network["head"] = {"type": "ArcFaceClsHead", "num_classes": 3, "in_channels": 16, "scale": 4.0, "margins": 0.3}
    model = make(network)
    inputs, samples = prepared(model, small_batch())
    copied = copy.deepcopy(model).train()
    expected = copied.head.loss(copied.extract_feat(inputs), samples)["loss"]
    losses = model.train().loss(inputs, samples)
    torch.testing.assert_close(losses["loss_ce"], expected)
    torch.testing.assert_close(model.parse_losses(losses)[0], expected + losses["loss_distill"])


def test_further_losses_of_a_head_are_weighed_alike(make, small_network, small_batch):
    model = make(ce_weight=0.5)

    class TwoLosses(type(model.head)):
        def loss(self, feats, data_samples):
            return {"loss": torch.tensor(1.0), "loss_parts": [torch.tensor(2.0), torch.tensor(3.0)]}

    model.head.__class__ = TwoLosses
    losses = model.train().loss(*prepared(model, small_batch()))
    assert losses["loss_ce"] == 0.5
    assert losses["loss_parts"] == [torch.tensor(1.0), torch.tensor(1.5)]


def test_mixed_labels_go_with_a_loss_without_prior(make, small_network, small_batch):
    network = small_network(train_cfg={"augments": {"type": "Mixup", "alpha": 1.0}})
    model = make(network, distill_loss={"type": "IKLLoss"})
    inputs, samples = prepared(model, small_batch())
    scores = torch.stack([sample.gt_score for sample in samples])
    student, teacher = plain_logits(model, inputs)
    losses = model.train().loss(inputs, samples)
    torch.testing.assert_close(losses["loss_ce"], -(scores * student.log_softmax(1)).sum(1).mean())
    expected = oracles.decoupled("ikl", student, teacher).loss("batchmean")
    torch.testing.assert_close(losses["loss_distill"].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_class_prior_is_collected_and_used_an_epoch_later(make, small_batch):
    model = make(distill_loss={"type": "IKLLoss", "global_info": True, "weight_temperature": 2.0})
    assert list(class_priors(model)) == ["distill_loss.class_prior"]
    inputs, samples = prepared(model, small_batch())
    labels = labels_of(samples)
    _, teacher = plain_logits(model, inputs)
    model.train().begin_epoch(1, 2)
    model.loss(inputs, samples)
    model.end_iteration()
    model.end_epoch()
    prior = torch.stack([(teacher / 2).softmax(1)[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(model.distill_loss.class_prior.matrix, prior)
    model.begin_epoch(2, 2)
    student, teacher = plain_logits(model, inputs)
    expected = oracles.decoupled("ikl", student, teacher, class_prior=prior[labels].double()).loss("batchmean")
    torch.testing.assert_close(model.loss(inputs, samples)["loss_distill"].double(), expected, rtol=1e-4, atol=1e-6)
    # A validation loss reads the prior and adds nothing.
    counts = model.distill_loss.class_prior.counts.clone()
    model.eval().loss(inputs, samples)
    assert torch.equal(model.distill_loss.class_prior.counts, counts)


# --- the teacher is out of reach -------------------------------------------------------------------------------------


def test_initialisation_and_training_change_the_student_and_nothing_of_the_teacher(make, small_batch):
    model = make().train()
    names = [*ImageClassifier.state_dict(model), *(name for name, _ in model.named_parameters())]
    assert not any("teacher" in name for name in names)
    optimizer = {"type": "SGD", "lr": 0.1, "weight_decay": 1e-4}
    wrapper = build_optim_wrapper(model, {"optimizer": optimizer, "paramwise_cfg": {"norm_decay_mult": 0.0}})
    held = {id(parameter) for group in wrapper.optimizer.param_groups for parameter in group["params"]}
    assert not held & {id(parameter) for parameter in model.teacher.module.parameters()}

    teacher = copy.deepcopy(model.teacher.module.state_dict())
    student = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        model.train_step(small_batch(), wrapper)
    assert all(not torch.equal(value, student[name]) for name, value in model.named_parameters())
    trained = model.backbone.conv1.weight.clone()
    model.init_weights()
    assert not torch.equal(model.backbone.conv1.weight, trained)
    assert_same(model.teacher.module.state_dict(), teacher)
    assert not any(part.training for part in model.teacher.module.modules())


def test_a_weight_average_and_a_copy_share_the_teacher(make):
    model = make()
    average = ExponentialMovingAverage(model, momentum=0.1)
    assert average.module.teacher is model.teacher
    assert not any("teacher" in name for name in average.state_dict())
    assert copy.deepcopy(model).teacher is model.teacher
    own = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert own.teacher is not model.teacher
    inputs = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(own.teacher(inputs), model.teacher(inputs))


def test_the_teacher_follows_the_classifier_to_a_dtype(make):
    model = make()
    model.half()
    assert model.teacher.module.head.fc.weight.dtype == torch.float16
    model.to(torch.float64)
    assert model.teacher.module.head.fc.weight.dtype == torch.float64
    assert not model.teacher.module.head.fc.weight.requires_grad
    model.to("meta")
    assert model.teacher.module.head.fc.weight.is_meta


# --- an ImageClassifier otherwise ------------------------------------------------------------------------------------


def test_it_predicts_what_the_plain_classifier_predicts(make, small_network, small_batch):
    model = make(distill_loss={"type": "GKLLoss", "global_info": True}).eval()
    plain = ImageClassifier(**small_network()).eval()
    assert isinstance(model, ImageClassifier)
    weights = model.state_dict()
    extra = set(weights) - set(plain.state_dict())
    assert extra == {f"distill_loss.class_prior.{name}" for name in ("matrix", "sums", "counts")}
    assert set(make().state_dict()) == set(plain.state_dict())
    load_state_dict(plain, weights, strict=False)
    with torch.no_grad():
        ours, theirs = model.val_step(small_batch()), plain.val_step(small_batch())
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.pred_score, other.pred_score)
        assert torch.equal(mine.pred_label, other.pred_label)


# --- refusals --------------------------------------------------------------------------------------------------------

PRIOR = {"type": "IKLLoss", "global_info": True}
ATTACK = {"eps": "8/255", "steps": 1, "step_size": "8/255"}
MIXUP = {"train_cfg": {"augments": {"type": "Mixup", "alpha": 1.0}}}


# id: keywords of the classifier, error, the fragment that matters
REFUSED = {
    "foreign class count": ({"distill_loss": {**PRIOR, "num_classes": 5}}, ValueError, "head, 3, got num_classes=5"),
    "foreign module": ({"distill_loss": IKLLoss(num_classes=5)}, ValueError, "head, 3, got num_classes=5"),
    "name": ({"distill_loss": "IKLLoss"}, TypeError, "`distill_loss` must be a config dict or a module, got str"),
    "hard loss": (
        {"distill_loss": {"type": "CrossEntropyLoss"}},
        ValueError,
        "got CrossEntropyLoss. Use one of DKLLoss, IKLLoss, GKLLoss, KLLoss",
    ),
    "mixup": (
        {"distill_loss": PRIOR, **MIXUP},
        ValueError,
        "class prior of `distill_loss` .*`augments` of `train_cfg`.*global_info=False",
    ),
    "module": ({"distill_loss": nn.CrossEntropyLoss()}, ValueError, "between logits, got CrossEntropyLoss"),
    **{
        name: ({name: -1.0}, ValueError, f"Classifier: `{name}` must be a finite number of at least 0")
        for name in ("distill_weight", "warmup_epochs", "ce_weight")
    },
    **{
        f"{value} batches": ({"teacher_val_batches": value}, ValueError, f"must be a number of batches, got {value}")
        for value in (-1, 2.0, True)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(make, case):
    keywords, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make(**keywords)


# id: changes of the network, keywords of the classifier, whether an epoch has begun, samples, the fragment that matters
NONE = object()
SCORES = [DataSample().set_gt_label(1).set_gt_score([0.2, 0.8, 0.0])] * 6  # of a pipeline that mixes
SEVERAL = [DataSample().set_gt_label([0, 1]), *[DataSample().set_gt_label(1)] * 5]
BARE = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))  # tells its class count with its first logits
STEPS = {
    "prior": ({}, {"distill_loss": PRIOR}, False, NONE, r"global_info=True of `distill_loss` must .*IKLHook"),
    "ramp": ({}, {"warmup_epochs": 2}, False, NONE, "warmup_epochs=2 must know where epochs begin"),
    "both": ({}, {"distill_loss": PRIOR, "warmup_epochs": 2}, False, NONE, "`distill_loss` and warmup_epochs=2"),
    "scores": ({}, {"distill_loss": PRIOR}, True, SCORES, "`gt_score`.*or set global_info=False"),
    "no samples": ({}, {"distill_loss": PRIOR}, True, None, "must have a `gt_label`, which the class prior of"),
    "empty": ({}, {"distill_loss": PRIOR}, True, [], "must have a `gt_label`"),
    "no label": ({}, {"distill_loss": PRIOR}, True, [DataSample()] * 6, "must have a `gt_label`"),
    "two labels": ({}, {"distill_loss": PRIOR}, True, SEVERAL, "one class per sample, but some have none or several"),
    "classes": ({}, {"teacher": BARE}, True, NONE, r"got logits of shape \(6, 4\) and \(6, 3\)"),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_are_refused(make, small_network, small_batch, case):
    changes, keywords, begun, samples, message = STEPS[case]
    model = make(small_network() | changes, **keywords).train()
    inputs, own = prepared(model, small_batch())
    if begun:
        model.begin_epoch(1, 1)
    with pytest.raises(ValueError, match=f"(?s)DistillationClassifier: .*{message}"):
        model.loss(inputs, own if samples is NONE else samples)
    if not begun:
        model.eval().loss(inputs, own)  # no training, no epoch


def loss_of(name, **keywords):
    return {"type": "LinearClsHead", "num_classes": 3, "in_channels": 4, "loss": {"type": name, **keywords}}


SMOOTH = {"label_smooth_val": 0.1, "num_classes": 3}
# Heads of MMPretrain, and what is said of those that a softmax does not describe; None where one does.
SEVERAL_LABELS = "ClsHead, which has several labels"
HEADS = {
    "several labels": ({"type": "MultiLabelClsHead"}, SEVERAL_LABELS),
    "several, linear": ({"type": "MultiLabelLinearClsHead", "num_classes": 3, "in_channels": 4}, SEVERAL_LABELS),
    "residual attention": (
        {"type": "mmpretrain.CSRAClsHead", "num_classes": 3, "in_channels": 4, "num_heads": 1, "lam": 0.1},
        SEVERAL_LABELS,
    ),
    "two sets": ({"type": "ConformerHead", "num_classes": 3, "in_channels": [4, 4]}, "two sets of logits"),
    "binary": (loss_of("CrossEntropyLoss", use_sigmoid=True), "CrossEntropyLoss, which takes a sigmoid"),
    "asymmetric": (loss_of("AsymmetricLoss"), "AsymmetricLoss, which takes a sigmoid"),
    "focal": (loss_of("FocalLoss"), "FocalLoss, which takes a sigmoid"),
    "torch": (loss_of("torch.nn.BCEWithLogitsLoss"), "BCEWithLogitsLoss, which takes a sigmoid"),
    "smooth, several": (loss_of("LabelSmoothLoss", mode="multi_label", **SMOOTH), "mode='multi_label'"),
    "smooth, binary": (loss_of("LabelSmoothLoss", use_sigmoid=True, **SMOOTH), "Loss, which takes a sigmoid"),
    "smooth": (loss_of("LabelSmoothLoss", **SMOOTH), None),
    "classy vision": (loss_of("LabelSmoothLoss", mode="classy_vision", **SMOOTH), None),
    "soft": (loss_of("CrossEntropyLoss", use_soft=True), None),
    "asymmetric softmax": (loss_of("AsymmetricLoss", use_sigmoid=False), None),
    "seesaw": (loss_of("SeesawLoss", num_classes=3), None),
    "margins": ({"type": "ArcFaceClsHead", "num_classes": 3, "in_channels": 4}, None),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_without_one_softmax_are_refused_when_the_classifier_is_built(make, small_network, case):
    head, message = HEADS[case]
    network = small_network() | {"head": head}
    if message is None:
        assert make(network).head is not None
        assert head_fault(head) is None  # as adopt looks at it
        return
    assert message in head_fault(head).got
    rule = f"must give one set of softmax logits for one label of each image, got .*{message}"
    for build in (make, partial(AdversarialClassifier, attack=ATTACK, robust_loss={"type": "KLLoss"})):
        with pytest.raises(ValueError, match=rf"Classifier: `head` {rule}"):
            build(network) if build is make else build(**network)


def test_a_head_of_ones_own_is_known_by_its_base(make, small_network):
    class Own(MultiLabelClsHead):
        pass

    with pytest.raises(ValueError, match="got MultiLabelClsHead, which has several labels"):
        make(small_network() | {"head": Own()})


@pytest.mark.parametrize("warmup", [0, 1])
def test_what_needs_no_epoch_works_without_the_hook(make, small_batch, warmup):
    model = make(warmup_epochs=warmup).train()
    assert "loss_distill" in model.loss(*prepared(model, small_batch()))


def test_an_epoch_below_one_is_refused(make):
    with pytest.raises(ValueError, match=r"DistillationClassifier\.begin_epoch: `epoch` must be at least 1, got 0\."):
        make().begin_epoch(0, 3)


def test_the_class_count_comes_from_the_head_and_the_config_stays(make, small_network):
    config = dict(PRIOR)
    assert make(distill_loss=config).distill_loss.num_classes == 3
    assert config == PRIOR
    assert make(distill_loss={"type": "IKLLoss", "num_classes": 3}).distill_loss.num_classes == 3
    published = make(distill_loss={"type": "GKLLoss", "preset": "cifar100_distillation"})  # of 100 classes, with a ramp
    assert (published.distill_loss.class_prior.num_classes, published.warmup_epochs) == (3, 20)
    with pytest.raises(ValueError, match=r"must give `num_classes` with global_info=True, as ClsHead has none"):
        make({**small_network(), "head": {"type": "ClsHead"}}, distill_loss=PRIOR)


def test_networks_that_do_not_fit_are_refused(make, small_network, small_batch):
    with pytest.raises(ValueError, match=r"DistillationClassifier: `head` must be given, got None"):
        make({**small_network(), "head": None})
    with pytest.raises(ValueError, match=r"`teacher` must have the class count of the student, got 4 and 3"):
        make(teacher=ImageClassifier(**small_network(classes=4)))
    model = make()

    class ListHead(type(model.head)):
        def forward(self, feats):
            return [super().forward(feats)]

    model.head.__class__ = ListHead
    with pytest.raises(ValueError, match=r"`head` must give one tensor of logits, got a list"):
        model.train().loss(*prepared(model, small_batch()))


def test_every_argument_is_checked_once_in_a_training_step(make, small_batch, monkeypatch):
    calls = Counter()

    def counted(name, inner):
        return lambda *args, **keywords: calls.update([name]) or inner(*args, **keywords)

    for name in ("check_logits", "check_targets", "check_class_prior"):
        monkeypatch.setattr(_validation, name, counted(name, getattr(_validation, name)))
    monkeypatch.setattr(losses, "check_settings", counted("check_settings", losses.check_settings))
    model = make(distill_loss=PRIOR).train()
    model.begin_epoch(1, 1)
    calls.clear()
    model.loss(*prepared(model, small_batch()))
    assert calls == {"check_logits": 1, "check_targets": 1, "check_class_prior": 1, "check_settings": 1}


# --- the teacher's accuracy before training --------------------------------------------------------------------------


class Images(Dataset):
    """Labelled images, read with every random number generator there is."""

    def __init__(self, batch):
        self.batch = batch
        self.read = []

    def __len__(self):
        return len(self.batch["inputs"])

    def __getitem__(self, index):
        self.read.append(index)
        random.random()
        numpy.random.rand()
        torch.rand(1)
        return {key: values[index] for key, values in self.batch.items()}


def runner_with(data, **keywords):
    def collate(items):
        return {key: [item[key] for item in items] for key in items[0]}

    loader = DataLoader(data, batch_size=4, collate_fn=collate, **keywords)
    return SimpleNamespace(val_loop=SimpleNamespace(dataloader=loader))


def test_the_teachers_accuracy_is_logged_and_nothing_else_changes(make, small_batch, said):
    model = make(teacher_val_batches=10).train()
    with torch.no_grad():
        data = model.data_preprocessor(small_batch(images=60), False)
        labels = model.teacher(data["inputs"]).argmax(1).tolist()
    seen = [index for index in range(60) if index % 3 < 2]  # ten batches of four, spread over the set
    for wrong in (9, 10, 11, 12, 13, 14, 15):
        labels[wrong] = (labels[wrong] + 1) % 3
    images = Images(small_batch(images=60, labels=labels))
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    model.attach(runner_with(images))
    assert images.read == seen
    assert "accuracy on 40 validation images is 87.50 %; not known by its own test pipeline: `teacher` is" in said.text
    assert "not better than chance" not in said.text
    assert random.getstate() == states[0]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.attached
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_teacher_at_chance_is_warned_about(make, small_batch, said):
    constant = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    nn.init.zeros_(constant[1].weight)
    model = make(teacher=constant, teacher_val_batches=9)
    model.attach(runner_with(Images(small_batch(images=18)), shuffle=True))  # six of each class
    (warning,) = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    assert "the teacher is not better than chance (33.33 % of 3 classes; not known by its own" in warning


@pytest.mark.parametrize(
    ("case", "expected"),
    [("no loop", "has no `val_dataloader`"), ("no labels", "has no batches or no labels"), ("not asked", "")],
)
def test_a_teacher_that_cannot_be_tested_is_warned_about(make, small_batch, said, case, expected):
    model = make(teacher_val_batches=0 if case == "not asked" else 1)
    batch = small_batch()
    batch["data_samples"] = [DataSample() for _ in batch["inputs"]]
    model.attach(SimpleNamespace(val_loop=None) if case == "no loop" else runner_with(Images(batch)))
    assert expected in said.text
    assert bool(said.text) == bool(expected)
