"""Adversarial training through torchdistill's boxes: the two views, the attack in pixel space, its epochs, refusals."""

import copy
import logging
import re

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

import torchdistill_boxes as boxes
from torch.distributed.fsdp import FullyShardedDataParallel
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT
from torchdistill.core.training import get_training_box
from torchdistill_boxes import BATCH, CLASSES, CPU, IMAGES, PRIOR, the_loss, train_epoch

from ikl_plugins.adversarial import PGD
from ikl_plugins.torchdistill import adversarial_forward

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NORMALISED = {"mean": list(MEAN), "std": list(STD)}
WEAK = {"eps": "8/255", "steps": 2, "step_size": "4/255"}


def net(seed=2):
    torch.manual_seed(seed)
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(72, CLASSES))


def channels(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).reshape(-1, 1, 1)


def normalise(pixels):
    return (pixels - channels(MEAN, pixels.dtype)) / channels(STD, pixels.dtype)


def images():
    generator = torch.Generator().manual_seed(7)
    pixels = torch.rand(IMAGES, 3, 6, 6, generator=generator)
    return pixels, torch.randint(CLASSES, (IMAGES,), generator=generator)


def dataset():
    pixels, labels = images()
    return TensorDataset(normalise(pixels), labels)


def stage(key="IKLLoss", *, epochs=4, attack=WEAK, **settings):
    """The `train:` block of adversarial training."""
    config = boxes.stage(key, term="term", epochs=epochs, **settings)
    del config["teacher"], config["student"]
    config["model"] = {"forward_proc": adversarial_forward(**NORMALISED, **attack)}
    return config


def make_box(config, model=None, distributed=False):
    return get_training_box(model or net(), {"train": dataset()}, config, CPU, None, distributed, 1)


class Record:
    """What a network has seen and given: (its mode, input, output) of each forward."""

    def __init__(self, model):
        self.forwards = []
        model.register_forward_hook(lambda module, inputs, output: self.note(module.training, *inputs, output))

    def note(self, training, inputs, output):
        self.forwards.append((training, inputs.detach().clone(), output.detach().clone()))

    @property
    def adversarial(self):
        """The input of the last batch but one forward: that of the adversarial images."""
        return self.forwards[-2][1]


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["DKLLoss", "IKLLoss", "GKLLoss"])
def test_a_step_is_that_of_the_formula(key):
    settings = {"alpha": 4.0, "beta": 20.0}
    if key != "DKLLoss":
        settings["weight_temperature"] = 4.0
    box = make_box(stage(key=key, ce_weight=1.5, **settings))
    wide = copy.deepcopy(box.model).double().train()
    record = Record(box.model)
    x, y = dataset()[:BATCH]
    box.pre_epoch_process(epoch=0)
    loss = box.forward_process(x, y)

    # The authors' order; float64, on the images that were crafted.
    adversarial, natural = wide(record.adversarial.double()), wide(x.double())
    expected = oracles.decoupled(key[:3].lower(), adversarial, natural, **settings)
    rows = torch.arange(BATCH)
    value = expected.loss("batchmean") - 1.5 * natural.log_softmax(1)[rows, y].mean()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-5)

    entropy_pull = (natural.softmax(1) - F.one_hot(y, CLASSES)) / BATCH
    torch.autograd.backward(
        [adversarial, natural],
        [expected.student_gradient / BATCH, expected.teacher_gradient / BATCH + 1.5 * entropy_pull],
    )
    box.post_forward_process(loss=loss)
    for ours, theirs in zip(box.model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs - 0.1 * theirs.grad, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(box.model.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
    assert box.model[1].num_batches_tracked == 2  # both views, and not the attack


@pytest.mark.parametrize(
    "attack",
    [
        {**WEAK, "objective": "soft_cross_entropy", "random_start": "normal"},
        {**WEAK, "objective": "ikl"},
        {**WEAK, "objective": "cross_entropy", "norm": "l2", "eps": 0.5, "model_mode": "train"},
        {"eps": "64/255", "eps_ramp": 1.0, "budget": "high"},
    ],
)
def test_the_attack_is_that_of_the_package_in_pixel_space(attack):
    box = make_box(stage(attack=attack))
    bare = copy.deepcopy(box.model)
    record = Record(box.model)
    pixels, y = images()
    box.pre_epoch_process(epoch=1)
    torch.manual_seed(5)
    box.forward_process(normalise(pixels), y)
    ours = record.adversarial * channels(STD) + channels(MEAN)
    pgd = PGD(**attack)
    strength = pgd.strength(2, 4)
    torch.manual_seed(5)
    expected = pgd(bare, pixels, forward=lambda one: bare(normalise(one)), labels=y, strength=strength)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    moved = (ours - pixels).abs()
    assert moved.max() > strength.eps / 4
    if pgd.norm == "linf":
        assert moved.max() <= strength.eps + 1e-5
    assert ours.min() >= -1e-6
    assert ours.max() <= 1 + 1e-6
    # The natural logits of the attack come once, each step has a forward, and then both views train.
    first = pgd.objective != "cross_entropy"
    trained = [training for training, *_ in record.forwards]
    assert trained == [attack.get("model_mode") == "train"] * (first + strength.steps) + [True, True]
    assert torch.equal(record.forwards[-1][1], normalise(pixels))


# --- epochs and the class prior --------------------------------------------------------------------------------------


def test_eps_and_steps_follow_the_epochs_of_each_stage():
    attack = {"eps": 0.4, "eps_ramp": 1.0, "budget": "high"}
    second = {**WEAK, "eps": 0.2, "eps_ramp": 1.0}
    config = {"stage1": stage(attack=attack), "stage2": stage(attack=second, epochs=2)}
    box, other = make_box(config), make_box(config)
    assert box.model_forward_proc.strength is None
    strengths = []
    for epoch in range(6):
        box.pre_epoch_process(epoch=epoch)
        strengths.append(box.model_forward_proc.strength)
        x, y = dataset()[:BATCH]
        box.post_forward_process(loss=box.forward_process(x, y))
        box.post_epoch_process()
    expected = [(0.1, 2, 0.1), (0.2, 3, 0.2 * 2 / 3), (0.3, 4, 0.15), (0.4, 5, 0.2)]
    expected += [(0.1, 2, 2 / 255), (0.2, 2, 4 / 255)]
    torch.testing.assert_close(torch.tensor(strengths), torch.tensor(expected))
    # A box of the same settings has its own epochs.
    other.pre_epoch_process(epoch=1)
    assert other.model_forward_proc.strength == strengths[1]


def test_the_prior_holds_the_natural_predictions_of_the_training_forward():
    box = make_box(stage(**PRIOR))
    record = Record(box.model)
    x, y = dataset().tensors
    torch.testing.assert_close(the_loss(box).class_prior.matrix, torch.full((CLASSES, CLASSES), 0.25))
    train_epoch(box, 0)
    assert the_loss(box).class_prior.counts.sum() == 0
    rows = [
        (y[(x == image).flatten(1).all(1)], (logits / 2.0).softmax(0))
        for _, batch, output in record.forwards[3::4]  # two steps, adversarial, natural
        for image, logits in zip(batch, output, strict=True)
    ]
    assert len(rows) == IMAGES
    by_class = ([row for label, row in rows if label == one] for one in range(CLASSES))
    expected = torch.stack([torch.stack(some).mean(0) for some in by_class])
    torch.testing.assert_close(the_loss(box).class_prior.matrix, expected)

    # The next epoch uses it.
    box.pre_epoch_process(epoch=1)
    loss = box.forward_process(x, y)
    wanted = oracles.decoupled(
        "ikl", record.forwards[-2][2].double(), record.forwards[-1][2].double(), class_prior=expected[y].double()
    )
    torch.testing.assert_close(loss.double(), wanted.loss("batchmean"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["ikl", "soft_cross_entropy"])
def test_the_class_prior_weighs_the_objective_ikl_alone(objective):
    attack = {"eps": 0.2, "steps": 3, "step_size": 0.1, "objective": objective, "random_start": "normal"}
    box = make_box(stage(attack=attack, **PRIOR))
    train_epoch(box, 0)
    box.pre_epoch_process(epoch=1)
    bare, record = copy.deepcopy(box.model), Record(box.model)
    x, y = dataset().tensors
    rows = the_loss(box).class_prior.matrix[y].clone()
    torch.manual_seed(5)
    box.forward_process(x, y)
    ours = record.adversarial * channels(STD) + channels(MEAN)
    found = []
    for prior in (rows, None):
        torch.manual_seed(5)
        pgd = PGD(**attack)
        pixels = x * channels(STD) + channels(MEAN)
        found.append(pgd(bare, pixels.clamp(0, 1), forward=lambda one: bare(normalise(one)), class_prior=prior))
    assert (ours - found[0]).abs().mean() < 1e-4  # a sign may differ where a gradient is nearly 0
    assert bool((found[0] - found[1]).abs().mean() > 1e-3) is (objective == "ikl")


# --- beside a teacher ------------------------------------------------------------------------------------------------


FROZEN = {"requires_grad": False}


def distillation_box(teacher, attack=WEAK, **loss):
    config = boxes.stage(epochs=4, **loss)
    attacked = {"forward_proc": adversarial_forward(**NORMALISED, **attack)}
    config.update(student=attacked, teacher={**(attacked if teacher == "attacked" else config["teacher"]), **FROZEN})
    return get_distillation_box(net(1), net(2), {"train": dataset()}, config, CPU, None, False, 1)


def test_a_teacher_takes_the_place_of_the_natural_logits():
    box = distillation_box("natural", ce_weight=1.0, attack={**WEAK, "eps_ramp": 1.0})
    student = Record(box.student_model)
    x, y = dataset()[:BATCH]
    box.pre_epoch_process(epoch=2)
    assert box.student_forward_proc.strength.eps == pytest.approx(8 / 255 * 3 / 4)
    loss = box.forward_process(x, y)
    (_, _, adversarial), (_, _, natural) = student.forwards[-2:]
    with torch.no_grad():
        teacher = box.teacher_model(x)
    expected = oracles.decoupled("ikl", adversarial.double(), teacher.double()).loss("batchmean")
    expected += F.cross_entropy(natural.double(), y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_same_settings_are_registered_once(monkeypatch):
    key = adversarial_forward(eps="8/255", budget="low", **NORMALISED)
    assert key == (
        "ikl_plugins.adversarial_forward(budget='low', eps='8/255', mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])"
    )
    held = FORWARD_PROC_FUNC_DICT[key]
    assert "eps=0.0313" in repr(held)
    assert adversarial_forward(budget="low", **NORMALISED, eps="8/255") == key
    other = adversarial_forward(eps="9/255", budget="low", **NORMALISED)
    assert FORWARD_PROC_FUNC_DICT[key] is held
    assert FORWARD_PROC_FUNC_DICT[other].attack.eps == pytest.approx(9 / 255)
    monkeypatch.setitem(FORWARD_PROC_FUNC_DICT, other, print)
    with pytest.raises(ValueError, match=r"must be free, but <built-in function print> holds it"):
        adversarial_forward(eps="9/255", budget="low", **NORMALISED)
    assert FORWARD_PROC_FUNC_DICT[other] is print


# --- batches and models that do not fit ------------------------------------------------------------------------------


class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return {"out": self.body(x), "aux": x}


def sharded():
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    return model


# id: settings, network, what is made of the pixels and labels, error, the fragment that matters
BATCHES = {
    "not told": ({}, net, normalise, ValueError, r"in \[0, 1\], got values from -.*Give `mean` and `std`"),
    "bytes": (NORMALISED, net, lambda x: 255 * x, ValueError, r"once mean and std are undone"),
    "channels": (NORMALISED, net, lambda x: x[:, :2], ValueError, r"one number per channel, got 3"),
    "nan": (NORMALISED, net, lambda x: x * torch.nan, ValueError, r"got values from nan"),
    "empty": ({}, net, lambda x: x[:0], ValueError, r"must be a batch"),
    "dark": ({}, net, lambda x: x / 2 - 0.005, ValueError, r"got values from -0\.00"),
    "light": ({}, net, lambda x: x / 2 + 0.505, ValueError, r"got values from 0\.5\d* to 1\.00"),
    "uint8": ({}, net, lambda x: (255 * x).byte(), TypeError, r"floating dtype .*, got torch\.uint8"),
    "list": ({}, net, lambda x: [1, 2], TypeError, r"must be a torch\.Tensor, got list"),
    "no labels": ({"objective": "cross_entropy"}, net, torch.clone, ValueError, r"`labels` must be given"),
    "dict": ({}, DictNet, torch.clone, ValueError, r"a dict with the keys 'out', 'aux'"),
    "shards": ({}, sharded, torch.clone, ValueError, r"whole in each process, got FullyShardedDataParallel"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_does_not_fit_is_refused(case):
    settings, make, change, error, message = BATCHES[case]
    pixels, y = images()
    forward = FORWARD_PROC_FUNC_DICT[adversarial_forward(**WEAK, **settings)]
    model = make()
    with pytest.raises(error, match=message):
        forward(model, change(pixels), None if case == "no labels" else y)
    assert all(module.training for module in model.modules())


# id: changes of the settings, error, the fragment that matters
SETTINGS = {
    "name": (
        {"step_sizes": 1},
        TypeError,
        "unknown keyword `step_sizes`. Did you mean `step_size`? Known: attack_reference, budget, eps",
    ),
    "name of ours": ({"means": [0.5]}, TypeError, "Did you mean `mean`?"),
    "no number": ({"eps": None}, TypeError, "PGD: `eps` must be a finite number above 0, got None"),
    "mean alone": ({"mean": [0.5]}, ValueError, "adversarial_forward: `mean` and `std` must be given both"),
    "bytes": ({"mean": [123.7], "std": [58.4]}, ValueError, "adversarial_forward: `mean` must hold numbers of at most"),
}


def test_settings_that_do_not_fit_are_refused():
    before = set(FORWARD_PROC_FUNC_DICT)
    for change, error, message in SETTINGS.values():
        with pytest.raises(error, match=re.escape(message)):
            adversarial_forward(**{**WEAK, **change})
    with pytest.raises(TypeError, match=r"adversarial_forward: `eps` must be given"):
        adversarial_forward(budget="low")
    assert set(FORWARD_PROC_FUNC_DICT) == before


def hooked(role):
    config = stage(**{f"{role}_module_path": "7"})
    config["model"]["forward_hook"] = {"output": ["7"]}
    return make_box(config)


def two_priors():
    config = stage(attack={**WEAK, "objective": "ikl"}, **PRIOR)
    terms = config["criterion"]["kwargs"]["sub_terms"]
    terms["other"] = copy.deepcopy(terms["term"])
    return make_box(config)


def changing(process):
    return make_box(stage(process=process, attack={**WEAK, "eps_ramp": 0.5}))


WITHOUT_OURS = "default_pre_epoch_process_without_teacher"
BOXES = {
    "hook of the student": (lambda: hooked("student"), r"`student_module_path` must be '\.' in adversarial training"),
    "hook of the teacher": (lambda: hooked("teacher"), r"`teacher_module_path` must be '\.' in adversarial training"),
    "teacher": (lambda: distillation_box("attacked"), "a teacher must see natural images"),
    "two priors": (two_priors, "got those of term, other"),
    "no process": (lambda: changing(None), r"must know where epochs begin(.|\n)*\n  pre_epoch_process: 'ikl_pre"),
    "another process": (lambda: changing(WITHOUT_OURS), r"where epochs begin(.|\n)*\n  pre_epoch_process: 'ikl_pre"),
}


@pytest.mark.parametrize("case", BOXES)
def test_a_config_that_does_not_fit_is_refused(case):
    make, message = BOXES[case]
    box = make()
    with pytest.raises(ValueError, match=message):
        train_epoch(box, 0)


def test_what_is_next_to_a_refusal_works():
    """Labels where nothing uses them, one number for all channels, rounding, a strength that stays without epochs."""
    pixels, y = images()
    views = FORWARD_PROC_FUNC_DICT[adversarial_forward(**WEAK, objective="ikl")](net(), pixels)
    assert not torch.equal(views.natural, views.adversarial)
    forward = FORWARD_PROC_FUNC_DICT[adversarial_forward(**WEAK, mean=[0.5], std=[0.25])]
    model = net().bfloat16()
    record = Record(model)
    edge = pixels.round().bfloat16()
    forward(model, (edge - 0.5) / 0.25 * 1.01, y)
    assert (record.adversarial * 0.25 + 0.5 - edge).abs().max() <= 8 / 255 + 0.02
    train_epoch(make_box(stage(process=WITHOUT_OURS)), 0)


@pytest.mark.parametrize(("mean", "warned"), [([0.25], True), ([0.0], False)])
def test_images_that_seem_not_normalised_are_warned_of_once(caplog, mean, warned):
    pixels, y = images()
    forward = FORWARD_PROC_FUNC_DICT[adversarial_forward(eps=0.02, steps=1, step_size=0.02, mean=mean, std=[0.5])]
    said = []
    with caplog.at_level(logging.WARNING, logger="ikl_plugins"):
        # In the first epoch, in a later one, and where nobody tells the epoch.
        for told in (forward.in_epoch(1, 2), forward.in_epoch(2, 2), copy.copy(forward)):
            caplog.clear()
            for _ in range(2):
                told(net(), pixels, y)
            said.append(sum("no pixel is darker than `mean`" in record.message for record in caplog.records))
    assert said == [warned, 0, warned]


# --- several ranks: what one process can see of it -------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
def test_the_wrapper_sees_the_adversarial_images_alone():
    settings = {"global_info": True, "num_classes": CLASSES, "ce_weight": 1.0}
    boxes = [make_box(stage(**settings), distributed=distributed) for distributed in (True, False)]
    for box in boxes:
        torch.manual_seed(5)
        box.pre_epoch_process(epoch=0)
        if box.distributed:
            record = Record(box.model)
            assert isinstance(box.model, DistributedDataParallel)
        x, y = dataset()[:BATCH]
        for _ in range(2):
            box.post_forward_process(loss=box.forward_process(x, y))
    assert len(record.forwards) == 2
    assert not torch.equal(record.forwards[0][1], x)
    wrapped, lone = boxes
    for name, value in lone.model.state_dict().items():
        torch.testing.assert_close(wrapped.model.module.state_dict()[name], value, msg=name)
