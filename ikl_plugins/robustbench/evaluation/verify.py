"""A log against its model: the predictions that it states are made again, on images drawn at random."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ... import _validation as check
from ..conditions import own_conditions, precision, trainable_copy
from ..data import Images, content_sha256
from ..eps import parse_eps
from .attacks import Attacks, Setting, distances, outside, random_state_kept
from .batches import Batches, image_digests
from .checks import check_data, check_model
from .corruptions import corruption_source
from .evidence import check_log, expected_batches
from .log import Evaluation, class_names, data_facts, weights_sha256
from .plan import plan_attacks

__all__ = ["Verified", "verify"]

_CALLER = "verify"
_CHEAP = 4096  # forward passes of one image, natural and adversarial together, up to which all images are run
# Share of the range of an image's logits by which another arithmetic, as of another device, may reorder them.
_MARGIN = 1e-3
_ROUNDING = 1e-6  # of a pixel: Square's steps for L1 end up to 5e-7 above 1
_SEVERITY = 0.1  # points that the accuracy under a corruption may be off by rounding
_ATTACK = "apgd-ce"  # with which images that stand are attacked again
_MAY_FALL = 8  # one in so many of them, and at least two: another seed finds what the first one has missed
_MAY_DIFFER = 0.01  # of the images that are run, and at least one


@dataclass(frozen=True)
class Verified:
    """What was compared, all of which was as the log says.

    Attributes:
        n_examples: natural images of the log.
        natural: natural images that the model was run on.
        fell: adversarial images of the log; each was found to lie in [0, 1] and in the ball.
        adversarial: adversarial images that the model was run on.
        differing: predictions that differ by what rounding explains.
        drawn: what the images were drawn with, in hexadecimal digits; empty if all were run.
        compared: False for a model that draws random numbers, or another precision than float32: predictions of one
            run are then not those of the next.
        severities: corruptions and severities that the model was run on again.
        attacked: images that stand, which were attacked again.
        lost: those of them that fell.
    """

    n_examples: int
    natural: int
    fell: int
    adversarial: int
    differing: int
    drawn: str
    compared: bool
    severities: int | None = None
    attacked: int = 0
    lost: int = 0

    def __str__(self) -> str:
        if not self.compared:
            return f"not run again, as its predictions are not those of another run; {self.fell:,} images in the ball"
        how = f", drawn at random ({self.drawn})" if self.drawn else ""
        attacked = f"{self.adversarial:,} of {self.fell:,} adversarial images"
        if self.severities is not None:
            attacked = f"all images of {self.severities} corruptions and severities"
        images = f"{self.natural:,} of {self.n_examples:,} natural and {attacked}"
        rounding = f", {self.differing} differ by rounding" if self.differing else ""
        again = f"; {self.lost} of {self.attacked} images that stand fell to {_ATTACK} again" if self.attacked else ""
        return f"run again on {images}{how}: as the log says{rounding}{again}"


@own_conditions()
def verify(
    model: nn.Module,
    evaluation: Evaluation | str | Path,
    images: Tensor | Images,
    labels: Tensor | None = None,
    *,
    sample: int | None = 512,
    attack: int = 16,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    data_dir: str | Path | None = None,
) -> Verified:
    """Runs a model again on images of an evaluation, and compares with its log.

    Compared are the weights, the data, the predictions on natural images and on the stored adversarial ones; that each
    stored image lies, but for float32 rounding, in [0, 1] and in the ball around its natural image; and the keys of the
    batch files, which follow from weights, data, attacks, radius, seed, device and versions. Which images are run is
    drawn anew each time from the system's randomness, so that nobody can prepare a log for it: of a log with a share p
    of false predictions, 512 images miss all with probability (1 - p)^512, which for p = 1 % is 0.6 %.

    That an image stands is proved only by attacking it again. Of a finished AutoAttack 'standard' or 'plus' a few are,
    with APGD-CE and another seed, which tells a log of attacks that never ran: if a third of the images that stand in
    it would fall, 16 of them let 6 % through. A log that claims a few points too much needs a whole evaluation.

    Args:
        model: the classifier that was evaluated, in eval mode.
        evaluation: its evaluation, with the adversarial images, or the file of the log.
        images: all that were evaluated, (N, C, H, W) in [0, 1], or as
            :func:`~ikl_plugins.robustbench.load_images` gives them: then their geometry, class names and right to a
            test set's name are compared too.
        labels: their class indices (N,); not beside loaded images.
        sample: how many natural and how many adversarial images are run; None for all. All are run, too, where these
            are at most 4,096 together.
        attack: how many images that stand are attacked again, at most; 0 for none. 16 take about as long as 5,000
            predictions.
        batch_size: images per batch.
        device: where to compute; None for where the model is.
        data_dir: of an evaluation under corruptions, the folder that has ``CIFAR-10-C`` or the like: the model is run
            again on one corruption and severity at least, and as many as ``sample`` images allow. None for none.

    Returns:
        How much was compared.

    Raises:
        TypeError, ValueError: arguments that :func:`~ikl_plugins.robustbench.evaluate` refuses.
        ValueError: the log does not agree with itself, the model, the images or the stored images; the message names
            the field. The adversarial images are not beside the log. Of the images that are attacked again more than
            one in eight fall, and more than two.
    """
    evaluation = evaluation if isinstance(evaluation, Evaluation) else Evaluation.load(evaluation)
    log = evaluation.log
    check_log(_CALLER, log)
    check_model(_CALLER, model, log["version"] or "standard")
    loaded = images if isinstance(images, Images) else None
    if loaded is not None and labels is not None:
        raise TypeError(f"{_CALLER}: `labels` must be left out beside loaded images, which have their own.")
    pixels, targets = (images.images, images.labels) if isinstance(images, Images) else (images, labels)
    pixels, targets = check_data(_CALLER, pixels, cast(Tensor, targets))
    check.check_integer(_CALLER, "batch_size", batch_size)
    if sample is not None:
        check.check_integer(_CALLER, "sample", sample)
    check.check_integer(_CALLER, "attack", attack, least=0)
    _check_origin(model, log, pixels, targets)
    if loaded is not None:
        _check_loaded(log, loaded)
    stored = _checked_images(evaluation, pixels)
    if log["fell_to"] is not None:
        _check_keys(log, pixels, targets)
    natural, fell = list(range(len(pixels))), sorted(stored)
    if log["version"] == "rand" or log["precision"] != "float32":
        return Verified(len(pixels), 0, len(fell), 0, 0, "", compared=False)
    drawn = ""
    if sample is not None and len(natural) + len(fell) > _CHEAP:
        drawn = os.urandom(8).hex()
        draw = np.random.default_rng([*bytes.fromhex(drawn)])
        natural, fell = (sorted(draw.permutation(rows)[:sample].tolist()) for rows in (natural, fell))
    device = torch.device(device) if device is not None else next(iter(model.parameters()), pixels).device
    model = trainable_copy(_CALLER, model).to(device)
    runs = (("natural_predictions", natural, pixels), ("predictions", fell, stored))
    with random_state_kept(device), torch.no_grad():
        torch.manual_seed(log["seed"])
        differing = sum(
            _differing(model, [of[at] for at in rows[start : start + batch_size]], rows[start:], log, field, device)
            for field, rows, of in runs
            for start in range(0, len(rows), batch_size)
        )
        again = _attacked_again(model, log, pixels, targets, attack, batch_size, device)
        severities = _check_severities(model, log, data_dir, sample, batch_size, device)
    allowed = max(1, int(_MAY_DIFFER * (len(natural) + len(fell))))
    if differing > allowed:
        raise ValueError(
            f"{_CALLER}: predictions must be those of the log, but {differing} of {len(natural) + len(fell)} differ by "
            f"rounding, more than {allowed}. Run it on the device of the evaluation."
        )
    counts = len(pixels), len(natural), len(stored), len(fell), differing
    return Verified(*counts, drawn, True, severities, *again)


def _refuse(field: str, stated: object, found: object, way_out: str = "Evaluate this model.") -> ValueError:
    return ValueError(f"{_CALLER}: `{field}` of the log is {stated}, but the evidence gives {found}. {way_out}")


def _check_origin(model: nn.Module, log: dict[str, Any], images: Tensor, labels: Tensor) -> None:
    """Refuses another model, and other images than those that were evaluated."""
    weights, dtype, data = weights_sha256(model), precision(model), log["data"]
    if weights != log["weights_sha256"]:
        raise _refuse("weights_sha256", str(log["weights_sha256"])[:12], weights[:12])
    if dtype != log["dtype"]:
        raise _refuse("dtype", log["dtype"], dtype)
    same = "Pass the images that were evaluated, all of them."
    if not isinstance(data, dict) or data["n_examples"] != len(images):
        count = data["n_examples"] if isinstance(data, dict) else None
        raise _refuse("data.n_examples", count, f"{len(images)} images", same)
    digest = content_sha256(images, labels)
    if digest != data["sha256"]:
        raise _refuse("data.sha256", data["sha256"][:12], digest[:12], same)
    if labels.tolist() != log["labels"]:
        raise _refuse("labels", "of other images", "other labels", same)


def _check_loaded(log: dict[str, Any], loaded: Images) -> None:
    """Refuses what the log says of the origin of the images, unless they have it."""
    stated, found = log["data"], data_facts(loaded, loaded.images, loaded.labels)
    for key in ("source", "preprocessing"):
        if stated[key] != found[key]:
            raise _refuse(f"data.{key}", stated[key], found[key], "Load the images as for the evaluation.")
    classes = class_names(loaded, log["n_classes"])
    if log["classes"] != classes:
        raise _refuse("classes", log["classes"], classes, "Load the images as for the evaluation.")


def _checked_images(evaluation: Evaluation, images: Tensor) -> dict[int, Tensor]:
    """The stored adversarial images, each of which is one of its natural image."""
    log, stored = evaluation.log, evaluation.adversarial
    fell = [at for at, attack in enumerate(log["fell_to"] or ()) if attack is not None]
    if not fell:
        return {}
    if stored is None or sorted(stored) != fell:
        raise ValueError(
            f"{_CALLER}: `adversarial` of the log must name a folder beside it with the {len(fell)} images that fell, "
            f"got {log['adversarial']}. Bring it back."
        )
    for start in range(0, len(fell), 256):
        rows = fell[start : start + 256]
        shapes = {tuple(stored[at].shape) for at in rows}
        if shapes != {tuple(images.shape[1:])} or any(stored[at].dtype != torch.float32 for at in rows):
            raise _refuse(
                "adversarial", f"of images of {tuple(images.shape[1:])}", f"images of {shapes}", "Evaluate again."
            )
        made = torch.stack([stored[at] for at in rows])
        for at, image in zip(rows, made, strict=True):
            low, high = image.min().item(), image.max().item()
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # also of NaN
                raise _refuse(f"adversarial[{at}]", "an image in [0, 1]", f"{low:.4g} to {high:.4g}", "Evaluate again.")
        norm, eps = log["threat_model"], log["eps_value"]
        for at, far, over in zip(
            rows, distances(images[rows], made, norm), outside(images[rows], made, norm, eps), strict=True
        ):
            if over:
                within = f"an image within {norm} eps {log['eps']}"
                raise _refuse(f"adversarial[{at}]", within, f"{far.item():.6g}", "Evaluate again.")
    return dict(stored)


def _check_keys(log: dict[str, Any], images: Tensor, labels: Tensor) -> None:
    """Refuses keys of batches that do not follow from what the log says and the images."""
    predictions = torch.tensor(log["natural_predictions"])
    batches = Batches(_CALLER, None, log, image_digests(images, labels, predictions))
    for place, entry in enumerate(log["progress"]):
        rows = zip(entry["keys"], expected_batches(log, entry["attack"]), strict=True)
        for number, (key, index) in enumerate(rows):
            if key is not None and key != (found := batches.key(entry["attack"], index)):
                raise _refuse(f"progress[{place}].keys[{number}]", key, found, "Evaluate again.")


def _differing(
    model: nn.Module,
    images: Sequence[Tensor],
    rows: Sequence[int],
    log: dict[str, Any],
    field: str,
    device: torch.device,
) -> int:
    """How many predictions of a batch, the first of the rows, differ by rounding; another difference is refused."""
    logits = model(torch.stack([*images]).to(device)).float().cpu()
    stated = torch.tensor([log[field][at] for at in rows[: len(images)]])
    if logits.shape[1] != log["n_classes"]:
        raise _refuse("n_classes", log["n_classes"], f"{logits.shape[1]} logits")
    top, found = logits.max(1)
    missing = top - logits.gather(1, stated[:, None])[:, 0]
    beyond = missing > _MARGIN * (top - logits.min(1).values)
    if beyond.any():
        at = int(beyond.nonzero()[0])
        raise _refuse(f"{field}[{rows[at]}]", int(stated[at]), int(found[at]))
    return int(found.ne(stated).sum())


def _attacked_again(
    model: nn.Module,
    log: dict[str, Any],
    images: Tensor,
    labels: Tensor,
    count: int,
    batch_size: int,
    device: torch.device,
) -> tuple[int, int]:
    """How many images that stand were attacked again, drawn at random, and how many of these fell."""
    if log["version"] not in ("standard", "plus") or not (log["finished"] and any(log["robust"]) and count):
        return 0, 0
    standing = np.flatnonzero(log["robust"])
    rows = torch.from_numpy(np.random.default_rng([*os.urandom(8)]).permutation(standing)[:count])
    setting = Setting(
        log["threat_model"],
        parse_eps(_CALLER, log["eps"], norm="L2"),  # without the warning of Linf
        log["seed"] ^ 1,
        device,
        log["n_classes"],
    )
    parameters = {name: values for name, values in log["parameters"].items() if name == _ATTACK}
    adversary = Attacks(_CALLER, plan_attacks(_CALLER, "standard", None), model, setting, parameters)
    perturb, lost = adversary.prepared(_ATTACK), 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        clean, true = images[part].to(device), labels[part].to(device)
        lost += int(adversary.model(perturb(clean, true)).argmax(1).ne(true).sum())
    if lost > max(2, len(rows) // _MAY_FALL):
        raise _refuse("robust", f"1 for {len(rows)} images that {_ATTACK} attacked again", f"0 for {lost}")
    return len(rows), lost


def _check_severities(
    model: nn.Module,
    log: dict[str, Any],
    data_dir: str | Path | None,
    sample: int | None,
    batch_size: int,
    device: torch.device,
) -> int | None:
    """How many corruptions and severities were run again, drawn at random; None if there are none."""
    entries = log.get("corruptions")
    if entries is None or data_dir is None:
        return None if entries is None else 0
    source = corruption_source(_CALLER, log["dataset"], log["threat_model"], Path(data_dir))
    source.check_files(offline=True)
    each, count = log["n_examples"], len(entries)
    if sample is not None and each * count > _CHEAP:
        count = min(count, max(1, sample // each))
    drawn = np.random.default_rng([*os.urandom(8)]).permutation(len(entries))[:count].tolist()
    for at in drawn:
        entry, name = entries[at], f"corruptions[{at}]"
        images, labels = source.load(entry["corruption"], entry["severity"], each)
        digest = content_sha256(images, labels)
        if digest != entry["sha256"]:
            raise _refuse(f"{name}.sha256", entry["sha256"][:12], digest[:12], "Pass the images that were evaluated.")
        accuracy = 100 * source.accuracy(model, images, labels, batch_size, device, log["seed"])
        if abs(accuracy - entry["accuracy"]) > _SEVERITY:
            raise _refuse(f"{name}.accuracy", entry["accuracy"], accuracy)
    return count
