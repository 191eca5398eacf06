"""Stages of a torchdistill config for the adapter's tests, and an epoch of a box as upstream's script trains it."""

import torch
from torch.utils.data import RandomSampler, SequentialSampler

from ikl_plugins.torchdistill import find_losses

CLASSES, IMAGES, BATCH = 4, 24, 8
CPU = torch.device("cpu")
OURS = "ikl_pre_epoch_process"
ROLES = ("student", "teacher")
PLACES = {f"{role}_module_{part}": place for role in ROLES for part, place in (("path", "."), ("io", "output"))}
PRIOR = {"global_info": True, "num_classes": CLASSES, "weight_temperature": 2.0}


def loader(sampler):
    return {
        "dataset_id": "train",
        "sampler": {"class_or_func": sampler, "kwargs": None},
        "kwargs": {"batch_size": BATCH},
    }


def stage(key="IKLLoss", *, term="ikl", process=OURS, epochs=3, optimizer=True, accumulate=1, **kwargs):
    """The `train:` block of a config of distillation, whose one loss has ``kwargs``."""
    loss = {"criterion": {"key": key, "kwargs": {**PLACES, **kwargs}}, "weight": 1.0}
    config = {
        "num_epochs": epochs,
        "train_data_loader": loader(RandomSampler),
        "val_data_loader": loader(SequentialSampler),
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {term: loss}}},
    }
    if optimizer:
        config["optimizer"] = {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9}, "grad_accum_step": accumulate}
    if process is not None:
        config["pre_epoch_process"] = process
    return config


def train_epoch(box, epoch, *, steps=None):
    box.pre_epoch_process(epoch=epoch)
    torch.manual_seed(100 + epoch)
    for step, (x, y, extra) in enumerate(box.train_data_loader):
        if step == steps:
            break
        box.post_forward_process(loss=box.forward_process(x, y, extra))


def the_loss(box):
    (loss,) = find_losses(box.criterion).values()
    return loss
