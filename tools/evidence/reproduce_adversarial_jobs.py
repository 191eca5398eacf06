"""What the jobs of reproduce_adversarial_plan do: train with a shipped config, and attack what came of it.

Each function takes the settings of a job and its folder, and returns what is worth keeping, as JSON can hold it. It
goes on where an earlier call in the same folder was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evidence import cache
from evidence.reproduce_adversarial_plan import CONFIGS, EPS
from ikl_plugins import dkl_loss
from ikl_plugins.adversarial import PGD
from ikl_plugins.checkpoints import load_content, load_weights
from ikl_plugins.commands.main import main as ikl
from ikl_plugins.mmpretrain import training as mmpretrain_training

WORK = "work"  # the folder of a training inside that of its job
STEPS, STEP_SIZE = 20, 0.25  # of the PGD that measures, the second relative to eps: 2/255 at 8/255
BATCH = 250
SCORES = ("accuracy/top1", "robust/top1")
# What is kept of a line of the log, where it is there.
LOGGED = (
    "loss",
    "loss_ce",
    "loss_robust",
    "weighted_mse",
    "soft_cross_entropy",
    "adversarial_accuracy",
    "eps",
    "lr",
    "time",
)


# --- training --------------------------------------------------------------------------------------------------------


def train(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains a shipped config with mmpretrain's own script, as `ikl train` does it.

    'options' go behind --cfg-options. Returns the 'log', a row an epoch; each 'validation'; the median of
    'step_seconds'; the 'checkpoint', relative to the folder, and its 'sha256'.
    """
    epochs = settings["epochs"]
    options = {
        "randomness.seed": settings["seed"],
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": epochs,
        "param_scheduler.1.T_max": epochs - 1,
        "default_hooks.checkpoint.max_keep_ckpts": -1,
        **settings["options"],
    }
    work = folder / WORK
    command = [str(CONFIGS / f"{settings['config']}.py"), "--work-dir", str(work), "--resume", "--cfg-options"]
    command += [f"{key}={_option(value)}" for key, value in options.items()]
    mmpretrain_training.main(command)
    log, validation, seconds = read_scalars(work)
    if not any(row["epoch"] == epochs for row in validation):
        _forget_epoch(work, epochs)
        mmpretrain_training.main(command)
        log, validation, seconds = read_scalars(work)
    checkpoint = work / f"epoch_{epochs}.pth"
    return {
        "log": log,
        "validation": validation,
        "step_seconds": seconds,
        "checkpoint": str(checkpoint.relative_to(folder)),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
    }


def _forget_epoch(work: Path, epoch: int) -> None:
    """Takes a training back by an epoch, which it then repeats to the bit.

    MMEngine saves the last checkpoint before it validates, and does not validate where it has nothing left to train: a
    process that ended in between leaves a training that is finished and was never measured.
    """
    (work / f"epoch_{epoch}.pth").unlink()
    last = work / "last_checkpoint"
    if epoch == 1:
        last.unlink()
    else:
        last.write_text(str(work / f"epoch_{epoch - 1}.pth"))


def _option(value: Any) -> str:
    """A value as --cfg-options reads it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def read_scalars(work: Path) -> tuple[list[dict[str, float]], list[dict[str, float]], float]:
    """The last line of each epoch, the validations, and the median seconds of a step, as MMEngine wrote them.

    What a later process did again replaces what an earlier one wrote of it.
    """
    epochs: dict[int, dict[str, float]] = {}
    validations: dict[int, dict[str, float]] = {}
    seconds = []
    for file in sorted(work.glob("*/vis_data/scalars.json")):
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # of a process that was ended while it wrote
            if SCORES[0] in line:
                validations[line["step"]] = {"epoch": line["step"], **{score: line[score] for score in SCORES}}
            else:
                epochs[line["epoch"]] = {"epoch": line["epoch"], **{key: line[key] for key in LOGGED if key in line}}
                seconds.append(line["time"])
    in_order = [[rows[epoch] for epoch in sorted(rows)] for rows in (epochs, validations)]
    return in_order[0], in_order[1], statistics.median(seconds)


# --- attacks ---------------------------------------------------------------------------------------------------------


def attack(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Natural accuracy and accuracy under PGD of some 'radii' on 'images' of a 'split', as many of each class.

    Returns which images are right, as :func:`to_hex` writes it, 'natural' and by the radius 'robust', and accuracies in
    percent.
    """
    from ikl_plugins.robustbench import load_images

    images = load_images(cache.data_folder() / settings["split"], n_examples=settings["images"])
    model = _network(settings["config"], folder.parent / settings["training"] / WORK, settings["epoch"])
    natural, robust = _right(model, images.images, images.labels, settings["radii"])
    return {
        "images": len(images),
        "natural": to_hex(natural),
        "robust": {radius: to_hex(right) for radius, right in robust.items()},
        "natural_accuracy": _percent(natural),
        "robust_accuracy": {radius: _percent(right) for radius, right in robust.items()},
    }


def follow(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Accuracy over the epochs of a training, on as many of its own images as of the validation split.

    Returns 'images' and 'rows': for each epoch 'train' and 'val', natural and robust accuracy in percent. What is done
    after each checkpoint is kept in the folder.
    """
    sets = {name: _config_images(settings, f"{name}_dataloader", settings["images"]) for name in ("train", "val")}
    kept = folder / "rows.json"
    rows = cache.read_json(kept) if kept.is_file() else []
    for epoch in settings["epochs"][len(rows) :]:
        model = _network(settings["config"], folder.parent / settings["training"] / WORK, epoch)
        row: dict[str, Any] = {"epoch": epoch}
        for name, (images, labels) in sets.items():
            natural, robust = _right(model, images, labels, [EPS])
            row[name] = [_percent(natural), _percent(robust[EPS])]
        rows.append(row)
        cache.write_json(kept, rows)
    return {"images": {name: len(labels) for name, (_, labels) in sets.items()}, "rows": rows}


def class_prior(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The class prior of a training: rows of probabilities, all equal where it says nothing of the class."""
    path = folder.parent / settings["training"] / WORK / f"epoch_{settings['epoch']}.pth"
    # The live prior; of the averaged weights there is none.
    return {"matrix": load_content(path)["state_dict"]["robust_loss.class_prior.matrix"].tolist()}


def autoattack(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Standard AutoAttack, as `ikl evaluate` runs it, or the 'attacks' of the settings.

    Returns accuracies in percent, how many images stood after each attack, and which are 'robust'.
    """
    checkpoint = folder.parent / settings["training"] / WORK / f"epoch_{settings['epoch']}.pth"
    command = ["evaluate", "--mmpretrain", str(CONFIGS / f"{settings['config']}.py"), "--checkpoint", str(checkpoint)]
    command += ["--data", str(cache.data_folder() / "test"), "--n-examples", str(settings["images"])]
    command += ["--eps", EPS, "--batch-size", str(settings["batch_size"]), "--output", str(folder / "evaluation")]
    if settings["attacks"] is not None:
        command += ["--attacks", ",".join(settings["attacks"])]
    ikl(command)
    log = cache.read_json(folder / "evaluation" / "evaluation.json")
    fell = log["fell_to"]
    standing, left = {}, sum(log["natural_correct"])
    for name in log["attacks"]:
        left -= fell.count(name)
        standing[name] = left
    return {
        "images": log["n_examples"],
        "natural_accuracy": log["natural_accuracy"],
        "robust_accuracy": log["robust_accuracy"],
        "standard": log["standard"],
        "standing": standing,
        "robust": to_hex(torch.tensor(log["robust"])),
    }


def check(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """DKL against TRADES, of equal gradients, and the training's attack in bfloat16 against that in float32.

    Returns 'apart': for each epoch how far the averaged weights of DKL and TRADES are apart, and those of two seeds of
    TRADES, relative to the norm of the weights; 'gradients': by the precision, likewise of the gradients of both losses
    at the same weights and images; 'attacked': by the precision of the attack, the accuracy in percent of the last IKL
    weights in float32.
    """
    trades, dkl, ikl = (settings["trainings"][f"adversarial_{method}"] for method in ("trades", "dkl", "ikl"))

    def weights(training: str, epoch: int) -> Tensor:
        content = load_weights(folder.parent / training / WORK / f"epoch_{epoch}.pth")
        names = [name for name in sorted(content) if name.endswith(("weight", "bias"))]
        return torch.cat([content[name].double().flatten() for name in names])

    apart = []
    for epoch in range(1, settings["epochs"] + 1):
        reference = weights(trades, epoch)
        others = {"dkl": weights(dkl, epoch), "other_seed": weights(settings["other_seed"], epoch)}
        apart.append({"epoch": epoch, **{name: _apart(other, reference) for name, other in others.items()}})
    images, labels = _config_images(settings, "val_dataloader", settings["images"])
    pgd = PGD(eps=EPS, budget="low", random_start="normal", objective="soft_cross_entropy")  # that of the configs
    network = _network(settings["config"], folder.parent / trades / WORK, settings["epochs"])
    torch.manual_seed(0)
    pair = pgd(network, images), images
    gradients = {}
    for precision in ("float64", "float32", "bfloat16"):
        dtype = torch.float64 if precision == "float64" else torch.float32
        network.to(dtype)
        pixels = tuple(half.to(dtype) for half in pair)
        both = [_gradient(network, *pixels, settings["weight"], loss, precision) for loss in ("dkl", "kl")]
        gradients[precision] = _apart(*both)
    attacked = {}
    network = _network(settings["config"], folder.parent / ikl / WORK, settings["epochs"])
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            adversarial = pgd(network, images)
        with torch.no_grad():
            attacked[precision] = _percent(network(adversarial).argmax(1) == labels)
    return {"images": len(labels), "apart": apart, "gradients": gradients, "attacked": attacked}


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _gradient(
    model: nn.Module, adversarial: Tensor, natural: Tensor, weight: float, loss: str, precision: str
) -> Tensor:
    """Of a robust loss, 'dkl' or 'kl', with respect to all weights."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = [model(pixels) for pixels in (adversarial, natural)]
    if loss == "dkl":
        value = weight * dkl_loss(*logits)
    else:
        logs = [half.to(torch.promote_types(half.dtype, torch.float32)).log_softmax(1) for half in logits]
        value = weight * (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean()
    found = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([gradient.double().flatten() for gradient in found])


def _network(config: str, work: Path, epoch: int) -> nn.Module:
    """The averaged weights of an epoch, on pixels in [0, 1], in float32."""
    from ikl_plugins.robustbench import from_mmpretrain

    model: nn.Module = from_mmpretrain(CONFIGS / f"{config}.py", work / f"epoch_{epoch}.pth")
    return model.to(memory_format=torch.channels_last)


def _right(model: nn.Module, images: Tensor, labels: Tensor, radii: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Which images are classified right, natural and under PGD of each radius."""
    images = images.contiguous(memory_format=torch.channels_last)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    with torch.no_grad():
        natural = torch.cat([model(image).argmax(1) == label for image, label in batches])
    robust = {}
    for radius in radii:
        pgd = PGD(eps=radius, budget=[(1.0, STEPS, STEP_SIZE)], random_start="uniform")
        generator = torch.Generator().manual_seed(0)
        right = []
        for image, label in batches:
            adversarial = pgd(model, image, labels=label, generator=generator)
            with torch.no_grad():
                right.append(model(adversarial).argmax(1) == label)
        robust[radius] = torch.cat(right)
    return natural, robust


def _config_images(settings: dict[str, Any], loader: str, count: int) -> tuple[Tensor, Tensor]:
    """Images of a loader of the config in its order, which is that of their classes, spread over all of them."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import DATASETS

    config = Config.fromfile(CONFIGS / f"{settings['config']}.py")
    config.merge_from_dict(settings["options"])
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        dataset = DATASETS.build({**config[loader].dataset, "pipeline": config.test_dataloader.dataset.pipeline})
    samples = [dataset[index] for index in spread(len(dataset), count)]
    pixels = torch.stack([sample["inputs"] for sample in samples]).flip(1) / 255  # the pipeline reads BGR
    return pixels, torch.cat([sample["data_samples"].gt_label for sample in samples])


def spread(total: int, count: int) -> list[int]:
    """So many places among all, as far apart as they can be; all of them where there are not as many."""
    return [place * total // count for place in range(count)] if count < total else list(range(total))


def _percent(right: Tensor) -> float:
    return round(100 * right.double().mean().item(), 4)


def to_hex(right: Tensor) -> str:
    """A truth value for each image in a short text: hexadecimal digits of four each, the first image first."""
    bits = [*map(bool, right.tolist()), *[False] * (-len(right) % 4)]
    return "".join(
        f"{sum(bit << (3 - place) for place, bit in enumerate(bits[at : at + 4])):x}" for at in range(0, len(bits), 4)
    )


def from_hex(text: str, images: int) -> list[bool]:
    """What :func:`to_hex` wrote."""
    bits = [bool(int(digit, 16) >> (3 - place) & 1) for digit in text for place in range(4)]
    return bits[:images]
