"""Teachers in torchdistill: inputs of their own, heads that nobody has trained, and their accuracy before a run."""

import logging

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torch import nn
from torch.utils.data import TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.forward_proc import forward_batch_target
from torchdistill_boxes import CLASSES, CPU, loader, stage

from ikl_plugins.models import resnet8
from ikl_plugins.torchdistill import TeacherInput
from ikl_plugins.torchdistill.teacher import check_teacher, refuse_untrained

MEAN, STD, OTHER_MEAN, OTHER_STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25], [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
STUDENT = {"student_mean": MEAN, "student_std": STD}
SEQUENTIAL = torch.utils.data.SequentialSampler


def normalised(pixels, mean, std):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def data(teacher, count=24):
    """Images of 8x8 as the student gets them; their labels are what the teacher says of them at 12x12."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = teacher(F.interpolate(images, (12, 12), mode="bilinear", antialias=True)).argmax(1)
    return {"train": TensorDataset(normalised(images, MEAN, STD), labels)}


def box_with(teacher, datasets, wrapper=None):
    config = stage()
    if wrapper is not None:
        config["teacher"]["auxiliary_model_wrapper"] = {"key": "TeacherInput", "kwargs": wrapper}
    torch.manual_seed(4)
    student = resnet8(CLASSES)
    return get_distillation_box(teacher, student, datasets, config, CPU, None, False, lr_factor=1)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    made = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, CLASSES))
    made[1].weight.data *= 20
    return made


@pytest.mark.parametrize("size", [12, [12, 12]])
def test_the_wrapper_resizes_and_normalises_what_the_teacher_gets(size, teacher):
    pixels = torch.rand(4, 3, 8, 8)
    large = F.interpolate(pixels, (12, 12), mode="bilinear", antialias=True)
    for given, expected in (
        ({"mean": OTHER_MEAN, "std": OTHER_STD, **STUDENT}, normalised(large, OTHER_MEAN, OTHER_STD)),
        (STUDENT, large),
    ):
        wrapped = TeacherInput(teacher, size=size, **given)
        torch.testing.assert_close(wrapped(normalised(pixels, MEAN, STD)), teacher(expected), rtol=1e-4, atol=1e-4)


def test_torchdistill_s_own_box_teaches_through_it(teacher):
    datasets = data(teacher)
    box = box_with(teacher, datasets, {"size": 12, **STUDENT})
    images, targets = datasets["train"].tensors
    box.pre_epoch_process(epoch=0)
    loss = box.forward_process(images[:8], targets[:8], None)
    assert loss.isfinite()
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("case", ["right", "as in training", "chance", "no logits"])
def test_its_accuracy_is_told_and_near_chance_loudly(case, teacher, caplog):
    caplog.set_level(logging.INFO)
    datasets = data(teacher)
    if case == "chance":
        datasets["train"].tensors[1].add_(1).remainder_(CLASSES)
    box = box_with(teacher, datasets, {"size": 12, **STUDENT})
    if case == "as in training":  # of the images and the targets
        forward = box.teacher_model.forward
        box.teacher_model.forward = lambda images, targets: forward(images)
        box.teacher_forward_proc = forward_batch_target
    if case == "no logits":
        teacher[1].forward = lambda inputs: {"out": inputs}
    modes = [module.training for module in box.teacher_model.modules()]
    check_teacher(box, loader(SEQUENTIAL), datasets)
    assert [module.training for module in box.teacher_model.modules()] == modes
    warnings = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    if case in ("right", "as in training"):
        assert (
            "the teacher's accuracy on 24 validation images is 100.00; by its own test pipeline not known"
            in caplog.text
        )
    elif case == "no logits":
        assert "the teacher is not tested: it gives no logits" in caplog.text
    assert [f"the teacher is not better than chance (0.00 % of {CLASSES} classes" in text for text in warnings] == (
        [True] if case == "chance" else []
    )


def test_a_frozen_teacher_that_nobody_has_trained_is_refused():
    """One with pretrained weights and a random head, too; one that is trained along begins as it likes."""
    torch.manual_seed(0)
    weights = resnet8(CLASSES).state_dict()
    body = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    frozen = {"teacher": {"requires_grad": False}}

    def loaded(part):
        made = resnet8(CLASSES)
        made.load_state_dict(part, strict=False)
        return made

    for make, drawn in (
        (lambda: resnet8(CLASSES), r"conv1\.weight, .* and \d+ more are as they were drawn. Give it `src_ckpt:`"),
        (lambda: loaded(body), r"must be trained, but fc\.weight, fc\.bias are as"),
    ):
        with pytest.raises(ValueError, match=rf"^ikl train: the teacher .*{drawn}"):
            refuse_untrained(make(), {}, frozen, make)
        with pytest.raises(ValueError, match=r"^ikl train: the teacher must be trained"):
            refuse_untrained(make(), {}, {"stage1": frozen, "stage2": frozen}, make)
        for block, train in (
            ({"src_ckpt": "a.pt"}, frozen),
            ({}, {"teacher": {"src_ckpt": "a.pt", "requires_grad": False}}),
            ({}, {"teacher": {}}),
            ({}, {"stage1": {"teacher": {}}, "stage2": frozen}),
        ):
            refuse_untrained(make(), block, train, make)

    refuse_untrained(loaded(weights), {}, frozen, lambda: loaded(weights))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "12"}, "`size` must be a number or two"),
        ({"size": 0}, "`size`"),
        ({"mean": MEAN}, "`mean` and `std` must be given both"),
        ({"student_mean": [125.0] * 3, "student_std": STD}, "at most 1"),
    ],
)
def test_settings_that_are_refused(given, message, teacher):
    with pytest.raises((TypeError, ValueError), match=f"TeacherInput: .*{message}"):
        TeacherInput(teacher, **given)
