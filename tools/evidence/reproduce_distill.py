"""What the jobs of reproduce_distill_plan do: adapt the teacher, train students, compare and time them.

Each function takes the settings of a job and its folder, and returns what is worth keeping, as JSON can hold it.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchdistill.models.registry import register_model
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomHorizontalFlip

from evidence.reproduce_distill_plan import CONFIGS, WEIGHTS_VARIABLE, public_weights
from evidence.timing import in_turn, median_ratio, timed
from ikl_plugins._files import written_aside
from ikl_plugins.checkpoints import load_weights
from ikl_plugins.models import resnet8, resnet56
from ikl_plugins.torchdistill.training import DivergenceError, Trainer, last_path, load_checkpoint, load_config, run

CLASSES = 10


# --- the teacher -----------------------------------------------------------------------------------------------------


def public_resnet56(weights: dict[str, Tensor], images: Tensor) -> nn.Module:
    """Our ResNet-56 with the public network's weights, in eval mode.

    The public network's shortcut between stages takes every second pixel and sets channels of zeros on both sides. As
    a convolution and a normalisation, which ours has there, that is a matrix of zeros and ones, and a normalisation
    that gives back what it takes away: its scale and shift are the statistics of its input, here of ``images``. In
    training mode it is about the same function, as the statistics of a batch are about those.
    """
    model = resnet56(num_classes=CLASSES).eval()
    state = model.state_dict()
    state.update({name.removeprefix("module.").replace("linear.", "fc."): value for name, value in weights.items()})
    shortcuts = [model.layer2[0].downsample, model.layer3[0].downsample]
    model.load_state_dict(state)
    seen: dict[nn.Module, Tensor] = {}
    for convolution, normalisation in shortcuts:
        _, inputs = convolution.weight.shape[:2]
        nn.init.zeros_(convolution.weight)
        for channel in range(inputs):
            convolution.weight.data[channel + inputs // 2, channel] = 1.0
        normalisation.running_var.fill_(1.0 - normalisation.eps)
        convolution.register_forward_hook(lambda module, _, output: seen.update({module: output}))
    with torch.no_grad():
        model(images)
    for convolution, normalisation in shortcuts:
        convolution._forward_hooks.clear()
        variance, mean = torch.var_mean(seen[convolution], (0, 2, 3))
        normalisation.running_mean.copy_(mean)
        normalisation.running_var.copy_(variance)
        normalisation.weight.data.copy_((variance + normalisation.eps).sqrt())
        normalisation.bias.data.copy_(mean)
    return model


def teacher(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Adapts the public weights to the images."""
    config = _config("teacher", settings, folder, epochs=settings["epochs"])
    source = folder / "public_resnet56.pt"
    model = _write_public(Path(os.environ[WEIGHTS_VARIABLE]), config, source)
    public = _accuracy(model, config["datasets"]["cifar10/val"])
    config["models"]["model"]["src_ckpt"] = os.fspath(source)
    found = _resumed_run(config, settings["seed"])
    return {"public_val_accuracy": public, **_kept(found), "test_accuracy": found["test_accuracy"]}


def _write_public(weights: Path, config: dict[str, Any], target: Path) -> nn.Module:
    """Our ResNet-56 with the public weights, in memory and as a file; the statistics are those of 500 images."""
    dataset = config["datasets"]["cifar10/train"]
    places = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:500].tolist()
    model = public_resnet56(load_weights(weights), torch.stack([dataset[place][0] for place in places]))
    with written_aside(target) as aside:
        torch.save({"model": model.state_dict()}, aside)
    return model


@torch.inference_mode()
def _accuracy(model: nn.Module, dataset: Any) -> float:
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in DataLoader(dataset, 256))
    return 100.0 * right / len(dataset)


def _teacher_model(folder: Path) -> nn.Module:
    model = resnet56(num_classes=CLASSES)
    model.load_state_dict(load_checkpoint(folder.parent / "teacher" / "teacher.pt")["model"])
    return model.eval()


# --- the teacher's predictions, once for all runs --------------------------------------------------------------------


def predictions(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The teacher's logits for each training image and its mirror image."""
    config = _config("kd", settings, folder)
    dataset = config["datasets"]["cifar10/train"]
    folders = dataset.dataset if isinstance(dataset, Subset) else dataset
    transform = folders.transform
    if not isinstance(transform, Compose) or not isinstance(transform.transforms[0], RandomHorizontalFlip):
        raise RuntimeError("the images of the miniature must be flipped, and nothing else")
    model = _teacher_model(folder)
    keys, logits = [], []
    for flip in (0.0, 1.0):
        folders.transform = Compose([RandomHorizontalFlip(flip), *transform.transforms[1:]])
        for images, _ in DataLoader(dataset, 256):
            with torch.inference_mode():
                logits.append(model(images))
            keys.extend(_key(image) for image in images)
    with written_aside(folder / "predictions.pt") as aside:
        torch.save({"keys": keys, "logits": torch.cat(logits)}, aside)
    return {"images": len(keys)}


def pair_weights(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How much of the MSE's weight lies on pairs of different classes, and on those without the most likely class.

    The weights of the pairs (j, k) are the products w_j * w_k, their sum is 1, and a pair of a class with itself has no
    difference: what is left to the MSE is 1 - sum_j w_j ** 2. Once for the weights of each image, once for those of its
    class (IKL's global information), over the training images, for some temperatures.
    """
    dataset = _config("kd", settings, folder)["datasets"]["cifar10/train"]
    targets = (
        torch.tensor(dataset.dataset.targets)[dataset.indices]
        if isinstance(dataset, Subset)
        else torch.tensor(dataset.targets)
    )
    content = torch.load(folder.parent / "predictions" / "predictions.pt", weights_only=True)
    logits = content["logits"][: len(targets)].double()  # the first half are the images as they are
    found = []
    for temperature in (1.0, 4.0, 16.0):
        single = torch.softmax(logits / temperature, 1)
        classes = torch.stack([single[targets == label].mean(0) for label in range(CLASSES)])[targets]
        for name, weights in (("image", single), ("class", classes)):
            largest = weights.max(1).values
            between = 1 - (weights**2).sum(1)
            without = (1 - largest) ** 2 - ((weights**2).sum(1) - largest**2)
            found.append(
                {
                    "weights": name,
                    "temperature": temperature,
                    "between_classes": between.mean().item(),
                    "without_the_largest": without.mean().item(),
                    "deviation": between.std().item(),
                }
            )
    return {"rows": found}


def _key(image: Tensor) -> bytes:
    return hashlib.blake2b(image.numpy(), digest_size=16).digest()


@register_model(key="reproduce.remembered_teacher")
class RememberedTeacher(nn.Module):
    """A teacher that knows its logits of the images it will be shown, from the file of :func:`predictions`."""

    def __init__(self, file: str) -> None:
        super().__init__()
        content = torch.load(file, weights_only=True)
        self.places = {key: place for place, key in enumerate(content["keys"])}
        self.logits = content["logits"]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of images (N, 3, H, W); a KeyError for an image that was not among those of the file."""
        return self.logits[[self.places[_key(image)] for image in images]]


# --- the students ----------------------------------------------------------------------------------------------------


@register_model(key="reproduce.resnet8")
def _resnet8(**keywords: Any) -> nn.Module:
    """The student of the configs, with its channels last: equal but for rounding, in two thirds of the time."""
    return resnet8(**keywords).to(memory_format=torch.channels_last)


def student(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains one student; with 'tested' the best checkpoint sees the test images."""
    config = _config(settings["method"], settings, folder, settings["epochs"], settings["keywords"])
    _trained(config)["key"] = "reproduce.resnet8"
    if "teacher_model" in config["models"]:
        file = os.fspath(folder.parent / "predictions" / "predictions.pt")
        config["models"]["teacher_model"] = {"key": "reproduce.remembered_teacher", "kwargs": {"file": file}}
    if not settings["tested"]:
        config["test"]["test_data_loader"]["dataset_id"] = "cifar10/val"
    found = _resumed_run(config, settings["seed"])
    return {**_kept(found), **({"test_accuracy": found["test_accuracy"]} if settings["tested"] else {})}


def probe(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains one student with what may be too much for it: a loss that does not stay finite is an answer, and no error.

    Its 'val_accuracy' is None then.
    """
    try:
        return student(settings, folder)
    except DivergenceError as error:
        return {"val_accuracy": None, "history": [], "stopped": str(error)}


def _config(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    epochs: int | None = None,
    keywords: dict[str, float] | None = None,
) -> dict[str, Any]:
    """A shipped config with the budget, the place and the keywords of a job."""
    config = load_config(CONFIGS / f"{name}.yaml")
    for split, per_class in (
        ("train", settings["images_per_class"]),
        ("val", settings["held_out_per_class"]),
        ("test", settings["held_out_per_class"]),
    ):
        if per_class is not None:
            dataset = config["datasets"][f"cifar10/{split}"]
            config["datasets"][f"cifar10/{split}"] = Subset(dataset, first_of_each_class(dataset, per_class))
    trained = _trained(config)
    trained["dst_ckpt"] = os.fspath(folder / f"{name}.pt")
    if epochs is not None:
        config["train"]["num_epochs"] = epochs
        config["train"]["scheduler"]["kwargs"]["T_max"] = epochs
    if keywords:
        (term,) = config["train"]["criterion"]["kwargs"]["sub_terms"].values()
        term["criterion"]["kwargs"].update(keywords)
    return config


def _trained(config: dict[str, Any]) -> dict[str, Any]:
    """The block of the model that a config trains."""
    models: dict[str, Any] = config["models"]
    return models["student_model"] if "student_model" in models else models["model"]


def first_of_each_class(dataset: ImageFolder, count: int) -> list[int]:
    """The places of the first images of each class, in the data set's order."""
    left = dict.fromkeys(range(len(dataset.classes)), count)
    places = []
    for place, label in enumerate(dataset.targets):
        if left[label] > 0:
            left[label] -= 1
            places.append(place)
    return places


def _resumed_run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The driver's run, from its last checkpoint if there is one."""
    last = last_path(_trained(config)["dst_ckpt"])
    start = load_checkpoint(last)["epoch"] if last.is_file() else 0
    return run(config, seed=seed, start_epoch=start)


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    history = [{key: round(value, 6) for key, value in row.items()} for row in found["history"]]
    return {"val_accuracy": found["best_val_accuracy"], "history": history}


# --- DKL is KL, and what a step costs --------------------------------------------------------------------------------


def _trainers(settings: dict[str, Any], folder: Path, keywords: dict[str, dict[str, float]]) -> dict[str, Trainer]:
    """The boxes of some methods as users have them: the teacher is asked in every step."""
    found = {}
    for method in keywords:
        config = _config(method, settings, folder, keywords=keywords[method])
        if "teacher_model" in config["models"]:
            config["models"]["teacher_model"]["src_ckpt"] = os.fspath(folder.parent / "teacher" / "teacher.pt")
        found[method] = Trainer(config, torch.device("cpu"), seed=0)
        found[method].box.pre_epoch_process(epoch=0)
    return found


def equality(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How far the students of KD and DKL are apart after the same steps, in both precisions."""
    return {
        str(dtype).removeprefix("torch."): _apart(
            [_trainers(settings, folder, {method: settings[method]})[method] for method in ("kd", "dkl")],
            dtype,
            settings["steps"],
        )
        for dtype in (torch.float64, torch.float32)
    }


def _apart(pair: list[Trainer], dtype: torch.dtype, steps: int) -> list[float]:
    """After each step on the same batches: norm of the difference of the weights, relative to that of the first."""
    for trainer in pair:
        for module in (trainer.box.teacher_model, trainer.box.student_model):
            module.to(dtype)
    batches = iter(pair[0].box.train_data_loader)
    apart = []
    for _ in range(steps):
        images, labels, extra = next(batches)
        for trainer in pair:
            loss = trainer.box.forward_process(images.to(dtype), labels, extra)
            trainer.box.post_forward_process(loss=loss)
        first, second = (
            torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]) for trainer in pair
        )
        apart.append(((second - first).norm() / first.norm()).item())
    return apart


def timing(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of a whole training step, all methods in turn on the same batch, in shuffled order."""
    trainers = _trainers(settings, folder, settings["chosen"])
    images, labels, extra = next(iter(trainers["kd"].box.train_data_loader))

    def step(box: Any) -> None:
        loss = box.forward_process(images, labels, extra)
        loss.item()
        box.post_forward_process(loss=loss)

    steps = {method: timed(partial(step, trainer.box)) for method, trainer in trainers.items()}
    times = in_turn(steps, 0.0, least=settings["rounds"])
    return {
        method: {"seconds": statistics.median(values), "relative_to_kd": median_ratio(values, times["kd"])}
        for method, values in times.items()
    }


def write_public_teacher(weights: Path | None) -> Path:
    """Writes the public weights to where the config of the teacher reads them; returns the place."""
    config = load_config(CONFIGS / "teacher.yaml")
    place = Path(config["models"]["model"]["src_ckpt"])
    _write_public(public_weights(weights), config, place)
    return place
