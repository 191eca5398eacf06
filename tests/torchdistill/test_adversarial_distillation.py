"""Adversarial distillation through torchdistill's box: the published codes by hand in float64, the attack included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

import torchdistill_boxes as boxes
from distillation_by_hand import STEPS, attack_by_hand, pairwise_mse, soft_ce
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill_boxes import CPU, the_loss

from ikl_plugins.torchdistill import adversarial_forward
from ikl_plugins.torchdistill.adversarial import TeacherForward
from ikl_plugins.torchdistill.run_settings import record_settings
from ikl_plugins.torchdistill.teacher_cache import ROW

CLASSES, IMAGES = 10, 6
MEAN, STD = 0.4, 0.25
ATTACK = {"mean": [MEAN] * 3, "std": [STD] * 3, "steps": STEPS}
SETTINGS = {"eps": "8/255", "step_size": "2/255", "random_start": "normal"}  # beside them, where no preset has them


def net(seed):
    torch.manual_seed(seed)
    first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(24, CLASSES)).double()


def data():
    generator = torch.Generator().manual_seed(7)
    pixels = torch.rand(IMAGES, 3, 6, 6, generator=generator, dtype=torch.float64)
    # The uniform start of ARD's code may leave [0, 1], ours does not; these stay inside.
    return 0.05 + 0.9 * pixels, torch.randint(CLASSES, (IMAGES,), generator=generator)


def normalise(pixels):
    return (pixels - MEAN) / STD


def make_box(forward, key="DKLLoss", process=boxes.OURS, **loss):
    """A box, and its first epoch begun."""
    config = boxes.stage(key, term="term", epochs=4, process=process, **{"num_classes": CLASSES, **loss})
    config["student"] = {"forward_proc": adversarial_forward(**ATTACK, **forward)}
    pixels, labels = data()
    dataset = {"train": TensorDataset(normalise(pixels), labels)}
    box = get_distillation_box(net(1), net(2), dataset, config, CPU, None, False, 1)
    box.pre_epoch_process(epoch=0)
    return box


# --- the authors' codes ----------------------------------------------------------------------------------------------


def mean_kl(student, teacher):
    """``nn.KLDivLoss()`` of the authors' codes: a mean over batch and classes."""
    p = torch.softmax(teacher, 1)
    return (p * (p.log() - torch.log_softmax(student, 1))).mean()


class OnPixels(nn.Module):
    """A network on pixels."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, pixels):
        return self.model(normalise(pixels))


def ard(student, teacher, x, y):
    x_adv = attack_by_hand(student, x, lambda net, z: F.cross_entropy(net(z), y), uniform=True, training=True)
    outputs = student(x_adv)
    student(x)  # the natural forward of the code moves the statistics; alpha = 1 leaves its cross entropy out
    return 30.0 * 30.0 * mean_kl(outputs / 30.0, teacher(x).detach() / 30.0)


def rslad(student, teacher, x, y):
    labels = teacher(x).detach()
    x_adv = attack_by_hand(student, x, lambda net, z: mean_kl(net(z), labels))
    return 5 / 6 * mean_kl(student(x_adv), labels) + 1 / 6 * mean_kl(student(x), labels)


def adaad(student, teacher, x, y):
    x_adv = attack_by_hand(student, x, lambda net, z: mean_kl(net(z), teacher(z)))
    student(x)
    return mean_kl(student(x_adv), teacher(x_adv).detach())


def networks(box):
    return OnPixels(box.student_model), OnPixels(box.teacher_model).eval()


def held_against(box, expected, student, value=True):
    """A step of the box has the gradients of the one by hand, its statistics, and with ``value`` its loss."""
    pixels, labels = data()
    expected.backward()
    torch.manual_seed(5)
    loss = box.forward_process(normalise(pixels), labels)
    loss.backward()
    if value:
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(box.student_model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)
    for ours, theirs in zip(box.student_model.buffers(), student.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [ard, rslad, adaad], ids=lambda method: method.__name__)
def test_a_step_of_a_preset_is_that_of_the_authors_code(method):
    name = method.__name__
    box = make_box({"preset": name}, preset=name)
    student, teacher = networks(box)
    held_against(box, method(student, teacher, *data()), student, value=False)  # DKL's is another, as constants differ


def test_ikl_takes_the_place_of_kl_with_a_prior_of_the_teachers_predictions():
    box = make_box({"preset": "rslad-ikl", "objective": "ikl"}, "IKLLoss", preset="rslad-ikl")
    found = the_loss(box).class_prior
    prior = torch.rand(CLASSES, CLASSES, generator=torch.Generator().manual_seed(3)).softmax(1)
    found.matrix.copy_(prior)
    x, y = data()
    student, teacher = networks(box)
    soft, rows = teacher(x).detach(), prior.double()[y]
    x_adv = attack_by_hand(student, x, lambda net, z: soft_ce(net(z), soft) + pairwise_mse(net(z), soft, rows))

    def ikl(logits):
        return 5 / 60 * soft_ce(logits, soft) + 25 / 60 * pairwise_mse(logits, soft, rows)

    held_against(box, ikl(student(x_adv)) + 0.2 * ikl(student(x)), student)
    means = torch.stack([torch.softmax(soft / 4.0, 1)[y == label].mean(0) for label in y.unique()])
    torch.testing.assert_close(found.matrix[y.unique()].double(), means, rtol=1e-6, atol=1e-7)  # the epoch is over


LOSSES = {
    "kl": ("DKLLoss", {}, lambda s, t: CLASSES * mean_kl(s, t)),
    "dkl": ("DKLLoss", {"alpha": 2.0, "beta": 0.0}, lambda s, t: 2 * soft_ce(s, t)),
    "ikl": ("IKLLoss", {"beta": 3.0}, lambda s, t: soft_ce(s, t) + 3 * pairwise_mse(s, t, t.softmax(1))),
    "gkl": (
        "GKLLoss",
        {"gamma": 2.0},
        lambda s, t: (
            soft_ce(s, t) + IMAGES * pairwise_mse(s, t, t.softmax(1) ** 2) / (t.softmax(1) ** 2).sum(1).square().sum()
        ),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("objective", ["soft_cross_entropy", "ikl", "cross_entropy"])
@pytest.mark.parametrize(("view", "reference"), [(a, b) for a in ("natural", "adversarial") for b in boxes.ROLES])
def test_every_loss_objective_view_and_reference(loss, objective, view, reference):
    key, keywords, formula = LOSSES[loss]
    first = loss in ("kl", "gkl")  # the order of the forwards moves the statistics
    forward = {"teacher_view": view, "attack_reference": reference, "objective": objective, "natural_first": first}
    box = make_box({**SETTINGS, **forward}, key, teacher_natural_weight=0.5, ce_weight=0.25, **keywords)
    x, y = data()
    student, teacher = networks(box)
    frozen = copy.deepcopy(student).eval()(x).detach() if reference == "student" else teacher(x).detach()

    def of_attack(net, z):
        if objective == "cross_entropy":
            return F.cross_entropy(net(z), y)
        soft = teacher(z) if (view, reference) == ("adversarial", "teacher") else frozen
        if objective == "soft_cross_entropy":
            return mean_kl(net(z), soft)
        return soft_ce(net(z), soft) + pairwise_mse(net(z), soft, soft.softmax(1).detach())

    x_adv = attack_by_hand(student, x, of_attack)
    seen = teacher(x_adv if view == "adversarial" else x).detach()
    order = [x, x_adv] if first else [x_adv, x]
    outputs = [student(images) for images in order]
    natural, adversarial = outputs if first else reversed(outputs)
    expected = 0.25 * F.cross_entropy(natural, y) + formula(adversarial, seen)
    held_against(box, expected + 0.5 * formula(natural, teacher(x).detach()), student, value=loss != "kl")


# --- the teacher's passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "passes"),
    [
        ("ard", {}, 1),
        ("rslad", {}, 1),
        ("adaad", {}, STEPS + 1),
        ("adaad", {"teacher_natural_weight": 0.5}, STEPS + 2),
    ],
)
def test_no_more_passes_of_the_teacher_than_needed(preset, changes, passes):
    box = make_box({"preset": preset}, preset=preset, **changes)
    box.pre_epoch_process(epoch=1)  # wraps the teacher's process once
    seen = []
    box.teacher_model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    before = copy.deepcopy(box.teacher_model.state_dict())
    x, y = data()
    box.post_forward_process(loss=box.forward_process(normalise(x), y))
    assert (len(seen), sum(seen)) == (passes, STEPS * (preset == "adaad"))  # a graph for the attack on both alone
    assert all(torch.equal(value, before[name]) for name, value in box.teacher_model.state_dict().items())
    assert all(parameter.grad is None for parameter in box.teacher_model.parameters())


def test_a_cache_of_logits_is_not_asked_for_adversarial_images():
    asked = []
    forward = TeacherForward(lambda model, images, y, supp: asked.append(supp) or model(images), natural=True)
    x, y = data()
    forward(net(1), x, y, {ROW: 1, "id": 2})
    forward.logits(x)
    assert asked == [{ROW: 1, "id": 2}, {"id": 2}]


def test_a_resumed_run_knows_the_teachers_view():
    attack = record_settings(make_box({"preset": "adaad"}, preset="adaad"))["attack"]
    assert (attack["teacher_view"], attack["by_teacher"], attack["natural_first"]) == ("adversarial", True, True)


# --- refusals --------------------------------------------------------------------------------------------------------


def alone():
    config = boxes.stage("DKLLoss", term="term", num_classes=CLASSES)
    config["model"] = {**config.pop("student"), "forward_proc": adversarial_forward(**ATTACK, preset="rslad")}
    del config["teacher"]
    x, y = data()
    box = get_training_box(net(2), {"train": TensorDataset(normalise(x), y)}, config, CPU, None, False, 1)
    box.pre_epoch_process(epoch=0)
    return box


def trained_along():
    box = make_box({"preset": "rslad"})
    box.teacher_updatable = True
    box.student_forward_proc.teacher_view = "adversarial"
    box.pre_epoch_process(epoch=1)


WITHOUT_OURS = "default_pre_epoch_process_with_teacher"
REFUSED = {
    "preset": (lambda: make_box({"preset": "rsald"}), "unknown preset `rsald`. Did you mean `rslad`"),
    "view": (lambda: make_box({"preset": "ard", "teacher_view": "both"}), "unknown `teacher_view` `both`"),
    "reference": (lambda: make_box({"preset": "ard", "attack_reference": "x"}), "unknown `attack_reference` `x`"),
    "no view": (lambda: make_box({**SETTINGS, "attack_reference": "teacher"}), "goes with `teacher_view`, got None"),
    "no teacher": (alone, "`teacher_view` must have a `teacher_model:`"),
    "no process": (lambda: make_box({"preset": "rslad"}, process=WITHOUT_OURS), r"\n  pre_epoch_process: 'ikl_pre"),
    "trained along": (trained_along, "a teacher of adversarial images must be frozen"),
    "hook": (
        lambda: make_box({"preset": "adaad"}, teacher_module_path="5"),
        r"`teacher_module_path` must be '\.' in adversarial training",
    ),
    "weight": (lambda: make_box({"preset": "ard"}, teacher_natural_weight=-1.0), "`teacher_natural_weight` must be"),
    "other loss": (lambda: make_box({"preset": "ard"}, "IKLLoss", preset="ard"), "got 'ard'. Use DKLLoss"),
    "classes": (
        lambda: make_box({"preset": "ard"}, num_classes=None, preset="ard"),
        "`num_classes` must be an integer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, message = REFUSED[case]
    x, y = data()
    with pytest.raises((TypeError, ValueError), match=message):
        make().forward_process(normalise(x), y)


def test_the_natural_weight_goes_with_adversarial_images():
    box = make_box({"preset": "ard"}, teacher_natural_weight=0.5)
    box.student_forward_proc = box.teacher_forward_proc.process
    x, y = data()
    with pytest.raises(ValueError, match="`teacher_natural_weight` goes with a teacher and adversarial images"):
        box.forward_process(normalise(x), y)
