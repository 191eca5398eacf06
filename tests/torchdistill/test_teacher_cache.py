"""Teacher logits on disk in torchdistill: the same losses and class prior, and a teacher that sees each view once."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

pytest.importorskip("torchdistill.losses.registry", reason="the torchdistill adapter needs torchdistill")

from torchdistill.core.distillation import get_distillation_box
from torchdistill.datasets.registry import register_collate_func
from torchdistill_boxes import BATCH, CLASSES, CPU, IMAGES, PRIOR, stage, the_loss

from ikl_plugins.torchdistill import cached_forward

DEFAULT = "default_pre_epoch_process_with_teacher"
VIEWS, STEPS = 2, IMAGES // BATCH


class Noisy(Dataset):
    """Images whose augmentation draws from all generators."""

    def __getitem__(self, index):
        noise = random.random() + numpy.random.rand() + torch.rand(3, 4, 4)
        return index / IMAGES + noise, index % CLASSES

    def __len__(self):
        return IMAGES


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, CLASSES)
        self.asked = 0

    def forward(self, images):
        self.asked += 1
        return self.fc(images.flatten(1))


def box_of(forward, data=None, *, views=VIEWS, workers=0, **changes):
    config = stage(epochs=4, **PRIOR)
    config["optimizer"]["kwargs"]["lr"] = 1e-3
    config["teacher"] |= {"forward_proc": forward, **changes.pop("teacher", {})}
    config["train_data_loader"] |= {
        "dataset_wrapper": {"key": "ikl_plugins.FixedViews", "kwargs": {"views": views}},
        "kwargs": {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0},
    }
    config["train_data_loader"] |= changes.pop("train_data_loader", {})
    config |= changes
    torch.manual_seed(0)
    teacher, student = Teacher(), nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    box = get_distillation_box(teacher, student, {"train": data or Noisy()}, config, CPU, None, False, 1)
    box.counted = teacher
    return box


def trained(box, epochs=4):
    """The losses of the batches, how often the teacher was asked in each epoch, and the class prior at the end."""
    losses, asked = [], []
    for epoch in range(epochs):
        before = box.counted.asked
        box.pre_epoch_process(epoch=epoch)
        torch.manual_seed(100 + epoch)  # the order of the images
        for x, y, extra in box.train_data_loader:
            losses.append(box.forward_process(x, y, extra))
            box.post_forward_process(loss=losses[-1])
        asked.append(box.counted.asked - before)
    return torch.stack(losses).detach(), asked, the_loss(box).class_prior.matrix


@pytest.mark.parametrize("workers", [0, 1])
def test_losses_and_prior_are_those_of_the_teacher_itself(tmp_path, workers):
    forward = cached_forward(str(tmp_path))
    losses, asked, prior = trained(box_of("forward_batch_only", workers=workers))
    assert asked == 4 * [STEPS]
    for expected in ([STEPS, STEPS, 0, 0], [1, 0, 0, 0]):
        found, asked, kept = trained(box_of(forward, workers=workers))
        assert asked == expected
        torch.testing.assert_close(found, losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(kept, prior, rtol=0, atol=1e-6)


def test_other_teachers_and_images_have_other_folders_and_float16_is_half(tmp_path):
    for number, changes in enumerate(({}, {"views": 3}, {"data": type("Other", (Noisy,), {})()}, {}), 1):
        box = box_of(cached_forward(str(tmp_path / "kept")), **changes)
        box.counted.fc.bias.data[0] += number == 4
        assert trained(box, epochs=1)[1] == [STEPS]
        assert len(list(tmp_path.glob("kept/*/logits.bin"))) == number
    losses, *_ = trained(box_of(cached_forward(str(tmp_path / "half"), "float16")))
    (file,) = tmp_path.glob("half/*/logits.bin")
    assert file.stat().st_size == VIEWS * IMAGES * (2 * CLASSES + 4)
    torch.testing.assert_close(losses, trained(box_of("forward_batch_only"))[0], rtol=0, atol=1e-2)


# id: changes of the box, the fragment that matters
@register_collate_func
def mixed(batch):
    images, labels, extra = default_collate(batch)
    return images.roll(1, 0) / 2 + images / 2, labels, extra


REFUSED = {
    "mixed": ({"train_data_loader": {"collate_fn": "mixed"}}, "must hold the images of the data set"),
    "no views": (
        {"train_data_loader": {"dataset_wrapper": None}},
        "(?s)must recur, got BaseDatasetWrapper.*FixedViews",
    ),
    "hooks": ({"teacher": {"forward_hook": {"output": ["fc"]}}}, "frozen and give logits alone, got forward hooks"),
    "trained": ({"teacher": {"requires_grad": True}}, "got one that is trained"),
    "no process": ({"pre_epoch_process": DEFAULT}, "(?s)must know where epochs begin.*ikl_pre_epoch_process"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_boxes_that_are_refused(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        trained(box_of(cached_forward(str(tmp_path)), **changes), epochs=1)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="unknown `dtype` `int8`"):
        cached_forward("folder", "int8")
    with pytest.raises(ValueError, match="`views` must be an integer of at least 1, got 0"):
        box_of("forward_batch_only", views=0)
