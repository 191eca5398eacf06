"""Evaluations of others, such as adaptive attacks: a record of each, and what their adversarial images prove."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation as check
from ..._limits import printable, read_text
from ..conditions import own_conditions, trainable_copy
from ..data import load_images
from ..eps import Eps, parse_eps
from .attacks import outside, random_state_kept
from .log import percent
from .seal import parsed

__all__ = ["External", "check_external", "lowest_robust", "read_external", "verify_external"]

_TEXTS = ("attack", "by", "code")
_ACCURACIES = ("natural_accuracy", "robust_accuracy")
_KEYS = (*_TEXTS, *_ACCURACIES, "n_examples", "threat_model", "eps")
_SAME = 0.1  # points by which another machine may find another natural accuracy on the same number of images


@dataclasses.dataclass(frozen=True)
class External:
    """An evaluation of others.

    Attributes:
        attack: its name.
        by: who has made it.
        code: address of the attack's code.
        natural_accuracy, robust_accuracy: in percent. Of adversarial images that were run, the robust one counts what
            falls neither to the attacks of the log nor to them.
        n_examples: number of images.
        threat_model: 'Linf', 'L2' or 'L1'.
        eps: radius.
        adversarial: an .npz file as ``ikl evaluate --export`` writes it: ``image`` and ``label`` of all evaluated
            images, in their order; None for none.
        fooled: how many of these images the model was found to get wrong; None for a record that is only stated.
    """

    attack: str
    by: str
    code: str
    natural_accuracy: float
    robust_accuracy: float
    n_examples: int
    threat_model: str
    eps: Eps
    adversarial: Path | None = None
    fooled: int | None = None

    def record(self) -> dict[str, Any]:
        """The content of a file that :func:`read_external` reads, and ``fooled``."""
        file = None if self.adversarial is None else self.adversarial.name
        return {**vars(self), "eps": self.eps.text, "adversarial": file}

    def __str__(self) -> str:
        how = "as stated" if self.fooled is None else f"its images run again, of which {self.fooled:,} fool the model"
        return (
            f"{self.attack} by {self.by} ({self.code}): {self.robust_accuracy:.2f} % of {self.n_examples:,} images, "
            f"{self.threat_model} eps {self.eps}; {how}"
        )


def read_external(caller: str, source: External | Path | str) -> External:
    """Reads a record: a JSON file with the keys of :class:`External`, ``adversarial`` relative to it or left out.

    Raises:
        ValueError: no such file, or not in JSON; a key that is missing or unknown, or a value that cannot be. The
            message names the file and the key.
        TypeError: a value of the wrong type.
    """
    if isinstance(source, External):
        return source
    path = Path(source)
    try:
        content = parsed(read_text(caller, path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{caller}: `external` must be a record in JSON, but {path} is not: {error}.") from error
    where = f"{caller}: {path}"
    if not isinstance(content, dict):
        raise ValueError(f"{where}: it must hold a mapping, got {type(content).__name__}.")
    for key in _KEYS:
        if key not in content:
            raise ValueError(f"{where}: `{key}` must be there. Its keys are {', '.join(_KEYS)}, and `adversarial`.")
    for key in content:
        if key not in (*_KEYS, "adversarial"):
            raise ValueError(check.unknown_name_message(where, "key", key, (*_KEYS, "adversarial")))
    for key in _TEXTS:
        if (
            not isinstance(content[key], str)
            or not content[key].strip()
            or printable(content[key], None) != content[key]
        ):
            raise ValueError(f"{where}: `{key}` must be one line of text, got {content[key]!r}. Write it out.")
    if "://" not in content["code"]:
        raise ValueError(f"{where}: `code` must be an address, got {content['code']!r}. Write https://...")
    for key in _ACCURACIES:
        content[key] = check.check_number(where, key, content[key])
    if not content["robust_accuracy"] <= content["natural_accuracy"] <= 100:
        raise ValueError(
            f"{where}: percentages must have robust <= natural <= 100, got {content['robust_accuracy']} and "
            f"{content['natural_accuracy']}. Correct them."
        )
    check.check_integer(where, "n_examples", content["n_examples"])
    if content["threat_model"] not in ("Linf", "L2", "L1"):
        raise ValueError(
            check.unknown_name_message(where, "threat_model", str(content["threat_model"]), ("Linf", "L2", "L1"))
        )
    content["eps"] = parse_eps(where, content["eps"], norm=content["threat_model"])
    file = content.get("adversarial")
    if file is not None and not (isinstance(file, str) and (path.parent / file).is_file()):
        raise ValueError(f"{where}: `adversarial` must be a file beside it, got {file!r}. Bring it there.")
    content["adversarial"] = None if file is None else path.parent / file
    return External(**content)


def check_external(caller: str, external: External, log: Mapping[str, Any]) -> None:
    """Refuses a record of another threat model, or of a model of another natural accuracy."""
    same = (
        log["threat_model"] == external.threat_model
        and external.eps.exact == parse_eps(caller, log["eps"], norm=log["threat_model"]).exact
    )
    if not same:
        raise ValueError(
            f"{caller}: `external` must have the threat model of the evaluation, {log['threat_model']} {log['eps']}, "
            f"got {external.threat_model} {external.eps} of {external.attack}. Leave it out."
        )
    natural = log["natural_accuracy"]
    if external.n_examples == log["n_examples"] and abs(external.natural_accuracy - natural) > _SAME:
        raise ValueError(
            f"{caller}: `external` must be of this model, with natural accuracy {natural:.2f} %, got "
            f"{external.natural_accuracy:.2f} % of {external.attack}. Leave it out."
        )


@own_conditions()
def verify_external(
    caller: str,
    external: External,
    model: nn.Module,
    log: Mapping[str, Any],
    images: Tensor,
    *,
    batch_size: int = 128,
) -> External:
    """Runs the model on the adversarial images of a record, as one more attack after those of the log.

    Args:
        caller: whom a refusal names.
        external: the record.
        model: the classifier that was evaluated, in eval mode.
        log: of its evaluation.
        images: all that were evaluated, (N, C, H, W) in [0, 1].
        batch_size: images per batch.

    Returns:
        The record with the accuracies that were found, over all images of the log; as it was without adversarial
        images.

    Raises:
        ValueError: other images or labels than those that were evaluated; an image outside [0, 1] or the ball.
    """
    if external.adversarial is None:
        return external
    made = load_images(str(external.adversarial))
    if made.images.shape != images.shape or made.labels.tolist() != log["labels"]:
        raise ValueError(
            f"{caller}: {external.adversarial} must hold the {len(images)} evaluated images in their order, "
            f"{tuple(images.shape)} with their labels, got {tuple(made.images.shape)}. Export them all."
        )
    norm, eps = external.threat_model, float(external.eps)
    pairs = zip(torch.split(images.cpu().float(), batch_size), torch.split(made.images, batch_size), strict=True)
    far = torch.cat([outside(natural, image, norm, eps) for natural, image in pairs]).nonzero().flatten().tolist()
    if far:
        raise ValueError(
            f"{caller}: {external.adversarial} must hold images within {external.threat_model} eps {external.eps}, but "
            f"{len(far)} are not, the first at {far[0]}. Project them."
        )
    device = next(iter(model.parameters()), images).device
    model = trainable_copy(caller, model).to(device)
    with random_state_kept(device), torch.no_grad():
        torch.manual_seed(log["seed"])
        predictions = torch.cat(
            [model(batch.to(device)).max(1)[1].cpu() for batch in torch.split(made.images, batch_size)]
        )
    wrong = predictions.ne(made.labels)
    robust = torch.tensor(log["robust"], dtype=torch.bool) & ~wrong
    fooled = int((wrong & torch.tensor(log["natural_correct"], dtype=torch.bool)).sum())
    return dataclasses.replace(
        external,
        natural_accuracy=log["natural_accuracy"],
        robust_accuracy=percent(robust.int().tolist()),
        n_examples=len(images),
        fooled=fooled,
    )


def lowest_robust(log: Mapping[str, Any], externals: Sequence[External]) -> float:
    """The lowest robust accuracy of the evaluations, in percent: more may not be claimed."""
    return min([float(log["robust_accuracy"]), *(external.robust_accuracy for external in externals)])
